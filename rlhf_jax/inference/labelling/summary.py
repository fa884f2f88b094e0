"""``rlhf-jax label --summary``: what the judgements of a file say about themselves."""

import collections
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.errors import UserError, file_errors
from rlhf_jax.inference import asking, label
from rlhf_jax.inference.label import Judgement, is_given
from rlhf_jax.inference.labelling import agreement, store
from rlhf_jax.report import page
from rlhf_jax.report.parts import Part
from rlhf_jax.runs.writing import write_atomically

ALONE = "you"  # the annotator of the terminal, who has no name


class Person(NamedTuple):
    """What one annotator did."""

    name: str
    given: int
    ties: int  # and pairs of which both are bad
    skipped: int
    first: int  # choices of the answer that was shown first
    longer: int  # choices of the longer answer
    unequal: int  # choices between answers of different length
    again: agreement.Agreement  # with themselves
    seconds: float  # the median; nan in the terminal

    @property
    def choices(self) -> int:
        """Choices of one answer."""
        return self.given - self.ties


class Pairwise(NamedTuple):
    """Two annotators on the pairs that both judged."""

    names: tuple[str, str]
    kappa: float
    agreed: agreement.Agreement


class Summary(NamedTuple):
    """Of all judgements of a file."""

    people: list[Person]
    pairwise: list[Pairwise]
    alpha: float
    agreed: agreement.Agreement  # of choices by different annotators
    again: agreement.Agreement  # of choices by the same annotator
    num_pairs: int


def read(out: Path) -> list[Judgement]:
    """The judgements of a file of preferences: from the page's store, or of the terminal.

    Raises:
        UserError: there is no session beside the file, or it is broken.
    """
    stored = label.store_file(out)
    if stored.exists():
        return store.read(stored)
    beside = label.session_file(out)
    if not beside.exists():
        raise UserError(f"{out}: no {beside.name} beside it has the judgements")
    session = asking.read_beside(out, beside, label.SESSION)
    return [Judgement(**given) for given in session["judgements"]]


def read_all(files: Iterable[str | Path]) -> list[Judgement]:
    """The judgements of several files, whose pairs are different ones.

    Raises:
        UserError: as ``read``.
    """
    found: list[Judgement] = []
    num_before = 0
    for file in files:
        for given in read(Path(file)):
            found.append(given._replace(pair=given.pair + num_before))
        num_before = 1 + max((given.pair for given in found), default=-1)
    return found


def summarize(judgements: Sequence[Judgement]) -> Summary:
    """Ties and pairs of which both are bad are one label."""
    by_name = collections.defaultdict(list)
    for given in judgements:
        by_name[given.annotator or ALONE].append(given)
    firsts = [given for given in judgements if is_given(given) and not given.again]
    pairwise = [
        _pairwise(names, by_name[names[0]], by_name[names[1]])
        for names in itertools.combinations(sorted(by_name), 2)
    ]
    people = [_person(name, by_name[name]) for name in sorted(by_name)]
    repeated = [unit for name in by_name for unit in _repeats(by_name[name])]
    return Summary(
        people,
        [both for both in pairwise if both.agreed.num],
        agreement.krippendorff_alpha(_units(firsts)),
        agreement.agreement(_units(given for given in firsts if _is_choice(given))),
        agreement.agreement([unit for unit in repeated if "tie" not in unit]),
        len({given.pair for given in firsts}),
    )


def _is_choice(given: Judgement) -> bool:
    return given.choice in ("a", "b")


def _label(given: Judgement) -> int | str:
    return given.verdict if _is_choice(given) else "tie"


def _units(judgements: Iterable[Judgement]) -> list[list[int | str]]:
    """The labels of each pair."""
    by_pair = collections.defaultdict(list)
    for given in judgements:
        by_pair[given.pair].append(_label(given))
    return [*by_pair.values()]


def _repeats(judgements: Sequence[Judgement]) -> list[list[int | str]]:
    """The first and the second label of the pairs that somebody was asked again."""
    given = [one for one in judgements if is_given(one)]
    firsts = {one.pair: one for one in given if not one.again}
    return [
        [_label(firsts[one.pair]), _label(one)] for one in given if one.again and one.pair in firsts
    ]


