"""Configurations of the model families."""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, cast

ATTENTIONS = ("auto", "xla", "cudnn", "splash", "blockwise")
_CHOICES = {
    "activation": ("gelu_new", "gelu", "relu", "silu", "gelu_pytorch_tanh"),
    "compute_dtype": ("float32", "bfloat16"),
    "attention": ATTENTIONS,
}
_SIZE_ENDINGS = ("_size", "_dim", "_window", "_length", "_every", "_scalar", "_per_token")
_POSITIVE_ENDINGS = ("_multiplier", "_scaling_factor", "_softcap", "_limit", "_theta")
GATE_GAIN = 1.702  # of the gates of ``gate_limit``
_LARGEST = 2**31  # sizes and positions are 32-bit numbers
# Of these there is a list or a name each, before any weights are read. Published models have at
# most some hundreds.
_MOST = {"num_layers": 2**14, "num_experts": 2**16}


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
        lora_dropout: rate of the inputs of LoRA's adapters, as ``attention_dropout``.
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

    The following are fixed by the family.

    Other Parameters:
        tie_embeddings: the token table is the output layer too.
        layer_norm: norms subtract the mean and have a bias (Ba et al. 2016); else RMSNorm.
        norm_offset: added to the scales of the norms.
        pre_norms: the inputs of attention and MLP are normed.
        post_norms: the outputs of attention and MLP are normed, before they are added.
        parallel_residual: attention and MLP read the same x; else the MLP reads x plus attention.
        residual_multiplier: what attention and MLP add is multiplied by it.
        logits_divisor: logits are divided by it.
        attention_softcap, logit_softcap: attention scores, or logits, x become cap * tanh(x / cap);
            None: they do not.
        sinks: each head has a learned score that takes a share of the softmax and has no value.

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
    lora_dropout: float = 0.0
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
    layer_norm = False
    norm_offset = 0.0
    pre_norms = True
    post_norms = False
    parallel_residual = False
    residual_multiplier = 1.0
    logits_divisor = 1.0
    attention_softcap = cast("float | None", None)
    logit_softcap = cast("float | None", None)
    sinks = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_size = name.startswith("num_") or name.endswith(_SIZE_ENDINGS)
            if is_size and value is not None and not (is_int(value) and value > 0):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
            most = _MOST.get(name, _LARGEST)
            if is_size and value is not None and value >= most:
                raise ValueError(f"{name} must be below {most}, got {value!r}")
            is_positive = name.endswith(_POSITIVE_ENDINGS) and value is not None
            if is_positive and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be above 0, got {value!r}")
            if name.endswith(("_dropout", "_epsilon")) and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")
            choices = _CHOICES.get(name)
            if choices and value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")
        if self.hidden_size % self.num_heads and not getattr(self, "head_dim", None):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if self.attention in ("cudnn", "splash") and not self.has_plain_softmax:
            raise ValueError(
                f'attention "{self.attention}" has neither soft caps nor sinks, which this model '
                'needs; choose "auto", "xla" or "blockwise"'
            )

    @property
    def has_plain_softmax(self) -> bool:
        """Whether attention weights are the softmax of the scores as they are."""
        return self.attention_softcap is None and not self.sinks

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
    layer_norm = True

    @property
    def norm_epsilon(self) -> float:
        """Added to the variance in every norm."""
        return self.layer_norm_epsilon


