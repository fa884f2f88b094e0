"""Reinforcement learning from human feedback as pure functions in JAX."""
