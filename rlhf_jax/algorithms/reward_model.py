"""Reward models from comparisons of K answers (Ziegler et al. 2019; K = 2: Bradley-Terry), or from
target scores.

The model is a ``score_fn(params, tokens [B, T], attention_mask [B, T], key) -> scores [B]``; the
answers of a comparison are scored as rows of one batch [B * K, T].
"""

from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax import losses, ops
from rlhf_jax.algorithms.step import batch_updater
from rlhf_jax.types import Comparisons, Mean, Params, Parts, ScoreFn


@dataclass(frozen=True)
class Config:
    """Reward model."""

    centering: float = 0.0
    """Weight of the squared sum of a pair's scores, which pulls scores towards 0; pairs only."""
    num_microbatches: int = 1
    """Parts of a batch that are run one after the other to save memory; the gradient does not
    change.
    """

    def __post_init__(self) -> None:
        ops.check_number("centering", self.centering, at_least=0)


def answer_scores(
    score_fn: Any,
    params: Params,
    comparisons: Comparisons,
    key: Array | None = None,
) -> Array:
    """Scores [B, K] of the answers, by a ScoreFn; of packed ones [B, C, K], by one that takes
    ``documents`` too.
    """
    tokens = comparisons.tokens
    mask = comparisons.attention_mask
    documents = comparisons.documents
    if documents is not None:
        numbers = documents.reshape(len(documents), -1)
        scores = score_fn(params, tokens, mask, key, numbers)
        return jnp.reshape(scores, documents.shape)
    chex.assert_rank(tokens, 3)
    batch, num_answers, length = tokens.shape
    rows = tokens.reshape(-1, length)
    scores = score_fn(params, rows, mask.reshape(-1, length), key)
    chex.assert_shape(scores, (batch * num_answers,))
    return jnp.reshape(scores, (batch, num_answers))


def _joined(x: Array) -> Array:
    """[B, C, ...] -> [B * C, ...]."""
    return jnp.reshape(x, (-1, *jnp.shape(x)[2:]))


def loss(
    params: Params,
    comparisons: Comparisons,
    key: Array | None,
    *,
    score_fn: ScoreFn,
    config: Config,
) -> tuple[Mean, Parts]:
    """The weighted mean of ``losses.comparison`` over rows or, with ``targets``, of squared errors
    over answers.

    Answers with an empty response mask are missing: they enter as -inf and have no target. Rows
    whose best answer is missing count neither in the loss nor in the metrics. Weights are relative:
    the loss divides by their sum.

    Args:
      comparisons: [B, K, T], or packed [B, T]; ``best`` None means answer 0.
      key: of dropout; None turns it off.

    Returns:
      The loss and the metrics ``reward_model/loss`` and, of comparisons, ``reward_model/accuracy``
      (ties count half) and ``reward_model/margin``, the best answer's score minus the highest
      other, both over rows with at least two answers.
    """
    scores = answer_scores(score_fn, params, comparisons, key)
    present = ops.response_sums(jnp.ones_like(comparisons.tokens), comparisons) > 0
    parts = (
        scores,
        present,
        comparisons.best,
        comparisons.targets,
        comparisons.weight,
        comparisons.margin,
    )
    if comparisons.documents is not None:
        parts = jax.tree.map(_joined, parts)
    scores, present, best, targets, weight, wanted = parts
    batch, num_answers = scores.shape
    if targets is None and num_answers < 2:
        raise ValueError(
            f"a comparison needs at least 2 answers, got tokens {comparisons.tokens.shape} and no "
            "targets"
        )
    weight = jnp.ones(batch) if weight is None else jnp.asarray(weight, jnp.float32)
    chex.assert_shape(weight, (batch,))

    if targets is not None:
        return _regression(scores, present, targets, weight)
    best = jnp.zeros(batch, jnp.int32) if best is None else jnp.asarray(best)
    return _comparison(scores, present, best, wanted, weight, config.centering)


def _regression(scores: Array, present: Array, targets: Array, weight: Array) -> tuple[Mean, Parts]:
    """Scores, presence and targets of answers [B, K], weights of rows [B]."""
    scores = jnp.where(present, scores, 0.0)
    errors = losses.regression(scores, jnp.where(present, targets, 0.0))
    mean = losses.weighted_mean(errors, jnp.where(present, weight[:, None], 0.0))
    return mean, {"reward_model/loss": mean}


def _comparison(
    scores: Array,
    present: Array,
    best: Array,
    wanted: Array | None,
    weight: Array,
    centering: float,
) -> tuple[Mean, Parts]:
    """Scores and presence of answers [B, K]; the best answer, the wanted margin and the weight of
    rows [B].
    """
    entered = jnp.where(present, scores, -jnp.inf)
    usable = jnp.take_along_axis(present, best[:, None], axis=1)[:, 0]
    per_row = losses.comparison(entered, best, wanted, centering)
    mean = losses.weighted_mean(per_row, jnp.where(usable, weight, 0.0))
    is_best = jnp.arange(scores.shape[1])[None, :] == best[:, None]
    others = jnp.max(jnp.where(is_best, -jnp.inf, entered), axis=1)
    has_two = jnp.sum(present, axis=1) > 1
    compared = jnp.where(usable & has_two, weight, 0.0)  # [B]
    margin = jnp.take_along_axis(entered, best[:, None], axis=1)[:, 0] - others
    margin = jax.lax.stop_gradient(jnp.where(compared > 0, margin, 0.0))
    right = 0.5 * (1.0 + jnp.sign(margin))
    return mean, {
        "reward_model/loss": mean,
        "reward_model/accuracy": losses.weighted_mean(right, compared),
        "reward_model/margin": losses.weighted_mean(margin, compared),
    }


update = batch_updater(loss)
"""See ``step.batch_updater``; of comparisons [B, K, T], or packed ones."""
