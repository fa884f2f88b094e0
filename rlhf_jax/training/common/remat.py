"""The choice of ``compute.remat`` where it is auto: by the depth of the model and the memory."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import models
from rlhf_jax.errors import logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.parallel import sharding
from rlhf_jax.runs import devices
from rlhf_jax.training.common import initial, memory
from rlhf_jax.training.common.layout import laid_out_shapes
from rlhf_jax.training.common.opening import OpenRun

LEFT_FREE = 0.1  # the share of the free memory that is not counted on
DOUBT = 0.25  # so far from what decides, relative to itself, the estimate of ``stored`` is enough
# Of a trained parameter an update holds itself, two moments of Adam, its gradient and its change.
COPIES = 5


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


def temporaries(model: Any, params: Any, rows: int, length: int, place: Any) -> int:
    """Bytes on a device that the compiled gradient of a network takes without remat, beside the
    parameters and the gradient.

    Args:
        params: shapes, with their shardings.
        rows: of a microbatch, on all devices.
        length: columns of a row.
        place: the sharding of the rows.
    """
    tokens = jax.ShapeDtypeStruct((rows, length), np.int32, sharding=place)

    def total(params: Any, tokens: Any) -> Any:
        states = model.hidden(params, tokens, tokens)
        return states.astype(np.float32).sum()

    compiled = jax.jit(jax.grad(total)).lower(params, tokens).compile()
    analysis: Any = compiled.memory_analysis()
    return 0 if analysis is None else int(analysis.temp_size_in_bytes)


class Room(NamedTuple):
    """The memory of a device before an update."""

    free: float  # bytes; 0: unknown
    to_come: float
    """Bytes of the arrays that an update needs and that are not there yet: trained parameters,
    optimizer state, gradients."""

    @property
    def left(self) -> float:
        """Bytes for what the forward pass stores. A tenth of the free memory stays free, for
        logits and whatever else a program takes for itself.
        """
        return (1 - LEFT_FREE) * self.free - self.to_come


def wants_remat(room: Room, stored: float, compiled: Callable[[], float]) -> bool:
    """Whether ``compute.remat: auto`` is on: if an update does not fit without it. Where nobody
    knows the memory it is off.

    Args:
        stored: about so many bytes are kept for the backward pass, see the function ``stored``.
        compiled: the same by a compiled program. It takes seconds, and is asked only if ``stored``
            is within a quarter of what decides.
    """
    if not room.free:
        return False
    if abs(stored - room.left) < DOUBT * stored:
        stored = compiled()
    return stored > room.left


def reason(room: Room, stored: float, rows: int, remat: bool) -> str:
    """Why ``compute.remat: auto`` is on or off, for the console."""
    free = "nobody knows how much is free" if not room.free else f"{gib(room.free)} are free"
    sizes = f"an update stores about {gib(stored)} beside {gib(room.to_come)} of arrays, {free}"
    if not remat:
        return f"{sizes}; this saves a quarter of the arithmetic of recomputing"
    factor = more_microbatches(room, stored, rows)
    if factor is None:
        return sizes
    return f"{sizes}; with {factor} times as many microbatches nothing would be recomputed"


def gib(size: float) -> str:
    """Bytes as GiB with one digit."""
    return f"{size / 2**30:.1f} GiB"


def more_microbatches(room: Room, stored: float, rows: int) -> int | None:
    """The smallest factor of ``num_microbatches``, a power of two, with which an update of so many
    rows on a device fits without remat; None if single rows do not fit.
    """
    factor = 1
    while factor <= rows:
        if stored / factor <= room.left:
            return factor
        factor *= 2
    return None


def choose(
    run: OpenRun,
    language_model: LanguageModel,
    rows: int,
    length: int,
    networks: int = 1,
    limit: float | None = None,
) -> tuple[OpenRun, LanguageModel]:
    """The run and the model with ``compute.remat`` true or false where it was auto; depth and
    memory decide, and the choice is printed and recorded.

    Args:
        rows: of a microbatch, over all devices.
        length: the most columns of a row.
        networks: of this size that are trained.
        limit: of a plan, which compiles and prints nothing: bytes of a device; 0: nobody knows.
    """
    compute = run.config.compute
    model = language_model.model
    if compute.remat != "auto":
        return run, language_model
    remat = False
    # A user's own network has no remat. With blocks the bits must not depend on the memory.
    is_open = hasattr(model.config, "remat") and not compute.blocks
    if is_open and model.config.num_layers >= initial.DEEP:
        on = run.layout
        params = laid_out_shapes(on.mesh, language_model.params)
        if limit is None:
            free: float = devices.free_memory()
        else:
            free = max(limit - memory.on_device(params), 1) if limit else 0
        own_rows = -(-rows // on.num_parts)
        trained = laid_out_shapes(on.mesh, initial.trained_shapes(run.config.lora, params))
        room = Room(free, networks * COPIES * memory.on_device(trained))
        estimate = stored(model.config, own_rows, length)
        if limit is None:
            place = sharding.rows(on.mesh)
            compiled = functools.partial(
                temporaries, model, params, own_rows * on.num_parts, length, place
            )
            remat = wants_remat(room, estimate, compiled)
            line = f"compute: scan_layers {compute.scan_layers}, remat {remat}".lower()
            logger.info(f"{line} ({reason(room, estimate, own_rows, remat)})")
        else:
            remat = wants_remat(room, estimate, lambda: estimate)
    run = run.decide(compute=dataclasses.replace(compute, remat=remat))
    if remat:
        model = models.build(dataclasses.replace(model.config, remat=True))
    return run, language_model._replace(model=model)
