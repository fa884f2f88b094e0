r"""Whether a reward says what was meant, tried on the data rows before a run.

Of each row, its own answer written as a response must score 1; the answer of another row, the
prompt itself, a part of it, an empty response and, where the golds are numbers, an expression that
is not worked out must not.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.graders import answers, literals, verifiable
from rlhf_jax.graders.answers import Form, Gold, Value
from rlhf_jax.graders.verifiable import Settings
from rlhf_jax.rewards import host
from rlhf_jax.rewards.texts import on_texts

MOST_COMPARED = 200  # expressions that are compared with another row's: each takes milliseconds
MOST_ROWS = 16  # for which a Python function is called
_REACH = 20  # rows behind a row, among which another answer is looked for


class Tested(NamedTuple):
    """What was found out about the answers of a file."""

    line: str
    """What the golds are, for a log."""
    form: Form
    faults: dict[int, str]
    """{number of a row: why its answer cannot be verified}."""


def mathematics(questions: Sequence[str], column: Sequence[Any], settings: Settings) -> Tested:
    """The self-test of `--reward math` for the values of the column ``answer``.

    A row without an answer is no fault. Of expressions, only the first 200 are compared with
    another row's answer.
    """
    golds = list(map(answers.gold, column))
    counts = answers.column(golds)
    form = settings.form or counts.form
    settings = Settings(form, settings.place)
    test = _Test(golds, questions, settings)
    faults = {}
    for row, gold in enumerate(golds):
        fault = gold.fault or (test.fault(row) if gold.values else "")
        if fault:
            faults[row] = fault
    return Tested(counts.describe(form), form, faults)


class _Test(NamedTuple):
    golds: Sequence[Gold]
    questions: Sequence[str]
    settings: Settings

    def fault(self, row: int) -> str:
        """Why the answer of a row that has one cannot be verified; "" if it can be."""
        gold = self.golds[row]
        for value in gold.values:
            if not self._is_right(row, self._written(value)):
                return f"its own answer {value.text:.60} does not score 1"
        for what, response in self._wrong(row):
            if self._is_right(row, response):
                return f"{what} scores 1"
        return self._other_fault(row)

    def _is_right(self, row: int, response: str) -> bool:
        found = verifiable.verdict(
            self.golds[row],
            response,
            self.questions[row],
            settings=self.settings,
        )
        return found.status == "right"

    def _written(self, value: Value) -> str:
        """A response with this answer."""
        text = value.text.replace("$", "") if value.kind == "expression" else value.text
        written = {
            "hashes": f"#### {text}",
            "tags": f"<answer>{text}</answer>",
            "last": text,
        }
        return written.get(self.settings.place, f"The answer is \\boxed{{{text}}}.")

    def _wrong(self, row: int) -> Iterator[tuple[str, str]]:
        """Responses that must not score 1, with their names."""
        yield "an empty response", ""
        values = self.golds[row].values
        allowed = {answers.squeezed(value.text) for value in values}
        asked = self.questions[row]
        if answers.squeezed(asked) not in allowed:
            yield "the prompt itself", asked
        part = answers.last_expression(asked, "expression")
        is_answer = answers.squeezed(part) in allowed or literals.number(part) is not None
        if part and not is_answer:
            written = self._written(Value("expression", part))
            yield f"{part!r:.60}, a part of the prompt,", written
        if self.settings.form == "expression":
            return
        for value in values:
            if value.kind == "number":
                unworked = f"{value.text} + 0"
                written = self._written(Value("expression", unworked))
                yield f"{unworked!r:.60}, which is not worked out,", written

    def _other_fault(self, row: int) -> str:
        others = self._others(row)
        for number, value in itertools.islice(others, 1):
            if not self._is_right(row, self._written(value)):
                return ""
            if value.kind != "expression":
                return f"{value.text:.60}, the answer of another row, scores 1"
            # Two expressions may be equal; a gold that equals two unequal ones is misread.
            for _, second in itertools.islice(others, 1):
                is_right = self._is_right(row, self._written(second))
                if is_right and not self._is_right(number, self._written(second)):
                    return f"the answers {value.text:.60} and {second.text:.60} both score 1"
        return ""

    def _others(self, row: int) -> Iterator[tuple[int, Value]]:
        """Answers of the same kind with another value, and their rows."""
        values = self.golds[row].values
        kind = values[0].kind
        if kind == "expression" and row >= MOST_COMPARED:
            return
        reach = min(_REACH, len(self.golds))
        for step in range(1, reach):
            number = (row + step) % len(self.golds)
            for other in self.golds[number].values[:1]:
                is_same = any(_are_same(value, other) for value in values)
                if other.kind == kind and not is_same:
                    yield number, other


def _are_same(value: Value, other: Value) -> bool:
    first = value.number
    second = other.number
    if first is not None and second is not None:
        return literals.equal(first, second) or literals.equal(second, first)
    return answers.squeezed(value.text) == answers.squeezed(other.text)


def regex(pattern: str, questions: Sequence[str]) -> list[str]:
    """Warnings of what a pattern rewards beside what it was meant for. It knows no answers, so that
    only an empty response and repeated prompts are tried.
    """
    score = verifiable.regex(pattern)
    warnings = []
    if score([""], [""]) == [1.0]:
        warnings.append("an empty response scores 1")
    count = int(sum(score(questions, questions)))
    if count:
        warnings.append(f"the prompt itself scores 1 in {count} of {len(questions)} rows")
    return warnings


def function(
    fn: Callable[..., Any],
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[str]:
    """Warnings about a user's function of texts (`rewards.from_text`), which is called with the
    first 16 rows that have an answer: its own answer should score more than another row's, the
    prompt itself and an empty response. What a function means is not known: these are no errors.
    """
    golds = list(map(answers.gold, columns["answer"]))
    rows = [row for row, gold in enumerate(golds) if gold.values]
    rows = rows[:MOST_ROWS]
    if not rows:
        return []
    own = [golds[row].values[0].text for row in rows]
    asked = [prompts[row] for row in rows]
    given = {}
    for name, values in columns.items():
        given[name] = [values[row] for row in rows]
    tried = {
        "another row's answer": [*own[1:], own[0]],
        "the prompt itself": asked,
        "an empty response": [""] * len(rows),
    }
    expected = _scores(on_texts(fn, list(asked), list(own), given))
    warnings = []
    for what, responses in tried.items():
        scores = _scores(on_texts(fn, list(asked), list(responses), given))
        count = 0
        for i, response in enumerate(responses):
            is_other = response != own[i]
            count += is_other and scores[i] >= expected[i]
        if count:
            total = f"{count} of {len(rows)} rows"
            warnings.append(f"{what} scores as much as the row's own answer in {total}")
    return warnings


def _scores(result: Any) -> list[float]:
    """The scores of a function's result. NaN, which no comparison is true of, for those that are no
    numbers: unscored, or rewards at tokens.
    """
    scores = result[0] if host.has_components(result) else result
    found = []
    for score in scores:
        is_number = isinstance(score, int | float | np.number)
        found.append(float(score) if is_number else math.nan)
    return found
