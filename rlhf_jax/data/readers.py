"""Demonstrations, comparisons and prompts from JSON, JSON lines, CSV, Parquet, plain text or a Hugging Face dataset.

The form of a row is recognised by its keys: ``{prompt, response}``, ``{prompt, chosen, rejected}``, the dialogues of
Bai et al. 2022 (hh-rlhf) ``{chosen, rejected}``, K responses with a label (`rankings`), messages (`chat`) under
``messages``, ``chosen`` and ``rejected``, or ``prompt``, and prompts as strings or as ``{prompt, ...}``, whose other
keys are columns for the reward. Every row remembers where it came from, so that later stages can name it in their
errors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Generic, Literal, TypeVar

from rlhf_jax.data import chat, rankings
from rlhf_jax.data.chat import NO_RESPONSE, ChatTemplate
from rlhf_jax.data.rankings import EQUAL
from rlhf_jax.data.records import Record
from rlhf_jax.data.rows import (
    Comparison,
    Demonstration,
    Drop,
    Pair,
    Prompt,
    checked,
    fields,
    names,
    require,
    text,
)
from rlhf_jax.data.sources import read_source
from rlhf_jax.errors import UserError

ASSISTANT = "\n\nAssistant:"
OTHER_PROMPT = "dialogues differ before the last response"
REPEATED = "repeated prompt"
_RESPONSES = {"response", "chosen", "rejected", "messages"}
Paths = str | PathLike[str] | Sequence[str | PathLike[str]]
Kind = Literal["demonstrations", "comparisons", "prompts"]
Row = TypeVar("Row")


@dataclass(frozen=True)
class ReadResult(Generic[Row]):
    """The rows in file order, how many were left out for which reason, and the sha256 of each source's content."""

    rows: list[Row]
    dropped: dict[str, int]
    fingerprints: dict[str, str]

    @property
    def kept(self) -> int:
        return len(self.rows)

    def describe(self) -> str:
        """One line for a log, such as ``1162 rows, 1 dropped (chosen and rejected are equal)``."""
        reasons = "".join(f", {count} dropped ({reason})" for reason, count in self.dropped.items())
        return f"{self.kept} rows{reasons}"


def read_demonstrations(paths: Paths, template: ChatTemplate | None = None) -> ReadResult[Demonstration]:
    """Rows of ``{prompt, response}`` or messages; of pairs, the chosen response, of other comparisons the best one.

    Args:
      template: renders messages; by default `chat.PLAIN`.

    Raises:
      UserError: for a missing, empty, truncated or wrongly encoded file and for a row of another form, with file and
        line.
    """
    return _read(paths, lambda record: [_demonstration(record, template or ChatTemplate())])


def read_pairs(paths: Paths, template: ChatTemplate | None = None) -> ReadResult[Pair]:
    """Pairs of ``{prompt, chosen, rejected}``, hh-rlhf dialogues, messages, and rankings (`rankings.pairs`).

    A pair of equal responses teaches nothing and is dropped, as is a dialogue pair that differs before its last
    response or lacks one (the public hh-rlhf files hold a few); all counted in ``dropped``.

    Raises:
      UserError: as `read_demonstrations`, and if no pair is left.
    """
    return _read(paths, lambda record: _pairs(record, template or ChatTemplate()))


def read_comparisons(paths: Paths, template: ChatTemplate | None = None) -> ReadResult[Pair | Comparison]:
    """As `read_pairs`, but the choice of one response among K > 2 stays one row, and rows may have targets.

    Raises:
      UserError: as `read_pairs`, and if some rows have targets and others a preference.
    """
    result = _read(paths, lambda record: _comparisons(record, template or ChatTemplate()))
    first, *others = result.rows
    other = next((row for row in others if _has_targets(row) != _has_targets(first)), None)
    if other is not None:
        have, lack = (first, other) if _has_targets(first) else (other, first)
        raise UserError(f"{lack.source}: has no targets but {have.source} has; train on one kind of label at a time")
    return result


