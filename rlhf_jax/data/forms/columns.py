"""Renamed columns of records, ``--columns OURS=THEIRS``, and then public forms in ours (`table`).

THEIRS is one of:

- a key of the record;
- ``OUTER.INNER``: the value inside an object; of a list of objects the values inside each of them;
- ``OUTER.keys`` or ``OUTER.values``: the list of an object's keys, or of its values;
- ``A+B``: two texts with an empty line between them. One of them may be empty.
"""

from collections.abc import Sequence
from typing import Any

from rlhf_jax.data import conversation
from rlhf_jax.data.forms import table
from rlhf_jax.data.rows import BadRow, Fields, Record
from rlhf_jax.errors import UserError, did_you_mean


def adapted(records: Sequence[Record], columns: Sequence[str] = ()) -> list[Record]:
    """The records in our form, with the renamed ``columns``; see `table.converted`.

    A column that a record lacks does not change the record; see `unused`. A record that cannot be
    read becomes its error.

    Raises:
      UserError: an entry is not of the form ``OURS=THEIRS``.
    """
    names = _names(columns)
    result = []
    for record in records:
        try:
            result += _adapted(record, names)
        except BadRow as error:
            result.append(Record(error, record.source))
    return result


def unused(records: Sequence[Record], columns: Sequence[str]) -> dict[str, str]:
    """{column: sentence} for the columns that no record has. The sentence names the keys of the
    records.
    """
    values = [record.value for record in records if isinstance(record.value, dict)]
    if not values:
        return {}
    keys = dict.fromkeys(key for value in values for key in value)
    sentences = {}
    for ours, theirs in _names(columns).items():
        if not any(_is_present(value, theirs) for value in values):
            entry = f"{ours}={theirs}"
            known = ", ".join(keys)
            hint = did_you_mean(theirs, keys) or f"; the keys are {known}"
            sentences[entry] = f"--columns {entry}: no row has {theirs!r}{hint}"
    return sentences


def _names(columns: Sequence[str]) -> dict[str, str]:
    """{our name: theirs}"""
    names = {}
    for entry in columns:
        ours, _, theirs = entry.partition("=")
        if not ours or not theirs:
            raise UserError(f"--columns {entry}: expected OURS=THEIRS, such as prompt=question")
        names[ours] = theirs
    return names


def _adapted(record: Record, names: dict[str, str]) -> list[Record]:
    """The record in our form, or several of them. ``names``: our names and theirs.

    Raises:
      BadRow: A+B joins a value that is no text, or as `table.converted`.
    """
    if conversation.are_turns(record.value):  # without a key, as nanochat has them
        record = record._replace(value={"messages": record.value})
    if not isinstance(record.value, dict):
        return [record]
    if not names:
        return table.converted(record, {})
    row = dict(record.value)
    values = {ours: _joined(record, theirs) for ours, theirs in names.items()}
    for theirs in names.values():
        for key in theirs.split("+"):
            row.pop(key, None)
    given = {ours: value for ours, value in values.items() if value is not None}
    return table.converted(record._replace(value=row | given), given)


def _joined(record: Record, theirs: str) -> Any:
    """The value of a column; None if the record lacks it."""
    parts = _parts(record.value, theirs)
    if len(parts) == 1:
        return parts[0]
    for part in parts:
        is_text = isinstance(part, str | None)
        record.expect(is_text, f"--columns {theirs} joins texts with +", part)
    return "\n\n".join(filter(None, parts)) or None


def _is_present(row: Fields, theirs: str) -> bool:
    return any(part is not None for part in _parts(row, theirs))


def _parts(row: Fields, theirs: str) -> list[Any]:
    """The values that ``A+B`` joins, or the one value of any other column."""
    paths = [theirs] if theirs in row else theirs.split("+")
    return [_value(row, path) for path in paths]


def _value(value: Any, path: str) -> Any:
    """The value under the key or path; None if it is missing."""
    if isinstance(value, list):
        values = [_value(item, path) for item in value]
        return None if None in values else values
    if not isinstance(value, dict):
        return None
    if path in value:
        return value[path]
    outer, _, rest = path.partition(".")
    inner = value.get(outer)
    if isinstance(inner, dict) and rest not in inner:
        if rest == "keys":
            return list(inner)
        if rest == "values":
            return list(inner.values())
    return _value(inner, rest)
