"""Direct preference optimisation (Rafailov et al. 2023) and its relatives: a policy from pairs,
without sampling.

The implicit reward of an answer is ``beta * (log p(answer) - log p_reference(answer))``, summed
over its response tokens. The losses of the two answers are ``losses.dpo``. SimPO (Meng et al. 2024)
and ORPO (Hong et al. 2024) have no reference and take the mean over response tokens in place of the
sum, as length-normalised DPO does (Lambert et al. 2024, "Tulu 3", section 5.1.2).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import chex
import jax.numpy as jnp
from jax import Array

from rlhf_jax import losses, ops, policies
from rlhf_jax.algorithms.step import batch_updater
from rlhf_jax.types import (
    BoundPolicyFn,
    Comparisons,
    DropoutKey,
    Feedback,
    LossAndMetrics,
    LossMetrics,
    Params,
    PolicyFn,
    PolicyOutput,
)

Batch = TypeVar("Batch", Comparisons, Feedback)
TIE = 1e-4  # nats: such differences of two log-ratios are rounding


@dataclass(frozen=True)
class Config:
    """Direct preference optimisation."""

    beta: float = 0.1
    """Reward per nat of log-ratio: the larger, the nearer to the reference the policy stays."""
    kind: losses.DPOKind = "sigmoid"
    """The loss of the two answers' rewards; simpo and orpo use no reference. Of orpo, beta weighs
    the odds ratio.
    """
    label_smoothing: float = 0.0
    """Share of labels taken to be flipped, below 0.5; sigmoid, robust and simpo only."""
    gamma: float = 0.0
    """Margin by which the chosen answer's reward should be the larger; simpo only."""
    length_normalised: bool = False
    """Divide the log-ratio of an answer by its tokens; simpo and orpo always do."""
    sft_coef: float = 0.0
    """Weight of the chosen answers' negative log-likelihood per token, which is added to the loss
    (TRL: rpo_alpha)."""
    num_microbatches: int = 1
    """Parts of a batch that are run one after the other to save memory; the gradient does not
    change.
    """
    router_aux_coef: float | None = None
    """Weight of the loss that keeps the experts of a mixture equally busy; 0: a metric alone; null:
    not computed."""

    def __post_init__(self) -> None:
        ops.check_number("router_aux_coef", self.router_aux_coef, at_least=0)
        losses.check_dpo(self.kind, label_smoothing=self.label_smoothing, gamma=self.gamma)
        ops.check_numbers(self, "beta", above=0)
        ops.check_numbers(self, "sft_coef", at_least=0)
        if self.kind == "orpo" and not ops.is_zero(self.sft_coef):
            raise ValueError("sft_coef: the kind orpo has such a term already; leave it out")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads ``comparisons.ref_log_probs``."""
        return self.kind not in ("simpo", "orpo")


def with_reference(batch: Batch, ref_fn: BoundPolicyFn) -> Batch:
    """The answers with ``ref_log_probs`` [B, K]: nats under the reference, summed over the
    response; 0 for a missing answer.

    Args:
      batch: comparisons [B, K, T], any K, or packed ones, [B, C, K] results; or feedback [B, T].
      ref_fn: carries its parameters, ``jax.tree_util.Partial(policy_fn, ref_params)``.
    """
    of_no_params = policies.wrap(_without_params, ref_fn)
    ref_log_probs = ops.response_log_probs(of_no_params, None, batch, name="ref_fn")
    return replace(batch, ref_log_probs=ref_log_probs)


def _without_params(ref_fn: BoundPolicyFn, _: None, *inputs: Any, **more: Any) -> PolicyOutput:
    return ref_fn(*inputs, **more)


def loss(
    params: Params,
    comparisons: Comparisons,
    key: DropoutKey,
    *,
    policy_fn: PolicyFn,
    config: Config,
) -> LossAndMetrics:
    """The weighted mean of ``losses.dpo`` over pairs whose two answers are both present.

    Weights are relative: the loss divides by their sum. A ``margin``, which is a reward model's, is
    a ValueError.

    Args:
      comparisons: [B, 2, T] with ``ref_log_probs`` [B, 2], which are not read if the config needs
        no reference; ``best`` (0 or 1) is the chosen answer, None means 0. Or packed ones, with
        ``ref_log_probs`` [B, C, 2].
      key: unused: dropout is off, as in the reference's log-probs.

    Returns:
      The loss and the metrics ``dpo/loss``, ``dpo/accuracy`` (pairs whose chosen answer has the
      larger implicit reward; ties count half, with a reference differences up to ``TIE`` too),
      ``dpo/margin`` (difference of implicit rewards, chosen - rejected: beta * nats),
      ``dpo/chosen_log_ratio`` and ``dpo/rejected_log_ratio`` (nats, policy - reference; without a
      reference the policy's own; per token if the config divides by the length). With ``sft_coef``
      the loss is two means, and ``dpo/sft_loss`` the second one before the weight: nats per token
      of the chosen answers.
    """
    log_probs = ops.response_log_probs(policy_fn, params, comparisons)
    return pair_loss(log_probs, comparisons, config)


def pair_loss(log_probs: Array, comparisons: Comparisons, config: Config) -> LossAndMetrics:
    """``loss`` of answers whose log-probabilities under the policy are known, [B, 2] or [B, C,
    2]."""
    chex.assert_shape(log_probs, (..., 2))  # a ranking is several pairs
    if comparisons.margin is not None:
        raise ValueError("comparisons.margin is a reward model's: leave it out; simpo has gamma")
    log_ratios = log_probs
    if config.needs_reference:
        if comparisons.ref_log_probs is None:
            raise ValueError(
                "comparisons.ref_log_probs is needed, got None: dpo.with_reference makes them"
            )
        chex.assert_equal_shape([log_ratios, comparisons.ref_log_probs])
        log_ratios = log_ratios - comparisons.ref_log_probs
    lengths = ops.response_sums(jnp.ones_like(comparisons.tokens), comparisons)
    if config.length_normalised or not config.needs_reference:
        log_ratios = log_ratios / jnp.maximum(lengths, 1)
    # What does not count must not reach the loss.
    present = jnp.all(lengths > 0, axis=-1)  # [B] or [B, C]
    weight = losses.row_weights(comparisons.weight, present=present)
    log_ratios = losses.readable(log_ratios, weight[..., None])
    best = ops.best_of(comparisons.best, present, 2)
    order = jnp.stack([best, 1 - best], axis=-1)
    chosen, rejected = _in_order(log_ratios, order)
    per_pair = losses.dpo(
        chosen,
        rejected,
        config.beta,
        kind=config.kind,
        label_smoothing=config.label_smoothing,
        gamma=config.gamma,
    )
    mean = partial(losses.weighted_mean, weight=weight)
    loss = mean(per_pair)
    metrics: LossMetrics = {
        "dpo/loss": loss,
        "dpo/accuracy": mean(_wins(chosen - rejected, TIE if config.needs_reference else 0.0)),
        "dpo/margin": mean(config.beta * (chosen - rejected)),
        "dpo/chosen_log_ratio": mean(chosen),
        "dpo/rejected_log_ratio": mean(rejected),
    }
    if ops.is_zero(config.sft_coef):
        return loss, metrics
    likelihood, _ = _in_order(log_probs, order)
    tokens, _ = _in_order(lengths, order)
    # A mean over the tokens of the chosen answers, not over answers.
    nll = losses.weighted_mean(-likelihood / jnp.maximum(tokens, 1), weight * tokens)
    return (loss, config.sft_coef * nll), metrics | {"dpo/sft_loss": nll}


def _in_order(values: Array, order: Array) -> tuple[Array, Array]:
    """The values [..., 2] of the chosen answers and of the rejected ones."""
    ordered = jnp.take_along_axis(values, order, axis=-1)
    return ordered[..., 0], ordered[..., 1]


def _wins(difference: Array, tie: float) -> Array:
    """1 where a difference is positive, 0.5 where it is at most ``tie``, the rounding of log-ratios
    to a reference: before training a policy with fresh adapters equals its reference up to that.
    """
    is_tie = jnp.abs(difference) <= tie
    return jnp.where(is_tie, 0.5, 0.5 * (1.0 + jnp.sign(difference)))


update = batch_updater(loss)
"""See ``step.batch_updater``; of comparisons [B, 2, T], or packed ones, with ``ref_log_probs``. The
key is not used.
"""
