"""Reinforcement learning from human feedback as pure functions in JAX.

A name is imported when it is first used, so that ``rlhf-jax --help`` does not wait for JAX.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_jax import advantages, iteration, losses, models, ops, rewards, sampling, training
    from rlhf_jax.algorithms import distill, dpo, grpo, kto, ppo, reward_model, rloo, sft, vpg
    from rlhf_jax.algorithms.step import gradient_step, minibatch_epochs
    from rlhf_jax.parallel import sharding
    from rlhf_jax.runs import checkpoint
    from rlhf_jax.sampling import rollout
    from rlhf_jax.types import (
        Algorithm,
        Comparisons,
        Demonstrations,
        Feedback,
        Mean,
        PolicyFn,
        PolicyOutput,
        RewardFn,
        Rollout,
        ScoreFn,
        TrainState,
    )

    __version__: str

# Updates: from a state and a batch to the next state
__all__ = [
    "distill",
    "dpo",
    "gradient_step",
    "grpo",
    "kto",
    "minibatch_epochs",
    "ppo",
    "reward_model",
    "rloo",
    "sft",
    "vpg",
]
# The maths they are made of
__all__ += ["Mean", "advantages", "losses", "ops"]
# Networks, samples, rewards, devices, and all of one iteration
__all__ += ["iteration", "models", "rewards", "rollout", "sampling", "sharding"]
# Whole runs
__all__ += ["checkpoint", "training"]
# What travels between them, and what plugs in
__all__ += ["Comparisons", "Demonstrations", "Feedback", "PolicyOutput", "Rollout", "TrainState"]
__all__ += ["Algorithm", "PolicyFn", "RewardFn", "ScoreFn", "__version__"]

_PLACES = {
    "rlhf_jax.algorithms": (
        "distill",
        "dpo",
        "grpo",
        "kto",
        "ppo",
        "reward_model",
        "rloo",
        "sft",
        "vpg",
    ),
    "rlhf_jax.algorithms.step": ("gradient_step", "minibatch_epochs"),
    "rlhf_jax.parallel": ("sharding",),
    "rlhf_jax.runs": ("checkpoint",),
    "rlhf_jax.sampling": ("rollout",),
    "rlhf_jax.types": [name for name in __all__ if name[0].isupper()],
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("rlhf-jax")
    if name not in __all__:
        raise AttributeError(f"module 'rlhf_jax' has no attribute {name!r}")
    place = next((place for place, names in _PLACES.items() if name in names), "rlhf_jax")
    if place in ("rlhf_jax.types", "rlhf_jax.algorithms.step"):
        return getattr(importlib.import_module(place), name)
    return importlib.import_module(f"{place}.{name}")


def __dir__() -> list[str]:
    return __all__
