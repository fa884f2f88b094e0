"""What an RL run reads and loads by its settings: prompts, models, rewards, a teacher."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import Judge, ModelSource, RLStage, Safety, Text
from rlhf_jax.data import chat
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.data.forms import PAIR
from rlhf_jax.data.rows import Row
from rlhf_jax.data.rows import texts as texts_of
from rlhf_jax.errors import UserError
from rlhf_jax.generation.environment import Environment, Reply, load_environment
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders import spec, verifiable
from rlhf_jax.graders.service import Services
from rlhf_jax.rewards.host import Columns, HostScores
from rlhf_jax.training.common import initial, reward_models
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.training.rl.method import Given, Method
from rlhf_jax.types import AlgorithmConfig, Metrics, Rollout

if TYPE_CHECKING:
    from rlhf_jax.graders.filter import Verdict

Guarded = Callable[..., tuple[Rollout, Metrics, "list[Verdict] | None"]]
"""``(rollout, *, scored, columns)`` -> the scored rollout after the filter, metrics, verdicts."""
Pairs = Literal["reward", "judge"] | None
"""Which scorer of a validation compares pairs of responses."""


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
    to_validate: EncodedPrompts  # the same rows, unless there are rows to validate on
    reward: spec.Reward
    judge: spec.Reward | None
    guard: Guarded | None  # the filter of responses, which follows a reward on the host
    environment: Environment | None
    teacher: LanguageModel | None
    ask_teacher: Callable[[Rollout], np.ndarray] | None  # log-probs of a teacher on a server

    @property
    def pairs(self) -> Pairs:
        """Which of judge and reward compares pairs of responses, the judge first."""
        if self.judge is not None and self.judge.is_pairs:
            return "judge"
        return "reward" if self.reward.is_pairs else None

    def without_python(self, extras: Mapping[str, str]) -> "Inputs":
        """The inputs of a check of memory, which call no server and none of the user's Python. The
        reward has these extras.
        """
        environment = self.environment
        if environment is not None:
            of_tokens = {name: 0.0 for name, kind in extras.items() if kind == "token"}
            environment = environment._replace(fn=lambda talk, row: (None, 0.0, of_tokens))
        reward = self.reward
        if reward.host is not None:

            def score(rollout: Rollout, columns: Columns) -> HostScores:
                of_rows = np.zeros(len(rollout.tokens))
                zeros = {"row": of_rows, "token": np.zeros(rollout.tokens.shape)}
                return of_rows, {name: zeros[kind] for name, kind in extras.items()}

            reward = spec.Reward(host=score)
        ask_teacher = None
        if self.ask_teacher is not None:
            ask_teacher = lambda rollout: np.zeros(rollout.tokens.shape, np.float32)  # noqa: E731
        return self._replace(
            environment=environment, reward=reward, guard=None, ask_teacher=ask_teacher
        )


def files(sources: Sources, settings: RLStage, section: AlgorithmConfig) -> dict[str, Path]:
    """The files of rewards, judge, filter, environment and teacher, by their names in the run's
    manifest.

    section: the settings of the algorithm.
    """
    files = {}
    if sources.safety.on:
        from rlhf_jax.graders import filter as filters

        files = filters.rule_files(sources.safety)
    if section.needs_teacher and section.teacher and Path(section.teacher).is_dir():
        files["teacher"] = Path(section.teacher)
    if section.value_from != "policy":
        from rlhf_jax.training.rl import critic

        value = critic.source_of(sources.reward, section)
        if value is not None and Path(value).is_dir():
            files["value"] = Path(value)
    for entry in (*sources.reward, *settings.judge):
        files |= {f"reward {name}": path for name, path in spec.sources(entry).items()}
    if settings.environment:
        files["environment"] = Path(settings.environment.rpartition(":")[0])
    return files


def load(
    run: OpenRun,
    method: Method,
    sources: Sources,
    given: Given,
    data: Sequence[Sequence[Row]],
    reply: Reply,
) -> Inputs:
    """Loads the models, encodes the prompts and builds the rewards.

    Args:
        data: the rows to train on, and those to validate on if there are any.
        reply: the environment's function.

    Raises:
        UserError: a folder, a prompt, a reward or a rule is wrong; rows to validate on lack a
            column that a reward reads.
    """
    settings = method.settings
    source = sources.model
    layout = run.layout
    compute = run.config.compute
    guard = None
    if sources.safety.on:
        from rlhf_jax.graders import filter as filters

        guard = filters.Guard.create(sources.safety)
    rows = [row for part in data for row in part]
    policy = initial.language_model(
        source, texts_of(rows), run.key("init"), policy=given.policy, place=layout.placement
    )
    tokenizer = policy.tokenizer
    initial.say_template(source, tokenizer)
    prompts, to_validate = _encoded(source.text, settings, policy, guard, data)
    longest_prompt = max(prompts.tokens.shape[1], to_validate.tokens.shape[1])
    length = longest_prompt + settings.max_new_tokens

    taught_by = None
    ask_teacher = None
    if method.algorithm_config.needs_teacher:
        from rlhf_jax.training.rl import teacher

        taught_by = teacher.load(run, method.algorithm_config, policy, length)
        server = teacher.connect(run, method, policy)
        ask_teacher = None if server is None else server.log_probs
    build = functools.partial(
        spec.build_reward,
        tokenizer=tokenizer,
        load=functools.partial(
            reward_models.load_reward_model,
            compute=compute,
            place=layout.placement,
            score_rows=method.score_rows,
            length=length,
            policy=tokenizer.fingerprint,
            in_chat=chat.frame(source.text.template, tokenizer) is None,
            longest=max(rows, key=lambda row: len(chat.shown(row, tokenizer))).conversation,
        ),
        services=Services(sources.judge, run.folder.judge),
    )
    judge = None
    if settings.judge:
        judge = build(
            settings.judge,
            columns=to_validate.columns,
            flag="--rl.judge",
            mathematics=sources.math,
        )
    environment = load_environment(reply, tokenizer, settings.max_new_tokens, settings.max_turns)
    if not method.is_rewarded:
        reward = spec.Reward(fn=teacher.log_ratio(taught_by, settings, method.score_rows))
    elif isinstance(given.reward, spec.Reward):
        reward = given.reward
    elif given.reward is not None:
        reward = spec.of_texts("reward", given.reward, tokenizer, prompts.columns)
    else:
        reward = build(sources.reward, columns=prompts.columns, mathematics=sources.math)
    for name in method.algorithm_config.unrewarded:
        if weight := reward.weights.get(name):
            raise UserError(
                f"{run.name} reads {name}, and the entry {name} of --reward is rewarded with the "
                f"weight {weight:g}: give it a weight of 0, or read a component of it, {name}/NAME"
            )
    enforce = None
    if guard is not None:
        reward = reward._replace(fn=None, host=spec.as_host(reward))
        services: Any = build.keywords
        guard = guard.for_responses(columns=prompts.columns, **services)
        enforce = guard.enforce
    if reward.fn is not None and method.is_rewarded:
        on_devices = jax.tree.map(jnp.asarray, reward.fn)
        is_offloaded = "reward" in compute.offload
        fn = initial.frozen(layout, on_devices, is_offloaded=is_offloaded)
        reward = spec.Reward(fn=fn)
    read = reward.reads.union(*(scorer.reads for scorer in (judge, guard) if scorer is not None))
    # Prompts are often validated without answers.
    present = {"response", *PAIR}.union(*(row.columns for row in to_validate.rows))
    needed = [name for name in prompts.columns if name in read - present]
    if needed:
        raise UserError(
            f"rl.validation_data: its rows have no {', '.join(needed)}, which training has and a "
            "reward reads"
        )
    return Inputs(
        policy, prompts, to_validate, reward, judge, enforce, environment, taught_by, ask_teacher
    )


def _encoded(
    text: Text,
    settings: RLStage,
    policy: LanguageModel,
    guard: Any,  # ``filter.Guard``; None: there are no rules
    data: Sequence[Sequence[Row]],
) -> tuple[EncodedPrompts, EncodedPrompts]:
    """The prompts to train on and those to validate on, after the filter, as token ids.

    Raises:
        UserError: no prompt is left.
    """
    encoded = []
    for part, note in zip(data, ("", " (for validation)"), strict=False):
        safe = part if guard is None else guard.prompts(part, policy.tokenizer)
        encoded.append(initial.prompts_for(text, settings, policy, safe, note))
    prompts, to_validate = encoded[0], encoded[-1]
    names = dict.fromkeys([*to_validate.columns, *prompts.columns])
    return prompts, replace(to_validate, columns=list(names))
