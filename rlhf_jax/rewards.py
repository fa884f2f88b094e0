"""Rewards: where scores come from, and how they are shaped before an update reads them.

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
from rlhf_jax.host_rewards import Decoder as Decoder
from rlhf_jax.host_rewards import HostResult as HostResult
from rlhf_jax.host_rewards import HostReward as HostReward
from rlhf_jax.host_rewards import from_text as from_text
from rlhf_jax.host_rewards import on_host as on_host
from rlhf_jax.ngram_rewards import diversity as diversity
from rlhf_jax.ngram_rewards import repetition as repetition
from rlhf_jax.ngram_rewards import repetition_penalty as repetition_penalty
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
    return Partial(_excess_length, target)


def _excess_length(target: int, rollout: Rollout) -> jax.Array:
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


def kl_shaped(rollout: Rollout, kl_coef: jax.Array | float, estimator: ops.KLEstimator = "k1") -> jax.Array:
    """Rewards per token: the score on the last response token, minus ``kl_coef`` times the KL of each token.

    Ziegler et al. 2019, eq. 2. ``rollout.rewards`` takes the place of the score where it is given (dense rewards).

    Args:
      rollout: with ``log_probs``, ``ref_log_probs`` and ``scores`` or ``rewards``.
      kl_coef: reward per nat.

    Returns:
      [B, T] float32, 0 outside the response.

    Raises:
      ValueError: neither scores nor rewards; no ``ref_log_probs``, unless ``kl_coef`` is the Python number 0; an
        unknown estimator; or arrays of other shapes.
    """
    present = rollout.response_mask != 0
    if rollout.rewards is not None:
        ops.check_same_shape(rewards=rollout.rewards, response_mask=present)
        rewards = jnp.where(present, jnp.asarray(rollout.rewards, jnp.float32), 0.0)
    elif rollout.scores is not None:
        ops.check_rank(1, scores=rollout.scores)
        rewards = jnp.where(_is_last(present), jnp.asarray(rollout.scores, jnp.float32)[:, None], 0.0)
    else:
        raise ValueError("rollout: expected scores [B] or rewards [B, T], got neither; call a reward function first")
    if rollout.ref_log_probs is None:
        if not isinstance(kl_coef, int | float) or kl_coef != 0:
            raise ValueError("rollout.ref_log_probs is None: give rollout.collect a ref_fn, or use kl_coef=0.0")
        return rewards
    log_probs = jnp.where(present, rollout.log_probs, 0.0)
    ref_log_probs = jnp.where(present, rollout.ref_log_probs, 0.0)
    return rewards - kl_coef * ops.kl(log_probs, ref_log_probs, estimator)


def _is_last(present: jax.Array) -> jax.Array:
    """[B, T] bool: the last response token of each row; none in an empty row."""
    remaining = jnp.cumsum(present[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]
    return present & (remaining == 1)


def missing_eos(
    rollout: Rollout, scores: jax.Array, eos_id: int, penalty: float | None = None, score: float | None = None
) -> jax.Array:
    """Scores [B] with a rule for responses whose last token is not EOS.

    Args:
      scores: [B].
      penalty: such a response keeps its score minus this.
      score: such a response gets this instead of its score (lm-human-preferences: -1). Exactly one of the two is given.

    Returns:
      [B] float32; absent rows keep what they had.

    Raises:
      ValueError: both or neither of ``penalty`` and ``score``; or scores that are not [B].
    """
    if (penalty is None) == (score is None):
        raise ValueError(f"missing_eos: expected one of penalty and score, got penalty={penalty}, score={score}")
    present = rollout.response_mask != 0
    last = _is_last(present)
    unfinished = jnp.any(last & (rollout.tokens != eos_id), axis=1)
    scores = jnp.asarray(scores, jnp.float32)
    ops.check_same_shape(scores=scores, one_column_of_tokens=unfinished)
    return jnp.where(unfinished, jnp.float32(score) if penalty is None else scores - penalty, scores)


def length_penalty(rollout: Rollout, scores: jax.Array, coef: float, target: int = 0) -> jax.Array:
    """``scores - coef * length(target)``, [B] float32.

    Args:
      scores: [B].
      coef: reward lost by each token beyond ``target``.

    Raises:
      ValueError: scores that are not [B].
    """
    excess = _excess_length(target, rollout)
    ops.check_same_shape(scores=scores, one_column_of_tokens=excess)
    return jnp.asarray(scores, jnp.float32) - coef * excess


def adaptive_kl(
    kl_coef: jax.Array | float,
    kl: jax.Array | float,
    *,
    target: float,
    horizon: float | jax.Array,
    n: int | float | jax.Array,
) -> jax.Array:
    """``kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon)`` (Ziegler et al. 2019, section 2.2).

    Args:
      kl: mean over responses of the KL summed over the response, in nats.
      target: the KL to hold, in nats.
      horizon: episodes over which the coefficient moves by about a fifth; with ``n`` far below it, it hardly moves.
      n: episodes of this iteration.

    Returns:
      The new coefficient, scalar float32.

    Raises:
      ValueError: a target or horizon that is not above 0.
    """
    for name, number in (("target", target), ("horizon", horizon)):
        if isinstance(number, int | float) and number <= 0:
            raise ValueError(f"{name}: expected a number above 0, got {number}")
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -0.2, 0.2)
    return jnp.asarray(kl_coef, jnp.float32) * (1.0 + error * n / horizon)
