"""Tokens in blocks, each of which one expert computes: a mixture then computes only the experts
that are chosen.

XLA's compilers for CPUs and GPUs make of ``jax.lax.ragged_dot`` a product of every row with every
expert, which holds E copies of the rows (seen in programs of jax 0.10.2; a TPU's does not).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec


class Blocks(NamedTuple):
    """n tokens of k experts each, in J blocks of R rows, in P parts that are computed apart. Rows
    of a block that are left over hold the part's first token.
    """

    experts: Array  # [P, J] the expert of each block
    sources: Array  # [P, J R] the token of each row
    places: Array  # [P, n k] the row of each token's each expert


def blocks_of(chosen: Array, number: int) -> Blocks:
    """The blocks of the numbers [P, n, k] of the chosen ones among ``number`` experts.

    A block has about as many rows as an expert has tokens if all have equally many, so that there
    are at most twice as many rows as without blocks, and E more.
    """
    _, _, k = chosen.shape
    experts, order, places = jax.vmap(lambda part: _arranged(part.reshape(-1), number))(chosen)
    return Blocks(experts, order // k, places)


def _arranged(numbers: Array, number: int) -> tuple[Array, Array, Array]:
    """(expert [J] of each block, choice [J R] of each row, row [C] of each choice) of C choices."""
    count = len(numbers)
    rows = 1 << (max(count // number, 1).bit_length() - 1)
    num_blocks = min(count, count // rows + number)
    order = jnp.argsort(numbers, stable=True)
    sizes = jnp.bincount(numbers, length=number)
    blocks = -(-sizes // rows)
    ends = jnp.cumsum(blocks)
    first = rows * (ends - blocks) - (jnp.cumsum(sizes) - sizes)  # of an expert's row - of its rank
    in_order = jnp.arange(count) + first[numbers[order]]
    choices = jnp.zeros(num_blocks * rows, order.dtype)
    choices = choices.at[in_order].set(order, unique_indices=True)
    places = jnp.zeros_like(in_order).at[order].set(in_order, unique_indices=True)
    before = ends[None, :] <= jnp.arange(num_blocks)[:, None]
    experts = jnp.minimum(jnp.sum(before, axis=1), number - 1)
    return experts, choices, places


def taken(rows: Array, numbers: Array) -> Array:
    """Of rows [P, n, D] those with the numbers [P, m] in each part: [P, m, D]."""
    return jax.vmap(lambda part, own: part.at[own].get(mode="promise_in_bounds"))(rows, numbers)


def product(rows: Array, kernels: Array, experts: Array, cut_axis: int | None) -> Array:
    """[P, J, R, F]: each block of rows [P, J, R, D] times the one of the kernels [E, D, F] that its
    expert [P, J] has.

    cut_axis: of the kernels, over ``tensor``; None: each device gets whole ones.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if {"data", "fsdp", "tensor"} <= {*mesh.auto_axes}:
        # What "fsdp" cuts is gathered first, as for other kernels: taken from a cut kernel, the
        # blocks' own would be sent whole to all devices.
        spec = ["tensor" if axis == cut_axis else None for axis in range(kernels.ndim)]
        if cut_axis is not None and kernels.shape[cut_axis] % mesh.shape["tensor"]:
            spec[cut_axis] = None
        kernels = jax.lax.with_sharding_constraint(kernels, PartitionSpec(*spec))
    own = kernels.at[experts].get(mode="promise_in_bounds")
    return jnp.einsum("pjrd,pjdf->pjrf", rows, own)
