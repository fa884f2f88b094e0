"""PPO with a supervised term, the "ptx" of InstructGPT, beside its optimum by enumeration."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from rlhf_jax import (
    Demonstrations,
    TrainState,
    gradient_step,
    models,
    ppo,
    rewards,
    rollout,
    sampling,
    sft,
)

V, R, KL_COEF, SFT_COEF, NUM_ITERATIONS = 3, 2, 0.5, 0.3, 200
model = models.build(
    models.GPT2Config(vocab_size=V, max_length=1 + R, hidden_size=16, num_layers=1, num_heads=2)
)
policy_fn = models.policy_fn(model, prompt_length=1)
optimizer = optax.adam(optax.linear_schedule(1e-2, 0.0, NUM_ITERATIONS))
sampler = sampling.SamplingConfig(max_new_tokens=R, eos_id=None, pad_id=0)
collect = partial(rollout.collect, model, sampling=sampler, policy_fn=policy_fn)
reward_fn = rewards.token_count(2, include_prompt=False)  # how often the response says 2
ppo_config = ppo.Config(whiten_advantages=False, gae_lambda=1.0)
prompts = jnp.zeros((128, 1), jnp.int32)
texts = jnp.array([[0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1]])
demonstrations = Demonstrations(texts, jnp.ones_like(texts), jnp.ones_like(texts).at[:, 0].set(0))


@jax.jit
def train(params, key):
    ref_fn = Partial(policy_fn, params)

    def iteration(state, key):
        batch = collect(state.params, prompts, jnp.ones_like(prompts), key, ref_fn=ref_fn)
        batch = batch.replace(scores=reward_fn(batch)[0])
        batch = ppo.prepare(
            batch.replace(rewards=rewards.kl_shaped(batch, KL_COEF)), config=ppo_config
        )

        def loss(params):
            policy, metrics = ppo.loss(params, batch, None, policy_fn=policy_fn, config=ppo_config)
            supervised, more = sft.loss(
                params, demonstrations, None, policy_fn=policy_fn, config=sft.Config()
            )
            return (policy, SFT_COEF * supervised), metrics | more

        return gradient_step(loss, state, optimizer)

    state = TrainState.create(params, optimizer)
    return jax.lax.scan(iteration, state, jax.random.split(key, NUM_ITERATIONS))


params = models.add_head(jax.random.key(0), model.init(jax.random.key(1)), "value")
state, metrics = train(params, jax.random.key(2))

# The same optimum by enumeration.
everything = jnp.array(
    [(0, *response) for response in itertools.product(range(V), repeat=R)]
)  # [9, 3]


@jax.jit
def log_probs(params):
    return policy_fn(params, everything, jnp.ones_like(everything), None).log_probs.sum(axis=1)


scores = (everything[:, 1:] == 2).sum(axis=1)
demonstrated = (texts[:, None] == everything[None]).all(axis=2).mean(axis=0)


def objective(logits):
    log_p = jax.nn.log_softmax(logits)
    reward = jnp.sum(jnp.exp(log_p) * (scores - KL_COEF * (log_p - log_probs(params))))
    return reward + SFT_COEF * jnp.sum(demonstrated * log_p)


optimum = jax.lax.fori_loop(0, 2000, lambda _, x: x + jax.grad(objective)(x), jnp.zeros(V**R))
optimum, trained = jax.nn.softmax(optimum), jnp.exp(log_probs(state.params))
distance = 0.5 * jnp.abs(trained - optimum).sum()
print(f"P(1, 1) = {trained[4]:.3f}, at the optimum {optimum[4]:.3f}; distance {distance:.3f}")
assert distance < 0.05
