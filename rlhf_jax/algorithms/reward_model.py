"""Reward models from comparisons of K answers (Ziegler et al. 2019; K = 2: Bradley-Terry), or from target scores.

The model is a ``score_fn(params, tokens [B, T], attention_mask [B, T], key) -> scores [B]``; the answers of a
comparison are scored as rows of one batch [B * K, T].
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import losses, ops
from rlhf_jax.algorithms.step import gradient_step, part_key
from rlhf_jax.ops import AxisName
from rlhf_jax.types import Comparisons, Metrics, Params, ScoreFn, TrainState


@dataclass(frozen=True)
class Config:
    """Reward model."""

    centering: float = 0.0
    """Weight of the squared sum of a pair's scores, which pulls scores towards 0; pairs only."""
    num_microbatches: int = 1
    """Parts of a batch that are run one after the other to save memory; the gradient does not change."""


class _Weights(NamedTuple):
    """What each loss and each comparison counts for; 0 where there is nothing to count."""

    loss: jax.Array  # [B], of comparisons; [B, K] of answers with targets
    compared: jax.Array  # [B], of comparisons with a second answer


def loss(
    params: Params,
    comparisons: Comparisons,
    key: jax.Array | None,
    *,
    score_fn: ScoreFn,
    config: Config,
    denominator: jax.Array | None = None,
    minibatch: Comparisons | None = None,
    axis_name: AxisName | None = None,
) -> tuple[jax.Array, Metrics]:
    """The weighted mean of ``losses.comparison`` over rows or, with ``targets``, of squared errors over answers.

    Answers with an empty response mask are absent: they enter as -inf and have no target. Rows whose best answer is
    absent count nowhere. Weights are relative: the loss divides by their sum.

    Args:
      comparisons: [B, K, T]; ``best`` None means answer 0.
      key: of dropout; None turns it off.
      denominator: what the loss divides by, if not the sum of the weights of ``minibatch``.
      minibatch: the batch that ``comparisons`` is a microbatch of; None: ``comparisons`` itself. Loss and metrics
        divide by its weights, so that those of its microbatches add up.
      axis_name: the mapped axis over which the batch is spread; loss and metrics are then global.

    Returns:
      The loss [] and the metrics ``reward_model/loss`` and, of comparisons, ``reward_model/accuracy`` (ties count half)
      and ``reward_model/margin``, the best answer's score minus the highest other, both over rows with at least two
      answers.

    Raises:
      ValueError: arrays that are not [B, K, T], a single answer without targets, or centering with K other than 2.
    """
    ops.check_rank(3, tokens=comparisons.tokens)
    batch, num_answers, length = comparisons.tokens.shape
    if comparisons.targets is None and num_answers < 2:
        raise ValueError(f"a comparison needs at least 2 answers, got tokens {comparisons.tokens.shape} and no targets")
    weights = _weights(comparisons)
    whole = weights if minibatch is None else _weights(minibatch)

    tokens = comparisons.tokens.reshape(batch * num_answers, length)
    attention_mask = comparisons.attention_mask.reshape(batch * num_answers, length)
    scores = score_fn(params, tokens, attention_mask, key).reshape(batch, num_answers)
    present = _present(comparisons)

    def mean(x: jax.Array, weight: jax.Array, divide_by: jax.Array) -> jax.Array:
        return ops.psum(jnp.sum(jnp.where(weight > 0, weight * x, 0.0)), axis_name) / divide_by

    def total(weight: jax.Array) -> jax.Array:
        weight = ops.psum(jnp.sum(weight), axis_name)
        return jnp.where(weight > 0, weight, 1.0)

    if denominator is None:
        denominator = total(whole.loss)
    if comparisons.targets is not None:
        errors = losses.regression(jnp.where(present, scores, 0.0), jnp.where(present, comparisons.targets, 0.0))
        value = mean(errors, weights.loss, denominator)
        return value, {"reward_model/loss": value}

    best = _best(comparisons)
    entered = jnp.where(present, scores, -jnp.inf)
    value = mean(losses.comparison(entered, best, comparisons.margin, config.centering), weights.loss, denominator)
    is_best = jnp.arange(num_answers)[None, :] == best[:, None]
    others = jnp.max(jnp.where(is_best, -jnp.inf, entered), axis=1)
    margin = jnp.take_along_axis(entered, best[:, None], axis=1)[:, 0] - others
    margin = jax.lax.stop_gradient(jnp.where(weights.compared > 0, margin, 0.0))
    compared = total(whole.compared)
    return value, {
        "reward_model/loss": value,
        "reward_model/accuracy": mean(0.5 * (1.0 + jnp.sign(margin)), weights.compared, compared),
        "reward_model/margin": mean(margin, weights.compared, compared),
    }


def update(
    state: TrainState,
    comparisons: Comparisons,
    key: jax.Array | None,
    *,
    score_fn: ScoreFn,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: AxisName | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on comparisons [B, K, T]. Metrics: those of ``loss``, and ``loss``, ``grad_norm``,
    ``nonfinite``.

    Args:
      key: of dropout, another for each microbatch; None turns it off.

    Raises:
      ValueError: as ``loss``; or ``num_microbatches`` does not divide B.
    """

    def loss_fn(params: Params, part: tuple[Comparisons, jax.Array]) -> tuple[jax.Array, Metrics]:
        rows, row_numbers = part
        return loss(
            params,
            rows,
            part_key(key, row_numbers, axis_name),
            score_fn=score_fn,
            config=config,
            minibatch=comparisons,
            axis_name=axis_name,
        )

    return gradient_step(
        loss_fn,
        state,
        optimizer,
        batch=(comparisons, jnp.arange(comparisons.tokens.shape[0])),
        num_microbatches=config.num_microbatches,
        axis_name=axis_name,
    )


def _present(comparisons: Comparisons) -> jax.Array:
    """[B, K], where there is an answer."""
    return jnp.any(comparisons.response_mask != 0, axis=2)


def _best(comparisons: Comparisons) -> jax.Array:
    """[B] int32."""
    if comparisons.best is None:
        return jnp.zeros(comparisons.tokens.shape[0], jnp.int32)
    return jnp.asarray(comparisons.best)


def _weights(comparisons: Comparisons) -> _Weights:
    present = _present(comparisons)
    batch = present.shape[0]
    weight = jnp.ones(batch, jnp.float32) if comparisons.weight is None else comparisons.weight.astype(jnp.float32)
    if comparisons.targets is not None:
        return _Weights(loss=jnp.where(present, weight[:, None], 0.0), compared=jnp.zeros(batch))
    usable = jnp.take_along_axis(present, _best(comparisons)[:, None], axis=1)[:, 0]
    several = jnp.sum(present, axis=1) > 1
    return _Weights(loss=jnp.where(usable, weight, 0.0), compared=jnp.where(usable & several, weight, 0.0))
