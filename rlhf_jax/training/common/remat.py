"""The choice of ``compute.remat`` where it is auto: by the depth of the model and the memory."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from rlhf_jax import models
from rlhf_jax.config import LoRA
from rlhf_jax.errors import logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.parallel import sharding
from rlhf_jax.runs import devices
from rlhf_jax.training.common import initial, memory
from rlhf_jax.training.common.layout import Layout, laid_out_shapes
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.types import Params


class Need(NamedTuple):
    """The memory that an update without remat needs on a device, and the memory that there is."""

    room: memory.Room
    stored: int  # bytes that the forward pass keeps, about
    rows: int  # of a microbatch

    def wants_remat(self, compiled: Callable[[], float]) -> bool:
        """As ``memory.wants_remat``."""
        return memory.wants_remat(self.room, self.stored, compiled)


def needed(
    on: Layout,
    lora: LoRA,
    config: Any,
    params: Params,
    rows: int,
    length: int,
    networks: int,
    free: float,
) -> Need:
    """What an update needs.

    Args:
        config: of the network; params: its shapes.
        rows, length, networks: as in ``choose``.
        free: bytes of a device beside the parameters; 0: nobody knows.
    """
    own_rows = -(-rows // on.num_parts)
    trained = laid_out_shapes(on.mesh, initial.trained_shapes(lora, params))
    to_come = networks * memory.COPIES * memory.on_device(trained)
    stored = memory.stored(config, own_rows, length)
    return Need(memory.Room(free, to_come), stored, own_rows)


def choose(
    run: OpenRun, language_model: LanguageModel, rows: int, length: int, networks: int = 1
) -> tuple[OpenRun, LanguageModel]:
    """The run and the model with ``compute.remat`` true or false where it was auto; depth and
    memory decide, and the choice is printed and recorded.

    Args:
        rows: of a microbatch, over all devices.
        length: the most columns of a row.
        networks: of this size that are trained.
    """
    compute = run.config.compute
    on = run.layout
    model = language_model.model
    if compute.remat != "auto":
        return run, language_model
    remat = False
    # A user's own network has no remat. With blocks the bits must not depend on the memory.
    is_open = hasattr(model.config, "remat") and not compute.blocks
    if is_open and model.config.num_layers >= initial.DEEP:
        params = laid_out_shapes(on.mesh, language_model.params)
        free = devices.free_memory()
        lora = run.config.lora
        need = needed(on, lora, model.config, params, rows, length, networks, free)
        shape = (need.rows * on.num_parts, length)
        compiled = functools.partial(
            memory.temporaries, model, params, *shape, sharding.rows(on.mesh)
        )
        remat = need.wants_remat(compiled)
        line = f"compute: scan_layers {compute.scan_layers}, remat {remat}".lower()
        logger.info(f"{line} ({memory.reason(need.room, need.stored, need.rows, remat)})")
    compute = dataclasses.replace(compute, remat=remat)
    run = run.decide(compute)
    if remat:
        model = models.build(dataclasses.replace(model.config, remat=True))
    return run, language_model._replace(model=model)
