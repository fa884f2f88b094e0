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
from flax.traverse_util import flatten_dict
from jax import Array, lax

from rlhf_jax.models.config import GATE_GAIN, DecoderConfig
from rlhf_jax.models.kernels import initialize
from rlhf_jax.models.stack import ACTIVATIONS, ROUTER, Dense, Given, scaled
from rlhf_jax.parallel.sharding import cut
from rlhf_jax.types import Mean, Params


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
        rows, kernel = promote_dtype(rows, kernel, dtype=config.compute_dtype)
        out = lax.ragged_dot(rows, kernel, sizes)
        if self.has_variable("params", "kernel_scale"):
            out = scaled(out, self.variables["params"]["kernel_scale"][numbers])
        if config.mlp_bias:
            bias = self.param("bias", nn.initializers.zeros, (number, self.features))
            out += bias.astype(out.dtype)[numbers]
        if self.has_variable("params", "lora_a"):
            adapter = self.variables["params"]
            a, b = promote_dtype(adapter["lora_a"], adapter["lora_b"], dtype=rows.dtype)
            scales = lax.stop_gradient(adapter["lora_scale"]).astype(rows.dtype)[numbers]
            inner = lax.ragged_dot(rows, a, sizes)
            out += scales[:, None] * lax.ragged_dot(inner, b, sizes)
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
        rows = jnp.take(tokens, order // config.experts_per_token, axis=0)
        sorted_numbers = jnp.take(numbers, order)
        out = self.experts(rows, sizes.astype(jnp.int32), sorted_numbers)
        back = jnp.argsort(order)
        by_choice = jnp.take(out, back, axis=0)
        by_token = by_choice.reshape(*weights.shape, -1)
        mixed = jnp.einsum("nk,nkd->nd", weights.astype(x.dtype), by_token)
        return cut(mixed.reshape(x.shape), "data", "fsdp")


def balance(config: DecoderConfig, routed: Params, attention_mask: Array) -> dict[str, Mean]:
    """How equally the experts share the real tokens of a pass, as the means of a loss.

    With f_e the tokens of expert e, in all layers, per token and layer, and P_e the mean of its
    share before the choice, the loss is E sum_e f_e P_e (Fedus et al. 2021, equation 4, summed over
    the k choices as transformers does): k if all are equally busy. f has no gradient.

    Args:
        routed: the collection ``ROUTER`` of the pass.
        attention_mask: [B, T], not 0 for real tokens.

    Returns:
        "router/aux_loss", and "router/max_load", the tokens of the busiest expert over those of an
        equal share. Both are functions of all rows of the pass together; means over several passes,
        such as microbatches, weigh each by its real tokens.
    """
    number = config.num_experts or 1
    real = (attention_mask != 0).reshape(-1).astype(jnp.float32)  # [N]
    tokens = jnp.sum(real)
    load = jnp.zeros(number)
    share = jnp.zeros(number)
    entries = 0
    for (*_, name), (leaf,) in flatten_dict(routed).items():
        layers = leaf.reshape(-1, len(real), leaf.shape[-1])  # stacked ones, or one
        if name == "shares":
            entries += len(layers)
            share += jnp.einsum("lne,n->e", layers, real, precision="highest")
        else:
            weights = jnp.broadcast_to(real[None, :, None], layers.shape)
            load += jnp.bincount(layers.reshape(-1), weights.reshape(-1), length=number)
    per_expert = jnp.maximum(entries * tokens, 1.0)
    load /= per_expert
    share /= per_expert
    loss = number * jnp.sum(load * share)
    busiest = number * jnp.max(load) / config.experts_per_token
    found = {"router/aux_loss": loss, "router/max_load": busiest}
    return {name: Mean(value * tokens, tokens) for name, value in found.items()}
