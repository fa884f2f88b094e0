"""How arrays are sharded over a mesh of devices: rows over ``data`` and ``fsdp``, parameters by
rules on their paths.

With several processes each of them passes the same whole arrays, and keeps the part of its devices.
"""

import contextlib
import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.errors import UserError

Tree = TypeVar("Tree")


def make_mesh(
    data: int = -1,
    *,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp`` and ``tensor`` over the first of ``devices``, by
    default over all devices.

    The axes are automatic: XLA chooses the sharding of arrays that have none. Neighbouring devices
    are in one ``tensor`` group, since its members communicate most.

    Args:
      data, fsdp, tensor: sizes. One of them may be -1: it takes all devices that are left.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (data, fsdp, tensor)
    product = abs(math.prod(sizes))  # -1 counts as 1
    used = len(devices) if -1 in sizes else product
    is_size = min(sizes) >= -1 and product > 0 and sizes.count(-1) <= 1
    if not is_size or not 1 <= used <= len(devices) or used % product:
        raise UserError(
            f"mesh: data {data} x fsdp {fsdp} x tensor {tensor} does not fit {len(devices)} "
            "devices; take sizes whose product divides that number"
        )
    return Mesh(np.array(devices[:used]).reshape(sizes), ("data", "fsdp", "tensor"))


def _automatic(mesh: Mesh) -> Mesh:
    """The mesh; UserError for one of ``jax.make_mesh`` with Explicit axes, its default."""
    if jax.sharding.AxisType.Explicit in mesh.axis_types:
        raise UserError(
            "mesh: its axes are Explicit, and the networks here leave shardings to XLA; take "
            "rlhf_jax.sharding.make_mesh, or jax.make_mesh(sizes, names, "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)})"
        )
    return mesh


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that each device holds whole."""
    return NamedSharding(_automatic(mesh), PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch, or of a minibatch: contiguous parts of the leading axis over
    ``data`` and, if the mesh has it, ``fsdp``.
    """
    axes = ("data", "fsdp") if "fsdp" in mesh.axis_names else "data"
    return NamedSharding(_automatic(mesh), PartitionSpec(axes))


def num_parts(mesh: Mesh) -> int:
    """The number of parts of a batch's rows."""
    return mesh.shape["data"] * mesh.shape.get("fsdp", 1)


def is_cut(mesh: Mesh) -> bool:
    """Whether parameters are sharded, so that no device must hold all of them."""
    return mesh.shape.get("fsdp", 1) * mesh.shape.get("tensor", 1) > 1


def is_set(mesh: Mesh) -> bool:
    """Whether a run sets the mesh (``jax.set_mesh``): if the mesh shards parameters, or has several
    accelerators, since fused kernels are mapped over the mesh by hand.
    """
    is_accelerated = mesh.devices.flat[0].platform != "cpu"
    return is_cut(mesh) or (is_accelerated and mesh.size > 1)


def without_mesh() -> contextlib.AbstractContextManager[Any]:
    """No mesh in a run that has set one: a process computes by itself, on its first device."""
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def shard_rows(mesh: Mesh, batch: Tree) -> Tree:
    """Puts each leaf [B, ...] of a pytree on the devices, sharded by rows. None leaves stay None.

    Raises:
      UserError: B is not a multiple of the number of parts.
    """
    num_devices = num_parts(mesh)
    for leaf in jax.tree.leaves(batch):
        num_rows = leaf.shape[0]
        if num_rows % num_devices:
            raise UserError(
                f"a batch of {num_rows} rows does not divide over {num_devices} devices: use a "
                f"batch size that is a multiple of {num_devices}"
            )
    return jax.tree.map(lambda x: place(x, rows(mesh)), batch)


def tensor_axes() -> tuple[str, ...]:
    """The axes of the mesh of ``jax.set_mesh`` over which heads, mlps and vocabulary are sharded:
    "tensor", and "fsdp" too where rows are mapped over "data" only, as while a large model samples.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_joined = "data" in mesh.manual_axes and "fsdp" in mesh.auto_axes
    return ("fsdp", "tensor") if is_joined else ("tensor",)


def tensor_parts() -> int:
    """The number of parts of an array over ``tensor_axes``; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in tensor_axes())


