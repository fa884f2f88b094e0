"""advantages: hand-worked numbers, slow loops, and what must not matter: masked columns, holes, absent answers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import advantages

POISONS = [1e4, -1e4, math.nan]
gae, discounted_returns, ema_baseline = map(
    jax.jit, (advantages.gae, advantages.discounted_returns, advantages.ema_baseline)
)
leave_one_out = jax.jit(advantages.leave_one_out)
group_normalized = jax.jit(advantages.group_normalized, static_argnames=("eps", "scale"))


def test_gae_by_hand():
    rewards, values = jnp.array([[9, 0, 0, 1, 9.0]]), jnp.array([[9, 0.1, 0.2, 0.3, 9]])
    mask = jnp.array([[0, 1, 1, 1, 0]])
    got, returns = gae(rewards, values, mask)
    np.testing.assert_allclose(got, [[0, 0.82675, 0.765, 0.7, 0]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[0, 0.92675, 0.965, 1.0, 0]], rtol=1e-6)
    assert got.dtype == returns.dtype == jnp.float32


@jax.jit
def recursions(rewards, values, mask, gamma, lam, weights):
    """Advantages, returns and rewards-to-go, and the gradient of their weighted sum for rewards and values."""

    def total(rewards, values):
        found = *advantages.gae(rewards, values, mask, gamma, lam), advantages.discounted_returns(rewards, mask, gamma)
        return sum(jnp.sum(w * x) for w, x in zip(weights, found, strict=True)), found

    (_, found), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(rewards, values)
    return found, gradients


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    references.batches(arrays=7, scales=references.WILD),
    st.sampled_from([(1.0, 0.95), (0.9, 0.0), (0.5, 1.0)]),
    st.sampled_from([0.0, *POISONS]),
)
def test_recursions_and_their_gradients_equal_loops(batch, gamma_lam, poison):
    (rewards, values, *arrays), mask = batch
    scale = max(np.abs(x).max() for x in batch[0])

    def loops(rewards, values):
        found = *references.gae(rewards, values, mask, *gamma_lam), None
        return *found[:2], references.discounted_returns(rewards, mask, gamma_lam[0])

    weights, direction = [x / scale for x in arrays[:3]], arrays[3:]
    bad = [references.poisoned(x, mask, poison) for x in (rewards, values)]
    found, gradients = recursions(*bad, mask, *gamma_lam, weights)
    for got, want in zip(found, loops(rewards, values), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * scale)
    # All three are linear: the gradient along a direction is what the loops make of the direction itself.
    slope = sum(np.sum(np.asarray(g)[mask] * d[mask]) for g, d in zip(gradients, direction, strict=True))
    expected = sum(np.sum(w * x) for w, x in zip(weights, loops(*direction), strict=True))
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-4 * scale)
    for gradient in gradients:
        np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)


# Groups


@pytest.mark.parametrize(
    ("f", "shapes", "error", "message"),
    [
        (advantages.gae, [(2, 3), (2, 4), (2, 3)], AssertionError, r"shapes.*\(2, 4\)"),
        (advantages.discounted_returns, [(3,), (3,)], AssertionError, "rank"),
        (advantages.leave_one_out, [(4, 1)], ValueError, r"G > 1, got \(4, 1\)"),
        (advantages.group_normalized, [(4,)], AssertionError, "rank"),
        (lambda x, mask: advantages.group_normalized(x, mask=mask), [(4, 2), (4,)], AssertionError, "shapes"),
    ],
)
def test_shapes_that_are_refused(f, shapes, error, message):
    with pytest.raises(error, match=message):
        f(*map(jnp.ones, shapes))


def test_group_normalized_by_hand():
    scores = jnp.array([[1.0, 0, 0, 0]])
    np.testing.assert_allclose(group_normalized(scores, eps=0.0), [[1.5, -0.5, -0.5, -0.5]], rtol=1e-6)
    np.testing.assert_allclose(group_normalized(scores), [[1.4997, -0.4999, -0.4999, -0.4999]], rtol=1e-6)
    np.testing.assert_allclose(group_normalized(scores, scale=False), [[0.75, -0.25, -0.25, -0.25]], rtol=1e-6)


GROUPS = {
    "leave_one_out": leave_one_out,
    "grpo": group_normalized,
    "grpo_eps_0": functools.partial(group_normalized, eps=0.0),
    "dr_grpo": functools.partial(group_normalized, scale=False),
}


@pytest.mark.parametrize("name", GROUPS)
def test_equal_scores_give_exactly_zero(name):
    for score in (0.1, 1 / 3, -123456.7, 1e10):  # the mean of such numbers is not exact in floating point
        np.testing.assert_array_equal(GROUPS[name](jnp.full((2, 7), score, jnp.float32)), 0)


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_groups_of_any_size_are_scaled(size):
    """Neither the squares of large scores nor those of small ones fit into float32."""
    scores, expected = size * jnp.array([[1.0, 0, 0, 0]]), np.array([[1.5, -0.5, -0.5, -0.5]])
    np.testing.assert_allclose(group_normalized(scores, eps=0.0), expected, rtol=1e-6)
    np.testing.assert_allclose(group_normalized(scores), expected * 0.5 / (0.5 + 1e-4 / size), rtol=1e-5)


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_with_a_score_that_is_not_finite_is_not_finite(name):
    """Zeros in its place would hide the fault: ``nonfinite`` would stay 0. Other groups are as they were."""
    for bad in (math.nan, math.inf, -math.inf):
        found = np.asarray(GROUPS[name](jnp.array([[bad, 0.0, 1.0], [2.0, 0.0, 1.0]])))
        assert not np.isfinite(found[0]).any()
        np.testing.assert_array_equal(found[1:], GROUPS[name](jnp.array([[2.0, 0.0, 1.0]])))


@jax.jit
def all_of_groups(scores, mask):
    """{name: (advantages, gradient of the sum of their squares)}, which is differentiable wherever they are used."""

    def total(scores, name):
        found = GROUPS[name](scores, mask=mask)
        return jnp.sum(jnp.square(found)), found

    results = {name: jax.value_and_grad(total, has_aux=True)(scores, name) for name in GROUPS}
    return {name: (found, gradient) for name, ((_, found), gradient) in results.items()}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    references.batches(shapes=((1, 2), (3, 5), (4, 8)), scales=references.WILD),
    st.booleans(),
    st.sampled_from([0.0, *POISONS]),
)
def test_groups_equal_loops(batch, coarse, poison):
    (scores,), mask = batch
    if coarse:  # many ties, and groups of equal scores
        scores = np.abs(scores).max() * np.sign(scores)
    expected = {
        "leave_one_out": references.leave_one_out(scores, mask),
        "grpo": references.group_normalized(scores, mask, 1e-4, True),
        "grpo_eps_0": references.group_normalized(scores, mask, 0.0, True),
        "dr_grpo": references.group_normalized(scores, mask, 1e-4, False),
    }
    for name, (found, gradient) in all_of_groups(references.poisoned(scores, mask, poison), mask).items():
        size = 1.0 if name.startswith("grpo") else np.abs(scores).max()
        np.testing.assert_allclose(found, expected[name], rtol=1e-3, atol=1e-5 * size)
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(np.asarray(gradient)[~mask], 0)


# The moving average


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    references.batches(shapes=((1, 2), (5, 2)), scales=references.WILD),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.sampled_from([0.0, *POISONS]),
)
def test_ema_baseline_equals_a_loop(batch, decay, poison):
    (x,), mask = batch
    (scores, baseline), present = (x[:, 0], x[0, 1]), mask[:, 0]
    got = ema_baseline(baseline, references.poisoned(scores, present, poison), decay, present)
    for found, want in zip(got, references.ema_baseline(float(baseline), scores, decay, present), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6 * np.abs(x).max())
