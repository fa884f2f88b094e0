"""What the families share: linear layers, the blocks one after the other or in a scan over depth, and their cache."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from rlhf_jax.models.config import LlamaConfig, ModelConfig
from rlhf_jax.types import Params

LayerCache = tuple[jax.Array, jax.Array]  # keys and values of one layer, [B, H, S, Dh] each
Cache = tuple[LayerCache, ...]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Dense(nn.Dense):
    """``nn.Dense``, plus ``lora_scale * (x @ lora_a) @ lora_b`` where these lie beside the kernel (``lora.attach``)."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        out = super().__call__(inputs)
        if not self.has_variable("params", "lora_a"):
            return out
        adapter: list[Any] = [self.get_variable("params", name) for name in ("lora_a", "lora_b", "lora_scale")]
        x, a, b = promote_dtype(inputs, *adapter[:2], dtype=self.dtype)
        return out + jax.lax.stop_gradient(adapter[2]).astype(out.dtype) * ((x @ a) @ b)


def stack(block: Any, config: ModelConfig, in_axes: tuple[Any, ...]) -> Any:
    """The layers of ``config``: a list of blocks, or under ``scan_layers`` one module with parameters [L, ...].

    Args:
        block: a Linen module class called with ``(x, *inputs)`` that returns ``(x, something)``.
        in_axes: of the inputs under scan: ``nn.broadcast`` for what every layer gets, 0 for a value of each layer.
    """
    # Inside a scan nothing can be merged with the forward pass, so the barrier against that is not needed.
    block = nn.remat(block, prevent_cse=not config.scan_layers) if config.remat else block
    if not config.scan_layers:
        return [block(config) for _ in range(config.num_layers)]
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=config.num_layers,
    )(config)


def unstack_layers(params: Params, num_layers: int) -> Params:
    """The parameters of ``scan_layers`` as those of the unrolled model: "h" [L, ...] becomes "h_0", "h_1", ..."""
    layers = {
        f"h_{layer}": jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["h"]) for layer in range(num_layers)
    }
    return {name: leaf for name, leaf in params.items() if name != "h"} | layers


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """An empty cache: keys and values of each layer, [B, H, S, Dh] (Llama: H_kv heads) in the compute dtype."""
    if isinstance(config, LlamaConfig):
        heads, size = config.kv_heads, config.head_size
    else:
        heads, size = config.num_heads, config.hidden_size // config.num_heads
    shape = (batch, heads, length, size)
    return tuple(
        (jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype))
        for _ in range(config.num_layers)
    )
