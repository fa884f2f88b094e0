"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024): a policy from single answers called
desirable or not.

``loss = mean of lambda_y (1 - v)`` with ``v = sigmoid(beta (l - z))`` of a desirable answer and
``v = sigmoid(beta (z - l))`` of an undesirable one (eq. 8), where ``l = log p(answer) - log
p_reference(answer)``, summed over its tokens, and z, the reference point, estimates KL(policy ||
reference) without samples: the mean of l over prompts with another row's answer, at least 0
(section 4.2). With ``kind="bco"`` it is binary classifier optimisation (Jung et al. 2024, arXiv
2404.04656): ``losses.kto`` of that kind, with the mean of l over the batch as z.
"""

from dataclasses import dataclass, replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax import losses, ops
from rlhf_jax.algorithms import dpo
from rlhf_jax.algorithms.step import batch_updater
from rlhf_jax.types import (
    AxisName,
    BoundPolicyFn,
    DropoutKey,
    Feedback,
    LossAndMetrics,
    Metrics,
    Params,
    PolicyFn,
    TrainState,
)


@dataclass(frozen=True)
class Config:
    """Kahneman-Tversky optimisation."""

    beta: float = 0.1
    """Reward per nat of log-ratio: the larger, the nearer to the reference the policy stays."""
    kind: losses.KTOKind = "kto"
    """kto: a bounded loss around an estimate of the KL; bco: the cross-entropy of a classifier of
    desirable answers around the batch's mean reward.
    """
    desirable_weight: float = 1.0
    """Weight lambda of desirable answers; raise it where they are few."""
    undesirable_weight: float = 1.0
    """Weight lambda of undesirable answers."""
    num_microbatches: int = 1
    """Parts of a batch that are run one after the other to save memory; the gradient does not
    change.
    """
    router_aux_coef: float | None = None
    """Weight of the loss that keeps the experts of a mixture equally busy; 0: a metric alone; null:
    not computed."""
    needs_reference = True  # no setting: what a run prepares for the loss

    def __post_init__(self) -> None:
        ops.check_number("router_aux_coef", self.router_aux_coef, at_least=0)
        ops.check_choice("kind", self.kind, losses.KTOKind)
        ops.check_numbers(self, "beta", above=0)
        ops.check_numbers(self, "desirable_weight", "undesirable_weight", at_least=0)


def mismatched(feedback: Feedback) -> Feedback:
    """Each row's prompt followed by the next row's response (after the last row comes the first),
    [B, T].

    A response ends at column T: pad rows so that the longest prompt and response fit. A row is
    missing if the row of its prompt or of its response is.

    Raises:
      ValueError: there is one row only, whose response would be its own.
    """
    if len(feedback.tokens) < 2:
        raise ValueError(
            "feedback: the reference point joins each prompt with another row's response, so it "
            "needs at least 2 rows, got 1"
        )
    mask = feedback.mask
    start = jnp.argmax(mask, axis=1, keepdims=True)  # [B, 1] first column of the response
    column = jnp.arange(mask.shape[1])[None, :]
    theirs = column - start + jnp.roll(start, -1, axis=0)  # [B, T] column of the next row
    present = feedback.present[:, None]
    both = present & jnp.roll(present, -1, axis=0)

    def moved(x: Array) -> Array:
        following = jnp.roll(x, -1, axis=0)
        taken = jnp.take_along_axis(following, theirs, axis=1, mode="fill", fill_value=0)
        return jnp.where(column < start, x, jnp.where(both, taken, 0))

    return Feedback(
        moved(feedback.tokens),
        moved(feedback.attention_mask),
        moved(feedback.response_mask),
        feedback.desirable,
    )


def with_reference(feedback: Feedback, ref_fn: BoundPolicyFn) -> Feedback:
    """The feedback with ``ref_log_probs`` [B] and the ``mismatched`` rows with theirs.

    Args:
      ref_fn: carries its parameters, ``jax.tree_util.Partial(policy_fn, ref_params)``.
    """
    others = dpo.with_reference(mismatched(feedback), ref_fn)
    return replace(dpo.with_reference(feedback, ref_fn), mismatched=others)


def reference_point(
    params: Params,
    feedback: Feedback,
    *,
    policy_fn: PolicyFn,
    axis_name: AxisName = None,
    kind: losses.KTOKind = "kto",
) -> Array:
    """z in nats, the same number in each row [B]: the mean log-ratio of the mismatched rows of all
    devices, at least 0 (eq. 8); of ``bco`` that of the rows themselves. It is not differentiated.
    """
    rows = feedback if kind == "bco" else feedback.mismatched
    if rows is None or rows.ref_log_probs is None:
        raise ValueError(
            "feedback.mismatched with ref_log_probs is needed: kto.with_reference makes them"
        )
    frozen = jax.lax.stop_gradient(params)
    log_probs = ops.response_log_probs(ops.by_rows(policy_fn, None), frozen, rows)
    mean = ops.masked_mean(log_probs - rows.ref_log_probs, rows.present, axis_name=axis_name)
    return jnp.full(log_probs.shape, mean if kind == "bco" else jnp.maximum(mean, 0.0))


def loss(
    params: Params, feedback: Feedback, key: DropoutKey, *, policy_fn: PolicyFn, config: Config
) -> LossAndMetrics:
    """The weighted mean of ``lambda_y * losses.kto`` over the present rows.

    Weights of rows are relative: the loss divides by their sum, without the lambdas.

    Args:
      feedback: [B, T] with ``ref_log_probs`` [B]; a ``reference_point`` of None is made from the
        mismatched rows.
      key: unused: dropout is off, as in the reference's log-probs.

    Returns:
      The loss and the metrics ``kto/loss``, ``kto/accuracy`` (desirable answers above the reference
      point and undesirable ones below; ties count half), ``kto/reference_point`` (nats),
      ``kto/desirable_log_ratio`` and ``kto/undesirable_log_ratio`` (nats, policy - reference).
    """
    if feedback.ref_log_probs is None:
        raise ValueError(
            "feedback.ref_log_probs is needed, got None: kto.with_reference makes them"
        )
    point = feedback.reference_point
    if point is None:
        point = reference_point(params, feedback, policy_fn=policy_fn, kind=config.kind)
    weight = losses.row_weights(feedback.weight, present=feedback.present)
    chex.assert_equal_shape([weight, feedback.desirable, feedback.ref_log_probs])
    desirable = jnp.asarray(feedback.desirable) != 0
    log_ratios = ops.response_log_probs(policy_fn, params, feedback) - feedback.ref_log_probs
    # What does not count must not reach the loss.
    log_ratios = losses.readable(log_ratios, weight)
    lambdas = jnp.where(desirable, config.desirable_weight, config.undesirable_weight)
    per_row = lambdas * losses.kto(
        log_ratios,
        reference_point=point,
        desirable=desirable,
        beta=config.beta,
        kind=config.kind,
    )
    side = jnp.sign(log_ratios - point) * jnp.where(desirable, 1.0, -1.0)
    mean = losses.weighted_mean(per_row, weight)
    return mean, {
        "kto/loss": mean,
        "kto/accuracy": losses.weighted_mean(0.5 * (1.0 + side), weight),
        "kto/reference_point": losses.weighted_mean(point, weight),
        "kto/desirable_log_ratio": losses.weighted_mean(log_ratios, weight * desirable),
        "kto/undesirable_log_ratio": losses.weighted_mean(log_ratios, weight * ~desirable),
    }


_step = batch_updater(loss)


def update(
    state: TrainState, feedback: Feedback, key: DropoutKey, *, policy_fn: PolicyFn, **options: Any
) -> tuple[TrainState, Metrics]:
    """One optimizer step on feedback [B, T] as ``with_reference`` makes it; see
    ``step.batch_updater``.

    The reference point is that of the whole batch, whatever its microbatches and devices. The key
    is not used.
    """
    point = reference_point(
        state.params,
        feedback,
        policy_fn=policy_fn,
        axis_name=options.get("axis_name"),
        kind=options["config"].kind,
    )
    batch = replace(feedback, mismatched=None, reference_point=point)
    return _step(state, batch, key, policy_fn=policy_fn, **options)
