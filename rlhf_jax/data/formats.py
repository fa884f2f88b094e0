"""Records of data files as rows: demonstrations, comparisons or prompts, by the keys that a record has.

==========================================  ==========================================================================
``{prompt, response}``                      a demonstration
``{messages}``                              a demonstration if it ends with the assistant's turn (`chat`), else a prompt
``{prompt, chosen, rejected}``              a comparison; each value may be messages
``{chosen, rejected}``                      two dialogues as in hh-rlhf (Bai et al. 2022) that differ in the last answer
``{query, sample0, sample1, ..., best}``    as in lm-human-preferences (Ziegler et al. 2019): texts or GPT-2 token ids
``{prompt, responses, LABEL}``              LABEL is ``best`` (a number from 0), ``ranking`` (response numbers, best
                                            first), ``ranks`` (the lowest is best, equal ones are ties) or ``targets``
``{prompt, ...}`` or a string               a prompt; other keys are columns for the reward
==========================================  ==========================================================================

As in InstructGPT (Ouyang et al. 2022) a ranking becomes all of its ordered pairs, which together count as one
comparison. Every row remembers where it came from, so that later stages can name it in their errors.
"""

import difflib
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from rlhf_jax.data import chat, demo, rows
from rlhf_jax.data.chat import ChatTemplate, Message
from rlhf_jax.data.files import Source, parse_text, read_source
from rlhf_jax.data.rows import Comparison, Demonstration, Drop, Pair, Prompt, Record, Text
from rlhf_jax.errors import UserError

Names = str | PathLike[str] | Sequence[str | PathLike[str]]
Kind = Literal["demonstrations", "pairs", "comparisons", "prompts"]
Row = TypeVar("Row")

PAIR = ("chosen", "rejected")
LABELS = ("best", "ranking", "ranks", "targets")
_EXPECTED = {"demonstrations": "prompt, response", "prompts": "prompt, or a string"}  # in errors; else _PAIR_KEYS
_PAIR_KEYS = "prompt, chosen, rejected"
FILES: dict[Kind, str] = {  # in a folder of the pipeline's data
    "demonstrations": "sft_data.json",
    "pairs": "preference_data.json",
    "comparisons": "preference_data.json",
    "prompts": "prompts.json",
}
# Which records are of which kind: the first whose keys they have. Those of K responses stand above all.
FORMATS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("comparisons", ("prompt", *PAIR)),
    ("comparisons", PAIR),
    ("demonstrations", ("messages",)),
    ("demonstrations", ("prompt", "response")),
    ("prompts", ("prompt",)),
)
DEMO = "demo"  # the data of this name is generated

ASSISTANT = "\n\nAssistant:"
PAD_ID = 50259  # of lm-human-preferences, GPT-2's vocabulary size + 2; no token of GPT-2
EQUAL = "chosen and rejected are identical"
ALL_EQUAL = "all responses are identical"
_SAMPLE = re.compile(r"sample([0-9]{1,4})")
_LARGEST = 3.4e38  # of float32


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
        """One line for a log, such as ``1162 rows, 1 dropped (chosen and rejected are identical)``."""
        reasons = "".join(f", {count} dropped ({reason})" for reason, count in self.dropped.items())
        return f"{self.kept} rows{reasons}"


class Answers(NamedTuple):
    """K responses to one prompt and what is known of them."""

    prompt: Text
    responses: tuple[Text, ...]
    source: str
    best: int | None = None
    ranks: tuple[float, ...] | None = None  # the lowest is best
    targets: tuple[float, ...] | None = None


def read(kind: Kind, names: Names, *, seed: int = 0, template: ChatTemplate | None = None) -> ReadResult[Any]:
    """The rows of one or several sources: of demonstrations `rows.Demonstration`, and so on.

    Kinds: ``demonstrations`` may be read from pairs (the chosen response) and other comparisons (the best) too.
    ``comparisons`` are `rows.Pair` and, for the choice of one response among K > 2 or targets, `rows.Comparison`;
    ``pairs`` make all of it pairs. ``prompts`` come from rows with responses too, each such prompt once.

    Dropped and counted: pairs of equal responses, pairs of dialogues that differ before the last response or lack one,
    and repeated prompts.

    Args:
      names: files or datasets (`files.read_source`), folders with sft_data.json, preference_data.json or prompts.json,
        or ``demo`` alone: the corpus that `demo` generates from ``seed``.
      template: renders messages; by default `chat.PLAIN`.

    Raises:
      UserError: no data or no usable row; a file that cannot be read; a row of another form, named by file and line.
    """
    sources = _sources(kind, names, seed)
    template = template or ChatTemplate()
    kept: list[Any] = []
    dropped: dict[str, int] = {}
    seen: set[Text] = set()
    for source in sources.values():
        for record in source.records:
            try:
                parsed = parse(kind, record, template)
                if kind == "prompts":
                    if parsed[0].prompt in seen and _has_responses(record.value):
                        raise Drop("repeated prompt")
                    seen.add(parsed[0].prompt)
                kept.extend(parsed)
            except Drop as drop:
                dropped[str(drop)] = dropped.get(str(drop), 0) + 1
    if not kept:
        reasons = ", ".join(f"{count} dropped ({reason})" for reason, count in dropped.items())
        raise UserError(f"{', '.join(sources)}: no usable row: {reasons}")
    check_labels(kept)
    return ReadResult(kept, dropped, {name: source.fingerprint for name, source in sources.items()})


