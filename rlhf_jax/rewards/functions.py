"""Rewards that can be traced: counts, lengths, reward models, their ensembles and weighted sums.

A RewardFn takes a rollout and returns scores [B], dense rewards [B, T], or (scores, {part: [B]}). Those made here are
``jax.tree_util.Partial``, so that the arrays they carry (a reward model's parameters) travel through ``jit`` as
arguments. Closed over, they would be baked into the program. A HostReward is ordinary Python and runs between two
jits; ``on_host`` calls it. Scores of absent rows, those with an empty ``response_mask``, are read by nobody.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rlhf_jax import ops
from rlhf_jax.types import Params, RewardFn, Rollout, ScoreFn

Parts = dict[str, jax.Array]
EnsembleMethod = Literal["mean", "min", "uncertainty"]


def token_count(token_id: int, cap: float = 100, include_prompt: bool = True) -> Partial:
    """Reward ``min(count of token_id, cap)``: jRLHF's Shakespeare reward.

    Args:
      include_prompt: counts over all real tokens of the row; False over the response alone.

    Returns:
      RewardFn giving scores [B].
    """
    return Partial(_count_text if include_prompt else _count_response, token_id, cap)


def _count_text(token_id: int, cap: float, rollout: Rollout) -> jax.Array:
    return _count(rollout.tokens, rollout.attention_mask, token_id, cap)


def _count_response(token_id: int, cap: float, rollout: Rollout) -> jax.Array:
    return _count(rollout.tokens, rollout.response_mask, token_id, cap)


def _count(tokens: jax.Array, mask: jax.Array, token_id: int, cap: float) -> jax.Array:
    counts = jnp.sum((tokens == token_id) & (mask != 0), axis=1, dtype=jnp.float32)
    return jnp.minimum(counts, cap)


def length(target: int = 0) -> Partial:
    """Reward ``max(response tokens - target, 0)``; with a negative weight it is a penalty on length.

    Returns:
      RewardFn giving scores [B].
    """
    return Partial(excess_length, target)


def excess_length(target: int, rollout: Rollout) -> jax.Array:
    """Response tokens beyond ``target``, [B] float32."""
    tokens = jnp.sum(jnp.asarray(rollout.response_mask) != 0, axis=1, dtype=jnp.float32)
    return jnp.maximum(tokens - target, 0.0)


def from_model(score_fn: ScoreFn, params: Params) -> Partial:
    """Reward of a learned model: ``score_fn(params, tokens, attention_mask, None)`` of prompt and response.

    Returns:
      RewardFn giving scores [B]; it carries ``params``.
    """
    return Partial(_model_scores, _carried(score_fn), params)


def _model_scores(score_fn: Callable[..., jax.Array], params: Params, rollout: Rollout) -> jax.Array:
    return score_fn(params, rollout.tokens, rollout.attention_mask, None).astype(jnp.float32)


def ensemble(fns: Sequence[RewardFn], how: EnsembleMethod = "mean", coef: float = 1.0) -> Partial:
    """One reward from several models of the same thing (Coste et al. 2023, "Reward Model Ensembles Help Mitigate
    Overoptimization").

    ``mean``; ``min``, the worst case; ``uncertainty``, mean - coef * variance over members (their eq. 5; population).

    Args:
      fns: RewardFns giving scores [B]; parts that they return besides are dropped.
      coef: weight of the variance, per unit of score squared.

    Returns:
      RewardFn giving (scores, {"uncertainty": standard deviation over members [B]}).

    Raises:
      ValueError: unknown ``how`` or no members; when called, a member that does not give [B].
    """
    ops.check_choice("how", how, get_args(EnsembleMethod))
    if not fns:
        raise ValueError("ensemble: expected at least one reward function, got none")
    combine = {"mean": _mean, "min": _min, "uncertainty": _mean_minus_variance}[how]
    return Partial(_ensemble_scores, Partial(combine), coef, [_carried(fn) for fn in fns])


def _mean(scores: jax.Array, coef: float) -> jax.Array:
    del coef
    return jnp.mean(scores, axis=0)


def _min(scores: jax.Array, coef: float) -> jax.Array:
    del coef
    return jnp.min(scores, axis=0)


def _mean_minus_variance(scores: jax.Array, coef: float) -> jax.Array:
    return jnp.mean(scores, axis=0) - coef * jnp.var(scores, axis=0)


def _ensemble_scores(
    combine: Callable[..., jax.Array], coef: float, fns: Sequence[RewardFn], rollout: Rollout
) -> tuple[jax.Array, Parts]:
    scores = jnp.stack([_row_scores(f"member {i}", fn, rollout)[0] for i, fn in enumerate(fns)])  # [members, B]
    return combine(scores, coef), {"uncertainty": jnp.std(scores, axis=0)}


def weighted(parts: Mapping[str, tuple[RewardFn, float]]) -> Partial:
    """Weighted sum of rewards.

    Args:
      parts: {name: (RewardFn giving scores [B], weight)}.

    Returns:
      RewardFn giving (sum of weight * scores [B], {name: that part's scores before its weight}); parts of a part are
      named ``name/part``.

    Raises:
      ValueError: no parts; when called, a part that does not give [B].
    """
    if not parts:
        raise ValueError("weighted: expected at least one part, got none")
    return Partial(_weighted_scores, {name: (_carried(fn), weight) for name, (fn, weight) in parts.items()})


def _weighted_scores(parts: dict[str, tuple[RewardFn, float]], rollout: Rollout) -> tuple[jax.Array, Parts]:
    total = jnp.zeros(jnp.shape(rollout.tokens)[0], jnp.float32)
    reported: Parts = {}
    for name, (fn, weight) in parts.items():
        scores, inner = _row_scores(name, fn, rollout)
        total = total + weight * scores
        reported |= {name: scores} | {f"{name}/{part}": values for part, values in inner.items()}
    return total, reported


def _carried(fn: Callable[..., Any]) -> Partial:
    """As a pytree: a plain function cannot be an argument of jit, and a Partial in a Partial would hide its arrays."""
    return fn if isinstance(fn, Partial) else Partial(fn)


def _row_scores(name: str, fn: RewardFn, rollout: Rollout) -> tuple[jax.Array, Parts]:
    result = fn(rollout)
    scores, parts = result if isinstance(result, tuple) else (result, {})
    rows = jnp.shape(rollout.tokens)[:1]
    if jnp.shape(scores) != rows:
        raise ValueError(f"reward {name}: expected scores of shape {rows}, got {jnp.shape(scores)}")
    return jnp.asarray(scores, jnp.float32), parts
