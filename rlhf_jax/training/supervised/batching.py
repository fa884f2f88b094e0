"""Whether the answers of a comparison compute their prompt once (``compute.share_prompts``).

A batch then holds a comparison as one text, [prompt | answer | answer ...], whose answers read the
prompt and not one another: see ``models.attention.prompt_of``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.config import Compute
from rlhf_jax.data.batches import Plan
from rlhf_jax.data.encoding import EncodedTexts
from rlhf_jax.errors import logger
from rlhf_jax.training.common import shared_prompts


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
    compute: Compute, encoded: EncodedTexts, batched: Callable[[EncodedTexts], Batching]
) -> Batching:
    """The batches with shared prompts, or without. ``auto`` shares if that saves a tenth of the
    token passes of an epoch, padding included; with a single answer in each row nothing is shared.
    The choice is printed.

    Args:
        batched: makes the batches of the encoded texts.

    Raises:
        UserError: ``compute.share_prompts`` is true, and an answer has no prompt.
    """
    chosen = batched(encoded)
    if encoded.num_answers > 1:
        reason = obstacle(encoded)
        shared = chosen
        if reason is None and compute.share_prompts is not False:
            shared = batched(dataclasses.replace(encoded, shares_prompts=True))
        saved = (chosen.columns - shared.columns) / chosen.columns
        shares = shared_prompts.is_wanted(compute.share_prompts, reason, saved)
        if reason is None and compute.share_prompts is not False:
            what = f"prompts computed once for {encoded.num_answers} answers"
            shared_prompts.say(shares, what, saved)
        chosen = shared if shares else chosen
    if chosen.line:
        logger.info(chosen.line)
    return chosen
