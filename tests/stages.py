"""Short runs of every stage, which the processes of a test make one after the other:

python tests/stages.py FOLDER NAME... [--processes PLACE]   # all without names
"""

import argparse
import itertools
import json
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # started as a script

import jax
from builders import LETTERS, initial_params, letters_stage, perturbed, with_rl

from rlhf_jax import models, training
from rlhf_jax.cli.stages import find_method
from rlhf_jax.cli.verify import METHODS
from rlhf_jax.config import Compute, LoRA, Mesh, RunConfig, Tokenizer
from rlhf_jax.data import tokenizers
from rlhf_jax.runs import checkpoint, devices
from rlhf_jax.training.common import progress
from rlhf_jax.training.tasks import TASKS

BLOCKS = Compute(blocks=4)
FSDP = Mesh(data=1, fsdp=-1)
CUT = {"mesh": FSDP, "compute": Compute()}
Run = Callable[..., None]

REWARD = """
def parts(prompts, responses):
    scores = [len(set(text)) / 2 + len(prompt) % 3 for prompt, text in zip(prompts, responses)]
    return [{"score": score, "cost": score - 1} for score in scores]
"""
TALK = """
def answer(conversation, row):
    said = [message["content"] for message in conversation if message["role"] == "assistant"]
    return ("a" if len(said) < 2 else None), float(len(said[-1]) % 2)
"""


