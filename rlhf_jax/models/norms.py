"""Layer norm and RMSNorm with one gradient, which is written out: XLA's CPU kernels take half the time for it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

Saved = tuple[Array, Array | None, Array, Array]  # x, its mean, 1 / its deviation, scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def norm(x: Array, scale: Array, bias: Array | None, epsilon: float) -> Array:
    """(x - mean) / sqrt(mean square of that + epsilon) * scale + bias, of the last axis.

    That is layer normalization (Ba et al. 2016); without a bias no mean is taken: RMSNorm (Zhang and Sennrich 2019).
    It is computed in float32; the dtype of x is kept.
    """
    return _normed(x, scale, bias, epsilon)[0]


def _normed(x: Array, scale: Array, bias: Array | None, epsilon: float) -> tuple[Array, Saved]:
    centred, mean = x.astype(jnp.float32), None
    if bias is not None:
        # The two-pass variance: E[x^2] - E[x]^2 loses digits where the mean is large.
        mean = centred.mean(-1, keepdims=True)
        centred = centred - mean
    inverse = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + epsilon)
    scale = jnp.expand_dims(scale, range(x.ndim - 1))
    out = centred * inverse * scale
    if bias is not None:
        out += jnp.expand_dims(bias, range(x.ndim - 1))
    return out.astype(x.dtype), (x, mean, inverse, scale)


def _backward(epsilon: float, saved: Saved, grad: Array) -> tuple[Array, Array, Array | None]:
    x, mean, inverse, scale = saved
    grad, centred = grad.astype(jnp.float32), x.astype(jnp.float32)
    normed = (centred if mean is None else centred - mean) * inverse
    weights, rows = scale.reshape(-1, 1) / scale.size, tuple(range(x.ndim - 1))
    across = normed * ((grad * normed) @ weights)  # what the mean square passes back, then the mean
    across = across if mean is None else across + grad @ weights
    bias_grad = None if mean is None else grad.sum(rows)
    return (inverse * (grad * scale - across)).astype(x.dtype), (grad * normed).sum(rows), bias_grad


norm.defvjp(_normed, _backward)


class Norm(nn.Module):
    """``norm`` with the parameters "scale", counted from ``offset``, and "bias", where there is one."""

    epsilon: float
    offset: float = 0.0
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape, start = x.shape[-1:], nn.initializers.constant(1.0 - self.offset)
        scale = self.offset + self.param("scale", start, shape).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape) if self.use_bias else None
        return norm(x, scale, bias, self.epsilon)
