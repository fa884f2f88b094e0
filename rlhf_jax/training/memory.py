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
HOST = "pinned_host"  # JAX's name for memory of the host that devices read


def fault(
    stage: str, held: Mapping[str, Any], sizes: Mapping[str, int], error: Exception
) -> TrainingFault:
    """What to raise in place of XLA's error.

    Args:
        stage: such as "sft" or "ppo".
        held: {name: pytree of arrays or shapes} of what lies on the devices; donated arrays are
            read for their shapes.
        sizes: {dotted setting: its value}, the settings that help: microbatches to raise, a batch
            size to lower, and ``lora.rank`` and ``compute.remat`` where they can still be turned on
            (value 0).
    """
    parts = [
        f"{size / 2**20:.1f} MiB of {name}"
        for name, tree in held.items()
        if (size := on_device(tree))
    ]
    lies = (
        f"On each device lie {', '.join(parts)}; activations come on top of that. " if parts else ""
    )
    advice = {
        "num_microbatches": "more --{} (now {})",
        "batch_size": "a smaller --{} (now {})",
        "rank": (
            "--{} 8, which needs no optimizer state for the rest and no second copy for the "
            "reference"
        ),
        "remat": "--{} (on a CPU with --compute.scan-layers)",
    }
    helps = [
        advice[name.rpartition(".")[2]].format(name.replace("_", "-"), value)
        for name, value in sizes.items()
    ]
    return TrainingFault(
        f"{stage}: out of memory. {lies}What helps most: "
        f"{', '.join([*helps, 'shorter texts', 'more devices'])}. "
        f"XLA said: {str(error).splitlines()[0]}"
    )


def score_rows(compute: Compute, num_rows: int, config: Any) -> int | None:
    """How many of the rows of a batch are scored at once (see ``ops.by_rows``), by what cuts the
    batch for an update: ``num_minibatches``, if ``config`` has them, and ``num_microbatches``."""
    parts = getattr(config, "num_minibatches", 1) * config.num_microbatches
    return compute.score_rows or (num_rows // parts if config.num_microbatches > 1 else None)


def stored(config: Any, rows: int, length: int) -> int:
    """Bytes that the forward pass of an update keeps for the backward pass without remat, about.

    Of each token and layer: ten values as wide as the residual stream, four of the mlp's width,
    and two rows of scores of each head (Korthikanti et al. 2022, section 4.1, count the same
    without dropout).

    Args:
        config: of the network.
        rows: of a microbatch on one device.
        length: columns of a row.
    """
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    of_token = 10 * config.hidden_size + 4 * width + 2 * config.num_heads * length
    itemsize = np.dtype(config.compute_dtype).itemsize
    return config.num_layers * rows * length * of_token * itemsize


def wants_remat(stored: int, limit: float) -> bool:
    """Whether ``compute.remat: auto`` is on, for what an update stores and a device has; with a
    limit of 0, which nobody knows, it is off."""
    return stored > limit / 4 > 0


def tried(update: Callable[[State], tuple[State, Metrics]], state: State) -> State:
    """Runs an update for the memory that it takes alone, and returns the state as it was, bit for
    bit.

    One array of the parameters is NaN meanwhile, the smallest beside the heads, so that loss and
    gradient are not finite and the update is not applied. The state may be donated; there is no
    second copy of it.

    Raises:
        UserError: the update was applied.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(state)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    chosen = min(
        (x for x in leaves if re.match(r"(train/)?params/(?!value/|score/)", x)),
        key=lambda x: leaves[x].size,
    )
    kept = leaves[chosen]
    nan = sharding.place(np.full(kept.shape, np.nan, kept.dtype), kept.sharding)
    after, metrics = update(jax.tree.unflatten(structure, (leaves | {chosen: nan}).values()))
    if not float(metrics["nonfinite"]):
        raise UserError(
            "an update whose loss was NaN was applied; it must return the old state and nonfinite 1"
        )
    returned = dict(zip(leaves, jax.tree.leaves(after), strict=True))
    return jax.tree.unflatten(structure, (returned | {chosen: kept}).values())


def offloaded(fn: jax.tree_util.Partial) -> jax.tree_util.Partial:
    """A function whose arrays lie in the host's memory, and on the devices while a program calls
    it.

    Raises:
        UserError: the devices cannot read the host's memory.
    """
    if HOST not in {space.kind for space in jax.local_devices()[0].addressable_memories()}:
        raise UserError(
            f"compute.offload: {jax.default_backend()} devices have no {HOST} memory; leave it out"
        )
    on_host = jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(HOST)), fn)
    return jax.tree_util.Partial(
        lambda fn, *args: jax.device_put(fn, jax.memory.Space.Device)(*args), on_host
    )


def free(tree: Any) -> None:
    """Gives the memory of arrays back, whoever still refers to them."""
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


def shapes(tree: Any) -> Any:
    """Shapes, dtypes and shardings alone, these of committed arrays: a message must not keep arrays
    on a device.
    """

    def shape(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None
        return (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            if hasattr(leaf, "dtype")
            else leaf
        )

    return jax.tree.map(shape, tree)


def on_device(tree: Any) -> int:
    """Bytes that the arrays of a tree, or their shapes, take on one device; of those in the host's
    memory none.
    """
    leaves = [
        leaf for leaf in jax.tree.leaves(shapes(tree)) if isinstance(leaf, jax.ShapeDtypeStruct)
    ]
    leaves = [leaf for leaf in leaves if getattr(leaf.sharding, "memory_kind", None) != HOST]
    own = [
        leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        for leaf in leaves
    ]
    return sum(
        math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(own, leaves, strict=True)
    )
