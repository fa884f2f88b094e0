"""Labels in rounds, or all at once? The same number of labels, spent in three ways.

    python experiments/rounds.py runs/rounds-experiment --out rounds.json

The annotators are simulated: of each two answers they name the one that the quickstart's rubric
scores higher, and the other one in a fifth of the pairs. The reward model learns from them alone;
the rubric itself, which no stage sees, judges the answers to held-out prompts. Two more ways, one
round by disagreement and more of it, do not exist: before the first round no reward model
disagrees. The command goes on where it was stopped.
"""

import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import results
import tyro

from rlhf_jax import cli, training
from rlhf_jax.config import Rounds, RunConfig, parse
from rlhf_jax.data import demo
from rlhf_jax.errors import logger
from rlhf_jax.evaluation import bench, rubric
from rlhf_jax.inference import asking, rounds
from rlhf_jax.report import records
from rlhf_jax.runs import reading

WRONG = 0.2  # share of the pairs in which an annotator names the worse answer
Choose = Literal["random", "disagreement"]
VARIANTS: dict[str, tuple[int, Choose]] = {
    "one round": (1, "random"),
    "four rounds, random": (4, "random"),
    "four rounds, disagreement": (4, "disagreement"),
}
MEASURED = {"quality": "gold score", "win_rate": "win rate against the first policy"}
SAMPLES = 4  # of each held-out prompt, for pairs of the policy's own


class Sizes(NamedTuple):
    """How large the experiment is."""

    labels: int = 256
    iterations: int = 40  # of RL, over all rounds
    pool: int = 2  # sampled pairs for each that is labelled
    members: int = 3  # of the ensemble
    epochs: int = 6  # of the reward model


FULL = Sizes()


def gold(
    prompts: Sequence[str], responses: Sequence[str], category: Sequence[str], topic: Sequence[str]
) -> list[float]:
    """The rubric's scores."""
    return [
        rubric.score({"category": kind, "topic": what}, response)
        for kind, what, response in zip(category, topic, responses, strict=True)
    ]


def noisy(
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    category: Sequence[str],
    topic: Sequence[str],
) -> list[float]:
    """1 where the first answer is said to be better, 0.5 for a tie of the rubric. Who is wrong
    about a pair is wrong in both orders.
    """
    scores = [gold(prompts, texts, category, topic) for texts in (first, second)]
    said = []
    for prompt, *texts, one, other in zip(prompts, first, second, *scores, strict=True):
        share = 0.5 if one == other else float(one > other)
        draw = zlib.crc32("\0".join([prompt, *sorted(texts)]).encode()) / (1 << 32)
        said.append(1 - share if draw < WRONG else share)
    return said


def first_policy(folder: Path, seed: int) -> Path:
    """The quickstart's data and supervised policy."""
    data = folder / "data"
    demo.write(data, seed=seed)
    run = folder / "sft"
    if (run / "report.html").exists():
        return run
    config = replace(
        quickstart(),
        data=(str(data),),
        output_dir=str(run),
        seed=seed,
        resume=run.exists(),
    )
    training.sft.run(config)
    return run


def quickstart() -> RunConfig:
    """The settings of `rlhf-jax quickstart`."""
    return parse(RunConfig, ["--config", "quickstart"], prog="rounds")