def _sources(kind: Kind, names: Names, seed: int) -> dict[str, Source]:
    names = [names] if isinstance(names, str | PathLike) else list(names)
    if not names:
        raise UserError(
            f"no data: give --data FILE with {kind}, a folder that holds {FILES[kind]}, or `--data demo` for the "
            "generated demo corpus"
        )
    if DEMO not in names:
        files = [_file(str(name), kind) for name in names]
        return {file: read_source(file) for file in files}
    if len(names) > 1:
        raise UserError(f"--data {' '.join(map(str, names))}: `{DEMO}` cannot be mixed with files")
    name = f"{DEMO}/{FILES[kind]}"
    content = demo.generate(FILES[kind], seed)
    records, form = parse_text(content, name)
    return {name: Source(records, hashlib.sha256(content.encode()).hexdigest(), form)}


def _file(name: str, kind: Kind) -> str:
    if not os.path.exists(name) and difflib.get_close_matches(name, [DEMO], n=1):
        raise UserError(f"--data {name}: no such file; did you mean {DEMO}, which is generated?")
    if not os.path.isdir(name):
        return name
    file = Path(name) / FILES[kind]
    if not file.is_file():
        raise UserError(f"{name}: this folder has no {FILES[kind]}, which holds the {kind}; name the file itself")
    return str(file)


def check_labels(read_rows: Sequence[Any]) -> None:
    """Raises `UserError` if some rows have targets and others a preference."""
    with_targets = [isinstance(row, Comparison) and row.targets is not None for row in read_rows]
    if len(set(with_targets)) > 1:
        have, lack = read_rows[with_targets.index(True)].source, read_rows[with_targets.index(False)].source
        raise UserError(f"{lack}: has no targets but {have} has; train on one kind of label at a time")


def form_of(value: Any) -> tuple[Kind, str] | None:
    """The kind of data that a record's keys make it, and the name of its format; None for no known format."""
    if isinstance(value, str):
        return "prompts", "text"
    if not isinstance(value, dict):
        return None
    if _has_answers(value):
        answers = "responses" if "responses" in value else "sample0, ..."
        return "comparisons", ", ".join([prompt_key(value), answers, *(key for key in LABELS if key in value)])
    for kind, keys in FORMATS:
        if not all(key in value for key in keys):
            continue
        messages = chat.is_chat(value, "prompt", *keys)
        if keys == ("messages",) and not chat.is_answered(value["messages"]):
            kind = "prompts"
        suffix = " (messages)" if messages and keys != ("messages",) else " (dialogues)" if keys == PAIR else ""
        return kind, ", ".join(keys) + suffix
    return None


def parse(kind: Kind, record: Record, template: ChatTemplate) -> Sequence[Any]:
    """The rows of one record.

    Raises:
      UserError: for a record that could not be read, is of another form or has a wrong value, with file and line.
      Drop: for a row that is to be left out.
    """
    if isinstance(record.value, str) and kind == "prompts":
        return [Prompt(rows.checked(record, "the prompt", record.value), record.source)]
    row = rows.fields(record, _EXPECTED.get(kind, _PAIR_KEYS))
    if kind == "prompts":
        return [_prompt(record, template)]
    if kind == "demonstrations" and not _has_answers(row):
        pair = "response" not in row and all(key in row for key in PAIR)
        before, response = _exchange(record, "messages" if "messages" in row else "chosen" if pair else "response")
        return [Demonstration(_rendered(before, template, record), response, record.source)]
    labelled = answers(record, template)
    if kind == "demonstrations":
        return [_best_of(labelled)]
    return _comparisons(labelled) if kind == "comparisons" else _pairs(labelled)


