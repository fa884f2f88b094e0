"""The rows that data files hold, and the checks of a record's fields, whose errors name its file
and line.
"""

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rlhf_jax.errors import UserError

Kind = Literal["demonstrations", "pairs", "comparisons", "feedback", "prompts", "annotated"]
OnBadRow = Literal["error", "drop"]
Message = dict[str, Any]
TokenIds = tuple[int, ...]
NUM_SHOWN = 20  # different faults that an error names
Text = (
    str | TokenIds
)  # token ids are used as they are: neither tokenised again nor completed with EOS


class Record(NamedTuple):
    """One value of a data file and its place: ``FILE, line N`` or ``FILE, row N``, both counted
    from 1.
    """

    value: Any  # UserError if the line or row could not be read
    source: str


@dataclass(frozen=True)
class Row:
    """A prompt and K responses to it: none of a prompt for RL, one to imitate, two of a pair, the
    chosen one first.
    """

    prompt: Text
    responses: tuple[Text, ...]
    source: str
    best: int | None = (
        None  # number of the best of K > 2 responses; None: the first, or as the targets say
    )
    targets: tuple[float, ...] | None = None  # a score for each response
    weight: float | None = None  # None counts as 1
    category: str = ""  # of given answers, whose figures an evaluation shows apart
    columns: dict[str, Any] = field(
        default_factory=dict
    )  # a prompt's other keys, which reach the reward
    votes: tuple[int, ...] = ()  # of annotators on two responses: 1, 2 or 0, a tie
    messages: Sequence[Message] = field(default=(), compare=False)
    """What the prompt was rendered from; empty for a text or token ids of the data."""

    @property
    def is_plain_text(self) -> bool:
        """Whether it is a text for a language model: one response, no prompt."""
        return self.prompt == ""

    @property
    def texts(self) -> tuple[Text, ...]:
        """The prompt and then the responses."""
        return self.prompt, *self.responses

    @property
    def is_pair(self) -> bool:
        """Whether it is a choice between two responses."""
        return len(self.responses) == 2 and self.targets is None

    @property
    def majority(self) -> int | None:
        """What more annotators said than anything else; None if there is no such thing."""
        (first, most), *others = Counter(self.votes).most_common()
        return None if others and others[0][1] == most else first


class BadRow(UserError):
    """A row that a stage cannot use: an error, unless ``--on-bad-row drop`` leaves it out under
    ``what`` is wrong.
    """

    def __init__(self, source: str, what: str):
        super().__init__(f"{source}: {what}")
        self.source, self.what = source, what


class Drop(BadRow):
    """A row without a fault that teaches nothing: it is always left out, and counted under this
    reason.
    """


def places(sources: Sequence[str], most: int = 5) -> str:
    """The first of these places, each file named once: ``FILE, line 3, line 8 and 2 more``."""
    shown, before = list[str](), None
    for source in sources[:most]:
        file, _, place = source.rpartition(", ")
        shown.append(place if file == before else source)
        before = file
    return ", ".join(shown) + (f" and {len(sources) - most} more" if len(sources) > most else "")


def summary(errors: Sequence[UserError]) -> list[str]:
    """One line for each of the first `NUM_SHOWN` faults; identical ones are said once, with their
    number and places.
    """
    lines, faults = list[str](), defaultdict[str, list[str]](list)
    for error in errors:
        if isinstance(error, BadRow):
            faults[error.what].append(error.source)
        else:
            lines.append(str(error))
    for what, sources in faults.items():
        several = f"{len(sources)} rows: {what} ({places(sources)})"
        lines.append(several if len(sources) > 1 else f"{sources[0]}: {what}")
    return [*lines[:NUM_SHOWN], *[f"and {len(lines) - NUM_SHOWN} more"] * (len(lines) > NUM_SHOWN)]


def texts(rows: Sequence[Row]) -> Iterator[str]:
    """Prompts and responses of the rows, to train a tokenizer on.

    Raises:
      UserError: for a row of token ids, which only the tokenizer that made them can read.
    """
    for row in rows:
        for text in row.texts:
            if not isinstance(text, str):
                raise UserError(
                    f"{row.source}: holds token ids, so no tokenizer can be trained on it; name "
                    "the model"
                )
            yield text


def fields(record: Record, expected: str) -> dict[str, Any]:
    """The record as an object; ``expected`` are its keys, for the error."""
    if isinstance(record.value, UserError):
        raise record.value
    expect(
        isinstance(record.value, dict),
        record,
        f"expected an object with keys {expected}",
        record.value,
    )
    return record.value


def expect(holds: Any, record: Record, what: str, *found: Any) -> None:
    """Raises `BadRow`, saying where, ``what`` must be or is wrong and, if given, the kind of value,
    unless it holds.
    """
    if not holds:
        raise BadRow(record.source, what + "".join(f", found {kind(value)}" for value in found))


def require(record: Record, keys: Sequence[str]) -> None:
    """Raises `BadRow` with the keys found, and the nearest ones, if any of ``keys`` is missing."""
    missing = [key for key in keys if key not in record.value]
    if missing:
        present = ", ".join(record.value) or "none"
        hint = "".join(
            meant(key, [other for other in record.value if other not in keys]) for key in missing
        )
        raise BadRow(record.source, f"expected keys {', '.join(keys)}, found {present}{hint}")


def meant(key: str, others: Sequence[str]) -> str:
    """The hint that one of ``others`` was meant to be ``key``; "" if none is like it."""
    return "".join(
        f"; did you mean {key!r} by {near!r}?"
        for near in difflib.get_close_matches(key, others, n=1)
    )


def text(record: Record, key: str) -> str:
    """The string under ``key``; only a prompt may consist of spaces."""
    value = record.value[key]
    expect(isinstance(value, str), record, f"{key!r} must be a string", value)
    return checked(record, repr(key), value, may_be_space=key in ("prompt", "query"))


def checked(record: Record, what: str, value: str, may_be_space: bool = True) -> str:
    """The value itself, if it is not empty and can be written as UTF-8."""
    expect(value if may_be_space else value.strip(), record, f"{what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud83d" alone is legal JSON, yet no text
        raise BadRow(
            record.source, f"{what} holds half of a surrogate pair, {value[error.start]!a}"
        ) from error
    return value


def kind(value: Any) -> str:
    """What a value is, in an error."""
    a_list = "a list" if value else "an empty list"
    known = {
        dict: "an object",
        list: a_list,
        str: "a string",
        bool: "true or false",
        type(None): "null",
    }
    if type(value) in (int, float):
        return f"the number {value}" if not abs(value) >= 1e20 else "a number that is too large"
    return known.get(type(value), f"a value of type {type(value).__name__}")
