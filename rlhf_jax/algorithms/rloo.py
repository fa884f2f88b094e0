"""REINFORCE leave-one-out (Ahmadian et al. 2024, "Back to Basics"): each of G answers to a prompt against the others.

``A_i = r_i - mean of the group's other rewards``, one advantage for all tokens of an answer; the ratio of each token is
clipped as in PPO, and there is no value function. Column t of every [B, T] array speaks of ``tokens[:, t]``.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import optax

from rlhf_jax import advantages, losses, ops
from rlhf_jax.algorithms import policy_loss
from rlhf_jax.ops import AxisName
from rlhf_jax.types import Metrics, Params, PolicyFn, Rollout, TrainState


@dataclass(frozen=True)
class Config:
    """REINFORCE leave-one-out."""

    group_size: int = 4
    """Answers to each prompt, in adjacent rows of the rollout."""
    num_epochs: int = 1
    """Passes over each rollout."""
    num_minibatches: int = 1
    """Optimizer steps of a pass, each on its share of the rollout."""
    shuffle_blocks: int = 1
    """Blocks of the global batch inside which rows are shuffled; a multiple of the data devices keeps rows in place."""
    num_microbatches: int = 1
    """Parts of a minibatch that are run one after the other to save memory; the gradient does not change."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound the loss of a negative advantage A by -dual_clip * A; null: no bound."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    aggregate: losses.Aggregation = "sum"
    """How losses of tokens become one number."""
    length: int | None = None
    """Tokens a row counts as with aggregate=fixed: max_new_tokens."""
    kl_loss_coef: float = 0.0
    """Weight of a KL term in the loss; the KL penalty in the reward is the loop's kl_coef."""
    kl_loss_estimator: ops.KLEstimator = "k2"
    """k2: the gradient of each token's KL(policy || reference); k3: that of its KL(reference || policy)."""


def check_config(config: Config) -> None:
    """Raises ValueError for values that no run can use."""
    policy_loss.check_group_size(config.group_size)
    policy_loss.check_config(config)


def prepare(rollout: Rollout, config: Config, axis_name: AxisName | None = None) -> Rollout:
    """The rollout with ``advantages`` [B, T]: ``advantages.leave_one_out`` of the rewards, on all tokens of a row.

    The reward of a row is the sum of ``rewards`` over its response where they are given, else ``scores``. Absent rows,
    and a group with a single answer, get 0. Minibatches may split groups afterwards.

    Args:
      rollout: rows of one prompt are adjacent, ``group_size`` of them.
      axis_name: changes nothing: groups do not cross devices.

    Raises:
      ValueError: neither rewards nor scores; B (on each device, under ``shard_map``) is not a multiple of
        ``group_size``; or a config value is unusable.
    """
    del axis_name
    check_config(config)
    return policy_loss.with_group_advantages(rollout, config.group_size, advantages.leave_one_out)


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
    """Clipped policy loss - entropy bonus + KL term of a prepared rollout; arguments, results and metrics as
    ``policy_loss.clipped``.

    Args:
      key: unused: dropout is off in RL.

    Raises:
      ValueError: a field is missing, or a config value is unusable.
    """
    del key
    check_config(config)
    output = policy_fn(params, rollout.tokens, rollout.attention_mask, None)
    return policy_loss.clipped(
        output, rollout, config, denominator=denominator, minibatch=minibatch, axis_name=axis_name
    )


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
    """``prepare``, then ``num_epochs`` passes of ``num_minibatches`` optimizer steps on ``loss``.

    Args:
      rollout: with ``log_probs`` and ``rewards`` (KL penalty included, if any) or ``scores``.
      key: of the shuffling.
      minibatch_sharding: see ``step.minibatch_epochs``.

    Returns:
      The new state and the metrics of ``loss`` with ``loss``, ``grad_norm`` and ``nonfinite``, averaged over the steps
      (``ratio_max``, ``nonfinite``: the maximum).

    Raises:
      ValueError: as ``prepare`` and ``loss``; or rows that do not divide into blocks, minibatches and microbatches.
    """
    return policy_loss.passes(
        partial(loss, policy_fn=policy_fn, config=config),
        state,
        prepare(rollout, config, axis_name),
        key,
        optimizer=optimizer,
        config=config,
        axis_name=axis_name,
        minibatch_sharding=minibatch_sharding,
    )
