"""Operations of the networks in the form that a backend computes fastest.

The choice is made when a program is lowered (``jax.lax.platform_dependent``): a program that is
lowered for another machine gets the forms of that machine. The files ``cpu`` and ``fused`` say what
each form gains and where that was measured. An operation without such a form is the plain formula.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import platform_dependent

from rlhf_jax.models.kernels import cpu
from rlhf_jax.parallel import sharding

# x and the kernel; each is None where the other's gradient is not needed.
Saved = tuple[Array | None, Array | None]


def mean(x: Array) -> Array:
    """[..., D] -> [..., 1] in float32."""
    return platform_dependent(x, cpu=cpu.mean, default=_mean)


def _mean(x: Array) -> Array:  # not a partial: a function is traced once for all layers
    return x.mean(axis=-1, keepdims=True)


def computed_once(x: Array) -> Array:
    """x [2, ...] itself, not merged into the kernels that read it."""
    return platform_dependent(x, cpu=cpu.computed_once, default=jnp.asarray)


def weighted_sum(weights: Array, value: Array) -> Array:
    """weights [B, H, t, S] @ value [B, H, S, Dh], in float32."""
    if weights.shape[2] > 1:
        return cpu.weighted_sum(weights, value)
    return platform_dependent(weights, value, cpu=cpu.weighted_sum_of_one, default=cpu.weighted_sum)


def product(x: Array, kernel: Array) -> Array:
    """x [..., D] @ kernel [D, F]."""
    return _product(*sharding.vary((x, kernel), (x, kernel)))


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    return x @ kernel


def _times(x: Array, kernel: Array, axis: int, is_trained: bool) -> Array:
    """x [..., D] times a kernel whose ``axis`` is D."""
    plain = partial(jnp.tensordot, axes=((-1,), (axis,)))
    # A trained kernel is multiplied by halves, as its gradient is.
    if is_trained and cpu.are_large(x, kernel):
        by_halves = partial(cpu.product_of_halves, axis=axis)
        return platform_dependent(x, kernel, cpu=by_halves, default=plain)
    return plain(x, kernel)


def _kernel_gradient(x: Array, grad: Array) -> Array:
    """[..., D] and [..., F] -> [D, F], summed over the rows."""
    leading = tuple(range(x.ndim - 1))
    plain = partial(jnp.tensordot, axes=(leading, leading))
    return platform_dependent(x, grad, cpu=cpu.kernel_gradient, default=plain)


def _product_forward(x: Any, kernel: Any) -> tuple[Array, Saved]:
    # Under adapters a kernel is frozen: its gradient is not needed, so x is not saved.
    saved_x = x.value if kernel.perturbed else None
    saved_kernel = kernel.value if x.perturbed else None
    out = _times(x.value, kernel.value, 0, kernel.perturbed)
    return out, (saved_x, saved_kernel)


def _product_backward(saved: Saved, grad: Array) -> Saved:
    x, kernel = saved
    x_grad = None
    kernel_grad = None
    if kernel is not None:
        x_grad = _times(grad, kernel, 1, x is not None)
    if x is not None:
        kernel_grad = _kernel_gradient(x, grad)
    return x_grad, kernel_grad


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)
