"""Supervised fine-tuning: the mean negative log-likelihood of response tokens.

Column t of every [B, T] array belongs to ``tokens[:, t]``. Prompt tokens are learnt only if the
response mask has them.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from rlhf_jax import losses, ops
from rlhf_jax.algorithms.step import batch_updater
from rlhf_jax.types import (
    AxisName,
    Demonstrations,
    DropoutKey,
    LossAndMetrics,
    Metrics,
    Params,
    PolicyFn,
)


@dataclass(frozen=True)
class Config:
    """Supervised fine-tuning."""

    num_microbatches: int = 1
    """Parts of a batch that are run one after the other to save memory; the gradient does not
    change.
    """
    router_aux_coef: float | None = None
    """Weight of the loss that keeps the experts of a mixture equally busy; 0: a metric alone; null:
    not computed."""
    aggregate: Literal["token", "sequence", "sum"] = "token"
    """What the loss averages: tokens, rows' token means, or rows' sums."""
    needs_reference = False  # no setting: what a run prepares for the loss

    def __post_init__(self) -> None:
        ops.check_number("router_aux_coef", self.router_aux_coef, at_least=0)
        losses.check_aggregation(self.aggregate, None)


def loss(
    params: Params, batch: Demonstrations, key: DropoutKey, *, policy_fn: PolicyFn, config: Config
) -> LossAndMetrics:
    """The loss in nats, and the metric ``sft/loss``.

    Args:
      batch: tokens, attention_mask, response_mask [B, T]; a row with an empty response mask counts
        nowhere.
      key: of dropout; None turns it off.
    """
    output = ops.evaluate(policy_fn, params, batch, key)
    per_token = losses.cross_entropy(output.log_probs, batch.response_mask)
    mean = losses.aggregate(per_token, batch.response_mask, config.aggregate)
    return mean, {"sft/loss": mean}


def _num_tokens(batch: Demonstrations, axis_name: AxisName) -> Metrics:
    num_tokens = jnp.sum(batch.mask, dtype=jnp.float32)
    return {"sft/tokens": ops.psum(num_tokens, axis_name)}


update = batch_updater(loss, _num_tokens)
"""See ``step.batch_updater``; of a batch [B, T]. Another metric is ``sft/tokens``, response tokens
of the batch.
"""
