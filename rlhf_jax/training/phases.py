"""The phases of one RL iteration, as pure functions: collect -> reward -> learn.

``iteration`` is the three in one call, for one jit. A reward that runs on the host goes between two jits instead; both
ways give identical parameters.
"""

from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlhf_jax import advantages, models, ops, rewards, sampling
from rlhf_jax import rollout as rollouts
from rlhf_jax.algorithms import grpo, ppo, rloo, vpg
from rlhf_jax.config import RLStage
from rlhf_jax.types import BoundPolicyFn, Metrics, Params, PolicyFn, RewardFn, Rollout, TrainState

AlgorithmConfig = vpg.Config | ppo.Config | rloo.Config | grpo.Config


@flax.struct.dataclass
class LoopState:
    """Everything that an RL run carries from one iteration to the next."""

    train: TrainState
    kl_coef: jax.Array  # [] float32
    baseline: jax.Array  # [] float32, VPG's moving average of the score
    reference: Params | None = None  # of the policy at the last refresh; None: the reference is fixed, see collect

    @classmethod
    def create(cls, train: TrainState, kl_coef: float, reference: Params | None = None) -> "LoopState":
        """The state before the first iteration; the baseline starts at 0 (ALGORITHMS: jRLHF)."""
        return cls(train=train, kl_coef=jnp.float32(kl_coef), baseline=jnp.float32(0.0), reference=reference)


class Prompts(NamedTuple):
    """A batch of prompts, left-padded."""

    tokens: jax.Array  # [B, P] int32
    attention_mask: jax.Array  # [B, P]
    row_ids: jax.Array  # [B] data row of each prompt


def collect(
    loop: LoopState,
    prompts: Prompts,
    key: jax.Array,
    *,
    model: models.Model,
    sampling_config: sampling.SamplingConfig,
    policy_fn: PolicyFn,
    ref_fn: BoundPolicyFn | None = None,
    base: Params | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Rollout, Metrics]:
    """Samples a response to each prompt and scores its tokens with the update's own forward pass.

    Randomness is that of the row's place in the batch, so a prompt that occurs twice gets two samples.

    Args:
        policy_fn: a function of ``loop.train.params``; under LoRA ``models.lora.bind(fn, base)``.
        ref_fn: the reference policy, unless ``loop.reference`` holds its parameters; None: no reference.
        base: under LoRA, the frozen parameters.
    """
    params = loop.train.params
    policy = models.policy_params(params)
    if base is not None:
        policy = models.lora.attach(base, policy)
    if loop.reference is not None:
        ref_fn = jax.tree_util.Partial(policy_fn, loop.reference)
    sampled = sampling.generate(model, policy, prompts.tokens, prompts.attention_mask, key, sampling_config, mesh=mesh)
    rollout = rollouts.rescore(sampled, params, policy_fn=policy_fn, ref_fn=ref_fn)
    present = _present(rollout)
    eos = (rollout.tokens == sampling_config.eos_id) & rollout.response_mask.astype(bool)
    metrics = {
        "policy/sampler_gap": rollouts.sampler_gap(sampled, rollout),
        "response/length": ops.masked_mean(_row_sums(jnp.ones_like(rollout.log_probs), rollout), present),
        "response/eos_fraction": ops.masked_mean(eos.any(axis=1).astype(jnp.float32), present),
        "response/repetition": ops.masked_mean(rewards.repetition()(rollout), present),
    }
    return replace(rollout, row_ids=prompts.row_ids), metrics


def reward(rollout: Rollout, *, reward_fn: RewardFn) -> tuple[Rollout, Metrics]:
    """Fills ``scores`` [B], and ``rewards`` [B, T] where the function is dense; scores are then their row sums."""
    scores = reward_fn(rollout)
    parts: dict[str, jax.Array] = {}
    if isinstance(scores, tuple):
        scores, parts = scores
    if scores.ndim == 2:
        rollout = replace(rollout, rewards=scores)
        scores = _row_sums(scores, rollout)
    present = _present(rollout)
    metrics = {f"reward/{name}": ops.masked_mean(values, present) for name, values in parts.items()}
    metrics["reward/length_correlation"] = _correlation(
        scores, _row_sums(jnp.ones(rollout.tokens.shape), rollout), present
    )
    return replace(rollout, scores=scores), metrics | {"objective/score": ops.masked_mean(scores, present)}


