"""Translation of the models' configurations from and to Hugging Face's config.json.

Whatever in config.json changes logits is honoured or refused by name; every other key is kept and written back.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import ACTIVATIONS, ROPE_SCALINGS, GPT2Config, LlamaConfig, ModelConfig, RopeScaling, is_int


class _Family(NamedTuple):
    """How one model_type is written."""

    config: Callable[..., ModelConfig]
    keys: Mapping[str, tuple[str, Any]]  # config.json key: (our field, transformers' default)
    aliases: Mapping[str, str]  # other spellings that transformers reads
    off: tuple[str, ...]  # keys that change logits when set, which is not supported
    on: tuple[str, ...]  # keys that change logits when unset


# transformers leaves keys at their default out of some files.
_GPT2 = _Family(
    config=GPT2Config,
    keys={
        "vocab_size": ("vocab_size", 50257),
        "n_positions": ("max_length", 1024),
        "n_embd": ("hidden_size", 768),
        "n_layer": ("num_layers", 12),
        "n_head": ("num_heads", 12),
        "n_inner": ("intermediate_size", None),
        "activation_function": ("activation", "gelu_new"),
        "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "scale_attn_weights": ("scale_attn_weights", True),
        "scale_attn_by_inverse_layer_idx": ("scale_attn_by_inverse_layer_idx", False),
        "embd_pdrop": ("embedding_dropout", 0.1),
        "attn_pdrop": ("attention_dropout", 0.1),
        "resid_pdrop": ("residual_dropout", 0.1),
        "initializer_range": ("initializer_range", 0.02),
        "pad_token_id": ("pad_token_id", None),
        "eos_token_id": ("eos_token_id", 50256),
        "bos_token_id": ("bos_token_id", 50256),
    },
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    },
    # reorder_and_upcast_attn is not among them: it asks for the float32 softmax that attention.py always computes.
    off=("add_cross_attention", "per_layer_config", "pruned_heads", "quantization_config"),
    on=("is_causal", "tie_word_embeddings"),
)
_LLAMA = _Family(
    config=LlamaConfig,
    keys={
        "vocab_size": ("vocab_size", 32000),
        "max_position_embeddings": ("max_length", 2048),
        "hidden_size": ("hidden_size", 4096),
        "num_hidden_layers": ("num_layers", 32),
        "num_attention_heads": ("num_heads", 32),
        "num_key_value_heads": ("num_kv_heads", None),
        "intermediate_size": ("intermediate_size", 11008),
        "head_dim": ("head_dim", None),
        "hidden_act": ("activation", "silu"),
        "rms_norm_eps": ("rms_norm_epsilon", 1e-6),
        "attention_bias": ("attention_bias", False),
        "mlp_bias": ("mlp_bias", False),
        "tie_word_embeddings": ("tie_embeddings", False),
        "attention_dropout": ("attention_dropout", 0.0),
        "initializer_range": ("initializer_range", 0.02),
        "pad_token_id": ("pad_token_id", None),
        "eos_token_id": ("eos_token_id", 2),
        "bos_token_id": ("bos_token_id", 1),
    },
    aliases={},
    off=("per_layer_config", "pruned_heads", "quantization_config"),
    on=("is_causal",),
)
_FAMILIES = {"gpt2": _GPT2, "llama": _LLAMA}
_ACTIVATION_KEYS = ("activation_function", "hidden_act")
_MAY_BE_NULL = ("n_inner", "num_key_value_heads", "head_dim")


def from_json(keys: Mapping[str, Any], where: str) -> ModelConfig:
    """Reads the keys of a config.json as transformers' GPT2Config or LlamaConfig does, missing ones at their defaults.

    Args:
        keys: the file's content.
        where: the file's name, for error messages.

    Raises:
        UserError: for an unknown ``model_type``, for a key that changes logits and is not supported, for a bad value.
    """
    family = _FAMILIES.get(str(keys.get("model_type")))
    if family is None:
        raise UserError(
            f"{where}: model_type is {keys.get('model_type')!r}; the supported ones are: {', '.join(_FAMILIES)}"
        )
    keys = dict(keys)
    del keys["model_type"]
    for alias, name in family.aliases.items():
        if alias in keys:
            value = keys.pop(alias)
            if keys.setdefault(name, value) != value:
                raise UserError(f"{where}: {alias} is {value!r} but {name} is {keys[name]!r}; remove one of the two")
    for name in family.off:
        if keys.get(name):
            raise UserError(f"{where}: {name} is set; it changes the logits and is not supported")
    for name in family.on:
        if keys.get(name, True) is not True:
            raise UserError(f"{where}: {name} is {keys[name]!r}; it changes the logits and only true is supported")
    if keys.get("pretraining_tp", 1) not in (1, None):
        raise UserError(f"{where}: pretraining_tp is {keys['pretraining_tp']!r}; only 1 is supported")
    fields: dict[str, Any] = {}
    for name, (ours, default) in family.keys.items():
        value = keys.pop(name, default)
        if name in _ACTIVATION_KEYS and value not in ACTIVATIONS:
            raise UserError(f"{where}: {name} is {value!r}; the supported ones are: {', '.join(ACTIVATIONS)}")
        if not _same_kind(name, value, default):
            raise UserError(f"{where}: {name} is {value!r}, which is not of the kind of its default, {default!r}")
        fields[ours] = tuple(value) if isinstance(value, list) else value
        if isinstance(default, float):  # JSON's 0 is an int, which JAX treats as an array of integers
            fields[ours] = float(value)
    try:
        if family is _LLAMA:
            fields |= _read_rope(keys, fields["max_length"], where)
        return family.config(**fields, other_keys=keys)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json: all that ``from_json`` reads, and those it kept."""
    name, family = next((name, family) for name, family in _FAMILIES.items() if family.config is type(config))
    keys = {name: getattr(config, ours) for name, (ours, _) in family.keys.items()}
    rope = _write_rope(config) if isinstance(config, LlamaConfig) else {}
    return {**config.other_keys, **keys, **rope, "model_type": name}


