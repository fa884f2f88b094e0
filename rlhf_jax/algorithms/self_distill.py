"""Self-distillation on the policy's own samples (Shenfeld et al. 2026, "Self-Distillation Enables
Continual Learning", arXiv 2601.19897; Hübotter et al. 2026, "Reinforcement Learning via
Self-Distillation", arXiv 2601.20802): the teacher is the policy itself with another prompt, which
has a demonstration, the answer or feedback in it.

``L = mean over response tokens of KL(p || q)``, q the teacher's distribution at the same token, a
constant. Tokens beyond the teacher's ``top_k`` likeliest count as one. The papers' teacher has
averaged weights, here it has those of now.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax import losses, ops
from rlhf_jax.algorithms import policy
from rlhf_jax.types import DropoutKey, LossAndMetrics, Params, PolicyFn, Rollout


@dataclass(frozen=True)
class Config(policy.Batching):
    """Self-distillation with another prompt."""

    top_k: int = 100
    """The teacher's likeliest tokens that are compared one by one."""
    extras: ClassVar[Any] = {"teacher_tokens": "token", "teacher_mask": "token"}


def likeliest(logits: Array, *, top_k: int) -> tuple[Array, Array]:
    """[..., K] ids, and [..., K + 1] their log-probs and that of all others."""
    _, ids = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
    return ids, at_ids(logits, ids)


def at_ids(logits: Array, ids: Array) -> Array:
    """[..., K + 1] the log-probs of the ids [..., K], and that of all others."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), ids, axis=-1)
    together = jnp.minimum(jax.nn.logsumexp(chosen, axis=-1, keepdims=True), -1e-7)
    return jnp.concatenate([chosen, jnp.log(-jnp.expm1(together))], axis=-1)


def loss(
    params: Params, rollout: Rollout, key: DropoutKey, *, policy_fn: PolicyFn, config: Config
) -> LossAndMetrics:
    """The divergence, with ``policy.with_entropy``; and the metric ``distill/divergence``, nats per
    response token.

    Args:
      rollout: its extras ``teacher_tokens`` and ``teacher_mask`` [B, T] have another prompt and the
        same response, in the same columns, as ``rewards.teacher_prompts`` makes them.
    """
    present = rollout.present[:, None]
    # Extras are float32, in which ids below 2^24 are exact.
    tokens = jnp.where(present, policy.extra(rollout, "teacher_tokens"), rollout.tokens)
    attended = jnp.where(present, policy.extra(rollout, "teacher_mask"), rollout.attention_mask)
    told = replace(rollout, tokens=tokens.astype(jnp.int32), attention_mask=attended != 0)
    top = partial(likeliest, top_k=config.top_k)
    teacher = ops.evaluate(policy_fn, jax.lax.stop_gradient(params), told, statistic=top)
    ids, teacher_log_probs = teacher.statistic
    output = ops.evaluate(policy_fn, params, rollout, statistic=at_ids, arrays=(ids,))
    # Of log-probs that add up to 1 the softmax changes nothing.
    per_token = losses.divergence(output.statistic, teacher_logits=teacher_log_probs)
    per_token = ops.masked(per_token, rollout.mask)
    divergence = losses.aggregate(per_token, rollout.mask)
    per_token, metrics = policy.with_entropy(per_token, output, rollout, config)
    metrics["distill/divergence"] = divergence
    return config.mean(per_token, rollout.mask), metrics


def prepare(rollout: Rollout, **how: Any) -> Rollout:
    """The rollout: scores are not read."""
    return rollout


update = policy.updater(prepare, loss)
"""See ``policy.updater``."""
