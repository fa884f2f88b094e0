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

    def of_part(part: Array) -> tuple[Array, Array, Array]:
        return _arranged(part.reshape(-1), number)

    experts, choices, places = jax.vmap(of_part)(chosen)
    sources = choices // k
    return Blocks(experts, sources, places)


def _arranged(numbers: Array, number: int) -> tuple[Array, Array, Array]:
    """(expert [J] of each block, choice [J R] of each row, row [C] of each choice) of C choices."""
    count = len(numbers)
    equal_share = max(count // number, 1)
    rows = 1 << (equal_share.bit_length() - 1)
    most_blocks = count // rows + number
    num_blocks = min(count, most_blocks)

    order = jnp.argsort(numbers, stable=True)
    sizes = jnp.bincount(numbers, length=number)
    starts = jnp.cumsum(sizes) - sizes
    blocks = -(-sizes // rows)
    ends = jnp.cumsum(blocks)
    first_rows = rows * (ends - blocks)
    expert = numbers[order]
    rank = jnp.arange(count) - starts[expert]
    in_order = first_rows[expert] + rank

    no_choices = jnp.zeros(num_blocks * rows, order.dtype)
    choices = no_choices.at[in_order].set(
        order,
        unique_indices=True,
    )
    no_places = jnp.zeros_like(in_order)
    places = no_places.at[order].set(
        in_order,
        unique_indices=True,
    )
    block = jnp.arange(num_blocks)
    is_past = ends[None, :] <= block[:, None]
    num_past = jnp.sum(is_past, axis=1)
    experts = jnp.minimum(num_past, number - 1)
    return experts, choices, places


def taken(rows: Array, numbers: Array) -> Array:
    """Of rows [P, n, D] those with the numbers [P, m] in each part: [P, m, D]."""

    def of_part(part: Array, own: Array) -> Array:
        return part.at[own].get(mode="promise_in_bounds")

    return jax.vmap(of_part)(rows, numbers)


def product(
    rows: Array,
    kernels: Array,
    experts: Array,
    cut_axis: int | None,
) -> Array:
    """[P, J, R, F]: each block of rows [P, J, R, D] times the one of the kernels [E, D, F] that its
    expert [P, J] has.

    cut_axis: of the kernels, over ``tensor``; None: each device gets whole ones.
    """
    kernels = _gathered(kernels, cut_axis)
    own = kernels.at[experts].get(mode="promise_in_bounds")
    return jnp.einsum("pjrd,pjdf->pjrf", rows, own)


def _gathered(kernels: Array, cut_axis: int | None) -> Array:
    """Kernels whose parts over ``fsdp`` are gathered, as those of other layers are: taken from a
    cut kernel, the blocks' own would be sent whole to all devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not {"data", "fsdp", "tensor"} <= {*mesh.auto_axes}:
        return kernels
    spec: list[str | None] = [None] * kernels.ndim
    if cut_axis is not None:
        size = kernels.shape[cut_axis]
        divides = size % mesh.shape["tensor"] == 0
        spec[cut_axis] = "tensor" if divides else None
    return jax.lax.with_sharding_constraint(kernels, PartitionSpec(*spec))
