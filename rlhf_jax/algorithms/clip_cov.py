"""Clip-Cov and KL-Cov (Cui et al. 2025, "The Entropy Mechanism", arXiv 2505.22617): GRPO that holds
back a few of the tokens whose log-probability and advantage covary, as these cost entropy."""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp

from rlhf_jax import losses, ops
from rlhf_jax.algorithms import grpo, policy
from rlhf_jax.types import LossAndMetrics, Params, PolicyFn, Rollout


@dataclass(frozen=True)
class Config(grpo.Config):
    """Clip-Cov and KL-Cov."""

    kind: Literal["clip", "kl"] = "clip"
    """clip: tokens drawn from a band of covariances have no policy loss; kl: the tokens of the
    largest covariances have a KL from the policy that sampled."""
    share: float = 2e-4
    """Share of the tokens that are held back, at least one of a microbatch."""
    cov_low: float = 1.0
    """Lower end of the band."""
    cov_high: float = 5.0
    """Upper end of the band."""
    kl_cov_coef: float = 1.0
    """Weight of the KL, with kl."""
    kl_loss_coef: float = 0.0
    """Weight of the KL term from the reference in the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_choice("kind", self.kind, Literal["clip", "kl"])
        ops.check_numbers(self, "share", at_least=0, at_most=1)
        ops.check_numbers(self, "cov_low", at_most=self.cov_high)


def loss(
    params: Params, rollout: Rollout, key: jax.Array, *, policy_fn: PolicyFn, config: Config
) -> LossAndMetrics:
    """``policy.loss`` without the tokens that ``key`` draws from the band, or plus ``kl_cov_coef *
    |log_probs - old_log_probs|`` at those of the largest covariances, of a prepared rollout."""
    output = ops.evaluate(policy_fn, params, rollout)
    mask = rollout.mask
    advantages = policy.field(rollout, "advantages", "call prepare first")
    covariance = ops.centred(output.log_probs, mask)[0] * ops.centred(advantages, mask)[0]
    order, among = -covariance, mask
    if config.kind == "clip":
        order = jax.random.uniform(key, mask.shape)
        among = mask & (covariance > config.cov_low) & (covariance < config.cov_high)
    rank = jnp.argsort(jnp.argsort(jnp.where(among, order, jnp.inf), axis=None))
    number = jnp.maximum(jnp.floor(config.share * jnp.sum(mask)), 1)
    chosen = among & (rank.reshape(mask.shape) < number)
    is_dropped = chosen & (config.kind == "clip")
    left = replace(rollout, advantages=jnp.where(is_dropped, 0.0, advantages))
    value, metrics = policy.loss(output, left, config)
    metrics["policy/chosen_fraction"] = losses.aggregate(chosen, mask)
    moved = ops.absolute(output.log_probs - rollout.log_probs)
    kl = config.mean(jnp.where(chosen & ~is_dropped, moved, 0.0), mask)
    return (value, config.kl_cov_coef * kl), metrics


prepare = grpo.prepare
update = policy.updater(prepare, loss)
