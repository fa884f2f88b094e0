"""Reinforcement learning from human feedback as pure functions in JAX."""

from rlhf_jax import advantages, losses, models, ops, rewards, rollout, sampling, sharding, training
from rlhf_jax.algorithms import dpo, grpo, ppo, reward_model, rloo, sft, vpg
from rlhf_jax.runs import checkpoint
from rlhf_jax.types import Comparisons, Demonstrations, PolicyOutput, Rollout, TrainState

__all__ = [
    "Comparisons",
    "Demonstrations",
    "PolicyOutput",
    "Rollout",
    "TrainState",
    "advantages",
    "checkpoint",
    "dpo",
    "grpo",
    "losses",
    "models",
    "ops",
    "ppo",
    "reward_model",
    "rewards",
    "rloo",
    "rollout",
    "sampling",
    "sft",
    "sharding",
    "training",
    "vpg",
]
