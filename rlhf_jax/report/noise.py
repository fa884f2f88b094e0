"""Whether a held-out metric changed by more than chance: how many rows it rests on, and a 95%
interval of its change.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special

from rlhf_jax.report.records import RunRecord, series

ROWS = "validation/rows"
_Z = 1.96
_LEVEL = 0.975


class Change(NamedTuple):
    """The change of a metric from the first to the last validation."""

    num: int
    unit: str
    """What is independent: held-out rows or prompts."""
    low: float
    high: float

    @property
    def text(self) -> str:
        """ "64 held-out prompts, change 0.8 to 1.1 at 95%", and whether that may be chance."""
        text = f"{self.num} held-out {self.unit}, change {self.low:.2g} to {self.high:.2g} at 95%"
        return f"{text}: within noise" if self.low <= 0 <= self.high else text


def change(record: RunRecord, name: str) -> Change | None:
    """The change of ``validation/accuracy`` or ``validation/score``; None of others, and if the run
    does not say on how many rows it was measured, or has one validation alone.
    """
    _, values = series(record.metrics, name)
    if len(values) < 2:
        return None
    if name == "validation/accuracy" and record.last.get(ROWS):
        num = int(record.last[ROWS])
        return Change(num, "rows", *of_shares(values[0], values[-1], num))
    if name != "validation/score" or len(record.validations) < 2:
        return None
    first, last = (_by_prompt(rows) for _, rows in record.validations)
    both = sorted(first.keys() & last.keys())
    if len(both) < 2:
        return None
    before, after = ([_mean(of[prompt]) for prompt in both] for of in (first, last))
    return Change(len(both), "prompts", *of_pairs(before, after))


def of_shares(before: float, after: float, num: int) -> tuple[float, float]:
    """The 95% interval of the difference of two shares of ``num`` rows each (Newcombe 1998, method
    10, of Wilson's intervals). It takes them for independent, and is too wide for the same rows.
    """
    low_before, high_before = _wilson(before, num)
    low_after, high_after = _wilson(after, num)
    below = math.hypot(after - low_after, high_before - before)
    above = math.hypot(high_after - after, before - low_before)
    return after - before - below, after - before + above


def of_pairs(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Student's 95% interval of the mean difference of [N] pairs. Where all shares change alike,
    which has no spread, that of two shares.
    """
    differences = np.subtract(after, before)
    num = len(differences)
    mean = float(differences.mean())
    spread = float(differences.std(ddof=1))
    are_shares = np.isin([before, after], (0.0, 1.0)).all()
    if spread == 0.0 and are_shares:
        return of_shares(float(np.mean(before)), float(np.mean(after)), num)
    far = float(scipy.special.stdtrit(num - 1, _LEVEL)) * spread / math.sqrt(num)
    return mean - far, mean + far


def _wilson(share: float, num: int) -> tuple[float, float]:
    """Wilson's (1927) 95% interval of a share."""
    scale = 1 + _Z**2 / num
    centre = (share + _Z**2 / (2 * num)) / scale
    variance = share * (1 - share) / num + _Z**2 / (4 * num**2)
    spread = _Z * math.sqrt(variance) / scale
    return centre - spread, centre + spread


def _by_prompt(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The finite scores of each prompt's responses."""
    found: dict[str, list[float]] = {}
    for row in rows:
        score = row.get("score")
        if isinstance(score, int | float) and math.isfinite(score):
            found.setdefault(str(row.get("prompt")), []).append(float(score))
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
