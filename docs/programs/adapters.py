"""LoRA in code, as docs/lora.md shows it."""

# --- 1
import jax
import jax.numpy as jnp
import optax

from rlhf_jax import Demonstrations, TrainState, models, sft

model = models.build(
    models.GPT2Config(vocab_size=16, max_length=12, hidden_size=32, num_layers=2, num_heads=2)
)
base = model.init(jax.random.key(0))
adapters = models.lora.init(jax.random.key(1), base, 4, match="attn")
policy_fn = models.lora.bind(models.policy_fn(model), base)
optimizer = optax.adam(1e-2)


@jax.jit
def update(state, batch, key, policy_fn):
    return sft.update(
        state, batch, key, policy_fn=policy_fn, optimizer=optimizer, config=sft.Config()
    )


tokens = jax.random.randint(jax.random.key(2), (8, 12), 2, 16)
ones = jnp.ones_like(tokens)
batch = Demonstrations(tokens=tokens, attention_mask=ones, response_mask=ones)
state = TrainState.create(adapters, optimizer)
for step in range(10):
    state, metrics = update(state, batch, jax.random.key(step), policy_fn)

attached = models.lora.attach(base, state.params)  # what the model and the sampler run on
merged = models.lora.merge(base, state.params)  # a plain model's parameters
difference = jnp.abs(model.apply(attached, tokens) - model.apply(merged, tokens)).max()
print(f"loss {metrics['sft/loss']:.3f}, attached and merged differ by {difference:.1e}")

# --- end
