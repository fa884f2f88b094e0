"""pass_rates.py: GRPO on the prompts that the policy answers right about half of the time."""

from dataclasses import replace

import flax.struct
import jax
import jax.numpy as jnp

from rlhf_jax import TrainState, grpo
from rlhf_jax.algorithms import policy

Config = grpo.Config


@flax.struct.dataclass
class State(TrainState):
    rates: jax.Array  # [prompts]

    @classmethod
    def create(cls, params, optimizer, prompts):
        return cls(**vars(TrainState.create(params, optimizer)), rates=jnp.full(prompts, 0.5))


def prepare(rollout, *, state, config, axis_name=None):
    return grpo.prepare(rollout, config=config)


def advance(state, prepared, *, config, axis_name):
    scores = prepared.scores.reshape(-1, config.group_size).mean(axis=1)
    answered = prepared.row_ids[:: config.group_size]
    rates = 0.7 * state.rates[answered] + 0.3 * scores
    return replace(state, rates=state.rates.at[answered].set(rates))


def choose(state, key, *, rows, number, config):
    weights = state.rates[rows] * (1 - state.rates[rows]) + 0.02
    return jax.random.choice(key, rows, (number,), replace=False, p=weights / weights.sum())


update = policy.updater(prepare, grpo.loss, advance=advance)
