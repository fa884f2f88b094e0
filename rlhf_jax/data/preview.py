"""Rows as a stage learns them, for people and as JSON: the text of each token id that the model
reads, and which of them it learns.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_jax.data.check import answer_names
from rlhf_jax.data.rows import Fields, Row
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import escaped

_GREEN = ("\x1b[32m", "\x1b[0m")
_BRACKETS = ("[[", "]]")


@dataclass(frozen=True)
class Text:
    """A text of a row, in ids."""

    name: str  # of what the row has it for, such as "chosen"
    ids: list[int]
    learned: list[bool]
    """Whether each of the ids is learned, or of a comparison scored as part of an answer."""


@dataclass(frozen=True)
class Preview:
    """A row as a stage reads it."""

    source: str
    form: str
    columns: Fields
    texts: list[Text] = field(default_factory=list)  # chosen before rejected, the best first
    notes: list[str] = field(default_factory=list)
    """What was cut, or why a run cannot use the row."""


def texts_of(row: Row, batch: Any) -> list[Text]:
    """The texts of a row from the batch that a stage makes of it alone, of fields [1, T] or
    [1, K, T].
    """
    width = batch.tokens.shape[-1]
    fields = (batch.tokens, batch.attention_mask, batch.response_mask)
    texts = []
    arrays = (np.asarray(values).reshape(-1, width) for values in fields)
    names = answer_names(row)
    names = ["text"] if names == ["response"] else names
    for name, ids, is_real, is_learned in zip(names, *arrays, strict=True):
        real = is_real != 0
        texts.append(Text(name, ids[real].tolist(), (is_learned[real] != 0).tolist()))
    return [texts[number] for number in _best_first(row)]


def _best_first(row: Row) -> list[int]:
    """The numbers of the responses, the best one first, or those of higher targets first."""
    numbers = range(len(row.responses))
    if row.targets is not None:
        targets = row.targets
        return sorted(numbers, key=lambda number: -targets[number])
    return sorted(numbers, key=lambda number: number != (row.best or 0))


def to_json(preview: Preview, tokenizer: Tokenizer) -> str:
    """One line: ``{source, form, texts: [{text, ids, learned}], columns}``."""
    texts = []
    for text in preview.texts:
        shown = "".join(_pieces([text.ids], tokenizer))
        texts.append({"text": shown, "ids": text.ids, "learned": text.learned})
    values = {
        "source": preview.source,
        "form": preview.form,
        "texts": texts,
        "columns": preview.columns,
    }
    return json.dumps(values, default=str)


def to_text(
    preview: Preview,
    tokenizer: Tokenizer,
    has_colors: bool,
) -> str:
    """The row for people: lengths, and each text with its special tokens. What is learned is green,
    or stands in ``[[`` and ``]]``.
    """
    lines = [escaped(f"{preview.source} ({preview.form})")]
    lines += [f"  {escaped(note)}" for note in preview.notes]
    for text in preview.texts:
        lines.append(f"  {text.name}: {len(text.ids)} tokens, {sum(text.learned)} learned")
        marked = _marked(text, tokenizer, _GREEN if has_colors else _BRACKETS)
        lines += [f"    | {line}" for line in marked.split("\n")]
    for key, value in preview.columns.items():
        lines.append(f"  {escaped(key)}: {escaped(repr(value))}")
    return "\n".join(lines)


def _marked(
    text: Text,
    tokenizer: Tokenizer,
    marks: tuple[str, str],
) -> str:
    """The text with marks around what is learned."""
    are_learned: list[bool] = []
    runs: list[list[int]] = []
    for token, is_learned in zip(text.ids, text.learned, strict=True):
        if are_learned[-1:] != [is_learned]:
            are_learned.append(is_learned)
            runs.append([])
        runs[-1].append(token)
    shown = ""
    begin, end = marks
    for is_learned, piece in zip(are_learned, _pieces(runs, tokenizer), strict=True):
        safe = escaped(piece)
        shown += f"{begin}{safe}{end}" if is_learned else safe
    return shown


def _pieces(runs: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each run of ids, special tokens spelled out, as it stands in the whole text."""
    so_far: list[int] = []
    shown = ""
    for run in runs:
        so_far += run
        whole = tokenizer.backend.decode(so_far, skip_special_tokens=False)
        yield whole[len(shown) :]
        shown = whole
