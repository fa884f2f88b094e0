"""Judgements as rows of preferences, which stages train on."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from rlhf_jax.inference.label import Judgement, is_given

_NOTES = ("strength", "reason")


def rows(judgements: Iterable[Judgement]) -> Iterator[dict[str, Any]]:
    """A row for each pair that was judged, by its number; repeated judgements are left out.

    One judgement is {prompt, chosen, rejected}, or {prompt, responses, ranks} for a tie; several
    are {instruction, response1, response2, annotator1, ...} with a vote each. ``order`` is that of
    the shown answers: of [chosen, rejected] or of the responses.
    """
    firsts = [given for given in judgements if is_given(given) and not given.again]
    for _, group in itertools.groupby(sorted(firsts, key=_pair), _pair):
        of_pair = list(group)
        yield _single(of_pair[0]) if len(of_pair) == 1 else _votes(of_pair)


def _pair(given: Judgement) -> int:
    return given.pair


def _single(given: Judgement) -> dict[str, Any]:
    order = given.order
    if given.verdict == 1:  # the row has the second answer first
        order = [1 - place for place in order]
    row = given.row
    row |= {"annotator": given.annotator, "seconds": given.seconds, "order": order}
    row |= {name: getattr(given, name) for name in _NOTES if getattr(given, name)}
    if given.choice == "bad":
        row["both_bad"] = True
    return row | {"chosen_by": given.chosen_by}


def _votes(of_pair: list[Judgement]) -> dict[str, Any]:
    first = of_pair[0]
    row: dict[str, Any] = {
        "instruction": first.prompt,
        "response1": first.answers[0],
        "response2": first.answers[1],
    }
    for number, given in enumerate(of_pair, 1):
        verdict = given.verdict
        row[f"annotator{number}"] = verdict + 1 if isinstance(verdict, int) else 0
    row["annotators"] = [given.annotator for given in of_pair]
    row["seconds"] = [given.seconds for given in of_pair]
    row["order"] = [given.order for given in of_pair]
    for name in _NOTES:
        values = [getattr(given, name) for given in of_pair]
        if any(values):
            row[name] = values
    if any(given.choice == "bad" for given in of_pair):
        row["both_bad"] = [given.choice == "bad" for given in of_pair]
    return row | {"chosen_by": first.chosen_by}
