"""PPO in one file, from top to bottom: sample, score, penalise the KL, update.

    rlhf-jax quickstart
    python experiments/ppo_loop.py --model runs/quickstart/sft/model \
        --reward-model runs/quickstart/reward_model/model \
        --prompts runs/quickstart/data/prompts.json --out runs/ppo_loop

The same command goes on from the last checkpoint, with the bits of a run that was never stopped:
whatever is random comes from one key and the number of the step. `rlhf-jax ppo` is the same loop
(`rlhf_jax/training/rl/run.py`) with the same functions. Given the same keys and rows it gives the
same numbers; by itself it draws prompts in epochs, names its keys by their use, pads each batch to
its own longest prompt, and compiles sampling, scoring and the update apart, so that a reward may be
Python.
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
from jax.tree_util import Partial
from transformers import AutoTokenizer

from rlhf_jax import TrainState, models, ops, ppo, rewards, rollout, sampling


@dataclass(frozen=True)
class Settings:
    """PPO against a reward model of the same tokenizer."""

    model: str
    """Hugging Face folder of the policy; the reference is the same model, unchanged."""
    reward_model: str
    """Folder of a reward model."""
    prompts: Path
    """JSON: a list of {"prompt": text}."""
    out: Path
    """Folder of the checkpoints."""
    steps: int = 100
    batch_size: int = 32
    """Responses of a step."""
    max_new_tokens: int = 24
    temperature: float = 1.0
    kl_coef: float = 0.05
    """Reward lost by a nat of KL from the reference."""
    learning_rate: float = 1e-4
    save_every: int = 10
    """Steps between two checkpoints."""
    seed: int = 0
    num_epochs: int = 1
    """Passes over the responses of a step."""
    num_minibatches: int = 2


def read_prompts(file, tokenizer):
    """Token ids and mask [N, P] of all prompts, padded on the left to the longest."""
    rows = []
    for row in json.loads(file.read_text("utf-8")):
        text = row["prompt"]
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        rows.append(tokenizer.encode(text, add_special_tokens=False))
    width = max(map(len, rows))
    tokens = [[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in rows]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]
    return np.array(tokens), np.array(mask)


def main(settings):
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # masks say what is text
    model, reference = models.load(settings.model)
    reward_model, reward_params = models.load(settings.reward_model)
    tokens, mask = read_prompts(settings.prompts, tokenizer)

    keys = jax.random.split(jax.random.key(settings.seed), 4)
    init_key, order_key, sample_key, update_key = keys
    policy_fn = models.policy_fn(model, settings.temperature, prompt_length=tokens.shape[1])
    end = [tokenizer.eos_token_id]  # behind an answer that was cut too, as when it was trained
    score_fn = rewards.behind_turns(
        models.score_fn(reward_model), closing=end, ends=end, prompt_length=tokens.shape[1]
    )
    sampler = sampling.SamplingConfig(
        settings.max_new_tokens,
        settings.temperature,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    config = ppo.Config(num_epochs=settings.num_epochs, num_minibatches=settings.num_minibatches)
    updates = settings.steps * settings.num_epochs * settings.num_minibatches
    schedule = optax.linear_schedule(settings.learning_rate, 0.0, updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, eps=1e-5))

    @functools.partial(jax.jit, donate_argnames="state")
    def step(state, tokens, mask, number, reference, reward_params):
        batch = rollout.collect(
            model,
            state.params,
            tokens,
            mask,
            jax.random.fold_in(sample_key, number),
            sampling=sampler,
            policy_fn=policy_fn,  # log-probs and values by the update's own forward pass
            ref_fn=Partial(policy_fn, reference),
        )
        scores = score_fn(reward_params, batch.tokens, batch.attention_mask, None)  # [B]
        batch = batch.replace(scores=scores)
        batch = batch.replace(rewards=rewards.kl_shaped(batch, settings.kl_coef))  # [B, T]
        key = jax.random.fold_in(update_key, number)
        state, metrics = ppo.update(
            state, batch, key, policy_fn=policy_fn, optimizer=optimizer, config=config
        )
        kl = ops.kl(batch.log_probs, batch.ref_log_probs)  # [B, T]
        metrics["objective/kl"] = ops.masked_mean(ops.response_sums(kl, batch), batch.present)
        metrics["objective/score"] = ops.masked_mean(scores, batch.present)
        return state, metrics, batch

    params = models.add_head(init_key, reference, "value")
    state = TrainState.create(models.master_weights(params), optimizer)
    checkpoints = ocp.CheckpointManager(settings.out.absolute())
    done = checkpoints.latest_step() or 0
    if done:
        state = checkpoints.restore(done, args=ocp.args.StandardRestore(state))
    for number in range(done, settings.steps):
        row_key = jax.random.fold_in(order_key, number)
        rows = np.asarray(jax.random.choice(row_key, len(tokens), (settings.batch_size,)))
        state, metrics, batch = step(
            state, tokens[rows], mask[rows], number, reference, reward_params
        )
        said = np.asarray(batch.tokens[0])[np.asarray(batch.mask[0])]
        print(
            f"{number + 1}/{settings.steps} score {metrics['objective/score']:.3f} "
            f"kl {metrics['objective/kl']:.2f} loss {metrics['policy/loss']:.4f} "
            f"{tokenizer.decode(said)!r}",
            flush=True,
        )
        if (number + 1) % settings.save_every == 0 or number + 1 == settings.steps:
            checkpoints.save(number + 1, args=ocp.args.StandardSave(state))
    checkpoints.wait_until_finished()
    return state


if __name__ == "__main__":
    main(tyro.cli(Settings))
