"""How transformers names things: the keys of config.json and the tensors of the weights, one table
per family.

Import and export read the same tables. Whatever in config.json changes logits is honoured or
refused by name; every other key is kept and written back.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import (
    DecoderConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModelConfig,
    Qwen2Config,
    Qwen3Config,
    RopeScaling,
    is_int,
)

OUTPUT_TABLE = "lm_head.weight"  # the token table again, where the two are tied
SCORE = "score.weight"
FUSED = "c_attn"  # GPT-2's layer of queries, keys and values
LeafPath = tuple[str, ...]  # of a leaf in nested dicts
Shape = tuple[int, ...]


class Family(NamedTuple):
    """How transformers writes one model_type."""

    model_type: str
    defaults: ModelConfig  # of transformers, whose files may leave such keys out
    keys: Mapping[str, str]  # our field: the key of config.json, where the two differ
    # Of the names of the body's tensors in a causal language model. A bare body's have none.
    prefix: str
    # Part of a path in params: transformers' name of it, where the two differ.
    modules: Mapping[str, str]
    transposed: bool  # whether kernels are stored as [out, in]
    causal_lm: str  # class names in config.json's architectures
    classifier: str

    def fields(self) -> list[tuple[str, str]]:
        """Pairs of a field of our config and its key in config.json."""
        names = [field.name for field in dataclasses.fields(self.defaults) if field.init]
        return [(name, self.keys.get(name, name)) for name in names if name not in _OTHER_FIELDS]

    def tensors(self, path: LeafPath, shape: Shape) -> list[str]:
        """Names of the tensors of a leaf of the body: one, or one for each stacked layer."""
        top, *inner = [self.modules.get(part, part) for part in path[:-1]]
        tops = [top]
        if path[0].startswith("h"):
            number = path[0].removeprefix("h_")
            layers = range(shape[0]) if path[0] == "h" else [number]
            tops = [f"{self.modules.get('h', 'h')}.{layer}" for layer in layers]
        prefix = "" if top == "lm_head" else self.prefix
        kind = "bias" if path[-1] == "bias" else "weight"
        return [prefix + ".".join([top, *inner, kind]) for top in tops]

    def is_transposed(self, path: LeafPath) -> bool:
        """Whether the files hold a leaf as [out, in]."""
        return self.transposed and path[-1] == "kernel"

    def stored(self, path: LeafPath, shape: Shape) -> Shape:
        """The shape of each of these tensors, given the leaf's. The last axes [3, D] of c_attn are
        one axis of 3 D in the file.
        """
        if path[0] == "h":
            shape = shape[1:]
        if FUSED in path:
            shape = (*shape[:-2], math.prod(shape[-2:]))
        return shape[::-1] if self.is_transposed(path) else shape


# Fields that config.json does not have, or not as a key of their own.
_OTHER_FIELDS = (
    "compute_dtype",
    "remat",
    "scan_layers",
    "attention",
    "other_keys",
    "rope_theta",
    "rope_scaling",
)
# Keys that change the logits, unless they are empty, have this value or are a field of the family.
# reorder_and_upcast_attn is missing: it asks for the float32 softmax that is always computed.
_UNSUPPORTED = {
    "add_cross_attention": False,
    "use_sliding_window": False,
    "use_bidirectional_attention": False,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "per_layer_config": None,
    "pruned_heads": None,
    "quantization_config": None,
    "is_causal": True,
    "tie_word_embeddings": True,
    "pretraining_tp": 1,
}
# Names that transformers accepts for every family, even where it writes others.
_COMMON = {
    "max_length": "max_position_embeddings",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
GPT2 = Family(
    model_type="gpt2",
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
    defaults=LlamaConfig(
        32000, 2048, 4096, 32, 32, intermediate_size=11008, eos_token_id=2, bos_token_id=1
    ),
    keys={
        **_COMMON,
        "num_kv_heads": "num_key_value_heads",
        "activation": "hidden_act",
        "rms_norm_epsilon": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "local_rope_theta": "rope_local_base_freq",
        "query_scalar": "query_pre_attn_scalar",
        "global_every": "sliding_window_pattern",
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
    },
    transposed=True,
    causal_lm="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
)


# The mesh axes over which the last axes of an array are cut (``sharding.by_path``), for each
# family's parameters and for arrays with their paths, such as Adam's moments. Kernels that write to
# the residual stream are cut along the other axis than those that read from it, so that a block
# sends over ``tensor`` twice (Shoeybi et al. 2019).
SHARDING: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"c_attn/kernel$", ("fsdp", None, "tensor")),
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj|c_fc)/kernel$", ("fsdp", "tensor")),
    (r"(o_proj|down_proj|c_proj)/kernel$", ("tensor", "fsdp")),
    (r"((wte|lm_head)/embedding|unembedding)$", ("tensor", "fsdp")),
    (r"(o_proj|down_proj|c_proj)/lora_a$", ("tensor", None)),  # an adapter is cut as its kernel is
    (r"(o_proj|down_proj|c_proj)/lora_b$", (None, "fsdp")),
    (r"lora_a$", ("fsdp", None)),
    (r"lora_b$", (None, "tensor")),
    (r"", ()),
)


def _relative(defaults: DecoderConfig) -> Family:
    """A family whose files have Llama's names, under the family's own name."""
    name = type(defaults).__name__.removesuffix("Config")
    return LLAMA._replace(
        model_type=name.lower(),
        defaults=defaults,
        causal_lm=f"{name}ForCausalLM",
        classifier=f"{name}ForSequenceClassification",
    )


QWEN2 = _relative(
    Qwen2Config(151936, 32768, 4096, 32, 32, intermediate_size=22016, num_kv_heads=32)
)
QWEN3 = _relative(
    Qwen3Config(151936, 32768, 4096, 32, 32, intermediate_size=22016, num_kv_heads=32)
)
MISTRAL = _relative(
    MistralConfig(
        32000,
        131072,
        4096,
        32,
        32,
        intermediate_size=14336,
        num_kv_heads=8,
        sliding_window=4096,
        eos_token_id=2,
        bos_token_id=1,
    )
)
GEMMA3 = _relative(
    Gemma3TextConfig(
        262208,
        131072,
        2304,
        26,
        8,
        intermediate_size=9216,
        num_kv_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
)._replace(
    model_type="gemma3_text",
    keys={**LLAMA.keys, "activation": "hidden_activation"},
    modules={**LLAMA.modules, "ln_2": "pre_feedforward_layernorm"},
    causal_lm="Gemma3ForCausalLM",
)
FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, QWEN2, QWEN3, MISTRAL, GEMMA3)}

# Each rope_type's keys in rope_scaling or rope_parameters, in the order of RopeScaling's fields.
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE = {"default": _LLAMA3[:0], "linear": _LLAMA3[:1], "llama3": _LLAMA3}
_KINDS = ("full_attention", "sliding_attention")  # of layers, by whether they are local


def family_of(config: ModelConfig) -> Family:
    """The family of a configuration."""
    return next(family for family in FAMILIES.values() if type(family.defaults) is type(config))


def from_json(keys: Mapping[str, Any], where: str) -> ModelConfig:
    """Reads the keys of a config.json as transformers' classes do, missing ones at their defaults.

    Args:
        keys: the file's content.
        where: the file's name, for error messages.

    Raises:
        UserError: for an unknown ``model_type``, for a key that changes logits and is not
            supported, for a bad value.
    """
    keys = dict(keys)
    model_type = str(keys.pop("model_type", None))
    if model_type not in FAMILIES:
        raise UserError(
            f"{where}: model_type is {model_type!r}; the supported ones are: {', '.join(FAMILIES)}"
        )
    try:
        return _read_keys(FAMILIES[model_type], keys)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _read_keys(family: Family, keys: dict[str, Any]) -> ModelConfig:
    """The config of the keys of a config.json; ValueError if a key does not fit."""
    defaults = family.defaults
    if isinstance(defaults, Gemma3TextConfig):
        _read_two_kinds(keys)
    fields: dict[str, Any] = {
        field: _pop(keys, name, _COMMON.get(field, name), getattr(defaults, field))
        for field, name in family.fields()
    }
    if isinstance(defaults, DecoderConfig):
        fields |= _read_rope(keys, fields["max_length"], defaults.rope_theta)
    config = type(defaults)(**fields, other_keys=keys)

    expected: dict[str, Any] = dict(_UNSUPPORTED)
    if keys.get("layer_types"):
        expected["layer_types"] = [_KINDS[is_local] for is_local in config.local_layers]
    for name, supported in expected.items():
        value = keys.get(name, supported)
        if value != supported and (value or supported):
            raise ValueError(f"{name} is {value!r}, which changes the logits and is not supported")
    return config


def _pop(keys: dict[str, Any], name: str, alias: str, default: Any) -> Any:
    """Takes the value of a key, which may have the name ``alias``, and checks its kind."""
    if alias in keys and keys.get(name, keys[alias]) != keys[alias]:
        raise ValueError(
            f"{alias} is {keys[alias]!r} but {name} is {keys[name]!r}; remove one of the two"
        )
    value = keys.pop(alias, default)
    value = keys.pop(name, value)
    if not _is_kind_of(default, value, name):
        raise ValueError(
            f"{name} is {value!r}, which is not of the kind of its default, {default!r}"
        )
    if isinstance(default, float):
        return float(value)  # JSON's 0 is an int, which JAX treats as an array of integers
    return tuple(value) if isinstance(value, list) else value


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json: the keys that ``from_json`` reads, and the other keys, which it has
    kept.
    """
    family = family_of(config)
    keys = {name: getattr(config, field) for field, name in family.fields()}
    if isinstance(config, DecoderConfig):  # in the form of transformers 4, which 5 reads too
        keys |= {"rope_theta": config.rope_theta, "rope_scaling": None}
        if config.rope_scaling is not None:
            kind, *numbers = dataclasses.astuple(config.rope_scaling)
            factors = dict(zip(_ROPE[kind], numbers, strict=False))
            keys["rope_scaling"] = {"rope_type": kind, **factors}
    return {**config.other_keys, **keys, "model_type": family.model_type}


