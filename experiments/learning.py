"""Sums that a chat model learns, which several experiments share: rows, commands and answers.

The model is SmolLM2-135M-Instruct, the task is to add ("What is 3 + 9? Reply with the number
only."). SFT learns right answers; DPO starts from SFT's weights and learns from pairs of the right
number and a wrong one; GRPO starts from the chat model, and a function that checks the answer pays
it. Each stage trains adapters, and is a command in a process of its own, which goes on where it was
stopped.
"""

import json
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import smollm2
import sums

from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import Generator
from rlhf_jax.runs.writing import write_atomically

NEW_TOKENS = 10
FURTHEST = 10  # of a wrong number from the right one
# What a stage starts from: the chat model, or SFT's policy.
BASE = "model"
SFT = "sft"


class Sizes(NamedTuple):
    """How large the experiment is."""

    largest: int = 20  # number of a sum
    held_out: int = 128  # sums
    batch: int = 16  # rows or pairs of a step
    iterations: int = 10  # of RL
    answers: int = 64  # of an iteration


class Stage(NamedTuple):
    """A command line, and what it starts from."""

    flags: list[str]
    start: str

    @property
    def run(self) -> Path:
        """Its folder."""
        return Path(self.flags[-1])


FULL = Sizes()


def problems(sizes: Sizes) -> list[sums.Problem]:
    """All sums, in one drawn order."""
    return sums.problems(range(1, sizes.largest + 1))


def model_of(folder: Path, runs: Path, start: str) -> Path:
    """The folder of the chat model, or of what a run of the seed wrote."""
    return folder / BASE if start == BASE else runs / start / "model"


def answers_of(model: Path, rows: list[dict[str, Any]], seed: int, file: Path) -> list[str]:
    """A sampled answer to each sum, kept in the file."""
    if not file.exists():
        generator = Generator(model, max_new_tokens=NEW_TOKENS)
        texts = generator([row["prompt"] for row in rows], seed=seed).texts
        write_atomically(file, json.dumps(texts, indent=0))
        jax.clear_caches()  # the program of the next model is another one
    texts = json.loads(file.read_text("utf-8"))
    return [str(text) for text in texts]


def right(texts: list[str], rows: list[dict[str, Any]]) -> np.ndarray:
    """[N] 1 for a right answer, else 0."""
    answers = [row["answer"] for row in rows]
    return np.array(sums.is_answer([], texts, answers))


def alone(texts: list[str]) -> np.ndarray:
    """[N] 1 for a number and nothing else, as the question asks, else 0."""
    return np.array([float(bool(re.fullmatch(r"\s*\d+\W*", text))) for text in texts])


