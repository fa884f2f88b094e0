"""How rows become batches: padded or packed, and whether the answers of a comparison compute their
prompt once (``compute.share_prompts``).

With shared prompts a batch holds a comparison as one text, [prompt | answer | answer ...], whose
answers read the prompt and not one another: see ``models.attention.prompt_of``.
"""

import dataclasses
from collections.abc import Callable
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
from rlhf_jax.training.common import initial, layout, shared_prompts
from rlhf_jax.training.common.layout import Shares
from rlhf_jax.training.supervised.tasks import Settings, TaskSpec


class Batching(NamedTuple):
    """How rows become batches."""

    encoded: EncodedTexts
    plan: Plan
    collate: Callable[[EncodedTexts, np.ndarray], Any]  # (encoded, row numbers) -> a batch
    multiple: int  # of which the width of a batch is that is not packed
    columns: int  # of all arrays in the first epoch: its token passes, padding included
    line: str = ""  # what the console says


def obstacle(encoded: EncodedTexts) -> str | None:
    """Why comparisons cannot compute their prompts once; None if they can."""
    if np.any((encoded.response_lengths > 0) & (encoded.starts == 0)):
        return "a row of the data has a prompt without a token"
    return None


def decided(
    wanted: Switch, encoded: EncodedTexts, batched: Callable[[EncodedTexts], Batching]
) -> Batching:
    """The batches with shared prompts, or without. ``auto`` shares if that saves a tenth of the
    token passes of an epoch, padding included; with a single answer in each row nothing is shared.
    The choice is printed.

    Args:
        wanted: ``compute.share_prompts``.
        batched: makes the batches of the encoded texts.

    Raises:
        UserError: ``compute.share_prompts`` is true, and an answer has no prompt.
    """
    chosen = batched(encoded)
    if encoded.num_answers > 1:
        reason = obstacle(encoded)
        shared = chosen
        if reason is None and wanted is not False:
            shared = batched(dataclasses.replace(encoded, shares_prompts=True))
        saved = (chosen.columns - shared.columns) / chosen.columns
        shares = shared_prompts.is_wanted(wanted, reason, saved)
        if reason is None and wanted is not False:
            what = f"prompts computed once for {encoded.num_answers} answers"
            shared_prompts.say(shares, what, saved)
        chosen = shared if shares else chosen
    if chosen.line:
        logger.info(chosen.line)
    return chosen


def batched(
    shares: Shares,
    wanted: Switch,
    spec: TaskSpec,
    settings: Settings,
    text: Text,
    encoded: EncodedTexts,
    rows: np.ndarray,
    key: Array,
    layers: int,
) -> Batching:
    """The batches of the training ``rows`` for a model with so many ``layers``; whether they share
    prompts is decided and printed (``decided``).

    wanted: ``compute.share_prompts``.
    """
    of_texts = partial(_batching, shares, spec, settings, text, rows=rows, key=key, layers=layers)
    return decided(wanted, encoded, of_texts)


def _batching(
    shares: Shares,
    spec: TaskSpec,
    settings: Settings,
    text: Text,
    encoded: EncodedTexts,
    *,
    rows: np.ndarray,
    key: Array,
    layers: int,
) -> Batching:
    """How the training ``rows`` of a model with so many ``layers`` form batches: padded to a
    multiple of columns, or packed.
    """
    longest = encoded.longest
    size = settings.batch_size
    multiple = initial.bucket_multiple(
        text, layers=layers, longest=int(longest.max()), num_steps=-(-len(rows) // size)
    )
    of_rows = longest[rows]
    if not text.pack or spec.pack is None:
        plan = batches.Plan(of_rows, size, key, multiple)
        columns = batches.columns_of(encoded, rows, plan)
        collate = partial(spec.collate, bucket_multiple=multiple)
        return Batching(encoded, plan, collate, multiple, columns)
    plan = batches.Plan(of_rows, size, key, text.bucket_multiple)
    least = layout.row_parts(shares, settings.num_microbatches)
    packed = batches.packing(encoded, rows, plan, least)
    line = (
        f"text.pack: {packed.padding:.0%} of rows [{packed.width}] are padding, "
        f"{packed.padding_alone:.0%} of rows that are not packed"
    )
    collate = partial(spec.pack, width=packed.width, multiple=packed.multiple)
    return Batching(encoded, packed.plan, collate, multiple, packed.columns, line)
