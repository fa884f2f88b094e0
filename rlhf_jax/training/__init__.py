"""Runs: what the commands, scripts and a notebook call."""

from rlhf_jax.training import rl
from rlhf_jax.training.supervised import dpo, kto, reward_model, sft

__all__ = ["dpo", "kto", "reward_model", "rl", "sft"]
