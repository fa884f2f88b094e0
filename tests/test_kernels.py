"""The form of an operation is chosen for the machine that a program is lowered for, whatever machine
that is done on.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import kernels, norms

SHAPES = {"x": (64, 8), "kernel": (8, 4), "scale": (8,), "bias": (8,)}


def values_and_gradients(x, kernel, scale, bias):
    def loss(x, kernel, scale, bias):
        return jnp.sum(jnp.sin(kernels.product(norms.norm(x, scale, bias, 1e-5), kernel)))

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(x, kernel, scale, bias)


def lowered(function, shapes, platform):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "products"),
    [
        # Four means, the product, and its two gradients, by halves of the rows.
        ("cpu", {"64x2": 4, "2x32x4": 1, "2x8x4": 0, "2x4x8": 1, "2x32x8": 1}),
        ("cuda", {"64x4": 1, "64x8": 1, "8x4": 1}),
        ("tpu", {"64x4": 1, "64x8": 1, "8x4": 1}),
    ],
)
def test_norms_and_products(platform, products):
    """On an accelerator the plain formula: a norm holds no product."""
    text = lowered(values_and_gradients, SHAPES.values(), platform)
    results = re.findall(r"dot_general.*-> tensor<([\dx]+)xf32>", text)
    assert {shape: results.count(shape) for shape in products} == products
    assert len(results) == sum(products.values())


@pytest.mark.parametrize(("platform", "rows"), [("cpu", 2), ("cuda", 1), ("tpu", 1)])
def test_the_values_of_one_query(platform, rows):
    shapes = ((3, 2, 1, 7), (3, 2, 7, 4))
    text = lowered(kernels.weighted_sum, shapes, platform)
    assert re.findall(r"dot_general.*-> tensor<([\dx]+)xf32>", text) == [f"3x2x{rows}x4"]
    weights, value = (np.random.default_rng(0).normal(size=shape) for shape in shapes)
    found = kernels.weighted_sum(jnp.float32(weights), jnp.float32(value))
    np.testing.assert_allclose(found, weights @ value, rtol=1e-4, atol=1e-6)
