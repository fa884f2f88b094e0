"""gdpo.py: GDPO (Liu et al. 2026): each component of the reward is normalised in its group."""

from dataclasses import dataclass

import jax.numpy as jnp

from rlhf_jax import advantages, grpo, ops
from rlhf_jax.algorithms import policy


@dataclass(frozen=True)
class Config(grpo.Config):
    components: tuple[str, ...] = ("correct", "format")
    weights: tuple[float, ...] = (1.0, 1.0)

    @property
    def extras(self):
        return dict.fromkeys(self.components, "row")


def prepare(rollout, *, config, axis_name=None):
    total = jnp.zeros(len(rollout.tokens))
    for name, weight in zip(config.components, config.weights, strict=True):
        values = rollout.extras[name]
        is_scored = rollout.present & ~jnp.isnan(values)
        groups = jnp.where(is_scored, values, 0.0).reshape(-1, config.group_size)
        mask = is_scored.reshape(groups.shape)
        normalized = advantages.group_normalized(groups, mask, eps=config.eps)
        total += weight * normalized.reshape(-1)
    whitened = ops.whiten(total, rollout.present, axis_name=axis_name)
    return policy.spread(whitened, rollout)


update = policy.updater(prepare, grpo.loss)
