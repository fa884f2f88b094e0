# ruff: noqa: E402
"""Generation from Python and best of n: the code of docs/inference.md."""

# --- 1
from rlhf_jax import training
from rlhf_jax.config import RunConfig, parse
from rlhf_jax.generation import generator

argv = ["--config", "tiny", "--rl.num-iterations", "1", "--output-dir", "runs/policy"]
training.rl.run(parse(RunConfig, argv))

writer = generator.Generator("runs/policy/model", max_new_tokens=12, temperature=0.7)
generations = writer(["What is a cat?", "Name a color."], seed=0, num_samples=2)
for text, log_prob in zip(generations.texts, generations.log_probs, strict=True):
    print(f"{log_prob:8.2f} {text!r}")

# --- 2
import jax
import jax.numpy as jnp

from rlhf_jax import models, rewards, sampling

model = models.build(
    models.GPT2Config(vocab_size=16, max_length=12, hidden_size=32, num_layers=1, num_heads=2)
)
params = model.init(jax.random.key(0))
prompts = jnp.full((8, 4), 2)
config = sampling.SamplingConfig(max_new_tokens=8, eos_id=1, pad_id=0)
rollout, scores = sampling.best_of_n(
    model,
    params,
    prompts,
    jnp.ones_like(prompts),
    jax.random.key(1),
    config=config,
    n=16,
    reward_fn=rewards.token_count(7, include_prompt=False),
)
print(f"mean of all samples {scores.mean():.2f}, best of 16 {rollout.scores.mean():.2f}")
print(f"at most {sampling.best_of_n_kl(16):.2f} nats from the policy")

# --- end
