"""The code of docs/updates.md, one block after the other."""

# --- 1
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from rlhf_jax import (
    Comparisons,
    Demonstrations,
    TrainState,
    dpo,
    gradient_step,
    losses,
    minibatch_epochs,
    models,
    ops,
    sft,
)

model = models.build(
    models.GPT2Config(vocab_size=16, max_length=12, hidden_size=32, num_layers=1, num_heads=2)
)
policy_fn = models.policy_fn(model)
optimizer = optax.adam(3e-2)


def step(state, batch, key):
    def loss(params, batch, key):
        supervised, metrics = sft.loss(params, batch, key, policy_fn=policy_fn, config=sft.Config())
        entropy = policy_fn(params, batch.tokens, batch.attention_mask, None).entropy
        entropy = losses.aggregate(entropy, batch.response_mask, "sum")
        return (supervised, -0.01 * entropy), metrics | {"entropy": entropy}

    return gradient_step(loss, state, optimizer, batch=batch, key=key, num_microbatches=2)


# --- 2
texts = (jnp.arange(32)[:, None] + jnp.arange(12)) % 16  # they count
response = jnp.ones_like(texts).at[:, :4].set(0)
batch = Demonstrations(tokens=texts, attention_mask=jnp.ones_like(texts), response_mask=response)
state = TrainState.create(model.init(jax.random.key(0)), optimizer)
state, metrics = minibatch_epochs(
    step, state, batch, jax.random.key(1), num_epochs=5, num_minibatches=4
)
assert state.step == 20
print({name: round(float(value), 3) for name, value in metrics.items()})

# --- 3
table_fn = ops.policy_fn(lambda params, tokens, attention_mask, key: params["table"][tokens])
table = {"table": jnp.zeros((16, 16))}


# --- 4
def nnx_policy(model):
    graph, params = nnx.split(model)
    policy_fn = ops.policy_fn(
        lambda params, tokens, attention_mask, key: nnx.merge(graph, params)(tokens)
    )
    return policy_fn, params


class Network(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.out = nnx.Linear(8, 16, rngs=rngs)

    def __call__(self, tokens):
        return self.out(self.embed(tokens))


for fn, params in [(table_fn, table), nnx_policy(Network(nnx.Rngs(0)))]:
    update = partial(
        sft.update, batch=batch, policy_fn=fn, optimizer=optimizer, config=sft.Config()
    )
    train = jax.jit(partial(jax.lax.scan, lambda state, key, update=update: update(state, key=key)))
    state, metrics = train(
        TrainState.create(params, optimizer), jax.random.split(jax.random.key(0), 100)
    )
    print(
        f"the loss falls from {metrics['loss'][0]:.2f} to {metrics['loss'][-1]:.2f} nats per token"
    )


# --- 5
@jax.jit
@jax.vmap
def margin_after_one_step(learning_rate, smoothing):
    update = partial(
        dpo.update,
        policy_fn=table_fn,
        optimizer=optax.sgd(learning_rate),
        config=dpo.Config(beta=1.0, label_smoothing=smoothing),
    )
    state = TrainState.create(table, optax.sgd(learning_rate))
    state, _ = update(state, pairs, None)
    return update(state, pairs, None)[1]["dpo/margin"]


backwards = jnp.stack([texts, texts[:, ::-1]], axis=1)  # chosen, rejected
pairs = Comparisons(
    backwards, jnp.ones_like(backwards), jnp.broadcast_to(response[:, None], backwards.shape)
)
pairs = dpo.with_reference(pairs, partial(table_fn, table))
print(margin_after_one_step(jnp.array([0.1, 0.1, 0.3]), jnp.array([0.0, 0.1, 0.1])))

# --- end
