"""Proximal policy optimisation (Schulman et al. 2017) as RLHF uses it: KL penalty in the reward,
value function, GAE.

Numbers follow lm-human-preferences (Ziegler et al. 2019), except that advantages are whitened once
over the whole rollout of all devices. Column t of every [B, T] array belongs to ``tokens[:, t]``;
``values[:, t]`` is V of the state before it.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax.numpy as jnp

from rlhf_jax import advantages, losses, ops
from rlhf_jax.algorithms import policy
from rlhf_jax.types import (
    AxisName,
    DropoutKey,
    LossAndMetrics,
    Mean,
    Metrics,
    Params,
    PolicyFn,
    Rollout,
    TrainState,
)

State = TrainState
needs_values = True
kl_coef = 0.05
VALUES_HINT = "the policy needs a value function"


@dataclass(frozen=True)
class Config(policy.Config):
    """Proximal policy optimisation."""

    group_size: int = 1
    """Answers to each prompt. They are not compared with each other."""
    num_epochs: int = 1
    """Passes over each rollout."""
    value_clip: float | None = None
    """How far values may move from the rollout's and still lower the loss, in the unit of
    ``returns``; null: as far as they like.
    """
    value_coef: float = 0.3
    """Weight of the value loss."""
    gamma: float = 1.0
    """Discount per response token."""
    gae_lambda: float = 1.0
    """Decay of generalised advantage estimation."""
    length_adaptive: float | None = None
    """alpha of a GAE decay that grows with the answer (VAPO). It is 1 - 1 / (alpha * its
    tokens), at least 0; returns keep gae_lambda. null: both have gae_lambda."""
    normalize_returns: bool = True
    """The value function predicts returns with mean 0 and variance 1 over the rollout's response
    tokens, so that the unit of rewards does not matter.
    """
    whiten_advantages: bool = True
    """Scale advantages to mean 0 and variance 1 over the rollout's response tokens."""
    whiten_rewards: bool = False
    """Scale rewards to variance 1, keeping their mean, before the advantages."""
    positive_coef: float = 0.0
    """Weight of the likelihood of right answers (VAPO). It is the negative log-likelihood per token
    of answers whose score is above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_numbers(self, "value_clip", "length_adaptive", above=0)
        ops.check_numbers(self, "positive_coef", at_least=0)


def prepare(rollout: Rollout, *, config: Config, axis_name: AxisName = None) -> Rollout:
    """The rollout with ``advantages`` and ``returns`` [B, T], from its ``rewards`` and ``values``.

    With ``normalize_returns`` a value v stands for ``mean + sd * v``, with mean and standard
    deviation of the Monte-Carlo returns of all response tokens, and so do ``returns``. Where these
    are all equal, the mean alone is the value. This is the value normalisation of PopArt (van
    Hasselt et al. 2016) and MAPPO (Yu et al. 2022), with the numbers of the rollout in place of
    running ones.

    With ``length_adaptive`` the advantages have a lambda of their own in each row (VAPO, Yue et al.
    2025, arXiv 2504.05118, section 4.2).

    Means are over the response tokens of all devices of ``axis_name``. The result has the rewards
    after their whitening, if there is any; returns come from these. A rollout that has advantages
    is a ValueError: they would not be used.
    """
    policy.check_unprepared(rollout)
    rewards = policy.field(rollout, "rewards", "rewards.kl_shaped makes them")
    values = policy.field(rollout, "values", VALUES_HINT)
    mask = rollout.response_mask
    if config.whiten_rewards:
        rewards = ops.whiten(rewards, mask, shift_mean=False, axis_name=axis_name)
    gae = partial(advantages.gae, gamma=config.gamma, lam=config.gae_lambda)
    if config.normalize_returns:
        monte_carlo = advantages.discounted_returns(rewards, mask, config.gamma)
        differences, mean = ops.centred(monte_carlo, mask, axis_name=axis_name)
        variance = ops.masked_mean(jnp.square(differences), mask, axis_name=axis_name)
        inverse = ops.inverse_deviation(variance, mean)
        values = ops.masked(mean + variance * inverse * ops.float32(values), mask)
        advantage, returns = monte_carlo - values, monte_carlo
        if not _is_monte_carlo(config):
            advantage, returns = gae(rewards, values, mask)
        returns = ops.masked((returns - mean) * inverse, mask)
    else:
        advantage, returns = gae(rewards, values, mask)
    if config.length_adaptive is not None:
        lengths = jnp.maximum(jnp.sum(rollout.mask, axis=1), 1)
        decay = jnp.maximum(1.0 - 1.0 / (config.length_adaptive * lengths), 0.0)
        advantage, _ = gae(rewards, values, mask, lam=decay)
    if config.whiten_advantages:
        advantage = ops.whiten(advantage, mask, axis_name=axis_name)
    return replace(rollout, rewards=rewards, advantages=advantage, returns=returns)


def _is_monte_carlo(config: Config) -> bool:
    """Whether returns are Monte-Carlo returns. These need no second scan, of many GPU kernels."""
    return ops.is_zero(config.gae_lambda - 1)


def loss(
    params: Params, rollout: Rollout, key: DropoutKey, *, policy_fn: PolicyFn, config: Config
) -> LossAndMetrics:
    """``policy.loss`` + ``value_coef`` * clipped value loss of a prepared rollout, whose metric is
    ``value/loss``; with ``positive_coef`` a second mean, of right answers (VAPO, section 4.3), and
    its metric ``policy/positive_loss`` in nats per token.

    Args:
      key: unused: dropout is off in RL.
    """
    output = ops.evaluate(policy_fn, params, rollout)
    if output.values is None:
        raise ValueError(
            "ppo needs values, and policy_fn returned values=None; models.add_head adds a value "
            "head"
        )
    policy_loss, metrics = policy.loss(output, rollout, config)
    # Masked columns are 0 in all arrays, so that neither a loss nor a gradient depends on them.
    mask = rollout.mask  # [B, T]
    old_values = ops.masked(policy.field(rollout, "values", VALUES_HINT), mask)
    values = ops.masked(output.values, mask)
    returns = ops.masked(policy.field(rollout, "returns", "call ppo.prepare first"), mask)
    value_clip = math.inf if config.value_clip is None else config.value_clip
    per_token = losses.clipped_value(values, old_values, returns, value_clip)
    value_loss = config.mean(per_token, mask)
    # Both are means over the same tokens or rows, and so is their sum.
    total = Mean(policy_loss.total + config.value_coef * value_loss.total, policy_loss.count)
    metrics["value/loss"] = value_loss
    if ops.is_zero(config.positive_coef):
        return total, metrics
    is_right = policy.field(rollout, "scores", "a reward function makes them", ndim=1) > 0
    right = mask & is_right[:, None]
    positive = losses.aggregate(losses.cross_entropy(output.log_probs, right), right)
    metrics["policy/positive_loss"] = positive
    return (total, config.positive_coef * positive), metrics


def explained_variance(rollout: Rollout, config: Config, axis_name: AxisName) -> Metrics:
    """``value/explained_variance`` of a prepared rollout's own values, ``1 - var(G - values) /
    var(G)`` over response tokens; 0 where G does not vary. And ``value/return_variance``, var(G) in
    the unit of ``value/loss``.

    G is the Monte-Carlo return, the discounted sum of the rewards from the token on. It does not
    contain the values, as the lambda-return does, which is why a value function of noise is below
    0 at any length.
    """
    mask = rollout.response_mask
    values = policy.field(rollout, "values")
    returns = policy.field(rollout, "returns")
    if not _is_monte_carlo(config):
        rewards = policy.field(rollout, "rewards")
        returns = advantages.discounted_returns(rewards, mask, config.gamma)
        if config.normalize_returns:
            returns = ops.whiten(returns, mask, axis_name=axis_name)
    var_returns = ops.masked_var(returns, mask, axis_name=axis_name)
    var_errors = ops.masked_var(returns - values, mask, axis_name=axis_name)
    # Returns that differ only by rounding (float32: 1e-7 of the values, squared) do not vary.
    varies = var_returns > 1e-12 * var_errors
    share = jnp.where(varies, 1.0 - var_errors / jnp.where(varies, var_returns, 1.0), 0.0)
    return {"value/explained_variance": share, "value/return_variance": var_returns}


update = policy.updater(prepare, loss, explained_variance)
"""See ``policy.updater``. The rollout has ``log_probs``, ``values`` and ``rewards`` (KL penalty
included, if any).
"""
