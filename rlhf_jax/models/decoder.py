"""The decoder of Llama, Qwen, Gemma and Mistral in Flax Linen, equal to transformers' models; the
config's class selects the family.

Rotary positions (Su et al. 2021), grouped-query attention (Ainslie et al. 2023), RMSNorm, SwiGLU
(Shazeer 2020). It adds a table "lm_head" to the parameters of ``stack.Transformer`` unless the
output layer is the token table.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax.models import kernels, stack
from rlhf_jax.models.config import DecoderConfig, Gemma3TextConfig
from rlhf_jax.models.stack import ACTIVATIONS, Dense, Norm, Rotation


def frequencies(config: DecoderConfig, is_local: bool = False) -> np.ndarray:
    """[Dh / 2] float32 angles per position, stretched by ``config.rope_scaling`` (transformers'
    rope utils).
    """
    if is_local and isinstance(config, Gemma3TextConfig):
        config = dataclasses.replace(config, rope_theta=config.local_rope_theta, rope_scaling=None)
    even = np.arange(0, config.head_size, 2, dtype=np.float64)
    inverse = 1.0 / config.rope_theta ** (even / config.head_size)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse.astype(np.float32)
    stretched = inverse / scaling.factor
    if scaling.kind == "linear":
        return stretched.astype(np.float32)
    # The number of waves in a text of the original length decides how much a frequency keeps.
    waves = scaling.original_max_length * inverse / (2 * math.pi)
    low = scaling.low_freq_factor
    kept = np.clip((waves - low) / (scaling.high_freq_factor - low), 0.0, 1.0)
    return (kept * inverse + (1 - kept) * stretched).astype(np.float32)


class _Attention(stack.Attention):
    """Grouped-query self-attention."""

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        width = config.num_heads * config.head_size
        kv_width = config.kv_heads * config.head_size
        has_bias = config.attention_bias or config.qkv_bias
        self.q_proj = Dense(config, (width,), has_bias)
        self.k_proj = Dense(config, (kv_width,), has_bias)
        self.v_proj = Dense(config, (kv_width,), has_bias)
        self.o_proj = Dense(config, (config.hidden_size,), config.attention_bias)
        if config.qk_norm:
            self.q_norm = Norm(config)
            self.k_norm = Norm(config)

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        batch, length, _ = x.shape

        def by_head(projected: Array) -> Array:
            heads = projected.reshape(batch, length, -1, self.config.head_size)
            return heads.swapaxes(1, 2)

        query = by_head(self.q_proj(x))
        key = by_head(self.k_proj(x))
        value = by_head(self.v_proj(x))
        if self.config.qk_norm:
            query = self.q_norm(query)
            key = self.k_norm(key)
        return query, key, value

    def output(self, mixed: Array) -> Array:
        return self.o_proj(mixed)


class _MLP(nn.Module):
    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        self.gate_proj = Dense(config, (config.intermediate_size,), config.mlp_bias)
        self.up_proj = Dense(config, (config.intermediate_size,), config.mlp_bias)
        self.down_proj = Dense(config, (config.hidden_size,), config.mlp_bias)

    def __call__(self, x: Array) -> Array:
        activation = ACTIVATIONS[self.config.activation]
        gate = activation(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class _Block(stack.Block):
    config: DecoderConfig

    def setup(self) -> None:
        self.attn = _Attention(self.config)
        self.mlp = _MLP(self.config)
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

    def embed(self, tokens: Array, positions: Array, real: Array) -> Array:
        rows = self.token_rows(tokens, real)
        if self.config.scaled_embedding:
            scale = jnp.asarray(self.config.hidden_size**0.5, rows.dtype)
            rows = rows * scale
        return rows.astype(self.config.compute_dtype)

    def scales(self) -> list[float]:
        width = getattr(self.config, "query_scalar", self.config.head_size)
        return [width**-0.5] * self.config.num_layers

    def rotation(self, positions: Array, is_local: bool) -> Rotation:
        places = positions.astype(jnp.float32)[:, None, :, None]
        angles = places * frequencies(self.config, is_local)[None, None, None]
        rotation = jnp.stack([jnp.cos(angles), jnp.sin(angles)])
        return kernels.computed_once(rotation)
