"""Reinforcement learning as a run: prompts, a policy and a reward in, a better policy out.

The loop's phases, ``collect -> reward -> learn`` and ``iteration``, are pure functions in ``training.phases`` and
public here.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import generator, models, rewards, sampling, sharding
from rlhf_jax.algorithms import grpo, ppo
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches, encoding
from rlhf_jax.data import rows as data_rows
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.rewards.filter import Verdict
from rlhf_jax.runs import processes
from rlhf_jax.training import adapters, checks, inputs, loop, reward_functions, safety, setup
from rlhf_jax.training.loop import Validation
from rlhf_jax.training.phases import AlgorithmConfig, LoopState, Prompts, collect, iteration, learn, reward
from rlhf_jax.training.reward_functions import RunReward
from rlhf_jax.training.stage import RunResult, Stage, open_stage, start
from rlhf_jax.types import Metrics, Params, Rollout, TrainState

__all__ = ["LoopState", "Prompts", "collect", "iteration", "learn", "reward", "run"]


def run(config: RunConfig, algorithm: ModuleType = ppo, run_reward: RunReward | None = None) -> RunResult:
    """Trains the policy in ``config.model`` with ``algorithm`` (the module ``vpg``, ``ppo``, ``rloo`` or ``grpo``).

    Saves ``model/`` in the run folder. ``run_reward`` takes the place of ``config.reward``: any RewardFn or HostReward.

    Raises:
        UserError: for whatever is wrong with the data, the models' folders, the run folder or the settings.
        TrainingFault: a reward or an update that is not finite.
    """
    settings = config.rl
    name = algorithm.__name__.rpartition(".")[2]
    algorithm_config: AlgorithmConfig = getattr(config, name)  # the section is called as the module is
    group_size = checks.group_size(algorithm_config)
    kl_coef = settings.kl_coef
    if kl_coef is None:
        kl_coef = 0.0 if algorithm is grpo else 0.05
    needs_reference = checks.needs_reference(settings, algorithm_config, kl_coef)
    checks.reinforcement(algorithm, name, settings, algorithm_config, start(config))
    tokenizer_source = setup.tokenizer_source(config)
    prompts = inputs.read("prompts", settings.data, config.data, config.seed, tokenizer_source)
    rows, fingerprints = prompts.rows, prompts.fingerprints
    if settings.validation_data:
        others = inputs.read("prompts", settings.validation_data, (), config.seed, tokenizer_source)
        rows, fingerprints = [*rows, *others.rows], fingerprints | others.fingerprints
    guard = safety.Guard.of(config.safety)
    fingerprints = fingerprints | guard.fingerprints
    init_key = setup.stream(config.seed, name, "init")
    model, params, tokenizer = setup.language_model(config, data_rows.texts(rows), init_key)
    encoded = to_validate = inputs.encode_prompts(guard.prompts(prompts.rows, tokenizer), tokenizer, model, config)
    if settings.validation_data:
        to_validate = inputs.encode_prompts(guard.prompts(others.rows, tokenizer), tokenizer, model, config)
        checks.same_columns(encoded.columns, to_validate.columns)
    if run_reward is None:
        run_reward = reward_functions.build(config.reward, tokenizer, config.compute, encoded.columns)
    run_reward = guard.around(run_reward, tokenizer, config, encoded.columns)
    judge = None
    if settings.judge:
        try:
            built = reward_functions.build(settings.judge, tokenizer, config.compute, to_validate.columns)
        except UserError as error:
            raise UserError(str(error).replace("--reward", "--rl.judge", 1)) from error
        judge = RunReward(host=reward_functions.as_host(built))
    with open_stage(config, name, fingerprints) as stage:
        stage.say_counts(encoded.counts)
        if settings.validation_data:
            stage.say_counts({f"{what} (for validation)": count for what, count in to_validate.counts.items()})
        prompt_length = encoded.tokens.shape[1]
        sampling_config = sampling.SamplingConfig(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )
        model_fn = models.policy_fn(model, settings.temperature, prompt_length)
        reward_fn = None if run_reward.fn is None else stage.replicate(run_reward.fn)
        ref_fn = None
        if algorithm is ppo:
            params = models.add_head(jax.random.fold_in(init_key, 1), params, "value")
        trainable = stage.trainable(adapters.choose(config, params, jax.random.fold_in(init_key, 2)))
        policy_fn = trainable.bind(model_fn)
        reference = None
        if settings.reference_refresh is not None:
            reference = stage.replicate(trainable.params)
        elif needs_reference:
            ref_fn = stage.reference(trainable, model_fn)
        optimizer = setup.make_optimizer(settings.optimizer, checks.num_updates(settings, algorithm_config))
        split_key, order_key = jax.random.split(stage.key("data"))
        if settings.validation_data:
            train_rows, held_out = np.arange(len(encoded)), np.arange(len(to_validate))
        else:
            train_rows, held_out = batches.split(len(encoded), settings.validation_fraction, split_key)
        collecting: dict[str, Any] = {"model": model, "sampling_config": sampling_config, "mesh": stage.mesh}
        learning: dict[str, Any] = {
            "algorithm": algorithm,
            "algorithm_config": algorithm_config,
            "optimizer": optimizer,
            "config": settings,
            "minibatch_sharding": stage.row_sharding,
        }
        whole: Callable[..., Any] = functools.partial(iteration, **collecting, **learning)

        @stage.jit_update
        def step_fn(state: LoopState, *arrays: Any) -> tuple[LoopState, Metrics]:
            state, _, metrics = whole(state, *arrays)
            return state, metrics

        collect_fn = jax.jit(functools.partial(collect, **collecting))
        learn_fn = stage.jit_update(functools.partial(learn, eos_id=tokenizer.eos_id, **learning))
        rollout_key, update_key = stage.key("rollout"), stage.key("update")

        def rows_of(step: int) -> np.ndarray:
            drawn = batches.prompt_rows(len(train_rows), settings.batch_size // group_size, order_key, step)
            return train_rows[drawn]

        def advance(state: LoopState, step: int) -> tuple[LoopState, Metrics]:
            if settings.reference_refresh is not None and step and step % settings.reference_refresh == 0:
                state = dataclasses.replace(state, reference=stage.replicate(state.train.params))
            rows = np.repeat(rows_of(step), group_size)
            batch = _prompts(stage, encoded, rows)
            keys = [jax.random.fold_in(key, step) for key in (rollout_key, update_key)]
            if run_reward.host is None:
                return step_fn(state, batch, *keys, ref_fn, reward_fn, policy_fn, trainable.base)
            rollout, metrics = collect_fn(
                state, batch, keys[0], policy_fn=policy_fn, ref_fn=ref_fn, base=trainable.base
            )
            rollout, reward_metrics, _ = _reward_on_host(run_reward, rollout, encoded, rows)
            state, learn_metrics = learn_fn(state, stage.shard(rollout), keys[1], policy_fn=policy_fn)
            return state, metrics | reward_metrics | learn_metrics

        validate = _validator(
            stage,
            to_validate,
            held_out,
            model,
            trainable,
            tokenizer,
            sampling_config,
            run_reward._replace(fn=reward_fn),
            judge,
        )
        state, row = loop.train(
            stage,
            stage.replicate(LoopState.create(TrainState.create(trainable.params, optimizer), kl_coef, reference)),
            advance,
            num_steps=settings.length,
            validate=validate if len(held_out) else None,
            validation_interval=settings.validation_interval,
            show=("objective/score", "objective/kl", "kl/coef", "response/length", "validation/score"),
            sources=lambda step: [encoded.rows[row].source for row in rows_of(step)],
            beside={"frozen weights": trainable.base, "rewards": reward_fn}
            | ({} if ref_fn is None or trainable.base is not None else {"reference": ref_fn}),
            cache=jax.eval_shape(
                lambda: model.init_cache(
                    settings.batch_size // stage.num_devices, prompt_length + settings.max_new_tokens
                )
            ),
        )
        policy = {part: leaves for part, leaves in state.train.params.items() if part != "value"}
        return stage.finish(model, trainable, policy, tokenizer, row)


def _validator(
    stage: Stage,
    encoded: encoding.EncodedPrompts,
    rows: np.ndarray,
    model: models.Model,
    trainable: adapters.Trainable,
    tokenizer: Tokenizer,
    sampling_config: sampling.SamplingConfig,
    run_reward: RunReward,
    judge: RunReward | None,
) -> Callable[[LoopState], Validation]:
    """Samples a response to each of the given prompts, always with the same key; the reward and the judge score it."""
    settings = stage.config.rl
    rows = loop.pad_rows(rows[: settings.validation_prompts], stage.num_devices)
    batch = _prompts(stage, encoded, rows)
    generate = functools.partial(sampling.generate, model, config=sampling_config, mesh=stage.mesh)

    @jax.jit
    def sample(trained: Params, base: Params | None, *prompts: jax.Array) -> Rollout:
        return generate(adapters.Trainable(trained, base).full(trained), *prompts)

    score = jax.jit(lambda reward_fn, rollout: reward(rollout, reward_fn=reward_fn))

    def validate(state: LoopState) -> Validation:
        policy = models.policy_params(state.train.params)
        rollout = sample(policy, trainable.base, batch.tokens, batch.attention_mask, stage.key("eval"))
        judged = {}
        if judge is not None:
            _, metrics, _ = _reward_on_host(judge, rollout, encoded, rows)
            judged = {"validation/judge": float(metrics["objective/score"])}
        verdicts: list[Verdict] | None = None
        if run_reward.host is None:
            rollout, metrics = processes.fetch(score(run_reward.fn, rollout))
        else:
            rollout, metrics, verdicts = _reward_on_host(run_reward, rollout, encoded, rows)
        texts = generator.responses(rollout, tokenizer)
        lengths = rollout.response_mask.astype(bool).sum(axis=1).tolist()
        samples = [
            {"prompt": encoded.rows[row].prompt, "response": text, "score": float(score), "length": length}
            for row, text, score, length in zip(rows, texts, rollout.scores, lengths, strict=True)
            if length
        ]
        if verdicts is not None:
            told = [safety.told(verdict) for verdict, length in zip(verdicts, lengths, strict=True) if length]
            samples = [sample | {"unsafe": what} for sample, what in zip(samples, told, strict=True)]
        for shown in samples[: settings.show_examples]:
            print("Prompt:    {prompt}\nGenerated: {response}\nReward:    {score:.4g}\n".format(**shown), flush=True)
        kept = {name: value for name, value in metrics.items() if name.startswith(("reward/", "safety/"))}
        parts = {f"validation/{part}": float(value) for part, value in kept.items()}
        return Validation({"validation/score": float(metrics["objective/score"]), **judged, **parts}, samples)

    return validate


def _reward_on_host(
    run_reward: RunReward, rollout: Rollout, encoded: encoding.EncodedPrompts, rows: np.ndarray
) -> tuple[Rollout, Metrics, list[Verdict] | None]:
    """The rollout, as NumPy arrays, with its scores; the reward's metrics; and what the safety filter found, if any."""
    rollout = processes.fetch(rollout)
    before = rollout.response_mask.any(axis=1).sum()

    def of_own_rows() -> rewards.HostResult:
        columns = batches.columns_at(encoded, sharding.own_rows(rows))
        try:
            return rewards.on_host(reward_functions.as_host(run_reward), sharding.own_rows(rollout), columns)
        except FloatingPointError as error:
            raise TrainingFault(str(error)) from error

    result = processes.gather_rows(processes.agree(of_own_rows))
    filtered, verdicts = result.rollout, None
    safety_metrics: Metrics = {}
    if run_reward.enforce is not None:
        filtered, safety_metrics, verdicts = _enforced(run_reward.enforce, rollout, filtered, encoded, rows)
    parts = {name: jnp.asarray(values) for name, values in result.parts.items()}
    scored, metrics = reward(filtered, reward_fn=lambda rollout: (jnp.asarray(rollout.scores), parts))
    after = result.rollout.response_mask.any(axis=1).sum()
    return jax.device_get(scored), metrics | {"reward/unscored": jnp.float32(before - after)} | safety_metrics, verdicts


def _enforced(
    enforce: reward_functions.Enforce,
    sampled: Rollout,
    scored: Rollout,
    encoded: encoding.EncodedPrompts,
    rows: np.ndarray,
) -> tuple[Rollout, Metrics, list[Verdict]]:
    """Every process judges all rows, so that all have the same shares of them."""
    try:
        return enforce(sampled, scored, batches.columns_at(encoded, rows))
    except FloatingPointError as error:
        raise TrainingFault(str(error)) from error


def _prompts(stage: Stage, encoded: encoding.EncodedPrompts, rows: np.ndarray) -> Prompts:
    present = rows >= 0
    tokens = np.where(present[:, None], encoded.tokens[rows], 0)
    attention_mask = np.where(present[:, None], encoded.attention_mask[rows], 0)
    return stage.shard(Prompts(jnp.asarray(tokens), jnp.asarray(attention_mask), jnp.asarray(rows, jnp.int32)))
