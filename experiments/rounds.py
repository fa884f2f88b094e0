"""Labels in rounds, or all at once? The same number of labels, spent in three ways.

    python experiments/rounds.py runs/rounds-experiment --out rounds.json

A round is one of Christiano et al. (2017) and Ziegler et al. (2019), section 2: the policy answers
prompts twice, somebody compares the answers, a reward model is trained on all comparisons so far,
and the policy is trained on it. The annotators are simulated: of each two answers they name the one
that the quickstart's rubric scores higher, and the other one in a fifth of the pairs. The rubric
itself, which no stage sees, judges the answers to held-out prompts. With people in their place,
`rlhf-jax label --serve` compares the pairs. The command goes on where it was stopped.
"""

import json
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import results
import tyro

from rlhf_jax import cli, metrics, training
from rlhf_jax.algorithms import ppo
from rlhf_jax.config import RunConfig, parse
from rlhf_jax.data import demo
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError, logger
from rlhf_jax.evaluation import bench, rubric
from rlhf_jax.generation.generator import Generator
from rlhf_jax.graders import spec
from rlhf_jax.inference import asking
from rlhf_jax.inference.labelling import pairs
from rlhf_jax.report import records
from rlhf_jax.runs.writing import write_atomically
from rlhf_jax.training.pipeline import stage_config

WRONG = 0.2  # share of the pairs in which an annotator names the worse answer
VARIANTS = {
    "one round": (1, "random"),
    "four rounds, random": (4, "random"),
    "four rounds, disagreement": (4, "disagreement"),
}
SAMPLES = 4  # of each held-out prompt, for pairs of the policy's own


class Sizes(NamedTuple):
    """How large the experiment is."""

    labels: int = 256
    iterations: int = 40  # of RL, over all rounds
    pool: int = 2  # sampled pairs for each that is labelled
    members: int = 3  # of the ensemble
    epochs: int = 6  # of the reward model


FULL = Sizes()


def train(stage: Callable[..., object], config: RunConfig, *parts: Any) -> Path:
    """Runs a stage, or goes on with it; returns the folder of its run."""
    folder = Path(str(config.output_dir))
    if records.model_config(folder) is None:
        stage(config, *parts)
    return folder


def say(texts: Sequence[str], row: Row) -> int | None:
    """Which of two answers an annotator prefers; None for a tie. Who is wrong about a pair is wrong
    in both orders.
    """
    first, second = (rubric.score(row.columns, text) for text in texts)
    if first == second:
        return None
    draw = zlib.crc32("\0".join([str(row.prompt), *sorted(texts)]).encode()) / (1 << 32)
    return int(second > first) ^ int(draw < WRONG)


def compare(
    file: Path, policy: Path, prompts: Sequence[Row], judges: Sequence[str], num: int, seed: int
) -> None:
    """Samples pairs of the policy, chooses some if there are judges, has them compared and writes
    rows of preferences.
    """
    if file.exists():
        return
    model = asking.open_policy(str(policy), asking.Settings())
    texts, _ = model.sample(model.ask(prompts, 2), seed)
    pool = [
        pairs.Pair(number, asking.as_given(row, model.tokenizer), texts[2 * number :][:2])
        for number, row in enumerate(prompts)
    ]
    if judges:
        pool = pairs.choose(pool, "disagreement", judges, count=num, random_share=0.2, seed=seed)
    lines = []
    for pair in [pair for pair in pool if not pair.is_useless][:num]:
        better = say(pair.answers, prompts[pair.number])
        if better is not None:
            chosen = {"chosen": pair.answers[better], "rejected": pair.answers[1 - better]}
            lines.append(json.dumps({"prompt": pair.prompt, **chosen}) + "\n")
    if not lines:
        raise UserError(f"{policy}: its answers to each prompt are equal, nothing to compare")
    write_atomically(file, "".join(lines))


def answer(
    policy: Path, file: Path, seed: int, *, reward: Sequence[str] = ()
) -> tuple[Generator, Any, list[list[str]], Any]:
    """A policy, the held-out prompts, SAMPLES answers to each that fit into ``reward``'s models
    too, and their rollout.
    """
    model = asking.open_policy(str(policy), asking.Settings(), reward=reward)
    data = asking.read(model, asking.Prompts(prompts=(str(file),)), seed)
    texts, rollout = model.sample(model.ask(data.rows, SAMPLES), seed)
    of_prompts = [texts[i : i + SAMPLES] for i in range(0, len(texts), SAMPLES)]
    return model, data.rows, of_prompts, rollout


