"""Where arrays live: a mesh of devices, rows spread over its ``data`` axis, parameters by rules on their paths.

Works with one process or several; with several, each passes the same arrays, whole, and keeps its devices' part.
"""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.errors import UserError

Tree = TypeVar("Tree")


def make_mesh(data: int | None = None, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, ``data``, over the first ``data`` of ``devices``; None means all there are.

    The axis is automatic: XLA decides where arrays without a sharding lie.
    """
    devices = jax.devices() if devices is None else devices
    data = len(devices) if data is None else data
    if not 1 <= data <= len(devices):
        raise UserError(f"cannot spread data over {data} devices: there are {len(devices)}")
    return Mesh(np.array(devices[:data]), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays of which every device holds a copy."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the leading axis in contiguous parts over ``data``. Also for ``minibatch_sharding``."""
    return NamedSharding(mesh, PartitionSpec("data"))


def shard_rows(mesh: Mesh, batch: Tree) -> Tree:
    """Puts each leaf [B, ...] of a pytree on the devices, its rows spread over ``data``. None leaves stay None.

    UserError, with the nearest sizes, if B is not a multiple of the devices that share the rows.
    """
    num_devices = mesh.shape["data"]
    for leaf in jax.tree.leaves(batch):
        num_rows = leaf.shape[0]
        if num_rows % num_devices:
            below = num_rows - num_rows % num_devices
            nearest = f"{below} or {below + num_devices}" if below else f"{num_devices}"
            raise UserError(
                f"a batch of {num_rows} rows does not divide over {num_devices} devices: use a batch size of {nearest}"
            )
    return jax.tree.map(lambda x: place(x, rows(mesh)), batch)


def replicate(mesh: Mesh, tree: Tree) -> Tree:
    """Puts a copy of each leaf of a pytree on every device."""
    return jax.tree.map(lambda x: place(x, replicated(mesh)), tree)


def by_path(params: Any, rules: Sequence[tuple[str, PartitionSpec]], mesh: Mesh) -> Any:
    """The sharding of each parameter by the first rule whose pattern is found in its path.

    Args:
      params: nested dicts of arrays, or of ``jax.ShapeDtypeStruct``. A path is the keys joined by ``/``.
      rules: (regular expression, PartitionSpec) pairs, tried in order with ``re.search``; end with ``(".*", spec)`` for
        the rest.

    Returns:
      A tree of NamedSharding like ``params``. UserError if no rule matches a path, or a spec does not fit a shape.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
        if spec is None:
            raise UserError(f'no sharding rule matches parameter {name}; add one, or end with (".*", PartitionSpec())')
        result = NamedSharding(mesh, spec)
        try:
            result.check_compatible_aval(leaf.shape)
            result.shard_shape(leaf.shape)
        except ValueError as error:
            raise UserError(f"parameter {name} of shape {leaf.shape} cannot be sharded by {spec}: {error}") from error
        return result

    return jax.tree_util.tree_map_with_path(sharding, params)


def place(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array on the devices of a sharding; each device takes its part by its place in the mesh."""
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(place(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
