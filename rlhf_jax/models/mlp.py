"""The MLP of the decoders: one for all tokens, or a mixture of experts (Shazeer et al. 2017), where
a router sends each token to a few of E MLPs.

A token's experts depend on that token alone: none has a capacity, so a batch does not change what a
row computes. The router's scores are float32 in every compute dtype.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array, lax

from rlhf_jax.models.config import GATE_GAIN, DecoderConfig
from rlhf_jax.models.kernels import grouped, initialize, quantization
from rlhf_jax.models.stack import ACTIVATIONS, ROUTER, Dense, Given, scaled
from rlhf_jax.parallel.sharding import cut, row_parts
from rlhf_jax.types import Params


def gated(layers: Any, x: Array, *more: Array) -> Array:
    """act(gate) * up of x [..., D], by the layers "gate_proj" and "up_proj", or "gate_up_proj",
    which may take ``more`` arguments.
    """
    config = layers.config
    if config.gate_up == "apart":
        gate = layers.gate_proj(x, *more)
        up = layers.up_proj(x, *more)
    else:
        both = layers.gate_up_proj(x, *more)
        if config.gate_up == "joined":
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate = both[..., ::2]
            up = both[..., 1::2]
    if config.gate_limit is None:
        activation = ACTIVATIONS[config.activation]
        return activation(gate) * up
    gate = jnp.minimum(gate, config.gate_limit)
    up = jnp.clip(up, -config.gate_limit, config.gate_limit)
    return gate * jax.nn.sigmoid(GATE_GAIN * gate) * (up + 1)


class MLP(nn.Module):
    """[B, T, D] -> [B, T, D], gated (Shazeer 2020) or not."""

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        width = config.intermediate_size
        if not config.gated:
            self.up_proj = Dense(config, (width,), config.mlp_bias)
        elif config.gate_up == "apart":
            self.gate_proj = Dense(config, (width,), config.mlp_bias)
            self.up_proj = Dense(config, (width,), config.mlp_bias)
        else:
            self.gate_up_proj = Dense(config, (2 * width,), config.mlp_bias)
        self.down_proj = Dense(config, (config.hidden_size,), config.mlp_bias)

    def __call__(self, x: Array) -> Array:
        if self.config.gated:
            return self.down_proj(gated(self, x))
        activation = ACTIVATIONS[self.config.activation]
        return self.down_proj(activation(self.up_proj(x)))


class Router(Given):
    """[N, D] tokens -> weights [N, k] float32 and numbers [N, k] of their experts, by "kernel"
    [D, E] and, with ``router_bias``, "bias" [E]. Its collection ``ROUTER``, if that is mutable,
    gets the "shares" [N, E] of all experts and the "chosen" numbers.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: Array) -> tuple[Array, Array]:
        config = self.config
        number = config.num_experts
        initial = initialize.normal(config.initializer_range)
        kernel = self.param("kernel", initial, (tokens.shape[-1], number))
        tokens, kernel = promote_dtype(tokens, kernel, dtype=jnp.float32)
        scores = jnp.matmul(tokens, kernel, precision="highest")
        if config.router_bias:
            bias = self.param("bias", nn.initializers.zeros, (number,))
            scores += jnp.broadcast_to(bias.astype(jnp.float32), scores.shape)
        shares = jax.nn.softmax(scores, axis=-1)
        weights, chosen = lax.top_k(shares, config.experts_per_token)
        if config.normalize_experts:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        self.sow(ROUTER, "shares", shares)
        self.sow(ROUTER, "chosen", chosen)
        return weights, chosen


# The backward pass takes each block's kernel again: kept, they would be a second copy of all.
_product = jax.checkpoint(grouped.product, static_argnums=3)


@partial(jax.checkpoint, static_argnums=3)
def _product_of_few_bits(rows: Array, held: Params, experts: Array, cut_axis: int) -> Array:
    """Rows times kernels of few bits, without columns' scales; the backward pass repeats it."""
    weights = quantization.weights(held, 1, rows.dtype)
    return grouped.product(rows, weights, experts, cut_axis)


