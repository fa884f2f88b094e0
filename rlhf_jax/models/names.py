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


class Family(NamedTuple):
    """How transformers writes one model_type."""

    model_type: str
    defaults: ModelConfig  # transformers' own; it leaves keys at their default out of some files
    keys: Mapping[str, str]  # our field: the key of config.json, where the two differ
    # Of the body's tensors in a causal language model; the files of a bare body have none.
    prefix: str
    # Part of a path in params: transformers' name of it, where the two differ.
    modules: Mapping[str, str]
    transposed: bool  # whether kernels are stored as [out, in]
    causal_lm: str  # class names in config.json's architectures
    classifier: str

    def fields(self) -> list[tuple[str, str]]:
        """Pairs of a field of our config and its key in config.json."""
        names = (field.name for field in dataclasses.fields(self.defaults) if field.init)
        return [(name, self.keys.get(name, name)) for name in names if name not in _OTHER_FIELDS]

    def tensors(self, path: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
        """Names of the tensors of a leaf of the body: one, or one for each stacked layer."""
        top, *inner = [self.modules.get(part, part) for part in path[:-1]]
        tops = [top]
        if path[0].startswith("h"):
            layers = [path[0].removeprefix("h_")]
            if path[0] == "h":
                layers = [str(layer) for layer in range(shape[0])]
            tops = [f"{self.modules.get('h', 'h')}.{layer}" for layer in layers]
        prefix = "" if top == "lm_head" else self.prefix
        kind = "bias" if path[-1] == "bias" else "weight"
        return [prefix + ".".join([top, *inner, kind]) for top in tops]

    def stored(self, path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each of these tensors, given the leaf's. The last axes [3, D] of c_attn are
        one axis of 3 D in the file.
        """
        if path[0] == "h":
            shape = shape[1:]
        if FUSED in path:
            shape = (*shape[:-2], math.prod(shape[-2:]))
        return shape[::-1] if self.transposed and path[-1] == "kernel" else shape


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
# Keys that change logits unless they are empty, have the value given here, or are a family's field.
# reorder_and_upcast_attn is not among them: it asks for the float32 softmax that attention.py
# always computes.
_UNSUPPORTED: dict[str, Any] = {
    **dict.fromkeys(
        ("add_cross_attention", "use_sliding_window", "use_bidirectional_attention"), False
    ),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), None),
    **dict.fromkeys(("per_layer_config", "pruned_heads", "quantization_config"), None),
    **dict.fromkeys(("is_causal", "tie_word_embeddings"), True),
    "pretraining_tp": 1,
}
# Keys that transformers reads for every family, also where it writes others.
_COMMON = {
    "max_length": "max_position_embeddings",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
_DROPOUT: dict[str, Any] = dict.fromkeys(
    ("embedding_dropout", "attention_dropout", "residual_dropout"), 0.1
)
GPT2 = Family(
    model_type="gpt2",
    defaults=GPT2Config(
        50257, 1024, 768, 12, 12, **_DROPOUT, eos_token_id=50256, bos_token_id=50256
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


_MISTRAL: dict[str, Any] = {
    "intermediate_size": 14336,
    "num_kv_heads": 8,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
_RELATIVES = (
    Qwen2Config(151936, 32768, 4096, 32, 32, intermediate_size=22016, num_kv_heads=32),
    Qwen3Config(151936, 32768, 4096, 32, 32, intermediate_size=22016, num_kv_heads=32),
    MistralConfig(32000, 131072, 4096, 32, 32, sliding_window=4096, **_MISTRAL),
)
_GEMMA: dict[str, Any] = {"intermediate_size": 9216, "num_kv_heads": 4, "pad_token_id": 0}
GEMMA3 = _relative(
    Gemma3TextConfig(262208, 131072, 2304, 26, 8, **_GEMMA, eos_token_id=1, bos_token_id=2)
)._replace(
    model_type="gemma3_text",
    keys={**LLAMA.keys, "activation": "hidden_activation"},
    modules={**LLAMA.modules, "ln_2": "pre_feedforward_layernorm"},
    causal_lm="Gemma3ForCausalLM",
)
FAMILIES = {
    family.model_type: family for family in (GPT2, LLAMA, *map(_relative, _RELATIVES), GEMMA3)
}

# Each rope_type's keys in rope_scaling or rope_parameters, in the order of RopeScaling's fields.
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE: dict[str, tuple[str, ...]] = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}


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
    family = FAMILIES[model_type]
    if family is GEMMA3:
        _read_two_kinds(keys, where)
    fields: dict[str, Any] = {}
    for field, name in family.fields():
        default = getattr(family.defaults, field)
        alias = _COMMON.get(field, name)
        if alias != name and alias in keys:
            value = keys.pop(alias)
            own = keys.setdefault(name, value)
            if own != value:
                raise UserError(
                    f"{where}: {alias} is {value!r} but {name} is {own!r}; remove one of the two"
                )
        value = keys.pop(name, default)
        if not _is_kind_of(default, value, name):
            raise UserError(
                f"{where}: {name} is {value!r}, which is not of the kind of its default, "
                f"{default!r}"
            )
        if isinstance(default, float):
            value = float(value)  # JSON's 0 is an int, which JAX treats as an array of integers
        fields[field] = tuple(value) if isinstance(value, list) else value
    for name, supported in _UNSUPPORTED.items():
        if keys.get(name, supported) != supported and (keys[name] or supported):
            raise UserError(
                f"{where}: {name} is {keys[name]!r}, which changes the logits and is not supported"
            )
    try:
        if isinstance(family.defaults, DecoderConfig):
            fields |= _read_rope(keys, fields["max_length"], family.defaults.rope_theta, where)
        config = type(family.defaults)(**fields, other_keys=keys)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    types = keys.get("layer_types")
    if types and types != [_KINDS[is_local] for is_local in config.local_layers]:
        raise UserError(
            f"{where}: layer_types is {types!r}, which changes the logits and is not supported"
        )
    return config


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


_KINDS = ("full_attention", "sliding_attention")  # of layers, by whether they are local


def _read_two_kinds(keys: dict[str, Any], where: str) -> None:
    """Converts transformers 5's keys of Gemma's two kinds of layers to those of transformers 4."""
    full, sliding = _KINDS
    types = keys.get("layer_types")
    if isinstance(types, list):
        keys["sliding_window_pattern"] = [*types, full].index(full) + 1
    rope = keys.get("rope_parameters")
    if isinstance(rope, dict) and full in rope:
        local = rope.get(sliding) or {}
        if not isinstance(local, dict) or local.get("rope_type", "default") != "default":
            raise UserError(
                f"{where}: rope_parameters.{sliding} is {local!r}, which is not supported"
            )
        keys["rope_parameters"] = rope[full] or {}
        keys["rope_local_base_freq"] = local.get("rope_theta", 10000.0)


def _read_rope(
    keys: dict[str, Any],
    max_length: int,
    default: float,
    where: str,
) -> dict[str, Any]:
    """Pops transformers 5's rope_parameters, or 4's rope_theta and rope_scaling, from the keys."""
    theta = keys.pop("rope_theta", None)
    scaling = keys.pop("rope_scaling", None)
    given = keys.pop("rope_parameters", None)
    name = "rope_parameters"
    if given is None:
        name = "rope_scaling"
        given = {} if scaling is None else scaling
    if not isinstance(given, dict):
        raise UserError(f"{where}: {name} is {given!r}, expected an object")
    kind = str(given.get("rope_type", given.get("type", "default")))
    if kind not in _ROPE:
        raise UserError(
            f"{where}: {name}.rope_type is {kind!r}; the supported ones are: {', '.join(_ROPE)}"
        )
    if given.get("partial_rotary_factor", keys.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(
            f"{where}: {name}.partial_rotary_factor changes the logits and is not supported"
        )
    theta = given.get("rope_theta", theta)
    given = {"original_max_position_embeddings": max_length, **given}
    numbers: dict[str, Any] = {"rope_theta": default if theta is None else theta}
    numbers |= {f"{name}.{key}": given.get(key) for key in _ROPE[kind]}
    for key, value in numbers.items():
        if not is_number(value):
            raise UserError(f"{where}: {key} is {value!r}, expected a number")
    theta, *factors = numbers.values()
    rope_scaling = RopeScaling(kind, *factors) if factors else None
    return {"rope_theta": float(theta), "rope_scaling": rope_scaling}


def is_number(value: Any) -> TypeGuard[float]:
    """True for finite numbers that a float can hold, and not for True and False."""
    return (isinstance(value, float) and math.isfinite(value)) or (
        is_int(value) and abs(value) < 1 << 63
    )


def _is_kind_of(default: Any, value: Any, name: str) -> bool:
    """Whether the value of a key is of the kind of its default."""
    if value is None:
        return default is None or name.endswith(("_token_id", "_window"))
    if isinstance(default, bool | str):
        return isinstance(value, type(default))
    if isinstance(default, float):
        return is_number(value)
    if name == "eos_token_id" and isinstance(value, list):  # several ids may end a text
        return all(is_int(token_id) for token_id in value)
    return is_int(value) and is_number(value)
