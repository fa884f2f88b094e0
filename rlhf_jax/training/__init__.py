"""Runs: what the commands, scripts and a notebook call. A stage is imported when it is used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_jax.training import pipeline, rl
    from rlhf_jax.training.supervised import dpo, kto, reward_model, sft

__all__ = ["dpo", "kto", "pipeline", "reward_model", "rl", "sft"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    folder = "" if name in ("pipeline", "rl") else ".supervised"
    return importlib.import_module(f"{__name__}{folder}.{name}")
