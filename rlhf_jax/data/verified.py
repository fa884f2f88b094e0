"""Rewards that a rule verifies, tried on the rows of a file (`graders.selftest`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.formats import ReadResult
from rlhf_jax.data.rows import BadRow, OnBadRow, Row
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.graders import answers, selftest, spec, verifiable
from rlhf_jax.graders.verifiable import Settings
from rlhf_jax.rewards.texts import check_function


def test_answers(rows: Sequence[Row], math: Settings) -> selftest.Tested:
    """The self-test of ``--reward math`` on these rows."""
    column = [row.columns.get("answer") for row in rows]
    found = selftest.mathematics(_questions(rows), column, math)
    if all(answers.gold(entry) == answers.Gold(()) for entry in column):
        raise UserError(
            "--reward math: no row has an answer under the key `answer`; name it by --columns "
            "answer=THEIRS"
        )
    return found


def pattern_warnings(pattern: str, rows: Sequence[Row]) -> list[str]:
    """The self-test of ``--reward regex:PATTERN`` on these rows."""
    try:
        return selftest.regex(pattern, _questions(rows))
    except TrainingFault as error:
        raise UserError(str(error)) from error


def _questions(rows: Sequence[Row]) -> list[str]:
    """What the prompts ask; "" for token ids."""
    prompts = [row.prompt if isinstance(row.prompt, str) else "" for row in rows]
    return [
        verifiable.question(prompt, row.conversation)
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def reward_lines(entry: str, file: ReadResult, math: Settings, on_bad_row: OnBadRow) -> list[str]:
    """What a reward makes of a file's answers: lines of the report. Rows whose answers cannot be
    verified are added to the file's errors, or with ``drop`` to the places of dropped rows.
    """
    rows = file.rows
    has_math, patterns = spec.verified([entry])
    if has_math:
        found = test_answers(rows, math)
        for number, what in found.faults.items():
            error = BadRow(rows[number].source, f"math: {what}")
            if on_bad_row == "drop":
                file.places.setdefault(error.what, []).append(error.source)
            else:
                file.errors.append(error)
        return [f"  {entry}: {found.line}"]
    warnings = []
    for pattern in patterns:
        warnings += pattern_warnings(pattern, rows)
    path, _, function = entry.rpartition(":")
    if path.endswith(".py"):
        names = dict.fromkeys(name for row in rows for name in row.columns)
        columns: dict[str, Sequence[Any]] = {
            name: [row.columns.get(name) for row in rows] for name in names
        }
        where = f"--reward {entry}"
        fn = spec.load_function(where, Path(path), function)
        check_function(where, fn, columns)
        if "answer" in columns:
            columns["messages"] = [row.conversation for row in rows]
            warnings += selftest.function(fn, _questions(rows), columns)
    elif not patterns:
        raise UserError(
            f"--reward {entry}: here math, regex:PATTERN and FILE.py:FUNCTION are tried"
        )
    return [f"  warning: {entry}: {warning}" for warning in warnings] or [f"  {entry}: as meant"]
