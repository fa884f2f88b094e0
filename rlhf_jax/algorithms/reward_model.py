"""Reward models from comparisons of K answers (Ziegler et al. 2019; K = 2: Bradley-Terry), from
target scores, or from labels of the steps of an answer.

The model is a ``score_fn(params, tokens [B, T], attention_mask [B, T], key) -> scores [B]``; the
answers of a comparison are scored as rows of one batch [B * K, T].
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax import losses, ops
from rlhf_jax.algorithms.step import batch_updater
from rlhf_jax.types import (
    Comparisons,
    Demonstrations,
    DropoutKey,
    LossAndMetrics,
    LossMetrics,
    Params,
    PolicyFn,
    ScoreFn,
    known,
)


@dataclass(frozen=True)
class Config:
    """Reward model."""

    centering: float = 0.0
    """Weight of the squared sum of a pair's scores, which pulls scores towards 0; pairs only."""
    sft_coef: float = 0.0
    """Weight of the best answers' negative log-likelihood per token, which is added to the loss, so
    that the body stays a language model; comparisons only."""
    num_microbatches: int = 1
    """Parts of a batch that are run one after the other to save memory; the gradient does not
    change.
    """
    router_aux_coef: float | None = None
    """Weight of the loss that keeps the experts of a mixture equally busy; 0: a metric alone; null:
    not computed."""

    def __post_init__(self) -> None:
        ops.check_number("router_aux_coef", self.router_aux_coef, at_least=0)
        ops.check_numbers(self, "centering", "sft_coef", at_least=0)


def answer_scores(
    score_fn: Any, params: Params, comparisons: Comparisons | Demonstrations, key: DropoutKey = None
) -> Array:
    """Scores [B, K] of the answers, by a ScoreFn; of packed ones [B, C, K], by one that takes
    ``documents`` too. Of solutions the scores [B, T] of a ``models.score_fn`` with ``at_tokens``.
    """
    tokens = comparisons.tokens
    mask = comparisons.attention_mask
    are_steps = isinstance(comparisons, Demonstrations)
    documents = getattr(comparisons, "documents", None)
    if documents is not None:
        numbers = documents.reshape(len(documents), -1)
        return score_fn(params, tokens, mask, key, numbers).reshape(documents.shape)
    chex.assert_rank(tokens, 2 if are_steps else 3)
    rows = tokens.reshape(-1, tokens.shape[-1])
    scores = score_fn(params, rows, mask.reshape(rows.shape), key)
    if scores.shape != (rows.shape if are_steps else rows.shape[:1]):
        raise ValueError(
            f"score_fn gives scores {scores.shape} of rows {rows.shape}: Demonstrations with marks "
            "of steps need one of each token, models.score_fn(model, at_tokens=True), Comparisons "
            "one of each row"
        )
    return scores.reshape(tokens.shape if are_steps else tokens.shape[:2])


