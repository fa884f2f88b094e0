"""Llama (Touvron et al. 2023) in Flax Linen, equal to transformers' modeling_llama.py.

Rotary positions (Su et al. 2021), grouped-query attention (Ainslie et al. 2023), RMSNorm, SwiGLU (Shazeer 2020).
Parameters are {"wte", "h_0", ..., "ln_f"}, and a second table "lm_head" where the output layer is not the first;
``scan_layers`` makes one "h" with a leading [L] axis. The cache is an argument and a result, and holds the H_kv heads
alone.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.attention import attention, cache_mask, causal_mask, positions
from rlhf_jax.models.config import LlamaConfig
from rlhf_jax.models.stack import ACTIVATIONS, Cache, Dense, LayerCache, stack

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines of the positions' angles, [B, 1, T, Dh] float32 each


def _dense(config: LlamaConfig, features: int, use_bias: bool) -> Dense:
    init = nn.initializers.normal(config.initializer_range)
    return Dense(features, use_bias=use_bias, dtype=config.compute_dtype, kernel_init=init)


def _norm(config: LlamaConfig) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=config.rms_norm_epsilon, dtype=config.compute_dtype)


def frequencies(config: LlamaConfig) -> np.ndarray:
    """[Dh / 2] float32 angles per position, stretched as ``config.rope_scaling`` says (transformers' rope utils)."""
    inverse = 1.0 / config.rope_theta ** (np.arange(0, config.head_size, 2, dtype=np.float64) / config.head_size)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse.astype(np.float32)
    if scaling.kind == "linear":
        return (inverse / scaling.factor).astype(np.float32)
    waves = scaling.original_max_length * inverse / (2 * math.pi)  # waves in a text of the original length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((waves - low) / (high - low), 0.0, 1.0)
    return (kept * inverse + (1 - kept) * inverse / scaling.factor).astype(np.float32)


def _rotation(config: LlamaConfig, positions: jax.Array) -> Rotation:
    """[B, T] positions -> the rotation of each head's two halves."""
    angles = positions.astype(jnp.float32)[:, None, :, None] * frequencies(config)[None, None, None, :]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """[B, H, T, Dh] turned by its positions, in float32; the dtype is kept."""
    cosine, sine = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cosine + turned * sine).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention over the tokens given, or over a cache that they are written to first."""

    config: LlamaConfig

    def setup(self) -> None:
        config = self.config
        self.q_proj = _dense(config, config.num_heads * config.head_size, config.attention_bias)
        self.k_proj = _dense(config, config.kv_heads * config.head_size, config.attention_bias)
        self.v_proj = _dense(config, config.kv_heads * config.head_size, config.attention_bias)
        self.o_proj = _dense(config, config.hidden_size, config.attention_bias)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        rotation: Rotation,
        cache: LayerCache | None = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        config = self.config
        batch, length, _ = x.shape
        query, key, value = (
            projection(x).reshape(batch, length, -1, config.head_size).transpose(0, 2, 1, 3)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        if cache is not None:
            key = jax.lax.dynamic_update_slice_in_dim(cache[0], key.astype(cache[0].dtype), index, axis=2)
            value = jax.lax.dynamic_update_slice_in_dim(cache[1], value.astype(cache[1].dtype), index, axis=2)
            cache = (key, value)
        # The queries that share a key become more queries of one head: keys and values are never repeated.
        groups = config.num_heads // config.kv_heads
        query = query.reshape(batch, config.kv_heads, groups * length, config.head_size)
        dropout_key = self.make_rng("dropout") if self.has_rng("dropout") else None
        scale = config.head_size**-0.5
        out = attention(
            query, key, value, jnp.tile(mask, (1, 1, groups, 1)), scale, config.attention_dropout, dropout_key
        )
        out = out.reshape(batch, config.num_heads, length, config.head_size)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1)), cache


class MLP(nn.Module):
    config: LlamaConfig

    def setup(self) -> None:
        config = self.config
        self.gate_proj = _dense(config, config.intermediate_size, config.mlp_bias)
        self.up_proj = _dense(config, config.intermediate_size, config.mlp_bias)
        self.down_proj = _dense(config, config.hidden_size, config.mlp_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(ACTIVATIONS[self.config.activation](self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: LlamaConfig

    def setup(self) -> None:
        self.ln_1 = _norm(self.config)
        self.attn = Attention(self.config)
        self.ln_2 = _norm(self.config)
        self.mlp = MLP(self.config)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        rotation: Rotation,
        cache: LayerCache | None = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        attended, cache = self.attn(self.ln_1(x), mask, rotation, cache, index)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), cache


class Llama(nn.Module):
    """Embedding, blocks, final norm and output layer."""

    config: LlamaConfig

    def setup(self) -> None:
        config = self.config
        table_init = nn.initializers.normal(config.initializer_range)
        self.wte = nn.Embed(config.vocab_size, config.hidden_size, embedding_init=table_init)
        self.h = stack(Block, config, (nn.broadcast, nn.broadcast))
        self.ln_f = _norm(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Embed(config.vocab_size, config.hidden_size, embedding_init=table_init)

    def _embed(self, tokens: jax.Array, real: jax.Array) -> jax.Array:
        # A pad may carry any id, also one outside the table; a real token outside it gives NaN rather than a wrong row.
        rows = jnp.take(self.wte.embedding, jnp.where(real, tokens, 0), axis=0)
        return rows.astype(self.config.compute_dtype)

    def hidden(self, tokens: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """[B, T] tokens and mask -> [B, T, D] after the final norm, in the compute dtype."""
        x = self._embed(tokens, attention_mask != 0)
        inputs = (causal_mask(attention_mask), _rotation(self.config, positions(attention_mask)))
        if self.config.scan_layers:
            x, _ = self.h(x, *inputs)
        else:
            for block in self.h:
                x, _ = block(x, *inputs)
        return self.ln_f(x)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] float32, inputs in the compute dtype."""
        dtype = self.config.compute_dtype
        table = (self.wte if self.config.tie_embeddings else self.lm_head).embedding.astype(dtype)
        return jnp.einsum("...d,vd->...v", hidden.astype(dtype), table, preferred_element_type=jnp.float32)

    def decode(
        self, tokens: jax.Array, positions: jax.Array, key_mask: jax.Array, cache: Cache, index: jax.Array | int
    ) -> tuple[jax.Array, Cache]:
        """Writes [B, t] tokens to slots index, ..., index + t - 1 and returns their logits [B, t, V]."""
        mask = cache_mask(key_mask, index, tokens.shape[1])
        real = jax.lax.dynamic_slice_in_dim(key_mask, index, tokens.shape[1], axis=1) != 0
        x = self._embed(tokens, real)
        rotation = _rotation(self.config, positions)
        written = []
        for block, layer in zip(self.h, cache, strict=True):
            x, layer = block(x, mask, rotation, layer, index)
            written.append(layer)
        return self.unembed(self.ln_f(x)), tuple(written)

    def __call__(self, tokens: jax.Array, attention_mask: jax.Array) -> jax.Array:
        return self.unembed(self.hidden(tokens, attention_mask))
