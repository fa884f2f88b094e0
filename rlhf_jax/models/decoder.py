"""The decoder of Llama and its relatives in Flax Linen, equal to transformers' models; the config's
attributes say in what a family differs.

Rotary positions (Su et al. 2021), grouped-query attention (Ainslie et al. 2023), RMSNorm, SwiGLU
(Shazeer 2020). It adds a table "lm_head" to the parameters of ``stack.Transformer`` unless the
output layer is the token table.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from rlhf_jax.models import kernels, rope, stack
from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.mlp import MLP, MixtureOfExperts
from rlhf_jax.models.stack import Dense, Norm, Rotation


class _Attention(stack.Attention):
    """Grouped-query self-attention."""

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        width, kv_width = self.widths()
        has_bias = config.attention_bias or config.qkv_bias
        if config.qkv == "apart":
            self.q_proj = Dense(config, (width,), has_bias)
            self.k_proj = Dense(config, (kv_width,), has_bias)
            self.v_proj = Dense(config, (kv_width,), has_bias)
        else:
            self.qkv_proj = Dense(config, (width + 2 * kv_width,), has_bias)
        self.o_proj = Dense(config, (config.hidden_size,), config.attention_bias)
        if config.qk_norm:
            self.q_norm = Norm(config)
            self.k_norm = Norm(config)
        if config.sinks:
            initial = nn.initializers.normal(config.initializer_range)
            self.sinks = self.param("sinks", initial, (config.num_heads,))

    @nn.nowrap
    def widths(self) -> tuple[int, int]:
        """Columns of all heads of queries, and of keys."""
        size = self.config.head_size
        return self.config.num_heads * size, self.config.kv_heads * size

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        config = self.config
        batch, length, _ = x.shape

        def by_head(projected: Array) -> Array:
            heads = projected.reshape(batch, length, -1, config.head_size)
            return heads.swapaxes(1, 2)

        query, key, value = self.projected(x)
        if config.qk_norm == "width":
            query = self.q_norm(query)
            key = self.k_norm(key)
        query = by_head(query)
        key = by_head(key)
        if config.qk_norm == "head":
            query = self.q_norm(query)
            key = self.k_norm(key)
        return query, key, by_head(value)

    def projected(self, x: Array) -> tuple[Array, Array, Array]:
        """[B, T, H Dh] queries, [B, T, H_kv Dh] keys and values."""
        config = self.config
        if config.qkv == "apart":
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        joined = self.qkv_proj(x)
        if config.qkv == "joined":
            width, kv_width = self.widths()
            query, key, value = jnp.split(joined, [width, width + kv_width], axis=-1)
            return query, key, value
        by_head = joined.reshape(*x.shape[:2], config.num_heads, 3, config.head_size)
        thirds = jnp.moveaxis(by_head, 3, 0)
        query, key, value = thirds.reshape(3, *x.shape[:2], -1)
        return query, key, value

    def sink_scores(self, kv_heads: int) -> Array | None:
        return self.sinks.reshape(kv_heads, -1) if self.config.sinks else None

    def output(self, mixed: Array) -> Array:
        return self.o_proj(mixed)


class _Block(stack.Block):
    config: DecoderConfig
    has_experts: bool = False

    def setup(self) -> None:
        self.attn = _Attention(self.config)
        self.mlp = (MixtureOfExperts if self.has_experts else MLP)(self.config)
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

    def layer_options(self, number: int) -> dict[str, Any]:
        return {"has_experts": self.config.sparse_layers[number]}

    def embed(self, tokens: Array, positions: Array, real: Array) -> Array:
        rows = self.token_rows(tokens, real)
        multiplier = self.config.embedding_multiplier
        if multiplier != 1.0:
            rows = rows * jnp.asarray(multiplier, rows.dtype)
        return rows.astype(self.config.compute_dtype)

    def scales(self) -> list[float]:
        scale = self.config.attention_scale
        return [scale] * self.config.num_layers

    def rotation(self, positions: Array, is_local: bool) -> Rotation:
        places = positions.astype(jnp.float32)[:, None, :, None]
        frequencies = rope.frequencies(self.config, is_local)
        angles = places * frequencies[None, None, None]
        rotation = jnp.stack([jnp.cos(angles), jnp.sin(angles)])
        factor = rope.attention_factor(self.config, is_local)
        if factor != 1.0:
            rotation = rotation * factor
        return kernels.computed_once(rotation)

    def query_scale(self, positions: Array) -> Array | None:
        scaling = self.config.rope_scaling
        if scaling is None or scaling.query_beta is None:
            return None
        lengths = jnp.floor(positions / scaling.original_max_length)
        growth = scaling.query_beta * jnp.log1p(lengths)
        return (1 + growth)[:, None, :, None]
