"""GPT-2 (Radford et al. 2019) in Flax Linen, equal to transformers' modeling_gpt2.py.

It adds the position table "wpe" to the parameters of ``stack.Transformer``; the output layer is the
token table.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from rlhf_jax.models import stack
from rlhf_jax.models.config import GPT2Config
from rlhf_jax.models.stack import ACTIVATIONS, Dense, Norm
from rlhf_jax.parallel.sharding import tensor_parts


def _residual(config: GPT2Config) -> Dense:
    """A layer that writes to the residual stream. GPT-2 scales the 2 L of them by 1 / sqrt(2 L)."""
    std = config.initializer_range / math.sqrt(2 * config.num_layers)
    return Dense(config, (config.hidden_size,), std=std)


class _Attention(stack.Attention):
    """Multi-head self-attention."""

    config: GPT2Config

    def setup(self) -> None:
        self.c_attn = Dense(self.config, (3, self.config.hidden_size))
        self.c_proj = _residual(self.config)

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        # [B, T, 3, D] -> three of [B, H, T, Dh]
        fused = self.c_attn(x)
        heads = (*x.shape[:2], self.config.num_heads, self.config.head_size)
        if tensor_parts() == 1:
            # As one axis, XLA puts the three gradients together once, not thrice.
            fused = fused.reshape(*x.shape[:2], -1)
        thirds = jnp.split(fused, 3, axis=2)
        query, key, value = (third.reshape(heads).swapaxes(1, 2) for third in thirds)
        return query, key, value

    def output(self, mixed: Array) -> Array:
        return self.c_proj(mixed)


class _MLP(nn.Module):
    config: GPT2Config

    def setup(self) -> None:
        width = self.config.intermediate_size or 4 * self.config.hidden_size
        self.c_fc = Dense(self.config, (width,))
        self.c_proj = _residual(self.config)

    def __call__(self, x: Array) -> Array:
        activation = ACTIVATIONS[self.config.activation]
        return self.c_proj(activation(self.c_fc(x)))


class _Block(stack.Block):
    config: GPT2Config

    def setup(self) -> None:
        self.attn = _Attention(self.config)
        self.mlp = _MLP(self.config)
        self.add_norms(self.config.residual_dropout)


class GPT2(stack.Transformer):
    config: GPT2Config

    def setup(self) -> None:
        config = self.config
        self.wte = stack.table(config, config.vocab_size)
        self.wpe = stack.table(config, config.max_length)
        self.ln_f = Norm(config)
        self.add_layers(_Block)
        self.dropout = nn.Dropout(
            config.embedding_dropout, deterministic=not self.has_rng("dropout")
        )

    def embed(self, tokens: Array, positions: Array, real: Array) -> Array:
        in_table = jnp.clip(positions, 0, self.config.max_length - 1)
        position_rows = jnp.take(self.wpe.embedding, in_table, axis=0)
        x = (self.token_rows(tokens, real) + position_rows).astype(self.config.compute_dtype)
        return self.dropout(x)

    def scales(self) -> list[float]:
        config = self.config
        scale = config.head_size**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            return [scale / (i + 1) for i in range(config.num_layers)]
        return [scale] * config.num_layers
