"""The device mesh of a run, its checks, and how parameters and batches are sharded over it."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from rlhf_jax import config, models
from rlhf_jax.config import ModelSource
from rlhf_jax.errors import UserError
from rlhf_jax.models import hf
from rlhf_jax.parallel import sharding

Place = Callable[[Any], Any] | None
"""Shapes of parameters -> their shardings; None if every device holds all parameters."""


class Shares(NamedTuple):
    """What the rows of a batch are divided over."""

    mesh: Mesh  # of the devices that learn
    blocks: int | None = None  # ``compute.blocks``
    sampling: int = 0  # devices that only sample, ``mesh.sampling``


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


def sampling_mesh(sizes: config.Mesh) -> Mesh | None:
    """The mesh of the devices that only sample (``mesh.sampling``); None if there are none."""
    number = sizes.sampling
    return sharding.make_mesh(devices=jax.devices()[-number:]) if number else None


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


def sharers(shares: Shares, microbatches: Mapping[str, int]) -> dict[str, int]:
    """What a batch is divided over equally: {"compute.blocks": number}, or {"devices": number}.

    Args:
        microbatches: {dotted setting: number}.

    Raises:
        UserError: a number of microbatches that ``compute.blocks`` cannot form.
    """
    blocks = shares.blocks
    if not blocks:
        return {"devices": sharding.num_parts(shares.mesh)}
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


def row_parts(shares: Shares, num_microbatches: int) -> int:
    """The number of equal parts of an optimizer step's rows: devices times microbatches, or
    ``compute.blocks``.
    """
    if shares.blocks:
        return max(shares.blocks, num_microbatches)
    return sharding.num_parts(shares.mesh) * num_microbatches


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of each array of parameters, or of a state with them: see
    ``models.SHARDING``.
    """
    return sharding.by_path(tree, models.SHARDING, mesh)


def placement(mesh: Mesh) -> Place:
    """``shardings`` of a mesh, for ``models.load``; None if every device holds all parameters."""
    return functools.partial(shardings, mesh) if sharding.is_cut(mesh) else None
