"""Would the alert "reward hacking" of a run have seen that the gold reward turns down, and when?

The rule is the package's own (docs/alerts.md). What it compares, the score that the policy is
trained on and a judge's, are the measurements of overoptimisation.py. Two judges look on: a reward
model of comparisons of its own, and the gold reward itself, which no run has.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import results

from rlhf_jax.runs import alerts

RULE = [rule for rule in alerts.parse([]) if rule.name == "reward hacking"]
JUDGES = ("judge", "gold")  # fields of a measured run
NAMES = {"judge": "a judge looks on", "gold": "gold looks on"}


class Measured(Protocol):
    """Means [measurements] along a run."""

    gold: np.ndarray
    proxy: np.ndarray
    judge: np.ndarray


class Seen(NamedTuple):
    """The first alert of a run with a judge."""

    step: int | None  # None: there was none
    late: int  # steps after the highest gold reward before it; negative: gold rises later
    lost: float  # gold reward at the alert, below the highest of the run


def seen(run: Measured, steps: Sequence[int]) -> dict[str, Seen]:
    """{judge: what the alert saw}"""
    highest = int(np.argmax(run.gold))
    found = {}
    for judge in JUDGES:
        history = [
            {"step": step, "validation/score": float(score), "validation/judge": float(judged)}
            for step, score, judged in zip(steps, run.proxy, getattr(run, judge), strict=True)
        ]
        raised = alerts.check(RULE, history)
        if not raised:
            found[judge] = Seen(None, 0, 0.0)
            continue
        at = steps.index(raised[0].step)
        lost = float(run.gold[highest] - run.gold[at])
        found[judge] = Seen(steps[at], steps[at] - steps[highest], lost)
    return found


def rows(variant: str, of_seeds: list[dict[str, Seen]], last: int) -> list[results.Row]:
    """In how many seeds each judge raised the alert, and how late, with 95% intervals."""
    found = []
    for judge in JUDGES:
        name = f"{variant}, {NAMES[judge]}"
        raised = [one[judge] for one in of_seeds if one[judge].step is not None]
        shares = results.share(len(raised), len(of_seeds))
        for edge, value in shares.items():
            metric = f"share of seeds with an alert{edge}"
            found.append(results.row(name, results.ALL, last, metric, value))
        paired = []
        for seed, one in enumerate(raised):
            paired.append(results.row(name, seed, last, "steps after the highest gold", one.late))
            paired.append(results.row(name, seed, last, "gold lost by then", one.lost))
        found += results.over_seeds(paired)
    return found
