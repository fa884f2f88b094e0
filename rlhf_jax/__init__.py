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

# Updates: from a state and a batch to the next state
__all__ = ["dpo", "gradient_step", "grpo", "minibatch_epochs", "ppo", "reward_model", "rloo", "sft", "vpg"]
# The maths they are made of
__all__ += ["Mean", "advantages", "losses", "ops"]
# Networks, samples, rewards, devices
__all__ += ["models", "rewards", "rollout", "sampling", "sharding"]
# Whole runs
__all__ += ["checkpoint", "training"]
# What travels between them, and what plugs in
__all__ += ["Comparisons", "Demonstrations", "PolicyOutput", "Rollout", "TrainState"]
__all__ += ["Algorithm", "PolicyFn", "RewardFn", "ScoreFn", "__version__"]
