"""Reinforcement learning as a run: prompts, a policy and a reward in, a better policy out."""

from rlhf_jax.training.rl.run import run

__all__ = ["run"]
