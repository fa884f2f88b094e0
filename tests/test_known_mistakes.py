"""Mistakes that other libraries shipped, and the public reports of them: each test fails if it is
made here.

The docstrings say what went wrong there; what is tested here goes through public functions.
"""

from functools import partial

import jax
import numpy as np
import optax
from builders import initial_params
from numpy.testing import assert_allclose
from tabular import assert_close

from rlhf_jax import (
    models,
    sft,
)
from rlhf_jax.types import Demonstrations, TrainState

KEY = jax.random.key(0)
SIZES = {"vocab_size": 13, "max_length": 16, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
LLAMA = models.build(models.LlamaConfig(**SIZES, num_kv_heads=1, intermediate_size=24))


def test_nan_from_fully_padded_rows():
    """pytorch/pytorch#40932, #41508: attention over a row that is all padding is a softmax of
    nothing but -inf, whose NaN reached every parameter; unslothai/unsloth-zoo#1262: a mean over no
    tokens was 0 / 0.

    A batch that was filled up with such rows trains as it would without them, and one of nothing
    else not at all.
    """
    optimizer = optax.sgd(0.1)
    update = jax.jit(
        partial(
            sft.update, policy_fn=models.policy_fn(LLAMA), optimizer=optimizer, config=sft.Config()
        )
    )
    state = TrainState.create(initial_params(LLAMA), optimizer)
    tokens = np.random.default_rng(0).integers(0, 13, (4, 6))
    mask = np.where(
        np.array([1, 0, 1, 0])[:, None],
        np.array([[1, 1, 1, 1, 1, 0]]),
        0,
    )
    said = mask * (np.arange(6) >= 2)
    padded, metrics = update(state, Demonstrations(tokens, mask, said), KEY)
    assert metrics["nonfinite"] == 0
    twice = np.array([0, 0, 2, 2])
    whole, expected = update(
        state,
        Demonstrations(tokens[twice], mask[twice], said[twice]),
        KEY,
    )
    assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    assert_close(padded.params, whole.params, atol=1e-5)
    nothing, metrics = update(
        state,
        Demonstrations(tokens, 0 * mask, 0 * said),
        KEY,
    )
    assert metrics["loss"] == 0
    assert metrics["nonfinite"] == 0
    assert_close(nothing.params, state.params, atol=0)
