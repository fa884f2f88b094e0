"""Greedy generation equals transformers' on torch, token for token, from left-padded prompts."""

import jax
import numpy as np
import pytest

from rlhf_jax import models, sampling
from rlhf_jax.sampling import SamplingConfig

VOCAB, EOS, PAD, PROMPT, NEW = 23, 1, 0, 6, 20


@pytest.mark.parity
def test_greedy_equals_transformers_generate(tmp_path):
    import torch
    import transformers

    torch.manual_seed(2)
    hf_config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=48, n_embd=16, n_layer=2, n_head=2, initializer_range=0.6,
        bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    hf_model = transformers.GPT2LMHeadModel(hf_config).eval()
    with torch.no_grad():  # positions loud enough that a shift of one changes tokens
        hf_model.transformer.wpe.weight.mul_(2.0)
    hf_model.save_pretrained(tmp_path)
    model, params = models.load(tmp_path)

    rng = np.random.default_rng(0)
    rows = 48
    lengths = rng.integers(1, PROMPT + 1, rows)
    mask = (np.arange(PROMPT)[None, :] >= PROMPT - lengths[:, None]).astype(np.int32)
    tokens = np.where(mask, rng.integers(2, VOCAB, (rows, PROMPT)), PAD).astype(np.int32)
    with torch.no_grad():
        expected = hf_model.generate(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW,
        ).numpy()
    expected = np.pad(expected, ((0, 0), (0, PROMPT + NEW - expected.shape[1])), constant_values=PAD)

    config = SamplingConfig(max_new_tokens=NEW, temperature=0.0, eos_id=EOS, pad_id=PAD)
    ours = jax.jit(sampling.generate, static_argnames=("model", "config"))(
        model, params, tokens, mask, jax.random.key(0), config=config
    )
    np.testing.assert_array_equal(ours.tokens, expected)
    # Not an easy case: many tokens, rows that end at many places and rows that do not end.
    is_eos = expected[:, PROMPT:] == EOS
    ended = is_eos.any(axis=1)
    assert 10 < ended.sum() < rows - 5
    assert np.unique(is_eos.argmax(axis=1)[ended]).size > 8
    assert np.unique(expected[:, PROMPT:]).size > 12
