"""What PPO, RLOO and GRPO share: the clipped policy loss with its metrics, advantages within groups, and the passes.

Column t of every [B, T] array speaks of ``tokens[:, t]``; a row with an empty response mask counts nowhere.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, get_args

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import losses, ops
from rlhf_jax.algorithms.step import gradient_step, minibatch_epochs
from rlhf_jax.ops import AxisName
from rlhf_jax.types import Metrics, Params, PolicyOutput, Rollout, TrainState


class LossConfig(Protocol):
    """The fields of an algorithm's Config that the policy loss reads."""

    @property
    def clip_low(self) -> float: ...
    @property
    def clip_high(self) -> float: ...
    @property
    def dual_clip(self) -> float | None: ...
    @property
    def entropy_coef(self) -> float: ...
    @property
    def aggregate(self) -> losses.Aggregation: ...
    @property
    def length(self) -> int | None: ...
    @property
    def kl_loss_coef(self) -> float: ...
    @property
    def kl_loss_estimator(self) -> ops.KLEstimator: ...


class PassesConfig(Protocol):
    """The fields of an algorithm's Config that ``passes`` reads."""

    @property
    def num_epochs(self) -> int: ...
    @property
    def num_minibatches(self) -> int: ...
    @property
    def shuffle_blocks(self) -> int: ...
    @property
    def num_microbatches(self) -> int: ...


class Loss(Protocol):
    """``loss(params, part, key, *, minibatch, axis_name) -> (loss, metrics)``: an algorithm's loss but for what is
    given once for all."""

    def __call__(
        self, params: Params, rollout: Rollout, key: jax.Array, /, *, minibatch: Rollout, axis_name: AxisName | None
    ) -> tuple[jax.Array, Metrics]: ...


def check_config(config: LossConfig) -> None:
    """Raises ValueError for values that no run can use."""
    ops.check_choice("aggregate", config.aggregate, get_args(losses.Aggregation))
    ops.check_choice("kl_loss_estimator", config.kl_loss_estimator, get_args(ops.KLEstimator))
    if config.kl_loss_estimator == "k1":
        raise ValueError(
            "kl_loss_estimator 'k1' has expected gradient 0 in the loss: use it in the reward (rewards.kl_shaped), "
            "or choose 'k2' or 'k3'"
        )
    if config.clip_low < 0 or config.clip_high < 0:
        raise ValueError(f"clip_low and clip_high must not be negative, got {config.clip_low} and {config.clip_high}")


def field(rollout: Rollout, name: str, hint: str) -> jax.Array:
    """``rollout.NAME`` [B, T]; ValueError if it is None, saying what to do, or of another shape than the tokens."""
    value = getattr(rollout, name)
    if value is None:
        raise ValueError(f"rollout.{name} [B, T] is needed, got None: {hint}")
    ops.check_same_shape(**{name: value, "tokens": rollout.tokens})
    return value


def reweighed(
    per_token: jax.Array, rollout: Rollout, token_mean: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, Metrics]:
    """Policy losses of tokens [B, T] times ``rollout.importance_weights``, with the metric
    ``policy/importance_weight_mean`` over response tokens; the losses as they are and no metric if there are none.

    The policy loss alone is weighed, as it alone rests on how often each token was drawn. Entropy and value are what
    they are at every prefix that was reached, and a KL term is to hold each token that was drawn at full strength.
    """
    if rollout.importance_weights is None:
        return per_token, {}
    weights = jax.lax.stop_gradient(field(rollout, "importance_weights", "rollout.rescore makes them"))
    return weights * per_token, {"policy/importance_weight_mean": token_mean(weights)}


