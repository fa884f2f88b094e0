"""Configurations of the model families."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu")
COMPUTE_DTYPES = ("float32", "bfloat16")
ROPE_SCALINGS = ("linear", "llama3")


@dataclass(frozen=True)
class TransformerConfig:
    """What the configs of all families hold.

    Args:
        vocab_size: V, rows of the token table.
        max_length: longest text in tokens.
        hidden_size: D.
        num_layers: L.
        num_heads: H, of the queries.
        attention_dropout: rate, used only where a call is given a key.
        initializer_range: standard deviation of the initial weights.
        pad_token_id, eos_token_id, bos_token_id: written to config.json for other programs; not read by the model.
        compute_dtype: "float32" or "bfloat16"; parameters keep their own dtype, softmax and logits are float32.
        remat: recompute each block in the backward pass instead of storing its activations.
        scan_layers: one compiled block for all layers, parameters stacked to [L, ...] under "h"; decoding is unrolled.
        other_keys: keys of config.json that do not change logits, kept to be written back.

    Raises:
        ValueError: a value is out of range, or two values do not fit each other.
    """

    vocab_size: int
    max_length: int
    hidden_size: int
    num_layers: int
    num_heads: int
    _: KW_ONLY
    attention_dropout: float = 0.0
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
        for name, value in vars(self).items():
            is_size = name.startswith("num_") or name.endswith("_size") or name in ("max_length", "head_dim")
            if is_size and value is not None and not (is_int(value) and value > 0):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
            if name.endswith(("_dropout", "_epsilon")) and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")
            choices = {"activation": ACTIVATIONS, "compute_dtype": COMPUTE_DTYPES}.get(name)
            if choices and value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")
        if self.head_size * self.num_heads != self.hidden_size and not getattr(self, "head_dim", None):
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return getattr(self, "num_kv_heads", None) or self.num_heads

    @property
    def head_size(self) -> int:
        """Dh, width of a head."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_heads


@dataclass(frozen=True)
class GPT2Config(TransformerConfig):
    """GPT-2 (Radford et al. 2019), with every option of transformers' GPT2Config that changes logits.

    Args:
        vocab_size: V, rows of the token table, which is also the output layer.
        max_length: rows of the position table, in tokens; later positions use its last row.
        hidden_size, num_layers, num_heads: D (a multiple of H), L and H.
        intermediate_size: width of the MLP; None means 4 D.
        activation: "gelu_new" (tanh approximation), "gelu" (exact), "relu" or "silu".
        layer_norm_epsilon: added to the variance in every layer norm.
        scale_attn_weights: divide attention scores by sqrt(D / H).
        scale_attn_by_inverse_layer_idx: divide those of layer i (from 0) by i + 1.
        embedding_dropout, residual_dropout: rates, as ``attention_dropout``.

    The other fields are those of ``TransformerConfig``.
    """

    intermediate_size: int | None = None
    activation: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of rotary positions are stretched for texts longer than those of the pretraining.

    Args:
        kind: "linear" (Chen et al. 2023: all by ``factor``) or "llama3" (Llama 3.1: long waves by ``factor``, short
            ones not at all, those between by degrees).
        factor: at least 1.
        low_freq_factor, high_freq_factor, original_max_length: of "llama3": waves longer than
            ``original_max_length / low_freq_factor`` tokens are long, those shorter than
            ``original_max_length / high_freq_factor`` short.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ROPE_SCALINGS:
            raise ValueError(f"unknown rope scaling {self.kind!r}; choose from {', '.join(ROPE_SCALINGS)}")
        if not self.factor >= 1:
            raise ValueError(f"the factor of a rope scaling must be at least 1, got {self.factor!r}")
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(f"high_freq_factor must be above low_freq_factor {self.low_freq_factor!r}")


@dataclass(frozen=True)
class LlamaConfig(TransformerConfig):
    """Llama (Touvron et al. 2023), with every option of transformers' LlamaConfig that changes logits.

    Args:
        max_length: longest text in tokens that the model is meant for; positions have no table.
        intermediate_size: width of the MLP.
        num_kv_heads: of keys and values, a divisor of H (Ainslie et al. 2023); None means H.
        head_dim: Dh, even; None means D / H.
        rope_theta: base of the rotary positions' frequencies (Su et al. 2021).
        rope_scaling: None: not stretched.
        activation: "silu", "gelu_new", "gelu" or "relu".
        rms_norm_epsilon: added to the mean square in every norm.
        attention_bias, mlp_bias: whether those layers have biases.
        tie_embeddings: the token table is the output layer too; else that is "lm_head".

    The other fields are those of ``TransformerConfig``.
    """

    intermediate_size: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    activation: str = "silu"
    rms_norm_epsilon: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_size % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_size}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be above 0, got {self.rope_theta!r}")


ModelConfig = GPT2Config | LlamaConfig


def is_int(value: Any) -> bool:
    """True for integers, and not for True and False."""
    return isinstance(value, int) and not isinstance(value, bool)
