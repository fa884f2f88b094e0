"""Rows of a data file as a stage would learn them: ``rlhf-jax data preview FILE --for STAGE``."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.config import ALGORITHMS, DataSource, RLStage, Text
from rlhf_jax.data import chat, encoding, preview
from rlhf_jax.data.formats import ReadResult
from rlhf_jax.data.preview import Preview
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import hf
from rlhf_jax.training.common import initial
from rlhf_jax.training.supervised import reading
from rlhf_jax.training.tasks import TASKS


class Previews(NamedTuple):
    """The rows that are shown, and those that no run could use."""

    rows: Iterator[Preview]
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

    def shown() -> Iterator[Preview]:
        for number, row in enumerate(first):
            texts, notes = _texts(stage, text, settings, row, tokenizer, max_length, are_pieces)
            notes += filter(None, [spelled[0 if are_pieces else number]])
            form = found.forms.get(row.source.partition(", turn ")[0], "text")
            yield Preview(row.source, form, row.columns, texts, notes)

    template = chat.describe(text.template, tokenizer, model.model)
    return Previews(shown(), found, tokenizer, template)


def _texts(
    stage: str,
    text: Text,
    settings: RLStage,
    row: Row,
    tokenizer: Tokenizer,
    max_length: int,
    is_piece: bool,
) -> tuple[list[preview.Text], list[str]]:
    """The texts of a row alone, by the functions with which a run encodes all rows, and what was
    cut or why a run would not use them.
    """
    try:
        if stage in TASKS:
            encoded: Any = reading.encode(text, [row], tokenizer, max_length, is_piece)
            batch = TASKS[stage].collate(encoded, np.zeros(1, np.int64), bucket_multiple=1)
            return preview.texts_of(row, batch), [*encoded.counts]
        encoded = initial.encode_prompts(text, settings, [row], tokenizer, max_length)
    except UserError as error:
        return [], [f"a run would not use it: {error}"]
    ids = encoded.tokens[0, encoded.attention_mask[0] != 0].tolist()
    return [preview.Text("prompt", ids, [False] * len(ids))], [*encoded.counts]
