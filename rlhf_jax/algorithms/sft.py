"""Supervised fine-tuning: the mean negative log-likelihood of response tokens.

Column t of every [B, T] array speaks of ``tokens[:, t]``. Prompt tokens are learnt only if the response mask has them.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import losses, ops
from rlhf_jax.algorithms.step import constrained, gradient_step
from rlhf_jax.types import AxisName, Demonstrations, Mean, Metrics, Params, Parts, PolicyFn, TrainState


@dataclass(frozen=True)
class Config:
    """Supervised fine-tuning."""

    num_microbatches: int = 1
    """Parts of a batch that are run one after the other to save memory; the gradient does not change."""
    aggregate: Literal["token", "sequence", "sum"] = "token"
    """What the loss averages: tokens, rows' token means, or rows' sums."""

    def __post_init__(self) -> None:
        ops.check_number("num_microbatches", self.num_microbatches, at_least=1)
        losses.check_aggregation(self.aggregate, None)


def loss(
    params: Params, batch: Demonstrations, key: jax.Array | None, *, policy_fn: PolicyFn, config: Config
) -> tuple[Mean, Parts]:
    """The loss in nats, and the metric ``sft/loss``.

    Args:
      batch: tokens, attention_mask, response_mask [B, T]; a row with an empty response mask counts nowhere.
      key: of dropout; None turns it off.
    """
    output = ops.evaluate(policy_fn, params, batch, key)
    per_token = losses.cross_entropy(output.log_probs, batch.response_mask)
    mean = losses.aggregate(per_token, batch.response_mask, config.aggregate)
    return mean, {"sft/loss": mean}


def update(
    state: TrainState,
    batch: Demonstrations,
    key: jax.Array | None,
    *,
    policy_fn: PolicyFn,
    optimizer: optax.GradientTransformation,
    config: Config,
    axis_name: AxisName | None = None,
    minibatch_sharding: Any = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on a batch [B, T].

    Args:
      key: of dropout, another for each microbatch; None turns it off.

    Returns:
      The new state; the metrics of ``loss``, ``gradient_step``'s, and ``sft/tokens``, response tokens of the batch.
    """

    def loss_fn(params: Params, part: Demonstrations, part_key: jax.Array | None = None) -> tuple[Mean, Parts]:
        return loss(params, part, part_key, policy_fn=policy_fn, config=config)

    state, metrics = gradient_step(
        loss_fn,
        state,
        optimizer,
        batch=constrained(batch, minibatch_sharding),
        key=key,
        num_microbatches=config.num_microbatches,
        axis_name=axis_name,
    )
    tokens = ops.psum(jnp.sum(batch.response_mask != 0, dtype=jnp.float32), axis_name)
    return state, {**metrics, "sft/tokens": tokens}
