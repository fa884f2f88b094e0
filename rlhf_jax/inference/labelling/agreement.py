"""How much people agree, with each other and with themselves, and what follows from it."""

import collections
import itertools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

Labels = Sequence[Hashable]


def krippendorff_alpha(units: Sequence[Labels]) -> float:
    """Krippendorff's alpha for nominal labels: 1 is full agreement, 0 what chance gives, nan
    without two different labels.

    Each unit has the labels that people gave it; units with one are left out (Krippendorff 2011,
    Computing Krippendorff's Alpha-Reliability).
    """
    total: collections.Counter[Hashable] = collections.Counter()
    disagreement = 0.0
    for labels in units:
        num = len(labels)
        if num < 2:
            continue
        counts = collections.Counter(labels)
        total += counts
        disagreement += _num_different(counts) / (num - 1)
    by_chance = _num_different(total)
    if not by_chance:
        return math.nan
    num_labels = sum(total.values())
    return 1 - (num_labels - 1) * disagreement / by_chance


def _num_different(counts: collections.Counter[Hashable]) -> int:
    """The ordered pairs of labels, among so many of each, that are different."""
    num = sum(counts.values())
    same = sum(count**2 for count in counts.values())
    return num**2 - same


def cohen_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float:
    """Cohen's kappa (1960) of two people's labels of the same units; nan if chance alone would
    make them agree, or without units.
    """
    num = len(pairs)
    firsts = collections.Counter(first for first, _ in pairs)
    seconds = collections.Counter(second for _, second in pairs)
    same = sum(first == second for first, second in pairs)
    by_chance = sum(count * seconds[name] for name, count in firsts.items())
    if num**2 == by_chance:
        return math.nan
    return (same * num - by_chance) / (num**2 - by_chance)


class Agreement(NamedTuple):
    """How often two judgements of the same pair are the same."""

    same: int
    num: int

    @property
    def share(self) -> float:
        """The share; nan without any."""
        return self.same / self.num if self.num else math.nan


def agreement(units: Sequence[Labels]) -> Agreement:
    """Over all pairs of labels of the same unit."""
    both = [pair for labels in units for pair in itertools.combinations(labels, 2)]
    return Agreement(sum(first == second for first, second in both), len(both))


def best_accuracy(share: float) -> tuple[float, float]:
    """Bounds of the accuracy, on single judgements, of a reward model that always knows what the
    majority prefers.

    If q_i is the share of people who prefer the better answer of pair i, two of them agree with
    probability q_i^2 + (1 - q_i)^2 = (1 + d_i^2) / 2, with d_i = 2 q_i - 1 in [0, 1], and the model
    is right with probability (1 + d_i) / 2. The mean of d_i is at least that of d_i^2 and at most
    its root (Jensen), so that an agreement ``share`` = (1 + E d^2) / 2 gives

        share <= accuracy <= (1 + sqrt(2 share - 1)) / 2.

    An agreement below one half, which chance gives, counts as one half.
    """
    squared = max(2 * share - 1, 0.0)
    low = (1 + squared) / 2
    high = (1 + math.sqrt(squared)) / 2
    return low, high
