"""Microbatches of rollouts by length: rows of similar length together, and no columns behind the
longest of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.step import IN_ROW_ORDER, Microbatching
from rlhf_jax.parallel.sharding import cut
from rlhf_jax.types import Rollout, map_columns

Result = TypeVar("Result")

# From this many response slots on, what is left out is worth a program for each width.
LONG = 128


def by_length(rollout: Any) -> Microbatching:
    """The ``microbatching`` of ``step.gradient_step`` for rollouts of this shape.

    Rows are sorted by length, and the columns of a microbatch end after a quarter or a half of the
    response slots if its responses do: that compiles the loss once for each width, and changes its
    rounding. What is cut are the fields that a class declares with the metadata
    ``types.PER_TOKEN``.

    Rows keep their order, and nothing is cut, if there are fewer than ``LONG`` response slots or no
    ``prompt_length``, if another field is as wide as the tokens (it may be columns of tokens that
    nobody declared), or if an algorithm prepared something else than a Rollout.
    """
    if not isinstance(rollout, Rollout) or rollout.prompt_length is None:
        return IN_ROW_ORDER
    columns = rollout.tokens.shape[1]
    if columns - rollout.prompt_length < LONG:
        return IN_ROW_ORDER
    others = map_columns(lambda x: None, rollout)
    for field in jax.tree.leaves(others):
        if columns in field.shape[1:]:
            return IN_ROW_ORDER
    return BY_LENGTH


def _sorted(rollout: Rollout, num_microbatches: int, group_size: int) -> Rollout:
    """The rows in an order from which ``ops.split_rows`` makes parts of similar length. A group is
    as long as its longest row.
    """
    by_group = _used(rollout).reshape(-1, group_size)
    longest = jnp.max(by_group, axis=1)
    sorted_groups = jnp.argsort(longest)
    in_parts = sorted_groups.reshape(num_microbatches, -1)
    groups = jnp.ravel(in_parts.T)
    within = jnp.arange(group_size)
    rows = groups[:, None] * group_size + within[None]
    order = jnp.ravel(rows)

    def in_order(x: Array) -> Array:
        return cut(x[order], "data", "fsdp")

    return jax.tree.map(in_order, rollout)


def _narrowed(of_part: Callable[[Any], Result]) -> Callable[[Rollout], Result]:
    """``of_part`` of the columns up to a quarter, a half or all of the response slots, whichever
    the part's responses need.
    """

    def of_columns(width: int, part: Rollout) -> Result:
        narrow = map_columns(lambda x: x[:, :width], part)
        return of_part(narrow)

    def narrowed(part: Rollout) -> Result:
        prompt = part.prompt_length or 0
        slots = part.tokens.shape[1] - prompt
        widths = [
            prompt + slots // 4,
            prompt + slots // 2,
            prompt + slots,
        ]
        longest = jnp.max(_used(part))
        index = jnp.searchsorted(jnp.array(widths), longest)
        ways = [partial(of_columns, width) for width in widths]
        return jax.lax.switch(index, ways, part)

    return narrowed


def _used(rollout: Rollout) -> Array:
    """[B] columns up to the last response token of each row."""
    num_columns = rollout.tokens.shape[1]
    until = jnp.arange(1, num_columns + 1)
    used = jnp.where(rollout.mask, until[None], 0)
    return jnp.max(used, axis=1)


BY_LENGTH = Microbatching(order=_sorted, narrow=_narrowed)
