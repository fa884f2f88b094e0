"""Proximal policy optimisation (Schulman et al. 2017) as RLHF uses it: KL penalty in the reward, value function, GAE.

Numbers follow lm-human-preferences (Ziegler et al. 2019), except that advantages are whitened once over the whole
rollout of all devices. Column t of every [B, T] array speaks of ``tokens[:, t]``; ``values[:, t]`` is V of the state
before it.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import advantages, losses, ops
from rlhf_jax.algorithms import policy_loss
from rlhf_jax.algorithms.policy_loss import field
from rlhf_jax.ops import AxisName
from rlhf_jax.types import Metrics, Params, PolicyFn, Rollout, TrainState


@dataclass(frozen=True)
class Config:
    """Proximal policy optimisation."""

    num_epochs: int = 4
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
    value_clip: float | None = 0.2
    """How far values may move from the rollout's and still lower the loss; null: as far as they like."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    gamma: float = 1.0
    """Discount per response token."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation."""
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the rollout's response tokens."""
    whiten_rewards: bool = False
    """Scale rewards to variance 1, keeping their mean, before the advantages."""
    aggregate: losses.Aggregation = "token"
    """How losses of tokens become one number."""
    length: int | None = None
    """Tokens a row counts as with aggregate=fixed: max_new_tokens."""
    kl_loss_coef: float = 0.0
    """Weight of a KL term in the loss; the KL penalty in the reward is the loop's kl_coef."""
    kl_loss_estimator: ops.KLEstimator = "k2"
    """k2: the gradient of each token's KL(policy || reference); k3: that of its KL(reference || policy)."""


def check_config(config: Config) -> None:
    """Raises ValueError for values that no run can use."""
    policy_loss.check_config(config)
    if config.value_clip is not None and config.value_clip <= 0:
        raise ValueError(f"value_clip must be above 0 (or None), got {config.value_clip}")


def prepare(rollout: Rollout, config: Config, axis_name: AxisName | None = None) -> Rollout:
    """The rollout with ``advantages`` and ``returns`` [B, T], from its ``rewards`` and ``values``.

    Whitening uses the response tokens of all devices of ``axis_name``. Returns come from the rewards (whitened if the
    config says so) and are not whitened themselves.

    Raises:
      ValueError: rewards or values are missing, or a config value is unusable.
    """
    check_config(config)
    rewards = field(rollout, "rewards", "rewards.kl_shaped makes them")
    values = field(rollout, "values", "the policy needs a value function")
    mask = rollout.response_mask
    if config.whiten_rewards:
        rewards = ops.whiten(rewards, mask, shift_mean=False, axis_name=axis_name)
    advantage, returns = advantages.gae(rewards, values, mask, config.gamma, config.gae_lambda)
    if config.whiten_advantages:
        advantage = ops.whiten(advantage, mask, axis_name=axis_name)
    return dataclasses.replace(rollout, advantages=advantage, returns=returns)


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
    """Clipped policy loss + ``value_coef`` * clipped value loss - entropy bonus + KL term of a prepared rollout.

    Args:
      rollout: from ``prepare``; a row with an empty response mask counts nowhere.
      key: unused: dropout is off in RL.
      denominator: what the loss divides by, if not ``losses.denominator`` of ``minibatch``.
      minibatch: the minibatch that ``rollout`` is a microbatch of; None: ``rollout`` itself. Loss and metrics divide by
        its rows and tokens, so that those of its microbatches add up.
      axis_name: the mapped axis over which the batch is spread; loss and metrics are then global.

    Returns:
      The loss [] and the metrics ``policy/loss``, ``policy/clip_fraction`` (tokens whose clipped term was the larger),
      ``policy/approx_kl`` (half the mean squared log-ratio, Schulman 2020), ``policy/ratio_max``, ``value/loss``,
      ``objective/entropy`` (nats per row) and, with a KL term, ``policy/kl_loss``.

    Raises:
      ValueError: a field is missing, the policy gives no values, or a config value is unusable.
    """
    del key
    check_config(config)
    mask = rollout.response_mask != 0  # [B, T]
    if denominator is None:
        whole_mask = mask if minibatch is None else minibatch.response_mask
        denominator = losses.denominator(whole_mask, config.aggregate, config.length, axis_name)

    output = policy_fn(params, rollout.tokens, rollout.attention_mask, None)
    if output.values is None:
        raise ValueError(
            "ppo needs a policy with values, and policy_fn returned values=None; add a value head "
            '(models.add_head(key, params, "value")) or give policy_fn a value model'
        )
    value, metrics = policy_loss.clipped(
        output, rollout, config, denominator=denominator, minibatch=minibatch, axis_name=axis_name
    )
    # Masked columns get the same numbers on both sides, so that no square ever sees what is in them.
    old_values = jnp.where(mask, field(rollout, "values", "the policy needs a value function"), 0.0)
    values = jnp.where(mask, output.values, 0.0)
    returns = jnp.where(mask, field(rollout, "returns", "call ppo.prepare first"), 0.0)
    value_clip = math.inf if config.value_clip is None else config.value_clip
    value_loss = losses.aggregate(
        losses.clipped_value(values, old_values, returns, value_clip),
        mask,
        config.aggregate,
        denominator=denominator,
        axis_name=axis_name,
    )
    return value + config.value_coef * value_loss, {**metrics, "value/loss": value_loss}


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
      rollout: with ``log_probs``, ``values`` and ``rewards`` (KL penalty included, if any).
      key: of the shuffling.
      minibatch_sharding: see ``step.minibatch_epochs``.

    Returns:
      The new state and the metrics of ``loss`` with ``loss``, ``grad_norm`` and ``nonfinite``, averaged over the steps
      (``ratio_max``, ``nonfinite``: the maximum), and ``value/explained_variance``,
      ``1 - var(returns - values) / var(returns)`` of the rollout's own values, 0 where the returns do not vary.

    Raises:
      ValueError: as ``prepare`` and ``loss``; or rows that do not divide into blocks, minibatches and microbatches.
    """
    rollout = prepare(rollout, config, axis_name)
    state, metrics = policy_loss.passes(
        partial(loss, policy_fn=policy_fn, config=config),
        state,
        rollout,
        key,
        optimizer=optimizer,
        config=config,
        axis_name=axis_name,
        minibatch_sharding=minibatch_sharding,
    )
    return state, {**metrics, "value/explained_variance": _explained_variance(rollout, axis_name)}


def _explained_variance(rollout: Rollout, axis_name: AxisName | None) -> jax.Array:
    mask = rollout.response_mask
    returns = field(rollout, "returns", "call ppo.prepare first")
    values = field(rollout, "values", "the policy needs a value function")
    var_returns = ops.masked_var(returns, mask, axis_name=axis_name)
    var_errors = ops.masked_var(returns - values, mask, axis_name=axis_name)
    # Returns that differ by rounding alone (float32: 1e-7 of the values, squared) do not vary.
    varies = var_returns > 1e-12 * var_errors
    return jnp.where(varies, 1.0 - var_errors / jnp.where(varies, var_returns, 1.0), 0.0)