def row_parts(num_rows: int) -> int:
    """The parts of so many rows over ``data`` and ``fsdp`` in which ``cut`` shards them inside a
    program; 1 if it does not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not {"data", "fsdp"} <= {*mesh.auto_axes}:
        return 1
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    return 1 if num_rows % parts else int(parts)


def cut(
    x: Array,
    *axes: str,
    width: str | None = None,
) -> Array:
    """Shards x inside a program over the mesh of ``jax.set_mesh``: the leading axis over ``axes``,
    the second axis of a matrix over ``width``, other axes whole.

    Hidden states that are sharded over ``data`` and ``fsdp`` make XLA gather the weights that are
    sharded over ``fsdp``; otherwise it may send the states instead. Returns x itself if there is no
    mesh, under ``shard_map`` over the axes, or if their devices do not divide the leading axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_automatic = {*axes, width or axes[0]} <= {*mesh.auto_axes}
    if not is_automatic:
        return x
    num_parts = math.prod(mesh.shape[axis] for axis in axes)
    if x.shape[0] % num_parts:
        return x
    spec = (axes, width)[: x.ndim]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Puts a copy of each leaf of a pytree on every device."""
    return jax.tree.map(lambda x: place(x, replicated(mesh)), tree)


def by_path(
    params: Any,
    rules: Sequence[tuple[str, PartitionSpec | tuple[str | None, ...]]],
    mesh: Mesh,
) -> Any:
    """The sharding of each parameter by the first rule whose pattern is found in its path.

    Args:
      params: nested dicts of arrays, or of ``jax.ShapeDtypeStruct``. A path is the keys joined by
        ``/``.
      rules: (regular expression, PartitionSpec) pairs, tried in order with ``re.search``; end with
        ``(".*", spec)`` for the rest. A tuple in place of the PartitionSpec describes the last axes
        of an array; axes of stacked layers or members before them stay whole. An axis that is not
        divisible by its devices stays whole; the last axis is then sharded over these devices too,
        if it is divisible.

    Returns:
      A tree of NamedSharding like ``params``.

    Raises:
      UserError: no rule matches a path, or a spec does not fit a shape.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        matching = [spec for pattern, spec in rules if re.search(pattern, name)]
        if not matching:
            raise UserError(
                f'no sharding rule matches parameter {name}; add one, or end with (".*", '
                "PartitionSpec())"
            )
        spec = matching[0]
        if not isinstance(spec, PartitionSpec):
            spec = _of_last_axes(spec, leaf.shape, mesh)
        result = NamedSharding(_automatic(mesh), spec)
        try:
            result.check_compatible_aval(leaf.shape)
            result.shard_shape(leaf.shape)
        except ValueError as error:
            raise UserError(
                f"parameter {name} of shape {leaf.shape} cannot be sharded by {spec}: {error}"
            ) from error
        return result

    return jax.tree_util.tree_map_with_path(sharding, params)


def _of_last_axes(
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh: Mesh,
) -> PartitionSpec:
    """The spec of an array whose last dimensions are sharded over these ``axes`` of the mesh where
    they are divisible. The last dimension is sharded over the unused axes too, if it is divisible.
    """
    num_others = len(shape) - len(axes)
    spec: list[Any] = []
    for axis, size in zip(axes, shape[num_others:], strict=True):
        divides = axis is not None and size % mesh.shape[axis] == 0
        spec.append(axis if divides else None)
    used = {None, *spec[:-1]}
    unused = tuple(axis for axis in axes[::-1] if axis not in used)
    num_parts = math.prod(mesh.shape[axis] for axis in unused)
    if axes and axes[-1] and shape[-1] % num_parts == 0:
        spec[-1] = unused
    return PartitionSpec(*[None] * num_others, *spec)


def varying(tree: Any) -> frozenset[str]:
    """The mapped axes of ``shard_map`` over which arrays differ; none with ``check_vma=False``."""
    leaves = jax.tree.leaves(tree)
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in leaves))


def vary(tree: Tree, inputs: Any) -> Tree:
    """The arrays, differing over every mapped axis over which one of the inputs does: the state of
    a loop as it ends, or what a gradient rule of our own gives one gradient each.
    """
    axes = varying(inputs)

    def cast(x: Array) -> Array:
        missing = tuple(axes - varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def place(x: Any, sharding: NamedSharding) -> Array:
    """An array on the devices of a sharding. Each device takes the part at its mesh position."""
    if jax.process_count() == 1 or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    if isinstance(x, Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = place(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