def _prompt(record: Record, template: ChatTemplate) -> Prompt:
    row = record.value
    if _has_answers(row):
        return Prompt(_prompt_of_answers(record, template), record.source)
    columns = {key: value for key, value in row.items() if key not in ("prompt", "response", "messages", *PAIR)}
    key = next((key for key in ("messages", "prompt", "chosen") if key in row), "prompt")
    response_key = next((key for key in ("chosen", "response") if key in row), None)
    if key == "messages" or chat.is_chat(row, key):
        prompt = template.prompt(chat.conversation(record, key), record.source)
    elif key == "chosen" or (response_key and chat.is_chat(row, response_key)):
        prompt = _rendered(_exchange(record, response_key or key)[0], template, record)
    else:
        rows.require(record, ("prompt",))
        prompt = rows.text(record, "prompt")
    return Prompt(prompt, record.source, columns)


def _has_responses(value: Any) -> bool:
    """Whether a record of prompts was meant for another kind, so that a prompt may well stand in it twice."""
    return (form_of(value) or ("prompts", ""))[0] != "prompts"


def _exchange(record: Record, key: str) -> tuple[str | list[Message], str]:
    """What stands before the response under ``key``, and the response: texts, messages or the halves of a dialogue."""
    row, keys, hint = record.value, PAIR if key in PAIR else (key,), ""
    if key == "messages" or chat.is_chat(row, "prompt", *keys):
        rows.require(record, keys)
        return chat.exchange(record, key)
    if "prompt" not in row and key in PAIR and key in row:
        if isinstance(row[key], str) and ASSISTANT in row[key]:
            end = row[key].rindex(ASSISTANT) + len(ASSISTANT)
            if not row[key][end:].strip():
                raise Drop(chat.NO_RESPONSE)
            return rows.checked(record, key, row[key][:end]), rows.checked(record, key, row[key][end:])
        hint = (
            f"; without a prompt, {key!r} must be a dialogue whose turns start with '\\n\\nHuman:' and "
            "'\\n\\nAssistant:'"
        )
    rows.require(record, ("prompt", *keys), hint)
    return rows.text(record, "prompt"), rows.text(record, key)


def _rendered(before: str | list[Message], template: ChatTemplate, record: Record) -> Text:
    return before if isinstance(before, str) else template.prompt(before, record.source)


def prompt_key(row: dict[str, Any]) -> str:
    """``query`` in rows that have it instead of ``prompt``."""
    return "query" if "query" in row and "prompt" not in row else "prompt"


def _has_answers(row: Any) -> bool:
    """Whether the row has a list of K responses."""
    return isinstance(row, dict) and ("responses" in row or any(_SAMPLE.fullmatch(key) for key in row))


def answers(record: Record, template: ChatTemplate) -> Answers:
    """The responses of a pair, or of a row of K responses, and their labels, checked.

    Raises:
      UserError: for missing or contradictory labels and for whatever is wrong in a field, with file and line.
      Drop: if all responses are equal, unless they have targets of their own; dialogues that differ earlier.
    """
    row = rows.fields(record, _PAIR_KEYS)
    if not _has_answers(row):
        (before, chosen), (other, rejected) = (_exchange(record, key) for key in PAIR)
        if other != before:
            raise Drop("dialogues differ before the last response")
        if chosen == rejected:
            raise Drop(EQUAL)
        return Answers(_rendered(before, template, record), (chosen, rejected), record.source, best=0)
    responses = tuple(_text_or_ids(record, what, value) for what, value in _responses(record).items())
    labels = [key for key in LABELS if row.get(key) is not None]
    targets = _numbers(record, "targets", len(responses)) if "targets" in labels else None
    if len(responses) < (1 if targets else 2):
        raise UserError(f"{record.source}: a comparison needs at least 2 responses, found {len(responses)}")
    if not labels:
        raise UserError(f"{record.source}: expected one of the keys {', '.join(LABELS)}, found {', '.join(row)}")
    if targets is None and len(labels) > 1:
        raise UserError(f"{record.source}: expected one of {', '.join(LABELS)}, found {' and '.join(labels)}")
    if targets is None and len(set(responses)) == 1:
        raise Drop(EQUAL if len(responses) == 2 else ALL_EQUAL)
    best = _best(record, len(responses)) if "best" in labels else None
    ranks = _ranks_of(record, len(responses)) if "ranking" in labels else None
    if "ranks" in labels:
        ranks = _numbers(record, "ranks", len(responses))
    prompt = _prompt_of_answers(record, template)
    return Answers(prompt, responses, record.source, best, ranks, targets)


