"""The keys of config.json, by the table of families.

Import and export read the same table. Whatever in config.json changes logits is honoured or refused
by name; every other key is kept and written back.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import GATE_GAIN, DecoderConfig, ModelConfig, RopeScaling, is_int
from rlhf_jax.models.families import COMMON, FAMILIES, UNMET, Family, family_of

# The mesh axes over which the last axes of an array are cut (``sharding.by_path``), for each
# family's parameters and for arrays with their paths, such as Adam's moments. Kernels that write to
# the residual stream are cut along the other axis than those that read from it, so that a block
# sends over ``tensor`` twice (Shoeybi et al. 2019).
SHARDING: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"c_attn/(kernel|block_scale)$", ("fsdp", None, "tensor")),
    (r"(q_proj|k_proj|v_proj|qkv_proj|c_fc)/(kernel|block_scale)$", ("fsdp", "tensor")),
    (r"(gate_proj|up_proj|gate_up_proj)/(kernel|block_scale)$", ("fsdp", "tensor")),
    (r"router/kernel$", ("fsdp", None)),
    (r"(o_proj|down_proj|c_proj)/(kernel|block_scale)$", ("tensor", "fsdp")),
    (r"((wte|lm_head)/embedding|unembedding)$", ("tensor", "fsdp")),
    (r"(o_proj|down_proj|c_proj)/lora_a$", ("tensor", None)),  # an adapter is cut as its kernel is
    (r"(o_proj|down_proj|c_proj)/lora_b$", (None, "fsdp")),
    (r"lora_a$", ("fsdp", None)),
    (r"lora_b$", (None, "tensor")),
    (r"", ()),
)

# Keys that change the logits, in training or always, unless they are empty, have this value or are
# a field of the family. reorder_and_upcast_attn is missing: it asks for the float32 softmax that is
# always computed.
_UNSUPPORTED = {
    "add_cross_attention": False,
    "use_sliding_window": False,
    "use_bidirectional_attention": False,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "clip_qkv": None,
    "per_layer_config": None,
    "pruned_heads": None,
    "quantization_config": None,
    "is_causal": True,
    "tie_word_embeddings": True,
    "pretraining_tp": 1,
    "swiglu_alpha": GATE_GAIN,
    "hidden_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "router_jitter_noise": 0.0,
}
_KINDS = ("full_attention", "sliding_attention")  # of layers, by whether they are local


class _Rope(NamedTuple):
    """The keys of a rope_type in config.json, with the fields of ``RopeScaling``."""

    needed: Mapping[str, str]
    optional: Mapping[str, str] = {}


_FACTOR = {"factor": "factor"}
_LENGTH = {"original_max_position_embeddings": "original_max_length"}
_SAME = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
_ROPES = {
    "default": _Rope({}),
    "linear": _Rope(_FACTOR),
    "dynamic": _Rope(_FACTOR),
    "llama3": _Rope(
        {
            **_FACTOR,
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            **_LENGTH,
        }
    ),
    "yarn": _Rope(
        {**_FACTOR, **_LENGTH},
        {**{key: key for key in _SAME}, "llama_4_scaling_beta": "query_beta"},
    ),
    "longrope": _Rope(
        {**_FACTOR, **_LENGTH, "short_factor": "short_factor", "long_factor": "long_factor"},
        {"attention_factor": "attention_factor"},
    ),
}
# Endings of keys whose null means "none" though their default is a value.
_MAY_BE_NULL = ("_token_id", "_window", "_softcapping", "mlp_only_layers")
_OLD_ROPES = {"su": "longrope"}


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
    if model_type in UNMET:
        raise UserError(
            f"{where}: models of model_type {model_type} need settings that are not supported: "
            f"{UNMET[model_type]}"
        )
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
    if defaults.global_every is not None and defaults.sliding_window is not None:
        _read_two_kinds(keys, defaults)
    fields: dict[str, Any] = {
        field: _pop(keys, name, COMMON.get(field, name), getattr(defaults, field))
        for field, name in family.fields()
    }
    if isinstance(defaults, DecoderConfig):
        fields |= _read_rope(keys, fields["max_length"], family)
    config = type(defaults)(**fields, other_keys=keys)

    expected: dict[str, Any] = dict(_UNSUPPORTED)
    if keys.get("layer_types"):
        expected["layer_types"] = _layer_types(config)
    if isinstance(config, DecoderConfig):
        expected["head_dim"] = config.head_size
        if not config.global_rope:
            expected["no_rope_layers"] = [int(is_local) for is_local in config.local_layers]
    for name, supported in expected.items():
        value = keys.get(name, supported)
        if value != supported and (value or supported) and value is not None:
            raise ValueError(f"{name} is {value!r}, which changes the logits and is not supported")
    return config


def _layer_types(config: ModelConfig) -> list[str]:
    """transformers' names of the layers' kinds."""
    has_windows = config.sliding_window is not None
    return [_KINDS[is_local and has_windows] for is_local in config.local_layers]


def _pop(keys: dict[str, Any], name: str, alias: str, default: Any) -> Any:
    """Takes the value of a key, which may have the name ``alias``, and checks its kind."""
    if name != alias and alias in keys and keys.get(name, keys[alias]) != keys[alias]:
        raise ValueError(
            f"{alias} is {keys[alias]!r} but {name} is {keys[name]!r}; remove one of the two"
        )
    value = keys.pop(alias, default)
    value = keys.pop(name, value)
    if not _is_kind_of(default, value, name):
        raise ValueError(
            f"{name} is {value!r}, which is not of the kind of its default, {default!r}"
        )
    if value is None and isinstance(default, tuple):
        return default
    if isinstance(default, float) and value is not None:
        return float(value)  # JSON's 0 is an int, which JAX treats as an array of integers
    return tuple(value) if isinstance(value, list) else value


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json: the keys that ``from_json`` reads, and the other keys, which it has
    kept.
    """
    family = family_of(config)
    keys = {name: getattr(config, field) for field, name in family.fields()}
    if isinstance(config, DecoderConfig):
        keys |= _rope_keys(config, family)
        if keys.get("head_dim", 0) is None and getattr(family.defaults, "head_dim", None) is None:
            keys.pop("head_dim")  # some of transformers' classes do not read null as "not given"
    if family.lists_layers:
        keys.pop("sliding_window_pattern")
        keys["layer_types"] = _layer_types(config)
    return {**config.other_keys, **keys, "model_type": family.model_type}


