"""GPT-2 (Radford et al. 2019) in Flax Linen, equal to transformers' modeling_gpt2.py.

Parameters are {"wte", "wpe", "h_0", ..., "ln_f"}, or one "h" with a leading [L] axis under ``scan_layers``. Dropout
acts where a "dropout" key is given. The cache is an argument and a result: no mutable collections.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.models.attention import attention, cache_mask, causal_mask, positions
from rlhf_jax.models.config import GPT2Config
from rlhf_jax.models.stack import ACTIVATIONS, Cache, Dense, LayerCache, stack


def _dense(config: GPT2Config, features: int, *, residual: bool = False) -> Dense:
    # GPT-2 scales the 2 L layers that write to the residual stream by 1 / sqrt(2 L).
    std = config.initializer_range / math.sqrt(2 * config.num_layers) if residual else config.initializer_range
    return Dense(features, dtype=config.compute_dtype, kernel_init=nn.initializers.normal(std))


def _layer_norm(config: GPT2Config) -> nn.LayerNorm:
    # The two-pass variance: E[x^2] - E[x]^2 loses digits where the mean is large.
    return nn.LayerNorm(epsilon=config.layer_norm_epsilon, dtype=config.compute_dtype, use_fast_variance=False)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens given, or over a cache that they are written to first."""

    config: GPT2Config

    def setup(self) -> None:
        self.c_attn = _dense(self.config, 3 * self.config.hidden_size)
        self.c_proj = _dense(self.config, self.config.hidden_size, residual=True)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        scale: jax.Array | float,
        cache: LayerCache | None = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        batch, length, width = x.shape
        heads = self.config.num_heads
        # [B, T, 3 D] -> three of [B, H, T, Dh]
        query, key, value = self.c_attn(x).reshape(batch, length, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
        if cache is not None:
            key = jax.lax.dynamic_update_slice_in_dim(cache[0], key.astype(cache[0].dtype), index, axis=2)
            value = jax.lax.dynamic_update_slice_in_dim(cache[1], value.astype(cache[1].dtype), index, axis=2)
            cache = (key, value)
        dropout_key = self.make_rng("dropout") if self.has_rng("dropout") else None
        out = attention(query, key, value, mask, scale, self.config.attention_dropout, dropout_key)
        return self.c_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, width)), cache


class MLP(nn.Module):
    config: GPT2Config

    def setup(self) -> None:
        self.c_fc = _dense(self.config, self.config.mlp_size)
        self.c_proj = _dense(self.config, self.config.hidden_size, residual=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(ACTIVATIONS[self.config.activation](self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: GPT2Config

    def setup(self) -> None:
        self.ln_1 = _layer_norm(self.config)
        self.attn = Attention(self.config)
        self.ln_2 = _layer_norm(self.config)
        self.mlp = MLP(self.config)
        self.dropout = nn.Dropout(self.config.residual_dropout)

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        scale: jax.Array | float,
        cache: LayerCache | None = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        deterministic = not self.has_rng("dropout")
        attended, cache = self.attn(self.ln_1(x), mask, scale, cache, index)
        x = x + self.dropout(attended, deterministic=deterministic)
        x = x + self.dropout(self.mlp(self.ln_2(x)), deterministic=deterministic)
        return x, cache


class GPT2(nn.Module):
    """Embeddings, blocks and final norm; the output layer is the token table."""

    config: GPT2Config

    def setup(self) -> None:
        config = self.config
        table_init = nn.initializers.normal(config.initializer_range)
        self.wte = nn.Embed(config.vocab_size, config.hidden_size, embedding_init=table_init)
        self.wpe = nn.Embed(config.max_length, config.hidden_size, embedding_init=table_init)
        self.h = stack(Block, config, (nn.broadcast, 0))
        self.ln_f = _layer_norm(config)
        self.dropout = nn.Dropout(config.embedding_dropout)

    def _embed(self, tokens: jax.Array, positions: jax.Array, real: jax.Array) -> jax.Array:
        # A pad may carry any id, also one outside the table; a real token outside it gives NaN rather than a wrong row.
        token_rows = jnp.take(self.wte.embedding, jnp.where(real, tokens, 0), axis=0)
        position_rows = jnp.take(self.wpe.embedding, jnp.clip(positions, 0, self.config.max_length - 1), axis=0)
        x = (token_rows + position_rows).astype(self.config.compute_dtype)
        return self.dropout(x, deterministic=not self.has_rng("dropout"))

    def _scales(self) -> list[float]:
        config = self.config
        scale = (config.hidden_size // config.num_heads) ** -0.5 if config.scale_attn_weights else 1.0
        return [
            scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale
            for layer in range(config.num_layers)
        ]

    def hidden(self, tokens: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """[B, T] tokens and mask -> [B, T, D] after the final norm, in the compute dtype."""
        x = self._embed(tokens, positions(attention_mask), attention_mask != 0)
        mask = causal_mask(attention_mask)
        if self.config.scan_layers:
            x, _ = self.h(x, mask, jnp.array(self._scales(), jnp.float32))
        else:
            for block, scale in zip(self.h, self._scales(), strict=True):
                x, _ = block(x, mask, scale)
        return self.ln_f(x)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] float32, inputs in the compute dtype."""
        dtype = self.config.compute_dtype
        table = self.wte.embedding.astype(dtype)
        return jnp.einsum("...d,vd->...v", hidden.astype(dtype), table, preferred_element_type=jnp.float32)

    def decode(
        self, tokens: jax.Array, positions: jax.Array, key_mask: jax.Array, cache: Cache, index: jax.Array | int
    ) -> tuple[jax.Array, Cache]:
        """Writes [B, t] tokens to slots index, ..., index + t - 1 and returns their logits [B, t, V]."""
        mask = cache_mask(key_mask, index, tokens.shape[1])
        real = jax.lax.dynamic_slice_in_dim(key_mask, index, tokens.shape[1], axis=1) != 0
        x = self._embed(tokens, positions, real)
        written = []
        for block, scale, layer in zip(self.h, self._scales(), cache, strict=True):
            x, layer = block(x, mask, scale, layer, index)
            written.append(layer)
        return self.unembed(self.ln_f(x)), tuple(written)

    def __call__(self, tokens: jax.Array, attention_mask: jax.Array) -> jax.Array:
        return self.unembed(self.hidden(tokens, attention_mask))
