"""A reward model in one file: pairs of answers in, a model that scores out (Bradley-Terry).

    rlhf-jax data demo demo
    python experiments/reward_model_loop.py --model runs/quickstart/sft/model \
        --pairs demo/preference_data.json --out runs/reward_loop

Each row is {"prompt": text, "chosen": text, "rejected": text}. The same command goes on from the
last checkpoint, with the bits of a run that was never stopped. The trained model is written to
OUT/model, a Hugging Face folder that `ppo_loop.py --reward-model` and transformers load.
`rlhf-jax reward-model` calls the same update; it holds pairs out, normalises the scores and pads
each batch to its own longest text, so its bits differ.
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

from rlhf_jax import Comparisons, TrainState, models, reward_model


@dataclass(frozen=True)
class Settings:
    """A reward model on the body of a language model."""

    model: str
    """Hugging Face folder of the body."""
    pairs: Path
    """JSON: a list of {"prompt", "chosen", "rejected"}."""
    out: Path
    """Folder of the checkpoints and of model/."""
    steps: int = 100
    batch_size: int = 32
    """Pairs of a step."""
    held_out: int = 100
    """Pairs, the last of the file, that are not trained on."""
    learning_rate: float = 1e-4
    save_every: int = 20
    """Steps between two checkpoints."""
    seed: int = 0


def read_pairs(file, tokenizer):
    """Comparisons of all rows: arrays [N, 2, T], the chosen answer first, padded on the right."""
    texts = []
    prompt_lengths = []
    for row in json.loads(file.read_text("utf-8")):
        prompt = row["prompt"]
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(
                turns,
                add_generation_prompt=True,
                tokenize=False,
            )
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        for answer in (row["chosen"], row["rejected"]):
            answer_ids = tokenizer.encode(answer, add_special_tokens=False)
            texts.append([*prompt_ids, *answer_ids, tokenizer.eos_token_id])
            prompt_lengths.append(len(prompt_ids))
    shape = (len(texts), max(map(len, texts)))
    tokens = np.full(shape, tokenizer.pad_token_id)
    for i, text in enumerate(texts):
        tokens[i, : len(text)] = text
    columns = np.arange(shape[1])
    lengths = np.array([len(text) for text in texts])
    is_text = columns < lengths[:, None]
    is_answer = is_text & (columns >= np.array(prompt_lengths)[:, None])
    return Comparisons(
        tokens=tokens.reshape(-1, 2, shape[1]),
        attention_mask=is_text.astype(np.int32).reshape(-1, 2, shape[1]),
        response_mask=is_answer.astype(np.int32).reshape(-1, 2, shape[1]),
    )


def main(settings):
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # masks say what is text
    model, body = models.load(settings.model)
    pairs = read_pairs(settings.pairs, tokenizer)
    num_train = len(pairs.tokens) - settings.held_out
    held_out = jax.tree.map(lambda x: x[num_train:], pairs)

    key = jax.random.key(settings.seed)
    score_fn = models.score_fn(model)
    schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    config = reward_model.Config()

    @functools.partial(jax.jit, donate_argnames="state")
    def step(state, batch, key):
        return reward_model.update(
            state, batch, key, score_fn=score_fn, optimizer=optimizer, config=config
        )

    @jax.jit
    def accuracy(params, batch):
        scores = reward_model.answer_scores(score_fn, params, batch)  # [B, 2]
        return (scores[:, 0] > scores[:, 1]).mean()

    params = models.add_head(jax.random.fold_in(key, 0), body, "score")
    state = TrainState.create(models.master_weights(params), optimizer)
    checkpoints = ocp.CheckpointManager(settings.out.absolute() / "checkpoints")
    done = checkpoints.latest_step() or 0
    if done:
        state = checkpoints.restore(done, args=ocp.args.StandardRestore(state))
    for number in range(done + 1, settings.steps + 1):
        order_key, dropout_key = jax.random.split(jax.random.fold_in(key, number))
        rows = np.asarray(jax.random.choice(order_key, num_train, (settings.batch_size,)))
        batch = jax.tree.map(lambda x, rows=rows: x[rows], pairs)
        state, metrics = step(state, batch, dropout_key)
        line = f"{number}/{settings.steps} loss {metrics['reward_model/loss']:.4f}"
        line += f" accuracy {metrics['reward_model/accuracy']:.3f}"
        if number % settings.save_every == 0 or number == settings.steps:
            line += f", of held-out pairs {accuracy(state.params, held_out):.3f}"
            checkpoints.save(number, args=ocp.args.StandardSave(state))
        print(line, flush=True)
    checkpoints.wait_until_finished()
    models.save(settings.out / "model", model, state.params)
    tokenizer.save_pretrained(settings.out / "model")
    return state


if __name__ == "__main__":
    main(tyro.cli(Settings))
