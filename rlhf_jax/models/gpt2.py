"""GPT-2 (Radford et al. 2019) in Flax Linen, equal to transformers' modeling_gpt2.py.

It adds the position table "wpe" to the parameters of ``stack.Transformer``; the output layer is the
token table.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf_jax.models import stack
from rlhf_jax.models.config import GPT2Config
from rlhf_jax.models.stack import ACTIVATIONS, Dense, Norm
from rlhf_jax.sharding import parts


def _dense(config: GPT2Config, features: int | tuple[int, int], *, residual: bool = False) -> Dense:
    # GPT-2 scales the 2 L layers that write to the residual stream by 1 / sqrt(2 L).
    std = (
        config.initializer_range / math.sqrt(2 * config.num_layers)
        if residual
        else config.initializer_range
    )
    return Dense(features, dtype=config.compute_dtype, kernel_init=nn.initializers.normal(std))


class _Attention(stack.Attention):
    """Multi-head self-attention."""

    config: GPT2Config

    def setup(self) -> None:
        self.c_attn = _dense(self.config, (3, self.config.hidden_size))
        self.c_proj = _dense(self.config, self.config.hidden_size, residual=True)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        # [B, T, 3, D] -> three of [B, H, T, Dh]
        fused, shape = self.c_attn(x), (*x.shape[:2], self.config.num_heads, self.config.head_size)
        if (
            parts("tensor") == 1
        ):  # as one axis, XLA's CPU compiler puts the three gradients together once, not thrice
            fused = fused.reshape(*x.shape[:2], -1)
        query, key, value = (
            part.reshape(shape).swapaxes(1, 2) for part in jnp.split(fused, 3, axis=2)
        )
        return query, key, value

    def output(self, mixed: jax.Array) -> jax.Array:
        return self.c_proj(mixed)


class _MLP(nn.Module):
    config: GPT2Config

    def setup(self) -> None:
        self.c_fc = _dense(
            self.config, self.config.intermediate_size or 4 * self.config.hidden_size
        )
        self.c_proj = _dense(self.config, self.config.hidden_size, residual=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(ACTIVATIONS[self.config.activation](self.c_fc(x)))


class _Block(stack.Block):
    config: GPT2Config

    def setup(self) -> None:
        self.attn, self.mlp = _Attention(self.config), _MLP(self.config)
        self.add_norms(self.config.residual_dropout)


class GPT2(stack.Transformer):
    config: GPT2Config

    def setup(self) -> None:
        config = self.config
        self.wte, self.wpe = (
            stack.table(config, config.vocab_size),
            stack.table(config, config.max_length),
        )
        self.ln_f = Norm(config)
        self.add_layers(_Block)
        self.dropout = nn.Dropout(config.embedding_dropout)

    def embed(self, tokens: jax.Array, positions: jax.Array, real: jax.Array) -> jax.Array:
        position_rows = jnp.take(
            self.wpe.embedding, jnp.clip(positions, 0, self.config.max_length - 1), axis=0
        )
        x = (self.token_rows(tokens, real) + position_rows).astype(self.config.compute_dtype)
        return self.dropout(x, deterministic=not self.has_rng("dropout"))

    def scales(self) -> list[float]:
        config = self.config
        scale = config.head_size**-0.5 if config.scale_attn_weights else 1.0
        return [
            scale / (i + 1 if config.scale_attn_by_inverse_layer_idx else 1)
            for i in range(config.num_layers)
        ]
