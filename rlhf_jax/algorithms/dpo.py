"""Direct preference optimisation (Rafailov et al. 2023) and its relatives: a policy from pairs, without sampling.

The implicit reward of an answer is ``beta * (log p(answer) - log p_reference(answer))``, summed over its response
tokens. The losses on the difference between the two answers are ``losses.dpo``.
"""

import dataclasses
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp

from rlhf_jax import losses, ops
from rlhf_jax.algorithms.step import batch_updater
from rlhf_jax.types import BoundPolicyFn, Comparisons, Mean, Params, Parts, PolicyFn


@dataclass(frozen=True)
class Config:
    """Direct preference optimisation."""

    beta: float = 0.1
    """Reward per nat of log-ratio: the larger, the nearer to the reference the policy stays."""
    kind: losses.DPOKind = "sigmoid"
    """The loss on the difference between the two answers' rewards."""
    label_smoothing: float = 0.0
    """Share of labels taken to be flipped, below 0.5; sigmoid and robust only."""
    num_microbatches: int = 1
    """Parts of a batch that are run one after the other to save memory; the gradient does not change."""

    def __post_init__(self) -> None:
        losses.check_dpo(self.kind, self.label_smoothing)
        ops.check_number("beta", self.beta, above=0)
        ops.check_number("num_microbatches", self.num_microbatches, at_least=1)


def with_reference(comparisons: Comparisons, ref_fn: BoundPolicyFn) -> Comparisons:
    """The comparisons with ``ref_log_probs`` [B, K]: nats under the reference, summed over the response; 0 if absent.

    Args:
      comparisons: [B, K, T], any K.
      ref_fn: carries its parameters, ``jax.tree_util.Partial(policy_fn, ref_params)``.
    """
    ref_log_probs = ops.response_log_probs(lambda _, *batch: ref_fn(*batch), None, comparisons)
    return dataclasses.replace(comparisons, ref_log_probs=ref_log_probs)


def loss(
    params: Params, comparisons: Comparisons, key: jax.Array | None, *, policy_fn: PolicyFn, config: Config
) -> tuple[Mean, Parts]:
    """The weighted mean of ``losses.dpo`` over pairs whose two answers are both present.

    Weights are relative: the loss divides by their sum. ``margin`` is a reward model's and is not read.

    Args:
      comparisons: [B, 2, T] with ``ref_log_probs`` [B, 2]; ``best`` (0 or 1) is the chosen answer, None means 0.
      key: unused: dropout is off, as in the reference's log-probs.

    Returns:
      The loss and the metrics ``dpo/loss``, ``dpo/accuracy`` (pairs whose chosen answer has the larger implicit
      reward; ties count half), ``dpo/margin`` (difference of implicit rewards, chosen - rejected: beta * nats),
      ``dpo/chosen_log_ratio`` and ``dpo/rejected_log_ratio`` (nats, policy - reference).
    """
    del key
    chex.assert_rank(comparisons.tokens, 3)
    batch, num_answers, _ = comparisons.tokens.shape
    if num_answers != 2:
        raise ValueError(
            f"dpo needs pairs, [B, K, T] with K = 2, got tokens {comparisons.tokens.shape}; make pairs of rankings"
        )
    if comparisons.ref_log_probs is None:
        raise ValueError("comparisons.ref_log_probs [B, 2] is needed, got None: dpo.with_reference makes them")
    chex.assert_shape(comparisons.ref_log_probs, (batch, 2))
    weight = jnp.ones(batch) if comparisons.weight is None else jnp.asarray(comparisons.weight, jnp.float32)
    chex.assert_shape(weight, (batch,))
    weight = jnp.where(jnp.all(jnp.any(comparisons.response_mask != 0, axis=2), axis=1), weight, 0.0)

    log_ratios = ops.response_log_probs(policy_fn, params, comparisons) - comparisons.ref_log_probs
    log_ratios = jnp.where(weight[:, None] > 0, log_ratios, 0.0)  # what does not count must not reach the loss
    best = jnp.zeros(batch, jnp.int32) if comparisons.best is None else jnp.asarray(comparisons.best)
    chosen = jnp.take_along_axis(log_ratios, best[:, None], axis=1)[:, 0]
    rejected = jnp.take_along_axis(log_ratios, 1 - best[:, None], axis=1)[:, 0]
    per_pair = losses.dpo(chosen, rejected, config.beta, config.kind, config.label_smoothing)
    mean = losses.weighted_mean(per_pair, weight)
    return mean, {
        "dpo/loss": mean,
        "dpo/accuracy": losses.weighted_mean(0.5 * (1.0 + jnp.sign(chosen - rejected)), weight),
        "dpo/margin": losses.weighted_mean(config.beta * (chosen - rejected), weight),
        "dpo/chosen_log_ratio": losses.weighted_mean(chosen, weight),
        "dpo/rejected_log_ratio": losses.weighted_mean(rejected, weight),
    }


update = batch_updater(loss)
"""See ``step.batch_updater``; of comparisons [B, 2, T] with ``ref_log_probs``. The key is not used."""
