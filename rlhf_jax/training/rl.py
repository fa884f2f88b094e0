"""Reinforcement learning as a run: prompts, a policy and a reward in, a better policy out.

The loop's phases, ``collect -> reward -> learn`` and ``iteration``, are pure functions in ``training.phases`` and
public here.
"""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import inference, models, rewards, sampling
from rlhf_jax.algorithms import grpo, ppo, vpg
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches, encoding
from rlhf_jax.data import rows as data_rows
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.training import checks, inputs, loop, setup
from rlhf_jax.training.loop import Validation
from rlhf_jax.training.phases import AlgorithmConfig, LoopState, Prompts, collect, iteration, learn, reward
from rlhf_jax.training.stage import RunResult, Stage, open_stage, start
from rlhf_jax.types import Metrics, RewardFn, TrainState

__all__ = ["LoopState", "Prompts", "collect", "iteration", "learn", "reward", "reward_function", "run"]


def run(config: RunConfig, algorithm: ModuleType = ppo) -> RunResult:
    """Trains the policy in ``config.model`` with ``algorithm`` (the module ``vpg``, ``ppo``, ``rloo`` or ``grpo``).

    Saves ``model/`` in the run folder.

    Raises:
        UserError: for whatever is wrong with the data, the models' folders, the run folder or the settings.
    """
    settings = config.rl
    name = algorithm.__name__.rpartition(".")[2]
    algorithm_config: AlgorithmConfig = getattr(config, name)  # the section is called as the module is
    group_size = checks.group_size(algorithm_config)
    kl_coef = settings.kl_coef
    if kl_coef is None:
        kl_coef = 0.0 if algorithm is grpo else 0.05
    checks.reinforcement(algorithm, name, settings, algorithm_config, start(config))
    prompts = inputs.read("prompts", settings.data, config.data, config.seed, config.model)
    with open_stage(config, name, prompts.fingerprints) as stage:
        model, params, tokenizer = setup.language_model(config, data_rows.texts(prompts.rows), stage.key("init"))
        encoded = inputs.encode_prompts(prompts.rows, tokenizer, model, config)
        stage.say_counts(encoded.counts)
        prompt_length = encoded.tokens.shape[1]
        sampling_config = sampling.SamplingConfig(
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )
        policy_fn = models.policy_fn(model, settings.temperature, prompt_length)
        reward_fn = stage.replicate(reward_function(settings.reward, tokenizer, config))
        ref_fn = None
        kl_in_loss = not isinstance(algorithm_config, vpg.Config) and algorithm_config.kl_loss_coef
        if kl_coef or kl_in_loss or settings.kl_target is not None:
            ref_fn = stage.replicate(jax.tree_util.Partial(policy_fn, params))
        if algorithm is ppo:
            params = models.add_head(jax.random.fold_in(stage.key("init"), 1), params, "value")
        optimizer = setup.make_optimizer(settings.optimizer, checks.num_updates(settings, algorithm_config))
        split_key, order_key = jax.random.split(stage.key("data"))
        train_rows, held_out = batches.split(len(encoded), settings.validation_fraction, split_key)

        @stage.jit_update
        def step_fn(state: LoopState, *arrays: Any) -> tuple[LoopState, Metrics]:
            state, _, metrics = iteration(
                state,
                *arrays,
                model=model,
                sampling_config=sampling_config,
                policy_fn=policy_fn,
                algorithm=algorithm,
                algorithm_config=algorithm_config,
                optimizer=optimizer,
                config=settings,
                mesh=stage.mesh,
                minibatch_sharding=stage.row_sharding,
            )
            return state, metrics

        rollout_key, update_key = stage.key("rollout"), stage.key("update")

        def advance(state: LoopState, step: int) -> tuple[LoopState, Metrics]:
            drawn = batches.prompt_rows(len(train_rows), settings.batch_size // group_size, order_key, step)
            rows = np.repeat(train_rows[drawn], group_size)
            keys = (jax.random.fold_in(key, step) for key in (rollout_key, update_key))
            return step_fn(state, _prompts(stage, encoded, rows), *keys, ref_fn, reward_fn)

        validation_rows = loop.pad_rows(held_out[: settings.validation_prompts], stage.num_devices)
        sample = jax.jit(
            functools.partial(_validation_rollout, model=model, sampling_config=sampling_config, mesh=stage.mesh)
        )

        def validate(state: LoopState) -> Validation:
            batch = _prompts(stage, encoded, validation_rows)
            rollout = jax.device_get(sample(state.train.params, batch, stage.key("eval"), reward_fn))
            present = validation_rows >= 0
            texts = inference.responses(rollout, tokenizer)
            samples = [
                {"prompt": encoded.rows[row].prompt, "response": texts[i], "score": float(rollout.scores[i])}
                for i, row in enumerate(validation_rows[present][:8])
            ]
            return Validation({"validation/score": float(rollout.scores[present].mean())}, samples)

        state, row = loop.train(
            stage,
            stage.replicate(LoopState.create(TrainState.create(params, optimizer), kl_coef)),
            advance,
            num_steps=settings.num_iterations,
            validate=validate if len(held_out) else None,
            validation_interval=settings.validation_interval,
            show=("objective/score", "objective/kl", "kl/coef", "response/length", "validation/score"),
        )
        policy = {part: leaves for part, leaves in state.train.params.items() if part != "value"}
        return stage.finish(model, policy, tokenizer, row)


def reward_function(reward: str, tokenizer: Tokenizer, config: RunConfig) -> RewardFn:
    """The RewardFn that ``rl.reward`` names: ``count:TEXT`` or a reward model's folder.

    Raises:
        UserError: no reward is named, TEXT is not one token, or the folder's model has no score head or another
            tokenizer than the policy.
    """
    if not reward:
        raise UserError(
            "rl.reward: no reward given; use a reward model's folder or count:TEXT, such as --rl.reward count:e"
        )
    if reward.startswith("count:"):
        text = reward.removeprefix("count:")
        ids = tokenizer.encode(text)
        if len(ids) != 1:
            raise UserError(
                f"rl.reward {reward}: {text!r} is {len(ids)} tokens of this tokenizer, and exactly 1 is counted"
            )
        return rewards.token_count(ids[0])
    model, params, reward_tokenizer = setup.load_language_model(reward, config.compute)
    if "score" not in params:
        raise UserError(f"rl.reward {reward}: this model has no score head; train one with experiments/reward_model.py")
    if reward_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"rl.reward {reward}: the reward model's tokenizer is not the policy's ({config.model}); train the reward "
            "model from the same starting model"
        )
    return rewards.from_model(models.score_fn(model), params)


def _prompts(stage: Stage, encoded: encoding.EncodedPrompts, rows: np.ndarray) -> Prompts:
    present = rows >= 0
    tokens = np.where(present[:, None], encoded.tokens[rows], 0)
    attention_mask = np.where(present[:, None], encoded.attention_mask[rows], 0)
    return stage.shard(Prompts(jnp.asarray(tokens), jnp.asarray(attention_mask), jnp.asarray(rows, jnp.int32)))


def _validation_rollout(
    params: Any,
    prompts: Prompts,
    key: jax.Array,
    reward_fn: RewardFn,
    *,
    model: models.Model,
    sampling_config: sampling.SamplingConfig,
    mesh: jax.sharding.Mesh,
) -> Any:
    policy = models.policy_params(params)
    rollout = sampling.generate(model, policy, prompts.tokens, prompts.attention_mask, key, sampling_config, mesh=mesh)
    return reward(rollout, reward_fn=reward_fn)[0]
