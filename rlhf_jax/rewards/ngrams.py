"""Rewards for variety, from the n-grams of responses: repetition within one, and likeness to others.

The n-grams of a response are those of its tokens in order: holes of the response mask are skipped, and EOS is a token
like any other.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rlhf_jax.rewards.functions import Scores
from rlhf_jax.types import Rollout


def repetition(ngram: int = 3) -> Partial:
    """Reward ``1 - different n-grams / n-grams``; with a negative weight it is a penalty on repetition.

    The share of a response's n-grams that occurred in it before (seq-rep-n, Welleck et al. 2020), in [0, 1); 0 for a
    response shorter than ``ngram`` tokens.
    """
    _check_ngram(ngram)
    return Partial(functools.partial(_repetition, ngram))  # the number decides shapes, so it is no argument of jit


def diversity(ngram: int = 2, group_size: int | None = None) -> Partial:
    """Reward ``n-grams that only this response has / different n-grams of this response``.

    Distinct-n (Li et al. 2016) counts the different n-grams of all responses together; the count falls by a response's
    own n-grams if the response is left out. Saying one twice gains nothing. The score is in [0, 1]: 0 for a response
    that is shorter than ``ngram`` or has no n-gram of its own, 1 for one that shares none. Absent rows get 0 and share
    nothing with other rows.

    Args:
      ngram: tokens of an n-gram.
      group_size: responses are compared within groups of this many adjacent rows (answers to one prompt); None: within
        the batch.
    """
    _check_ngram(ngram)
    if group_size is not None and group_size < 2:
        raise ValueError(f"group_size: expected at least 2, or None for the whole batch, got {group_size}")
    return Partial(functools.partial(_diversity, ngram, group_size))


def _check_ngram(ngram: int) -> None:
    if ngram < 1:
        raise ValueError(f"ngram: expected at least 1 token, got {ngram}")


def _repetition(ngram: int, rollout: Rollout) -> Scores:
    keys, new = _distinct_ngrams(rollout, ngram)
    total = jnp.sum(keys[0] == 0, axis=1, dtype=jnp.float32)
    return (total - jnp.sum(new, axis=1, dtype=jnp.float32)) / jnp.maximum(total, 1.0), {}


def _diversity(ngram: int, group_size: int | None, rollout: Rollout) -> Scores:
    keys, new = _distinct_ngrams(rollout, ngram)
    batch, length = new.shape
    size = batch if group_size is None else group_size
    if batch % size:
        raise ValueError(f"group_size: {batch} rows do not divide into groups of {size}")
    keys = [jnp.where(new, 0, 1), *keys[1:]]
    rows = jnp.broadcast_to(jnp.arange(size)[None, :, None], (batch // size, size, length))
    operands = [x.reshape(batch // size, size * length) for x in (*keys, rows)]
    *keys, rows = jax.lax.sort(operands, dimension=1, num_keys=len(keys))
    # Each row now has each n-gram at most once: an equal neighbour is another row's.
    differs = _differs(keys)
    ends = jnp.pad(differs[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    alone = (keys[0] == 0) & differs & ends
    counts = jnp.zeros((batch // size, size)).at[jnp.arange(batch // size)[:, None], rows].add(alone)
    return counts.reshape(batch) / jnp.maximum(jnp.sum(new, axis=1, dtype=jnp.float32), 1.0), {}


def _distinct_ngrams(rollout: Rollout, ngram: int) -> tuple[Sequence[jax.Array], jax.Array]:
    """The n-grams of each response in sorted order, and where each is the first of its kind [B, T] bool.

    The n-grams are keys [B, T] each: first 0 for an n-gram and 1 for none, then its tokens.
    """
    in_response = jnp.asarray(rollout.response_mask) != 0
    order = jnp.argsort(~in_response, axis=1, stable=True)
    tokens = jnp.take_along_axis(jnp.asarray(rollout.tokens), order, axis=1)
    length = tokens.shape[1]
    following = jnp.pad(tokens, ((0, 0), (0, ngram)))
    counts = jnp.sum(in_response, axis=1, keepdims=True, dtype=jnp.int32)
    missing = jnp.arange(length)[None, :] + ngram > counts
    operands = [missing.astype(jnp.int32), *(following[:, k : k + length] for k in range(ngram))]
    keys = jax.lax.sort(operands, dimension=1, num_keys=len(operands))
    return keys, (keys[0] == 0) & _differs(keys)


def _differs(keys: Sequence[jax.Array]) -> jax.Array:
    """Where a column of [N, L] keys differs from the column before it; always in the first one."""
    steps = jnp.stack([key[:, 1:] != key[:, :-1] for key in keys])
    return jnp.pad(jnp.any(steps, axis=0), ((0, 0), (1, 0)), constant_values=True)
