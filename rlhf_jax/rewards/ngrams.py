"""Rewards for variety, from the n-grams of responses: repetition within one, and likeness to
others.

The n-grams of a response are those of its tokens in order: holes of the response mask are skipped,
and EOS is a token like any other.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from rlhf_jax import ops
from rlhf_jax.types import Rollout, Scores


def repetition(ngram: int = 3) -> Partial:
    """Reward ``1 - different n-grams / n-grams``; with a negative weight it is a penalty on
    repetition.

    The share of a response's n-grams that occurred in it before (seq-rep-n, Welleck et al. 2020),
    in [0, 1); 0 for a response shorter than ``ngram`` tokens.
    """
    ops.check_number("ngram", ngram, at_least=1)
    # The number decides shapes, so it is no argument of jit.
    return Partial(functools.partial(_repetition, ngram))


def diversity(ngram: int = 2) -> Partial:
    """Reward ``n-grams that only this response has / different n-grams of this response``.

    Distinct-n (Li et al. 2016) counts the different n-grams of all responses together; the count
    falls by a response's own n-grams if the response is left out. Saying one twice gains nothing.
    The score is in [0, 1]: 0 for a response that is shorter than ``ngram`` or has no n-gram of its
    own, 1 for one that shares none. Absent rows get 0 and share nothing with other rows.
    """
    ops.check_number("ngram", ngram, at_least=1)
    return Partial(functools.partial(_diversity, ngram))


def _repetition(ngram: int, rollout: Rollout) -> Scores:
    keys, new = _distinct_ngrams(rollout, ngram)
    total = _count(keys[0] == 0)
    repeated = total - _count(new)
    return repeated / jnp.maximum(total, 1.0), {}


def _diversity(ngram: int, rollout: Rollout) -> Scores:
    (_, *tokens), new = _distinct_ngrams(rollout, ngram)
    num_rows = len(new)
    rows = jnp.broadcast_to(jnp.arange(num_rows)[:, None], new.shape)
    keys = [jnp.where(new, 0, 1), *tokens]
    of_all_rows = [x.reshape(1, -1) for x in (*keys, rows)]
    *keys, rows = jax.lax.sort(of_all_rows, dimension=1, num_keys=len(keys))

    # Each row now has each n-gram at most once: an equal neighbour is another row's.
    begins = _differs(keys)
    ends = jnp.pad(begins[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    is_alone = (keys[0] == 0) & begins & ends
    alone = jnp.zeros(num_rows).at[rows].add(is_alone).reshape(-1)
    return alone / jnp.maximum(_count(new), 1.0), {}


def _distinct_ngrams(rollout: Rollout, ngram: int) -> tuple[Sequence[Array], Array]:
    """The n-grams of each response in sorted order, and where each is the first of its kind [B, T]
    bool.

    The n-grams are keys [B, T] each: first 0 for an n-gram and 1 for none, then its tokens.
    """
    in_response = jnp.asarray(rollout.mask)
    order = jnp.argsort(~in_response, axis=1, stable=True)
    tokens = jnp.take_along_axis(jnp.asarray(rollout.tokens), order, axis=1)
    length = tokens.shape[1]
    following = jnp.pad(tokens, ((0, 0), (0, ngram)))
    shifted = [following[:, k : k + length] for k in range(ngram)]
    counts = jnp.sum(in_response, axis=1, keepdims=True, dtype=jnp.int32)
    is_missing = jnp.arange(length)[None, :] + ngram > counts
    operands = [is_missing.astype(jnp.int32), *shifted]
    keys = jax.lax.sort(operands, dimension=1, num_keys=len(operands))
    return keys, (keys[0] == 0) & _differs(keys)


def _count(where: Array) -> Array:
    """[B, T] bool -> [B] float32."""
    return jnp.sum(where, axis=1, dtype=jnp.float32)


def _differs(keys: Sequence[Array]) -> Array:
    """Where a column of [N, L] keys differs from the column before it; always in the first one."""
    differs = [key[:, 1:] != key[:, :-1] for key in keys]
    after_first = jnp.any(jnp.stack(differs), axis=0)
    return jnp.pad(after_first, ((0, 0), (1, 0)), constant_values=True)
