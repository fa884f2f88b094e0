"""Whether a held-out metric changed by more than chance: how many rows it rests on, and a 95%
interval of its change.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.special

from rlhf_jax.report.records import Row, RunRecord, series

ROWS = "validation/rows"
_Z = 1.96
_LEVEL = 0.975


class Interval(NamedTuple):
    """A value with its 95% interval."""

    low: float
    value: float
    high: float


class Change(NamedTuple):
    """The change of a metric from the first to the last validation."""

    num: int
    unit: str
    """What is independent: held-out rows or prompts."""
    interval: Interval

    @property
    def text(self) -> str:
        """ "64 held-out prompts, change 0.8 to 1.1 at 95%", and whether that may be chance."""
        low = self.interval.low
        high = self.interval.high
        text = f"{self.num} held-out {self.unit}, change {low:.2g} to {high:.2g} at 95%"
        if low <= 0 <= high:
            text += ": within noise"
        return text


def change(record: RunRecord, name: str) -> Change | None:
    """The change of ``validation/accuracy`` or ``validation/score``; None of others, and if the run
    does not say on how many rows it was measured, or has one validation alone.
    """
    _, values = series(record.metrics, name)
    if len(values) < 2:
        return None
    num_rows = record.last.get(ROWS)
    if name == "validation/accuracy" and num_rows:
        interval = of_shares(values[0], values[-1], num_rows)
        return Change(num_rows, "rows", interval)
    if name == "validation/score":
        return _of_scores(record)
    return None


def _of_scores(record: RunRecord) -> Change | None:
    """The change of the mean score of prompts that the first and the last validation answer."""
    scores = [_by_prompt(rows) for _, rows in record.validations]
    prompts = sorted(set.intersection(*map(set, scores))) if scores else []
    if len(scores) < 2 or len(prompts) < 2:
        return None
    first, last = scores
    before = np.array([first[prompt] for prompt in prompts])
    after = np.array([last[prompt] for prompt in prompts])
    interval = of_pairs(before, after)
    return Change(len(prompts), "prompts", interval)


def of_shares(before: float, after: float, num: int) -> Interval:
    """The difference of two shares of ``num`` rows each (Newcombe 1998, method 10, of Wilson's
    intervals). It takes them for independent, and is too wide for the same rows.
    """
    first = _wilson(before, num)
    last = _wilson(after, num)
    below = math.hypot(last.value - last.low, first.high - first.value)
    above = math.hypot(last.high - last.value, first.value - first.low)
    gain = after - before
    return Interval(gain - below, gain, gain + above)


def of_pairs(before: np.ndarray, after: np.ndarray) -> Interval:
    """Student's interval of the mean difference of [N] pairs. Of scores of 0 and 1 that all change
    alike, and so have no spread, that of two shares.
    """
    differences = after - before
    num = len(differences)
    gain = float(differences.mean())
    spread = float(differences.std(ddof=1))
    are_shares = np.isin([before, after], (0, 1)).all()
    if spread == 0 and are_shares:
        return of_shares(float(before.mean()), float(after.mean()), num)
    quantile = scipy.special.stdtrit(num - 1, _LEVEL)
    far = float(quantile) * spread / math.sqrt(num)
    return Interval(gain - far, gain, gain + far)


def _wilson(share: float, num: int) -> Interval:
    """Wilson's (1927) interval of a share."""
    extra = _Z**2 / num
    scale = 1 + extra
    centre = (share + extra / 2) / scale
    variance = share * (1 - share)
    variance += extra / 4
    spread = _Z * math.sqrt(variance / num)
    spread /= scale
    return Interval(centre - spread, share, centre + spread)


def _by_prompt(rows: Sequence[Row]) -> dict[str, float]:
    """The mean of the finite scores of each prompt's responses."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        score = row.get("score")
        if isinstance(score, float) and math.isfinite(score):
            of_prompt = scores.setdefault(str(row.get("prompt")), [])
            of_prompt.append(score)
    means = {}
    for prompt, values in scores.items():
        means[prompt] = sum(values) / len(values)
    return means
