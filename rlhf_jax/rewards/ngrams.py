"""Rewards for variety, from the n-grams of responses: repetition within one response, and n-grams
that it shares with others.

The n-grams of a response are those of its tokens in order. Holes of the response mask are skipped,
and EOS is a token like any other.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
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
    # The number decides shapes, so that it cannot be an argument of jit.
    return Partial(functools.partial(_repetition, ngram))


def diversity(ngram: int = 2) -> Partial:
    """Reward ``n-grams that only this response has / different n-grams of this response``.

    Distinct-n (Li et al. 2016) counts the different n-grams of all responses together. Without this
    response the count would be lower by the n-grams that only it has. An n-gram that occurs twice
    counts once. The score is in [0, 1]: 0 for a response that is shorter than ``ngram`` or shares
    all its n-grams, 1 for a response that shares none. Missing rows get 0 and share no n-grams.
    """
    ops.check_number("ngram", ngram, at_least=1)
    return Partial(functools.partial(_diversity, ngram))


def _repetition(ngram: int, rollout: Rollout) -> Scores:
    keys, is_new = _distinct_ngrams(rollout, ngram)
    is_missing, *_ = keys
    total = jnp.sum(is_missing == 0, axis=1, dtype=jnp.float32)
    repeated = total - jnp.sum(is_new, axis=1, dtype=jnp.float32)
    return repeated / jnp.maximum(total, 1.0), {}


def _diversity(ngram: int, rollout: Rollout) -> Scores:
    (_, *tokens), is_new = _distinct_ngrams(rollout, ngram)
    num_rows = len(is_new)
    rows = jnp.broadcast_to(jnp.arange(num_rows)[:, None], is_new.shape)
    # The n-grams of all rows in sorted order, each row's at most once: [1, B T].
    of_all_rows = [x.reshape(1, -1) for x in (jnp.where(is_new, 0, 1), *tokens, rows)]
    *keys, rows = lax.sort(of_all_rows, dimension=1, num_keys=ngram + 1)
    is_missing, *_ = keys
    # An n-gram that differs from both its neighbours is in one row only.
    is_first = _differs(keys)
    is_last = jnp.roll(is_first, -1, axis=1)
    is_alone = (is_missing == 0) & is_first & is_last
    num_alone = jnp.zeros(num_rows).at[rows].add(is_alone).reshape(-1)
    num_different = jnp.sum(is_new, axis=1, dtype=jnp.float32)
    return num_alone / jnp.maximum(num_different, 1.0), {}


def _distinct_ngrams(rollout: Rollout, ngram: int) -> tuple[Sequence[Array], Array]:
    """The n-grams of each response in sorted order, and where each is the first of its kind [B, T]
    bool.

    The n-grams are ``ngram + 1`` keys [B, T]: first 0 for an n-gram and 1 for none, then its
    tokens. Each row is sorted by itself, so that no row moves to another device.
    """
    in_response = jnp.asarray(rollout.mask)
    response_first = jnp.argsort(~in_response, axis=1, stable=True)
    tokens = jnp.take_along_axis(jnp.asarray(rollout.tokens), response_first, axis=1)
    following = [jnp.roll(tokens, -k, axis=1) for k in range(ngram)]
    counts = jnp.sum(in_response, axis=1, keepdims=True, dtype=jnp.int32)
    is_missing = jnp.arange(ngram, ngram + tokens.shape[1])[None, :] > counts
    operands = [is_missing.astype(jnp.int32), *following]
    keys = lax.sort(operands, dimension=1, num_keys=ngram + 1)
    return keys, (keys[0] == 0) & _differs(keys)


def _differs(keys: Sequence[Array]) -> Array:
    """Where a column of keys [N, L] differs from the column before it; the first column does."""
    after_first = jnp.any(jnp.stack([key[:, 1:] != key[:, :-1] for key in keys]), axis=0)
    return jnp.pad(after_first, ((0, 0), (1, 0)), constant_values=True)
