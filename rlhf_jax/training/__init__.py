"""Runs: what the scripts and a notebook call."""

from rlhf_jax.training import reward_model, rl, sft

__all__ = ["reward_model", "rl", "sft"]
