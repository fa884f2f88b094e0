"""Judgements as rows of preferences, which stages train on."""

import collections
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
    by_pair = collections.defaultdict(list)
    for given in judgements:
        if is_given(given) and not given.again:
            by_pair[given.pair].append(given)
    for pair in sorted(by_pair):
        of_pair = by_pair[pair]
        yield _single(of_pair[0]) if len(of_pair) == 1 else _votes(of_pair)


def _single(given: Judgement) -> dict[str, Any]:
    order = given.order
    if given.verdict == 1:  # the row has the second answer first
        order = order[::-1]
    row = given.row
    row["annotator"] = given.annotator
    row["seconds"] = given.seconds
    row["order"] = order
    for name in _NOTES:
        value = getattr(given, name)
        if value:
            row[name] = value
    if given.choice == "bad":
        row["both_bad"] = True
    row["chosen_by"] = given.chosen_by
    return row


def _votes(of_pair: list[Judgement]) -> dict[str, Any]:
    first = of_pair[0]
    row: dict[str, Any] = {
        "instruction": first.prompt,
        "response1": first.answers[0],
        "response2": first.answers[1],
    }
    for number, given in enumerate(of_pair, 1):  # 1 or 2, or 0 for a tie
        row[f"annotator{number}"] = given.verdict + 1 if isinstance(given.verdict, int) else 0
    row["annotators"] = [given.annotator for given in of_pair]
    row["seconds"] = [given.seconds for given in of_pair]
    row["order"] = [given.order for given in of_pair]
    for name in _NOTES:
        values = [getattr(given, name) for given in of_pair]
        if any(values):
            row[name] = values
    are_bad = [given.choice == "bad" for given in of_pair]
    if any(are_bad):
        row["both_bad"] = are_bad
    row["chosen_by"] = first.chosen_by
    return row