def _responses(record: Record) -> dict[str, Any]:
    """The values of a row's responses by their names in an error."""
    row = record.value
    if "responses" in row:
        if not isinstance(row["responses"], list):
            raise UserError(f"{record.source}: 'responses' must be a list, found {rows.kind(row['responses'])}")
        return {f"'responses'[{i}]": value for i, value in enumerate(row["responses"])}
    samples = [f"sample{i}" for i in range(sum(bool(_SAMPLE.fullmatch(key)) for key in row))]
    rows.require(record, samples)
    # A table has the same columns in all rows; the last ones are empty where there are fewer responses.
    while samples and row[samples[-1]] is None:
        samples.pop()
    return {repr(key): row[key] for key in samples}


def _prompt_of_answers(record: Record, template: ChatTemplate) -> Text:
    """The prompt of a row of K responses: text, token ids or messages."""
    key = prompt_key(record.value)
    rows.require(record, (key,))
    if chat.is_chat(record.value, key):
        return template.prompt(chat.conversation(record, key), record.source)
    return _text_or_ids(record, repr(key), record.value[key], may_be_space=True)


def _text_or_ids(record: Record, what: str, value: Any, may_be_space: bool = False) -> Text:
    if isinstance(value, str):
        return rows.checked(record, what, value, may_be_space)
    if not isinstance(value, list):
        raise UserError(f"{record.source}: {what} must be a string or a list of token ids, found {rows.kind(value)}")
    for i in value:
        if type(i) is not int or i < 0:
            raise UserError(f"{record.source}: {what} must hold token ids, found {rows.kind(i)}")
    ids = tuple(i for i in value if i != PAD_ID)
    if not ids:
        raise UserError(f"{record.source}: {what} is empty; remove the row or fill it in")
    return ids


def _best(record: Record, count: int) -> int:
    best = record.value["best"]
    if type(best) is not int or not 0 <= best < count:
        raise UserError(
            f"{record.source}: 'best' must be the number of a response, 0 to {count - 1}, found {rows.kind(best)}"
        )
    return best


def _ranks_of(record: Record, count: int) -> tuple[float, ...]:
    ranking = record.value["ranking"]
    if not isinstance(ranking, list) or any(type(i) is not int for i in ranking) or sorted(ranking) != [*range(count)]:
        raise UserError(
            f"{record.source}: 'ranking' must hold each response number from 0 to {count - 1} once, best first, found "
            f"{ranking!r}; for the rank of each response use 'ranks'"
        )
    return tuple(float(ranking.index(i)) for i in range(count))


def _numbers(record: Record, key: str, count: int) -> tuple[float, ...]:
    values = record.value[key]
    if not isinstance(values, list) or len(values) != count:
        found = f"{len(values)}" if isinstance(values, list) else rows.kind(values)
        raise UserError(
            f"{record.source}: {key!r} must be a list of {count} numbers, one for each response, found {found}"
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
            raise UserError(f"{record.source}: {key!r} must hold numbers, found {rows.kind(value)}")
    return tuple(map(float, values))


def _comparisons(row: Answers) -> Sequence[Pair | Comparison]:
    """Rows to learn scores from: a ranking's pairs, a pair of two, else one comparison of all."""
    if row.targets is None and (row.ranks is not None or len(row.responses) == 2):
        return _pairs(row)
    best = row.best if row.targets is None else None
    return [Comparison(row.prompt, row.responses, row.source, best=best, targets=row.targets)]


def _pairs(row: Answers) -> list[Pair]:
    """All ordered pairs of a ranking, or the best response with each other one; each weighs 1 / (number of them).

    Ties and equal texts make no pair; without any pair the row is dropped.
    """
    if row.ranks is None and row.best is None:
        raise UserError(f"{row.source}: holds targets, which are no preference; pairs need best, ranking or ranks")
    ranked = list(zip(row.responses, row.ranks or [i != row.best for i in range(len(row.responses))], strict=True))
    ordered = [
        (better, worse) for better, rank in ranked for worse, other in ranked if rank < other and better != worse
    ]
    if not ordered:
        raise Drop("all responses are ranked equal" if len({rank for _, rank in ranked}) == 1 else ALL_EQUAL)
    weight = 1 / len(ordered) if len(ordered) > 1 else None
    return [Pair(row.prompt, better, worse, row.source, weight) for better, worse in ordered]


def _best_of(row: Answers) -> Demonstration:
    """The best response, the first of several."""
    best = row.best if row.ranks is None else row.ranks.index(min(row.ranks))
    if best is None:
        raise UserError(f"{row.source}: holds targets; a demonstration needs best, ranking or ranks")
    return Demonstration(row.prompt, row.responses[best], row.source)
