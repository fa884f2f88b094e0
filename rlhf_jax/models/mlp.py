"""The MLP of the decoders."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.models.config import GATE_GAIN, DecoderConfig
from rlhf_jax.models.stack import ACTIVATIONS, Dense


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
        return self.down_proj(ACTIVATIONS[self.config.activation](self.up_proj(x)))