def gold(rows: Sequence[Row], texts: Sequence[Sequence[str]]) -> np.ndarray:
    """[prompts, SAMPLES] the rubric's scores."""
    scores = [
        [rubric.score(row.columns, text) for text in own]
        for row, own in zip(rows, texts, strict=True)
    ]
    return np.array(scores)


def measure(policy: Path, first: Path, file: Path, seed: int) -> dict[str, float]:
    """The rubric's mean on held-out prompts, and how often it prefers the policy to the first one,
    ties half.
    """
    scores, before = (gold(*answer(folder, file, seed)[1:3]) for folder in (policy, first))
    means = scores.mean(axis=1)
    won = np.mean((scores > before) + (scores == before) / 2, axis=1)
    numbers = {
        "gold score": results.with_edges(means.mean(), metrics.student(means)),
        "win rate against the first policy": results.with_edges(
            won.mean(), metrics.share_interval(won)
        ),
    }
    return {f"{name}{edge}": value for name, of in numbers.items() for edge, value in of.items()}


def own_accuracy(policy: Path, reward_model: Path, file: Path, seed: int) -> dict[str, float]:
    """How often the reward model and the rubric prefer the same of two answers of the policy, where
    the rubric prefers one.
    """
    entries = (f"mean:{reward_model / 'model'}",)
    model, rows, texts, rollout = answer(policy, file, seed, reward=entries)
    reward = asking.reward_of(entries, model, ())
    messages = {"messages": [row.conversation for row in rows for _ in range(SAMPLES)]}
    learned = bench.score(reward, rollout, messages, model.batch_size)
    true = gold(rows, texts).ravel()
    margins = true[::2] - true[1::2]
    agreed = margins * (learned[::2] - learned[1::2])
    return results.share(np.count_nonzero(agreed > 0), max(np.count_nonzero(margins), 1))


def rows_of(folder: Path, variant: str, seed: int, sizes: Sizes) -> list[results.Row]:
    """One way to spend the labels, with one seed."""
    num_rounds, how = VARIANTS[variant]
    data = folder / "data"
    if not data.exists():
        demo.write(data, seed=seed)
    held_out = data / "heldout_prompts.json"
    base = parse(RunConfig, ["--config", "quickstart"], prog="rounds")
    base = replace(base, seed=seed, resume=True, data=(str(data),))
    first = train(training.sft.run, stage_config(base, folder / "sft"))
    job = folder / variant.replace(", ", "-").replace(" ", "-")
    policy = first
    prefs: list[str] = []
    judges: list[str] = []
    found = []

    def note(number: int, measured: dict[str, float]) -> None:
        for metric, value in measured.items():
            found.append(results.row(variant, seed, number, metric, value))

    note(0, measure(first, first, held_out, seed))
    prompts = list(
        asking.read(
            asking.open_policy(str(first), asking.Settings()),
            asking.Prompts(prompts=(str(data / "prompts.json"),)),
            seed,
        ).rows
    )
    order = np.random.default_rng(seed).permutation(len(prompts))
    num = sizes.labels // num_rounds
    for number in range(1, num_rounds + 1):
        own = job / f"round-{number}"
        own.mkdir(parents=True, exist_ok=True)
        # No prompt comes again before all were asked.
        places = np.arange((number - 1) * sizes.pool * num, number * sizes.pool * num)
        asked = [prompts[order[place % len(prompts)]] for place in places]
        prefs.append(str(own / "prefs.jsonl"))
        compare(Path(prefs[-1]), policy, asked, judges, num, seed + number)
        learner = replace(
            base.reward_model,
            data=tuple(prefs),
            ensemble_size=sizes.members,
            num_epochs=sizes.epochs,
        )
        start = str(first / "model")  # the reward model starts from the first policy each time
        config = stage_config(base, own / "reward_model", start, reward_model=learner)
        model = train(training.reward_model.run, config) / "model"
        judges = [str(member) for member in spec.members(model) or [model]]
        if how == "random":
            judges = []
        config = stage_config(
            base,
            own / "rl",
            str(policy / "model"),
            reward=(f"mean:{model}",),
            rl=replace(base.rl, num_iterations=sizes.iterations // num_rounds),
        )
        policy = train(training.rl.run, config, ppo)
        note(number, measure(policy, first, held_out, seed))
    metric = "reward model accuracy on the policy's own pairs"
    accuracy = own_accuracy(policy, own / "reward_model", held_out, seed)
    note(number, {f"{metric}{edge}": value for edge, value in accuracy.items()})
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
