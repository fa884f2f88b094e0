"""What an RL run reads and loads by its settings: prompts, models, rewards, a teacher."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import DataSource, EngineServer, Judge, ModelSource, RLStage, Safety, Text
from rlhf_jax.data import chat, formats
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.data.forms.table import PAIR
from rlhf_jax.data.rows import Row
from rlhf_jax.data.rows import texts as texts_of
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.generation.environment import Environment, Reply, load_environment
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders import filter as filters
from rlhf_jax.graders import spec, verifiable
from rlhf_jax.graders.service import Services
from rlhf_jax.rewards.texts import check_function
from rlhf_jax.training.common import initial
from rlhf_jax.training.common.stage import Stage
from rlhf_jax.training.rl import critic, steps, teacher, validation
from rlhf_jax.training.rl.method import Given, Method
from rlhf_jax.types import AlgorithmConfig, Rollout


class Sources(NamedTuple):
    """What an RL run loads beside its prompts; the fields are those of ``RunConfig``."""

    model: ModelSource
    reward: tuple[str, ...]
    safety: Safety
    judge: Judge
    math: verifiable.Settings


class Inputs(NamedTuple):
    """The inputs of an RL run, read and loaded."""

    initial: LanguageModel  # the policy before training
    prompts: EncodedPrompts
    to_validate: EncodedPrompts  # the same, unless ``rl.validation_data`` is given
    reward: spec.Reward
    judge: spec.Reward | None
    guard: steps.Guarded | None  # the filter of responses, which follows a reward on the host
    environment: Environment | None
    teacher: LanguageModel | None
    ask_teacher: Callable[[Rollout], np.ndarray] | None  # log-probs of a teacher on a server

    @property
    def pairs(self) -> validation.Pairs:
        """Which of judge and reward compares pairs of responses, the judge first."""
        if self.judge is not None and self.judge.is_pairs:
            return "judge"
        return "reward" if self.reward.is_pairs else None

    def without_python(self) -> "Inputs":
        """The inputs of a check of memory, which call no server and none of the user's Python."""
        environment = self.environment
        if environment is not None:
            environment = environment._replace(fn=lambda conversation, row: None)
        reward = self.reward
        if reward.host is not None:
            reward = spec.Reward(host=lambda rollout, columns: (np.zeros(len(rollout.tokens)), {}))
        ask_teacher = self.ask_teacher and teacher.unasked
        return self._replace(
            environment=environment, reward=reward, guard=None, ask_teacher=ask_teacher
        )


def read_prompts(source: DataSource, settings: RLStage) -> list[formats.ReadResult]:
    """The prompts to train on, and those to validate on if they have files of their own."""
    files = [settings.data]
    if settings.validation_data:
        files.append(settings.validation_data)
    return [initial.stage_rows(source, "prompts", names) for names in files]


def files(sources: Sources, settings: RLStage, section: AlgorithmConfig) -> dict[str, Path]:
    """The files of rewards, judge, filter, environment and teacher, by their names in the run's
    manifest.

    section: the settings of the algorithm.
    """
    files = filters.rule_files(sources.safety)
    if section.needs_teacher and section.teacher and Path(section.teacher).is_dir():
        files["teacher"] = Path(section.teacher)
    value = critic.source_of(sources.reward, section)
    if value is not None and Path(value).is_dir():
        files["value"] = Path(value)
    for entry in (*sources.reward, *settings.judge):
        files |= {f"reward {name}": path for name, path in spec.sources(entry).items()}
    if settings.environment:
        files["environment"] = Path(settings.environment.rpartition(":")[0])
    return files


