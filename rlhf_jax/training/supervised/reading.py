"""The rows that a stage trains and validates on: read from files, split, as token ids."""

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jax import Array

from rlhf_jax.config import DataSource, ModelSource, Text
from rlhf_jax.data import encoding, formats
from rlhf_jax.data.encoding import EncodedTexts
from rlhf_jax.data.formats import ReadResult
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.training.common import initial
from rlhf_jax.training.supervised.job import Settings, Task

MANY = 2048  # rows; more are encoded in parts and kept for the next run


def read(
    source: DataSource, task: Task, settings: Settings, parts: Sequence[formats.Names]
) -> tuple[ReadResult, ReadResult]:
    """The rows of ``initial.stage_data``: to train on, and to validate on, of which there may be
    none.

    Raises:
        UserError: the data cannot be used, or a file is in both.
    """
    data = initial.stage_rows(source, task.kind, parts[0])
    if settings.max_rows is not None:
        data = _sampled(data, settings.max_rows, f"{task.section}.max_rows", source.seed)
    if len(parts) == 1:
        return data, ReadResult([])
    key = f"{task.section}.validation_data"
    to_validate = initial.stage_rows(source, task.kind, parts[1], f" ({key})")
    trained_on = {digest: name for name, digest in data.fingerprints.items()}
    for name, digest in to_validate.fingerprints.items():
        if digest in trained_on:
            raise UserError(
                f"{key}: {name} is {trained_on[digest]}, which is trained on; give other rows"
            )
    formats.check_labels([*data.rows, *to_validate.rows])
    return data, to_validate


def _sampled(data: ReadResult, most: int, key: str, seed: int) -> ReadResult:
    """At most so many rows, drawn by the seed, in their order; a ranking's pairs are one row."""
    places = list(dict.fromkeys(row.source for row in data.rows))
    if len(places) <= most:
        return data
    drawn = np.random.default_rng(seed).permutation(len(places))[:most]
    kept = {places[number] for number in drawn}
    logger.info(f"{key}: {most} of {len(places)} rows are used")
    rows = [row for row in data.rows if row.source in kept]
    return replace(data, rows=rows, not_drawn=len(data.rows) - len(rows))


def encoded_rows(
    source: ModelSource,
    task: Task,
    settings: Settings,
    language_model: LanguageModel,
    data: ReadResult,
    to_validate: ReadResult,
    key: Array,
) -> tuple[EncodedTexts, np.ndarray, np.ndarray]:
    """All rows as token ids, and the numbers of those to train on and to validate on. Prints how
    many rows are used, and why the others are not.
    """
    kind: str = task.kind
    to_train = data.rows
    own = to_validate.rows
    text = source.text
    tokenizer = language_model.tokenizer
    longest = longest_text(text, language_model.model.config.max_length)
    are_pieces = to_train[0].is_plain_text
    template = "{prompt}" if are_pieces else text.template
    if are_pieces:
        kind = "pieces"
        to_train = _pieces(to_train, language_model, longest)
        own = _pieces(own, language_model, longest)
    else:
        initial.say_template(source, tokenizer)
    initial.say_spelled([*data.rows, *to_validate.rows], tokenizer, template)
    every_row = [*to_train, *own]
    encoded = encode(text, every_row, tokenizer, longest, are_pieces)
    if kind != "comparisons":  # margins are of reward models, which a line has said
        encoded = replace(encoded, margin=None)
    # A piece is a group of its own: its prompt is a token that many have.
    group_of = {row.source: row.source if are_pieces else encoding.group(row) for row in every_row}
    groups = [group_of[source] for source in encoded.sources]
    if own:
        is_own = np.isin(encoded.sources, [row.source for row in own])
        train_rows = np.flatnonzero(~is_own)
        held_out = np.flatnonzero(is_own)
        initial.say_held_out(kind, groups, train_rows, held_out)
    else:
        fraction = settings.validation_fraction
        train_rows, held_out = initial.hold_out(kind, groups, fraction, key)
    num_bad = sum(data.dropped.values()) + sum(to_validate.dropped.values())
    used = f"{len(train_rows)} train, {len(held_out)} held out"
    _account(every_row, num_bad, kind, encoded, used)
    return encoded, train_rows, held_out


def left_out(
    section: str, names: Sequence[str], encoded: EncodedTexts, held_out: np.ndarray
) -> list[int]:
    """The numbers of the rows that ``without_rows`` names, N or FILE:N.

    Raises:
        UserError: a name is of no row that is trained on, or of rows of several files.
    """
    numbers: list[int] = []
    for name in names:
        file, _, place = name.rpartition(":")
        pattern = re.compile(rf"{re.escape(file) or '.*'}, \w+ {re.escape(place)}")
        found = [row for row, source in enumerate(encoded.sources) if pattern.fullmatch(source)]
        of = sorted({encoded.sources[row] for row in found})
        why = ""
        if not found:
            why = "there is no such row, or it is not used: it is bad, too long or not drawn"
        elif len(of) > 1:
            why = f"give FILE:{place}, since it is {' or '.join(of)}"
        elif np.isin(found, held_out).any():
            why = "the row is held out for validation, so nothing is learned from it"
        if why:
            raise UserError(f"{section}.without_rows {name}: {why}")
        numbers += found
    return numbers


def longest_text(text: Text, positions: int) -> int:
    """Most tokens of a text: ``text.max_length``, or the positions of the model.

    Raises:
        UserError: the setting is more than the model reads.
    """
    wanted = text.max_length
    if wanted is not None and wanted > positions:
        raise UserError(
            f"text.max_length {wanted}: the model reads {positions} tokens at most; give at most "
            "so many"
        )
    return wanted or positions


def encode(
    text: Text,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    max_length: int | None,
    are_pieces: bool,
) -> EncodedTexts:
    """Rows as token ids, for a model of that many positions; ``are_pieces``: of plain texts, which
    have no template.
    """
    template = "{prompt}" if are_pieces else text.template
    encode_rows = encoding.encode_texts
    if len(rows) > MANY:
        from rlhf_jax.training.supervised import store

        encode_rows = store.encode
    return encode_rows(
        rows, tokenizer, template=template, max_length=max_length, too_long=text.too_long
    )


def _account(
    read: Sequence[Row], num_bad: int, kind: str, encoded: EncodedTexts, used: str
) -> None:
    """Prints a line for each way in which long texts were treated, and the number of rows."""
    unit = "pairs" if all(row.is_pair for row in read) else kind
    for what, count in encoded.counts.items():
        logger.info(f"{count} {'texts' if what == encoding.CUT else unit}: {what}")
    num_too_long = len(read) - len(encoded)
    num_rows = len(read) + num_bad
    logger.info(f"{num_rows} {unit} in, {num_bad} bad, {num_too_long} too long, {used}")


def _pieces(texts: Sequence[Row], language_model: LanguageModel, max_length: int) -> list[Row]:
    """Plain texts as ``encoding.pieces``; prints how many."""
    cut = encoding.pieces(texts, language_model.tokenizer, max_length)
    lengths = [len(row.responses[0]) for row in cut]
    if cut:
        size = f"{len(cut):,} pieces of up to {1 + max(lengths):,} tokens"
        logger.info(f"plain text of {sum(lengths):,} tokens: cut into {size}")
    return cut