def _read_two_kinds(keys: dict[str, Any]) -> None:
    """Converts transformers 5's keys of Gemma's two kinds of layers to those of transformers 4."""
    full, sliding = _KINDS
    types = keys.get("layer_types")
    if isinstance(types, list):
        keys["sliding_window_pattern"] = [*types, full].index(full) + 1
    rope = keys.get("rope_parameters")
    if isinstance(rope, dict) and full in rope:
        local = rope.get(sliding) or {}
        if not isinstance(local, dict) or local.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters.{sliding} is {local!r}, which is not supported")
        keys["rope_parameters"] = rope[full]
        keys["rope_local_base_freq"] = local.get("rope_theta", 10000.0)


def _read_rope(keys: dict[str, Any], max_length: int, default: float) -> dict[str, Any]:
    """Takes transformers 5's rope_parameters, or 4's rope_theta and rope_scaling, from the keys."""
    theta = keys.pop("rope_theta", None)
    scaling = keys.pop("rope_scaling", None)
    given = keys.pop("rope_parameters", None) or scaling or {}
    if not isinstance(given, dict):
        raise ValueError(f"rope_parameters or rope_scaling is {given!r}, expected an object")
    rope = {
        "rope_theta": default if theta is None else theta,
        "original_max_position_embeddings": max_length,
        "partial_rotary_factor": keys.get("partial_rotary_factor", 1.0),
        **given,
    }
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    if kind not in _ROPE:
        raise ValueError(f"rope_type is {kind!r}; the supported ones are: {', '.join(_ROPE)}")
    if rope["partial_rotary_factor"] != 1.0:
        raise ValueError("partial_rotary_factor changes the logits and is not supported")
    for key in ("rope_theta", *_ROPE[kind]):
        if not is_number(rope.get(key)):
            raise ValueError(f"{key} is {rope.get(key)!r}, expected a number")
    factors = [rope[key] for key in _ROPE[kind]]
    return {
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": RopeScaling(kind, *factors) if factors else None,
    }


def is_number(value: Any) -> TypeGuard[float]:
    """True for finite numbers that a float can hold, and not for True and False."""
    if isinstance(value, float):
        return math.isfinite(value)
    return is_int(value) and abs(value) < 1 << 63


def _is_kind_of(default: Any, value: Any, name: str) -> bool:
    """Whether the value of a key is of the kind of its default."""
    if value is None:
        return default is None or name.endswith(("_token_id", "_window"))
    if isinstance(default, bool | str):
        return isinstance(value, type(default))
    if isinstance(default, float):
        return is_number(value)
    if name == "eos_token_id" and isinstance(value, list):  # several ids may end a text
        return all(map(is_int, value))
    return is_int(value) and is_number(value)
