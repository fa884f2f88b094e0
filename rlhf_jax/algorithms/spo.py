"""Single-stream policy optimisation (Xu and Ding 2025, arXiv 2509.13232): one answer to a prompt,
compared with the prompt's own record.

``v = alpha / (alpha + beta)``, ``A = r - v`` whitened over the batch; then ``alpha = rho alpha +
r``, ``beta = rho beta + 1 - r``, ``rho = 2^(-D / half_life)`` within its bounds. Scores are from 0
to 1. D, the mean ``|log-ratio|`` of a token to the policy that answered the prompt last, is added
up over the updates since, each on its own rollout; the authors' code measures it on the old answer.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax import ops
from rlhf_jax.algorithms import policy, rloo
from rlhf_jax.types import AxisName, Metrics, Params, PolicyFn, Rollout, TrainState


@dataclass(frozen=True)
class Config(policy.ReadsOutcomes, policy.Config):
    """Single-stream policy optimisation."""

    half_life: float = 0.06
    """The distance of policies, in nats per token, at which a prompt's past counts half."""
    rho: tuple[float, float] = (0.875, 0.96)
    """The smallest and the largest share of a prompt's past that is kept."""
    exploration: float = 0.05
    """Prompts are drawn in proportion to sqrt(v (1 - v)) plus this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_numbers(self, "half_life", "exploration", above=0)
        ops.check_number("rho", self.rho[1], at_least=self.rho[0], at_most=1)


@flax.struct.dataclass
class State(TrainState):
    """A TrainState with the record of each prompt."""

    alpha: Array  # [prompts], as beta and seen
    beta: Array
    seen: Array  # ``moved`` when the prompt was answered last
    moved: Array  # [] nats per token, summed over all updates

    @classmethod
    def create(cls, params: Params, optimizer: Any, prompts: int) -> Self:  # type: ignore[override]
        """All prompts at 1/2, by one answer."""
        half = jnp.full(prompts, 0.5)
        start = vars(TrainState.create(params, optimizer))
        return cls(**start, alpha=half, beta=half, seen=0.0 * half, moved=jnp.zeros(()))


def prepare(rollout: Rollout, *, state: State, config: Config, axis_name: AxisName) -> Rollout:
    """The rollout with ``advantages`` [B, T], the same for all response tokens of a row."""
    policy.check_unprepared(rollout)
    values = state.alpha / (state.alpha + state.beta)
    rewards = jnp.where(jnp.isnan(policy.outcomes(rollout)), jnp.nan, policy.row_rewards(rollout))
    gaps = rewards - values[policy.field(rollout, "row_ids", "number the prompts from 0", ndim=1)]
    return policy.spread(ops.whiten(gaps, rollout.present, axis_name=axis_name), rollout)


def advance(state: State, rollout: Rollout, *, config: Config, axis_name: AxisName = None) -> State:
    """The state with the record of the prompts that were answered."""
    rows = policy.field(rollout, "row_ids", "number the prompts from 0", ndim=1)
    reward = policy.outcomes(rollout)
    counted = jnp.nan_to_num(ops.masked(jnp.stack([reward, 1.0 - reward]), rollout.present)).T
    right, wrong = ops.psum(jax.ops.segment_sum(counted, rows, len(state.alpha)), axis_name).T
    is_answered = right + wrong > 0
    rho = jnp.clip(jnp.exp2((state.seen - state.moved) / config.half_life), *config.rho)
    rho = jnp.where(is_answered, rho, 1.0)
    seen = jnp.where(is_answered, state.moved, state.seen)
    return replace(state, alpha=rho * state.alpha + right, beta=rho * state.beta + wrong, seen=seen)


def choose(state: State, key: Array, *, rows: Array, number: int, config: Any) -> Array:
    """``number`` of the ``rows``, all different if there are as many."""
    deviations = jnp.sqrt(state.alpha * state.beta) / (state.alpha + state.beta)
    weights = deviations[rows] + config.exploration
    return jax.random.choice(key, rows, (number,), number > len(rows), weights / weights.sum())


_passes = policy.updater(prepare, rloo.loss, advance=advance)


def update(
    state: State, rollout: Rollout, key: Array, *, policy_fn: PolicyFn, config: Config, **how: Any
) -> tuple[State, Metrics]:
    """See ``policy.updater``. The rollout has ``row_ids``; the metric ``spo/distance`` is how far
    this update moved the policy.
    """
    state, metrics = _passes(state, rollout, key, policy_fn=policy_fn, config=config, **how)
    rows = len(rollout.tokens) // (config.num_minibatches * config.num_microbatches)
    in_parts = ops.by_rows(policy_fn, rows, group_size=rollout.group_size)
    gap = jnp.abs(ops.evaluate(in_parts, state.params, rollout).log_probs - rollout.log_probs)
    moved = ops.masked_mean(gap, rollout.response_mask, None, how.get("axis_name"))
    moved = jnp.where(metrics["nonfinite"] == 0, moved, 0.0)
    return replace(state, moved=state.moved + moved), {**metrics, "spo/distance": moved}
