"""Reinforcement learning from human feedback as pure functions in JAX."""

import importlib.metadata

from rlhf_jax import advantages, losses, models, ops, rewards, rollout, sampling, sharding, training
from rlhf_jax.algorithms import dpo, grpo, ppo, reward_model, rloo, sft, vpg
from rlhf_jax.algorithms.step import gradient_step, minibatch_epochs
from rlhf_jax.runs import checkpoint
from rlhf_jax.types import (
    Algorithm,
    Comparisons,
    Demonstrations,
    Mean,
    PolicyFn,
    PolicyOutput,
    RewardFn,
    Rollout,
    ScoreFn,
    TrainState,
)

__version__ = importlib.metadata.version("rlhf-jax")

__all__ = [  # noqa: RUF022 - a table of contents
    # Updates: from a state and a batch to the next state
    "sft",
    "reward_model",
    "dpo",
    "vpg",
    "ppo",
    "rloo",
    "grpo",
    "gradient_step",
    "minibatch_epochs",
    # The maths they are made of
    "losses",
    "advantages",
    "ops",
    "Mean",
    # Networks, samples, rewards
    "models",
    "sampling",
    "rollout",
    "rewards",
    "sharding",
    # Whole runs
    "training",
    "checkpoint",
    # What travels between them, and what plugs in
    "TrainState",
    "Rollout",
    "Comparisons",
    "Demonstrations",
    "PolicyOutput",
    "PolicyFn",
    "ScoreFn",
    "RewardFn",
    "Algorithm",
    "__version__",
]
