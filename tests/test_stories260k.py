"""Real weights, in the folder RLHF_JAX_DATA: the Llama trained on TinyStories says what its authors printed.

Its generated twin: random weights in the same two files, against a loop over positions as llama2.c runs it.
"""

import importlib.util
import json
import os
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_scripts import ROOT

from rlhf_jax import models, sampling
from rlhf_jax.data.tokenizers import load_tokenizer

DATA = os.environ.get("RLHF_JAX_DATA")

spec = importlib.util.spec_from_file_location("stories260k", ROOT / "experiments" / "stories260k.py")
stories260k = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stories260k)


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="RLHF_JAX_DATA names no folder of public data files")
def test_the_tinystories_llama_equals_its_published_text(tmp_path):
    source = Path(DATA, "stories260k")
    stories260k.convert(source, tmp_path)
    model, params = models.load(tmp_path)
    golden = json.loads((source / "golden.json").read_text("utf-8"))
    ids = golden["greedy_token_ids"]

    start = jnp.array([[golden["start_token"], *ids[:2]]])
    logits = np.asarray(model.apply(params, start))[0]
    for row, best in zip(logits, golden["logits_first3_positions_top8"], strict=True):
        expected_ids, expected = zip(*best, strict=True)
        np.testing.assert_array_equal(np.argsort(-row)[:8], expected_ids)
        np.testing.assert_allclose(row[list(expected_ids)], expected, atol=2e-4)

    tokenizer = load_tokenizer(tmp_path)
    config = sampling.SamplingConfig(
        max_new_tokens=len(ids), temperature=0.0, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id
    )
    prompt = jnp.array([[golden["start_token"]]])
    rollout = sampling.generate(model, params, prompt, jnp.ones_like(prompt), jax.random.key(0), config=config)
    np.testing.assert_array_equal(rollout.tokens[0, 1:], ids)
    text = (source / "greedy_expected.txt").read_text("utf-8")
    said = tokenizer.decode(ids)
    assert said.startswith(text.strip()[:200])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # Encoding finds the pieces that the model itself chose.
    assert tokenizer.encode(said) == ids


@pytest.mark.slow
def test_generated_files_of_that_layout_equal_a_loop(tmp_path):
    width, inner, layers, heads, kv_heads, length = 8, 12, 2, 4, 2, 16
    pieces = [
        b"<unk>",
        b"\n<s>\n",
        b"\n</s>\n",
        *(b"<0x%02X>" % i for i in range(256)),
        b" ",
        b"a",
        b"b",
        b"ab",
        b" ab",
    ]
    head, vocabulary = width // heads, len(pieces)
    random = np.random.default_rng(0)
    shapes = {
        "embedding": (vocabulary, width),
        "norm1": (layers, width),
        "wq": (layers, width, width),
        "wk": (layers, kv_heads * head, width),
        "wv": (layers, kv_heads * head, width),
        "wo": (layers, width, width),
        "norm2": (layers, width),
        "w1": (layers, inner, width),
        "w2": (layers, width, inner),
        "w3": (layers, inner, width),
        "norm": (width,),
    }
    weights = {name: 0.5 * random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    header = struct.pack("<7i", width, inner, layers, heads, kv_heads, vocabulary, length)
    unused = np.zeros((2, length, head // 2), np.float32)
    (tmp_path / "stories260K.bin").write_bytes(
        header + b"".join(weight.tobytes() for weight in weights.values()) + unused.tobytes()
    )
    scores = [0.0] * 259 + [0.0, 0.0, 0.0, -1.0, -2.0]
    entries = (
        struct.pack("<fi", *entry) + piece for *entry, piece in zip(scores, map(len, pieces), pieces, strict=True)
    )
    (tmp_path / "tok512.bin").write_bytes(struct.pack("<i", 7) + b"".join(entries))
    stories260k.convert(tmp_path, tmp_path / "folder")
    model, params = models.load(tmp_path / "folder")
    tokenizer = load_tokenizer(tmp_path / "folder")
    assert tokenizer.encode("abb a") == [263, 261, 259, 260]
    assert tokenizer.decode([263, 261, 259, 260]) == "abb a"

    def norm(x, weight):
        return weight * x / np.sqrt(np.mean(x**2) + 1e-5)

    def turn(x, position):
        pairs = x.reshape(-1, head // 2, 2)
        angle = position * 10000.0 ** (-np.arange(0, head, 2) / head)
        cosine, sine = np.cos(angle), np.sin(angle)
        first, second = pairs[..., 0], pairs[..., 1]
        turned = np.stack([first * cosine - second * sine, first * sine + second * cosine], axis=-1)
        return turned.reshape(-1, head)

    tokens = [1, 263, 261, 259, 260]
    keys, values = [[] for _ in range(layers)], [[] for _ in range(layers)]
    expected = []
    for position, token in enumerate(tokens):
        x = weights["embedding"][token]
        for layer in range(layers):
            at = {name: weight[layer] for name, weight in weights.items() if name not in ("embedding", "norm")}
            h = norm(x, at["norm1"])
            query = turn(at["wq"] @ h, position)
            keys[layer].append(turn(at["wk"] @ h, position))
            values[layer].append((at["wv"] @ h).reshape(-1, head))
            heard = []
            for i in range(heads):
                shared = i // (heads // kv_heads)
                logits = np.array([key[shared] @ query[i] for key in keys[layer]]) / np.sqrt(head)
                attended = np.exp(logits - logits.max())
                heard.append(attended / attended.sum() @ np.array([value[shared] for value in values[layer]]))
            x = x + at["wo"] @ np.concatenate(heard)
            h = norm(x, at["norm2"])
            gate = at["w1"] @ h
            x = x + at["w2"] @ (gate / (1 + np.exp(-gate)) * (at["w3"] @ h))
        expected.append(weights["embedding"] @ norm(x, weights["norm"]))
    np.testing.assert_allclose(model.apply(params, jnp.array([tokens]))[0], expected, atol=1e-4)
