"""Rewards for variety, from the n-grams of responses: repetition within one, and likeness to others.

``rewards`` has these names too. The n-grams of a response are those of its tokens in order: holes of the response mask
are skipped, and EOS is a token as any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rlhf_jax.types import Rollout


def repetition(ngram: int = 3) -> Partial:
    """Reward ``1 - different n-grams / n-grams``; with a negative weight it is a penalty on repetition.

    The share of a response's n-grams that it has said before (seq-rep-n, Welleck et al. 2020), in [0, 1); 0 for a
    response shorter than ``ngram``.

    Args:
      ngram: tokens of an n-gram.

    Returns:
      RewardFn giving scores [B].

    Raises:
      ValueError: ``ngram`` below 1.
    """
    _check_ngram(ngram)
    return Partial(_Repetition(ngram))


@dataclass(frozen=True)
class _Repetition:
    """Its number shapes the program, so it must stay out of the Partial's arrays."""

    ngram: int

    def __call__(self, rollout: Rollout) -> jax.Array:
        keys, new = _distinct_ngrams(rollout, self.ngram)
        total = jnp.sum(keys[0] == 0, axis=1, dtype=jnp.float32)
        return (total - jnp.sum(new, axis=1, dtype=jnp.float32)) / jnp.maximum(total, 1.0)


def repetition_penalty(rollout: Rollout, scores: jax.Array, coef: float, ngram: int = 3) -> jax.Array:
    """``scores - coef * repetition(ngram)``, [B] float32.

    Args:
      scores: [B].
      coef: reward lost by a response that only repeats itself.

    Raises:
      ValueError: ``ngram`` below 1, or scores that are not [B].
    """
    repeated = repetition(ngram)(rollout)
    chex.assert_equal_shape([scores, repeated])
    return jnp.asarray(scores, jnp.float32) - coef * repeated


def diversity(ngram: int = 2, group_size: int | None = None) -> Partial:
    """Reward of a response for what no other response says: of its different n-grams, the share that is its alone.

    Distinct-n (Li et al. 2016) counts the different n-grams of all responses together; a response's own n-grams are
    those by which the count would fall without it. Repeating one gains nothing. The score is in [0, 1]: 0 for a
    response that is shorter than ``ngram`` or says nothing new, 1 for one that shares no n-gram. Absent rows
    get 0 and share nothing with anybody.

    Args:
      ngram: tokens of an n-gram.
      group_size: responses are compared within groups of so many adjacent rows (answers to one prompt); None: within
        the batch.

    Returns:
      RewardFn giving scores [B].

    Raises:
      ValueError: ``ngram`` below 1 or ``group_size`` below 2; when called, B is not a multiple of ``group_size``.
    """
    _check_ngram(ngram)
    if group_size is not None and group_size < 2:
        raise ValueError(f"group_size: expected at least 2, or None for the whole batch, got {group_size}")
    return Partial(_Diversity(ngram, group_size))


@dataclass(frozen=True)
class _Diversity:
    """Its numbers shape the program, so they must stay out of the Partial's arrays."""

    ngram: int
    group_size: int | None

    def __call__(self, rollout: Rollout) -> jax.Array:
        keys, new = _distinct_ngrams(rollout, self.ngram)
        batch, length = new.shape
        size = batch if self.group_size is None else self.group_size
        if batch % size:
            raise ValueError(f"diversity: {batch} rows do not divide into groups of group_size={size}")
        keys = [jnp.where(new, 0, 1), *keys[1:]]
        rows = jnp.broadcast_to(jnp.arange(size)[None, :, None], (batch // size, size, length))
        operands = [x.reshape(batch // size, size * length) for x in (*keys, rows)]
        *keys, rows = jax.lax.sort(operands, dimension=1, num_keys=len(keys))
        # Each row now has each n-gram at most once: a second one beside it is another row's.
        differs = _differs(keys)
        ends = jnp.pad(differs[:, 1:], ((0, 0), (0, 1)), constant_values=True)
        alone = (keys[0] == 0) & differs & ends
        counts = jnp.zeros((batch // size, size)).at[jnp.arange(batch // size)[:, None], rows].add(alone)
        return counts.reshape(batch) / jnp.maximum(jnp.sum(new, axis=1, dtype=jnp.float32), 1.0)


def _check_ngram(ngram: int) -> None:
    if ngram < 1:
        raise ValueError(f"ngram: expected at least 1 token, got {ngram}")


def _distinct_ngrams(rollout: Rollout, ngram: int) -> tuple[Sequence[jax.Array], jax.Array]:
    """The n-grams of each response in sorted order, as keys [B, T]: 0 where there is one (else 1), then its tokens;
    and where each stands for the first time [B, T]."""
    said = jnp.asarray(rollout.response_mask) != 0
    order = jnp.argsort(~said, axis=1, stable=True)
    tokens = jnp.take_along_axis(jnp.asarray(rollout.tokens), order, axis=1)
    length = tokens.shape[1]
    following = jnp.pad(tokens, ((0, 0), (0, ngram)))
    counts = jnp.sum(said, axis=1, keepdims=True, dtype=jnp.int32)
    missing = jnp.arange(length)[None, :] + ngram > counts
    operands = [missing.astype(jnp.int32), *(following[:, k : k + length] for k in range(ngram))]
    keys = jax.lax.sort(operands, dimension=1, num_keys=len(operands))
    return keys, (keys[0] == 0) & _differs(keys)


def _differs(keys: Sequence[jax.Array]) -> jax.Array:
    """Where a column of [N, L] keys is not the column before it; the first one always."""
    steps = jnp.stack([key[:, 1:] != key[:, :-1] for key in keys])
    return jnp.pad(jnp.any(steps, axis=0), ((0, 0), (1, 0)), constant_values=True)
