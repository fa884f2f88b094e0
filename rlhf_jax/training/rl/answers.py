"""The self-test of rewards that a rule verifies, on the prompts of a run before it starts."""

import dataclasses
from collections.abc import Sequence

from rlhf_jax.data import verified
from rlhf_jax.data.formats import ReadResult
from rlhf_jax.data.rows import BadRow, summary
from rlhf_jax.errors import UserError, logger
from rlhf_jax.graders import spec, verifiable


def tested(
    reward: Sequence[str],
    mathematics: verifiable.Settings,
    data: Sequence[ReadResult],
    *,
    drops: bool,
) -> tuple[verifiable.Settings, list[ReadResult]]:
    """The settings with ``math.form`` as the answers of the training prompts have it, and the rows
    whose answers can be verified. Prints what the answers are.

    Args:
        reward: ``reward`` of the settings.
        data: the prompts to train on, and those to validate on if they have files of their own.
        drops: leaves rows out whose answers cannot be verified (``on_bad_row``).

    Raises:
        UserError: the answers of rows cannot be verified, and ``on_bad_row`` is not drop; or no row
            has an answer.
    """
    has_math, patterns = spec.verified(reward)
    for pattern, part in [(pattern, data[0]) for pattern in patterns]:
        for warning in verified.pattern_warnings(pattern, part.rows):
            logger.info(f"warning: regex:{pattern}: {warning}")
    has_answers = any("answer" in row.columns for row in data[0].rows)
    if not has_math or not has_answers:
        return mathematics, list(data)  # build_reward says that the column is missing
    kept = []
    for part in data:
        found = verified.test_answers(part.rows, mathematics)
        logger.info(f"--reward math: {found.line}")
        mathematics = dataclasses.replace(mathematics, form=found.form)
        kept.append(_without_faults(part, found.faults, drops))
    return mathematics, kept


def _without_faults(part: ReadResult, faults: dict[int, str], drops: bool) -> ReadResult:
    """The rows without those whose answers cannot be verified."""
    if not faults:
        return part
    errors = [BadRow(part.rows[row].source, f"math: {what}") for row, what in faults.items()]
    if not drops:
        lines = summary(errors)
        lines.append(
            "--reward math cannot verify the answers of these rows: mend them, or leave them out "
            "by --on-bad-row drop"
        )
        raise UserError("\n".join(lines))
    rows = [row for number, row in enumerate(part.rows) if number not in faults]
    if not rows:
        raise UserError(f"--reward math: no row is left: {summary(errors)[0]}")
    places = dict(part.places)
    for error in errors:
        places.setdefault(error.what, []).append(error.source)
    result = dataclasses.replace(part, rows=rows, places=places)
    logger.info(f"--reward math: {result.describe()}")
    return result
