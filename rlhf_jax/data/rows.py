"""The rows that data files hold, and the checks of a record's fields, whose errors name its file
and line.
"""

import bisect
import difflib
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rlhf_jax.errors import UserError

Kind = Literal[
    "demonstrations", "pairs", "comparisons", "feedback", "prompts", "annotated", "solutions"
]
OnBadRow = Literal["error", "drop"]
LearnedTurns = Literal["all", "last"]
Fields = dict[str, Any]  # an object of JSON
# {role, content} in OpenAI's form, see `conversation`.
Message = Fields
Messages = Sequence[Message]
Tools = list[Fields] | None
"""The definitions of tools, as JSON schemas, that a chat template writes."""
Mask = tuple[int, ...]
"""Which tokens of a text are learned. Of a solution those that end steps: 1 where the step is
wrong, 2 where it is right."""
TokenIds = tuple[int, ...]
NUM_SHOWN = 20  # different faults that an error names
# Token ids are used as they are: they are not tokenised again and get no EOS.
Text = str | TokenIds


class Record(NamedTuple):
    """One value of a data file and its place: ``FILE, line N`` or ``FILE, row N``, both counted
    from 1. The checks of its value raise `BadRow`.
    """

    value: Any  # UserError if the line or row could not be read
    source: str
    form: str = ""
    """The name of the public form (`forms.FORMS`) that it was published in; "" for ours."""

    def fields(self, expected: str) -> Fields:
        """The value as an object; ``expected`` names its keys in the error."""
        if isinstance(self.value, UserError):
            raise self.value
        is_object = isinstance(self.value, dict)
        self.expect(is_object, f"expected an object with keys {expected}", self.value)
        return self.value

    def expect(self, holds: Any, what: str, *found: Any) -> None:
        """Raises `BadRow` unless ``holds``. The message is ``what``, and the kind of the value that
        was found if it is given.
        """
        if not holds:
            raise BadRow(self.source, what + "".join(f", found {kind(value)}" for value in found))

    def require(self, keys: Sequence[str]) -> None:
        """Raises `BadRow` if a key is missing; it names the keys found and similar ones."""
        missing = [key for key in keys if key not in self.value]
        if not missing:
            return
        present = ", ".join(self.value) or "none"
        wanted = f"expected keys {', '.join(keys)}"
        others = [key for key in self.value if key not in keys]
        hint = "".join(meant(key, others) for key in missing)
        hint = hint or "; --columns OURS=THEIRS reads other keys"
        found = f"; {self.form} has {present}" if self.form else f", found {present}"
        raise BadRow(self.source, wanted + found + hint)

    def text(self, key: str) -> str:
        """The string under ``key``; only a prompt may consist of spaces."""
        value = self.value[key]
        self.expect(isinstance(value, str), f"{key!r} must be a string", value)
        return self.checked(repr(key), value, may_be_space=key == "prompt")

    def checked(self, what: str, value: str, may_be_space: bool = True) -> str:
        """The value itself, if it is not empty and can be written as UTF-8."""
        self.expect(value if may_be_space else value.strip(), f"{what} is empty")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # "\ud83d" alone is legal JSON, yet no text
            half = value[error.start]
            fault = f"{what} holds half of a surrogate pair, {half!a}"
            raise BadRow(self.source, fault) from error
        return value


