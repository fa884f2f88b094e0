"""From prompts to what an update reads: sample, then score the samples with the update's own forward pass.

Decoding with a cache is not bit-identical to a full forward (3e-6 in float32, 5e-2 in bfloat16). So the sampler's
log-probs are replaced by those of the policy function that the update will use: with unchanged parameters the ratio of
the first minibatch is then exactly 1.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlhf_jax.models import Model, policy_params
from rlhf_jax.sampling import SamplingConfig, generate
from rlhf_jax.types import BoundPolicyFn, Params, PolicyFn, Rollout


def collect(
    model: Model,
    params: Params,
    tokens: jax.Array,
    attention_mask: jax.Array,
    key: jax.Array,
    *,
    sampling: SamplingConfig,
    policy_fn: PolicyFn,
    ref_fn: BoundPolicyFn | None = None,
    row_ids: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> Rollout:
    """Responses [B, T] to prompts [B, P] with log-probs, values and reference log-probs; no scores yet.

    ``generate`` followed by ``rescore``; call the two yourself to measure ``sampler_gap`` between them. ``policy_fn``
    and ``ref_fn`` must divide logits by ``sampling.temperature``. With a whole value model ``params`` are
    {"policy", "value"}, as in ``models.policy_fn``. Arguments and errors are those of the two functions.
    """
    sampled = generate(model, policy_params(params), tokens, attention_mask, key, sampling, row_ids, mesh)
    return rescore(sampled, params, policy_fn=policy_fn, ref_fn=ref_fn)


def rescore(rollout: Rollout, params: Params, *, policy_fn: PolicyFn, ref_fn: BoundPolicyFn | None = None) -> Rollout:
    """The rollout with ``log_probs`` and ``values`` [B, T] of ``policy_fn``, ``ref_log_probs`` [B, T] of ``ref_fn``.

    All are float32 and 0 outside the response. ``values`` is None if the policy has no value function. Dropout is off.
    ``ref_fn`` carries its parameters: ``jax.tree_util.Partial(policy_fn, ref_params)``.
    """
    response = rollout.response_mask != 0

    def in_response(x: jax.Array) -> jax.Array:
        return jnp.where(response, x, 0.0).astype(jnp.float32)

    output = policy_fn(params, rollout.tokens, rollout.attention_mask, None)
    values = None if output.values is None else in_response(output.values)
    rollout = dataclasses.replace(rollout, log_probs=in_response(output.log_probs), values=values)
    if ref_fn is None:
        return rollout
    ref_output = ref_fn(rollout.tokens, rollout.attention_mask, None)
    return dataclasses.replace(rollout, ref_log_probs=in_response(ref_output.log_probs))


def sampler_gap(sampled: Rollout, rescored: Rollout) -> jax.Array:
    """The largest ``|log-prob difference|`` [] over response tokens, in nats; 0 if there are none.

    More than rounding (about 1e-5 in float32, 1e-1 in bfloat16) means that sampler and policy function disagree: by
    temperature, by parameters, or by a bug.
    """
    gap = jnp.abs(sampled.log_probs - rescored.log_probs)
    return jnp.max(jnp.where(sampled.response_mask != 0, gap, 0.0), initial=0.0)
