"""Reinforcement learning as a run: prompts, a policy and a reward in, a better policy out.

The loop's phases, ``collect -> reward -> learn`` and ``iteration``, are pure functions in ``training.phases`` and
public here.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import generator, models, rewards, sampling, sharding
from rlhf_jax.algorithms import grpo, ppo, rloo, vpg
from rlhf_jax.config import RLStage, RunConfig
from rlhf_jax.data import batches
from rlhf_jax.data.encoding import EncodedPrompts, encode_prompts
from rlhf_jax.data.rows import Prompt
from rlhf_jax.data.rows import texts as texts_of
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.generator import LanguageModel
from rlhf_jax.rewards import filter as filters
from rlhf_jax.rewards import spec
from rlhf_jax.runs import manifest, processes
from rlhf_jax.training import initial, loop
from rlhf_jax.training.initial import Trainable, trainable
from rlhf_jax.training.loop import Validation
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.phases import (
    Functions,
    LoopState,
    Prompts,
    Recipe,
    collect,
    iteration,
    learn,
    reward,
    sample,
    scored,
)
from rlhf_jax.training.stage import RunResult, Stage, open_stage, start, stream
from rlhf_jax.training.supervised import divides, print_counts
from rlhf_jax.types import Algorithm, AlgorithmConfig, Metrics, Rollout

__all__ = ["Functions", "LoopState", "Prompts", "Recipe", "collect", "iteration", "learn", "reward", "run", "sample"]


def run(
    config: RunConfig,
    algorithm: Algorithm = ppo,
    algorithm_config: AlgorithmConfig | None = None,
    run_reward: spec.Reward | None = None,
) -> RunResult:
    """Trains the policy in ``config.model`` and saves ``model/`` in the run folder.

    Args:
        algorithm: the module ``vpg``, ``ppo``, ``rloo`` or ``grpo``, or one of your own (``types.Algorithm``); the run
            is named after it.
        algorithm_config: None: the algorithm's section of ``config``, or for one of your own its ``Config()``.
        run_reward: takes the place of ``config.reward``: any RewardFn or HostReward.

    Raises:
        UserError: for whatever is wrong with the data, the models' folders, the run folder or the settings.
        TrainingFault: a reward or an update that is not finite.
    """
    settings, name = config.rl, algorithm.__name__.rpartition(".")[2]
    if algorithm_config is None:
        sections = {vpg: config.vpg, ppo: config.ppo, rloo: config.rloo, grpo: config.grpo}
        algorithm_config = sections[algorithm] if algorithm in sections else algorithm.Config()
    sizes = _sizes(name, settings, algorithm_config, start(config))
    kl_coef = algorithm.kl_coef if settings.kl_coef is None else settings.kl_coef
    has_reference = bool(kl_coef or algorithm_config.kl_in_loss or settings.kl_target is not None)
    if settings.reference_refresh is not None and not has_reference:
        raise UserError("rl.reference_refresh: no KL is used here; set rl.kl_coef above 0 or leave it out")
    parts = _parts(config, name, run_reward)
    with open_stage(config, name, parts.fingerprints, sizes) as stage:
        print_counts(parts.prompts.counts)
        if settings.validation_data:
            print_counts({f"{what} (for validation)": count for what, count in parts.to_validate.counts.items()})
        trainer = _Trainer.create(stage, parts, algorithm, algorithm_config, has_reference)
        reference = trainer.start.params if settings.reference_refresh is not None else None
        train = algorithm.State.create(trainer.start.params, trainer.recipe.optimizer)
        state = stage.replicate(LoopState.create(train, kl_coef, reference))
        stage.held.update(trainer.held(state))
        state, row = loop.train(stage, state, trainer.job)
        policy = {part: leaves for part, leaves in state.train.params.items() if part != "value"}
        return stage.finish(parts.initial, trainer.start, {"": policy}, row)


class _Parts(NamedTuple):
    """What a run is made of before its folder is opened."""

    initial: LanguageModel
    prompts: EncodedPrompts
    to_validate: EncodedPrompts  # the same, unless ``rl.validation_data`` is given
    reward: spec.Reward
    judge: spec.Reward | None
    enforce: Callable[..., Any] | None  # the filter of responses, after a reward on the host
    fingerprints: dict[str, str]


def _parts(config: RunConfig, name: str, run_reward: spec.Reward | None) -> _Parts:
    settings = config.rl
    data = initial.stage_rows(config, "prompts", settings.data)
    others = initial.stage_rows(config, "prompts", settings.validation_data) if settings.validation_data else None
    guard = filters.Guard.create(config.safety)
    files = filters.rule_files(config.safety)
    for entry in (*config.reward, *settings.judge):
        files |= {f"reward {name}": path for name, path in spec.sources(entry).items()}
    fingerprints = data.fingerprints | (others.fingerprints if others else {})
    fingerprints |= {name: manifest.fingerprint(path) for name, path in files.items()}
    rows = [*data.rows, *(others.rows if others else [])]
    language_model = initial.language_model(config, texts_of(rows), stream(config.seed, name, "init"))
    encode = functools.partial(_encoded, config, language_model, guard)
    prompts = to_validate = encode(data.rows)
    if others is not None:
        to_validate = encode(others.rows)
        missing = [column for column in prompts.columns if column not in to_validate.columns]
        if missing:
            raise UserError(
                f"rl.validation_data: its rows have no {', '.join(missing)}, which the prompts in training have; a "
                "reward may read it"
            )
    load = functools.partial(initial.load_reward_model, compute=config.compute)
    build = functools.partial(spec.build, tokenizer=language_model.tokenizer, load=load)
    if run_reward is None:
        run_reward = build(config.reward, columns=prompts.columns)
    judge = build(settings.judge, columns=to_validate.columns, flag="--rl.judge") if settings.judge else None
    enforce = None
    if config.safety.on:
        run_reward = spec.Reward(host=spec.as_host(run_reward))
        guard = guard.for_responses(tokenizer=language_model.tokenizer, load=load, columns=prompts.columns)
        enforce = guard.enforce
    return _Parts(language_model, prompts, to_validate, run_reward, judge, enforce, fingerprints)


def _encoded(
    config: RunConfig, language_model: LanguageModel, guard: filters.Guard, rows: list[Prompt]
) -> EncodedPrompts:
    return encode_prompts(
        guard.prompts(rows, language_model.tokenizer),
        language_model.tokenizer,
        template=config.text.template,
        too_long=config.text.too_long,
        length=config.rl.max_prompt_length,
        max_positions=language_model.model.config.max_length,
        max_new_tokens=config.rl.max_new_tokens,
    )


def _sizes(name: str, settings: RLStage, config: AlgorithmConfig, num_devices: int) -> dict[str, int]:
    """The settings that help when memory runs out.

    Raises:
        UserError: the batch does not divide by devices, groups, minibatches and microbatches.
    """
    if settings.num_episodes is not None:
        episodes = f"{settings.length} iterations with {settings.length * settings.batch_size} episodes"
        print(f"rl.num_episodes {settings.num_episodes}: {episodes}, whatever rl.num_iterations is", flush=True)
    size, num_minibatches, num_microbatches = settings.batch_size, config.num_minibatches, config.num_microbatches
    blocks = config.shuffle_blocks if num_minibatches > 1 else 1
    fits = math.lcm(num_devices, config.group_size, num_minibatches * blocks, num_minibatches * num_microbatches)
    divides("rl.batch_size", size, {"devices": num_devices}, fits)
    divides("rl.batch_size", size, {f"answers to one prompt ({name}.group_size)": config.group_size}, fits)
    parts = {f"{name}.num_minibatches": num_minibatches, f"{name}.shuffle_blocks": blocks}
    divides("rl.batch_size", size, parts, fits)
    minibatch = size // num_minibatches
    if minibatch % num_microbatches:
        raise UserError(
            f"{name}.num_microbatches {num_microbatches} does not divide the {minibatch} rows of a minibatch "
            f"(rl.batch_size {size} / {name}.num_minibatches {num_minibatches})"
        )
    return {f"{name}.num_microbatches": num_microbatches, "rl.batch_size": size}


@dataclass(frozen=True)
class _Trainer:
    """The steps and validations of an open run."""

    stage: Stage
    parts: _Parts
    recipe: Recipe
    functions: Functions
    start: Trainable
    train_rows: np.ndarray
    held_out: np.ndarray
    order_key: jax.Array

    @classmethod
    def create(
        cls, stage: Stage, parts: _Parts, algorithm: Algorithm, algorithm_config: Any, has_reference: bool
    ) -> "_Trainer":
        """Puts models and rewards on the devices and splits the prompts."""
        config, settings, (model, params, tokenizer) = stage.config, stage.config.rl, parts.initial
        init_key = stage.key("init")
        if algorithm.needs_values:
            params = models.add_head(jax.random.fold_in(init_key, 1), params, "value")
        begin = stage.place(trainable(config.lora, params, jax.random.fold_in(init_key, 2)))
        model_fn = models.policy_fn(model, settings.temperature, parts.prompts.tokens.shape[1])
        fixed_reference = has_reference and settings.reference_refresh is None
        functions = Functions(
            policy_fn=begin.bind(model_fn),
            reward_fn=None if parts.reward.fn is None else stage.replicate(parts.reward.fn),
            ref_fn=stage.reference(begin, model_fn) if fixed_reference else None,
            base=begin.base,
        )
        recipe = Recipe(
            model,
            sampling.SamplingConfig(
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                eos_id=tokenizer.eos_id,
                pad_id=tokenizer.pad_id,
            ),
            algorithm,
            algorithm_config,
            make_optimizer(
                settings.optimizer, settings.length * algorithm_config.num_epochs * algorithm_config.num_minibatches
            ),
            settings,
            stage.mesh,
        )
        split_key, order_key = jax.random.split(stage.key("data"))
        if settings.validation_data:
            train_rows, held_out = np.arange(len(parts.prompts)), np.arange(len(parts.to_validate))
        else:
            train_rows, held_out = batches.split(len(parts.prompts), settings.validation_fraction, split_key)
        return cls(stage, parts, recipe, functions, begin, train_rows, held_out, order_key)

    @property
    def job(self) -> loop.Job:
        """What the loop runs."""
        settings = self.recipe.settings
        return loop.Job(
            self.advance,
            settings.length,
            validate=self.validate if len(self.held_out) else None,
            validation_interval=settings.validation_interval,
            show=("objective/score", "objective/kl", "kl/coef", "response/length", "validation/score"),
            sources=lambda step: [self.parts.prompts.rows[row].source for row in self.rows_of(step)],
            optimizer=settings.optimizer,
            judged_by="max:validation/score",
        )

    def held(self, state: LoopState) -> dict[str, Any]:
        """What lies on the devices, for the message when memory runs out."""
        length = self.parts.prompts.tokens.shape[1] + self.recipe.settings.max_new_tokens
        rows = self.recipe.settings.batch_size // self.stage.num_devices
        reference = self.functions.ref_fn if self.functions.base is None else None
        return {
            "trained parameters": state.train.params,
            "optimizer state": state.train.opt_state,
            "frozen weights": self.functions.base,
            "reference": [reference, state.reference],
            "rewards": self.functions.reward_fn,
            "cache while it samples": jax.eval_shape(lambda: self.recipe.model.init_cache(rows, length)),
            "gradients in the update": jax.eval_shape(lambda: state.train.params),
        }

    def rows_of(self, step: int) -> np.ndarray:
        """The rows of the prompts of a step, without their repetitions in groups."""
        count = self.recipe.settings.batch_size // self.recipe.algorithm_config.group_size
        return self.train_rows[batches.prompt_rows(len(self.train_rows), count, self.order_key, step)]

    def advance(self, state: LoopState, step: int) -> tuple[LoopState, Metrics]:
        """One iteration."""
        refresh = self.recipe.settings.reference_refresh
        if refresh is not None and step and step % refresh == 0:
            state = replace(state, reference=self.stage.replicate(state.train.params))
        rows = np.repeat(self.rows_of(step), self.recipe.algorithm_config.group_size)
        prompts = _prompts(self.stage, self.parts.prompts, rows)
        rollout_key, update_key = (jax.random.fold_in(self.stage.key(name), step) for name in ("rollout", "update"))
        rollout, metrics = self._collect(state, prompts, rollout_key, self.functions)
        rollout, reward_metrics, _ = self._score(self.parts.reward, rollout, self.parts.prompts, rows)
        state, learn_metrics = self._learn(state, rollout, update_key, self.functions)
        return state, metrics | reward_metrics | learn_metrics

    @functools.cached_property
    def _sample(self) -> Any:
        return jax.jit(functools.partial(sample, recipe=self.recipe))

    @functools.cached_property
    def _collect(self) -> Any:
        return jax.jit(functools.partial(collect, recipe=self.recipe))

    @functools.cached_property
    def _reward(self) -> Any:
        return jax.jit(reward)

    @functools.cached_property
    def _learn(self) -> Any:
        return self.stage.jit_update(functools.partial(learn, recipe=self.recipe))

    def validate(self, state: LoopState) -> Validation:
        """Samples a response to each held-out prompt, always with the same key; the reward and the judge score it."""
        settings, encoded = self.recipe.settings, self.parts.to_validate
        rows = loop.pad_rows(self.held_out[: settings.validation_prompts], self.stage.num_devices)
        sampled = self._sample(state, _prompts(self.stage, encoded, rows), self.stage.key("eval"), self.functions)
        judged: Metrics = {}
        if self.parts.judge is not None:
            _, judged, _ = self._score(self.parts.judge, sampled, encoded, rows)
            judged = {"validation/judge": judged["objective/score"]}
        rollout, metrics, verdicts = self._score(self.parts.reward, sampled, encoded, rows)
        samples = _samples(processes.fetch(rollout), encoded, rows, self.parts.initial, verdicts)
        for shown in samples[: settings.show_examples]:
            print("Prompt:    {prompt}\nGenerated: {response}\nReward:    {score:.4g}\n".format(**shown), flush=True)
        kept = {f"validation/{name}": x for name, x in metrics.items() if name.startswith(("reward/", "safety/"))}
        values = {"validation/score": metrics["objective/score"]} | judged | kept
        return Validation({name: float(value) for name, value in values.items()}, samples)

    def _score(
        self, run_reward: spec.Reward, rollout: Rollout, encoded: EncodedPrompts, rows: np.ndarray
    ) -> tuple[Rollout, Metrics, list[filters.Verdict] | None]:
        """The rollout with its scores, the reward's metrics, and the filter's verdicts if there is one.

        On the host each process scores its own rows; all filter all rows, so that they agree on what is absent.
        """
        if run_reward.host is None:
            return *self._reward(rollout, replace(self.functions, reward_fn=run_reward.fn)), None
        host, rollout = run_reward.host, processes.fetch(rollout)
        verdicts, filtered_metrics = None, {}

        def score_own_rows() -> rewards.HostResult:
            columns = batches.columns_at(encoded, sharding.own_rows(rows))
            return rewards.on_host(host, sharding.own_rows(rollout), columns)

        try:
            result, parts = processes.gather_rows(processes.agree(score_own_rows))
            unscored = np.sum(np.any(rollout.response_mask, axis=1)) - np.sum(np.any(result.response_mask, axis=1))
            if self.parts.enforce is not None and run_reward is self.parts.reward:
                columns = batches.columns_at(encoded, rows)
                result, filtered_metrics, verdicts = self.parts.enforce(rollout, result, columns)
        except FloatingPointError as error:
            raise TrainingFault(str(error)) from error
        named = {name: jnp.asarray(values) for name, values in parts.items()}
        result, metrics = scored(result, jnp.asarray(result.scores), named)
        metrics |= {"reward/unscored": jnp.float32(unscored)} | filtered_metrics
        return self.stage.shard(jax.device_get(result)), metrics, verdicts


def _prompts(stage: Stage, encoded: EncodedPrompts, rows: np.ndarray) -> Prompts:
    present = rows >= 0
    tokens = np.where(present[:, None], encoded.tokens[rows], 0)
    attention_mask = np.where(present[:, None], encoded.attention_mask[rows], 0)
    return stage.shard(Prompts(jnp.asarray(tokens), jnp.asarray(attention_mask), jnp.asarray(rows, jnp.int32)))


def _samples(
    rollout: Rollout,
    encoded: EncodedPrompts,
    rows: np.ndarray,
    language_model: LanguageModel,
    verdicts: list[filters.Verdict] | None,
) -> list[dict[str, Any]]:
    """Rows for samples.jsonl of the responses that are present."""
    texts = generator.responses(rollout, language_model.tokenizer)
    lengths = np.sum(rollout.response_mask != 0, axis=1).tolist()
    samples: list[dict[str, Any]] = [
        {"prompt": encoded.rows[row].prompt, "response": text, "score": float(score), "length": length}
        for row, text, score, length in zip(rows, texts, np.asarray(rollout.scores), lengths, strict=True)
    ]
    if verdicts is not None:
        samples = [s | {"unsafe": filters.sentence(verdict)} for s, verdict in zip(samples, verdicts, strict=True)]
    return [sample for sample in samples if sample["length"]]
