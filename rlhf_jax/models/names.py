"""How transformers names things: the keys of config.json and the tensors of the weights, one table per family.

Import and export read the same tables. Whatever in config.json changes logits is honoured or refused by name; every
other key is kept and written back.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeGuard

from rlhf_jax.errors import UserError
from rlhf_jax.models.config import GPT2Config, LlamaConfig, ModelConfig, RopeScaling, is_int

OUTPUT_TABLE = "lm_head.weight"  # the token table again, where the two are tied
SCORE = "score.weight"


class Family(NamedTuple):
    """How transformers writes one model_type."""

    config: Callable[..., ModelConfig]
    keys: Mapping[str, tuple[str, Any]]  # key of config.json: (our field, transformers' default)
    aliases: Mapping[str, str]  # other spellings of keys that transformers reads
    off: tuple[str, ...]  # keys that change logits when set, which is not supported
    on: tuple[str, ...]  # keys that change logits when not true, which is not supported
    prefix: str  # of the body's tensors in a causal language model; the files of a bare body have none
    outer: Mapping[str, str]  # module of params: transformers' name of it
    layer: str  # with {layer}, before the names of block
    block: Mapping[str, str]  # module within a layer: transformers' name of it
    transposed: bool  # whether kernels are stored as [out, in]
    causal_lm: str  # class names in config.json's architectures
    classifier: str

    def tensors(self, path: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
        """Names of the tensors that a leaf of the body lies in: one, or one per layer where layers are stacked."""
        kind = "bias" if path[-1] == "bias" else "weight"
        if not path[0].startswith("h"):
            return [f"{self.outer[path[0]]}.{kind}"]
        layers = range(shape[0]) if path[0] == "h" else [int(path[0].removeprefix("h_"))]
        module = self.block["/".join(path[1:-1])]
        return [f"{self.layer.format(layer=layer)}{module}.{kind}" for layer in layers]


# transformers leaves keys at their default out of some files.
GPT2 = Family(
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
    prefix="transformer.",
    outer={"wte": "transformer.wte", "wpe": "transformer.wpe", "ln_f": "transformer.ln_f"},
    layer="transformer.h.{layer}.",
    block={
        "ln_1": "ln_1",
        "ln_2": "ln_2",
        "attn/c_attn": "attn.c_attn",
        "attn/c_proj": "attn.c_proj",
        "mlp/c_fc": "mlp.c_fc",
        "mlp/c_proj": "mlp.c_proj",
    },
    transposed=False,  # transformers' Conv1D stores [in, out] as a Flax kernel does
    causal_lm="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
)
LLAMA = Family(
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
    prefix="model.",
    outer={"wte": "model.embed_tokens", "ln_f": "model.norm", "lm_head": "lm_head"},
    layer="model.layers.{layer}.",
    block={
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        **{f"attn/{name}_proj": f"self_attn.{name}_proj" for name in "qkvo"},
        **{f"mlp/{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    },
    transposed=True,
    causal_lm="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
)
FAMILIES = {"gpt2": GPT2, "llama": LLAMA}

# Each rope_type's keys in rope_scaling or rope_parameters, and our fields of RopeScaling.
_ROPE: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_length",
    },
}


def family_of(config: ModelConfig) -> Family:
    """The family of a configuration."""
    return GPT2 if isinstance(config, GPT2Config) else LLAMA


def from_json(keys: Mapping[str, Any], where: str) -> ModelConfig:
    """Reads the keys of a config.json as transformers' GPT2Config or LlamaConfig does, missing ones at their defaults.

    Args:
        keys: the file's content.
        where: the file's name, for error messages.

    Raises:
        UserError: for an unknown ``model_type``, for a key that changes logits and is not supported, for a bad value.
    """
    keys = dict(keys)
    model_type = str(keys.pop("model_type", None))
    if model_type not in FAMILIES:
        raise UserError(f"{where}: model_type is {model_type!r}; the supported ones are: {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    for alias, name in family.aliases.items():
        if alias in keys:
            value = keys.pop(alias)
            if keys.setdefault(name, value) != value:
                raise UserError(f"{where}: {alias} is {value!r} but {name} is {keys[name]!r}; remove one of the two")
    refused = [name for name in family.off if keys.get(name)]
    refused += [name for name in family.on if keys.get(name, True) is not True]
    refused += ["pretraining_tp"] if keys.get("pretraining_tp") not in (1, None) else []
    for name in refused:
        raise UserError(f"{where}: {name} is {keys[name]!r}, which changes the logits and is not supported")
    fields: dict[str, Any] = {}
    for name, (ours, default) in family.keys.items():
        value = keys.pop(name, default)
        if not _is_kind_of(default, value, name):
            raise UserError(f"{where}: {name} is {value!r}, which is not of the kind of its default, {default!r}")
        fields[ours] = tuple(value) if isinstance(value, list) else value
        if isinstance(default, float):  # JSON's 0 is an int, which JAX treats as an array of integers
            fields[ours] = float(value)
    try:
        if family is LLAMA:
            fields |= _read_rope(keys, fields["max_length"], where)
        return family.config(**fields, other_keys=keys)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json: all that ``from_json`` reads, and those it kept."""
    model_type, family = next((name, family) for name, family in FAMILIES.items() if family.config is type(config))
    keys = {name: getattr(config, ours) for name, (ours, _) in family.keys.items()}
    if isinstance(config, LlamaConfig):  # in the form of transformers 4, which 5 reads too
        keys |= {"rope_theta": config.rope_theta, "rope_scaling": None}
        if (scaling := config.rope_scaling) is not None:
            numbers = {key: getattr(scaling, ours) for key, ours in _ROPE[scaling.kind].items()}
            keys["rope_scaling"] = {"rope_type": scaling.kind, **numbers}
    return {**config.other_keys, **keys, "model_type": model_type}


