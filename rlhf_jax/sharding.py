"""Where arrays live: a mesh of devices, rows spread over ``data`` and ``fsdp``, parameters by rules
on their paths.

Works with one process or several; with several, each passes the same arrays, whole, and keeps its
devices' part.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.errors import UserError

Tree = TypeVar("Tree")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp`` and ``tensor`` over the first of ``devices``, by
    default all there are.

    The axes are automatic: XLA decides where arrays without a sharding lie. Neighbouring devices
    share a ``tensor`` group, whose members talk most.

    Args:
      data, fsdp, tensor: sizes; one of them may be -1: as many as the devices leave.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    given = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    sizes = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    used = math.prod(sizes.values())
    if not 1 <= used <= len(devices) or (-1 in (data, fsdp, tensor) and used != len(devices)):
        raise UserError(
            f"mesh: {given} does not fit {len(devices)} devices; take sizes whose product divides "
            "that number"
        )
    return Mesh(np.array(devices[:used]).reshape(*sizes.values()), tuple(sizes))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the leading axis in contiguous parts over ``data`` and, if the mesh
    has it, ``fsdp``.

    Also for ``minibatch_sharding``.
    """
    axes = ("data", "fsdp") if "fsdp" in mesh.axis_names else "data"
    return NamedSharding(mesh, PartitionSpec(axes))


def num_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return mesh.shape["data"] * mesh.shape.get("fsdp", 1)


def is_cut(mesh: Mesh) -> bool:
    """Whether parameters are cut, so that no device need hold all of them."""
    return mesh.shape.get("fsdp", 1) * mesh.shape.get("tensor", 1) > 1


def is_set(mesh: Mesh) -> bool:
    """Whether a run sets the mesh (``jax.set_mesh``): it cuts parameters, or has several
    accelerators, whose kernels are mapped over the mesh by hand.
    """
    is_accelerated = mesh.devices.flat[0].platform != "cpu"
    return is_cut(mesh) or (is_accelerated and mesh.size > 1)


def shard_rows(mesh: Mesh, batch: Tree) -> Tree:
    """Puts each leaf [B, ...] of a pytree on the devices, its rows spread over ``data``. None
    leaves stay None.

    UserError, with the nearest sizes, if B is not a multiple of the devices that share the rows.
    """
    num_devices = num_parts(mesh)
    for leaf in jax.tree.leaves(batch):
        num_rows = leaf.shape[0]
        if num_rows % num_devices:
            below = num_rows - num_rows % num_devices
            nearest = f"{below} or {below + num_devices}" if below else f"{num_devices}"
            raise UserError(
                f"a batch of {num_rows} rows does not divide over {num_devices} devices: use a "
                f"batch size of {nearest}"
            )
    return jax.tree.map(lambda x: place(x, rows(mesh)), batch)


def tensor_axes() -> tuple[str, ...]:
    """The axes of the mesh of ``jax.set_mesh`` that cut heads, mlps and vocabulary: "tensor", and
    "fsdp" too where rows are mapped over "data" alone, as large models are sampled.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_joined = "data" in mesh.manual_axes and "fsdp" in mesh.auto_axes
    return ("fsdp", "tensor") if is_joined else ("tensor",)


def tensor_parts() -> int:
    """Into how many parts ``tensor_axes`` cut an array; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in tensor_axes())


def cut(x: jax.Array, *axes: str, width: str | None = None) -> jax.Array:
    """x inside a program, its leading axis cut over ``axes`` of the mesh of ``jax.set_mesh``, the
    others whole; of a matrix the second one over ``width``.

    For hidden states over ``data`` and ``fsdp``, which makes XLA gather the weights that are cut
    over ``fsdp``; it may otherwise send the states. x itself without a mesh, under ``shard_map``
    over the axes, or where they do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_ours = {*axes, width or axes[0]} <= {*mesh.auto_axes}
    if not is_ours or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(axes, width)[: x.ndim]))


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
        ``(".*", spec)`` for the rest. A tuple in place of the PartitionSpec speaks of an array's
        last axes, whatever layers or members are
        stacked before them. An axis that its devices do not divide stays whole; they help to cut
        the last if they can.

    Returns:
      A tree of NamedSharding like ``params``. UserError if no rule matches a path, or a spec does
      not fit a shape.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
        if spec is None:
            raise UserError(
                f'no sharding rule matches parameter {name}; add one, or end with (".*", '
                "PartitionSpec())"
            )
        if not isinstance(spec, PartitionSpec):
            spec = _of_last_axes(spec, leaf.shape, mesh)
        result = NamedSharding(mesh, spec)
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
    """The spec of an array whose last dimensions are cut over these ``axes`` of the mesh where they
    divide. The last one is cut over the axes that do not divide the others too, if it can be.
    """
    num_others = len(shape) - len(axes)
    cut: list[Any] = []
    for axis, size in zip(axes, shape[num_others:], strict=True):
        divides = axis is not None and size % mesh.shape[axis] == 0
        cut.append(axis if divides else None)
    others = {None, *cut[:-1]}
    left = tuple(axis for axis in axes[::-1] if axis not in others)
    num_left = math.prod(mesh.shape[axis] for axis in left)
    if axes and axes[-1] and shape[-1] % num_left == 0:
        cut[-1] = left
    return PartitionSpec(*[None] * num_others, *cut)


def place(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array on the devices of a sharding. Each device takes the part at its mesh position."""
    if jax.process_count() == 1 or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = place(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
