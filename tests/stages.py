"""Short runs of every stage, which the processes of a test make one after the other:

python tests/stages.py FOLDER NAME... [--processes PLACE]   # all without names

The folder is the working folder of the runs.
"""

import argparse
import itertools
import json
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # started as a script

import jax
from builders import LETTERS, initial_params, letters_stage, perturbed, with_rl

from rlhf_jax import models, rewards, training
from rlhf_jax.cli.stages import find_algorithm
from rlhf_jax.config import ALGORITHMS, Compute, Judge, LoRA, Mesh, RunConfig, Safety, Tokenizer
from rlhf_jax.data import tokenizers
from rlhf_jax.runs import checkpoint, devices
from rlhf_jax.training.common import progress
from rlhf_jax.training.tasks import TASKS

VLLM_URL = os.environ.get("VLLM_URL")  # of ``servers.VLLM`` on the folder model
JUDGE = Judge(url=os.environ.get("JUDGE_URL"), model="judge")
BLOCKS = Compute(blocks=4)
SHARED = replace(BLOCKS, share_prompts=True)
FSDP = Mesh(data=1, fsdp=-1)
CUT = {"mesh": FSDP, "compute": Compute()}
Run = Callable[..., None]

REWARD = """
def parts(prompts, responses):
    scores = [len(set(text)) / 2 + len(prompt) % 3 for prompt, text in zip(prompts, responses)]
    return [{"score": score, "letters": len(text)} for score, text in zip(scores, responses)]

def cost(responses):
    return [len(set(text)) - 1 for text in responses]

def even(responses):
    return [float(len(set(text)) % 2 == 0) for text in responses]

def refused(responses):
    return [None if "e" in text else len(text) for text in responses]
"""
RUBRIC = "criteria: Long answers are good.\nscale: [1, 10]\n"
HINTS = rewards.teacher_prompts(lambda letter: [3, ord(letter) % 10, 4], "letter")
TALK = """
def answer(conversation, row):
    said = [message["content"] for message in conversation if message["role"] == "assistant"]
    return ("a" if len(said) < 2 else None), float(len(said[-1]) % 2)
"""