def pairs_of(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A pair of each sum: the right number, and a wrong one near it."""
    draw = random.Random(1)
    found = []
    for row in rows:
        total = int(row["answer"])
        near = range(max(total - FURTHEST, 1), total + FURTHEST + 1)
        (wrong,) = draw.sample([number for number in near if number != total], 1)
        found.append({"prompt": row["prompt"], "chosen": str(total), "rejected": str(wrong)})
    return found


def write_data(folder: Path, sizes: Sizes) -> None:
    """The rows, pairs and prompts of training, and as many files of held-out ones."""
    rows = problems(sizes)
    parts = {"held_out": rows[: sizes.held_out], "train": rows[sizes.held_out :]}
    for part, found in parts.items():
        kinds: dict[str, list[dict[str, Any]]] = {
            "rows": [{"prompt": row["prompt"], "response": row["answer"]} for row in found],
            "prompts": found,
            "pairs": pairs_of(found),
        }
        for kind, content in kinds.items():
            path = folder / f"{part}_{kind}.json"
            path.write_text(json.dumps(content, indent=0), encoding="utf-8")


def prepare(folder: Path, sizes: Sizes) -> None:
    """Makes the model and the data where they are missing.

    Raises:
        UserError: the folder is of an experiment of other sizes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sizes.json"
    if not file.exists():
        smollm2.write_model(folder / "model")
        write_data(folder, sizes)
        write_atomically(file, json.dumps(sizes._asdict()))
    before = Sizes(**json.loads(file.read_text("utf-8")))
    if before != sizes:
        raise UserError(f"{file}: made with {before}, asked for {sizes}; choose another folder")


class Commands(NamedTuple):
    """The command lines of a seed."""

    folder: Path
    runs: Path
    sizes: Sizes
    seed: int

    def stage(
        self,
        name: str,
        start: str,
        kind: str,
        settings: dict[str, Any],
        more: Sequence[str] = (),
    ) -> Stage:
        """A command that learns from a kind of rows, with settings behind their flags."""
        model = model_of(self.folder, self.runs, start)
        words = [name, "--model", model, "--seed", self.seed, "--lora.rank", 16]
        words += ["--lora.alpha", 32, "--compute.scan-layers", "true"]
        words += ["--checkpoint-interval", 9999, "--data", self.folder / f"train_{kind}.json"]
        for key, value in settings.items():
            words += [f"--{key}", value]
        run = self.runs / name.replace("-", "_")
        flags = [*map(str, words), *more, "--output-dir", str(run)]
        return Stage(flags, start)

    def supervised(
        self, name: str, start: str, kind: str, *, rate: float, rows: int, epochs: int
    ) -> Stage:
        """A stage without sampling; it validates at both ends, and every half of its steps."""
        own = {
            "batch-size": self.sizes.batch,
            "num-epochs": epochs,
            "validation-data": self.folder / f"held_out_{kind}.json",
            "validation-interval": max(rows * epochs // self.sizes.batch // 2, 1),
            "optimizer.learning-rate": rate,
        }
        settings = {f"{name}.{key}": value for key, value in own.items()}
        return self.stage(name, start, kind, settings)

    def grpo(self, start: str, *, rate: float) -> Stage:
        """A function that checks the answers to the prompts pays for them."""
        own = {
            "num-iterations": self.sizes.iterations,
            "batch-size": self.sizes.answers,
            "max-new-tokens": NEW_TOKENS,
            "kl-coef": 0.0,
            "optimizer.learning-rate": rate,
            "optimizer.schedule": "constant",
            "validation-data": self.folder / "held_out_prompts.json",
            "validation-prompts": self.sizes.held_out,
            "validation-interval": max(self.sizes.iterations // 2, 1),
        }
        settings = {f"rl.{key}": value for key, value in own.items()}
        more = ["--reward", f"{Path(sums.__file__)}:is_answer", "--grpo.group-size", "8"]
        more += ["--grpo.aggregate", "token", "--grpo.kl-loss-coef", "0"]
        return self.stage("grpo", start, "prompts", settings, more)


def stages(folder: Path, runs: Path, sizes: Sizes, seed: int) -> dict[str, Stage]:
    """{name: its command line behind ``rlhf-jax``, and what it starts from}"""
    commands = Commands(folder, runs, sizes, seed)
    num = sizes.largest**2 - sizes.held_out  # sums to train on
    return {
        "SFT": commands.supervised("sft", BASE, "rows", rate=3e-4, rows=num, epochs=2),
        "DPO": commands.supervised("dpo", SFT, "pairs", rate=1e-4, rows=num, epochs=1),
        "GRPO, checked answers": commands.grpo(BASE, rate=3e-4),
    }


def finished(run: Path, flags: list[str]) -> list[dict[str, Any]]:
    """The metrics of a stage, which is run to its end.

    Raises:
        UserError: the folder has a run of another command.
    """
    more = []
    manifest = run / "manifest.json"
    if manifest.exists():
        before = json.loads(manifest.read_text("utf-8"))["command"]
        asked = shlex.join(["rlhf-jax", *flags])
        if before.removesuffix(" --resume") != asked:
            raise UserError(f"{run}: holds {before!r}, asked for {asked!r}; choose another folder")
        more = ["--resume"]
    if not (run / "model").exists():
        subprocess.run([sys.executable, "-m", "rlhf_jax", *flags, *more], check=True)
    return sums.rows_of(run / "metrics.jsonl")
