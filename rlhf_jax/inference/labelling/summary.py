"""``rlhf-jax label --summary``: how much people agree, with each other and with themselves, their
bias and speed, and what follows from it.
"""

import collections
import itertools
import math
import statistics
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlhf_jax import metrics
from rlhf_jax.errors import UserError, file_errors
from rlhf_jax.inference.labelling import store
from rlhf_jax.inference.labelling.store import Judgement
from rlhf_jax.report import page
from rlhf_jax.report.parts import Part
from rlhf_jax.runs.writing import write_atomically

Labels = Sequence[Hashable]


def krippendorff_alpha(units: Iterable[Labels]) -> float:
    """Krippendorff's alpha for nominal labels: 1 is full agreement, 0 what chance gives, nan
    without two different labels.

    Each unit has the labels that people gave it; units with one are left out (Krippendorff 2011,
    Computing Krippendorff's Alpha-Reliability).
    """
    total: collections.Counter[Hashable] = collections.Counter()
    disagreement = 0.0
    for labels in units:
        if len(labels) > 1:
            counts = collections.Counter(labels)
            total += counts
            disagreement += _num_different(counts) / (len(labels) - 1)
    by_chance = _num_different(total)
    if not by_chance:
        return math.nan
    return 1 - (total.total() - 1) * disagreement / by_chance


def _num_different(counts: collections.Counter[Hashable]) -> int:
    """The ordered pairs of labels, among so many of each, that are different."""
    return counts.total() ** 2 - sum(count**2 for count in counts.values())


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


def agreement(units: Iterable[Labels]) -> tuple[int, int]:
    """How many pairs of labels of the same unit are equal, and how many there are."""
    both = [pair for labels in units for pair in itertools.combinations(labels, 2)]
    return sum(first == second for first, second in both), len(both)


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
    return (1 + squared) / 2, (1 + math.sqrt(squared)) / 2


def read(out: Path) -> list[Judgement]:
    """The judgements of a file of preferences.

    Raises:
        UserError: there is no store beside the file, or it is damaged.
    """
    kept = store.file_of(out)
    if not kept.exists():
        raise UserError(f"{out}: no {kept.name} beside it has the judgements")
    return store.read(kept)


def read_all(files: Iterable[str | Path]) -> list[Judgement]:
    """The judgements of several files, whose pairs are different ones. Raises as ``read``."""
    found: list[Judgement] = []
    num_before = 0
    for file in files:
        found += [given._replace(pair=given.pair + num_before) for given in read(Path(file))]
        num_before = 1 + max((given.pair for given in found), default=-1)
    return found


class Summary(NamedTuple):
    """Of all judgements of files, as texts."""

    facts: dict[str, str]
    people: list[dict[str, str]]  # a row for each annotator
    both: list[dict[str, str]]  # a row for each two who judged the same pairs


def summarize(judgements: Sequence[Judgement]) -> Summary:
    """Ties and pairs of which both are bad are one label. The bounds of the best accuracy are those
    of the 95% interval of the share that agrees, over pairs.
    """
    given = [one for one in judgements if one.is_given]
    labels: dict[str, dict[int, int | str]] = collections.defaultdict(dict)
    repeated: dict[str, list[list[int | str]]] = collections.defaultdict(list)
    by_pair: dict[int, list[int | str]] = collections.defaultdict(list)
    for one in given:
        label = one.verdict if one.choice in ("a", "b") else "tie"
        own = labels[one.annotator]
        if not one.again:
            own[one.pair] = label
            by_pair[one.pair].append(label)
        elif one.pair in own:
            repeated[one.annotator].append([own[one.pair], label])
    names = sorted({one.annotator for one in judgements})
    people = []
    for name in names:
        firsts = [one for one in judgements if one.annotator == name and not one.again]
        choices = [one for one in firsts if one.choice in ("a", "b")]
        unequal = [one for one in choices if len(one.answers[0]) != len(one.answers[1])]
        longer = [
            one
            for one in unequal
            if len(one.answers[int(one.verdict)]) == max(map(len, one.answers))
        ]
        seconds = [
            one.seconds for one in given if one.annotator == name and one.seconds is not None
        ]
        same, num = agreement(repeated[name])
        people.append(
            {
                "annotator": name,
                "judgements": str(len(labels[name])),
                "ties, both bad": str(len(labels[name]) - len(choices)),
                "skipped": str(sum(one.choice == "skip" for one in firsts)),
                "first shown chosen": _of(sum(one.choice == "a" for one in choices), len(choices)),
                "longer chosen": _of(len(longer), len(unequal)),
                "same when asked again": _of(same, num),
                "median seconds": _number(statistics.median(seconds or [math.nan]), ".1f"),
            }
        )
    both = []
    for first, second in itertools.combinations(names, 2):
        common = [pair for pair in labels[first] if pair in labels[second]]
        of_both = [(labels[first][pair], labels[second][pair]) for pair in common]
        if of_both:
            kappa = _number(cohen_kappa(of_both), ".2f")
            row = {"annotator": first, "and": second, "kappa": kappa}
            both.append(row | {"the same": _of(*agreement(of_both))})
    num_given = sum(map(len, by_pair.values()))
    facts = {"judgements": f"{num_given} of {len(by_pair)} pairs"}
    if len(names) > 1:
        alpha = krippendorff_alpha(by_pair.values())
        facts["Krippendorff's alpha"] = _number(alpha, ".2f")
    choices_of = [[label for label in unit if label != "tie"] for unit in by_pair.values()]
    again = [unit for units in repeated.values() for unit in units if "tie" not in unit]
    of_units: list[list[float]] = []
    for key, units in (
        ("two annotators prefer the same answer", choices_of),
        ("an annotator prefers the same answer again", again),
    ):
        same, num = agreement(units)
        if num:
            facts[key] = _of(same, num)
            each = [agreement([unit]) for unit in units]
            of_units.append([equal / both for equal, both in each if both])
    if of_units:
        least, most = metrics.share_interval(np.array(of_units[0]))
        low, high = best_accuracy(least)[0], best_accuracy(most)[1]
        facts["best accuracy of a reward model on such judgements"] = f"{low:.2f} to {high:.2f}"
    return Summary(facts, people, both)


def _of(num: int, total: int) -> str:
    return f"{num} of {total}"


def _number(value: float, style: str) -> str:
    return "unknown" if math.isnan(value) else format(value, style)


def text(judgements: Sequence[Judgement]) -> str:
    """The summary in lines."""
    facts, people, both = summarize(judgements)
    lines = [f"{key}: {value}" for key, value in facts.items()]
    for person in people:
        name, *values = (f"{key} {value}" for key, value in person.items())
        lines.append(f"{name.removeprefix('annotator ')}: {', '.join(values)}")
    for row in both:
        names = f"{row['annotator']} and {row['and']}"
        lines.append(f"{names}: kappa {row['kappa']}, the same {row['the same']}")
    return "\n".join(lines)


def parts(judgements: Sequence[Judgement]) -> list[Part]:
    """The summary as parts of a page of the report's kind."""
    facts, people, both = summarize(judgements)
    drawn: list[Part] = [page.Facts("Agreement", facts)]
    for title, rows in {"Annotators": people, "Pairs of annotators": both}.items():
        if rows:
            drawn.append(page.Table(title, [*rows[0]], [[*row.values()] for row in rows]))
    return drawn


def write_page(judgements: Sequence[Judgement], title: str, path: Path) -> None:
    """Writes the summary as a page."""
    text = page.render(title, parts(judgements))
    with file_errors(path, "written"):
        write_atomically(path, text)