def model_folder(folder: Path) -> str:
    """A model with weights that say something, and a tokenizer of the characters of the rows."""
    tokenizer = tokenizers.characters("".join(sorted({*f"say{LETTERS}yesno: "})))
    special = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    sizes = {"max_length": 16, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    model = models.build(models.GPT2Config(vocab_size=tokenizer.vocab_size, **sizes, **special))
    models.save(folder, model, perturbed(initial_params(model)))
    tokenizer.save(folder)
    return str(folder)


def prepare(root: Path) -> None:
    """The files that the runs read."""
    model_folder(root / "model")
    model_folder(root / "teacher")
    (root / "parts.py").write_text(REWARD)
    (root / "talk.py").write_text(TALK)
    stages = (*TASKS, *METHODS)
    (root / "configs").write_bytes(
        pickle.dumps({name: letters_stage(root, name) for name in stages})
    )
    steps = [["yes", "no"], ["no"], ["yes"], ["no", "yes"]]
    rows = [{"prompt": f"say {c}", "steps": steps[i % 4]} for i, c in enumerate(LETTERS)]
    rows = [row | {"labels": [step == "yes" for step in row["steps"]]} for row in rows]
    (root / "steps.json").write_text(json.dumps(rows))


def config_of(stage: str, root: Path, run: dict[str, Any], changes: dict[str, Any]) -> RunConfig:
    """The settings of ``builders.letters_stage``; ``run``: those of the run's folder."""
    config: RunConfig = pickle.loads((root / "configs").read_bytes())[stage]
    if "model" in changes:
        changes = {"tokenizer": Tokenizer()} | changes | {"model": str(root / changes["model"])}
    if "reward" in changes:
        changes = changes | {"reward": tuple(f"{root}/{entry}" for entry in changes["reward"])}
    return replace(config, **{"compute": BLOCKS} | changes | run)


def supervised(stage: str, own: dict[str, Any] | None = None, **changes: Any) -> Run:
    """A run of three steps of a stage with ``own`` settings of its section."""

    def start(root: Path, **run: Any) -> None:
        config = config_of(stage, root, run, changes)
        settings = {"max_steps": 3, "validation_interval": 2} | (own or {})
        if stage != "reward_model":
            settings |= {"max_new_tokens": 2}
        if "steps" in settings:
            settings["data"] = (str(root / "steps.json"),)
        section = replace(getattr(config, stage), **settings)
        getattr(training, stage).run(replace(config, **{stage: section}))

    return start


def sampled(
    method: str, own: dict[str, Any] | None = None, rl: dict[str, Any] | None = None, **changes: Any
) -> Run:
    """A run of two iterations of a method with ``own`` settings of its section and of ``rl``."""

    def start(root: Path, **run: Any) -> None:
        config = config_of(method if method in METHODS else "vpg", root, run, changes)
        settings = {"num_iterations": 2, "validation_interval": 1, "batch_size": 8} | (rl or {})
        fields = dict(own or {})
        if "environment" in settings:
            settings["environment"] = f"{root / 'talk.py'}:answer"
        if "teacher" in fields:
            fields["teacher"] = str(root / "teacher")
        config = with_rl(config, **settings)
        if method in METHODS:
            section = replace(getattr(config, method), **fields)
            training.rl.run(replace(config, **{method: section}), METHODS[method])
        else:
            module = find_method(method)
            assert module is not None
            training.rl.run(config, module, module.Config(**fields))

    return start


PARTS = ["parts.py:parts"]
RUNS: dict[str, Run] = {
    "sft": supervised("sft", {"num_microbatches": 2}),
    "sft fsdp": supervised("sft", **CUT),
    "reward model": supervised(
        "reward_model", {"ensemble_size": 2, "normalize_samples": 4}, model="model"
    ),
    "reward model fsdp": supervised("reward_model", {"normalize_samples": 4}, model="model", **CUT),
    "process reward": supervised("reward_model", {"steps": True}),
    "dpo": supervised("dpo", model="model", lora=LoRA(rank=2)),
    "dpo moving": supervised("dpo", {"reference_ema": 0.6}),
    "dpo fsdp": supervised("dpo", **CUT),
    "kto": supervised("kto"),
    "vpg": sampled("vpg", {"baseline": "greedy"}, reward=PARTS),
    "ppo": sampled("ppo", {"value": "separate"}, {"num_epochs": None}),
    "ppo fsdp": sampled("ppo", **CUT),
    "rloo": sampled("rloo", {"num_microbatches": 2}),
    "grpo": sampled(
        "grpo", {"group_size": 4}, {"dynamic_sampling": 2, "validation_samples": 2}, reward=PARTS
    ),
    "grpo talk": sampled("grpo", None, {"environment": "", "max_turns": 2, "max_new_tokens": 6}),
    "grpo lora fsdp": sampled("grpo", model="model", lora=LoRA(rank=2), **CUT),
    "distill": sampled("distill", {"teacher": "x"}, model="model", reward=()),
    "clip_cov": sampled("clip_cov"),
    "curriculum": sampled("curriculum"),
    "gdpo": sampled("gdpo", {"components": ("cost",), "weights": (1.0,)}, reward=PARTS),
    "maxrl": sampled("maxrl"),
    "nash_md": sampled("nash_md", {"preference": "scores"}),
    "online_dpo": sampled("online_dpo"),
    "otb": sampled("otb"),
    "pass_at_k": sampled("pass_at_k"),
    "replay": sampled("replay"),
    "safe_rlhf": sampled("safe_rlhf", reward=PARTS),
    "self_distill": sampled("self_distill"),
    "spo": sampled("spo"),
    "xpo": sampled("xpo"),
}


def die_at(place: str) -> None:
    """Kills this process with SIGKILL in a run: see above."""
    owner, name, number = {
        "row": (progress.Progress, "settle", 3),
        "checkpoint": (checkpoint, "_digests", 2),  # of step 0 and of step 2
    }[place]
    original = getattr(owner, name)
    calls = itertools.count(1)

    def spy(*args: Any, **options: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(owner, name, spy)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--processes")
    parser.add_argument("--die", choices=["row", "checkpoint"])
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args()
    devices.choose("cpu", asked.processes)
    if asked.die and jax.process_index() == 1:
        die_at(asked.die)
    failed = []
    for name in asked.names or RUNS:
        try:
            folder = asked.root / ("two" if asked.processes else "one") / name
            RUNS[name](asked.root, output_dir=str(folder), resume=asked.resume)
        except Exception:
            failed.append(name)
            traceback.print_exc()
        print("@@", name, "failed" if name in failed else "ended", file=sys.stderr, flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
