"""How often do intervals of 95% hold the true value? Those of `metrics`, and others beside them.

    python experiments/intervals.py --out intervals.json

Rows are drawn from distributions whose mean, change or kappa is known, and each interval is
computed from the rows alone. A number is the share of draws in which it holds the true value, the
lowest over the distributions of its kind: wins have ties (0, .5, 1) and shares from .05 to 1;
changes are of 0s and 1s of the same rows, as alike as chance makes them, or more.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import results
import tyro

from rlhf_jax import cli, metrics
from rlhf_jax.errors import logger

Interval = Callable[[np.ndarray], metrics.Interval]
NUMS = (5, 10, 20, 50, 200)  # rows


class Rows(NamedTuple):
    """A distribution: how samples of n rows are drawn from it, each with the number of times that
    it came, and what is true of them.
    """

    draw: Callable[[np.random.Generator, int, int], Iterator[tuple[np.ndarray, int]]]
    truth: float


def cells(
    chances: list[float], values: np.ndarray, generator: np.random.Generator, num: int, draws: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Samples [num, ...] of the values, drawn with these chances."""
    counts = generator.multinomial(num, chances, size=draws)
    for each, times in zip(*np.unique(counts, axis=0, return_counts=True), strict=True):
        yield np.repeat(values, each, axis=0), int(times)


def numbers(
    name: str, generator: np.random.Generator, num: int, draws: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Samples [num] of numbers."""
    for values in getattr(generator, name)(size=(draws, num)):
        yield values, 1


def wins(share: float, ties: float) -> Rows:
    """Losses, ties and wins (0, .5, 1), of which ``ties`` of the ties that may be are."""
    tie = ties * 2 * min(share, 1 - share)
    chances = [1 - share - tie / 2, tie, share - tie / 2]
    return Rows(partial(cells, chances, np.array([0.0, 0.5, 1.0])), share)


def changes(before: float, after: float, alike: float) -> Rows:
    """Rows of 0 or 1 before and after, from independent ones to the most alike."""
    both = before * after + alike * (min(before, after) - before * after)
    chances = [1 - before - after + both, after - both, before - both, both]
    values = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    return Rows(partial(cells, chances, values), after - before)


def judges(agree: float, rare: float) -> Rows:
    """Labels of two judges who agree in so many rows; one of them says 1 in a share ``rare``."""
    other = rare * agree + (1 - rare) * (1 - agree)
    chance = rare * other + (1 - rare) * (1 - other)
    chances = [(1 - rare) * agree, (1 - rare) * (1 - agree), rare * (1 - agree), rare * agree]
    values = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    return Rows(partial(cells, chances, values), (agree - chance) / (1 - chance))


def bootstrap(values: np.ndarray) -> metrics.Interval:
    """The percentile bootstrap of a mean, of any number of rows."""
    drawn = np.random.default_rng(0).integers(len(values), size=(500, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def newcombe(values: np.ndarray) -> metrics.Interval:
    """Of a change of shares of the same rows (Newcombe 1998, Statistics in Medicine 17:2635, method
    10).
    """
    before, after = values.mean(axis=0)
    num = len(values)
    low, high = metrics.wilson(before, num=num)
    low_after, high_after = metrics.wilson(after, num=num)
    covary = num**2 * float(np.mean(values[:, 0] * values[:, 1]) - before * after)
    covary = max(covary - num / 2, 0.0) if covary > 0 else covary
    scale = num**2 * float(values[:, 0].std() * values[:, 1].std())
    phi = covary / scale if scale else 0.0
    far = [
        max(down**2 - 2 * phi * down * up + up**2, 0.0) ** 0.5
        for down, up in ((after - low_after, high - before), (before - low, high_after - after))
    ]
    return float(after - before - far[0]), float(after - before + far[1])


def kappa(values: np.ndarray) -> metrics.Interval:
    """The bootstrap of Cohen's kappa; none if it is not known."""

    def statistic(weights: np.ndarray) -> float:
        return metrics.cohen_kappa(values[:, 0], values[:, 1], weights=weights)

    equal = np.ones(len(values))
    if np.isnan(statistic(equal)):
        return float("nan"), float("nan")
    return metrics.bootstrap_interval(statistic, jax.random.key(0), weights=equal)


SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 1.0)
NUMBERS = {
    "normal": Rows(partial(numbers, "normal"), 0.0),
    "exponential": Rows(partial(numbers, "exponential"), 1.0),
    "log-normal": Rows(partial(numbers, "lognormal"), np.exp(0.5)),
}
# {kind of value: its distributions, and its intervals by their names}
KINDS: dict[str, tuple[list[Rows], dict[str, Interval]]] = {
    "wins with ties": (
        [wins(*case) for case in itertools.product(SHARES, (0.0, 0.3, 0.9))],
        {
            "share_interval": metrics.share_interval,
            "Student's": metrics.student,
            "bootstrap": bootstrap,
        },
    ),
    "change of shares": (
        [
            changes(*case)
            for case in itertools.product((0.1, 0.5, 0.9), (0.1, 0.5, 0.9, 1.0), (0.0, 0.5, 0.9))
        ],
        {
            "paired_change": lambda rows: metrics.paired_change(rows[:, 0], rows[:, 1]),
            "Newcombe's, paired": newcombe,
            "Student's": lambda rows: metrics.student(rows[:, 1] - rows[:, 0]),
        },
    ),
    **{
        f"mean of {name} numbers": ([one], {"student": metrics.student, "bootstrap": bootstrap})
        for name, one in NUMBERS.items()
    },
    "kappa, equal labels": ([judges(0.9, 0.5)], {"bootstrap_interval": kappa}),
    "kappa, one label in ten": ([judges(0.95, 0.1)], {"bootstrap_interval": kappa}),
}


