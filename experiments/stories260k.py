"""The 260,000-parameter Llama trained on TinyStories, from llama2.c's two binary files to a Hugging
Face folder.

    python experiments/stories260k.py SOURCE FOLDER

SOURCE holds stories260K.bin and tok512.bin. transformers loads FOLDER too. The padding token is
``<unk>``, which the model never says.
"""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from rlhf_jax import cli
from rlhf_jax.errors import UserError

WEIGHTS = "stories260K.bin"
PIECES = "tok512.bin"
SPACE = "\u2581"  # what SentencePiece writes for a space


def convert(source: str | Path, folder: str | Path) -> None:
    """Reads the two files in ``source`` and writes config.json, model.safetensors and the tokenizer
    into ``folder``.

    Raises:
        UserError: a file is missing, or its length is not what its header says.
    """
    source = Path(source)
    folder = Path(folder)
    for name in (WEIGHTS, PIECES):
        if not (source / name).is_file():
            raise UserError(
                f"{source}: holds no {name}; give the folder with {WEIGHTS} and {PIECES}"
            )
    stored = (source / WEIGHTS).read_bytes()
    width, inner, layers, heads, kv_heads, vocabulary, length = struct.unpack("<7i", stored[:28])
    values = np.frombuffer(stored, "<f4", offset=28)
    head = width // heads
    place = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal place
        size = int(np.prod(shape))
        place += size
        if place > len(values):
            raise UserError(
                f"{source / WEIGHTS}: ends before the weights that its header announces; fetch it "
                "again"
            )
        return values[place - size : place].reshape(shape)

    tensors = {"model.embed_tokens.weight": take(vocabulary, width)}

    def of_layers(name: str, *shape: int, turned: int = 0) -> None:
        for layer, weight in enumerate(take(layers, *shape)):
            if turned:
                # Rotary pairs lie side by side in the file, and half a head apart in transformers.
                weight = weight.reshape(turned, head // 2, 2, width).swapaxes(1, 2).reshape(shape)
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ascontiguousarray(weight)

    of_layers("input_layernorm", width)
    of_layers("self_attn.q_proj", width, width, turned=heads)
    of_layers("self_attn.k_proj", kv_heads * head, width, turned=kv_heads)
    of_layers("self_attn.v_proj", kv_heads * head, width)
    of_layers("self_attn.o_proj", width, width)
    of_layers("post_attention_layernorm", width)
    of_layers("mlp.gate_proj", inner, width)
    of_layers("mlp.down_proj", width, inner)
    of_layers("mlp.up_proj", inner, width)
    tensors["model.norm.weight"] = take(width)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: np.array(tensor) for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    tokenizer((source / PIECES).read_bytes(), vocabulary).save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")


def tokenizer(stored: bytes, vocabulary: int) -> Tokenizer:
    """SentencePiece's BPE: of the pairs that stand side by side, the one of the best score is
    merged first.
    """
    pieces: list[str] = []
    scores: dict[str, float] = {}
    place = 4
    for i in range(vocabulary):
        score, length = struct.unpack("<fi", stored[place : place + 8])
        piece = stored[place + 8 : place + 8 + length].decode("utf-8")
        place += 8 + length
        piece = ("<unk>", "<s>", "</s>")[i] if i < 3 else piece.replace(" ", SPACE)
        pieces.append(piece)
        scores[piece] = score
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (scores[piece], ids[piece], piece[:cut], piece[cut:])
        for piece in pieces[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    merges.sort(key=lambda merge: (-merge[0], merge[1]))
    model: Any = models.BPE(
        ids, [merge[2:] for merge in merges], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in pieces[:3]]
    )
    return backend


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError(
            f"expected two folders, python {sys.argv[0]} SOURCE FOLDER, got "
            f"{' '.join(sys.argv[1:])!r}"
        )
    convert(*sys.argv[1:])
    print(f"saved {sys.argv[2]}")


if __name__ == "__main__":
    cli.run_script(main)
