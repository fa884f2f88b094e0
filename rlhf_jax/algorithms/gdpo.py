"""GRPO in which each component of the reward is normalised in its group before they are summed, so
that groups with equal sums of different components still teach (Liu et al. 2026, "GDPO: Group
reward-Decoupled Normalization Policy Optimization", arXiv 2601.05242, section 3.1).
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from rlhf_jax import advantages, ops
from rlhf_jax.algorithms import grpo, policy
from rlhf_jax.errors import UserError
from rlhf_jax.types import AxisName, Rollout


@dataclass(frozen=True)
class Config(grpo.Config):
    """GRPO with each component of the reward normalised."""

    components: tuple[str, ...] = ()
    """Names of the reward's components, as in the metrics reward/NAME; at least one."""
    weights: tuple[float, ...] = ()
    """Of the normalised components, one each; weights of the reward's entries do not count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.components) != len(self.weights):
            raise ValueError(
                f"weights: give one for each of components, {len(self.components)}, got "
                f"{len(self.weights)}; the weights of the reward, and their signs, are not read"
            )

    @property
    def extras(self) -> dict[str, Literal["row", "token"]]:  # type: ignore[override]
        """The components."""
        return dict.fromkeys(self.components, "row")


def prepare(rollout: Rollout, *, config: Config, axis_name: AxisName = None) -> Rollout:
    """The rollout with ``advantages`` [B, T]: the weighted sum of ``advantages.group_normalized``
    components, whose mean is 0, divided by its standard deviation over the rows of all devices. A
    row without a score of a component counts nowhere in its group and gets 0 of it. Scores, and so
    penalties and a KL in the reward, are not read.
    """
    policy.check_unprepared(rollout)
    if not config.components:
        raise UserError(
            "gdpo.components: name those of the reward, as in the metrics reward/NAME, and give "
            "each a weight in gdpo.weights"
        )
    total = jnp.zeros(len(rollout.tokens))
    for name, weight in zip(config.components, config.weights, strict=True):
        values = policy.extra(rollout, name).reshape(-1, config.group_size)
        mask = rollout.present.reshape(values.shape) & ~jnp.isnan(values)
        groups = jnp.where(mask, values, 0.0)
        normalized = advantages.group_normalized(groups, mask, eps=config.eps, scale=config.scale)
        total += weight * normalized.reshape(-1)
    # Not whitened: less a rounded mean, groups of equal components would have advantages.
    mean_square = ops.masked_mean(jnp.square(total), rollout.present, axis_name=axis_name)
    return policy.spread(total * ops.inverse_deviation(mean_square, 0.0), rollout)


loss = grpo.loss
update = policy.updater(prepare, loss)
"""See ``policy.updater``. The rollout has ``log_probs``, the components in ``extras`` and, with a
KL term, ``ref_log_probs``."""
