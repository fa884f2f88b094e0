"""A whole run of RLOO for five seeds in one program, each beside its optimum."""

import itertools

import jax
import jax.numpy as jnp
import optax

from rlhf_jax import TrainState, iteration, models, rewards, rloo, sampling

V, R, KL_COEF, NUM_ITERATIONS = 3, 2, 0.5, 200
model = models.build(
    models.GPT2Config(vocab_size=V, max_length=1 + R, hidden_size=16, num_layers=1, num_heads=2)
)
policy_fn = models.policy_fn(model, prompt_length=1)
optimizer = optax.adam(optax.linear_schedule(1e-2, 0.0, NUM_ITERATIONS))
sampler = sampling.SamplingConfig(max_new_tokens=R, eos_id=None, pad_id=0)
reward_fn = rewards.token_count(2, include_prompt=False)
tokens = jnp.zeros((128, 1), jnp.int32)
prompts = iteration.Prompts(tokens, jnp.ones_like(tokens))


def train(key):
    init_key, loop_key = jax.random.split(key)
    params = model.init(init_key)

    def step(state, key):
        return iteration.iterate(
            state,
            prompts,
            key,
            model=model,
            sampling=sampler,
            algorithm=rloo,
            config=rloo.Config(group_size=4),
            policy_fn=policy_fn,
            optimizer=optimizer,
            reward_fn=reward_fn,
            ref_fn=policy_fn.bind(params),
            kl_coef=KL_COEF,
        )

    state = TrainState.create(params, optimizer)
    state, metrics = jax.lax.scan(step, state, jax.random.split(loop_key, NUM_ITERATIONS))
    return params, state.params, metrics


references, trained, metrics = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 5))

# Each seed's optimum by enumeration.
everything = jnp.array(
    [(0, *response) for response in itertools.product(range(V), repeat=R)]
)  # [9, 3]


@jax.jit
def log_probs(params):
    return policy_fn(params, everything, jnp.ones_like(everything), None).log_probs.sum(axis=1)


scores = (everything[:, 1:] == 2).sum(axis=1)
optima = jax.nn.softmax(jax.vmap(log_probs)(references) + scores / KL_COEF, axis=1)  # [5, 9]
distances = 0.5 * jnp.abs(jnp.exp(jax.vmap(log_probs)(trained)) - optima).sum(axis=1)
print("total variation distance of each seed from its optimum:", distances.round(3))
assert distances.max() < 0.05
