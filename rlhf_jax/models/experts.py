"""Mixtures of experts (Shazeer et al. 2017): a router sends each token to a few of E MLPs.

A token's experts depend on that token alone: none has a capacity, so a batch does not change what a
row computes. The router's scores are float32 in every compute dtype.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array, lax

from rlhf_jax.models.config import DecoderConfig
from rlhf_jax.models.mlp import gated
from rlhf_jax.models.stack import Given
from rlhf_jax.sharding import cut


class Router(Given):
    """[N, D] tokens -> weights [N, k] float32 and numbers [N, k] of their experts, by "kernel"
    [D, E] and, with ``router_bias``, "bias" [E].
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens: Array) -> tuple[Array, Array]:
        config = self.config
        number = config.num_experts
        initial = nn.initializers.normal(config.initializer_range)
        kernel = self.param("kernel", initial, (tokens.shape[-1], number))
        scores = jnp.matmul(
            tokens.astype(jnp.float32), kernel.astype(jnp.float32), precision="highest"
        )
        if config.router_bias:
            scores += self.param("bias", nn.initializers.zeros, (number,)).astype(jnp.float32)
        weights, chosen = lax.top_k(jax.nn.softmax(scores, axis=-1), config.experts_per_token)
        if config.normalize_experts:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return weights, chosen


class Grouped(Given):
    """Rows in the order of their experts [M, D], times each expert's own "kernel" [E, D, F], plus,
    with ``mlp_bias``, its "bias" [E, F].
    """

    config: DecoderConfig
    features: int

    @nn.compact
    def __call__(self, rows: Array, sizes: Array, numbers: Array) -> Array:
        """sizes: [E] rows of each expert; numbers: [M] each row's expert."""
        config = self.config
        number = config.num_experts
        initial = nn.initializers.normal(config.initializer_range)
        kernel = self.param("kernel", initial, (number, rows.shape[-1], self.features))
        rows, kernel = promote_dtype(rows, kernel, dtype=config.compute_dtype)
        out = lax.ragged_dot(rows, kernel, sizes)
        if config.mlp_bias:
            bias = self.param("bias", nn.initializers.zeros, (number, self.features))
            out += bias.astype(out.dtype)[numbers]
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
        return self.down_proj(gated(self, rows, sizes, numbers), sizes, numbers)


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
        numbers = chosen.reshape(-1)
        order = jnp.argsort(numbers, stable=True)
        sizes = jnp.bincount(numbers, length=config.num_experts or 1).astype(jnp.int32)
        rows = jnp.take(tokens, order // config.experts_per_token, axis=0)
        out = self.experts(rows, sizes, jnp.take(numbers, order))
        by_token = jnp.take(out, jnp.argsort(order), axis=0).reshape(*weights.shape, -1)
        mixed = jnp.einsum("nk,nkd->nd", weights.astype(x.dtype), by_token)
        return cut(mixed.reshape(x.shape), "data", "fsdp")
