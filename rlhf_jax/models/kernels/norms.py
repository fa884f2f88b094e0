"""Layer norm and RMSNorm with an explicit gradient, which needs only the input and two numbers of
each row.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from rlhf_jax.models.kernels import mean as mean_of
from rlhf_jax.parallel import sharding

# The input, its mean (None for RMSNorm), 1 / its standard deviation, and the scale.
Saved = tuple[Array, Array | None, Array, Array]


def norm(x: Array, scale: Array, bias: Array | None, epsilon: float) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis.

    This is layer normalization (Ba et al. 2016). Without a bias no mean is subtracted: RMSNorm
    (Zhang and Sennrich 2019). It is computed in float32; the result has the dtype of x.
    """
    arrays = (x, scale, bias)
    return _norm(*sharding.vary(arrays, arrays), epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm(x: Array, scale: Array, bias: Array | None, epsilon: float) -> Array:
    return _forward(x, scale, bias, epsilon)[0]


def _forward(
    x: Array,
    scale: Array,
    bias: Array | None,
    epsilon: float,
) -> tuple[Array, Saved]:
    centred = x.astype(jnp.float32)
    if bias is None:
        mean = None
        # XLA puts this sum into one kernel with the square.
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    else:
        mean = mean_of(centred)
        # The two-pass variance: E[x^2] - E[x]^2 loses digits where the mean is large.
        centred = centred - mean
        variance = mean_of(centred * centred)
    inverse = lax.rsqrt(variance + epsilon)
    out = centred * inverse * jnp.broadcast_to(scale, x.shape)
    if bias is not None:
        out += jnp.broadcast_to(bias, x.shape)
    return out.astype(x.dtype), (x, mean, inverse, scale)


def _backward(epsilon: float, saved: Saved, grad: Array) -> tuple[Array, Array, Array | None]:
    x, mean, inverse, scale = saved
    grad = grad.astype(jnp.float32)
    centred = x.astype(jnp.float32)
    if mean is not None:
        centred = centred - mean
    normed = centred * inverse
    scaled = grad * jnp.broadcast_to(scale, x.shape)

    through_statistics = normed * mean_of(scaled * normed)  # of the variance
    if mean is not None:
        through_statistics += mean_of(scaled)
    x_grad = inverse * (scaled - through_statistics)

    leading = tuple(range(x.ndim - 1))
    scale_grad = (grad * normed).sum(leading)
    bias_grad = None if mean is None else grad.sum(leading)
    return x_grad.astype(x.dtype), scale_grad, bias_grad


_norm.defvjp(_forward, _backward)
