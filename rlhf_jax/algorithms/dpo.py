"""Direct preference optimisation (Rafailov et al. 2023) and its relatives: a policy from pairs, without sampling.

The implicit reward of an answer is ``beta * (log p(answer) - log p_reference(answer))``, summed over its response
tokens. The losses on the difference between the two answers are ``losses.dpo``.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import losses, ops
from rlhf_jax.algorithms.step import gradient_step
from rlhf_jax.ops import AxisName
from rlhf_jax.types import BoundPolicyFn, Comparisons, Metrics, Params, PolicyFn, TrainState


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


def check_config(config: Config) -> None:
    """Raises ValueError for values that no run can use."""
    losses.check_dpo(config.kind, config.label_smoothing)
    if config.beta <= 0:
        raise ValueError(f"beta must be above 0, got {config.beta}")


def with_reference(comparisons: Comparisons, ref_fn: BoundPolicyFn) -> Comparisons:
    """The comparisons with ``ref_log_probs`` [B, K]: nats under the reference, summed over the response; 0 if absent.

    Args:
      comparisons: [B, K, T], any K. All B * K answers go through ``ref_fn`` at once.
      ref_fn: carries its parameters, ``jax.tree_util.Partial(policy_fn, ref_params)``.

    Raises:
      ValueError: arrays that are not one [B, K, T].
    """
    tokens, attention_mask = _answers(comparisons)
    output = ref_fn(tokens, attention_mask, None)
    return dataclasses.replace(comparisons, ref_log_probs=_response_sums(comparisons, output.log_probs))


def loss(
    params: Params,
    comparisons: Comparisons,
    key: jax.Array | None,
    *,
    policy_fn: PolicyFn,
    config: Config,
    denominator: jax.Array | None = None,
    minibatch: Comparisons | None = None,
    axis_name: AxisName | None = None,
) -> tuple[jax.Array, Metrics]:
    """The weighted mean of ``losses.dpo`` over pairs whose two answers are both present.

    Weights are relative: the loss divides by their sum. ``margin`` is a reward model's and is not read.

    Args:
      comparisons: [B, 2, T] with ``ref_log_probs`` [B, 2]; ``best`` (0 or 1) is the chosen answer, None means 0.
      key: unused: dropout is off, as in the reference's log-probs.
      denominator: what the loss divides by, if not the sum of the weights of ``minibatch``.
      minibatch: the batch that ``comparisons`` is a microbatch of; None: ``comparisons`` itself. Loss and metrics
        divide by its weights, so that those of its microbatches add up.
      axis_name: the mapped axis over which the batch is spread; loss and metrics are then global.

    Returns:
      The loss [] and the metrics ``dpo/loss``, ``dpo/accuracy`` (pairs whose chosen answer has the larger implicit
      reward; ties count half), ``dpo/margin`` (difference of implicit rewards, chosen - rejected: beta * nats),
      ``dpo/chosen_log_ratio`` and ``dpo/rejected_log_ratio`` (nats, policy - reference).

    Raises:
      ValueError: arrays that are not one [B, 2, T], no ``ref_log_probs`` [B, 2], or an unusable config value.
    """
    del key
    check_config(config)
    tokens, attention_mask = _answers(comparisons)
    if comparisons.tokens.shape[1] != 2:
        raise ValueError(
            f"dpo needs pairs, [B, K, T] with K = 2, got tokens {comparisons.tokens.shape}; make pairs of rankings"
        )
    if comparisons.ref_log_probs is None:
        raise ValueError("comparisons.ref_log_probs [B, 2] is needed, got None: dpo.with_reference makes them")
    ops.check_same_shape(ref_log_probs=comparisons.ref_log_probs, one_column_of_tokens=comparisons.tokens[:, :, 0])
    weight = _weights(comparisons)
    whole_weight = weight if minibatch is None else _weights(minibatch)

    def mean(x: jax.Array, divide_by: jax.Array) -> jax.Array:
        return ops.psum(jnp.sum(jnp.where(weight > 0, weight * x, 0.0)), axis_name) / divide_by

    total = ops.psum(jnp.sum(whole_weight), axis_name)
    total = jnp.where(total > 0, total, 1.0)

    output = policy_fn(params, tokens, attention_mask, None)
    log_ratios = _response_sums(comparisons, output.log_probs) - comparisons.ref_log_probs
    log_ratios = jnp.where(weight[:, None] > 0, log_ratios, 0.0)  # what does not count must not reach the loss
    if comparisons.best is None:
        best = jnp.zeros((comparisons.tokens.shape[0], 1), jnp.int32)
    else:
        best = jnp.asarray(comparisons.best)[:, None]
    chosen = jnp.take_along_axis(log_ratios, best, axis=1)[:, 0]
    rejected = jnp.take_along_axis(log_ratios, 1 - best, axis=1)[:, 0]
    per_pair = losses.dpo(chosen, rejected, config.beta, config.kind, config.label_smoothing)
    value = mean(per_pair, total if denominator is None else denominator)
    chosen, rejected = jax.lax.stop_gradient((chosen, rejected))
    return value, {
        "dpo/loss": value,
        "dpo/accuracy": mean(0.5 * (1.0 + jnp.sign(chosen - rejected)), total),
        "dpo/margin": mean(config.beta * (chosen - rejected), total),
        "dpo/chosen_log_ratio": mean(chosen, total),
        "dpo/rejected_log_ratio": mean(rejected, total),
    }


def update(
    state: TrainState,
    comparisons: Comparisons,
    key: jax.Array | None,
    *,
    policy_fn: PolicyFn,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: AxisName | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on comparisons [B, 2, T] with ``ref_log_probs``. Metrics: those of ``loss``, and ``loss``,
    ``grad_norm``, ``nonfinite``.

    Raises:
      ValueError: as ``loss``; or ``num_microbatches`` does not divide B.
    """

    def loss_fn(params: Params, part: Comparisons) -> tuple[jax.Array, Metrics]:
        return loss(params, part, key, policy_fn=policy_fn, config=config, minibatch=comparisons, axis_name=axis_name)

    return gradient_step(
        loss_fn,
        state,
        optimizer,
        batch=comparisons,
        num_microbatches=config.num_microbatches,
        axis_name=axis_name,
    )


def _answers(comparisons: Comparisons) -> tuple[jax.Array, jax.Array]:
    """Tokens and attention mask of the answers as rows of one batch [B * K, T]."""
    ops.check_rank(3, tokens=comparisons.tokens)
    ops.check_same_shape(
        tokens=comparisons.tokens,
        attention_mask=comparisons.attention_mask,
        response_mask=comparisons.response_mask,
    )
    length = comparisons.tokens.shape[2]
    return comparisons.tokens.reshape(-1, length), comparisons.attention_mask.reshape(-1, length)


def _response_sums(comparisons: Comparisons, log_probs: jax.Array) -> jax.Array:
    """[B * K, T] summed over each response: [B, K] float32."""
    log_probs = jnp.asarray(log_probs, jnp.float32).reshape(comparisons.tokens.shape)
    return jnp.sum(jnp.where(comparisons.response_mask != 0, log_probs, 0.0), axis=2)


def _weights(comparisons: Comparisons) -> jax.Array:
    """[B], what each pair counts for; 0 where an answer is absent."""
    pair = jnp.all(jnp.any(comparisons.response_mask != 0, axis=2), axis=1)
    weight = 1.0 if comparisons.weight is None else jnp.asarray(comparisons.weight, jnp.float32)
    return jnp.where(pair, weight, 0.0)
