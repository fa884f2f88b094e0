"""Safe RLHF (Dai et al. 2023, arXiv 2310.12773): the reward is maximised while the mean cost stays
below a limit, by a Lagrange multiplier that moves with the policy.

``A = (A_r - lambda A_c) / (1 + lambda)``, then ``log lambda += rate lambda (mean cost - limit)``.
Penalties such as the KL's are part of the reward, and lambda weakens them with it; the authors'
code adds half of the KL to the cost too. The advantages are those of ``rloo``; the paper has value
functions and GAE. Lambda starts at 1.
"""

from dataclasses import dataclass, replace
from typing import Any

import flax.struct
import jax.numpy as jnp
from jax import Array

from rlhf_jax import ops
from rlhf_jax.algorithms import policy, rloo
from rlhf_jax.types import AxisName, Metrics, Rollout, TrainState

kl_coef = 0.01


@dataclass(frozen=True)
class Config(rloo.Config):
    """Safe RLHF."""

    cost: str = "cost"
    """The component of the reward that is the cost. A row without a cost is left out."""
    limit: float = 0.0
    """What the mean cost shall not exceed."""
    multiplier_rate: float = 0.1
    """How fast the logarithm of the multiplier moves."""
    multiplier_max: float = 5.0
    """The largest multiplier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_numbers(self, "multiplier_max", above=0)
        ops.check_numbers(self, "multiplier_rate", at_least=0)

    @property
    def extras(self) -> dict[str, Any]:  # type: ignore[override]
        """The cost, one of each row."""
        return {self.cost: "row"}

    unrewarded = property(lambda self: (self.cost,))


@flax.struct.dataclass
class State(TrainState):
    """A TrainState with the logarithm of the multiplier, which starts at 0."""

    log_multiplier: Array = flax.struct.field(default_factory=lambda: jnp.zeros(()))  # [] float32


def prepare(rollout: Rollout, *, state: State, config: Config, **how: Any) -> Rollout:
    """``rloo.prepare`` of the combined rewards; dense rewards count as their sum."""
    cost = policy.extra(rollout, config.cost)
    mask = jnp.where(jnp.isnan(cost)[:, None], 0, rollout.response_mask)
    weight = jnp.exp(state.log_multiplier)
    combined = (policy.row_rewards(rollout) - weight * cost) / (1.0 + weight)
    known = replace(rollout, response_mask=mask, rewards=ops.at_end(combined, mask), dense=False)
    return rloo.prepare(known, config=config, **how)


def _advance(state: State, prepared: Rollout, *, config: Config, axis_name: AxisName) -> State:
    above = policy.extra(prepared, config.cost) - config.limit
    mean = ops.masked_mean(above, prepared.present, None, axis_name)  # 0 without any cost
    step = config.multiplier_rate * jnp.exp(state.log_multiplier) * mean
    most = jnp.log(config.multiplier_max)
    return replace(state, log_multiplier=jnp.minimum(state.log_multiplier + step, most))


_passes = policy.updater(prepare, rloo.loss, advance=_advance)


def update(state: State, rollout: Rollout, key: Array, **how: Any) -> tuple[State, Metrics]:
    """See ``policy.updater``; the metric ``safe/multiplier`` is the next lambda."""
    state, metrics = _passes(state, rollout, key, **how)
    return state, {**metrics, "safe/multiplier": jnp.exp(state.log_multiplier)}
