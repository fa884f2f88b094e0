"""GRPO or DPO of experiments/learning.py in TRL 1.16: the same rows, batches, rates and adapters.

usage: python experiments/peers_trl.py STAGE MODEL FOLDER SEED STEPS BATCH OUT
"""

import copy
import json
import re
import sys
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

NEW_TOKENS = 10
GROUP_SIZE = 8
AT_ONCE = 64  # held-out rows


class Curve(transformers.TrainerCallback):
    """What a model reaches on held-out rows every few steps, and the seconds of the steps."""

    def __init__(self, every, measure):
        self.every = every
        self.measure = measure
        self.values = {}
        self.seconds = []

    def on_train_begin(self, args, state, control, model=None, **more):
        self.values[0] = self.measure(model)

    def on_step_begin(self, args, state, control, **more):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **more):
        self.seconds.append(time.perf_counter() - self.began)
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.values[state.global_step] = self.measure(model)


def is_answer(completions, answer, **columns):
    """1 where the completion ends with the number, as in experiments/sums.py."""
    texts = [turns[-1]["content"] for turns in completions]
    ends = [re.search(r"(\d+)\W*$", text) for text in texts]
    return [float(bool(end) and end[1] == right) for end, right in zip(ends, answer, strict=True)]


def right_answers(model, tokenizer, rows):
    """The share of right answers to the rows, one sampled for each at temperature 1."""
    right = 0.0
    tokenizer = copy.deepcopy(tokenizer)  # the trainer's own may pad on the right
    tokenizer.padding_side = "left"
    model.eval()
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        asked = tokenizer.apply_chat_template(
            [row["prompt"] for row in part],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            said = model.generate(
                **asked, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS
            )
        texts = tokenizer.batch_decode(
            said[:, asked["input_ids"].shape[1] :], skip_special_tokens=True
        )
        turns = [[{"content": text}] for text in texts]
        right += sum(is_answer(turns, [row["answer"] for row in part]))
    model.train()
    return right / len(rows)


def rows_of(folder, name):
    """A file of experiments/learning.py, its prompts as messages."""
    rows = json.loads((folder / f"{name}.json").read_text("utf-8"))
    for row in rows:
        for key, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            if key in row:
                row[key] = [{"role": role, "content": row[key]}]
    return rows


def trainer(stage, model, folder, seed, steps, batch):
    """The trainer of a stage, with its curve: at both ends, and every half of the steps."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    common = {
        "output_dir": str(folder / f"trl-{stage}-{seed}"),
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "max_grad_norm": 1.0,
        "seed": seed,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
    }
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    how = {"model": model, "processing_class": tokenizer, "peft_config": lora}
    if stage == "dpo":
        held_out = Dataset.from_list(rows_of(folder, "held_out_pairs"))
        args = DPOConfig(
            **common, learning_rate=1e-4, lr_scheduler_type="linear", warmup_steps=0.1, beta=0.1
        )
        pairs = Dataset.from_list(rows_of(folder, "train_pairs"))
        found = DPOTrainer(**how, args=args, train_dataset=pairs, eval_dataset=held_out)
        curve = Curve(max(steps // 2, 1), lambda model: found.evaluate()["eval_rewards/accuracies"])
    else:
        held_out = rows_of(folder, "held_out_prompts")
        args = GRPOConfig(
            **common,
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            adam_epsilon=1e-8,
            num_generations=GROUP_SIZE,
            max_completion_length=NEW_TOKENS,
            beta=0.0,
        )
        prompts = Dataset.from_list(rows_of(folder, "train_prompts"))
        found = GRPOTrainer(**how, args=args, reward_funcs=is_answer, train_dataset=prompts)
        curve = Curve(max(steps // 2, 1), lambda model: right_answers(model, tokenizer, held_out))
    found.add_callback(curve)
    return found, curve


def main():
    """Trains, and writes {asked, values: {step: value}, seconds: of the median step}."""
    stage, model, folder, *numbers, out = sys.argv[1:]
    torch.set_num_threads(2)
    train, curve = trainer(stage, model, Path(folder), *map(int, numbers))
    train.train()
    seconds = sorted(curve.seconds)[len(curve.seconds) // 2]
    found = {"asked": sys.argv[1:], "values": curve.values, "seconds": seconds}
    Path(out).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
