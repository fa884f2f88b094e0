"""REBEL, a new algorithm, beside its policy by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import Mean, TrainState, gradient_step, models, sampling

V, R, ETA, NUM_ITERATIONS, NUM_STEPS = 3, 2, 0.5, 2, 150
model = models.build(
    models.GPT2Config(vocab_size=V, max_length=1 + R, hidden_size=16, num_layers=1, num_heads=2)
)
policy_fn = models.policy_fn(model, prompt_length=1)
optimizer = optax.adam(optax.linear_schedule(1e-2, 0.0, NUM_STEPS))
sampler = sampling.SamplingConfig(max_new_tokens=R, eos_id=None, pad_id=0)
prompts = jnp.tile(jnp.arange(V), 128).repeat(2)[:, None]  # rows 2i and 2i + 1 have the same prompt


def score(tokens):
    return (tokens[:, 1:] == tokens[:, :1]).sum(axis=1).astype(jnp.float32)


def loss(params, batch):
    log_probs = policy_fn(params, batch.tokens, batch.attention_mask, None).log_probs
    log_ratios = jnp.sum((log_probs - batch.log_probs) * batch.response_mask, axis=1)
    errors = (log_ratios / ETA - batch.scores).reshape(-1, 2)
    return Mean.of(jnp.square(errors[:, 0] - errors[:, 1])), {"score": Mean.of(batch.scores)}


def iteration(params, key):
    def step(state, key):
        batch = sampling.generate(
            model, params, prompts, jnp.ones_like(prompts), key, config=sampler
        )
        return gradient_step(
            loss, state, optimizer, batch=batch.replace(scores=score(batch.tokens))
        )

    state, metrics = jax.lax.scan(
        step, TrainState.create(params, optimizer), jax.random.split(key, NUM_STEPS)
    )
    return state.params, metrics["loss"]


start = model.init(jax.random.key(0))
params, regression = jax.jit(lambda *inputs: jax.lax.scan(iteration, *inputs))(
    start, jax.random.split(jax.random.key(1), NUM_ITERATIONS)
)

# The same policy by enumeration: the 9 responses to each of the 3 prompts.
tokens = jnp.array(list(itertools.product(range(V), repeat=1 + R)))  # [27, 3], sorted by prompt


@jax.jit
def log_probs(params):
    return (
        policy_fn(params, tokens, jnp.ones_like(tokens), None).log_probs.sum(axis=1).reshape(V, -1)
    )


optimum = jax.nn.softmax(log_probs(start) + NUM_ITERATIONS * ETA * score(tokens).reshape(V, -1))
trained = jnp.exp(log_probs(params))
distance = 0.5 * jnp.abs(trained - optimum).sum(axis=1).max()
print(f"P(0, 0 | 0) = {trained[0, 0]:.3f}, optimum {optimum[0, 0]:.3f}; distance {distance:.3f}")
assert distance < 0.05
assert regression[:, -1].max() < 0.1 * regression[0, 0]
