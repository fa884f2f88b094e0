"""Frozen kernels of few bits: the numbers of a kernel and the scales that make weights of them.

A kernel has one or more output axes behind its input axis. "int8" has a float32 scale for each
output column (absmax, as in LLM.int8; Dettmers et al. 2022). "int4" and "nf4" have one for each
block of ``BLOCK`` weights that follow each other along the input axis (QLoRA; Dettmers et al.
2023); its scales are not quantized a second time. "bfloat16" has none.
"""

from itertools import pairwise
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax.types import Params

Form = Literal["bfloat16", "int8", "int4", "nf4"]
COLUMNS = "kernel_scale"  # [*out], beside a kernel [in, *out] of int8
BLOCKS = "block_scale"  # [ceil(in / BLOCK), *out], beside one of int4 or of codes of NF4
BLOCK = 64

# Quantiles of a normal distribution over -1, ..., 1, with an exact 0 (Dettmers et al. 2023,
# appendix E). A code, uint4, is a level's place in this tuple.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def quantized(kernel: Array, axis: int, form: Form) -> Params:
    """The leaves that take a kernel's place: "kernel", of its shape, and its scales if it has any.

    Args:
        axis: the input axis; axes before it are those of layers or experts.
    """
    if form == "bfloat16":
        return {"kernel": kernel.astype(jnp.bfloat16)}
    weights = kernel.astype(jnp.float32)
    if form == "int8":
        scale = _scale(weights, axis) / 127
        scale = jnp.where(scale > 0, scale, 1.0)
        numbers = jnp.round(weights / jnp.expand_dims(scale, axis))
        return {"kernel": numbers.astype(jnp.int8), COLUMNS: scale}
    size = weights.shape[axis]
    missing = [(0, 0)] * weights.ndim
    missing[axis] = (0, -size % BLOCK)
    filled = jnp.pad(weights, missing)
    shape = (*weights.shape[:axis], -1, BLOCK, *weights.shape[axis + 1 :])
    largest = _scale(filled.reshape(shape), axis + 1)
    if form == "int4":
        scale = jnp.where(largest > 0, largest / 7.5, 1.0)
        numbers = jnp.round(weights / _spread(scale, axis, size))
        return {"kernel": jnp.clip(numbers, -8, 7).astype(jnp.int4), BLOCKS: scale}
    scale = jnp.where(largest > 0, largest, 1.0)
    shares = weights / _spread(scale, axis, size)
    middles = [(low + high) / 2 for low, high in pairwise(NF4)]
    codes = sum((shares > middle).astype(jnp.uint8) for middle in middles)
    return {"kernel": jnp.asarray(codes).astype(jnp.uint4), BLOCKS: scale}


def held(leaves: Params) -> Params:
    """The kernel of a layer and its scales, if it has scales; else nothing."""
    if COLUMNS not in leaves and BLOCKS not in leaves:
        return {}
    return {name: leaves[name] for name in ("kernel", COLUMNS, BLOCKS) if name in leaves}


def weights(held: Params, axis: int, dtype: Any) -> Array:
    """The weights of a kernel in a dtype, those of int8 in units of their columns' scales."""
    kernel = held["kernel"]
    if BLOCKS not in held:
        return kernel.astype(dtype)
    numbers = kernel.astype(jnp.float32)
    if kernel.dtype == jnp.uint4:
        numbers = jnp.array(NF4, jnp.float32)[kernel.astype(jnp.uint8)]
    scale = _spread(held[BLOCKS], axis, kernel.shape[axis])
    return (numbers * scale).astype(dtype)


def dequantized(held: Params, axis: int) -> Array:
    """The float32 weights of ``quantized``."""
    found = weights(held, axis, jnp.float32)
    if COLUMNS in held:
        found *= jnp.expand_dims(held[COLUMNS], axis)
    return found


def _scale(weights: Array, axis: int) -> Array:
    return jnp.max(jnp.abs(weights), axis=axis)


def _spread(scale: Array, axis: int, size: int) -> Array:
    """Scales of blocks -> of each of ``size`` weights along the axis; the last block may be
    shorter.
    """
    each = jnp.repeat(scale, BLOCK, axis=axis)
    return lax.slice_in_dim(each, 0, size, axis=axis)
