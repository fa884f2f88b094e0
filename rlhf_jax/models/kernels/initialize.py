"""The first weights of a network, one small program for each distinct shape.

As a single program, the draws of all weights take XLA's GPU compiler minutes. So the network is
traced with ``Drawn`` boxes in the place of random weights, which hold only keys, and each is drawn
by a program that equal shapes share.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core import meta
from jax import Array

from rlhf_jax.types import Params


@flax.struct.dataclass
class Drawn(meta.AxisMetadata[Array]):
    """Random weights that are not drawn yet; Flax reads them as zeros."""

    key: Array  # [] key; [L - 1] of stacked layers
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)  # of one layer
    std: float = flax.struct.field(pytree_node=False)

    def unbox(self) -> Array:
        return jnp.zeros(self.shape)

    def replace_boxed(self, val: Any) -> Any:
        return val

    def add_axis(self, index: int, params: Any) -> "Drawn":
        return self

    def remove_axis(self, index: int, params: Any) -> "Drawn":
        return self


def normal(std: float) -> Callable[..., Any]:
    """An initializer: normal with mean 0 and this standard deviation, drawn by ``weights``."""
    return lambda key, shape, dtype=jnp.float32: Drawn(key, tuple(shape), std)


def weights(boxed: Params) -> Params:
    """The parameters with ``Drawn`` weights drawn, the largest first: a model that does not fit
    fails before memory is filled.
    """
    leaves, tree = jax.tree.flatten(boxed, is_leaf=is_drawn)
    drawn = list(leaves)
    numbers = [number for number, leaf in enumerate(leaves) if is_drawn(leaf)]
    for number in sorted(numbers, key=lambda number: -_size(leaves[number])):
        leaf = leaves[number]
        drawn[number] = _drawn(leaf.key, leaf.shape, leaf.std)
        if not isinstance(leaf.key, jax.core.Tracer):
            jax.block_until_ready(drawn[number])  # its error comes late otherwise
    return jax.tree.unflatten(tree, drawn)


def _size(leaf: Drawn) -> int:
    return math.prod((*leaf.key.shape, *leaf.shape))


def is_drawn(leaf: Any) -> bool:
    """Whether it is a weight that is not drawn yet."""
    return isinstance(leaf, Drawn)


@partial(jax.jit, static_argnames=("shape", "std"))
def _drawn(key: Array, shape: tuple[int, ...], std: float) -> Array:
    draw = partial(nn.initializers.normal(std), shape=shape)
    return draw(key) if key.ndim == 0 else jax.lax.map(draw, key)
