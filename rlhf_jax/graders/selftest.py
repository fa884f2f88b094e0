r"""Whether a reward says what was meant, tried on the data rows before a run.

Of each row, its own answer written as a response must score 1; the answer of another row, the
prompt itself, a part of it, an empty response and, where the golds are numbers, an expression that
is not worked out must not.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.graders import answers, literals, verifiable
from rlhf_jax.graders.answers import Form, Gold, Value
from rlhf_jax.graders.verifiable import Settings
from rlhf_jax.rewards.texts import on_texts

MOST_COMPARED = 200  # expressions that are compared with another row's: each takes milliseconds
MOST_ROWS = 16  # for which a Python function is called
# What math-verify must say of [gold, answer], at any version: else a run does not start.
RECORDED = {
    ("\\frac{\\sqrt{8}}{2}", "\\sqrt{2}"): True,
    ("(x+1)^2", "x^2+2x+1"): True,
    ("(x+1)^2", "x^2+2x+2"): False,
    ("[1,2)", "[1,2]"): False,
    ("x=1, y=2", "y=2, x=1"): True,
    ("x=1, y=2", "x=2, y=1"): False,
    ("\\{1,2\\}", "\\{2,1\\}"): True,
    ("x \\le 3", "x<3"): False,
    ("\\sqrt{2}\\cdot 10^{-8}", "0"): False,
}
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

    Raises:
      UserError: there are expressions, and the installed math-verify decides otherwise than
        ``RECORDED``.
    """
    golds = list(map(answers.gold, column))
    marks = Counter(gold.mark for gold in golds if gold.values)
    kinds = Counter(gold.values[0].kind for gold in golds if gold.values)
    missing = sum(not (gold.values or gold.fault) for gold in golds)
    # Where most golds are numbers, an answer to one must be worked out.
    is_most = 2 * kinds["number"] > kinds.total()
    form: Form = settings.form or ("number" if is_most else "expression")
    parts = [f"{kinds.total()} answers"]
    parts += [f"{count} {mark}" for mark, count in marks.most_common()]
    parts += [f"{name}: {count}" for name, count in kinds.most_common()]
    parts += [f"math.form {form}"]
    parts += [f"{missing} rows without an answer"] if missing else []
    for (expected, answer), is_equal in RECORDED.items() if kinds["expression"] else ():
        if verifiable.are_equal(expected, answer) != is_equal:
            raise UserError(
                f"--reward math: math-verify {version('math-verify')} says of {expected} and "
                f"{answer} that they are {'not ' * is_equal}equal; install another version of it"
            )
    test = _Test(golds, questions, Settings(form, settings.place))
    faults = {}
    for row, gold in enumerate(golds):
        fault = gold.fault or (test.fault(row) if gold.values else "")
        if fault:
            faults[row] = fault
    return Tested(", ".join(parts), form, faults)


class _Test(NamedTuple):
    golds: Sequence[Gold]
    questions: Sequence[str]
    settings: Settings

    def fault(self, row: int) -> str:
        """Why the answer of a row that has one cannot be verified; "" if it can be."""
        for value in self.golds[row].values:
            if not self._is_right(row, self._written(value)):
                return f"its own answer {value.text:.60} does not score 1"
        for what, response in self._wrong(row):
            if self._is_right(row, response):
                return f"{what} scores 1"
        others = list(itertools.islice(self._others(row), 2))
        if not others or not self._is_right(row, self._written(others[0][1])):
            return ""
        number, value = others[0]
        if value.kind != "expression":
            return f"{value.text:.60}, the answer of another row, scores 1"
        # Two expressions may be equal; a gold that equals two unequal ones is misread.
        for _, second in others[1:]:
            written = self._written(second)
            if self._is_right(row, written) and not self._is_right(number, written):
                return f"the answers {value.text:.60} and {second.text:.60} both score 1"
        return ""

    def _is_right(self, row: int, response: str) -> bool:
        found = verifiable.verdict(
            self.golds[row], response, self.questions[row], settings=self.settings
        )
        return found.status == "right"

    def _written(self, value: Value) -> str:
        """A response with this answer."""
        text = value.text.replace("$", "") if value.kind == "expression" else value.text
        forms = {"hashes": f"#### {text}", "tags": f"<answer>{text}</answer>", "last": text}
        return forms.get(self.settings.place, f"The answer is \\boxed{{{text}}}.")

    def _wrong(self, row: int) -> Iterator[tuple[str, str]]:
        """Responses that must not score 1, with their names."""
        yield "an empty response", ""
        values = self.golds[row].values
        allowed = {answers.squeezed(value.text) for value in values}
        asked = self.questions[row]
        if answers.squeezed(asked) not in allowed:
            yield "the prompt itself", asked
        part = answers.last_expression(asked, "expression")
        if part and answers.squeezed(part) not in allowed and literals.number(part) is None:
            written = self._written(Value("expression", part))
            yield f"{part!r:.60}, a part of the prompt,", written
        if self.settings.form == "number":
            for text in [f"{value.text} + 0" for value in values if value.kind == "number"]:
                written = self._written(Value("expression", text))
                yield f"{text!r:.60}, which is not worked out,", written

    def _others(self, row: int) -> Iterator[tuple[int, Value]]:
        """Answers of the same kind with another value, and their rows."""
        values = self.golds[row].values
        if values[0].kind == "expression" and row >= MOST_COMPARED:
            return
        for step in range(1, min(_REACH, len(self.golds))):
            number = (row + step) % len(self.golds)
            for other in self.golds[number].values[:1]:
                is_same = any(_are_same(value, other) for value in values)
                if other.kind == values[0].kind and not is_same:
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
    warnings = ["an empty response scores 1"] if score([""], [""]) == [1.0] else []
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
    rows = [row for row, gold in enumerate(golds) if gold.values][:MOST_ROWS]
    if not rows:
        return []
    own = [golds[row].values[0].text for row in rows]
    given = {name: [values[row] for row in rows] for name, values in columns.items()}

    def scores(responses: Sequence[str]) -> list[float]:
        """NaN, which no comparison is true of, for what is no number: unscored, or at tokens."""
        said, _ = on_texts(fn, [prompts[row] for row in rows], list(responses), given)
        return [
            float(one) if isinstance(one, int | float | np.number) else math.nan for one in said
        ]

    expected = scores(own)
    tried = {
        "another row's answer": [*own[1:], own[0]],
        "the prompt itself": [prompts[row] for row in rows],
        "an empty response": [""] * len(rows),
    }
    warnings = []
    for what, responses in tried.items():
        compared = zip(responses, own, scores(responses), expected, strict=True)
        count = sum(other != text and score >= most for other, text, score, most in compared)
        if count:
            total = f"{count} of {len(rows)} rows"
            warnings.append(f"{what} scores as much as the row's own answer in {total}")
    return warnings
