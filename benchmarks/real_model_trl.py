"""A stage of real_model.py in TRL 1.16, with the same rows, batches and rates.

usage: python benchmarks/real_model_trl.py STAGE FOLDER SIZES...
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from real_model import SHAPE_STEPS, SHAPES, Sizes
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)


class Clock(transformers.TrainerCallback):
    """The seconds of each step."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, **more):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **more):
        self.steps.append(time.perf_counter() - self.started)


def is_right(completions, answer, **columns):
    """1 for a completion whose last number is the answer."""
    import re

    texts = [turns[-1]["content"] for turns in completions]
    numbers = [re.findall(r"-?\d+", text.replace(",", "")) for text in texts]
    return [float(bool(n) and n[-1] == a) for n, a in zip(numbers, answer, strict=True)]


def rows(folder, name):
    """A file of real_model.py as a data set."""
    return Dataset.from_list(json.loads((folder / f"{name}.json").read_text("utf-8")))


def of_length(completions, **columns):
    """The same reward for all."""
    return [0.0] * len(completions)


def demonstrations(folder, name):
    """A file of conversations, of which the last turn is learned."""
    data = rows(folder, name)
    return data.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
        remove_columns="messages",
    )


def trainer_of_shape(shape, folder, common, how):
    """GRPO with at most as many tokens as the shape says."""
    args = GRPOConfig(
        **common,
        per_device_train_batch_size=shape.trl_at_once,
        gradient_accumulation_steps=shape.answers // shape.trl_at_once,
        num_generations=shape.group_size,
        max_completion_length=shape.response,
        max_steps=SHAPE_STEPS,
        learning_rate=1e-4,
        beta=0.04,
    )
    data = rows(folder, f"prompts-{shape.name}")
    data = data.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    return GRPOTrainer(**how, args=args, reward_funcs=of_length, train_dataset=data), None


def trainer(stage, folder, sizes, clock):
    """The trainer of a stage, and what its evaluation calls the score."""
    common = {
        "output_dir": str(folder / f"{stage}-trl"),
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "max_grad_norm": 1.0,
        "seed": 0,
    }
    lora = LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules="all-linear",
        task_type="SEQ_CLS" if stage == "reward-model" else "CAUSAL_LM",
    )
    model = str(folder / "base")
    how = {"model": model, "peft_config": lora, "callbacks": [clock]}
    for shape in SHAPES:
        if stage == f"grpo_{shape.name}":
            return trainer_of_shape(shape, folder, common, how)
    batches = {
        "per_device_train_batch_size": sizes.batch,
        "per_device_eval_batch_size": sizes.batch,
        "num_train_epochs": 1,
    }
    if stage == "sft":
        args = SFTConfig(**common, **batches, learning_rate=3e-4)
        data = {
            "train_dataset": demonstrations(folder, "answers"),
            "eval_dataset": demonstrations(folder, "held_out_answers"),
        }
        return SFTTrainer(**how, args=args, **data), "eval_loss"
    if stage == "reward-model":
        args = RewardConfig(**common, **batches, learning_rate=1e-3)
        data = {"train_dataset": rows(folder, "pairs"), "eval_dataset": rows(folder, "held_out")}
        return RewardTrainer(**how, args=args, **data), "eval_accuracy"
    if stage == "dpo":
        args = DPOConfig(**common, **batches, learning_rate=5e-5)
        data = {"train_dataset": rows(folder, "pairs"), "eval_dataset": rows(folder, "held_out")}
        return DPOTrainer(**how, args=args, **data), "eval_rewards/accuracies"
    sums = {"train_dataset": rows(folder, "sums"), "eval_dataset": rows(folder, "held_out_sums")}
    for name, data in sums.items():
        sums[name] = data.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    args = GRPOConfig(
        **common,
        per_device_train_batch_size=sizes.episodes,
        per_device_eval_batch_size=sizes.episodes,
        num_generations=8,
        max_completion_length=sizes.new_tokens,
        max_steps=sizes.iterations,
        learning_rate=1e-4,
        beta=0.04,
    )
    return GRPOTrainer(**how, args=args, reward_funcs=is_right, **sums), "eval_reward"


def main():
    """Trains, evaluates before and after, writes STAGE-trl.json."""
    stage = sys.argv[1]
    folder = Path(sys.argv[2])
    sizes = Sizes(*map(int, sys.argv[3:]))
    torch.set_num_threads(2)
    clock = Clock()
    train, metric = trainer(stage, folder, sizes, clock)
    before = train.evaluate().get(metric) if metric else None
    train.train()
    after = train.evaluate().get(metric) if metric else None
    steps = clock.steps
    result = {
        "metric": metric,
        "before": before,
        "after": after,
        "steps": len(steps),
        "seconds_a_step": statistics.median(steps),
        "first_step": steps[0],
    }
    (folder / f"{stage}-trl.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
