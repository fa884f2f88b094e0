"""Compares the memory that the largest programs need with the free memory, before the first step;
and explains an out-of-memory error: which arrays are on each device, and which settings help most.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled
from jax.tree_util import Partial

from rlhf_jax import policies
from rlhf_jax.config import Compute
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.parallel import sharding
from rlhf_jax.runs import devices

Program = Callable[..., Any]
HOST = "pinned_host"  # JAX's name for memory of the host that devices read
# What to do about a setting of this name, with its flag and its value.
ADVICE = {
    "num_microbatches": "more --{} (now {})",
    "batch_size": "a smaller --{} (now {})",
    "rank": (
        "--{} 8, which needs no optimizer state for the rest and no second copy for the reference"
    ),
    "remat": "--{} (on a CPU with --compute.scan-layers)",
}


class TooLarge(Exception):
    """A program needs more memory than is free: how much of both."""


def fault(
    stage: str,
    held: Mapping[str, Any],
    sizes: Mapping[str, int],
    error: Exception,
) -> TrainingFault:
    """The error to raise instead of XLA's error, or if a program is too large.

    Args:
        stage: such as "sft" or "ppo".
        held: {name: pytree of arrays or shapes} of what the devices hold; of donated arrays only
            the shapes are read.
        sizes: {dotted setting: its value}, the settings that help: microbatches to raise, a batch
            size to lower, and ``lora.rank`` and ``compute.remat`` where they can still be turned on
            (value 0).
    """
    held_bytes = {name: on_device(tree) for name, tree in held.items()}
    parts = [f"{size / 2**20:.1f} MiB of {name}" for name, size in held_bytes.items() if size]
    lies = f"Each device holds {', '.join(parts)}; activations need more. " if parts else ""
    helps = []
    for name, value in sizes.items():
        _, _, setting = name.rpartition(".")
        helps.append(ADVICE[setting].format(name.replace("_", "-"), value))
    advice = ", ".join([*helps, "shorter texts", "more devices"])
    reason = str(error).partition("\n")[0]
    begins = "out of memory."
    ends = f"XLA said: {reason}"
    if isinstance(error, TooLarge):
        begins = f"out of memory before the first step: {reason}."
        ends = f"rlhf-jax plan {stage} computes what other settings need."
    return TrainingFault(f"{stage}: {begins} {lies}What helps most: {advice}. {ends}")


def amount(size: float) -> str:
    """Bytes as GiB, or as MiB if they are fewer."""
    if size >= 2**30:
        return f"{size / 2**30:.3f} GiB"
    return f"{size / 2**20:.3f} MiB"


def needed(compiled: Compiled) -> int:
    """Bytes that a program takes on a device beside its arguments; 0 if they are not known."""
    analysis: Any = compiled.memory_analysis()
    if analysis is None:
        return 0
    added = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(analysis.temp_size_in_bytes + max(added, 0))


def check(phase: str, program: Program, *args: Any, **named: Any) -> Compiled:
    """Compiles a jitted function, or a partial of one, and does not run it; a call with such
    arguments then finds it compiled.

    Raises:
        TooLarge: it needs more memory beside its arguments than is free.
    """
    bound = functools.partial(program)  # a partial of a partial is flat
    jitted: Any = bound.func
    keywords = bound.keywords | named
    compiled: Compiled = jitted.lower(*bound.args, *args, **keywords).compile()
    size = needed(compiled)
    free = devices.free_memory()
    if size > free > 0:
        raise TooLarge(
            f"the phase {phase!r} needs {amount(size)} more than the arrays on each device take, "
            f"and {amount(free)} are free"
        )
    return compiled


def rehearsed(phase: str, program: Program) -> Program:
    """``program`` as ``check`` calls it: it returns zeros of the shapes that it would return."""

    def rehearse(*args: Any, **named: Any) -> Any:
        compiled = check(phase, program, *args, **named)
        shapes = jax.eval_shape(program, *args, **named)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        return jax.tree.map(sharding.place, zeros, compiled.output_shardings)

    return rehearse


def unchecked(program: Program) -> Program:
    """``program`` as a check calls it that runs on other devices: it returns such zeros too."""

    def zeros(*args: Any) -> Any:
        shapes = jax.eval_shape(program, *args)
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

    return zeros


def score_rows(compute: Compute, num_rows: int, config: Any) -> int | None:
    """How many of the rows of a batch are scored at once (see ``ops.by_rows``), by what cuts the
    batch for an update: ``num_minibatches``, if ``config`` has them, and ``num_microbatches``."""
    parts = getattr(config, "num_minibatches", 1) * config.num_microbatches
    return compute.score_rows or (num_rows // parts if config.num_microbatches > 1 else None)


def offloaded(fn: Any) -> Any:
    """A function with its arrays in the host's memory. They are on the devices only while a program
    calls it.

    Raises:
        UserError: the devices cannot read the host's memory.
    """
    if HOST not in {space.kind for space in jax.local_devices()[0].addressable_memories()}:
        raise UserError(
            f"compute.offload: {jax.default_backend()} devices have no {HOST} memory; leave it out"
        )
    on_host = jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(HOST)), fn)
    return policies.wrap(_on_device, on_host)


def _on_device(fn: Partial, *args: Any, **more: Any) -> Any:
    return jax.device_put(fn, jax.memory.Space.Device)(*args, **more)


def free(tree: Any) -> None:
    """Gives the memory of arrays back, even if there are other references to them. Shapes in place
    of arrays have none.
    """
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            leaf.delete()


def shapes(tree: Any) -> Any:
    """The shapes, dtypes and (of committed arrays) shardings: a message must not keep arrays on a
    device.
    """

    def shape(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype"):
            return leaf
        sharding = getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


def state_parts(state: Any) -> dict[str, Any]:
    """{name: pytree} of a TrainState and of its gradients."""
    parts = state.params if "policy" in state.params else {"parameters": state.params}
    trained = {f"trained {part}": tree for part, tree in parts.items()}
    return trained | {"optimizer state": state.opt_state, "gradients": state.params}


def on_device(tree: Any) -> int:
    """Bytes that the arrays of a tree, or their shapes, take on one device; arrays in the host's
    memory take none.
    """
    total = 0
    for leaf in jax.tree.leaves(shapes(tree)):
        sharding = getattr(leaf, "sharding", None)
        is_array = isinstance(leaf, jax.ShapeDtypeStruct)
        if not is_array or getattr(sharding, "memory_kind", None) == HOST:
            continue
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * jax.dtypes.itemsize_bits(leaf.dtype)  # 4 of a uint4
    return -(-total // 8)
