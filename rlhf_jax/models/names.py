"""Names of the tensors in Hugging Face folders, one table per family, read by import and export both."""

import re
from typing import NamedTuple

from rlhf_jax.models.config import GPT2Config


class Tensor(NamedTuple):
    """A tensor of a file and its place: ``params[path]``, or row ``layer`` of that where layers are stacked."""

    name: str
    path: tuple[str, ...]
    layer: int | None


# transformers' Conv1D stores [in, out] as a Flax kernel does: nothing is transposed.
_GPT2_OUTER = {
    "wte.weight": "wte/embedding",
    "wpe.weight": "wpe/embedding",
    "ln_f.weight": "ln_f/scale",
    "ln_f.bias": "ln_f/bias",
}
_GPT2_BLOCK = {
    "ln_1.weight": "ln_1/scale",
    "ln_1.bias": "ln_1/bias",
    "attn.c_attn.weight": "attn/c_attn/kernel",
    "attn.c_attn.bias": "attn/c_attn/bias",
    "attn.c_proj.weight": "attn/c_proj/kernel",
    "attn.c_proj.bias": "attn/c_proj/bias",
    "ln_2.weight": "ln_2/scale",
    "ln_2.bias": "ln_2/bias",
    "mlp.c_fc.weight": "mlp/c_fc/kernel",
    "mlp.c_fc.bias": "mlp/c_fc/bias",
    "mlp.c_proj.weight": "mlp/c_proj/kernel",
    "mlp.c_proj.bias": "mlp/c_proj/bias",
}

PREFIX = "transformer."  # of the body's tensors in GPT2LMHeadModel; GPT2Model's own files have none
TOKEN_TABLE = "wte.weight"
OUTPUT_TABLE = "lm_head.weight"  # the token table again
SCORE = "score.weight"
CAUSAL_LM = "GPT2LMHeadModel"
CLASSIFIER = "GPT2ForSequenceClassification"

# Causal masks that older versions of transformers stored with the weights.
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def is_buffer(name: str) -> bool:
    """True for tensors, named without prefix, that are constants rather than weights."""
    return _BUFFERS.fullmatch(name) is not None


def tensors(config: GPT2Config) -> list[Tensor]:
    """Every tensor of the body, named without prefix; the layers of one leaf follow each other."""
    found = [Tensor(name, tuple(path.split("/")), None) for name, path in _GPT2_OUTER.items()]
    for name, path in _GPT2_BLOCK.items():
        inner = tuple(path.split("/"))
        for layer in range(config.num_layers):
            if config.scan_layers:
                found.append(Tensor(f"h.{layer}.{name}", ("h", *inner), layer))
            else:
                found.append(Tensor(f"h.{layer}.{name}", (f"h_{layer}", *inner), None))
    return found
