"""Forms for XLA's CPU backend. Unless stated otherwise, gains were measured on two cores of an AMD
EPYC with the shapes of ``benchmarks/bench.py --preset char-small``.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import get_abstract_mesh


def mean(x: Array) -> Array:
    """[..., D] -> [..., 1], the mean as a product with constant columns.

    A layer norm with its gradient takes a fifth of a sum's time. There are two equal columns
    because XLA would compile one more kernel for each product with a single column, up to a quarter
    of all compilation.
    """
    width = x.shape[-1]
    columns = jnp.full((width, 2), 1.0 / width)
    two = jnp.matmul(x, columns, precision="highest")
    return two[..., :1]


def computed_once(x: Array) -> Array:
    """x [2, ...] by a lookup: XLA would otherwise compute it again in the kernels of every layer.
    Sampling from a Llama takes .94 of the time.
    """
    return jnp.take(x, jnp.arange(2), axis=0, mode="clip")


def weighted_sum(weights: Array, value: Array) -> Array:
    """weights [B, H, t, S] @ value [B, H, S, Dh], in float32."""
    return jnp.einsum(
        "bhts,bhsd->bhtd",
        weights,
        value,
        preferred_element_type=jnp.float32,
    )


def weighted_sum_of_one(weights: Array, value: Array) -> Array:
    """``weighted_sum`` of one query, t = 1, computed as two equal queries: for one row XLA would
    compile a slower kernel, and one for each layer. Sampling takes .82 (Gemma 3) to .94 (GPT-2) of
    the time, together with keys whose slots are last.
    """
    two = jnp.repeat(weights, 2, axis=2)
    sums = weighted_sum(two, value)
    return sums[:, :, :1]


def _halves(x: Array) -> Array:
    """The rows of x [..., D]: [2, N / 2, D], or [1, N, D] if N is odd or a mesh cuts the rows."""
    width = x.shape[-1]
    num_rows = x.size // width
    is_cut = get_abstract_mesh().auto_axes
    num_parts = 1 if is_cut or num_rows % 2 else 2
    return x.reshape(num_parts, -1, width)


def are_large(x: Array, kernel: Array) -> bool:
    """Whether x [..., D] times a trained kernel is a product of halves."""
    halves = jax.eval_shape(_halves, x)
    num_parts, num_rows, _ = halves.shape
    return num_parts == 2 and num_rows >= 2 * max(kernel.shape)


def product_of_halves(x: Array, kernel: Array, axis: int) -> Array:
    """x [..., D] times a kernel whose ``axis`` is D, by halves of the rows, each with a copy of the
    kernel.

    All products of a training step are then of halves, as ``kernel_gradient`` is: XLA would compute
    what arrays of two shapes share twice, once for each. With the narrower array first in that
    gradient an SFT step is 1.1 times as fast.
    """
    halves = _halves(x)
    copies = jnp.broadcast_to(kernel, (2, *kernel.shape))
    contracted = ((2,), (1 + axis,))
    batched = ((0,), (0,))
    out = lax.dot_general(halves, copies, (contracted, batched))
    return out.reshape(*x.shape[:-1], -1)


def kernel_gradient(x: Array, grad: Array) -> Array:
    """x^T @ grad by halves of the rows, the narrower array first.

    XLA's faster kernel reads halves in place; it would transpose the whole for its slower one. Of
    [7168, 128] and [7168, 512] it takes 7.2 ms, with the wider array first 10.0.
    """
    x = _halves(x)
    grad = _halves(grad)
    if x.shape[2] <= grad.shape[2]:
        of_halves = jnp.einsum("gna,gnb->gab", x, grad)
    else:
        of_halves = jnp.einsum("gna,gnb->gab", grad, x).mT
    return functools.reduce(jnp.add, of_halves)
