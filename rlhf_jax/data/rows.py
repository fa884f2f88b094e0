"""The rows that data files hold, and the checks of a record's fields, whose errors name its file and line."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rlhf_jax.errors import UserError

Kind = Literal["demonstrations", "pairs", "comparisons", "prompts"]
TokenIds = tuple[int, ...]
Text = str | TokenIds  # token ids are used as they are: neither tokenised again nor completed with EOS


class Record(NamedTuple):
    """One value of a data file and its place: ``FILE, line N`` or ``FILE, row N``, both counted from 1."""

    value: Any  # UserError if the line or row could not be read
    source: str


@dataclass(frozen=True)
class Demonstration:
    """A response to imitate."""

    prompt: Text
    response: Text
    source: str


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, the first preferred."""

    prompt: Text
    chosen: Text
    rejected: Text
    source: str
    weight: float | None = None  # None counts as 1


@dataclass(frozen=True)
class Comparison:
    """K responses to one prompt with the number of the best one, or with a target score for each."""

    prompt: Text
    responses: tuple[Text, ...]
    source: str
    best: int | None = None
    targets: tuple[float, ...] | None = None
    weight: float | None = None  # None counts as 1


@dataclass(frozen=True)
class Prompt:
    """A prompt to respond to; ``columns`` are the other keys of its row, which reach the reward."""

    prompt: Text
    source: str
    columns: dict[str, Any] = field(default_factory=dict)


Row = Demonstration | Pair | Comparison | Prompt


class Drop(Exception):
    """A row that is left out and counted under its reason; any other fault of a row is the user's to repair."""


def texts(rows: Sequence[Row]) -> Iterator[str]:
    """Prompts and responses of the rows, to train a tokenizer on.

    Raises:
      UserError: for a row of token ids, which only the tokenizer that made them can read.
    """
    for row in rows:
        for text in parts(row):
            if not isinstance(text, str):
                raise UserError(f"{row.source}: holds token ids, so no tokenizer can be trained on it; name the model")
            yield text


def parts(row: Row) -> tuple[Text, ...]:
    """The prompt of a row and then its responses."""
    match row:
        case Demonstration():
            return row.prompt, row.response
        case Pair():
            return row.prompt, row.chosen, row.rejected
        case Comparison():
            return row.prompt, *row.responses
        case Prompt():
            return (row.prompt,)


def fields(record: Record, expected: str) -> dict[str, Any]:
    """The record as an object; ``expected`` are its keys, for the error."""
    if isinstance(record.value, UserError):
        raise record.value
    expect(isinstance(record.value, dict), record, f"expected an object with keys {expected}", record.value)
    return record.value


def expect(holds: bool, record: Record, what: str, value: Any) -> None:
    """Raises `UserError`, saying where, ``what`` must be and what kind of value stands there, unless it holds."""
    if not holds:
        raise UserError(f"{record.source}: {what}, found {kind(value)}")


def require(record: Record, keys: Sequence[str], hint: str = "") -> None:
    """Raises `UserError` with the keys found, and the nearest ones, if any of ``keys`` is missing."""
    missing = [key for key in keys if key not in record.value]
    others = [key for key in record.value if key not in keys]
    for key in missing:
        near = difflib.get_close_matches(key, others, n=1)
        hint += "".join(f"; did you mean {key!r} by {other!r}?" for other in near)
    if missing:
        present = ", ".join(record.value) or "none"
        raise UserError(f"{record.source}: expected keys {', '.join(keys)}, found {present}{hint}")


def text(record: Record, key: str) -> str:
    """The string under ``key``; only a prompt may consist of spaces."""
    value = record.value[key]
    expect(isinstance(value, str), record, f"{key!r} must be a string", value)
    return checked(record, repr(key), value, may_be_space=key in ("prompt", "query"))


def checked(record: Record, what: str, value: str, may_be_space: bool = True) -> str:
    """The value itself, if it is not empty and can be written as UTF-8."""
    if not (value if may_be_space else value.strip()):
        raise UserError(f"{record.source}: {what} is empty; remove the row or fill it in")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud83d" alone is legal JSON, yet no text
        raise UserError(f"{record.source}: {what} holds half of a surrogate pair, {value[error.start]!a}") from error
    return value


def kind(value: Any) -> str:
    """What a value is, in an error."""
    a_list = "a list" if value else "an empty list"
    known = {dict: "an object", list: a_list, str: "a string", bool: "true or false", type(None): "null"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"the number {value}" if not abs(value) >= 1e20 else "a number that is too large"
    return known.get(type(value), f"a value of type {type(value).__name__}")