def read_prompts(paths: Paths, template: ChatTemplate | None = None) -> ReadResult[Prompt]:
    """Prompts as strings, objects, messages or lines of text; of rows with responses, each prompt once, in order.

    Raises:
      UserError: as `read_demonstrations`.
    """
    result = _read(paths, lambda record: [_prompt(record, template or ChatTemplate())])
    rows: list[Prompt] = []
    seen = set()
    for row, from_responses in result.rows:
        if from_responses and row.prompt in seen:
            continue
        seen.add(row.prompt)
        rows.append(row)
    repeated = {REPEATED: result.kept - len(rows)} if len(rows) < result.kept else {}
    return ReadResult(rows, {**result.dropped, **repeated}, result.fingerprints)


def parser(
    kind: Kind, template: ChatTemplate
) -> Callable[[Record], Sequence[Demonstration | Pair | Comparison | Prompt]]:
    """What reads one record as rows of a kind; it raises `UserError` or `rows.Drop`."""
    match kind:
        case "demonstrations":
            return lambda record: [_demonstration(record, template)]
        case "comparisons":
            return lambda record: _comparisons(record, template)
        case "prompts":
            return lambda record: [_prompt(record, template)[0]]


def form(value: Any) -> tuple[Kind, str] | None:
    """The kind of data that a record's keys make it, and the name of its format; None for no known format."""
    if isinstance(value, str):
        return "prompts", "text"
    if not isinstance(value, dict):
        return None
    if rankings.is_answers(value):
        labels = [key for key in rankings.LABELS if key in value]
        answers = "responses" if "responses" in value else "sample0, ..."
        return "comparisons", ", ".join([rankings.prompt_key(value), answers, *labels])
    if "chosen" in value and "rejected" in value:
        keys = ", ".join(key for key in ("prompt", "chosen", "rejected") if key in value)
        messages = chat.is_chat(value, "prompt", "chosen", "rejected")
        return "comparisons", keys + (" (messages)" if messages else "" if "prompt" in value else " (dialogues)")
    if "messages" in value:
        last = value["messages"][-1] if isinstance(value["messages"], list) and value["messages"] else None
        answered = isinstance(last, dict) and last.get("role") == "assistant"
        return ("demonstrations" if answered else "prompts"), "messages"
    if "prompt" in value:
        keys = "prompt, response" if "response" in value else "prompt"
        kind: Kind = "demonstrations" if "response" in value else "prompts"
        return kind, keys + (" (messages)" if chat.is_chat(value, "prompt", "response") else "")
    return None


def _read(paths: Paths, parse: Callable[[Record], Sequence[Row]]) -> ReadResult[Row]:
    files = [paths] if isinstance(paths, str | PathLike) else list(paths)
    if not files:
        raise UserError("no data file given")
    rows: list[Row] = []
    dropped: dict[str, int] = {}
    fingerprints: dict[str, str] = {}
    for name in files:
        source = read_source(name)
        fingerprints[str(name)] = source.fingerprint
        for record in source.records:
            try:
                rows.extend(parse(record))
            except Drop as drop:
                dropped[str(drop)] = dropped.get(str(drop), 0) + 1
    if not rows:
        found = ", ".join(f"{count} dropped ({reason})" for reason, count in dropped.items())
        raise UserError(f"{', '.join(map(str, files))}: no usable row: {found}")
    return ReadResult(rows, dropped, fingerprints)


def _demonstration(record: Record, template: ChatTemplate) -> Demonstration:
    row = fields(record, "prompt, response")
    if rankings.is_answers(row):
        return rankings.demonstration(rankings.read(record, template))
    both = "chosen" in row and "rejected" in row
    key = "messages" if "messages" in row else "chosen" if both and "response" not in row else "response"
    if key == "messages" or chat.is_chat(row, "prompt", key):
        require(record, (key,))
        messages, response = chat.exchange(record, key)
        return Demonstration(template.prompt(messages, record.source), response, record.source)
    if key == "chosen" and "prompt" not in row:
        return Demonstration(*_dialogue(record, key), record.source)
    require(record, ("prompt", key))
    return Demonstration(text(record, "prompt"), text(record, key), record.source)