def _read_rope(keys: dict[str, Any], max_length: int, where: str) -> dict[str, Any]:
    """Takes transformers 5's rope_parameters, or 4's rope_theta and rope_scaling, out of the keys."""
    theta, scaling, parameters = (keys.pop(key, None) for key in ("rope_theta", "rope_scaling", "rope_parameters"))
    name, given = ("rope_scaling", scaling) if parameters is None else ("rope_parameters", parameters)
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise UserError(f"{where}: {name} is {given!r}, expected an object")
    kind = str(given.get("rope_type", given.get("type", "default")))
    if kind not in _ROPE:
        raise UserError(f"{where}: {name}.rope_type is {kind!r}; the supported ones are: {', '.join(_ROPE)}")
    if given.get("partial_rotary_factor", keys.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{where}: {name}.partial_rotary_factor changes the logits and is not supported")
    theta = given.get("rope_theta", theta)
    theta = 10000.0 if theta is None else theta
    given = {"original_max_position_embeddings": max_length, **given}
    for key, value in {"rope_theta": theta, **{f"{name}.{key}": given.get(key) for key in _ROPE[kind]}}.items():
        if not is_number(value):
            raise UserError(f"{where}: {key} is {value!r}, expected a number")
    if kind == "default":
        return {"rope_theta": float(theta)}
    numbers = {ours: given[key] for key, ours in _ROPE[kind].items()}
    return {"rope_theta": float(theta), "rope_scaling": RopeScaling(kind, **numbers)}


def is_number(value: Any) -> TypeGuard[float]:
    """True for finite numbers that a float can hold, and not for True and False."""
    return (isinstance(value, float) and math.isfinite(value)) or (is_int(value) and abs(value) < 1 << 63)


def _is_kind_of(default: Any, value: Any, name: str) -> bool:
    """Whether the value of a key is of the kind of its default."""
    if value is None:
        return default is None or name.endswith("_token_id")
    if isinstance(default, bool | str):
        return isinstance(value, type(default))
    if isinstance(default, float):
        return is_number(value)
    if name == "eos_token_id" and isinstance(value, list):  # several ids may end a text
        return all(is_int(token_id) for token_id in value)
    return is_int(value) and is_number(value)
