"""Responses of a policy: the sampler, best of n, and rollouts for updates."""

from rlhf_jax.sampling.decoding import (
    CachedModel,
    SamplingConfig,
    best_of_n,
    best_of_n_kl,
    generate,
    mixture,
    uncached,
)
from rlhf_jax.sampling.routing import expert_gap

__all__ = [
    "CachedModel",
    "SamplingConfig",
    "best_of_n",
    "best_of_n_kl",
    "expert_gap",
    "generate",
    "mixture",
    "uncached",
]
