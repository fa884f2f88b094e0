"""Names of the tensors in Hugging Face folders, one table per family, read by import and export both."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from rlhf_jax.models.config import GPT2Config, ModelConfig


class Tensor(NamedTuple):
    """A tensor of a file and its place: ``params[path]``, or row ``layer`` of that where layers are stacked."""

    name: str
    path: tuple[str, ...]
    layer: int | None
    transposed: bool


class Family(NamedTuple):
    """How transformers names one model_type; tensors of the body are named without prefix."""

    prefix: str  # of the body's tensors in the causal language model; the bare model's own files have none
    token_table: str
    outer: Mapping[str, str]  # tensor -> path in params
    layer: str  # with {layer}, before the names of block
    block: Mapping[str, str]
    transposed: bool  # whether kernels are stored as [out, in]
    causal_lm: str  # class names in config.json's architectures
    classifier: str


GPT2 = Family(
    prefix="transformer.",
    token_table="wte.weight",
    outer={
        "wte.weight": "wte/embedding",
        "wpe.weight": "wpe/embedding",
        "ln_f.weight": "ln_f/scale",
        "ln_f.bias": "ln_f/bias",
    },
    layer="h.{layer}.",
    block={
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
    },
    transposed=False,  # transformers' Conv1D stores [in, out] as a Flax kernel does
    causal_lm="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
)
_PROJECTIONS = {
    **{f"self_attn.{name}_proj": f"attn/{name}_proj" for name in "qkvo"},
    **{f"mlp.{name}_proj": f"mlp/{name}_proj" for name in ("gate", "up", "down")},
}
LLAMA = Family(
    prefix="model.",
    token_table="embed_tokens.weight",
    outer={"embed_tokens.weight": "wte/embedding", "norm.weight": "ln_f/scale"},
    layer="layers.{layer}.",
    block={
        "input_layernorm.weight": "ln_1/scale",
        "post_attention_layernorm.weight": "ln_2/scale",
        **{f"{name}.weight": f"{path}/kernel" for name, path in _PROJECTIONS.items()},
        **{f"{name}.bias": f"{path}/bias" for name, path in _PROJECTIONS.items()},
    },
    transposed=True,
    causal_lm="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
)

OUTPUT_TABLE = "lm_head.weight"  # the token table again, where the two are tied
SCORE = "score.weight"

# Causal masks and frequencies that older versions of transformers stored with the weights.
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def family(config: ModelConfig) -> Family:
    """The family of a configuration."""
    return GPT2 if isinstance(config, GPT2Config) else LLAMA


def is_buffer(name: str) -> bool:
    """True for tensors, named without prefix, that are constants rather than weights."""
    return _BUFFERS.fullmatch(name) is not None


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of the body, named without prefix; the layers of one leaf follow each other.

    The output table of a model that does not tie it is none of the body's.
    """
    names = family(config)
    found = [Tensor(name, tuple(path.split("/")), None, False) for name, path in names.outer.items()]
    for name, path in names.block.items():
        if path.endswith("/bias") and not _has_bias(config, path):
            continue
        inner = tuple(path.split("/"))
        transposed = names.transposed and inner[-1] == "kernel"
        for layer in range(config.num_layers):
            stored = names.layer.format(layer=layer) + name
            if config.scan_layers:
                found.append(Tensor(stored, ("h", *inner), layer, transposed))
            else:
                found.append(Tensor(stored, (f"h_{layer}", *inner), None, transposed))
    return found


def _has_bias(config: ModelConfig, path: str) -> bool:
    if isinstance(config, GPT2Config):
        return True
    return config.attention_bias if path.startswith("attn/") else config.mlp_bias
