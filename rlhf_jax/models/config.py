"""Configurations of the model families."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

ATTENTIONS = ("auto", "xla", "cudnn", "splash", "blockwise")
_CHOICES = {
    "activation": ("gelu_new", "gelu", "relu", "silu", "gelu_pytorch_tanh"),
    "compute_dtype": ("float32", "bfloat16"),
    "attention": ATTENTIONS,
}
_SIZE_ENDINGS = ("_size", "_dim", "_window", "_length", "_every", "_scalar")


@dataclass(frozen=True)
class TransformerConfig:
    """The fields that the configs of all families have.

    Args:
        vocab_size: V, rows of the token table.
        max_length: longest text in tokens.
        hidden_size: D.
        num_layers: L.
        num_heads: H, of the queries.
        attention_dropout: rate, used only where a call is given a key.
        initializer_range: standard deviation of the initial weights.
        pad_token_id, eos_token_id, bos_token_id: written to config.json for other programs; not
            read by the model.
        compute_dtype: "float32" or "bfloat16"; parameters keep their own dtype, softmax and logits
            are float32.
        remat: recompute each block in the backward pass instead of storing its activations.
        scan_layers: one compiled block for all layers but the last, their parameters stacked to [L
            - 1, ...] under "h"; decoding is unrolled.
        attention: which implementation computes it (``attention.implementation``); "cudnn" needs
            "bfloat16".
        sliding_window: a token attends to itself and the ``sliding_window`` - 1 before it; None: to
            all before it. Most families fix None.
        global_every: every n-th layer attends to all tokens, the others to the window; None: all
            layers are of one kind.
        other_keys: keys of config.json that do not change logits, kept to be written back.

    Attributes, fixed by the family:
        tie_embeddings: the token table is the output layer too.
        post_norms: the outputs of attention and MLP are normed too.

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
    attention: str = "auto"
    sliding_window: int | None = field(default=None, init=False)
    global_every: int | None = field(default=None, init=False)
    # Not compared and not hashed: a model is a static argument of jit, and these keys change
    # nothing it computes.
    other_keys: Mapping[str, Any] = field(default_factory=dict, compare=False)
    # Without an annotation, an attribute of the class and not a field.
    tie_embeddings = True
    post_norms = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_size = name.startswith("num_") or name.endswith(_SIZE_ENDINGS)
            if is_size and value is not None and not (is_int(value) and value > 0):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
            if name.endswith(("_dropout", "_epsilon")) and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")
            choices = _CHOICES.get(name)
            if choices and value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")
        if self.hidden_size % self.num_heads and not getattr(self, "head_dim", None):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """``sliding_window`` of all layers; or None and the window of the local layers, if there
        are layers of both kinds.
        """
        return (self.sliding_window,) if self.global_every is None else (None, self.sliding_window)

    @property
    def local_layers(self) -> list[bool]:
        """[L] whether a layer has the second of two ``windows``."""
        return [
            self.global_every is not None and (i + 1) % self.global_every != 0
            for i in range(self.num_layers)
        ]

    @property
    def num_stacked(self) -> int:
        """The number of layers that ``scan_layers`` stacks: all but the last, which computes only
        the columns that are needed.
        """
        return self.num_layers - 1 if self.scan_layers else 0

    @property
    def num_blocks(self) -> int:
        """The number of blocks in a program of the whole model. The stacked layers are one
        block.
        """
        return self.num_layers - max(self.num_stacked - 1, 0)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads

    @property
    def head_size(self) -> int:
        """Dh, width of a head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class GPT2Config(TransformerConfig):
    """GPT-2 (Radford et al. 2019), with every option of transformers' GPT2Config that changes
    logits.

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
    """How the frequencies of rotary positions are scaled for texts that are longer than in
    pretraining.

    Args:
        kind: "linear" (Chen et al. 2023: all by ``factor``) or "llama3" (Llama 3.1: long waves by
            ``factor``, short ones not at all, those between by degrees).
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
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"unknown rope scaling {self.kind!r}; choose from linear, llama3")
        if not self.factor >= 1:
            raise ValueError(
                f"the factor of a rope scaling must be at least 1, got {self.factor!r}"
            )
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be above low_freq_factor {self.low_freq_factor!r}"
            )


@dataclass(frozen=True)
class DecoderConfig(TransformerConfig):
    """The fields that Llama and its relatives share. A family's class fixes the options that its
    config.json cannot name.

    Args:
        max_length: longest text in tokens that the model is meant for; positions have no table.
        intermediate_size: width of the MLP.
        num_kv_heads: of keys and values, a divisor of H (Ainslie et al. 2023); None means H.
        head_dim: Dh, even; None means D / H.
        rope_theta: base of the rotary positions' frequencies (Su et al. 2021).
        rope_scaling: None: not stretched.
        activation: "silu", "gelu_new", "gelu" or "relu".
        rms_norm_epsilon: added to the mean square in every norm.
        tie_embeddings: the token table is the output layer too; else that is "lm_head".

    The other fields are those of ``TransformerConfig``.

    Attributes, fixed by the family, or a field where its config.json has the key:
        attention_bias, mlp_bias: whether all layers of the attention, or of the MLP, have biases.
        qkv_bias: the layers of queries, keys and values have biases.
        qk_norm: queries and keys are normed in each head, before their rotation.
        norm_offset: added to the scales of the norms.
        scaled_embedding: rows of the token table are multiplied by sqrt(D).
    """

    intermediate_size: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    activation: str = "silu"
    rms_norm_epsilon: float = 1e-6
    tie_embeddings: bool = False
    attention_bias = False
    mlp_bias = False
    qkv_bias = False
    qk_norm = False
    norm_offset = 0.0
    scaled_embedding = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_size % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_size}")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}"
            )
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta must be above 0, got {self.rope_theta!r}")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Dh, width of a head."""
        return self.head_dim or super().head_size


@dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Llama (Touvron et al. 2023), and those of its shape: Llama 2 and 3, TinyLlama, SmolLM."""

    attention_bias: bool = False
    mlp_bias: bool = False


@dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """Qwen2 and Qwen2.5 (Yang et al. 2024), without their sliding window, which no released model
    uses.
    """

    head_dim: int | None = field(default=None, init=False)
    qkv_bias = True


@dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """Qwen3 (Yang et al. 2025)."""

    head_dim: int | None = 128
    attention_bias: bool = False
    qk_norm = True


@dataclass(frozen=True)
class MistralConfig(DecoderConfig):
    """Mistral (Jiang et al. 2023); ``sliding_window`` is None from version 0.2 on."""

    sliding_window: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Gemma3TextConfig(DecoderConfig):
    """The text model of Gemma 3 (Gemma team 2025): every ``global_every``-th layer attends to all
    tokens, the others to a window.

    Args:
        rope_theta, rope_scaling: of the layers without a window.
        local_rope_theta: of those with a window.
        query_scalar: attention scores are divided by its square root.
    """

    head_dim: int | None = 256
    rope_theta: float = 1e6
    activation: str = "gelu_pytorch_tanh"
    tie_embeddings: bool = True
    attention_bias: bool = False
    sliding_window: int | None = field(default=4096, kw_only=True)
    local_rope_theta: float = 10000.0
    query_scalar: int = 256
    global_every: int | None = field(default=6, kw_only=True)
    post_norms = True
    qk_norm = True
    norm_offset = 1.0
    scaled_embedding = True


ModelConfig = GPT2Config | DecoderConfig


def is_int(value: Any) -> bool:
    """True for integers, and not for True and False."""
    return isinstance(value, int) and not isinstance(value, bool)