def model_folder(folder: Path) -> str:
    """A model with weights that say something, and a tokenizer of the characters of the rows."""
    tokenizer = tokenizers.characters("".join(sorted({*f"say{LETTERS}yesno: "})))
    special = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    sizes = {"max_length": 40, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    model = models.build(models.GPT2Config(vocab_size=tokenizer.vocab_size, **sizes, **special))
    models.save(folder, model, perturbed(initial_params(model)))
    tokenizer.save(folder)
    return str(folder)


def prepare(root: Path) -> None:
    """The files that the runs read."""
    model_folder(root / "model")
    model_folder(root / "teacher")
    (root / "rewards.py").write_text(REWARD)
    (root / "talk.py").write_text(TALK)
    (root / "kind.yaml").write_text(RUBRIC)
    stages = (*TASKS, *ALGORITHMS)
    (root / "configs").write_bytes(
        pickle.dumps({name: letters_stage(root, name) for name in stages})
    )
    steps = [["yes", "no"], ["no"], ["yes"], ["no", "yes"]]
    rows = [{"prompt": f"say {c}", "steps": steps[i % 4]} for i, c in enumerate(LETTERS)]
    rows = [row | {"labels": [step == "yes" for step in row["steps"]]} for row in rows]
    (root / "steps.json").write_text(json.dumps(rows))


def config_of(stage: str, changes: dict[str, Any]) -> RunConfig:
    """The settings of ``builders.letters_stage`` with changes."""
    config: RunConfig = pickle.loads(Path("configs").read_bytes())[stage]
    if "model" in changes:
        changes = {"tokenizer": Tokenizer()} | changes
    return replace(config, **{"compute": BLOCKS} | changes)


def supervised(stage: str, own: dict[str, Any] | None = None, **changes: Any) -> Run:
    """A run of three steps of a stage with ``own`` settings of its section."""

    def start(**run: Any) -> None:
        config = config_of(stage, changes | run)
        settings = {"max_steps": 3, "validation_interval": 2} | (own or {})
        if stage != "reward_model":
            settings |= {"max_new_tokens": 2}
        section = replace(getattr(config, stage), **settings)
        getattr(training, stage).run(replace(config, **{stage: section}))

    return start


def sampled(
    method: str,
    own: dict[str, Any] | None = None,
    rl: dict[str, Any] | None = None,
    given: Any = None,
    **changes: Any,
) -> Run:
    """A run of two iterations of a method with ``own`` settings of its section and of ``rl``, and a
    reward that Python gives.
    """

    def start(**run: Any) -> None:
        config = config_of(method if method in ALGORITHMS else "vpg", changes | run)
        settings = {"num_iterations": 2, "validation_interval": 1, "batch_size": 8}
        config = with_rl(config, **settings | (rl or {}))
        algorithm = find_algorithm(method)
        assert algorithm is not None
        if method in ALGORITHMS:
            section = replace(getattr(config, method), **own or {})
            training.rl.run(replace(config, **{method: section}), algorithm, reward=given)
        else:
            training.rl.run(config, algorithm, algorithm.Config(**own or {}), reward=given)

    return start


def pipeline(**run: Any) -> None:
    """The three stages, each of two steps."""
    config = with_rl(config_of("ppo", {"reward": (), **run}), num_iterations=2, batch_size=8)
    sections = {
        name: replace(getattr(config, name), max_steps=2) for name in ("sft", "reward_model")
    }
    training.pipeline.run(replace(config, **sections))


PARTS = ("rewards.py:parts",)
COSTS = (*PARTS, "rewards.py:cost*0")
EVEN = ("rewards.py:even",)
TALK_ON = {"environment": "talk.py:answer", "max_turns": 2, "max_new_tokens": 6}
STOPS = {"stop": ("e", "s"), "stop_after": 1, "mask_truncated": True}
SAFETY = Safety(patterns=("p",), prompts="count", classifier="length", above=1.5)
BEST: dict[str, Any] = {"early_stopping_patience": 1, "checkpoint_async": True}
GROUPS = {"group_size": 2, "shuffle_blocks": 1}

STAGES: dict[str, Run] = {
    "sft": supervised("sft", {"num_microbatches": 2}),
    "reward model": supervised(
        "reward_model", {"ensemble_size": 2, "normalize_samples": 4}, model="model"
    ),
    "process reward": supervised("reward_model", {"steps": True, "data": ("steps.json",)}),
    "dpo": supervised("dpo", model="model", lora=LoRA(rank=2)),
    "kto": supervised("kto"),
    "vpg": sampled("vpg", {"baseline": "greedy"}, reward=PARTS),
    "ppo": sampled("ppo", {"value": "separate"}, {"num_epochs": None}),
    "rloo": sampled("rloo", {"num_microbatches": 2}, STOPS),
    "grpo": sampled(
        "grpo", {"group_size": 4}, {"dynamic_sampling": 2, "validation_samples": 2}, reward=PARTS
    ),
    "distill": sampled("distill", {"teacher": "teacher"}, model="model", reward=()),
    "grpo lora fsdp": sampled("grpo", model="model", lora=LoRA(rank=2), **CUT),
}
METHODS: dict[str, Run] = {
    "clip_cov": sampled("clip_cov"),
    "curriculum": sampled("curriculum", None, {"dynamic_sampling": 1}, reward=EVEN),
    "gdpo": sampled("gdpo", {"components": ("parts", "cost"), "weights": (1, -0.5)}, reward=COSTS),
    "maxrl": sampled("maxrl", None, TALK_ON),
    "nash_md": sampled("nash_md", {"preference": "scores"}),
    "online_dpo": sampled("online_dpo"),
    "otb": sampled("otb"),
    "pass_at_k": sampled("pass_at_k"),
    "replay": sampled("replay"),
    "safe_rlhf": sampled("safe_rlhf", reward=COSTS),
    "self_distill": sampled("self_distill", given=HINTS, reward=()),
    "spo": sampled("spo", reward=EVEN),
    "xpo": sampled("xpo"),
}
VARIANTS: dict[str, Run] = {
    "sft best fsdp": supervised("sft", **CUT, **BEST, keep_best="min:validation/loss"),
    "reward model fsdp": supervised("reward_model", {"normalize_samples": 4}, model="model", **CUT),
    "dpo moving": supervised("dpo", {"reference_ema": 0.6}, compute=SHARED),
    "dpo fsdp": supervised("dpo", **CUT),
    "pipeline": pipeline,
    "vpg missing": sampled("vpg", None, STOPS, reward=("rewards.py:refused",)),
    "ppo best fsdp": sampled("ppo", **CUT, **BEST, keep_best="max:validation/score"),
    "ppo safety": sampled("ppo", None, {"judge": ("length",)}, safety=SAFETY),
    "rloo shared": sampled("rloo", GROUPS, STOPS, compute=SHARED),
    "rloo alone": sampled("rloo", GROUPS, compute=replace(BLOCKS, share_prompts=False)),
    "rloo judge": sampled("rloo", reward=("judge:kind.yaml",), judge=JUDGE),
    "rloo engine": sampled(
        "rloo", None, {"engine": f"vllm:{VLLM_URL}"}, model="model", lora=LoRA(rank=2)
    ),
    "grpo talk": sampled("grpo", {"group_size": 2}, TALK_ON | STOPS),
    "grpo engine fsdp": sampled("grpo", None, {"engine": f"vllm:{VLLM_URL}"}, model="model", **CUT),
    "distill server": sampled(
        "distill",
        {"teacher": f"openai:{VLLM_URL}", "divergence": "sampled"},
        {"temperature": 1.0},
        model="model",
        reward=(),
    ),
}
RUNS = STAGES | METHODS | VARIANTS


def die_at(place: str) -> None:
    """Kills this process with SIGKILL when a run writes its third row or second checkpoint."""
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
    os.chdir(asked.root)
    failed = []
    for name in asked.names or RUNS:
        try:
            folder = asked.root / ("two" if asked.processes else "one") / name
            RUNS[name](output_dir=str(folder), resume=asked.resume)
        except Exception:
            failed.append(name)
            traceback.print_exc()
        seconds = time.process_time()
        print(
            f"@@ {seconds:.1f}",
            name,
            "failed" if name in failed else "ended",
            file=sys.stderr,
            flush=True,
        )
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
