"""Defaults for runs that start from pretrained weights."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rlhf_jax.config.settings import RunConfig
from rlhf_jax.errors import UserError
from rlhf_jax.runs.reading import Settings, read_yaml

# Defaults where --model names pretrained weights: {key: (all weights trained, LoRA)}. Those of the
# classes suit small networks that start from random weights. docs/pretrained-defaults.md cites
# the sources.
PRETRAINED: dict[str, tuple[Any, Any]] = {
    "sft.optimizer.learning_rate": (2e-5, 2e-4),
    "sft.optimizer.schedule": ("cosine", "cosine"),
    "sft.optimizer.warmup_steps": (0.1, 0.1),
    "reward_model.optimizer.learning_rate": (1e-5, 1e-4),
    "reward_model.optimizer.schedule": ("cosine", "cosine"),
    "reward_model.optimizer.warmup_steps": (0.1, 0.1),
    "dpo.batch_size": (64, 32),
    "dpo.optimizer.learning_rate": (1e-6, 1e-5),
    "dpo.optimizer.warmup_steps": (0.1, 0.1),
    "kto.optimizer.learning_rate": (1e-6, 1e-5),
    "kto.optimizer.warmup_steps": (0.1, 0.1),
    "rl.optimizer.learning_rate": (1e-6, 1e-4),
    "rl.optimizer.eps": (1e-8, 1e-8),
}


def pretrained_defaults(config: RunConfig, chosen: Collection[str]) -> dict[str, Any]:
    """The defaults for pretrained weights by key, except those of ``chosen`` keys; empty if the
    model has no such weights.
    """
    if config.model is None or not is_pretrained(config.model):
        return {}
    column = 1 if config.lora.rank else 0
    return {key: both[column] for key, both in PRETRAINED.items() if key not in chosen}


def is_pretrained(model: str) -> bool:
    """Whether ``--model`` has pretrained weights: False if a run wrote them, and this run, or one
    before it, started from random weights.
    """
    seen: list[str] = []
    above: Any = model
    while isinstance(above, str) and above not in seen:
        seen.append(above)
        folder = Path(above)
        if not os.path.isdir(folder):  # a Hugging Face name, or a run that has gone
            return True
        own = folder / "config.yaml"  # of a run's folder; else the folder is the run's model/
        try:
            file = own if own.is_file() else folder.parent / "config.yaml"
            above = read_yaml(file, Settings)["model"]
        except (UserError, KeyError):
            return True
    return above is not None
