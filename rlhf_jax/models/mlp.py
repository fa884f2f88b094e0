"""The MLP of the decoders: one for all tokens, or a mixture of experts (Shazeer et al. 2017), where
a router sends each token to a few of E MLPs.

A token's experts depend on that token alone: none has a capacity, so a batch does not change what a
row computes. The router's scores are float32 in every compute dtype.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array, lax

from rlhf_jax.models.config import GATE_GAIN, DecoderConfig
from rlhf_jax.models.kernels import initialize, quantization
from rlhf_jax.models.stack import ACTIVATIONS, ROUTER, Dense, Given, scaled
from rlhf_jax.parallel.sharding import cut
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


@jax.checkpoint
def _dot_of_few_bits(rows: Array, held: Params, sizes: Array) -> Array:
    """Rows times their experts' kernels of few bits, but for the scales of columns; the weights are
    computed again in the backward pass.
    """
    return lax.ragged_dot(rows, quantization.weights(held, 1, rows.dtype), sizes)


class Grouped(Given):
    """Rows in the order of their experts [M, D], times each expert's own "kernel" [E, D, F], plus,
    with ``mlp_bias``, its "bias" [E, F], and plus the term of its adapter if there are such
    (``lora.attach``).
    """

    config: DecoderConfig
    features: int

    @nn.compact
    def __call__(self, rows: Array, sizes: Array, numbers: Array) -> Array:
        """sizes: [E] rows of each expert; numbers: [M] each row's expert."""
        config = self.config
        number = config.num_experts
        initial = initialize.normal(config.initializer_range)
        kernel = self.param("kernel", initial, (number, rows.shape[-1], self.features))
        held = quantization.held(self.variables["params"])
        if held:
            (rows,) = promote_dtype(rows, dtype=config.compute_dtype)
            out = _dot_of_few_bits(rows, held, sizes)
            if quantization.COLUMNS in held:
                columns = held[quantization.COLUMNS]
                out = scaled(out, columns[numbers])
        else:
            rows, kernel = promote_dtype(rows, kernel, dtype=config.compute_dtype)
            out = lax.ragged_dot(rows, kernel, sizes)
        if config.mlp_bias:
            bias = self.param("bias", nn.initializers.zeros, (number, self.features))
            out += bias.astype(out.dtype)[numbers]
        if self.has_variable("params", "lora_a"):
            adapter = self.variables["params"]
            a, b = promote_dtype(adapter["lora_a"], adapter["lora_b"], dtype=rows.dtype)
            scale = lax.stop_gradient(adapter["lora_scale"])
            scales = scale.astype(rows.dtype)
            inner = lax.ragged_dot(rows, a, sizes)
            term = lax.ragged_dot(inner, b, sizes)
            out += scales[numbers][:, None] * term
        return out


class _Experts(nn.Module):
    """The MLPs of all experts, on rows in the order of their experts."""

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        width = config.expert_size or config.intermediate_size
        if config.gate_up == "apart":
            self.gate_proj = Grouped(config, width)
            self.up_proj = Grouped(config, width)
        else:
            self.gate_up_proj = Grouped(config, 2 * width)
        self.down_proj = Grouped(config, config.hidden_size)

    def __call__(self, rows: Array, sizes: Array, numbers: Array) -> Array:
        inner = gated(self, rows, sizes, numbers)
        return self.down_proj(inner, sizes, numbers)


class MixtureOfExperts(nn.Module):
    """[B, T, D] -> [B, T, D]: the weighted sum of the chosen experts' MLPs of each token."""

    config: DecoderConfig

    def setup(self) -> None:
        self.router = Router(self.config)
        self.experts = _Experts(self.config)

    def __call__(self, x: Array) -> Array:
        config = self.config
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(tokens)
        numbers = chosen.reshape(-1)  # [N k] experts, those of a token beside each other
        order = jnp.argsort(numbers, stable=True)
        sizes = jnp.bincount(numbers, length=config.num_experts or 1)
        places = order // config.experts_per_token
        rows = jnp.take(tokens, places, axis=0)
        sorted_numbers = jnp.take(numbers, order)
        sizes = sizes.astype(jnp.int32)
        out = self.experts(rows, sizes, sorted_numbers)
        back = jnp.argsort(order)
        by_choice = jnp.take(out, back, axis=0)
        by_token = by_choice.reshape(*weights.shape, -1)
        mixed = jnp.einsum("nk,nkd->nd", weights.astype(x.dtype), by_token)
        mixed = mixed.reshape(x.shape)
        return cut(mixed, "data", "fsdp")