def coverage(
    one: Rows, interval: Interval, num: int, draws: int, generator: np.random.Generator
) -> tuple[float, float]:
    """In which share of the draws the interval of ``num`` rows holds the true value, and its mean
    width, over the draws that have one; NaN if none has.
    """
    found = []
    for values, times in one.draw(generator, num, draws):
        low, high = interval(values)
        if not np.isnan(low):
            found.append((times, low - 1e-9 <= one.truth <= high + 1e-9, high - low))
    if not found:
        return float("nan"), float("nan")
    times_of, holds, widths = np.array(found, float).T
    return float(np.average(holds, weights=times_of)), float(np.average(widths, weights=times_of))


def rows_of(kind: str, draws: int) -> list[results.Row]:
    """The rows of a kind of value: of each interval and number of rows."""
    cases, intervals = KINDS[kind]
    rows = []
    for (name, interval), num in itertools.product(intervals.items(), NUMS):
        generator = np.random.default_rng(num)
        of_cases = [coverage(one, interval, num, draws, generator) for one in cases]
        held, widths = np.array(of_cases).T
        if np.isnan(held).all():
            continue
        variant = f"{kind}: {name}"
        logger.info(f"{variant}, {num} rows: {held.min():.3f}, in the mean {held.mean():.3f}")
        found = {
            f"{num} rows": held.min(),
            f"mean of {num} rows": held.mean(),
            f"width of {num} rows": widths.mean(),
        }
        rows += [results.row(variant, results.ALL, 0, *number) for number in found.items()]
    return rows


def main(out: Path, draws: int = 2000) -> None:
    """Measures all intervals, or goes on with a file of this revision.

    Args:
        out: a file for the results as a table.
        draws: of each distribution; of two judges, whose intervals take long, an eighth.
    """
    started = time.monotonic()
    before = json.loads(out.read_text("utf-8")) if out.exists() else {"revision": None}
    is_same = (before["revision"], before.get("draws")) == (results.REVISION, draws)
    rows: list[results.Row] = before["rows"] if is_same else []
    seconds = before["seconds"] if is_same else 0
    for kind in KINDS:
        if any(row["variant"].startswith(f"{kind}: ") for row in rows):
            continue
        rows += rows_of(kind, draws // 8 if kind.startswith("kappa") else draws)
        command = f"python experiments/intervals.py --out {out.name}"
        results.write(out, command, seconds + time.monotonic() - started, rows, draws=draws)


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
