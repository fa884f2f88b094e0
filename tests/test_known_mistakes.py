"""Mistakes that other libraries shipped, and the public reports of them: each test fails if it is
made here.

The docstrings say what went wrong there; what is tested here goes through public functions.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from tabular import assert_close

from rlhf_jax import (
    models,
    ops,
    ppo,
    sampling,
    sft,
    training,
)
from rlhf_jax.config import RLStage, RunConfig
from rlhf_jax.errors import UserError
from rlhf_jax.types import Demonstrations, TrainState

KEY = jax.random.key(0)
SIZES = {"vocab_size": 13, "max_length": 16, "hidden_size": 16, "num_layers": 1, "num_heads": 2}
GPT2 = models.build(models.GPT2Config(**SIZES))
LLAMA = models.build(models.LlamaConfig(**SIZES, num_kv_heads=1, intermediate_size=24))


@pytest.mark.parametrize(
    "model",
    [pytest.param(GPT2, id="gpt2", marks=pytest.mark.slow), pytest.param(LLAMA, id="llama")],
)
def test_nan_from_fully_padded_rows(model):
    """pytorch/pytorch#40932, #41508: attention over a row that is all padding is a softmax of
    nothing but -inf, whose NaN reached every parameter; unslothai/unsloth-zoo#1262: a mean over no
    tokens was 0 / 0.

    A batch that was filled up with such rows trains as it would without them, and one of nothing
    else not at all.
    """
    optimizer = optax.sgd(0.1)
    update = jax.jit(
        partial(
            sft.update, policy_fn=models.policy_fn(model), optimizer=optimizer, config=sft.Config()
        )
    )
    state = TrainState.create(jax.jit(model.init)(KEY), optimizer)
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


def test_a_negative_kl_from_top_k_sampling(tmp_path):
    """huggingface/trl#235, #736: samples of top-k have a mean log-ratio to the reference that can
    be negative although no KL is, and R - beta * KL then pays for it.

    By enumeration: the KL is .17, its estimate from the two likeliest tokens -.23. So no run trains
    on such samples unless it is told to, and the estimate is reported as it is, not cut off at 0.
    """
    policy = np.array([0.4, 0.3, 0.3])
    reference = np.array([0.6, 0.3, 0.1])
    log_ratio = np.log(policy / reference)
    kept = np.array([[True, True, False]])  # the lower id among equals stays
    assert_array_equal(
        np.isfinite(sampling.truncate(jnp.log(jnp.array([[0.4, 0.31, 0.29]])), top_k=2)), kept
    )
    weights = np.where(kept[0], policy, 0) / policy[kept[0]].sum()
    assert policy @ log_ratio > 0.16
    assert weights @ log_ratio < -0.23
    estimate = ops.kl(jnp.log(policy), jnp.log(reference), "k1")
    assert_allclose(weights @ np.asarray(estimate), weights @ log_ratio, rtol=1e-5)

    config = RunConfig(data=("nowhere",), output_dir=str(tmp_path / "run"), reward=("length",))
    for truncation in ({"top_k": 2}, {"top_p": 0.9}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(truncation))):
            RLStage(**truncation)
    allowed = replace(config, rl=RLStage(top_k=2, allow_truncated_sampling=True))
    with pytest.raises(UserError, match="nowhere"):  # the next thing that is wrong
        training.rl.run(allowed, ppo)