ROPES = ("linear", "llama3", "dynamic", "yarn", "longrope")


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies of rotary positions are scaled for texts that are longer than in
    pretraining.

    Args:
        kind: "linear" (Chen et al. 2023): all by ``factor``. "llama3" (Llama 3.1): long waves by
            ``factor``, short ones not at all, those between by degrees. "yarn" (Peng et al. 2023):
            so too, and cosines and sines are multiplied by ``attention_factor``. "dynamic": only in
            texts longer than the model's max_length, which are not allowed here, so not at all.
            "longrope" (Ding et al. 2024): each frequency by a factor of its own.
        factor: at least 1.
        low_freq_factor, high_freq_factor, original_max_length: of "llama3": waves longer than
            ``original_max_length / low_freq_factor`` tokens are long, those shorter than
            ``original_max_length / high_freq_factor`` short.
        beta_fast, beta_slow: of "yarn": a frequency with more than ``beta_fast`` waves in
            ``original_max_length`` tokens keeps its size, one with fewer than ``beta_slow`` is
            divided.
        truncate: of "yarn": these two bounds are rounded to whole indices of frequencies.
        attention_factor: of "yarn" and "longrope"; None: as the papers suggest.
        mscale, mscale_all_dim: of "yarn": both given, they change what the paper suggests.
        query_beta: queries at position p are multiplied by 1 + query_beta * log(1 + p //
            original_max_length) (Llama 4); None: they are not.
        short_factor, long_factor: of "longrope", [Dh / 2] each; the long ones are used if the
            model's max_length is above ``original_max_length``.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192
    _: KW_ONLY
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    query_beta: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPES:
            raise ValueError(f"unknown rope scaling {self.kind!r}; choose from {', '.join(ROPES)}")
        if not self.factor >= 1:
            raise ValueError(
                f"the factor of a rope scaling must be at least 1, got {self.factor!r}"
            )
        if not self.high_freq_factor > self.low_freq_factor > 0:
            raise ValueError(
                f"high_freq_factor must be above low_freq_factor {self.low_freq_factor!r}, and "
                "both above 0"
            )
        if not 1 < self.original_max_length < _LARGEST:
            raise ValueError(
                f"original_max_position_embeddings must be above 1 and below 2^31, got "
                f"{self.original_max_length!r}"
            )
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                f"beta_fast {self.beta_fast!r} must be above beta_slow {self.beta_slow!r}, both "
                "above 0"
            )

    @property
    def longest(self) -> int:
        """The longest text in tokens that the scaling is meant for."""
        return round(self.factor * self.original_max_length)


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

    The following are fixed by the family, or a field where its config.json has the key.

    Other Parameters:
        attention_bias, mlp_bias: whether all layers of the attention, or of the MLP, have biases.
        qkv_bias: the layers of queries, keys and values have biases.
        qkv: "apart": q_proj, k_proj and v_proj; else one layer qkv_proj, "joined": all queries,
            then all keys, then all values; or "by_head": those of a head beside each other.
        qk_norm: queries and keys are normed before their rotation, "head": in each head; "width":
            all heads as one vector; None: they are not.
        rotary_fraction: the share of a head's columns, the first ones, that positions turn.
        global_rope: whether layers that ``global_every`` picks have rotary positions.
        local_rope_theta: of the layers that it does not pick, unscaled; None: ``rope_theta``.
        attention_scale: attention scores are multiplied by it.
        embedding_multiplier: rows of the token table are multiplied by it.
        gated: the MLP multiplies act(gate_proj(x)) with up_proj(x) (Shazeer 2020); else it is
            act(up_proj(x)).
        gate_up: "apart": gate_proj and up_proj; else one layer gate_up_proj, "joined": gates, then
            the others; or "interleaved": columns in turn.
        gate_limit: gates g are cut above at it, the others u on both sides, and the MLP multiplies
            g * sigmoid(1.702 g) with u + 1 (gpt-oss); None: not.
        num_experts: E, MLPs of which each token takes ``experts_per_token``, those with the highest
            scores of a router (Shazeer et al. 2017); None: one MLP.
        expert_size: width of an expert; None: ``intermediate_size``.
        normalize_experts: the chosen experts' weights are divided by their sum.
        sparse_every: every n-th layer has experts, the others and ``dense_layers`` (numbers from 0)
            one MLP of ``intermediate_size``.
        router_bias: the router has a bias.
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
    qkv = "apart"
    qk_norm = cast("str | None", None)
    rotary_fraction = 1.0
    global_rope = True
    local_rope_theta = cast("float | None", None)
    embedding_multiplier = 1.0
    gated = True
    gate_up = "apart"
    gate_limit = cast("float | None", None)
    num_experts = cast("int | None", None)
    experts_per_token = 1
    expert_size = cast("int | None", None)
    normalize_experts = True
    sparse_every = 1
    dense_layers = cast("tuple[int, ...]", ())
    router_bias = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_size % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_size}")
        if self.rotary_size % 2 or not 0 < self.rotary_size <= self.head_size:
            raise ValueError(
                f"rotary positions need an even number of columns, got {self.rotary_size}: "
                f"rotary_fraction {self.rotary_fraction!r} of head_dim {self.head_size}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}"
            )
        for theta in (self.rope_theta, self.local_rope_theta):
            if theta is not None and not theta > 1:
                raise ValueError(f"rope_theta must be above 1, got {theta!r}")
        if self.num_experts is not None and self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} is above num_experts "
                f"{self.num_experts}"
            )
        if self.scan_layers and len(set(self.sparse_layers)) > 1:
            raise ValueError(
                "scan_layers needs layers of one kind, and this model has layers with experts and "
                "layers without"
            )
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "longrope":
            sizes = {len(scaling.short_factor), len(scaling.long_factor)}
            if sizes != {self.rotary_size // 2}:
                raise ValueError(
                    f"short_factor and long_factor must have {self.rotary_size // 2} numbers each"
                )

    @property
    def norm_epsilon(self) -> float:
        """Added to the mean square, or in a layer norm to the variance, in every norm."""
        return self.rms_norm_epsilon

    @property
    def attention_scale(self) -> float:
        """The factor of attention scores."""
        return float(self.head_size**-0.5)

    @property
    def rotary_size(self) -> int:
        """The number of a head's columns that positions turn."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def sparse_layers(self) -> list[bool]:
        """[L] whether a layer has experts."""
        dense_layers = set(self.dense_layers)
        return [
            self.num_experts is not None
            and (i + 1) % self.sparse_every == 0
            and i not in dense_layers
            for i in range(self.num_layers)
        ]

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
    qk_norm = "head"


@dataclass(frozen=True)
class MistralConfig(DecoderConfig):
    """Mistral (Jiang et al. 2023); ``sliding_window`` is None from version 0.2 on."""

    sliding_window: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class _GemmaConfig(DecoderConfig):
    """What the Gemmas share.

    Args:
        query_scalar: attention scores are divided by its square root.
    """

    head_dim: int | None = 256
    activation: str = "gelu_pytorch_tanh"
    tie_embeddings: bool = True
    attention_bias: bool = False
    sliding_window: int | None = field(default=4096, kw_only=True)
    query_scalar: int = 256
    post_norms = True
    norm_offset = 1.0

    @property
    def attention_scale(self) -> float:
        """The factor of attention scores."""
        return float(self.query_scalar**-0.5)

    @property
    def embedding_multiplier(self) -> float:  # type: ignore[override]
        """The factor of the token table's rows."""
        return float(self.hidden_size**0.5)


@dataclass(frozen=True)
class Gemma2Config(_GemmaConfig):
    """Gemma 2 (Gemma team 2024): layers with a window and without in turn, soft caps."""

    global_every: int | None = field(default=2, kw_only=True)
    attention_softcap: float | None = 50.0
    logit_softcap: float | None = 30.0


@dataclass(frozen=True)
class Gemma3TextConfig(_GemmaConfig):
    """The text model of Gemma 3 (Gemma team 2025): every ``global_every``-th layer attends to all
    tokens, the others to a window.

    Args:
        rope_theta, rope_scaling: of the layers without a window.
        local_rope_theta: of those with a window.
    """

    rope_theta: float = 1e6
    local_rope_theta: float = 10000.0
    global_every: int | None = field(default=6, kw_only=True)
    qk_norm = "head"


@dataclass(frozen=True)
class GPTNeoXConfig(DecoderConfig):
    """GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023).

    Args:
        parallel_residual: attention and MLP read the same x.
        rotary_fraction: the share of a head's columns that positions turn.
    """

    num_kv_heads: int | None = field(default=None, init=False)
    head_dim: int | None = field(default=None, init=False)
    activation: str = "gelu"
    rms_norm_epsilon: float = 1e-5
    attention_bias: bool = True
    parallel_residual: bool = True
    rotary_fraction: float = 0.25
    layer_norm = True
    mlp_bias = True
    qkv = "by_head"
    gated = False


@dataclass(frozen=True)
class Olmo2Config(DecoderConfig):
    """OLMo 2 (OLMo team 2024): norms behind attention and MLP in place of before."""

    rms_norm_epsilon: float = 1e-5
    attention_bias: bool = False
    pre_norms = False
    post_norms = True
    qk_norm = "width"


@dataclass(frozen=True)
class Olmo3Config(Olmo2Config):
    """OLMo 3 (OLMo team 2025): every ``global_every``-th layer attends to all tokens, with scaled
    rotary positions, the others to a window.
    """

    rope_theta: float = 500000.0
    local_rope_theta: float = 500000.0
    sliding_window: int | None = field(default=4096, kw_only=True)
    global_every: int | None = field(default=4, kw_only=True)


@dataclass(frozen=True)
class SmolLM3Config(DecoderConfig):
    """SmolLM3 (Bakouch et al. 2025): every ``global_every``-th layer has no positions."""

    rope_theta: float = 2e6
    tie_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    global_every: int | None = field(default=4, kw_only=True)
    global_rope = False


@dataclass(frozen=True)
class Phi3Config(DecoderConfig):
    """Phi-3 (Abdin et al. 2024), Phi-3.5 and Phi-4-mini."""

    rms_norm_epsilon: float = 1e-5
    rotary_fraction: float = 1.0
    sliding_window: int | None = field(default=None, kw_only=True)
    qkv = "joined"
    gate_up = "joined"


@dataclass(frozen=True)
class GraniteConfig(DecoderConfig):
    """Granite 3 (Granite team 2024).

    Args:
        attention_multiplier: attention scores are multiplied by it.
        logits_divisor: logits are divided by it.
    """

    attention_bias: bool = False
    mlp_bias: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    logits_divisor: float = 1.0

    @property
    def attention_scale(self) -> float:
        """The factor of attention scores."""
        return self.attention_multiplier


@dataclass(frozen=True)
class Ministral3Config(MistralConfig):
    """Ministral 3 (Mistral AI 2025)."""

    head_dim: int | None = 128
    rope_theta: float = 1e6
    rms_norm_epsilon: float = 1e-5


@dataclass(frozen=True)
class Qwen3MoeConfig(Qwen3Config):
    """Qwen3 with experts (Yang et al. 2025)."""

    head_dim: int | None = None
    num_experts: int | None = 128
    experts_per_token: int = 8
    expert_size: int | None = 768
    normalize_experts: bool = False
    sparse_every: int = 1
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class MixtralConfig(MistralConfig):
    """Mixtral (Jiang et al. 2024)."""

    rope_theta: float = 1e6
    rms_norm_epsilon: float = 1e-5
    num_experts: int | None = 8
    experts_per_token: int = 2


@dataclass(frozen=True)
class OlmoeConfig(DecoderConfig):
    """OLMoE (Muennighoff et al. 2024)."""

    rms_norm_epsilon: float = 1e-5
    attention_bias: bool = False
    num_experts: int | None = 64
    experts_per_token: int = 8
    normalize_experts: bool = False
    qk_norm = "width"


@dataclass(frozen=True)
class GptOssConfig(DecoderConfig):
    """gpt-oss (OpenAI 2025): experts with biases and limited gates, sinks, windows in every other
    layer.
    """

    head_dim: int | None = 64
    rope_theta: float = 150000.0
    rms_norm_epsilon: float = 1e-5
    attention_bias: bool = True
    sliding_window: int | None = field(default=128, kw_only=True)
    global_every: int | None = field(default=2, kw_only=True)
    num_experts: int | None = 128
    experts_per_token: int = 4
    gate_limit: float | None = 7.0
    gate_up = "interleaved"
    mlp_bias = True
    router_bias = True
    sinks = True


ModelConfig = GPT2Config | DecoderConfig


def is_int(value: Any) -> bool:
    """True for integers, and not for True and False."""
    return isinstance(value, int) and not isinstance(value, bool)
