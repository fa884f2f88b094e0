"""Supervised fine-tuning: the mean negative log-likelihood of response tokens.

Column t of every [B, T] array speaks of ``tokens[:, t]``. Prompt tokens are learnt only if the response mask has them.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import losses, ops
from rlhf_jax.algorithms.step import gradient_step, part_key
from rlhf_jax.ops import AxisName
from rlhf_jax.types import Demonstrations, Metrics, Params, PolicyFn, TrainState


@dataclass(frozen=True)
class Config:
    """Supervised fine-tuning."""

    num_microbatches: int = 1
    """Parts of a batch that are run one after the other to save memory; the gradient does not change."""
    aggregate: Literal["token", "sequence", "sum"] = "token"
    """What the loss averages: tokens, rows' token means, or rows' sums."""


def loss(
    params: Params,
    batch: Demonstrations,
    key: jax.Array | None,
    *,
    policy_fn: PolicyFn,
    config: Config,
    denominator: jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> tuple[jax.Array, Metrics]:
    """The loss [] in nats, and the metrics ``sft/loss`` and ``sft/tokens`` (response tokens of the global batch).

    Args:
      batch: tokens, attention_mask, response_mask [B, T]; a row with an empty response mask counts nowhere.
      key: of dropout; None turns it off.
      denominator: what the loss divides by; None: ``losses.denominator`` of this batch. Give that of the whole batch
        where ``batch`` is a microbatch.
      axis_name: the mapped axis over which the batch is spread; loss and metrics are then global.

    Raises:
      ValueError: an unknown ``aggregate``.
    """
    mask = batch.response_mask != 0  # [B, T]
    output = policy_fn(params, batch.tokens, batch.attention_mask, key)
    per_token = losses.cross_entropy(output.log_probs, mask)
    value = losses.aggregate(per_token, mask, config.aggregate, denominator=denominator, axis_name=axis_name)
    tokens = ops.psum(jnp.sum(mask, dtype=jnp.float32), axis_name)
    return value, {"sft/loss": value, "sft/tokens": tokens}


def update(
    state: TrainState,
    batch: Demonstrations,
    key: jax.Array | None,
    *,
    policy_fn: PolicyFn,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: AxisName | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on a batch [B, T]. Metrics: those of ``loss``, and ``loss``, ``grad_norm``, ``nonfinite``.

    Args:
      key: of dropout, another for each microbatch; None turns it off.

    Raises:
      ValueError: as ``loss``; or ``num_microbatches`` does not divide B.
    """
    denominator = losses.denominator(batch.response_mask, config.aggregate, axis_name=axis_name)

    def loss_fn(params: Params, part: tuple[Demonstrations, jax.Array]) -> tuple[jax.Array, Metrics]:
        rows, row_numbers = part
        return loss(
            params,
            rows,
            part_key(key, row_numbers, axis_name),
            policy_fn=policy_fn,
            config=config,
            denominator=denominator,
            axis_name=axis_name,
        )

    return gradient_step(
        loss_fn,
        state,
        optimizer,
        batch=(batch, jnp.arange(batch.tokens.shape[0])),
        num_microbatches=config.num_microbatches,
        axis_name=axis_name,
    )
