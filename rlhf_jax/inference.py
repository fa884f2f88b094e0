"""Texts in, texts out: a language model as a user meets it."""

import functools

import jax
import numpy as np

from rlhf_jax import models, sampling
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.types import Params, Rollout


def generate(
    model: models.Model,
    params: Params,
    tokens: np.ndarray,
    attention_mask: np.ndarray,
    key: jax.Array,
    config: sampling.SamplingConfig,
    batch_size: int = 64,
) -> Rollout:
    """Samples a response to each of N left-padded prompts [N, P], ``batch_size`` at a time; a NumPy Rollout of N rows.

    Row i is sampled as row i whatever the batch size. The last batch is filled up with absent rows, so one program is
    compiled.
    """
    step = jax.jit(functools.partial(sampling.generate, model, config=config))
    num_rows = len(tokens)
    padding = -num_rows % batch_size
    tokens = np.pad(tokens, ((0, padding), (0, 0)))
    attention_mask = np.pad(attention_mask, ((0, padding), (0, 0)))
    row_ids = np.arange(num_rows + padding, dtype=np.int32)
    parts = [
        jax.device_get(step(params, tokens[rows], attention_mask[rows], key, row_ids=row_ids[rows]))
        for rows in np.split(row_ids, len(row_ids) // batch_size)
    ]
    return jax.tree.map(lambda *xs: np.concatenate(xs)[:num_rows], *parts)


def responses(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """The text of each row's response, special tokens left out."""
    return [
        tokenizer.decode([int(token) for token in tokens[mask != 0]])
        for tokens, mask in zip(np.asarray(rollout.tokens), np.asarray(rollout.response_mask), strict=True)
    ]