def load(
    stage: Stage,
    method: Method,
    sources: Sources,
    given: Given,
    data: Sequence[Sequence[Row]],
    reply: Reply,
    asked: EngineServer,
) -> Inputs:
    """Loads the models, encodes the prompts and builds the rewards.

    Args:
        data: the rows of ``read_prompts``.
        reply: the environment's function.
        asked: how the server of a teacher is asked.

    Raises:
        UserError: a folder, a prompt, a reward or a rule is wrong.
    """
    settings = method.settings
    source = sources.model
    guard = filters.Guard.create(sources.safety)
    rows = [row for part in data for row in part]
    policy = initial.language_model(
        source, texts_of(rows), stage.key("init"), policy=given.policy, place=stage.placement
    )
    tokenizer = policy.tokenizer
    initial.say_template(source, tokenizer)
    prompts, to_validate = _encoded(source.text, settings, policy, guard, data)
    longest_prompt = max(prompts.tokens.shape[1], to_validate.tokens.shape[1])
    length = longest_prompt + settings.max_new_tokens

    taught_by = teacher.load(stage, method.config, policy, length)
    server = teacher.connect(stage, method, policy, asked)
    load_reward_model = functools.partial(
        initial.load_reward_model,
        compute=stage.compute,
        place=stage.placement,
        score_rows=method.score_rows,
        length=length,
        policy=tokenizer.fingerprint,
        in_chat=chat.frame(source.text.template, tokenizer) is None,
    )
    services = Services(sources.judge, stage.run.judge)
    how: Any = {"tokenizer": tokenizer, "load": load_reward_model, "services": services}
    verified: Any = {"mathematics": sources.math}
    judge = None
    if settings.judge:
        judge_flag = "--rl.judge"
        judge = spec.build_reward(
            settings.judge, columns=to_validate.columns, flag=judge_flag, **how, **verified
        )
    environment = load_environment(reply, tokenizer, settings.max_new_tokens, settings.max_turns)
    reward = _given_reward(given, tokenizer, prompts.columns)
    if not method.is_rewarded:
        log_ratio = teacher.log_ratio(taught_by, settings, method.score_rows)
        reward = spec.Reward(fn=log_ratio)
    if reward is None:
        reward = spec.build_reward(sources.reward, columns=prompts.columns, **how, **verified)
    enforce = None
    if sources.safety.on:
        reward = reward._replace(fn=None, host=spec.as_host(reward))
        enforce = guard.for_responses(columns=prompts.columns, **how).enforce
    if reward.fn is not None and method.is_rewarded:
        on_devices = jax.tree.map(jnp.asarray, reward.fn)
        reward = spec.Reward(fn=stage.frozen("reward", on_devices))
    ask_teacher = None if server is None else server.log_probs
    return Inputs(
        policy, prompts, to_validate, reward, judge, enforce, environment, taught_by, ask_teacher
    )


def _given_reward(given: Given, tokenizer: Tokenizer, columns: Sequence[str]) -> spec.Reward | None:
    """The reward from Python; None if there is none.

    Raises:
        UserError: a function of texts asks for another column.
    """
    if given.reward is None or isinstance(given.reward, spec.Reward):
        return given.reward
    check_function("reward", given.reward, columns)
    return spec.of_texts(given.reward, tokenizer)


def _encoded(
    text: Text,
    settings: RLStage,
    policy: LanguageModel,
    guard: filters.Guard,
    data: Sequence[Sequence[Row]],
) -> tuple[EncodedPrompts, EncodedPrompts]:
    """The prompts to train on and those to validate on, after the filter, as token ids.

    Raises:
        UserError: no prompt is left, or the rows to validate on lack a column.
    """
    encoded = []
    for part, note in zip(data, ("", " (for validation)"), strict=False):
        safe = guard.prompts(part, policy.tokenizer)
        encoded.append(initial.prompts_for(text, settings, policy, safe, note))
    prompts = encoded[0]
    to_validate = encoded[-1]
    missing = [column for column in prompts.columns if column not in to_validate.columns]
    # Prompts are often validated without answers.
    needed = [column for column in missing if column not in ("response", *PAIR)]
    if needed:
        raise UserError(
            f"rl.validation_data: its rows have no {', '.join(needed)}, which training has and a "
            "reward may read"
        )
    return prompts, replace(to_validate, columns=[*to_validate.columns, *missing])