def learn(
    loop: LoopState,
    rollout: Rollout,
    key: jax.Array,
    *,
    algorithm: ModuleType,
    algorithm_config: AlgorithmConfig,
    policy_fn: PolicyFn,
    optimizer: optax.GradientTransformation,
    config: RLStage,
    eos_id: int | None = None,
    minibatch_sharding: jax.sharding.NamedSharding | None = None,
) -> tuple[LoopState, Metrics]:
    """Shapes the rewards with the rule for missing EOS and the KL penalty, updates the policy, adapts the coefficient.

    Raises:
        ValueError: a rule for missing EOS with a dense reward or without ``eos_id``; ``kl_target`` without a reference.
    """
    present = _present(rollout)
    shaped = rewards.kl_shaped(
        _judged_by_end(rollout, config, eos_id), 0.0 if rollout.ref_log_probs is None else loop.kl_coef
    )
    totals = _row_sums(shaped, rollout)
    metrics = {"objective/reward": ops.masked_mean(totals, present)}
    if rollout.scores is not None:
        group_size = getattr(algorithm_config, "group_size", rollout.scores.shape[0])
        metrics["reward/equal_groups"] = _num_equal(rollout.scores, present, group_size)
    kl = None
    if rollout.ref_log_probs is not None:
        kl = ops.masked_mean(_row_sums(ops.kl(rollout.log_probs, rollout.ref_log_probs), rollout), present)
        metrics |= {"objective/kl": kl, "kl/coef": loop.kl_coef}
    baseline = loop.baseline
    if isinstance(algorithm_config, vpg.Config):
        if algorithm_config.baseline == "ema":
            baseline, row_advantages = advantages.ema_baseline(
                baseline, totals, algorithm_config.baseline_decay, mask=present
            )
        else:
            row_advantages = totals
        shape = rollout.tokens.shape
        rollout = replace(rollout, advantages=jnp.broadcast_to(row_advantages[:, None], shape))
    else:
        rollout = replace(rollout, rewards=shaped)
    train, update_metrics = algorithm.update(
        loop.train,
        rollout,
        key,
        policy_fn=policy_fn,
        optimizer=optimizer,
        config=algorithm_config,
        minibatch_sharding=minibatch_sharding,
    )
    kl_coef = loop.kl_coef
    if config.kl_target is not None:
        if kl is None:
            raise ValueError("kl_target needs reference log-probabilities: give collect a ref_fn")
        n = rollout.tokens.shape[0]
        kl_coef = rewards.adaptive_kl(kl_coef, kl, target=config.kl_target, horizon=config.kl_horizon or 10 * n, n=n)
    # A non-finite update keeps the policy; what depends on the same numbers must then not move either.
    healthy = update_metrics["nonfinite"] == 0
    kl_coef, baseline = (jnp.where(healthy, *pair) for pair in ((kl_coef, loop.kl_coef), (baseline, loop.baseline)))
    return LoopState(train, kl_coef, baseline, loop.reference), metrics | update_metrics


def iteration(
    loop: LoopState,
    prompts: Prompts,
    rollout_key: jax.Array,
    update_key: jax.Array,
    ref_fn: BoundPolicyFn | None,
    reward_fn: RewardFn,
    policy_fn: PolicyFn,
    base: Params | None = None,
    *,
    model: models.Model,
    sampling_config: sampling.SamplingConfig,
    algorithm: ModuleType,
    algorithm_config: AlgorithmConfig,
    optimizer: optax.GradientTransformation,
    config: RLStage,
    mesh: jax.sharding.Mesh | None = None,
    minibatch_sharding: jax.sharding.NamedSharding | None = None,
) -> tuple[LoopState, Rollout, Metrics]:
    """collect, reward and learn, for a reward function that can be traced. Returns the scored rollout too."""
    rollout, metrics = collect(
        loop,
        prompts,
        rollout_key,
        model=model,
        sampling_config=sampling_config,
        policy_fn=policy_fn,
        ref_fn=ref_fn,
        base=base,
        mesh=mesh,
    )
    rollout, reward_metrics = reward(rollout, reward_fn=reward_fn)
    loop, learn_metrics = learn(
        loop,
        rollout,
        update_key,
        algorithm=algorithm,
        algorithm_config=algorithm_config,
        policy_fn=policy_fn,
        optimizer=optimizer,
        config=config,
        eos_id=sampling_config.eos_id,
        minibatch_sharding=minibatch_sharding,
    )
    return loop, rollout, metrics | reward_metrics | learn_metrics


def _judged_by_end(rollout: Rollout, config: RLStage, eos_id: int | None) -> Rollout:
    """The rollout with the scores that the rule for missing EOS leaves."""
    penalty, score = config.missing_eos_penalty, config.missing_eos_score
    if penalty is None and score is None:
        return rollout
    if eos_id is None or rollout.scores is None or rollout.rewards is not None:
        raise ValueError("missing_eos_penalty and missing_eos_score need an eos_id and one score per response")
    return replace(rollout, scores=rewards.missing_eos(rollout, rollout.scores, eos_id, penalty=penalty, score=score))


def _num_equal(scores: jax.Array, present: jax.Array, group_size: int) -> jax.Array:
    """How many groups of adjacent rows, of those with a present row, have one score throughout: nothing to learn."""
    high, low = (jnp.where(present, scores, filler).reshape(-1, group_size) for filler in (-jnp.inf, jnp.inf))
    return jnp.sum(high.max(axis=1) == low.min(axis=1)).astype(jnp.float32)


def _correlation(x: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
    """Pearson's over the rows of the mask, [B] each; 0 where one of the two is constant."""
    lows, highs = (jnp.stack([jnp.where(mask, v, filler) for v in (x, y)]) for filler in (jnp.inf, -jnp.inf))
    varies = jnp.all(highs.max(axis=1) > lows.min(axis=1))  # exactly: what rounding leaves of a constant correlates too
    x, y = (values - ops.masked_mean(values, mask) for values in (x, y))
    spread = jnp.sqrt(ops.masked_mean(x * x, mask) * ops.masked_mean(y * y, mask))
    return jnp.where(varies, ops.masked_mean(x * y, mask) / jnp.where(varies, spread, 1.0), 0.0)


def _present(rollout: Rollout) -> jax.Array:
    return rollout.response_mask.astype(bool).any(axis=1)


def _row_sums(values: jax.Array, rollout: Rollout) -> jax.Array:
    return jnp.where(rollout.response_mask.astype(bool), values, 0.0).sum(axis=1)