def clipped(
    output: PolicyOutput,
    rollout: Rollout,
    config: LossConfig,
    *,
    denominator: jax.Array | None = None,
    minibatch: Rollout | None = None,
    axis_name: AxisName | None = None,
) -> tuple[jax.Array, Metrics]:
    """Clipped policy loss - ``entropy_coef`` * entropy + ``kl_loss_coef`` * KL term of a rollout with advantages.

    With ``rollout.importance_weights`` each token's policy loss is multiplied by its weight, see ``reweighed``.

    Args:
      output: the policy's forward pass on ``rollout``.
      denominator: what the loss divides by, if not ``losses.denominator`` of ``minibatch``.
      minibatch: the minibatch that ``rollout`` is a microbatch of; None: ``rollout`` itself. Loss and metrics divide by
        its rows and tokens, so that those of its microbatches add up.
      axis_name: the mapped axis over which the batch is spread; loss and metrics are then global.

    Returns:
      The loss [] and the metrics ``policy/loss``, ``policy/clip_fraction`` (tokens whose clipped term was the larger),
      ``policy/approx_kl`` (half the mean squared log-ratio, Schulman 2020), ``policy/ratio_max``,
      ``objective/entropy`` (nats per row), with a KL term ``policy/kl_loss`` and with importance weights
      ``policy/importance_weight_mean``.

    Raises:
      ValueError: advantages, or with a KL term ``ref_log_probs``, are missing; or a config value is unusable.
    """
    check_config(config)
    mask = rollout.response_mask != 0  # [B, T]
    whole_mask = mask if minibatch is None else minibatch.response_mask != 0
    if denominator is None:
        denominator = losses.denominator(whole_mask, config.aggregate, config.length, axis_name)
    total = partial(losses.aggregate, mask=mask, axis_name=axis_name)
    mean = partial(total, how=config.aggregate, denominator=denominator)
    token_mean = partial(total, how="token", denominator=losses.denominator(whole_mask, "token", axis_name=axis_name))
    row_sum = partial(total, how="sum", denominator=losses.denominator(whole_mask, "sum", axis_name=axis_name))

    # Masked columns get the same numbers on both sides, so that no exponential or square ever sees what is in them.
    old_log_probs = jnp.where(mask, rollout.log_probs, 0.0)
    log_probs = jnp.where(mask, output.log_probs, 0.0)
    advantage = jnp.where(mask, field(rollout, "advantages", "call the algorithm's prepare first"), 0.0)
    surrogate = losses.clipped_surrogate(
        log_probs, old_log_probs, advantage, config.clip_low, config.clip_high, config.dual_clip
    )
    surrogate, weight_metrics = reweighed(surrogate, rollout, token_mean)
    policy_loss = mean(surrogate)
    value = policy_loss
    if config.entropy_coef:
        value = value - config.entropy_coef * mean(output.entropy)

    ratio = jax.lax.stop_gradient(ops.ratio(log_probs, old_log_probs))
    clipped_ratio = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    ratio_max = jnp.max(jnp.where(mask, ratio, 0.0))
    metrics = {
        "policy/loss": policy_loss,
        "policy/clip_fraction": token_mean((-advantage * clipped_ratio > -advantage * ratio).astype(jnp.float32)),
        "policy/approx_kl": token_mean(0.5 * jnp.square(log_probs - old_log_probs)),
        "policy/ratio_max": ratio_max if axis_name is None else jax.lax.pmax(ratio_max, axis_name),
        "objective/entropy": row_sum(output.entropy),
        **weight_metrics,
    }
    if config.kl_loss_coef:
        ref_log_probs = field(rollout, "ref_log_probs", "give rollout.collect a ref_fn, or set kl_loss_coef=0")
        ref_log_probs = jnp.where(mask, ref_log_probs, 0.0)
        # The tokens are the behaviour policy's: after the first step, the ratio reweighs them to the policy's own.
        kl_loss = mean(ratio * ops.kl(log_probs, ref_log_probs, config.kl_loss_estimator))
        value = value + config.kl_loss_coef * kl_loss
        metrics["policy/kl_loss"] = kl_loss
    return value, metrics


def check_group_size(group_size: int) -> None:
    """Raises ValueError for a group that has nobody to compare with."""
    if group_size < 2:
        raise ValueError(f"group_size must be at least 2 answers of one prompt, got {group_size}")


def with_group_advantages(rollout: Rollout, group_size: int, estimate: Callable[..., jax.Array]) -> Rollout:
    """The rollout with one advantage for all response tokens of a row, ``advantages`` [B, T], 0 elsewhere.

    A row's score is the sum of its ``rewards`` over the response where they are given, else ``scores``.

    Args:
      rollout: rows of one prompt are adjacent: rows ``i * group_size`` to ``(i + 1) * group_size - 1`` are group i.
      estimate: ``estimate(scores [N, G], mask=present [N, G]) -> advantages [N, G]``.

    Raises:
      ValueError: neither rewards nor scores; B is not a multiple of ``group_size``, or that is not above 1.
    """
    check_group_size(group_size)
    mask = rollout.response_mask != 0  # [B, T]
    num_rows = mask.shape[0]
    if num_rows % group_size:
        raise ValueError(
            f"a rollout of {num_rows} rows (on each device, where it is spread by shard_map) does not divide into "
            f"groups of group_size={group_size} answers to one prompt"
        )
    if rollout.rewards is not None:
        ops.check_same_shape(rewards=rollout.rewards, tokens=rollout.tokens)
        scores = jnp.sum(jnp.where(mask, jnp.asarray(rollout.rewards, jnp.float32), 0.0), axis=1)
    elif rollout.scores is not None:
        ops.check_same_shape(scores=rollout.scores, one_column_of_tokens=rollout.tokens[:, 0])
        scores = rollout.scores
    else:
        raise ValueError("rollout.rewards [B, T] or rollout.scores [B] is needed, got neither: call a reward function")
    present = jnp.any(mask, axis=1)
    advantage = estimate(scores.reshape(-1, group_size), mask=present.reshape(-1, group_size)).reshape(num_rows)
    return dataclasses.replace(rollout, advantages=jnp.where(mask, advantage[:, None], 0.0))


def passes(
    loss: Loss,
    state: TrainState,
    rollout: Rollout,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    config: PassesConfig,
    axis_name: AxisName | None = None,
    minibatch_sharding: Any = None,
) -> tuple[TrainState, Metrics]:
    """``num_epochs`` passes of ``num_minibatches`` optimizer steps on the loss of a prepared rollout.

    Returns:
      The new state and the metrics of ``loss`` with ``loss``, ``grad_norm`` and ``nonfinite``, averaged over the steps
      (``ratio_max``, ``nonfinite``: the maximum).

    Raises:
      ValueError: as ``loss``; or rows that do not divide into blocks, minibatches and microbatches.
    """

    def step(state: TrainState, minibatch: Rollout, key: jax.Array) -> tuple[TrainState, Metrics]:
        def loss_fn(params: Params, part: Rollout) -> tuple[jax.Array, Metrics]:
            return loss(params, part, key, minibatch=minibatch, axis_name=axis_name)

        return gradient_step(
            loss_fn, state, optimizer, batch=minibatch, num_microbatches=config.num_microbatches, axis_name=axis_name
        )

    return minibatch_epochs(
        step,
        state,
        rollout,
        key,
        num_epochs=config.num_epochs,
        num_minibatches=config.num_minibatches,
        shuffle_blocks=config.shuffle_blocks,
        axis_name=axis_name,
        minibatch_sharding=minibatch_sharding,
    )
