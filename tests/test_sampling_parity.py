"""Truncation and penalties against the processors of transformers."""

import numpy as np
import pytest

from rlhf_jax.sampling import decoding

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
def test_min_p_after_top_k_and_top_p(min_p):
    import torch
    import transformers

    logits = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32) * 2
    scores = torch.tensor(logits)
    for processor in (
        transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(min_p),
    ):
        scores = processor(None, scores)
    ours = decoding.truncate(logits, top_k=20, top_p=0.9, min_p=min_p)
    np.testing.assert_array_equal(ours, scores.numpy())


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty(penalty):
    import torch
    import transformers

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 40)).astype(np.float32)
    tokens = rng.integers(0, 40, (6, 15))
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor(tokens), torch.tensor(logits)).numpy()
    ours = decoding.penalised(logits, tokens, counts=np.ones(tokens.shape, bool), penalty=penalty)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    none = decoding.penalised(logits, tokens, counts=np.zeros(tokens.shape, bool), penalty=penalty)
    np.testing.assert_array_equal(none, logits)
