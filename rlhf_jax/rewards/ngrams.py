"""Rewards for variety, from the n-grams of responses: repetition within one response, and n-grams
that it shares with others.

The n-grams of a response are those of its tokens in order. Holes of the response mask are skipped,
and EOS is a token like any other.
"""

import functools

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
    # The number decides shapes, so that it cannot be an argument of jit.
    score = functools.partial(_repetition, ngram)
    return Partial(score)


def diversity(ngram: int = 2) -> Partial:
    """Reward ``n-grams that only this response has / different n-grams of this response``.

    Distinct-n (Li et al. 2016) counts the different n-grams of all responses together. Without this
    response the count would be lower by the n-grams that only it has. An n-gram that occurs twice
    counts once. The score is in [0, 1]: 0 for a response that is shorter than ``ngram`` or shares
    all its n-grams, 1 for a response that shares none. Missing rows get 0 and share no n-grams.
    """
    ops.check_number("ngram", ngram, at_least=1)
    score = functools.partial(_diversity, ngram)
    return Partial(score)


def _repetition(ngram: int, rollout: Rollout) -> Scores:
    total, different, _ = _count_ngrams(rollout, ngram)
    repeated = total - different
    return repeated / jnp.maximum(total, 1.0), {}


def _diversity(ngram: int, rollout: Rollout) -> Scores:
    _, different, unshared = _count_ngrams(rollout, ngram)
    return unshared / jnp.maximum(different, 1.0), {}


def _count_ngrams(rollout: Rollout, ngram: int) -> tuple[Array, Array, Array]:
    """The numbers of n-grams of each response, of its different n-grams, and of those that no other
    response has: [B] float32 each.
    """
    in_response = jnp.asarray(rollout.mask)
    response_first = jnp.argsort(~in_response, axis=1, stable=True)
    tokens = jnp.asarray(rollout.tokens)
    tokens = jnp.take_along_axis(tokens, response_first, axis=1)
    _, num_columns = tokens.shape
    ends = jnp.arange(num_columns) + ngram
    lengths = jnp.sum(in_response, axis=1, keepdims=True)
    is_ngram = ends[None, :] <= lengths

    # Equal n-grams of all responses get the same number.
    following = [jnp.roll(tokens, -k, axis=1) for k in range(ngram)]
    ngrams = jnp.stack(following, axis=-1)
    none = tokens.size  # the number of what is no n-gram
    _, numbers = jnp.unique(
        ngrams.reshape(-1, ngram),
        axis=0,
        size=tokens.size,
        return_inverse=True,
    )
    numbers = numbers.reshape(tokens.shape)
    numbers = jnp.where(is_ngram, numbers, none)

    # In sorted order the first of equal numbers is larger than the number before it.
    numbers = jnp.sort(numbers, axis=1)
    steps = jnp.diff(numbers, axis=1, prepend=-1)
    is_new = (steps > 0) & (numbers < none)
    num_responses = jnp.zeros(none + 1)
    num_responses = num_responses.at[numbers].add(is_new)
    is_alone = num_responses[numbers] == 1
    is_unshared = is_new & is_alone
    return _count(is_ngram), _count(is_new), _count(is_unshared)


def _count(where: Array) -> Array:
    """[B, T] bool -> [B] float32."""
    return jnp.sum(where, axis=1, dtype=jnp.float32)
