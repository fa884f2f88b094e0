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
LATE = "steps after the highest gold"
LOST = "gold lost by then"
# {field of a measured run: what the table calls it}
JUDGES = {"judge": "a judge looks on", "gold": "gold looks on"}


class Measured(Protocol):
    """Means [measurements] along a run."""

    gold: np.ndarray
    proxy: np.ndarray
    judge: np.ndarray


class Seen(NamedTuple):
    """The first alert of a run with a judge."""

    step: int | None  # None: there was none
    late: int  # steps from the run's highest gold reward to it; negative: gold is highest later
    lost: float  # gold reward at the alert, below that highest


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
    """In how many seeds each judge raised the alert, and how late: each seed, and means over those
    with an alert, with 95% intervals.
    """
    found = []
    for judge in of_seeds[0]:
        name = f"{variant}, {JUDGES[judge]}"
        alerts_of = {seed: one[judge] for seed, one in enumerate(of_seeds)}
        raised = {seed: one for seed, one in alerts_of.items() if one.step is not None}
        for edge, value in results.share(len(raised), len(of_seeds)).items():
            metric = f"share of seeds with an alert{edge}"
            found.append(
                results.row(
                    name,
                    results.ALL,
                    last,
                    metric,
                    value,
                )
            )
        of_alerts = []
        for seed, one in raised.items():
            of_alerts.append(results.row(name, seed, last, LATE, one.late))
            of_alerts.append(results.row(name, seed, last, LOST, one.lost))
        found += [*of_alerts, *results.over_seeds(of_alerts)]
    return found
