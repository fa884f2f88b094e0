"""Rewards that can be traced: counts, lengths, reward models, their ensembles and weighted sums.

A RewardFn takes a rollout and returns a pair: scores [B] (or dense rewards [B, T]) and named
components {name: [B]}, an empty dict if there are none. The rewards of this file are
``jax.tree_util.Partial``: the arrays that they hold (a reward model's parameters) are arguments of
``jit``, not constants of the compiled program. The score of a missing row, whose ``response_mask``
is empty, has no meaning.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from rlhf_jax import ops
from rlhf_jax.types import DropoutKey, Params, RewardFn, Rollout, ScoreFn, Scores

EnsembleMethod = Literal["mean", "min", "uncertainty"]


def combined(how: EnsembleMethod, scores: Array, coef: float) -> Array:
    """One score [B] from those of an ensemble's members [M, B], as ``ensemble`` says."""
    if how == "min":
        return jnp.min(scores, axis=0)
    mean = jnp.mean(scores, axis=0)
    if how == "mean":
        return mean
    return mean - coef * _variance(scores)


def deviation(scores: Array) -> Array:
    """The standard deviation [B] of the members' scores [M, B]: exactly 0 if they are equal."""
    return jnp.sqrt(_variance(scores))


def _variance(scores: Array) -> Array:
    return ops.masked_var(scores, jnp.ones_like(scores), axis=0)


def token_count(token_id: int, cap: float = 100, include_prompt: bool = True) -> Partial:
    """Reward ``min(count of token_id, cap)``: jRLHF's Shakespeare reward.

    include_prompt: count in all real tokens of the row; False counts in the response only.
    """
    return Partial(_token_count, token_id, cap, include_prompt)


def _token_count(token_id: int, cap: float, include_prompt: bool, rollout: Rollout) -> Scores:
    mask = jnp.where(include_prompt, rollout.attention_mask, rollout.response_mask)
    is_counted = (rollout.tokens == token_id) & (mask != 0)
    counts = jnp.sum(is_counted, axis=1, dtype=jnp.float32)
    return jnp.minimum(counts, cap), {}


def length(target: int = 0) -> Partial:
    """Reward ``max(response tokens - target, 0)``; with a negative weight it is a penalty on
    length.
    """
    return Partial(_length, target)


def _length(target: int, rollout: Rollout) -> Scores:
    num_tokens = jnp.sum(rollout.mask, axis=1, dtype=jnp.float32)
    return jnp.maximum(num_tokens - target, 0.0), {}


def from_model(
    score_fn: ScoreFn, params: Params, in_groups: Callable[..., ScoreFn] | None = None
) -> Partial:
    """Reward of a learned model: ``score_fn(params, tokens, attention_mask, None)`` of prompt and
    response.

    The result holds ``params``.

    Args:
      in_groups: ``(*, prompt_length, group_size)`` -> the ScoreFn that computes a prompt once for
        the rows of its group, where a rollout has groups; None: each row by itself.
    """
    in_groups = None if in_groups is None else Partial(in_groups)
    return Partial(_model_score, _as_pytree(score_fn), in_groups, params)


def from_steps(score_fn: Callable[..., Array], params: Params, ends: Array) -> Partial:
    """Dense reward [B, T] of a process reward model: at the end of each step of the response the
    probability, the sigmoid of its score, that the step is right. The component ``step_end`` [B, T]
    is 1 there. A step ends at the last of adjacent tokens of ``ends`` and at the end of the
    response.

    Args:
      score_fn: ``models.score_fn(model, at_tokens=True)``.
      ends: [V] bool: the tokens with a newline in their text, and those that end a response.
    """
    return Partial(_step_rewards, _as_pytree(score_fn), params, ends)


def _step_rewards(score_fn: Any, params: Params, ends: Array, rollout: Rollout) -> Scores:
    is_one = ends[rollout.tokens] & rollout.mask
    goes_on = jnp.pad(is_one[:, 1:], ((0, 0), (0, 1)))
    step_end = (is_one & ~goes_on) | ops.is_last(rollout.mask)
    scores = score_fn(params, rollout.tokens, rollout.attention_mask, None)
    return ops.masked(jax.nn.sigmoid(scores), step_end), {"step_end": ops.float32(step_end)}


def behind_turns(
    score_fn: ScoreFn, *, closing: Sequence[int], ends: Sequence[int], prompt_length: int = 0
) -> ScoreFn:
    """The ScoreFn of texts that end as those that the model was trained on: see ``close_turns``."""
    close = functools.partial(close_turns, closing=closing, ends=ends, prompt_length=prompt_length)

    def score(
        params: Params, tokens: Array, attention_mask: Array, key: DropoutKey = None
    ) -> Array:
        return score_fn(params, *close(tokens, attention_mask), key)

    return score


