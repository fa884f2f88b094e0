"""Runs: what the commands, scripts and a notebook call."""

from rlhf_jax.training import pipeline, rl
from rlhf_jax.training.supervised import dpo, kto, reward_model, sft

__all__ = ["dpo", "kto", "pipeline", "reward_model", "rl", "sft"]
