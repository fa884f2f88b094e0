"""Self-distillation on the policy's own samples (Shenfeld et al. 2026, arXiv 2601.19897; Hübotter
et al. 2026, arXiv 2601.20802): the teacher is the policy itself with another prompt, which has a
demonstration, the answer or feedback in it.

``L = mean over response tokens of KL(p || q)``, q the teacher's distribution at the same token, a
constant. Tokens beyond the teacher's ``top_k`` likeliest count as one. The papers' teacher has
averaged weights, here it has those of now.
"""

from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax import losses, ops
from rlhf_jax.algorithms import policy
from rlhf_jax.types import AxisName, DropoutKey, LossAndMetrics, Params, PolicyFn, Rollout


@dataclass(frozen=True)
class Config(policy.Batching):
    """Self-distillation with another prompt."""

    top_k: int = 100
    """The teacher's likeliest tokens that are compared one by one."""
    extras = MappingProxyType({"teacher_tokens": "token", "teacher_mask": "token"})


def likeliest(logits: Array, *support: Array, top_k: int) -> tuple[Array, Array]:
    """[..., K] ids, or places in a support, and [..., K + 1] their log-probs and the others'."""
    logits = ops.among(logits, *support)
    _, ids = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
    return ids, at_ids(logits, ids)


def at_ids(logits: Array, ids: Array, *support: Array) -> Array:
    """[..., K + 1] the log-probs of the ids [..., K], and that of all others."""
    logits = ops.among(logits, *support)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), ids, axis=-1)
    together = jnp.minimum(jax.nn.logsumexp(chosen, axis=-1, keepdims=True), -1e-7)
    return jnp.concatenate([chosen, jnp.log(-jnp.expm1(together))], axis=-1)


def loss(
    params: Params, rollout: Rollout, key: DropoutKey, *, policy_fn: PolicyFn, config: Config
) -> LossAndMetrics:
    """The divergence, by ``policy.with_entropy``; and the metric ``distill/divergence``, nats per
    response token. The extras of the rollout have another prompt and the same response in the same
    columns, as ``rewards.teacher_prompts`` makes them.
    """
    # Extras are float32, in which ids below 2^24 are exact, and NaN in missing rows.
    tokens = jnp.nan_to_num(policy.extra(rollout, "teacher_tokens")).astype(jnp.int32)
    told = replace(
        rollout, tokens=tokens, attention_mask=policy.extra(rollout, "teacher_mask") != 0
    )
    top = partial(likeliest, top_k=config.top_k)
    support = rollout.support
    teacher = ops.evaluate(policy_fn, params, told, statistic=top, arrays=(support,))
    ids, theirs = teacher.statistic
    output = ops.evaluate(policy_fn, params, rollout, statistic=at_ids, arrays=(ids, support))
    # A softmax changes no log-probs that add up to 1, and the teacher's are a constant there.
    divergence = ops.masked(
        losses.divergence(output.statistic, teacher_logits=theirs), rollout.mask
    )
    per_token, metrics = policy.with_entropy(divergence, output, rollout, config)
    metrics["distill/divergence"] = losses.aggregate(divergence, rollout.mask)
    return config.mean(per_token, rollout.mask), metrics


def prepare(rollout: Rollout, *, config: Config, axis_name: AxisName = None) -> Rollout:
    """The rollout as it is."""
    return rollout


update = policy.updater(prepare, loss)
"""See ``policy.updater``. Scores are not read."""
