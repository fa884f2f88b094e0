"""The decoder of Llama, Qwen, Gemma and Mistral in Flax Linen, equal to transformers' models; the
config says which.

Rotary positions (Su et al. 2021), grouped-query attention (Ainslie et al. 2023), RMSNorm, SwiGLU
(Shazeer 2020). It adds a table "lm_head" to the parameters of ``stack.Transformer`` where the
output layer is not the token table.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import stack
from rlhf_jax.models.config import DecoderConfig, Gemma3TextConfig
from rlhf_jax.models.stack import ACTIVATIONS, Dense, Norm, Rotation


def _dense(config: DecoderConfig, features: int, use_bias: bool) -> Dense:
    init = nn.initializers.normal(config.initializer_range)
    return Dense(features, use_bias=use_bias, dtype=config.compute_dtype, kernel_init=init)


def frequencies(config: DecoderConfig, is_local: bool = False) -> np.ndarray:
    """[Dh / 2] float32 angles per position, stretched as ``config.rope_scaling`` says
    (transformers' rope utils).
    """
    if is_local and isinstance(config, Gemma3TextConfig):
        config = dataclasses.replace(config, rope_theta=config.local_rope_theta, rope_scaling=None)
    inverse = 1.0 / config.rope_theta ** (
        np.arange(0, config.head_size, 2, dtype=np.float64) / config.head_size
    )
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "linear":
        return (inverse if scaling is None else inverse / scaling.factor).astype(np.float32)
    waves = (
        scaling.original_max_length * inverse / (2 * math.pi)
    )  # waves in a text of the original length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((waves - low) / (high - low), 0.0, 1.0)
    return (kept * inverse + (1 - kept) * inverse / scaling.factor).astype(np.float32)


class _Attention(stack.Attention):
    """Grouped-query self-attention."""

    config: DecoderConfig

    def setup(self) -> None:
        config, width = self.config, self.config.kv_heads * self.config.head_size
        bias = config.attention_bias or config.qkv_bias
        self.q_proj = _dense(config, config.num_heads * config.head_size, bias)
        self.k_proj, self.v_proj = (_dense(config, width, bias) for _ in range(2))
        self.o_proj = _dense(config, config.hidden_size, config.attention_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = Norm(config), Norm(config)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        shape, layers = (
            (*x.shape[:2], -1, self.config.head_size),
            (self.q_proj, self.k_proj, self.v_proj),
        )
        query, key, value = (layer(x).reshape(shape).swapaxes(1, 2) for layer in layers)
        return (
            (self.q_norm(query), self.k_norm(key), value)
            if self.config.qk_norm
            else (query, key, value)
        )

    def output(self, mixed: jax.Array) -> jax.Array:
        return self.o_proj(mixed)


class _MLP(nn.Module):
    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        self.gate_proj, self.up_proj = (
            _dense(config, config.intermediate_size, config.mlp_bias) for _ in range(2)
        )
        self.down_proj = _dense(config, config.hidden_size, config.mlp_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(
            ACTIVATIONS[self.config.activation](self.gate_proj(x)) * self.up_proj(x)
        )


class _Block(stack.Block):
    config: DecoderConfig

    def setup(self) -> None:
        self.attn, self.mlp = _Attention(self.config), _MLP(self.config)
        self.add_norms(0.0)


class Decoder(stack.Transformer):
    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        self.wte = stack.table(config, config.vocab_size)
        self.ln_f = Norm(config)
        self.add_layers(_Block)
        if not config.tie_embeddings:
            self.lm_head = stack.table(config, config.vocab_size)

    def embed(self, tokens: jax.Array, positions: jax.Array, real: jax.Array) -> jax.Array:
        rows = self.token_rows(tokens, real)
        rows = (
            rows * jnp.asarray(self.config.hidden_size**0.5, rows.dtype)
            if self.config.scaled_embedding
            else rows
        )
        return rows.astype(self.config.compute_dtype)

    def scales(self) -> list[float]:
        return [
            getattr(self.config, "query_scalar", self.config.head_size) ** -0.5
        ] * self.config.num_layers

    def rotation(self, positions: jax.Array, is_local: bool) -> Rotation:
        angles = (
            positions.astype(jnp.float32)[:, None, :, None]
            * frequencies(self.config, is_local)[None, None, None]
        )
        # Looked up, they are computed once: XLA's CPU compiler would merge them into the kernels of
        # every layer.
        return jnp.take(
            jnp.stack([jnp.cos(angles), jnp.sin(angles)]), jnp.arange(2), axis=0, mode="clip"
        )
