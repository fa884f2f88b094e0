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


def by_length(rollout: Rollout) -> Microbatching:
    """The ``microbatching`` of ``step.gradient_step`` for rollouts of this shape.

    Rows are sorted by length, and the columns of a microbatch end after a quarter or a half of the
    response slots if its responses do: that compiles the loss once for each width, and changes its
    rounding. What is cut are the fields that a class declares with the metadata
    ``types.PER_TOKEN``.

    Rows keep their order, and nothing is cut, if there are fewer than ``LONG`` response slots or no
    ``prompt_length``, or if another field is as wide as the tokens: it may be columns of tokens
    that nobody declared.
    """
    if rollout.prompt_length is None:
        return IN_ROW_ORDER
    columns = rollout.tokens.shape[1]
    others = jax.tree.leaves(map_columns(lambda x: None, rollout))
    is_known = not any(columns in x.shape[1:] for x in others)
    is_long = columns - rollout.prompt_length >= LONG
    return Microbatching(_sorted, _narrowed) if is_long and is_known else IN_ROW_ORDER


def _sorted(rollout: Rollout, num_microbatches: int, group_size: int) -> Rollout:
    """The rows in an order from which ``ops.split_rows`` makes parts of similar length. A group is
    as long as its longest row.
    """
    longest = _used(rollout).reshape(-1, group_size).max(axis=1)
    groups = jnp.argsort(longest).reshape(num_microbatches, -1).T.reshape(-1, 1)
    order = (groups * group_size + jnp.arange(group_size)[None]).reshape(-1)
    return jax.tree.map(lambda x: cut(x[order], "data", "fsdp"), rollout)


def _narrowed(of_part: Callable[[Any], Result]) -> Callable[[Rollout], Result]:
    """``of_part`` of the columns up to a quarter, a half or all of the response slots, whichever
    the part's responses need.
    """

    def of_columns(width: int, part: Rollout) -> Result:
        return of_part(map_columns(lambda x: x[:, :width], part))

    def narrowed(part: Rollout) -> Result:
        prompt = part.prompt_length or 0
        slots = part.tokens.shape[1] - prompt
        widths = [prompt + slots // 4, prompt + slots // 2, prompt + slots]
        index = jnp.searchsorted(jnp.array(widths), jnp.max(_used(part)))
        return jax.lax.switch(index, [partial(of_columns, width) for width in widths], part)

    return narrowed


def _used(rollout: Rollout) -> Array:
    """[B] columns up to the last response token of each row."""
    columns = jnp.arange(1, 1 + rollout.tokens.shape[1])[None]
    return jnp.max(jnp.where(rollout.mask, columns, 0), axis=1)
