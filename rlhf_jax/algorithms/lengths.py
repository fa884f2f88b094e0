"""Microbatches of rollouts by length: rows of similar length together, and no columns behind the
longest of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.parallel.sharding import cut
from rlhf_jax.types import Rollout, map_columns

Result = TypeVar("Result")

# From this many response slots on, what is left out is worth a program for each width.
LONG = 128


def can_cut(rollout: Any) -> bool:
    """Whether rollouts of this shape gain from ``by_length`` in ``step.gradient_step``.

    Rows are sorted by length, and the columns of a microbatch end after a quarter or a half of the
    response slots if its responses do: that compiles the loss once for each width, and changes its
    rounding. What is cut are the fields that a class declares with the metadata
    ``types.PER_TOKEN``.

    It is False if there are fewer than ``LONG`` response slots or no ``prompt_length``, if another
    field is as wide as the tokens (it may be columns of tokens that nobody declared), or if an
    algorithm prepared something else than a Rollout.
    """
    if not isinstance(rollout, Rollout) or rollout.prompt_length is None:
        return False
    columns = rollout.tokens.shape[1]
    others = jax.tree.leaves(map_columns(lambda x: None, rollout))
    is_long = columns - rollout.prompt_length >= LONG
    return is_long and not any(columns in field.shape[1:] for field in others)


def sort_rows(rollout: Rollout, num_microbatches: int, *, group_size: int) -> Rollout:
    """The rows in an order from which ``ops.split_rows`` makes parts of similar length. A group is
    as long as its longest row.
    """
    longest = jnp.max(_count_columns(rollout).reshape(-1, group_size), axis=1)
    groups = jnp.ravel(jnp.argsort(longest).reshape(num_microbatches, -1).T)
    order = jnp.ravel(groups[:, None] * group_size + jnp.arange(group_size)[None])
    return jax.tree.map(lambda x: cut(x[order], "data", "fsdp"), rollout)


def cut_columns(of_part: Callable[[Array, Any], Result]) -> Callable[[Array, Rollout], Result]:
    """``of_part(number, part)`` of the columns up to a quarter, a half or all of the response
    slots, whichever the part's responses need.
    """

    def of_width(width: int, number: Array, part: Rollout) -> Result:
        return of_part(number, map_columns(lambda x: x[:, :width], part))

    def of_needed(number: Array, part: Rollout) -> Result:
        prompt = part.prompt_length or 0
        slots = part.tokens.shape[1] - prompt
        widths = [prompt + slots // 4, prompt + slots // 2, prompt + slots]
        index = jnp.searchsorted(jnp.array(widths), jnp.max(_count_columns(part)))
        return jax.lax.switch(index, [partial(of_width, width) for width in widths], number, part)

    return of_needed


def _count_columns(rollout: Rollout) -> Array:
    """[B] columns up to the last response token of each row."""
    until = jnp.arange(1, rollout.tokens.shape[1] + 1)
    return jnp.max(jnp.where(rollout.mask, until[None], 0), axis=1)