def _person(name: str, judgements: Sequence[Judgement]) -> Person:
    firsts = [given for given in judgements if not given.again]
    given = [one for one in firsts if is_given(one)]
    choices = [one for one in given if _is_choice(one)]
    unequal = [one for one in choices if len(one.answers[0]) != len(one.answers[1])]
    seconds = [one.seconds for one in judgements if one.seconds is not None and is_given(one)]
    return Person(
        name,
        len(given),
        len(given) - len(choices),
        sum(one.choice == "skip" for one in firsts),
        sum(one.choice == "a" for one in choices),
        sum(_is_longer(one) for one in unequal),
        len(unequal),
        agreement.agreement(_repeats(judgements)),
        statistics.median(seconds) if seconds else math.nan,
    )


def _is_longer(given: Judgement) -> bool:
    """Whether the longer answer was chosen."""
    lengths = [len(text) for text in given.answers]
    return lengths.index(max(lengths)) == given.verdict


def _pairwise(
    names: tuple[str, str], first: Sequence[Judgement], second: Sequence[Judgement]
) -> Pairwise:
    labels = [
        {given.pair: _label(given) for given in own if is_given(given) and not given.again}
        for own in (first, second)
    ]
    both = [(labels[0][pair], labels[1][pair]) for pair in labels[0] if pair in labels[1]]
    return Pairwise(names, agreement.cohen_kappa(both), agreement.agreement(both))


_COLUMNS: dict[str, Callable[[Person], str]] = {
    "annotator": lambda person: person.name,
    "judgements": lambda person: str(person.given),
    "ties, both bad": lambda person: str(person.ties),
    "skipped": lambda person: str(person.skipped),
    "first shown chosen": lambda person: f"{person.first} of {person.choices}",
    "longer chosen": lambda person: f"{person.longer} of {person.unequal}",
    "same when asked again": lambda person: f"{person.again.same} of {person.again.num}",
    "median seconds": lambda person: _number(person.seconds, ".1f"),
}


def _number(value: float, style: str) -> str:
    return "unknown" if math.isnan(value) else format(value, style)


def _facts(summary: Summary) -> dict[str, str]:
    num_given = sum(person.given for person in summary.people)
    facts = {"judgements": f"{num_given} of {summary.num_pairs} pairs"}
    if len(summary.people) > 1:
        facts["Krippendorff's alpha"] = _number(summary.alpha, ".2f")
    for key, value in (
        ("two annotators prefer the same answer", summary.agreed),
        ("an annotator prefers the same answer again", summary.again),
    ):
        if value.num:
            facts[key] = f"{value.same} of {value.num}"
    basis = summary.agreed if summary.agreed.num else summary.again
    if basis.num:
        low, high = agreement.best_accuracy(basis.share)
        facts["best accuracy of a reward model on such judgements"] = f"{low:.2f} to {high:.2f}"
    return facts


def text(judgements: Sequence[Judgement]) -> str:
    """The summary in lines."""
    summary = summarize(judgements)
    lines = [f"{key}: {value}" for key, value in _facts(summary).items()]
    for person in summary.people:
        values = [f"{key} {value(person)}" for key, value in _COLUMNS.items() if key != "annotator"]
        lines.append(f"{person.name}: {', '.join(values)}")
    for both in summary.pairwise:
        kappa = _number(both.kappa, ".2f")
        names = " and ".join(both.names)
        lines.append(f"{names}: kappa {kappa}, the same {both.agreed.same} of {both.agreed.num}")
    return "\n".join(lines)


def parts(judgements: Sequence[Judgement]) -> list[Part]:
    """The summary as parts of a page of the report's kind."""
    summary = summarize(judgements)
    people = [[value(person) for value in _COLUMNS.values()] for person in summary.people]
    drawn: list[Part] = [
        page.Facts("Agreement", _facts(summary)),
        page.Table("Annotators", [*_COLUMNS], people),
    ]
    rows = [
        [*both.names, _number(both.kappa, ".2f"), f"{both.agreed.same} of {both.agreed.num}"]
        for both in summary.pairwise
    ]
    if rows:
        columns = ["annotator", "and", "kappa", "the same"]
        drawn.append(page.Table("Pairs of annotators", columns, rows))
    return drawn


def write_page(judgements: Sequence[Judgement], title: str, path: Path) -> None:
    """Writes the summary as a page."""
    text = page.render(title, parts(judgements))
    with file_errors(path, "written"):
        write_atomically(path, text)
