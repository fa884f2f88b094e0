"""The table of model families: for each model_type its config with transformers' defaults, the keys
of its config.json, and the names of its tensors.

Whatever a family is beside these lies in its config's attributes (config.py); no other file asks
which family a model is of.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from rlhf_jax.models.config import (
    DecoderConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    ModelConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RopeScaling,
    SmolLM3Config,
)

SCORE = "score.weight"
FUSED = "c_attn"  # GPT-2's layer of queries, keys and values
LeafPath = tuple[str, ...]  # of a leaf in nested dicts
Shape = tuple[int, ...]
# How transformers ends the name of a leaf's tensor.
_ENDINGS = {"kernel": ".weight", "scale": ".weight", "embedding": ".weight", "bias": ".bias"}


class Family(NamedTuple):
    """How transformers writes one model_type."""

    model_type: str
    title: str  # for people
    covers: str  # released models, for people
    defaults: ModelConfig  # of transformers, whose files may leave such keys out
    keys: Mapping[str, str]  # our field: the key of config.json, where the two differ
    # Of the names of the body's tensors in a causal language model. A bare body's have none.
    prefix: str
    # Part of a path in params: transformers' name of it, where the two differ.
    modules: Mapping[str, str]
    transposed: bool  # whether kernels are stored as [out, in]
    causal_lm: str  # class names in config.json's architectures
    classifier: str
    output_table: str = "lm_head.weight"  # the token table again, where the two are tied
    # Whether config.json lists the kind of each layer, and a rope for each kind that has its own.
    lists_layers: bool = False
    # Whether each expert has tensors of its own; else one tensor [E, in, out] holds those of all.
    experts_apart: bool = True

    def fields(self) -> list[tuple[str, str]]:
        """Pairs of a field of our config and its key in config.json."""
        names = [field.name for field in dataclasses.fields(self.defaults) if field.init]
        return [(name, self.keys.get(name, name)) for name in names if name not in OTHER_FIELDS]

    def separate(self, path: LeafPath, shape: Shape) -> Shape:
        """The leading axes of a leaf whose entries are tensors of their own: stacked layers, and
        experts.
        """
        layers = shape[:1] if path[0] == "h" else ()
        is_apart = "experts" in path and self.experts_apart
        return shape[: len(layers) + is_apart]

    def tensors(self, path: LeafPath, shape: Shape) -> list[str]:
        """Names of the tensors of a leaf of the body: one, or one for each entry of its
        ``separate`` axes, in order.
        """
        *parts, leaf = path
        parts = [self.modules.get(part, part) for part in parts]
        if path[0].startswith("h"):
            number = path[0].removeprefix("h_") if path[0] != "h" else "{}"
            parts[0] = f"{self.modules.get('h', 'h')}.{number}"
        ending = _ENDINGS.get(leaf, f".{leaf}")
        if "experts" in path and self.experts_apart:
            parts[path.index("experts")] += ".{}"
        elif "experts" in path:
            ending = {"kernel": "", "bias": "_bias"}[leaf]
        name = ".".join(parts) + ending
        if path[0] == "lm_head":
            name = self.output_table
        else:
            name = self.prefix + name
        return [name.format(*index) for index in np.ndindex(*self.separate(path, shape))]

    def is_transposed(self, path: LeafPath) -> bool:
        """Whether the files hold a leaf as [out, in]."""
        is_joint = "experts" in path and not self.experts_apart
        return self.transposed and path[-1] == "kernel" and not is_joint

    def stored(self, path: LeafPath, shape: Shape) -> Shape:
        """The shape of each of these tensors, given the leaf's. The last axes [3, D] of c_attn are
        one axis of 3 D in the file.
        """
        shape = shape[len(self.separate(path, shape)) :]
        if FUSED in path:
            shape = (*shape[:-2], math.prod(shape[-2:]))
        return shape[::-1] if self.is_transposed(path) else shape


# Fields that config.json does not have, or not as a key of their own.
OTHER_FIELDS = (
    "compute_dtype",
    "remat",
    "scan_layers",
    "attention",
    "other_keys",
    "rope_theta",
    "rope_scaling",
    "rotary_fraction",
)
# Names that transformers accepts for every family, even where it writes others.
COMMON = {
    "max_length": "max_position_embeddings",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_experts": "num_local_experts",
}
GPT2 = Family(
    model_type="gpt2",
    title="GPT-2",
    covers="GPT-2, DistilGPT-2 and networks of `network` from random weights",
    defaults=GPT2Config(
        50257,
        1024,
        768,
        12,
        12,
        embedding_dropout=0.1,
        attention_dropout=0.1,
        residual_dropout=0.1,
        eos_token_id=50256,
        bos_token_id=50256,
    ),
    keys={
        "max_length": "n_positions",
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "intermediate_size": "n_inner",
        "activation": "activation_function",
        "embedding_dropout": "embd_pdrop",
        "attention_dropout": "attn_pdrop",
        "residual_dropout": "resid_pdrop",
    },
    prefix="transformer.",
    modules={},
    transposed=False,  # transformers' Conv1D stores [in, out] as a Flax kernel does
    causal_lm="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
)
LLAMA = Family(
    model_type="llama",
    title="Llama",
    covers="Llama 2 and 3, TinyLlama, SmolLM and SmolLM2",
    defaults=LlamaConfig(
        32000, 2048, 4096, 32, 32, intermediate_size=11008, eos_token_id=2, bos_token_id=1
    ),
    keys={
        **{name: key for name, key in COMMON.items() if name != "num_experts"},
        "num_kv_heads": "num_key_value_heads",
        "activation": "hidden_act",
        "rms_norm_epsilon": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "local_rope_theta": "rope_local_base_freq",
        "query_scalar": "query_pre_attn_scalar",
        "global_every": "sliding_window_pattern",
        "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
        "logits_divisor": "logits_scaling",
        "experts_per_token": "num_experts_per_tok",
        "expert_size": "moe_intermediate_size",
        "normalize_experts": "norm_topk_prob",
        "sparse_every": "decoder_sparse_step",
        "dense_layers": "mlp_only_layers",
        "gate_limit": "swiglu_limit",
    },
    prefix="model.",
    modules={
        "wte": "embed_tokens",
        "h": "layers",
        "ln_1": "input_layernorm",
        "ln_1_post": "post_attention_layernorm",
        "attn": "self_attn",
        "ln_2": "post_attention_layernorm",
        "ln_2_post": "post_feedforward_layernorm",
        "ln_f": "norm",
        "router": "gate",
    },
    transposed=True,
    causal_lm="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
)


def _relative(
    defaults: DecoderConfig,
    title: str,
    covers: str,
    keys: Mapping[str, str] | None = None,
    modules: Mapping[str, str] | None = None,
    **changes: Any,
) -> Family:
    """A family whose files have Llama's names, except those given, under the family's own name."""
    name = type(defaults).__name__.removesuffix("Config")
    family = LLAMA._replace(
        model_type=name.lower(),
        title=title,
        covers=covers,
        defaults=defaults,
        keys={**LLAMA.keys, **(keys or {})},
        modules={**LLAMA.modules, **(modules or {})},
        causal_lm=f"{name}ForCausalLM",
        classifier=f"{name}ForSequenceClassification",
    )
    return family._replace(**changes)


_OLMO: dict[str, Any] = {"pad_token_id": 1, "eos_token_id": 50279}
_LLAMA_IDS: dict[str, Any] = {"eos_token_id": 2, "bos_token_id": 1}
_GEMMA_IDS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_GEMMA_KEYS = {"activation": "hidden_activation"}
_GEMMA_MODULES = {"ln_2": "pre_feedforward_layernorm"}
GPT_NEOX = _relative(
    GPTNeoXConfig(
        50432, 2048, 6144, 44, 64, intermediate_size=24576, eos_token_id=2, bos_token_id=0
    ),
    "GPT-NeoX",
    "Pythia and GPT-NeoX-20B",
    {
        "parallel_residual": "use_parallel_residual",
        "rms_norm_epsilon": "layer_norm_eps",
        "rope_theta": "rotary_emb_base",
        "rotary_fraction": "rotary_pct",
    },
    {
        "wte": "embed_in",
        "ln_f": "final_layer_norm",
        "attn": "attention",
        "qkv_proj": "query_key_value",
        "o_proj": "dense",
        "up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
    },
    model_type="gpt_neox",
    prefix="gpt_neox.",
    output_table="embed_out.weight",
)
_TABLE = (
    GPT2,
    LLAMA,
    _relative(
        Qwen2Config(151936, 32768, 4096, 32, 32, intermediate_size=22016, num_kv_heads=32),
        "Qwen2",
        "Qwen2 and Qwen2.5",
    ),
    _relative(
        Qwen3Config(151936, 32768, 4096, 32, 32, intermediate_size=22016, num_kv_heads=32),
        "Qwen3",
        "the dense models",
    ),
    _relative(
        MistralConfig(
            32000,
            131072,
            4096,
            32,
            32,
            intermediate_size=14336,
            num_kv_heads=8,
            sliding_window=4096,
            **_LLAMA_IDS,
        ),
        "Mistral",
        "7B 0.1 (window of 4096 tokens) to 0.3 (none)",
    ),
    _relative(
        Gemma3TextConfig(
            262208, 131072, 2304, 26, 8, intermediate_size=9216, num_kv_heads=4, **_GEMMA_IDS
        ),
        "Gemma 3",
        "the text models",
        _GEMMA_KEYS,
        _GEMMA_MODULES,
        model_type="gemma3_text",
        causal_lm="Gemma3ForCausalLM",
    ),
    GPT_NEOX,
    _relative(
        Olmo2Config(50304, 2048, 4096, 32, 32, intermediate_size=11008, **_OLMO),
        "OLMo 2",
        "1B to 32B",
    ),
    _relative(
        Olmo3Config(50304, 2048, 4096, 32, 32, intermediate_size=11008, **_OLMO),
        "OLMo 3",
        "7B and 32B",
        lists_layers=True,
    ),
    _relative(
        SmolLM3Config(
            128256,
            32768,
            2048,
            36,
            16,
            intermediate_size=11008,
            num_kv_heads=4,
            pad_token_id=128004,
            eos_token_id=128001,
            bos_token_id=128000,
        ),
        "SmolLM3",
        "SmolLM3-3B",
        {"global_every": "no_rope_layer_interval"},
    ),
    _relative(
        Phi3Config(
            32064,
            4096,
            3072,
            32,
            32,
            intermediate_size=8192,
            pad_token_id=32000,
            eos_token_id=32000,
            bos_token_id=1,
        ),
        "Phi-3",
        "Phi-3 and Phi-3.5 mini and medium, Phi-4 and Phi-4-mini",
    ),
    _relative(
        Gemma2Config(
            256000, 8192, 2304, 26, 8, intermediate_size=9216, num_kv_heads=4, **_GEMMA_IDS
        ),
        "Gemma 2",
        "2B to 27B",
        _GEMMA_KEYS,
        _GEMMA_MODULES,
        lists_layers=True,
    ),
    _relative(
        GraniteConfig(32000, 2048, 4096, 32, 32, intermediate_size=11008, **_LLAMA_IDS),
        "Granite",
        "the dense models of Granite 3",
    ),
    _relative(
        Ministral3Config(
            131072,
            262144,
            4096,
            34,
            32,
            intermediate_size=14336,
            num_kv_heads=8,
            rope_scaling=RopeScaling(
                "yarn",
                16.0,
                original_max_length=16384,
                mscale=1.0,
                mscale_all_dim=1.0,
                query_beta=0.1,
            ),
            pad_token_id=11,
            **_LLAMA_IDS,
        ),
        "Ministral 3",
        "the text models",
    ),
    _relative(
        Qwen3MoeConfig(151936, 32768, 2048, 24, 32, intermediate_size=6144, num_kv_heads=4),
        "Qwen3-MoE",
        "30B-A3B and 235B-A22B",
        model_type="qwen3_moe",
    ),
    _relative(
        MixtralConfig(
            32000, 131072, 4096, 32, 32, intermediate_size=14336, num_kv_heads=8, **_LLAMA_IDS
        ),
        "Mixtral",
        "8x7B and 8x22B",
        {"num_experts": "num_local_experts"},
        {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    ),
    _relative(
        OlmoeConfig(50304, 4096, 2048, 16, 16, intermediate_size=2048, **_OLMO),
        "OLMoE",
        "1B-7B",
    ),
    _relative(
        GptOssConfig(
            201088,
            131072,
            2880,
            36,
            64,
            intermediate_size=2880,
            num_kv_heads=8,
            rope_scaling=RopeScaling("yarn", 32.0, original_max_length=4096, truncate=False),
        ),
        "gpt-oss",
        "20B and 120B in bfloat16; their MXFP4 files are refused",
        {"num_experts": "num_local_experts"},
        {"router": "router"},
        model_type="gpt_oss",
        lists_layers=True,
        experts_apart=False,
    ),
)
FAMILIES = {family.model_type: family for family in _TABLE}

# {model_type: what its config.json says that no setting here can}, of families that do not load.
UNMET = {
    "gemma4_text": "global_head_dim and per_layer_config (heads of two sizes), "
    "num_kv_shared_layers and attention_k_eq_v (shared keys and values), "
    "hidden_size_per_layer_input (inputs of the layers' own), use_double_wide_mlp, "
    "enable_moe_block and rope_type proportional"
}


def family_of(config: ModelConfig) -> Family:
    """The family of a configuration."""
    return next(family for family in _TABLE if type(family.defaults) is type(config))


def family_with(params: Mapping[str, Any]) -> Family:
    """A family whose names of kernels are those of the model with these parameters: most families
    share Llama's.
    """
    if "wpe" in params:
        return GPT2
    if "bias" in params["ln_f"]:
        return GPT_NEOX
    modules = {part for path in flatten_dict(dict(params)) for part in path}
    has_own_names = "experts" in modules and "q_norm" not in modules
    return FAMILIES["mixtral"] if has_own_names else LLAMA


def takes_adapters(path: LeafPath) -> bool:
    """Whether LoRA may change a kernel: that of a router stays as it is."""
    return "router" not in path


def differences(family: Family) -> list[str]:
    """What sets a family apart from Llama, in words, by the attributes of its config."""
    config = family.defaults
    if not isinstance(config, DecoderConfig):
        return ["a table of positions, layer norms, one layer for queries, keys and values"]
    scaling = config.rope_scaling
    every = config.global_every
    said = {
        "layer norms": config.layer_norm,
        "norms behind attention and MLP alone": not config.pre_norms,
        "norms before and behind attention and MLP": config.pre_norms and config.post_norms,
        "attention and MLP side by side or in turn": "parallel_residual" in vars(config),
        "biases of queries, keys and values": config.qkv_bias,
        "normed queries and keys in each head": config.qk_norm == "head",
        "normed queries and keys, all heads at once": config.qk_norm == "width",
        "one layer for queries, keys and values": config.qkv != "apart",
        "an MLP without gates": not config.gated,
        "a part of each head is turned": "rotary_fraction" in vars(config),
        f"one layer in {every} without positions": not config.global_rope,
        "a window": bool(config.sliding_window) and every is None,
        f"a window except in one layer of {every}": bool(config.sliding_window and every),
        "a rope for layers with a window": config.local_rope_theta is not None,
        f"{scaling and scaling.kind} positions": scaling is not None,
        "queries that grow with their position": scaling is not None and bool(scaling.query_beta),
        "multipliers": "residual_multiplier" in vars(config),
        "soft caps of scores and logits": config.attention_softcap is not None,
        "sinks": config.sinks,
        f"{config.experts_per_token} of {config.num_experts} experts": bool(config.num_experts),
        "gates with a limit, biases of experts": config.gate_limit is not None,
    }
    return [words for words, is_said in said.items() if is_said]