def _rope_keys(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The keys of rotary positions in the form of transformers 4, which 5 reads too."""
    theta = family.keys.get("rope_theta", "rope_theta")
    keys: dict[str, Any] = {theta: config.rope_theta, "rope_scaling": None}
    if "rotary_fraction" in vars(config):
        fraction = family.keys.get("rotary_fraction", "partial_rotary_factor")
        keys[fraction] = config.rotary_fraction
    scaling = config.rope_scaling
    if scaling is not None:
        rope = _ROPES[scaling.kind]
        written: dict[str, Any] = {"rope_type": scaling.kind}
        for key, field in {**rope.needed, **rope.optional}.items():
            value = getattr(scaling, field)
            if value is not None:
                written[key] = list(value) if isinstance(value, tuple) else value
        keys["rope_scaling"] = written
        if scaling.kind == "longrope":
            keys["original_max_position_embeddings"] = scaling.original_max_length
            if scaling.factor > 1:
                keys["max_position_embeddings"] = scaling.longest
    elif getattr(family.defaults, "rope_scaling", None) is not None:
        keys["rope_scaling"] = {"rope_type": "default"}
    if family.lists_layers and config.local_rope_theta is not None:
        full, local = _KINDS
        whole = keys["rope_scaling"] or {"rope_type": "default"}
        keys["rope_parameters"] = {
            full: {**whole, "rope_theta": config.rope_theta},
            local: {"rope_type": "default", "rope_theta": config.local_rope_theta},
        }
        keys.pop("rope_local_base_freq", None)
    return keys


def _read_two_kinds(keys: dict[str, Any], defaults: ModelConfig) -> None:
    """Converts transformers 5's keys of two kinds of layers to those of transformers 4."""
    full, sliding = _KINDS
    types = keys.get("layer_types")
    if isinstance(types, list):
        keys["sliding_window_pattern"] = [*types, full].index(full) + 1
    local_theta = getattr(defaults, "local_rope_theta", None)
    if local_theta is None:
        return
    ropes = keys.pop("rope_parameters", None) or {}
    if not isinstance(ropes, dict) or (ropes and not ropes.keys() & set(_KINDS)):
        raise ValueError(f"rope_parameters is {ropes!r}, expected objects for {full} and {sliding}")
    whole = _rope_object(f"rope_parameters.{full}", ropes.get(full))
    local = _rope_object(f"rope_parameters.{sliding}", ropes.get(sliding))
    scaling = _rope_object("rope_scaling", keys.get("rope_scaling"))
    if _rope_type(local) != "default":
        raise ValueError(f"rope_parameters.{sliding} is {local!r}, which is not supported")
    keys["rope_scaling"] = {**(whole or {"rope_type": "default"}), **scaling}
    outer = keys.get("rope_local_base_freq", local_theta)
    keys["rope_local_base_freq"] = local.get("rope_theta", outer)


def _rope_object(where: str, rope: Any) -> dict[str, Any]:
    """The object of a rope, none if it is empty."""
    rope = rope or {}
    if not isinstance(rope, dict) or any(kind in rope for kind in _KINDS):
        raise ValueError(f"{where} is {rope!r}, expected an object for all layers")
    return rope


def _rope_type(rope: Mapping[str, Any]) -> str:
    """The rope_type, which transformers 4 called type."""
    named = [str(rope[key]) for key in ("rope_type", "type") if key in rope]
    kinds = {_OLD_ROPES.get(kind, kind) for kind in named}
    if len(kinds) > 1:
        raise ValueError(f"rope_type and type differ: {' and '.join(named)}; give the former alone")
    return kinds.pop() if kinds else "default"


def _read_rope(keys: dict[str, Any], max_length: int, family: Family) -> dict[str, Any]:
    """Takes rope_parameters, or transformers 4's rope_theta and rope_scaling; gives the fields."""
    defaults: Any = family.defaults
    fraction_key = family.keys.get("rotary_fraction", "partial_rotary_factor")
    theta = keys.pop(family.keys.get("rope_theta", "rope_theta"), None)
    fraction = keys.pop(fraction_key, None)
    is_given = keys.get("rope_parameters") is not None or bool(keys.get("rope_scaling"))
    parameters = _rope_object("rope_parameters", keys.pop("rope_parameters", None))
    scaling = _rope_object("rope_scaling", keys.pop("rope_scaling", None))
    given = scaling or parameters  # as transformers does: one replaces the other
    rope = {
        "rope_theta": defaults.rope_theta if theta is None else theta,
        "original_max_position_embeddings": max_length,
        "partial_rotary_factor": defaults.rotary_fraction if fraction is None else fraction,
        **given,
    }
    kind = _rope_type(rope)
    if kind not in _ROPES:
        raise ValueError(f"rope_type is {kind!r}; the supported ones are: {', '.join(_ROPES)}")
    for key in ("rope_theta", "partial_rotary_factor"):
        if not is_number(rope[key]):
            raise ValueError(f"{key} is {rope[key]!r}, expected a number")
        if key not in given and parameters.get(key, rope[key]) != rope[key]:
            raise ValueError(
                f"rope_scaling replaces rope_parameters, whose {key} {parameters[key]!r} is lost: "
                f"give rope_scaling a {key}, or remove one of the two"
            )
    has_theta = theta is not None or "rope_theta" in given
    if defaults.rope_scaling is not None and is_given != has_theta:
        raise ValueError("rope_theta and rope_parameters need each other: give both, or none")
    fields = {"rope_theta": float(rope["rope_theta"])}
    if "rotary_fraction" in vars(defaults):
        fields["rotary_fraction"] = float(rope["partial_rotary_factor"])
    elif rope["partial_rotary_factor"] != 1.0:
        raise ValueError("partial_rotary_factor changes the logits and is not supported")
    if not is_given and defaults.rope_scaling is not None:
        return {**fields, "rope_scaling": defaults.rope_scaling}
    if kind == "longrope":
        return {**fields, **_read_longrope(keys, rope, max_length)}
    return {**fields, "rope_scaling": _read_scaling(kind, rope)}


def _read_longrope(keys: dict[str, Any], rope: dict[str, Any], longest: int) -> dict[str, Any]:
    """LongRoPE's fields: the model reads texts up to the original length, by the short factors."""
    original = keys.get("original_max_position_embeddings")
    if original is None:
        original = rope["original_max_position_embeddings"]
    if not (is_int(original) and original > 0):
        raise ValueError(
            f"original_max_position_embeddings is {original!r}, expected a positive integer"
        )
    factor = max(longest / original, 1.0)
    if rope.get("factor", factor) != factor:
        raise ValueError(
            f"factor of longrope is {rope['factor']!r}; only max_position_embeddings / "
            f"original_max_position_embeddings, {factor}, is supported"
        )
    rope = {**rope, "factor": factor, "original_max_position_embeddings": original}
    scaling = _read_scaling("longrope", rope)
    return {"rope_scaling": scaling, "max_length": min(longest, original)}


def _read_scaling(kind: str, rope: dict[str, Any]) -> RopeScaling | None:
    """The scaling of a rope_type, by its keys."""
    names = _ROPES[kind]
    values: dict[str, Any] = {}
    for key, field in names.needed.items():
        value = rope.get(key)
        is_list = field.startswith(("short", "long"))
        if is_list and not (isinstance(value, list) and all(map(is_number, value)) and value):
            raise ValueError(f"{key} is {value!r}, expected a list of numbers")
        if not (is_list or is_number(value)):
            raise ValueError(f"{key} is {value!r}, expected a number")
        values[field] = tuple(value or ()) if is_list else value
    for key, field in names.optional.items():
        value = rope.get(key)
        if value is None:
            continue
        is_fit = isinstance(value, bool) if field == "truncate" else is_number(value)
        if not is_fit:
            raise ValueError(f"{key} is {value!r}, which is no value of this key")
        values[field] = value
    return RopeScaling(kind, **values) if values else None


def is_number(value: Any) -> TypeGuard[float]:
    """True for finite numbers that a float can hold, and not for True and False."""
    if isinstance(value, float):
        return math.isfinite(value)
    return is_int(value) and abs(value) < 1 << 63


def _is_kind_of(default: Any, value: Any, name: str) -> bool:
    """Whether the value of a key is of the kind of its default."""
    if value is None:
        return default is None or name.endswith(_MAY_BE_NULL)
    if isinstance(default, bool | str):
        return isinstance(value, type(default))
    if isinstance(default, float):
        return is_number(value)
    # Several ids may end a text, and several layers may have no experts.
    if name in ("eos_token_id", "mlp_only_layers") and isinstance(value, list | tuple):
        return all(map(is_int, value))
    return is_int(value) and is_number(value)
