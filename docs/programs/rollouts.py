# ruff: noqa: E402
"""Rollouts that another engine sampled: the code of docs/engines.md."""

# --- 1
from rlhf_jax import rollout
from rlhf_jax.data.tokenizers import characters

tokenizer = characters("abcdefgh")  # pad 0, EOS 1, a 2, b 3, ...
made = rollout.from_text(
    prompts=["ab", [4]],
    responses=["cd", [5, 5, 1]],
    tokenizer=tokenizer,
    log_probs=[[-0.7, -1.2], [-0.3, -2.0, -0.1]],
    finished=[False, True],
)
print(made.tokens)
print(made.log_probs)

# --- 2
import jax
import numpy as np
import optax

from rlhf_jax import TrainState, models, rewards, rloo, sampling

P, R = 4, 6
sizes = {
    "vocab_size": tokenizer.vocab_size,
    "max_length": P + R,
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 2,
}
model = models.build(models.GPT2Config(**sizes))
engine = models.build(models.GPT2Config(**sizes, compute_dtype="bfloat16"))
params = jax.tree.map(lambda x: 10 * x if x.ndim == 2 else x, model.init(jax.random.key(0)))

prompts = np.tile([2, 3, 4, 5], (16, 1))
config = sampling.SamplingConfig(max_new_tokens=R, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
sampled = sampling.generate(
    engine, params, prompts, np.ones_like(prompts), jax.random.key(1), config=config
)
said = np.asarray(sampled.response_mask) != 0
made = rollout.from_text(
    list(prompts),
    [tokens[mask] for tokens, mask in zip(np.asarray(sampled.tokens), said, strict=True)],
    tokenizer,
    log_probs=[row[mask] for row, mask in zip(np.asarray(sampled.log_probs), said, strict=True)],
    prompt_length=P,
    response_length=R,
)

policy_fn = models.policy_fn(model, prompt_length=P)
batch = rollout.rescore(made, params, policy_fn=policy_fn, importance_cap=2.0)
print(f"largest difference {rollout.sampler_gap(made, batch):.4f} nats")
print(f"share of tokens at the cap {rollout.truncated_share(batch, 2.0):.2f}")

scores, _ = rewards.token_count(7, include_prompt=False)(batch)
batch = batch.replace(scores=scores)
optimizer = optax.adam(1e-3)
state, metrics = rloo.update(
    TrainState.create(params, optimizer),
    batch,
    jax.random.key(2),
    policy_fn=policy_fn,
    optimizer=optimizer,
    config=rloo.Config(group_size=4),
)
print(metrics["policy/importance_weight_mean"])

# --- end
