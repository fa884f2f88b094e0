"""The devices of a run: the mesh and its checks, how parameters and batches lie on it, and how
programs run on it.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rlhf_jax import config, models
from rlhf_jax.config import ModelSource
from rlhf_jax.errors import UserError
from rlhf_jax.models import hf
from rlhf_jax.parallel import blocks, sharding
from rlhf_jax.runs import devices
from rlhf_jax.training.common import memory
from rlhf_jax.types import Params, TrainState

Place = Callable[[Any], Any] | None
"""Shapes of parameters -> their shardings; None if every device holds all parameters."""
Tree = TypeVar("Tree")
State = TypeVar("State", bound=TrainState)
Made = TypeVar("Made")


@dataclass(frozen=True)
class Layout:
    """The devices of a run, and how arrays lie on them."""

    mesh: Mesh  # of the devices that learn
    blocks: int | None = None  # ``compute.blocks``
    sampling_mesh: Mesh | None = None  # of the devices that only sample, ``mesh.sampling``

    @property
    def num_parts(self) -> int:
        """The number of parts of a batch's rows: blocks, or devices."""
        return self.blocks or sharding.num_parts(self.mesh)

    @property
    def row_mesh(self) -> Mesh | None:
        """The mesh over which programs shard rows; None with ``compute.blocks``, see ``jit``."""
        return None if self.blocks else self.mesh

    @property
    def rows(self) -> NamedSharding | None:
        """The sharding of rows inside programs, over ``row_mesh``."""
        return None if self.row_mesh is None else sharding.rows(self.row_mesh)

    @property
    def placement(self) -> Place:
        """``shardings`` for ``models.load``; None if every device holds all parameters."""
        return functools.partial(shardings, self.mesh) if sharding.is_cut(self.mesh) else None

    def shard(self, batch: Tree) -> Tree:
        """The batch with its rows sharded over the devices; with ``compute.blocks``, replicated."""
        if self.blocks:
            return sharding.replicate(self.mesh, batch)
        return sharding.shard_rows(self.mesh, batch)

    def put(self, tree: Tree) -> Tree:
        """Parameters, or a state with them, sharded over the mesh."""
        return jax.tree.map(sharding.place, tree, shardings(self.mesh, tree))

    def copy(self, tree: Tree) -> Tree:
        """A copy, sharded over the mesh. It never shares buffers, since updates donate theirs."""
        return self.put(jax.tree.map(functools.partial(jnp.array, copy=True), tree))

    def make(self, make: Callable[..., Made], *trees: Any) -> Made:
        """``make(*trees)``: parameters of others."""
        return make(*trees)

    def create(self, create: Callable[[Params], State], params: Params) -> State:
        """``create(params)`` in new arrays, sharded over the mesh. The arrays of ``params`` are
        freed.

        It is one program, which compiles faster than a program for each operation.
        """
        placed = self.put(params)
        where = shardings(self.mesh, jax.eval_shape(create, placed))
        state = jax.jit(create, out_shardings=where)(placed)
        memory.free((params, placed))
        return state

    def jit(
        self, program: Callable[..., Any], num_blocks: int = 0, **options: Any
    ) -> Callable[..., Any]:
        """``jax.jit(program)``; with ``compute.blocks`` each device runs it on whole arrays, and
        the passes of networks in it block by block (``blocks.replicated``).

        num_blocks: as in ``devices.compiler_options``.
        """
        if self.blocks:
            program = blocks.replicated(program, self.mesh, self.blocks)
        return jax.jit(program, compiler_options=devices.compiler_options(num_blocks), **options)

    def jit_update(self, update: Callable[..., Any], num_blocks: int) -> Callable[..., Any]:
        """Jits ``update(state, ...) -> (state, metrics)``: the state is donated, and the new one
        has its sharding.

        num_blocks: as in ``devices.compiler_options``.
        """

        def update_in_place(state: Any, *args: Any, **options: Any) -> Any:
            state, metrics = update(state, *args, **options)
            if self.blocks:
                return state, metrics
            state = jax.lax.with_sharding_constraint(state, shardings(self.mesh, state))
            return state, jax.lax.with_sharding_constraint(metrics, sharding.replicated(self.mesh))

        return self.jit(update_in_place, num_blocks, donate_argnums=0)


def layout_of(settings: config.RunConfig) -> Layout:
    """The devices of a run.

    Raises:
        UserError: as ``mesh_of``.
    """
    number = settings.mesh.sampling
    apart = sharding.make_mesh(devices=jax.devices()[-number:]) if number else None
    return Layout(mesh_of(settings.mesh), settings.compute.blocks, apart)