@dataclass(frozen=True, slots=True)  # there may be a million
class Row:
    """A prompt and K responses to it: none for RL, one to imitate, two for a pair, the chosen one
    first.
    """

    prompt: Text
    responses: tuple[Text, ...]
    source: str
    best: int | None = None
    """Index of the best of K > 2 responses; None: the first one, or the one of the best target."""
    targets: tuple[float, ...] | None = None  # a score for each response
    weight: float | None = None  # None counts as 1
    margin: float = 0.0
    """By how much a reward model should score the chosen one of a pair above the other one."""
    category: str = ""  # of given answers; an evaluation reports each category separately
    columns: Fields = field(default_factory=dict)  # a prompt's other keys, for the reward
    votes: tuple[int, ...] = ()  # of annotators on two responses: 1, 2, or 0 for a tie
    messages: Messages = field(default=(), compare=False)
    """The messages of which the prompt was rendered; empty for a text or token ids of the data. If
    the last is the assistant's, the response continues it."""
    tools: Tools = field(default=None, compare=False)
    variables: Fields = field(default_factory=dict, compare=False)
    """Of the chat template, which the row sets itself."""
    answers: tuple[Messages, ...] = field(default=(), compare=False)
    """The turns of which each response was rendered, from the first that differs; empty for texts
    or token ids of the data."""
    steps: tuple[str, ...] = ()
    """Of a solution, in place of responses: each but the last with the newline that ends it."""
    labels: tuple[bool, ...] = ()  # whether each step is right
    learned: tuple[Mask, ...] = ()
    """For each response of token ids which of them are learned; empty: all of them."""
    first: Messages = field(default=(), compare=False)
    """The messages before the first learned turn of the conversation, of which this row is a turn;
    empty: ``messages``."""

    @property
    def conversation(self) -> Messages | None:
        """The prompt as messages, before any template: a text is a user's message. None if the data
        holds token ids.
        """
        if self.messages or not isinstance(self.prompt, str):
            return self.messages or None
        return [{"role": "user", "content": self.prompt}]

    @property
    def is_plain_text(self) -> bool:
        """Whether the row is a text for a language model: one response, no prompt."""
        return self.prompt == ""

    @property
    def texts(self) -> tuple[Text, ...]:
        """The prompt and then the responses, or the steps of a solution."""
        return self.prompt, *self.responses, *self.steps

    @property
    def is_pair(self) -> bool:
        """Whether it is a choice between two responses."""
        return len(self.responses) == 2 and self.targets is None

    @property
    def majority(self) -> int | None:
        """The answer of most annotators; None if two answers have equally many votes."""
        modes = statistics.multimode(self.votes)
        return modes[0] if len(modes) == 1 else None


Rows = Sequence[Row]


class BadRow(UserError):
    """A row that a stage cannot use: an error, unless ``--on-bad-row drop`` leaves it out and
    counts it under the reason ``what``.
    """

    def __init__(self, source: str, what: str):
        super().__init__(f"{source}: {what}")
        self.source = source
        self.what = what


class Drop(BadRow):
    """A correct row that training cannot use. It is left out and counted under its reason."""


def common_length(*sequences: Sequence[Any]) -> int:
    """The number of first items that all sequences share."""
    first, *others = sequences
    shortest = min(map(len, sequences))

    def differ(last: int) -> bool:
        return any(other[: last + 1] != first[: last + 1] for other in others)

    return bisect.bisect_left(range(shortest), True, key=differ)


def places(sources: Sequence[str], most: int = 5) -> str:
    """The first of these places; a file is named once: ``FILE, line 3, line 8 and 2 more``."""
    shown: list[str] = []
    file_before = None
    for source in sources[:most]:
        file, _, place = source.rpartition(", ")
        shown.append(place if file == file_before else source)
        file_before = file
    text = ", ".join(shown)
    if len(sources) > most:
        text += f" and {len(sources) - most} more"
    return text


def summary(errors: Sequence[UserError]) -> list[str]:
    """One line for each of the first `NUM_SHOWN` faults. Identical faults are one line with their
    number and places.
    """
    lines: list[str] = []
    sources_of = defaultdict[str, list[str]](list)
    for error in errors:
        if isinstance(error, BadRow):
            sources_of[error.what].append(error.source)
        else:
            lines.append(str(error))
    for what, sources in sources_of.items():
        if len(sources) == 1:
            lines.append(f"{sources[0]}: {what}")
        else:
            lines.append(f"{len(sources)} rows: {what} ({places(sources)})")
    if len(lines) > NUM_SHOWN:
        return [*lines[:NUM_SHOWN], f"and {len(lines) - NUM_SHOWN} more"]
    return lines


def texts(rows: Rows) -> Iterator[str]:
    """Prompts and responses of the rows, to train a tokenizer on.

    Raises:
      UserError: for a row of token ids, which only the tokenizer that made them can read.
    """
    for row in rows:
        for text in row.texts:
            if not isinstance(text, str):
                what = "holds token ids, so no tokenizer can be trained on it; name the model"
                raise BadRow(row.source, what)
            yield text


def meant(key: str, others: Sequence[str]) -> str:
    """The hint that one of ``others`` was meant to be ``key``; "" if none is similar."""
    near = difflib.get_close_matches(key, others, n=1)
    return f"; did you mean {key!r} by {near[0]!r}?" if near else ""


def kind(value: Any) -> str:
    """Names the kind of a value for an error message."""
    if type(value) in (int, float):
        return f"the number {value}" if not abs(value) >= 1e20 else "a number that is too large"
    known = {
        dict: "an object",
        list: "a list" if value else "an empty list",
        str: "a string",
        bool: "true or false",
        type(None): "null",
    }
    return known.get(type(value), f"a value of type {type(value).__name__}")