def config_of(folder: Path, variant: str, policy: Path, seed: int, sizes: Sizes) -> RunConfig:
    """The settings of one way to spend the labels."""
    number, choose = VARIANTS[variant]
    pairs = sizes.labels // number
    run = folder / variant.replace(", ", "-").replace(" ", "-")
    data = folder / "data"
    here = Path(__file__).resolve()
    base = quickstart()
    reward_model = replace(
        base.reward_model,
        ensemble_size=sizes.members,
        num_epochs=sizes.epochs,
    )
    how = Rounds(
        number=number,
        pairs=pairs,
        prompts=sizes.pool * pairs,
        choose=choose,
        judge=f"{here}:noisy",
        gold=f"{here}:gold",
        held_out=(str(data / "heldout_prompts.json"),),
    )
    return replace(
        base,
        model=str(policy),
        data=(str(data / "prompts.json"),),
        output_dir=str(run),
        seed=seed,
        resume=run.exists(),
        reward_model=reward_model,
        rl=replace(base.rl, num_iterations=sizes.iterations // number),
        rounds=how,
    )


def measured(done: rounds.Result) -> Iterator[tuple[int, str, float]]:
    """(round, metric, value) of the evaluations, from the first policy on."""
    first = rounds.Round(0, done.folder)
    for own in (first, *done.rounds):
        path = own.evaluation / records.EVALUATION
        content = reading.read_json(path, reading.EVALUATION, ["rows"])
        for row in content["rows"]:
            name = MEASURED.get(row["metric"])
            if name is None or row["value"] is None:
                continue
            yield own.number, name, row["value"]
            yield own.number, f"{name} low", row["low"]
            yield own.number, f"{name} high", row["high"]


def own_accuracy(own: rounds.Round, held_out: Path, seed: int) -> dict[str, float]:
    """How often the reward model of a round and the rubric prefer the same of two answers of the
    round's own policy, where the rubric prefers one.
    """
    policy = asking.open_policy(str(own.rl), asking.Settings())
    data = asking.read(policy, asking.Prompts(prompts=(str(held_out),)), seed)
    asked = policy.ask(data.rows, SAMPLES)
    texts, rollout = policy.sample(asked, seed)
    of_samples = [row for row in asked.rows for _ in range(SAMPLES)]
    messages = {"messages": [row.conversation for row in of_samples]}
    reward = asking.reward_of((f"mean:{own.reward_model / 'model'}",), policy, ())
    learned = bench.score(reward, rollout, messages, policy.batch_size)
    true = []
    for row, text in zip(of_samples, texts, strict=True):
        true.append(rubric.score(row.columns, text))
    margins = np.array(true[::2]) - np.array(true[1::2])
    agreed = margins * (learned[::2] - learned[1::2])
    num = np.count_nonzero(margins)
    return results.share(np.count_nonzero(agreed > 0), max(num, 1))


def rows_of(folder: Path, variant: str, seed: int, sizes: Sizes) -> list[results.Row]:
    """One way to spend the labels, with one seed."""
    policy = first_policy(folder, seed)
    done = rounds.run(config_of(folder, variant, policy, seed, sizes))
    found = [results.row(variant, seed, step, name, value) for step, name, value in measured(done)]
    last = done.rounds[-1]
    metric = "reward model accuracy on the policy's own pairs"
    for end, value in own_accuracy(last, folder / "data" / "heldout_prompts.json", seed).items():
        found.append(results.row(variant, seed, last.number, metric + end, value))
    return found


def main(
    folder: tyro.conf.Positional[Path],
    out: Path | None = None,
    seeds: int = 5,
    sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL,
) -> None:
    """Spends the labels in each way, with each seed, and says what the answers are worth.

    Args:
        folder: of everything.
        out: a file for the results as a table.
        seeds: how many.
        sizes: of the experiment.
    """
    started = time.monotonic()
    rows: list[results.Row] = []
    for seed in range(seeds):
        of_seed = folder / f"seed-{seed}"
        of_seed.mkdir(parents=True, exist_ok=True)
        for variant in VARIANTS:
            rows += rows_of(of_seed, variant, seed, sizes)
            if out is not None:
                seconds = time.monotonic() - started
                command = "python experiments/rounds.py runs/rounds-experiment"
                table = [*rows, *results.over_seeds(rows)]
                results.write(out, command, seconds, table, sizes=sizes._asdict())
    last = {variant: number for variant, (number, _) in VARIANTS.items()}
    for row in results.over_seeds(rows):
        if row["step"] == last[row["variant"]]:
            logger.info(f"{row['variant']}: {row['metric']} {row['value']:.3f}, {seeds} seeds")


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