def _pairs(record: Record, template: ChatTemplate) -> list[Pair]:
    row = fields(record, "prompt, chosen, rejected")
    if rankings.is_answers(row):
        return rankings.pairs(rankings.read(record, template))
    if chat.is_chat(row, "prompt", "chosen", "rejected"):
        require(record, ("chosen", "rejected"))
        messages, chosen = chat.exchange(record, "chosen")
        others, rejected = chat.exchange(record, "rejected")
        if others != messages:
            raise Drop(OTHER_PROMPT)
        if chosen == rejected:
            raise Drop(EQUAL)
        return [Pair(template.prompt(messages, record.source), chosen, rejected, record.source)]
    if "prompt" not in row and _has_dialogues(row):
        prompt, chosen = _dialogue(record, "chosen")
        other, rejected = _dialogue(record, "rejected")
        if other != prompt:
            raise Drop(OTHER_PROMPT)
    else:
        require(record, ("prompt", "chosen", "rejected"))
        prompt, chosen, rejected = (text(record, key) for key in ("prompt", "chosen", "rejected"))
    if chosen == rejected:
        raise Drop(EQUAL)
    return [Pair(prompt, chosen, rejected, record.source)]


def _comparisons(record: Record, template: ChatTemplate) -> Sequence[Pair | Comparison]:
    row = fields(record, "prompt, chosen, rejected")
    if rankings.is_answers(row):
        return rankings.comparisons(rankings.read(record, template))
    return _pairs(record, template)


def _prompt(record: Record, template: ChatTemplate) -> tuple[Prompt, bool]:
    """The prompt, and whether its row held responses too."""
    if isinstance(record.value, str):
        return Prompt(checked(record, "the prompt", record.value), record.source), False
    row = fields(record, "prompt", or_text=True)
    if rankings.is_answers(row):
        return Prompt(rankings.prompt(record, template), record.source), True
    columns = {key: value for key, value in row.items() if key != "prompt" and key not in _RESPONSES}
    answered = bool({"response", "chosen", "rejected"} & row.keys())
    key = next((key for key in ("messages", "prompt", "chosen") if key in row), "prompt")
    if chat.is_chat(row, key) or key == "messages":
        rendered, cut = chat.prompt(record, key, template)
        return Prompt(rendered, record.source, columns), answered or cut
    if key == "chosen" and _has_dialogues(row):
        return Prompt(_dialogue(record, "chosen")[0], record.source), True
    if chat.is_chat(row, "chosen") or chat.is_chat(row, "response"):
        messages, _ = chat.exchange(record, "chosen" if "chosen" in row else "response")
        return Prompt(template.prompt(messages, record.source), record.source, columns), True
    require(record, ("prompt",))
    return Prompt(text(record, "prompt"), record.source, columns), answered


def _has_targets(row: Pair | Comparison) -> bool:
    return isinstance(row, Comparison) and row.targets is not None


def _has_dialogues(row: dict[str, Any]) -> bool:
    return all(isinstance(row.get(key), str) and ASSISTANT in row[key] for key in ("chosen", "rejected"))


def _dialogue(record: Record, key: str) -> tuple[str, str]:
    """Prompt, with the last ``\\n\\nAssistant:`` at its end, and the response after it."""
    value = record.value[key]
    if not isinstance(value, str) or ASSISTANT not in value:
        raise UserError(
            f"{record.source}: expected keys prompt, chosen, rejected, found {names(record.value)}; without a prompt, "
            f"{key!r} must be a dialogue whose turns start with '\\n\\nHuman:' and '\\n\\nAssistant:'"
        )
    end = value.rindex(ASSISTANT) + len(ASSISTANT)
    if not value[end:].strip():
        raise Drop(NO_RESPONSE)
    return checked(record, key, value[:end]), checked(record, key, value[end:])
