"""Optimal token baseline (Li et al. 2026, arXiv 2602.07078): ``b_t = sum_i W_it R_it / sum_i W_it``
over a group's answers with a token in column t; R are the rewards from t on, W the sum up to t of
``1 - 2 p + sum_v p_v^2``, the squared gradient of a token's log p with respect to the logits.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax import advantages, ops
from rlhf_jax.algorithms import grpo, policy
from rlhf_jax.types import PolicyFn, Rollout


@dataclass(frozen=True)
class Config(policy.Config):
    """Optimal token baseline."""

    group_size: int = 8
    """Answers to each prompt, in adjacent rows of the rollout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_numbers(self, "group_size", at_least=2)


def sum_squares(logits: Array, *support: Array) -> Array:
    """``sum_v p_v^2`` [...] of the softmax p of logits [..., V], or of those in a support."""
    logits = ops.among(logits, *support)
    return jnp.exp(jax.nn.logsumexp(2 * logits, -1) - 2 * jax.nn.logsumexp(logits, -1))


def prepare(
    rollout: Rollout, *, state: Any, policy_fn: PolicyFn, config: Config, axis_name: Any = None
) -> Rollout:
    """The rollout with ``advantages`` [B, T], ``R_it - b_t`` of its ``rewards``, by a pass of the
    policy that sampled, of as many rows at once as in a step."""
    policy.check_unprepared(rollout)
    mask = rollout.mask
    rows = len(mask) // (config.num_minibatches * config.num_microbatches)
    by_rows = ops.by_rows(policy_fn, rows, group_size=rollout.group_size)
    asked: Any = {"statistic": sum_squares, "arrays": [rollout.support]}
    output = ops.evaluate(by_rows, state.params, rollout, **asked)
    energy = ops.masked(1.0 - 2.0 * jnp.exp(output.log_probs) + output.statistic, mask)
    rewards = policy.field(rollout, "rewards", "rewards.kl_shaped makes them")
    to_go = advantages.discounted_returns(rewards, mask)
    present = mask.reshape(-1, config.group_size, mask.shape[1])
    weight = ops.masked(jnp.cumsum(energy, axis=1).reshape(present.shape), present)
    # Of the distances from the mean, so that equal rewards have advantages of exactly 0.
    centred, _ = ops.centred(to_go.reshape(present.shape), present, axis=1)
    total = jnp.sum(weight, axis=1, keepdims=True)
    baseline = jnp.sum(weight * centred, axis=1, keepdims=True) / jnp.maximum(total, 1e-8)
    estimated = ops.masked(centred - baseline, present).reshape(mask.shape)
    return replace(rollout, advantages=estimated)


loss = grpo.loss
update = policy.updater(prepare, loss)
"""See ``policy.updater``. The rollout has ``log_probs`` and ``rewards``."""