def mesh_of(sizes: config.Mesh) -> Mesh:
    """The mesh of the ``mesh`` section, over all devices but those that only sample.

    Raises:
        UserError: there are too few or too many devices.
    """
    number = jax.device_count() - sizes.sampling
    mesh = sharding.make_mesh(**sizes.axes, devices=jax.devices()[: max(number, 0)])
    if mesh.size != number:
        layout = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        raise UserError(
            f"mesh: {layout} uses {mesh.size} of {number} devices; set one of the sizes to -1"
        )
    return mesh


def check(source: ModelSource, mesh: Mesh) -> None:
    """Raises UserError unless the mesh fits ``compute.blocks`` and the sizes of the model. It reads
    only the model's config.json.
    """
    blocks = source.compute.blocks
    if blocks and sharding.is_cut(mesh):
        raise UserError(
            "compute.blocks: weights that mesh.fsdp or mesh.tensor cut are summed in another order "
            "on other devices; use mesh.data alone, or leave compute.blocks out"
        )
    if blocks and blocks % mesh.size:
        raise UserError(
            f"compute.blocks {blocks} does not divide over {mesh.size} devices; use 1, 2, 4, ... "
            "of them, or more blocks"
        )
    if not sharding.is_cut(mesh):
        return
    where = "network"
    model: Any = source.network
    if source.model is not None:
        where = source.model
        model = hf.read_config(hf.find_folder(where))
    of_tensor = {
        "attention heads": model.num_heads,
        "key and value heads": getattr(model, "kv_heads", model.num_heads),
        "mlp's width": getattr(model, "intermediate_size", None) or 4 * model.hidden_size,
    }
    for axis, sizes in {"fsdp": {"hidden size": model.hidden_size}, "tensor": of_tensor}.items():
        parts = mesh.shape[axis]
        divisor = math.gcd(*sizes.values())
        fitting = [str(n) for n in range(1, mesh.size + 1) if divisor % n == 0]
        for what, size in sizes.items():
            if size % parts:
                raise UserError(
                    f"mesh.{axis} {parts} does not divide the {what} of {where}, {size}; "
                    f"use {' or '.join(fitting)}"
                )


def sharers(layout: Layout, microbatches: Mapping[str, int]) -> dict[str, int]:
    """What a batch is divided over equally: {"compute.blocks": number}, or {"devices": number}.

    Args:
        microbatches: {dotted setting: number}.

    Raises:
        UserError: a number of microbatches that ``compute.blocks`` cannot form.
    """
    blocks = layout.blocks
    if not blocks:
        return {"devices": sharding.num_parts(layout.mesh)}
    for key, count in microbatches.items():
        if count > blocks and count & (count - 1):
            raise UserError(
                f"{key} {count}: with compute.blocks {blocks} it must be {blocks} or less, which "
                "all mean that each block is one, or a power of two"
            )
    return {"compute.blocks": blocks}


def check_divides(key: str, size: int, *divisors: Mapping[str, int]) -> None:
    """Raises UserError unless ``size`` is a multiple of the product of each mapping's numbers. The
    error names the product that failed and the nearest sizes that fit.

    Args:
        key: the dotted setting of ``size``.
        divisors: {name: number} each.
    """
    fits = math.lcm(*(math.prod(parts.values()) for parts in divisors))
    below = size - size % fits
    for parts in divisors:
        if size % math.prod(parts.values()):
            product = " x ".join(f"{count} {name}" for name, count in parts.items())
            nearest = f"{below} or {below + fits}" if below else f"{fits}"
            raise UserError(f"{key} {size} does not divide by {product}; use {nearest}")


def row_parts(layout: Layout, num_microbatches: int) -> int:
    """The number of equal parts of an optimizer step's rows: devices times microbatches, or
    ``compute.blocks``.
    """
    if layout.blocks:
        return max(layout.blocks, num_microbatches)
    return sharding.num_parts(layout.mesh) * num_microbatches


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each array of parameters, or of a state with them: see
    ``models.SHARDING``.
    """
    return sharding.by_path(tree, models.SHARDING, mesh)


def laid_out_shapes(mesh: Mesh, tree: Tree) -> Tree:
    """The shapes of parameters, or of a state with them, with their shardings over the mesh."""
    arrays = jax.eval_shape(lambda tree: jax.tree.map(jnp.asarray, tree), tree)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        arrays,
        shardings(mesh, arrays),
    )
