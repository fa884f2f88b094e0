"""Configurations of the model families, and their translation from and to Hugging Face's config.json.

Whatever in config.json changes logits is honoured or refused by name; every other key is kept and written back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_jax.errors import UserError

ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu")
COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class GPT2Config:
    """GPT-2 (Radford et al. 2019), with every option of transformers' GPT2Config that changes logits.

    Args:
        vocab_size: V, rows of the token table, which is also the output layer.
        max_length: rows of the position table, in tokens; later positions use its last row.
        hidden_size: D, a multiple of ``num_heads``.
        num_layers: L.
        num_heads: H.
        intermediate_size: width of the MLP; None means 4 D.
        activation: "gelu_new" (tanh approximation), "gelu" (exact), "relu" or "silu".
        layer_norm_epsilon: added to the variance in every layer norm.
        scale_attn_weights: divide attention scores by sqrt(D / H).
        scale_attn_by_inverse_layer_idx: divide those of layer i (from 0) by i + 1.
        embedding_dropout, attention_dropout, residual_dropout: rates, used only where a call is given a key.
        initializer_range: standard deviation of the initial weights.
        pad_token_id, eos_token_id, bos_token_id: written to config.json for other programs; not read by the model.
        compute_dtype: "float32" or "bfloat16"; parameters keep their own dtype, softmax and logits are float32.
        remat: recompute each block in the backward pass instead of storing its activations.
        scan_layers: one compiled block for all layers, parameters stacked to [L, ...] under "h"; decoding is unrolled.
        other_keys: keys of config.json that do not change logits, kept to be written back.
    """

    vocab_size: int
    max_length: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int | None = None
    activation: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    bos_token_id: int | None = None
    compute_dtype: str = "float32"
    remat: bool = False
    scan_layers: bool = False
    # Not compared and not hashed: a model is a static argument of jit, and these keys change nothing it computes.
    other_keys: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_length", "hidden_size", "num_layers", "num_heads", "intermediate_size"):
            value = getattr(self, name)
            if not (name == "intermediate_size" and value is None) and not (_is_int(value) and value > 0):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)!r}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; choose from {', '.join(ACTIVATIONS)}")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(f"unknown compute_dtype {self.compute_dtype!r}; choose from {', '.join(COMPUTE_DTYPES)}")

    @property
    def mlp_size(self) -> int:
        """Width of the MLP."""
        return self.intermediate_size or 4 * self.hidden_size


def _is_int(value: Any) -> bool:
    """True for integers, and not for True and False."""
    return isinstance(value, int) and not isinstance(value, bool)


# config.json key: (our field, transformers' default). transformers leaves keys at their default out of some files.
_GPT2_KEYS: dict[str, tuple[str, Any]] = {
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
}

# Other spellings that transformers reads.
_GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}

# Keys that change logits when set (the first) or unset (the second), which is not supported.
# reorder_and_upcast_attn is not among them: it asks for the float32 softmax that attention.py always computes.
_GPT2_MUST_BE_OFF = ("add_cross_attention", "per_layer_config", "pruned_heads", "quantization_config")
_GPT2_MUST_BE_ON = ("is_causal", "tie_word_embeddings")


def from_json(keys: Mapping[str, Any], where: str) -> GPT2Config:
    """Reads the keys of a config.json as transformers' GPT2Config does, missing ones at their defaults.

    Args:
        keys: the file's content.
        where: the file's name, for error messages.

    Raises:
        UserError: for an unknown ``model_type``, for a key that changes logits and is not supported, for a bad value.
    """
    if keys.get("model_type") != "gpt2":
        raise UserError(f"{where}: model_type is {keys.get('model_type')!r}; the supported ones are: gpt2")
    keys = dict(keys)
    del keys["model_type"]
    for alias, name in _GPT2_ALIASES.items():
        if alias in keys:
            value = keys.pop(alias)
            if keys.setdefault(name, value) != value:
                raise UserError(f"{where}: {alias} is {value!r} but {name} is {keys[name]!r}; remove one of the two")
    for name in _GPT2_MUST_BE_OFF:
        if keys.get(name):
            raise UserError(f"{where}: {name} is set; it changes the logits and is not supported")
    for name in _GPT2_MUST_BE_ON:
        if keys.get(name, True) is not True:
            raise UserError(f"{where}: {name} is {keys[name]!r}; it changes the logits and only true is supported")
    fields: dict[str, Any] = {}
    for name, (ours, default) in _GPT2_KEYS.items():
        value = keys.pop(name, default)
        if name == "activation_function" and value not in ACTIVATIONS:
            raise UserError(f"{where}: {name} is {value!r}; the supported ones are: {', '.join(ACTIVATIONS)}")
        if not _same_kind(name, value, default):
            raise UserError(f"{where}: {name} is {value!r}, which is not of the kind of its default, {default!r}")
        fields[ours] = tuple(value) if isinstance(value, list) else value
    try:
        return GPT2Config(**fields, other_keys=keys)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def to_json(config: GPT2Config) -> dict[str, Any]:
    """The keys of config.json: all that ``from_json`` reads, and those it kept."""
    keys = {name: getattr(config, ours) for name, (ours, _) in _GPT2_KEYS.items()}
    return {**config.other_keys, **keys, "model_type": "gpt2"}


def _same_kind(name: str, value: Any, default: Any) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, float) or _is_int(value)
    if isinstance(default, str):
        return isinstance(value, str)
    if name.endswith("_token_id") or name == "n_inner":
        if value is None:
            return True
        if name == "eos_token_id" and isinstance(value, list):  # several ids may end a text
            return all(_is_int(x) for x in value)
    return _is_int(value)