def _read_rope(keys: dict[str, Any], max_length: int, where: str) -> dict[str, Any]:
    """Takes transformers 5's rope_parameters, or 4's rope_theta and rope_scaling, out of the keys."""
    theta, scaling = keys.pop("rope_theta", None), keys.pop("rope_scaling", None)
    parameters = keys.pop("rope_parameters", None)
    name = "rope_scaling" if parameters is None else "rope_parameters"
    found = scaling if parameters is None else parameters
    if found is None:
        found = {}
    if not isinstance(found, dict):
        raise UserError(f"{where}: {name} is {found!r}, expected an object")
    found = {**found}
    theta = found.pop("rope_theta", theta)
    if theta is None:
        theta = 10000.0
    kind = found.pop("rope_type", found.pop("type", "default"))
    found.pop("type", None)
    if found.pop("partial_rotary_factor", keys.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{where}: {name}.partial_rotary_factor changes the logits and is not supported")
    if not is_number(theta):
        raise UserError(f"{where}: rope_theta is {theta!r}, expected a number")
    if kind == "default":
        return {"rope_theta": float(theta)}
    if kind not in ROPE_SCALINGS:
        raise UserError(
            f"{where}: {name}.rope_type is {kind!r}; the supported ones are: default, {', '.join(ROPE_SCALINGS)}"
        )
    wanted = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    numbers = {key: found[key] for key in (wanted if kind == "llama3" else wanted[:1]) if key in found}
    if kind == "llama3":
        numbers.setdefault("original_max_position_embeddings", max_length)
    for key in wanted if kind == "llama3" else wanted[:1]:
        if not is_number(numbers.get(key)):
            raise UserError(f"{where}: {name}.{key} is {numbers.get(key)!r}, expected a number")
    if "original_max_position_embeddings" in numbers:
        numbers["original_max_length"] = numbers.pop("original_max_position_embeddings")
    return {"rope_theta": float(theta), "rope_scaling": RopeScaling(kind, **numbers)}


def _write_rope(config: LlamaConfig) -> dict[str, Any]:
    """In the form of transformers 4, which 5 reads too."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    numbers: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        numbers |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        }
    return {"rope_theta": config.rope_theta, "rope_scaling": numbers}


def is_number(value: Any) -> TypeGuard[float]:
    """True for finite numbers that a float can hold, and not for True and False."""
    return (isinstance(value, float) and math.isfinite(value)) or (is_int(value) and abs(value) < 1 << 63)


def _same_kind(name: str, value: Any, default: Any) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, float):
        return is_number(value)
    if isinstance(default, str):
        return isinstance(value, str)
    if name.endswith("_token_id") or name in _MAY_BE_NULL:
        if value is None:
            return True
        if name == "eos_token_id" and isinstance(value, list):  # several ids may end a text
            return all(is_int(x) for x in value)
    return is_int(value) and is_number(value)
