"""The Llama trained on TinyStories (folder RLHF_JAX_DATA) says what its authors printed, and its
generated twin: random weights in the same two files.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stories260k
from builders import write_stories
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import models, sampling
from rlhf_jax.data.tokenizers import load_tokenizer

DATA = os.environ.get("RLHF_JAX_DATA")


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="RLHF_JAX_DATA names no folder of public data files")
def test_the_tinystories_llama_equals_its_published_text(tmp_path):
    source = Path(DATA, "stories260k")
    stories260k.convert(source, tmp_path)
    model, params = models.load(tmp_path)
    golden = json.loads((source / "golden.json").read_text("utf-8"))
    ids = golden["greedy_token_ids"]
    start = golden["start_token"]
    logits = np.asarray(model.apply(params, jnp.array([[start, *ids[:2]]])))[0]
    for row, best in zip(logits, golden["logits_first3_positions_top8"], strict=True):
        expected_ids, expected = zip(*best, strict=True)
        assert_array_equal(np.argsort(-row)[:8], expected_ids)
        assert_allclose(row[list(expected_ids)], expected, atol=2e-4)
    tokenizer = load_tokenizer(tmp_path)
    config = sampling.SamplingConfig(
        len(ids), temperature=0.0, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
    )
    prompt = jnp.array([[start]])
    rollout = sampling.generate(
        model, params, prompt, jnp.ones_like(prompt), jax.random.key(0), config=config
    )
    assert_array_equal(rollout.tokens[0, 1:], ids)
    text = (source / "greedy_expected.txt").read_text("utf-8")
    said = tokenizer.decode(ids)
    assert said.startswith(text.strip()[:200])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(said) == ids  # the pieces that the model itself chose


def test_generated_files_of_that_layout_have_their_weights_in_place(tmp_path):
    width = 16
    heads = 4
    kv_heads = 2
    weights = write_stories(tmp_path, {b" ": 0.0, b"a": 0.0, b"b": 0.0, b"ab": -1.0, b" ab": -2.0})
    stories260k.convert(tmp_path, tmp_path / "folder")
    _, params = models.load(tmp_path / "folder")
    tokenizer = load_tokenizer(tmp_path / "folder")
    ids = [263, 261, 259, 260]
    assert (tokenizer.encode("abb a"), tokenizer.decode(ids)) == (ids, "abb a")

    def halves(weight, heads):
        """llama2.c turns neighbouring pairs of a head, transformers the first half with the
        second.
        """
        return weight.reshape(heads, -1, 2, width).transpose(0, 2, 1, 3).reshape(weight.shape)

    for layer in range(2):
        at = {name: weight[layer] for name, weight in weights.items()}
        block = params[f"h_{layer}"]
        kernels = {"q_proj": halves(at["wq"], heads), "k_proj": halves(at["wk"], kv_heads)}
        kernels |= {"v_proj": at["wv"], "o_proj": at["wo"]}
        for name, weight in kernels.items():
            assert_array_equal(block["attn"][name]["kernel"], weight.T)
        for name, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            assert_array_equal(block["mlp"][name]["kernel"], at[theirs].T)
        for name, theirs in (("ln_1", "norm1"), ("ln_2", "norm2")):
            assert_array_equal(block[name]["scale"], at[theirs])
    assert_array_equal(params["ln_f"]["scale"], weights["norm"])
    assert_array_equal(params["wte"]["embedding"], weights["embedding"])
