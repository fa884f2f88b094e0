"""How rows become batches: padded or packed, and whether the answers of a comparison compute their
prompt once (``compute.share_prompts``).

With shared prompts a batch holds a comparison as one text, [prompt | answer | answer ...], whose
answers read the prompt and not one another: see ``models.attention.prompt_of``.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from rlhf_jax.config import Text
from rlhf_jax.config.settings import Switch
from rlhf_jax.data import batches
from rlhf_jax.data.batches import Plan
from rlhf_jax.data.encoding import EncodedTexts
from rlhf_jax.errors import logger
from rlhf_jax.training.common import initial
from rlhf_jax.training.supervised.job import Settings, Task


class Batching(NamedTuple):
    """How rows become batches."""

    encoded: EncodedTexts
    plan: Plan
    collate: Callable[[EncodedTexts, np.ndarray], Any]  # (encoded, row numbers) -> a batch
    bucket_multiple: int  # of which the width of a batch is that is not packed
    columns: int  # of all arrays in the first epoch: its token passes, padding included
    line: str = ""  # what the console says


def form_batches(
    encoded: EncodedTexts,
    *,
    task: Task,
    settings: Settings,
    text: Text,
    num_parts: int,
    rows: np.ndarray,
    key: Array,
    layers: int,
) -> Batching:
    """The batches of the training ``rows``: padded to a multiple of columns, or packed.

    Args:
        num_parts: into so many equal parts the rows of a packed batch divide.
        layers: of the model.
    """
    size = settings.batch_size
    how: Any = {"layers": layers, "num_steps": -(-len(rows) // size)}
    multiple = initial.bucket_multiple(text, longest=int(encoded.longest.max()), **how)
    if not text.pack or task.pack is None:
        # Which rows meet depends on the data alone, not on the form of the arrays.
        apart = initial.bucket_multiple(text, longest=int(encoded.whole.max()), **how)
        plan = Plan(encoded.whole[rows], size, key, apart)
        columns = size * encoded.rows_of_arrays
        columns *= int(batches.widths(encoded, rows, plan, multiple).sum())
        collate = partial(task.collate, bucket_multiple=multiple)
        return Batching(encoded, plan, collate, multiple, columns)
    plan = Plan(encoded.whole[rows], size, key, text.bucket_multiple)
    packed = batches.packing(encoded, rows, plan, num_parts)
    line = (
        f"text.pack: {packed.padding:.0%} of rows [{packed.width}] are padding, "
        f"{packed.padding_alone:.0%} of rows that are not packed"
    )
    collate = partial(task.pack, width=packed.width, multiple=packed.multiple)
    return Batching(encoded, packed.plan, collate, multiple, packed.columns, line)


def choose_form(
    wanted: Switch, encoded: EncodedTexts, form: Callable[[EncodedTexts], Batching]
) -> Batching:
    """The batches with shared prompts, or without. ``auto`` shares if that saves a tenth of the
    token passes of an epoch, padding included; with a single answer in each row nothing is shared.
    The choice is printed.

    Args:
        wanted: ``compute.share_prompts``.
        form: makes the batches of the encoded texts.

    Raises:
        UserError: ``compute.share_prompts`` is true, and an answer has no prompt.
    """
    chosen = form(encoded)
    if encoded.num_answers > 1:
        from rlhf_jax.training.common import shared_prompts

        obstacle = None
        if np.any((encoded.response_lengths > 0) & (encoded.starts == 0)):
            obstacle = "a row of the data has a prompt without a token"
        is_open = obstacle is None and wanted is not False
        shared = form(replace(encoded, shares_prompts=True)) if is_open else chosen
        saved = (chosen.columns - shared.columns) / chosen.columns
        shares = shared_prompts.is_wanted(wanted, obstacle, saved)
        if is_open:
            what = f"prompts computed once for {encoded.num_answers} answers"
            shared_prompts.say(shares, what, saved)
        chosen = shared if shares else chosen
    if chosen.line:
        logger.info(chosen.line)
    return chosen