def close_turns(
    tokens: Array,
    attention_mask: Array,
    *,
    closing: Sequence[int],
    ends: Sequence[int],
    prompt_length: int = 0,
) -> tuple[Array, Array]:
    """The texts [B, T] and their mask with ``closing`` behind them, [B, T + len(closing)]: what a
    chat template writes there, or the EOS that an answer which was cut lacks.

    Args:
      closing: the id that ends a turn, and those that follow it. They stand behind the last token
        of a text, or in its place if that is one of ``ends``.
      prompt_length: no column before it changes.
    """
    chex.assert_rank([tokens, attention_mask], 2)
    wider = ((0, 0), (0, len(closing)))
    tokens = jnp.pad(tokens, wider)
    attention_mask = jnp.pad(attention_mask, wider)
    columns = jnp.arange(tokens.shape[1])[None]
    is_real = attention_mask != 0
    last = jnp.max(jnp.where(is_real, columns, 0), axis=1, keepdims=True)
    last_tokens = jnp.take_along_axis(tokens, last, axis=1)
    is_ended = jnp.isin(last_tokens, jnp.asarray(ends)) & (last >= prompt_length)
    place = columns - jnp.where(is_ended, last, last + 1)
    is_present = is_real.any(axis=1, keepdims=True)
    closes = is_present & (place >= 0) & (place < len(closing))
    closed = jnp.asarray(closing, jnp.int32)[jnp.clip(place, 0, len(closing) - 1)]
    return jnp.where(closes, closed, tokens), jnp.where(closes, 1, attention_mask)


def _model_score(
    score_fn: ScoreFn, in_groups: Partial | None, params: Params, rollout: Rollout
) -> Scores:
    if in_groups is not None and rollout.group_size > 1 and rollout.prompt_length:
        score_fn = in_groups(prompt_length=rollout.prompt_length, group_size=rollout.group_size)
    scores = score_fn(params, rollout.tokens, rollout.attention_mask, None)
    return scores.astype(jnp.float32), {}


def ensemble(fns: Sequence[RewardFn], how: EnsembleMethod = "mean", coef: float = 1.0) -> Partial:
    """One reward from several models of the same thing (Coste et al. 2023, "Reward Model Ensembles
    Help Mitigate Overoptimization").

    ``mean``; ``min``, the worst case; ``uncertainty``, mean - coef * variance over members (their
    eq. 5; population).

    Args:
      fns: RewardFns giving scores [B], or all of them [B, T]; their parts are dropped.
      coef: weight of the variance, per unit of score squared.

    Returns:
      RewardFn with the part ``uncertainty``, the standard deviation over members [B].
    """
    ops.check_choice("how", how, EnsembleMethod)
    if not fns:
        raise ValueError("fns: an ensemble needs at least one reward function")
    # The method decides what is computed, so that it cannot be an argument of jit.
    return Partial(functools.partial(_ensemble, how), coef, [_as_pytree(fn) for fn in fns])


def _ensemble(
    how: EnsembleMethod, coef: float, fns: Sequence[RewardFn], rollout: Rollout
) -> Scores:
    of_members = [ops.float32(fn(rollout)[0]) for fn in fns]
    chex.assert_shape(of_members, rollout.tokens.shape[: of_members[0].ndim])
    scores = jnp.stack(of_members)
    return combined(how, scores, coef), {"uncertainty": deviation(scores)}


def weighted(parts: Mapping[str, tuple[RewardFn, float]]) -> Partial:
    """Weighted sum of rewards, given as {name: (RewardFn, weight)}. If one of them is dense, so is
    the sum, and a score [B] stands at the last token of its row.

    Returns:
      RewardFn with the components {name: that reward's scores [B] before its weight}; the
      components of a component are ``name/component``.
    """
    if not parts:
        raise ValueError("parts: a weighted sum needs at least one reward function")
    weighted_parts = {name: (_as_pytree(fn), weight) for name, (fn, weight) in parts.items()}
    return Partial(_weighted, weighted_parts)


def _weighted(parts: dict[str, tuple[RewardFn, float]], rollout: Rollout) -> Scores:
    given = []
    components = {}
    for name, (fn, weight) in parts.items():
        scores, inner = fn(rollout)
        scores = jnp.asarray(scores, jnp.float32)
        is_dense = scores.ndim == 2
        expected = rollout.tokens.shape if is_dense else rollout.tokens.shape[:1]
        chex.assert_shape(scores, expected)
        given.append(weight * scores)
        if is_dense:
            scores = jnp.sum(ops.masked(scores, rollout.mask), axis=1)
        components[name] = scores
        for part, values in inner.items():
            components[f"{name}/{part}"] = values
    if any(scores.ndim == 2 for scores in given):
        given = [ops.at_end(scores, rollout.mask) for scores in given]
    total: Any = 0.0
    for scores in given:
        total = total + scores
    return total, components


def _as_pytree(fn: Callable[..., Any]) -> Partial:
    """``fn`` as an argument that jit accepts. A Partial stays as it is: inside another Partial jit
    would not see its arrays.
    """
    return fn if isinstance(fn, Partial) else Partial(fn)
