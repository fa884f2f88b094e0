"""Out of memory as a sentence: what lies on each device, and which settings help most."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.config import Compute
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.types import Metrics

State = TypeVar("State")


def is_out_of_memory(error: Exception) -> bool:
    """Whether XLA says so; while arrays are placed on a GPU it is a ValueError."""
    return isinstance(error, jax.errors.JaxRuntimeError | ValueError) and "RESOURCE_EXHAUSTED" in str(error)


def fault(stage: str, held: Mapping[str, Any], sizes: Mapping[str, int], error: Exception) -> TrainingFault:
    """What to raise in place of XLA's error.

    Args:
        stage: such as "sft" or "ppo".
        held: {name: pytree of arrays or shapes} of what lies on the devices; donated arrays are read for their shapes.
        sizes: {dotted setting: its value}, the settings that help: microbatches to raise, a batch size to lower, and
            ``lora.rank`` and ``compute.remat`` where they can still be turned on (value 0).
    """
    sizes_held = {name: on_device(tree) for name, tree in held.items()}
    parts = [f"{size / 2**20:.1f} MiB of {name}" for name, size in sizes_held.items() if size]
    lies = f"On each device lie {', '.join(parts)}; activations come on top of that. " if parts else ""
    advice = {
        "num_microbatches": "more --{flag} (now {value})",
        "batch_size": "a smaller --{flag} (now {value})",
        "rank": "--{flag} 8, which needs no optimizer state for the rest and no second copy for the reference",
        "remat": "--{flag} (on a CPU with --compute.scan-layers)",
    }
    helps = [
        advice[setting.rpartition(".")[2]].format(flag=setting.replace("_", "-"), value=value)
        for setting, value in sizes.items()
    ]
    return TrainingFault(
        f"{stage}: out of memory. {lies}What helps most: {', '.join([*helps, 'shorter texts', 'more devices'])}. "
        f"XLA said: {str(error).splitlines()[0]}"
    )


def score_rows(compute: Compute, num_rows: int, config: Any) -> int | None:
    """How many of the rows of a batch are scored at once (see ``ops.by_rows``), by what cuts the batch for an update:
    ``num_minibatches``, if ``config`` has them, and ``num_microbatches``."""
    parts = getattr(config, "num_minibatches", 1) * config.num_microbatches
    return compute.score_rows or (num_rows // parts if config.num_microbatches > 1 else None)


def tried(update: Callable[[State], tuple[State, Metrics]], state: State) -> State:
    """Runs an update for the memory that it takes alone, and returns the state as it was, bit for bit.

    One array of the parameters is NaN meanwhile, the smallest beside the heads, so that loss and gradient are not
    finite and the update is not applied. The state may be donated; there is no second copy of it.

    Raises:
        UserError: the update was applied.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    leaves = [leaf for _, leaf in flat]
    body = [i for i, name in enumerate(names) if re.match(r"(train/)?params/(?!value/|score/)", name)]
    chosen = min(body, key=lambda i: leaves[i].size)
    kept = leaves[chosen]
    leaves[chosen] = sharding.place(np.full(kept.shape, np.nan, kept.dtype), kept.sharding)
    after, metrics = update(jax.tree.unflatten(structure, leaves))
    if not float(metrics["nonfinite"]):
        raise UserError(
            "an update whose loss was NaN was applied: it must return the state that it was given and nonfinite 1, as "
            "algorithms.step.gradient_step does"
        )
    leaves = jax.tree.leaves(after)
    leaves[chosen] = kept
    return jax.tree.unflatten(structure, leaves)


def free(tree: Any) -> None:
    """Gives the memory of arrays back, whoever still refers to them."""
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


def shapes(tree: Any) -> Any:
    """Shapes, dtypes and shardings alone: a message must not keep arrays on a device."""

    def shape(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) if hasattr(leaf, "dtype") else leaf

    return jax.tree.map(shape, tree)


def on_device(tree: Any) -> int:
    """Bytes that the arrays of a tree, or their shapes, take on one device."""
    leaves = [leaf for leaf in jax.tree.leaves(shapes(tree)) if isinstance(leaf, jax.ShapeDtypeStruct)]
    own = [leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    return sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(own, leaves, strict=True))
