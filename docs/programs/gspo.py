"""gspo.py: Group sequence policy optimisation (Zheng et al. 2025)."""

from dataclasses import dataclass

from rlhf_jax import advantages, ops
from rlhf_jax.algorithms import policy


@dataclass(frozen=True)
class Config(policy.Config):
    group_size: int = 4
    ratio: str = "sequence"
    aggregate: str = "sequence"
    clip_low: float = 3e-4
    clip_high: float = 4e-4


def prepare(rollout, *, config, axis_name=None):
    return policy.with_group_advantages(rollout, config.group_size, advantages.group_normalized)


def loss(params, rollout, key, *, policy_fn, config):
    return policy.loss(ops.evaluate(policy_fn, params, rollout), rollout, config)


update = policy.updater(prepare, loss)