def loss(
    params: Params,
    comparisons: Comparisons | Demonstrations,
    key: DropoutKey,
    *,
    score_fn: ScoreFn,
    config: Config,
    policy_fn: PolicyFn | None = None,
) -> LossAndMetrics:
    """The weighted mean of ``losses.comparison`` over rows or, with ``targets``, of squared errors
    over answers.

    Of solutions, for a process reward model (Lightman et al. 2023, "Let's Verify Step by Step",
    arXiv 2305.20050; Wang et al. 2024, "Math-Shepherd", arXiv 2312.08935), the mean over steps of
    the binary cross-entropy in nats: the sigmoid of a score is the probability that the step that
    ends there is right. With the answer as one step it is an outcome reward model.

    Answers with an empty response mask are missing: they enter as -inf and have no target. Rows
    whose best answer is missing count neither in the loss nor in the metrics. Weights are relative:
    the loss divides by their sum.

    Args:
      comparisons: [B, K, T], or packed [B, T]; ``best`` None means answer 0. Solutions are
        Demonstrations whose ``response_mask`` is 2 at the last token of a right step, 1 at that of
        a wrong one, else 0.
      key: of dropout of the scores; None turns it off.
      policy_fn: of the same parameters; ``config.sft_coef`` needs it (Yang et al. 2024, arXiv
        2406.10216).

    Returns:
      The loss and the metrics ``reward_model/loss`` and, of comparisons, ``reward_model/accuracy``
      (ties count half) and ``reward_model/margin``, the best answer's score minus the highest
      other, both over rows with at least two answers. With ``sft_coef`` the loss is two means, and
      ``reward_model/sft_loss`` the second before its weight: nats per token of the best answers.
    """
    scores = answer_scores(score_fn, params, comparisons, key)
    if isinstance(comparisons, Demonstrations):
        marks = known(comparisons.response_mask)
        if marks is not None and np.max(marks) == 1:
            several = marks[np.sum(marks, axis=1) > 1]
            if len(several) and np.all(np.any(several[:, 1:] * several[:, :-1], axis=1)):
                raise ValueError(
                    "response_mask marks whole responses, as for SFT: mark the last token of each "
                    "step alone, by 2 if the step is right and 1 if it is wrong"
                )
        is_end = comparisons.mask
        signed = ops.masked(jnp.where(comparisons.response_mask == 2, scores, -scores), is_end)
        mean = losses.aggregate(-jax.nn.log_sigmoid(signed), is_end)
        accuracy = losses.aggregate(0.5 * (1.0 + jnp.sign(ops.frozen(signed))), is_end)
        return mean, {"reward_model/loss": mean, "reward_model/accuracy": accuracy}
    lengths = ops.response_sums(jnp.ones_like(comparisons.tokens), comparisons)
    likelihoods = None
    if not ops.is_zero(config.sft_coef):
        if policy_fn is None:
            raise ValueError(
                "sft_coef needs a policy_fn, the log-probabilities of the same parameters"
            )
        if comparisons.targets is not None:
            raise ValueError("sft_coef: target scores name no best answer; leave it out")
        likelihoods = ops.response_log_probs(policy_fn, params, comparisons)
    fields = (comparisons.best, comparisons.targets, comparisons.weight, comparisons.margin)
    parts = (scores, lengths, likelihoods, *fields)
    if comparisons.documents is not None:
        parts = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)  # [B * C, ...]
    scores, lengths, likelihoods, best, targets, weight, margin = parts
    present = lengths > 0
    num_rows, num_answers = scores.shape
    weight = losses.row_weights(weight, present=jnp.ones(num_rows, bool))
    if targets is not None:
        errors = losses.regression(ops.masked(scores, present), ops.masked(targets, present))
        mean = losses.weighted_mean(errors, ops.masked(weight[:, None], present))
        return mean, {"reward_model/loss": mean}
    if num_answers < 2:
        raise ValueError(
            f"a comparison needs at least 2 answers, got tokens {comparisons.tokens.shape} and no "
            "targets"
        )
    best = ops.best_of(best, jnp.any(present, axis=1), num_answers)
    entered = jnp.where(present, scores, -jnp.inf)
    per_row = losses.comparison(entered, best, margin, config.centering)
    is_best = jnp.arange(num_answers)[None, :] == best[:, None]
    chosen = jnp.max(jnp.where(is_best, entered, -jnp.inf), axis=1)
    other = jnp.max(jnp.where(is_best, -jnp.inf, entered), axis=1)
    usable = chosen != -jnp.inf
    mean = losses.weighted_mean(per_row, ops.masked(weight, usable))
    compared = ops.masked(weight, usable & (other != -jnp.inf))
    margin = ops.frozen(ops.masked(chosen - other, compared))
    right = 0.5 * (1.0 + jnp.sign(margin))
    metrics: LossMetrics = {
        "reward_model/loss": mean,
        "reward_model/accuracy": losses.weighted_mean(right, compared),
        "reward_model/margin": losses.weighted_mean(margin, compared),
    }
    if likelihoods is None:
        return mean, metrics
    of_best = partial(jnp.take_along_axis, indices=best[:, None], axis=1)
    nll, tokens = of_best(-likelihoods)[:, 0], of_best(lengths)[:, 0]
    counts = weight * tokens  # a mean over the tokens of the best answers, not over answers
    sft = losses.weighted_mean(nll / jnp.maximum(tokens, 1), counts)
    return (mean, config.sft_coef * sft), metrics | {"reward_model/sft_loss": sft}


update = batch_updater(loss)
"""See ``step.batch_updater``; of comparisons [B, K, T], or packed ones, or solutions [B, T]."""