class Grouped(Given):
    """Blocks of rows [P, J, R, D] (``kernels.grouped``), times each expert's own "kernel" [E, D,
    F], plus, with ``mlp_bias``, its "bias" [E, F], and plus the term of its adapter if there are
    such (``lora.attach``).
    """

    config: DecoderConfig
    features: int
    cut_axis: int  # of the kernel, over ``tensor``

    @nn.compact
    def __call__(self, rows: Array, experts: Array) -> Array:
        """experts: [P, J] of each block."""
        config = self.config
        number = config.num_experts
        initial = initialize.normal(config.initializer_range)
        kernel = self.param("kernel", initial, (number, rows.shape[-1], self.features))
        held = quantization.held(self.variables["params"])
        if held:
            (rows,) = promote_dtype(rows, dtype=config.compute_dtype)
            out = _product_of_few_bits(rows, held, experts, self.cut_axis)
            if quantization.COLUMNS in held:
                columns = held[quantization.COLUMNS]
                own_columns = columns[experts]
                out = scaled(out, own_columns[:, :, None])
        else:
            rows, kernel = promote_dtype(rows, kernel, dtype=config.compute_dtype)
            out = _product(rows, kernel, experts, self.cut_axis)
        if config.mlp_bias:
            bias = self.param("bias", nn.initializers.zeros, (number, self.features))
            bias = bias.astype(out.dtype)
            own_bias = bias[experts]
            out += own_bias[:, :, None]
        if self.has_variable("params", "lora_a"):
            adapter = self.variables["params"]
            a, b = promote_dtype(adapter["lora_a"], adapter["lora_b"], dtype=rows.dtype)
            scale = lax.stop_gradient(adapter["lora_scale"])
            scales = scale.astype(rows.dtype)
            inner = _product(rows, a, experts, None)
            term = _product(inner, b, experts, None)
            own_scales = scales[experts]
            out += own_scales[:, :, None, None] * term
        return out


class _Experts(nn.Module):
    """The MLPs of all experts, on blocks of rows."""

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        width = config.expert_size or config.intermediate_size
        if config.gate_up == "apart":
            self.gate_proj = Grouped(config, width, 2)
            self.up_proj = Grouped(config, width, 2)
        else:
            self.gate_up_proj = Grouped(config, 2 * width, 2)
        self.down_proj = Grouped(config, config.hidden_size, 1)

    def __call__(self, rows: Array, experts: Array) -> Array:
        inner = gated(self, rows, experts)
        return self.down_proj(inner, experts)


class MixtureOfExperts(nn.Module):
    """[B, T, D] -> [B, T, D]: the weighted sum of the chosen experts' MLPs of each token.

    On a mesh each part of the rows is computed on its own devices.
    """

    config: DecoderConfig

    def setup(self) -> None:
        self.router = Router(self.config)
        self.experts = _Experts(self.config)

    def __call__(self, x: Array) -> Array:
        config = self.config
        width = x.shape[-1]
        tokens = x.reshape(-1, width)
        weights, chosen = self.router(tokens)
        parts = row_parts(len(x))
        of_parts = tokens.reshape(parts, -1, width)
        of_parts = cut(of_parts, "data", "fsdp")
        numbers = chosen.reshape(parts, -1, config.experts_per_token)
        blocks = grouped.blocks_of(numbers, config.num_experts or 1)
        rows = grouped.taken(of_parts, blocks.sources)
        in_blocks = rows.reshape(*blocks.experts.shape, -1, width)
        out = self.experts(in_blocks, blocks.experts)
        out = out.reshape(rows.shape)
        by_choice = grouped.taken(out, blocks.places)
        by_token = by_choice.reshape(*weights.shape, width)
        weights = weights.astype(x.dtype)
        mixed = jnp.einsum("nk,nkd->nd", weights, by_token)
        mixed = mixed.reshape(x.shape)
        return cut(mixed, "data", "fsdp")
