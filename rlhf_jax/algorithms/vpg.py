"""Vanilla policy gradient, REINFORCE (Williams 1992) with a running-mean baseline, as jRLHF's Shakespeare job has it.

``loss = -mean_i [A_i sum_t log p_it]``. The advantages are given: ``advantages.ema_baseline`` makes them from scores.
Column t of every [B, T] array speaks of ``tokens[:, t]``.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import optax

from rlhf_jax import losses, ops
from rlhf_jax.algorithms.policy_loss import reweighed
from rlhf_jax.algorithms.step import gradient_step, minibatch_epochs
from rlhf_jax.ops import AxisName
from rlhf_jax.types import Metrics, Params, PolicyFn, Rollout, TrainState

Baseline = Literal["ema", "none"]


@dataclass(frozen=True)
class Config:
    """Vanilla policy gradient."""

    baseline: Baseline = "ema"
    """What the loop subtracts from a score: the running mean of the scores, or nothing."""
    baseline_decay: float = 0.9
    """Share of the running mean that survives an iteration."""
    num_minibatches: int = 1
    """Optimizer steps of an update, each on its share of the rollout."""
    shuffle_blocks: int = 1
    """Blocks of the global batch inside which rows are shuffled; a multiple of the data devices keeps rows in place."""
    num_microbatches: int = 1
    """Parts of a minibatch that are run one after the other to save memory; the gradient does not change."""
    aggregate: losses.Aggregation = "sum"
    """How the per-token loss becomes one number."""
    length: int | None = None
    """Tokens a row counts as with aggregate=fixed: max_new_tokens."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""


def check_config(config: Config) -> None:
    """Raises ValueError for values that no run can use."""
    ops.check_choice("baseline", config.baseline, get_args(Baseline))
    if not 0.0 <= config.baseline_decay <= 1.0:
        raise ValueError(f"baseline_decay must be between 0 and 1, got {config.baseline_decay}")


def loss(
    params: Params,
    rollout: Rollout,
    key: jax.Array | None,
    *,
    policy_fn: PolicyFn,
    config: Config,
    denominator: jax.Array | None = None,
    minibatch: Rollout | None = None,
    axis_name: AxisName | None = None,
) -> tuple[jax.Array, Metrics]:
    """The loss [] and the metrics ``policy/loss`` and ``objective/entropy`` (nats per row).

    Args:
      rollout: with ``advantages`` [B, T] (or [B], one for each row); a row with an empty response mask counts nowhere.
        With ``importance_weights`` see ``policy_loss.reweighed``, which adds a metric.
      key: unused: dropout is off in RL.
      denominator: what the loss divides by, if not ``losses.denominator`` of ``minibatch``.
      minibatch: the minibatch that ``rollout`` is a microbatch of; None: ``rollout`` itself. Loss and metrics divide by
        its rows and tokens, so that those of its microbatches add up.
      axis_name: the mapped axis over which the batch is spread; loss and metrics are then global.

    Raises:
      ValueError: no advantages, or an unknown choice in the config.
    """
    del key
    check_config(config)
    if rollout.advantages is None:
        raise ValueError(
            "vpg needs rollout.advantages [B, T], got None; advantages.ema_baseline makes them from scores"
        )
    mask = rollout.response_mask != 0  # [B, T]
    whole_mask = mask if minibatch is None else minibatch.response_mask != 0
    if denominator is None:
        denominator = losses.denominator(whole_mask, config.aggregate, config.length, axis_name)
    rows = losses.denominator(whole_mask, "sum", axis_name=axis_name)

    output = policy_fn(params, rollout.tokens, rollout.attention_mask, None)
    total = partial(losses.aggregate, mask=mask, axis_name=axis_name)
    mean = partial(total, how=config.aggregate, denominator=denominator)
    tokens = losses.denominator(whole_mask, "token", axis_name=axis_name)
    per_token, weight_metrics = reweighed(
        losses.policy_gradient(output.log_probs, rollout.advantages, mask),
        rollout,
        partial(total, how="token", denominator=tokens),
    )
    policy_loss = mean(per_token)
    value = policy_loss
    if config.entropy_coef:
        value = value - config.entropy_coef * mean(output.entropy)
    entropy = total(output.entropy, how="sum", denominator=rows)
    return value, {"policy/loss": policy_loss, "objective/entropy": entropy, **weight_metrics}


def update(
    state: TrainState,
    rollout: Rollout,
    key: jax.Array,
    *,
    policy_fn: PolicyFn,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: AxisName | None = None,
    minibatch_sharding: Any = None,
) -> tuple[TrainState, Metrics]:
    """One pass over the rollout in ``num_minibatches`` optimizer steps. ``rollout.advantages`` are taken as given.

    Args:
      key: of the shuffling.
      minibatch_sharding: see ``step.minibatch_epochs``.

    Returns:
      The new state, and the metrics of ``loss`` with ``loss``, ``grad_norm`` and ``nonfinite``, averaged over steps.

    Raises:
      ValueError: as ``loss``; or rows that do not divide into blocks, minibatches and microbatches.
    """

    def step(state: TrainState, minibatch: Rollout, key: jax.Array) -> tuple[TrainState, Metrics]:
        def loss_fn(params: Params, part: Rollout) -> tuple[jax.Array, Metrics]:
            return loss(params, part, key, policy_fn=policy_fn, config=config, minibatch=minibatch, axis_name=axis_name)

        return gradient_step(
            loss_fn, state, optimizer, batch=minibatch, num_microbatches=config.num_microbatches, axis_name=axis_name
        )

    return minibatch_epochs(
        step,
        state,
        rollout,
        key,
        num_epochs=1,
        num_minibatches=config.num_minibatches,
        shuffle_blocks=config.shuffle_blocks,
        axis_name=axis_name,
        minibatch_sharding=minibatch_sharding,
    )
