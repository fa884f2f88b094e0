"""Rows of a data file as a stage would learn them: the text of each token id that the model reads,
and which of them it learns; for people and as JSON (``rlhf-jax data preview FILE --for STAGE``).
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.config import ALGORITHMS, DataSource, RLStage
from rlhf_jax.data import chat, encoding
from rlhf_jax.data.check import answer_names
from rlhf_jax.data.formats import ReadResult
from rlhf_jax.data.rows import Fields, Row
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError, escaped
from rlhf_jax.models import hf
from rlhf_jax.training.common import initial
from rlhf_jax.training.supervised import reading
from rlhf_jax.training.tasks import TASKS


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


class Previews(NamedTuple):
    """The rows that are shown, and those that no run could use."""

    rows: list[Preview]
    found: ReadResult
    tokenizer: Tokenizer
    template: str
    """A line that names the template of the prompts."""


def rows(stage: str, source: DataSource, settings: RLStage, count: int) -> Previews:
    """The first ``count`` rows of the source as that stage makes batches of them. Rows that a
    stage cannot use are left out.

    Args:
        stage: sft, reward_model, dpo, kto or an RL algorithm.
        settings: of RL, which say how long a prompt may be.

    Raises:
        UserError: a wrong stage, no model, or a file that cannot be read.
    """
    if stage not in (*TASKS, *ALGORITHMS):
        known = ", ".join((*TASKS, *ALGORITHMS))
        raise UserError(f"--for {stage}: there is no such stage; give one of {known}")
    model = source.read_by
    text = model.text
    tokenizer = initial.tokenizer_of(model)
    if model.model is None or tokenizer is None:
        raise UserError("--for shows the ids of a model: give --model FOLDER too")
    max_length = hf.read_config(hf.find_folder(model.model)).max_length
    if stage in TASKS:
        max_length = reading.longest_text(text, max_length)
    kind = TASKS[stage].kind if stage in TASKS else "prompts"
    found = initial.read_rows(source, kind, source.data, "drop")
    first = found.rows[:count]
    spelled = [encoding.spelled([row], tokenizer, text.template) for row in first]
    are_pieces = first[0].is_plain_text
    if are_pieces:
        first = encoding.pieces(first[:1], tokenizer, max_length)[:count]
        spelled = spelled[:1] * len(first)
    shown = []
    for row, note in zip(first, spelled, strict=True):
        texts: list[Text] = []
        try:  # the row alone, by the functions with which a run encodes all rows
            if stage in TASKS:
                encoded: Any = reading.encode(text, [row], tokenizer, max_length, are_pieces)
                batch = TASKS[stage].collate(encoded, np.zeros(1, np.int64), bucket_multiple=1)
                texts = _texts_of(row, batch)
            else:
                encoded = initial.encode_prompts(text, settings, [row], tokenizer, max_length)
                ids = encoded.tokens[0, encoded.attention_mask[0] != 0].tolist()
                texts = [Text("prompt", ids, [False] * len(ids))]
            notes = [*encoded.counts]
        except UserError as error:
            notes = [f"a run would not use it: {error}"]
        form = found.forms.get(row.source.partition(", turn ")[0], "text")
        notes += [note] if note else []
        shown.append(Preview(row.source, form, row.columns, texts, notes))
    template = chat.describe(text.template, tokenizer, model.model)
    return Previews(shown, found, tokenizer, template)


def _texts_of(row: Row, batch: Any) -> list[Text]:
    """The texts of a row, the best first, from its own batch of fields [1, T] or [1, K, T]."""
    width = batch.tokens.shape[-1]
    fields = (batch.tokens, batch.attention_mask, batch.response_mask)
    arrays = (np.asarray(values).reshape(-1, width) for values in fields)
    names = answer_names(row)
    names = ["text"] if names == ["response"] else names
    texts = []
    for name, ids, is_real, is_learned in zip(names, *arrays, strict=True):
        real = is_real != 0
        texts.append(Text(name, ids[real].tolist(), (is_learned[real] != 0).tolist()))
    scores = row.targets or [float(number == (row.best or 0)) for number in range(len(texts))]
    best_first = sorted(range(len(texts)), key=lambda number: -scores[number])
    return [texts[number] for number in best_first]


def to_json(preview: Preview, tokenizer: Tokenizer) -> str:
    """One line: ``{source, form, texts: [{text, ids, learned}], columns}``."""
    texts = []
    for text in preview.texts:
        [whole] = _pieces([text.ids], tokenizer)
        texts.append({"text": whole, "ids": text.ids, "learned": text.learned})
    values = {"source": preview.source, "form": preview.form, "texts": texts}
    return json.dumps(values | {"columns": preview.columns}, default=str)


def to_text(preview: Preview, tokenizer: Tokenizer, has_colors: bool) -> str:
    """The row for people: lengths, and each text with its special tokens. What is learned is green,
    or stands in ``[[`` and ``]]``.
    """
    begin, end = ("\x1b[32m", "\x1b[0m") if has_colors else ("[[", "]]")
    lines = [escaped(f"{preview.source} ({preview.form})")]
    lines += [f"  {escaped(note)}" for note in preview.notes]
    for text in preview.texts:
        lines.append(f"  {text.name}: {len(text.ids)} tokens, {sum(text.learned)} learned")
        ids = iter(text.ids)
        are_learned = []
        runs = []
        for is_learned, run in itertools.groupby(text.learned):
            are_learned.append(is_learned)
            runs.append([next(ids) for _ in run])
        marked = ""
        for is_learned, piece in zip(are_learned, _pieces(runs, tokenizer), strict=True):
            marked += f"{begin}{escaped(piece)}{end}" if is_learned else escaped(piece)
        lines += [f"    | {line}" for line in marked.split("\n")]
    for key, value in preview.columns.items():
        lines.append(f"  {escaped(key)}: {escaped(repr(value))}")
    return "\n".join(lines)


def _pieces(runs: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each run of ids, special tokens spelled out, as it stands in the whole text."""
    so_far: list[int] = []
    shown = ""
    for run in runs:
        so_far += run
        whole = tokenizer.backend.decode(so_far, skip_special_tokens=False)
        yield whole[len(shown) :]
        shown = whole
