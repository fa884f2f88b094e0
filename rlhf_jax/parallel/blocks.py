"""The same bits on any number of devices: rows in a fixed number of blocks, sums in a fixed tree.

Inside ``replicated`` every device runs the same program on whole arrays, so all devices compute
the same numbers. Only the networks' passes are divided: rows form blocks, and each device runs its
blocks one after the other, all of one shape. The results are gathered (``map_rows``) or added in
pairs (``tree_sum``), first on each device, then across devices, always in the same order.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from rlhf_jax.types import is_mergeable

Tree = TypeVar("Tree")
Program = Callable[..., Any]

AXIS = "data"  # the mesh axis whose devices divide the blocks among them

# A user context is part of jit's cache key: a jitted function is traced apart inside a block.
_cut_into = jax.make_user_context(0)


def number() -> int:
    """The number of row blocks of the program that is being traced; 0: it does not divide rows."""
    return int(_cut_into.value)


def replicated(
    program: Program,
    mesh: Mesh,
    count: int,
) -> Program:
    """``program`` with ``count`` blocks of rows. Its arguments and results are whole arrays on
    every device of ``mesh``. Its results have the same bits on every mesh whose ``data`` axis
    divides ``count``.

    Args:
      mesh: its axes other than ``data`` have size 1.
      count: a power of two, at least the number of devices.
    """
    whole = PartitionSpec()

    def run(args: Any, options: Any) -> Any:
        with _cut_into(count):
            return program(*args, **options)

    mapped = jax.shard_map(run, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)

    def call(*args: Any, **options: Any) -> Any:
        return mapped(args, options)

    return call


def map_rows(fn: Callable[[Any], Tree], rows: Any) -> Tree:
    """``fn(rows)`` of rows [B, ...]; the results of ``fn`` have the leading axis B too.

    Inside ``replicated`` it runs ``fn`` block by block, outside once on all rows. If B is not a
    multiple of the number of blocks, every device runs ``fn`` on all rows.
    """
    count = number()
    num_rows = len(jax.tree.leaves(rows)[0])
    if not count or num_rows % count:
        with _cut_into(0):
            return fn(rows)
    size = num_rows // count
    first, own = _share(count)

    def of_block(place: Array) -> Tree:
        block = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, place * size, size), rows)
        with _cut_into(0):
            return fn(block)

    def store(place: Array, results: Tree) -> Tree:
        return _stored(results, place - first, of_block(place))

    results = jax.lax.fori_loop(first, first + own, store, _room(own, of_block))
    gather = partial(jax.lax.all_gather, axis_name=AXIS, tiled=True)

    def whole(x: Array) -> Array:
        own_rows = x.reshape(-1, *x.shape[2:])
        return gather(own_rows)

    return jax.tree.map(whole, results)


def tree_sum(part: Callable[[Array], Tree], count: int) -> Tree:
    """``part(0) + ... + part(count - 1)``, added as a binary tree: pairs, then pairs of pairs, and
    so on. Call it only inside ``replicated``.

    Each device computes its share of the parts one after the other. It stores one partial sum for
    each level of the tree.

    Args:
      part: returns a pytree of arrays, ``Mean`` and ``Max``.
      count: a power of two, at least the number of devices.
    """
    first, own = _share(count)
    num_devices = count // own

    def of_part(place: Array) -> Tree:
        with _cut_into(0):
            return part(place)

    def add(place: Array, waiting: Tree) -> Tree:
        done = place - first

        # If bit ``level`` of ``done`` is 1, the left half of a sum at this level is waiting.
        def is_second(carry: tuple[Array, Tree]) -> Array:
            level, _ = carry
            return (done >> level) & 1 == 1

        def joined(carry: tuple[Array, Tree]) -> tuple[Array, Tree]:
            level, total = carry
            return level + 1, _sum(_at(waiting, level), total)

        level, total = jax.lax.while_loop(is_second, joined, (jnp.int32(0), of_part(place)))
        return _stored(waiting, level, total)

    waiting = jax.lax.fori_loop(first, first + own, add, _room(own.bit_length(), of_part))
    total = _at(waiting, -1)
    distance = 1
    while distance < num_devices:
        pairs = [(device, device ^ distance) for device in range(num_devices)]
        other = jax.tree.map(partial(jax.lax.ppermute, axis_name=AXIS, perm=pairs), total)
        total = _sum(total, other)
        distance *= 2
    return total


def _share(count: int) -> tuple[Array, int]:
    """This device's share of ``count`` parts: the first part's index and how many they are."""
    num_devices = jax.lax.axis_size(AXIS)
    own = count // num_devices
    # The bounds of a loop over the parts must not be constants. XLA would fuse a loop of one
    # iteration with the code around it, and the results would be rounded differently. With several
    # devices the bounds depend on the device's index.
    return jax.lax.axis_index(AXIS) * own, own


def _room(length: int, of_part: Callable[[Array], Tree]) -> Tree:
    """Zeros for the results of ``length`` parts: each leaf is [length, ...]."""
    shapes = jax.eval_shape(of_part, jnp.int32(0))
    return jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), shapes)


def _at(stacked: Tree, place: Array | int) -> Tree:
    return jax.tree.map(lambda x: x[place], stacked)


def _stored(stacked: Tree, place: Array, new: Tree) -> Tree:
    return jax.tree.map(lambda all_, x: all_.at[place].set(x), stacked, new)


def _sum(a: Tree, b: Tree) -> Tree:
    """Arrays are added, and a Mean or a Max is merged with its like."""

    def joined(x: Any, y: Any) -> Any:
        return x.merge(y) if is_mergeable(x) else x + y

    return jax.tree.map(joined, a, b, is_leaf=is_mergeable)
