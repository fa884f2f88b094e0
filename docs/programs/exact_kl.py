"""The exact KL over the vocabulary at each step, beside its estimates."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rlhf_jax import Demonstrations, models, ops, rollout, sampling

V, P, R = 5, 1, 3
model = models.build(
    models.GPT2Config(vocab_size=V, max_length=P + R, hidden_size=16, num_layers=1, num_heads=2)
)
policy_fn = models.policy_fn(model, prompt_length=P)
# Weights five times the usual, so that the two policies differ by more than rounding.
params, ref_params = (
    jax.tree.map(lambda x: 5.0 * x, model.init(key)) for key in jax.random.split(jax.random.key(0))
)


def kl(logits, log_q):
    """KL(policy || reference) in nats of logits of the policy, and log-probs of the reference."""
    log_p = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def exact_kl(params, ref_params, rows):
    """KL(policy || reference) [B, T] in nats of the distribution of each response token."""
    log_q = ops.evaluate(policy_fn, ref_params, rows, statistic=jax.nn.log_softmax).statistic
    return ops.evaluate(policy_fn, params, rows, statistic=kl, arrays=(log_q,)).statistic


@jax.jit
def estimates(params, ref_params, key):
    """KL of each of 4096 sampled responses [B]: k1, k3, and the exact KL of each step."""
    prompts = jnp.zeros((4096, P), jnp.int32)
    sampler = sampling.SamplingConfig(max_new_tokens=R, eos_id=None, pad_id=0)
    collect = partial(rollout.collect, model, sampling=sampler, policy_fn=policy_fn)
    batch = collect(
        params, prompts, jnp.ones_like(prompts), key, ref_fn=Partial(policy_fn, ref_params)
    )
    found = {name: ops.kl(batch.log_probs, batch.ref_log_probs, name) for name in ("k1", "k3")}
    found["exact"] = exact_kl(params, ref_params, batch)
    return {name: jnp.sum(x, axis=1) for name, x in found.items()}


@partial(jax.jit, static_argnums=2)
def enumerated(params, ref_params, length):
    """All responses of this length: log-probs of policy and reference [N], exact KLs [N, T]."""
    texts = jnp.array([(0, *response) for response in itertools.product(range(V), repeat=length)])
    ones = jnp.ones_like(texts)
    rows = Demonstrations(texts, ones, ones.at[:, :P].set(0))
    log_probs = (
        policy_fn(p, texts, ones, None).log_probs.sum(axis=1) for p in (params, ref_params)
    )
    return *log_probs, exact_kl(params, ref_params, rows)


# One step: the sum over all tokens that can follow the prompt.
log_p, log_q, steps = enumerated(params, ref_params, 1)
one_step = jnp.sum(jnp.exp(log_p) * (log_p - log_q))
np.testing.assert_allclose(steps[:, P], one_step, rtol=1e-5)

# Three steps: over all 125 responses, the expected sum of the steps is the KL of the responses.
log_p, log_q, steps = enumerated(params, ref_params, R)
whole = jnp.sum(jnp.exp(log_p) * (log_p - log_q))
np.testing.assert_allclose(jnp.sum(jnp.exp(log_p) * steps.sum(axis=1)), whole, rtol=1e-5)
print(f"KL of the first token {one_step:.4f} nats, of the response {whole:.4f}; over 4096 samples:")
for name, x in estimates(params, ref_params, jax.random.key(1)).items():
    print(f"  {name:5} {x.mean():.4f}, standard deviation of a sample {x.std():.4f}")
    assert abs(x.mean() - whole) < 4 * x.std() / 64
