"""GRPO in one file, with a reward in plain Python: sample groups, score texts, update.

    python experiments/grpo_loop.py --model SmolLM2-135M-Instruct --prompts sums.json \
        --out runs/sums

Each row of the prompts is {"prompt": text, "answer": text}; `reward` below pays for the answer
alone. Change it: that is what this file is for. Adapters (LoRA) are trained, the model is frozen.
The same command goes on from the last checkpoint, with the bits of a run that was never stopped:
whatever is random comes from one key and the number of the step. `rlhf-jax grpo` calls the same
functions. It is not equal to the bit, because it draws prompts in epochs, pads each batch to its
own longest prompt and compiles other programs.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from transformers import AutoTokenizer

from rlhf_jax import TrainState, grpo, models, rollout, sampling


def reward(response, row):
    """1 for the answer and nothing else, else 0."""
    return float(response.strip() == str(row["answer"]))


@dataclass(frozen=True)
class Settings:
    """GRPO with adapters and a Python reward."""

    model: str
    """Hugging Face folder of a model; with a chat template the prompts are a user's messages."""
    prompts: Path
    """JSON: a list of {"prompt": text, "answer": text}."""
    out: Path
    """Folder of the checkpoints."""
    steps: int = 20
    prompts_per_step: int = 8
    group_size: int = 8
    """Answers to each prompt, compared with each other."""
    max_new_tokens: int = 10
    temperature: float = 1.0
    lora_rank: int = 16
    lora_alpha: float = 32.0
    learning_rate: float = 3e-4
    save_every: int = 5
    """Steps between two checkpoints."""
    seed: int = 0


def read_prompts(file, tokenizer):
    """The rows, and token ids and mask [N, P] of their prompts, padded on the left."""
    rows = json.loads(file.read_text("utf-8"))
    encoded = []
    for row in rows:
        text = row["prompt"]
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        encoded.append(tokenizer.encode(text, add_special_tokens=False))
    width = max(map(len, encoded))
    tokens = [[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in encoded]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded]
    return rows, np.array(tokens), np.array(mask)


def main(settings):
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # masks say what is text
    model, base = models.load(settings.model)
    rows, tokens, mask = read_prompts(settings.prompts, tokenizer)

    key = jax.random.key(settings.seed)
    policy_fn = models.policy_fn(model, settings.temperature, prompt_length=tokens.shape[1])
    sampler = sampling.SamplingConfig(
        settings.max_new_tokens,
        settings.temperature,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    config = grpo.Config(group_size=settings.group_size, aggregate="token", kl_loss_coef=0.0)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(settings.learning_rate, eps=1e-5)
    )

    @jax.jit
    def respond(adapters, base, tokens, mask, key):
        params = models.lora.attach(base, adapters)
        return rollout.collect(
            model, params, tokens, mask, key, sampling=sampler, policy_fn=policy_fn
        )

    @functools.partial(jax.jit, donate_argnames="state")
    def learn(state, base, batch, key):
        bound = models.lora.bind(policy_fn, base)
        return grpo.update(state, batch, key, policy_fn=bound, optimizer=optimizer, config=config)

    alpha = settings.lora_alpha
    adapters = models.lora.init(jax.random.fold_in(key, 0), base, settings.lora_rank, alpha=alpha)
    state = TrainState.create(adapters, optimizer)
    checkpoints = ocp.CheckpointManager(settings.out.absolute())
    done = checkpoints.latest_step() or 0
    if done:
        state = checkpoints.restore(done, args=ocp.args.StandardRestore(state))
    for number in range(done + 1, settings.steps + 1):
        step_key = jax.random.fold_in(key, number)
        order_key, sample_key, update_key = jax.random.split(step_key, 3)
        chosen = jax.random.choice(order_key, len(rows), (settings.prompts_per_step,))
        chosen = np.repeat(np.asarray(chosen), settings.group_size)  # a group's rows are adjacent
        batch = respond(state.params, base, tokens[chosen], mask[chosen], sample_key)
        said = [
            tokenizer.decode(ids[is_said], skip_special_tokens=True)
            for ids, is_said in zip(np.asarray(batch.tokens), np.asarray(batch.mask), strict=True)
        ]
        scores = [reward(text, rows[i]) for text, i in zip(said, chosen, strict=True)]
        batch = batch.replace(scores=np.array(scores, np.float32))  # [B]
        state, metrics = learn(state, base, batch, update_key)
        print(
            f"{number}/{settings.steps} score {np.mean(scores):.3f} "
            f"loss {metrics['policy/loss']:.4f} {rows[chosen[0]]['prompt']!r} {said[0]!r}",
            flush=True,
        )
        if number % settings.save_every == 0 or number == settings.steps:
            checkpoints.save(number, args=ocp.args.StandardSave(state))
    checkpoints.wait_until_finished()
    return state


if __name__ == "__main__":
    main(tyro.cli(Settings))
