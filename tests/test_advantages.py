"""advantages by hand, and what must not matter: masked columns, holes, absent answers;
``test_algorithm_losses`` has them against slow loops."""

import functools
import math

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import advantages

gae, discounted_returns, ema_baseline = map(
    jax.jit, (advantages.gae, advantages.discounted_returns, advantages.ema_baseline)
)
leave_one_out = jax.jit(advantages.leave_one_out)
group_normalized = jax.jit(advantages.group_normalized, static_argnames=("eps", "scale"))


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_each_row_may_have_a_lambda_of_its_own(shape):
    rewards = np.eye(2, 3, dtype=np.float32)
    values = mask = np.ones((2, 3), np.float32)
    got, _ = gae(rewards, values, mask, 1.0, np.array([0.25, 0.75], np.float32).reshape(shape))
    for row, lam in enumerate((0.25, 0.75)):
        of_one, _ = gae(rewards, values, mask, 1.0, lam)
        assert_array_equal(np.asarray(got)[row], np.asarray(of_one)[row])
    with pytest.raises(AssertionError, match="shape"):
        gae(rewards, values, mask, 1.0, np.ones((1, 2)))


def test_the_next_token_is_the_next_of_the_response():
    """Behind a hole too, which holds NaN; gamma and lambda are 1/2."""
    rewards = np.array([[1, np.nan, 4, 8]], np.float32)
    values = np.array([[3, np.nan, 2, 6]], np.float32)
    got, returns = gae(rewards, values, np.array([[1, 0, 1, 1]]), 0.5, 0.5)
    # 8 - 6; 4 + 6 / 2 - 2 + 2 / 4; 1 + 2 / 2 - 3 + 5.5 / 4
    assert_allclose(got, [[0.375, 0, 5.5, 2]])
    assert_allclose(returns, [[3.375, 0, 7.5, 8]])


def test_what_is_absent_counts_nowhere():
    """Columns and rows outside the mask hold NaN."""
    rewards = np.array([[9, 1, np.nan, 2, 4]], np.float32)
    mask = np.array([[0, 1, 0, 1, 1]])
    # 1 + 2 / 2 + 4 / 4
    assert_allclose(discounted_returns(rewards, mask, 0.5), [[0, 3, 0, 4, 4]])
    rewards = np.array([4, np.nan, 8], np.float32)
    baseline, advantage = ema_baseline(2.0, rewards, np.array([1, 0, 1]), decay=0.9)
    # .9 * 2 + .1 * 6
    assert_allclose([baseline, *np.asarray(advantage)], [2.4, 1.6, 0, 5.6], rtol=1e-6)


# Groups


@pytest.mark.parametrize(
    ("f", "shapes", "error", "message"),
    [
        (advantages.gae, [(2, 3), (2, 4), (2, 3)], AssertionError, r"shapes.*\(2, 4\)"),
        (advantages.discounted_returns, [(3,), (3,)], AssertionError, "rank"),
        (
            advantages.leave_one_out,
            [(4, 1)],
            ValueError,
            r"at least 2 answers in a group, got \(4, 1\)",
        ),
        (advantages.group_normalized, [(4,)], AssertionError, "rank"),
        (
            lambda x, mask: advantages.group_normalized(x, mask=mask),
            [(4, 2), (4,)],
            AssertionError,
            "shapes",
        ),
    ],
)
def test_shapes_that_are_refused(f, shapes, error, message):
    with pytest.raises(error, match=message):
        f(*map(np.ones, shapes))


GROUPS = {
    "leave_one_out": leave_one_out,
    "grpo": group_normalized,
    "grpo_eps_0": functools.partial(group_normalized, eps=0.0),
    "dr_grpo": functools.partial(group_normalized, scale=False),
}


@pytest.mark.parametrize("name", GROUPS)
def test_equal_scores_give_exactly_zero(name):
    for score in (
        0.1,
        1 / 3,
        -123456.7,
        1e10,
    ):  # the mean of such numbers is not exact in floating point
        assert_array_equal(GROUPS[name](np.full((2, 7), score, np.float32)), 0)


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_groups_of_any_size_are_scaled(size):
    """Neither the squares of large scores nor those of small ones fit into float32."""
    scores = np.float32(size) * np.array([[1.0, 0, 0, 0]], np.float32)
    expected = np.array([[1.5, -0.5, -0.5, -0.5]])
    assert_allclose(group_normalized(scores, eps=0.0), expected, rtol=1e-6)
    assert_allclose(group_normalized(scores), expected * 0.5 / (0.5 + 1e-4 / size), rtol=1e-5)


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_with_a_score_that_is_not_finite_is_not_finite(name):
    """Zeros in its place would hide the fault: ``nonfinite`` would stay 0. Other groups are as they
    were.
    """
    for bad in (math.nan, math.inf, -math.inf):
        rows = np.array([[bad, 0.0, 1.0], [2.0, 0.0, 1.0]], np.float32)
        found = np.asarray(GROUPS[name](rows))
        assert not np.isfinite(found[0]).any()
        assert_array_equal(found[1], np.asarray(GROUPS[name](rows[[1, 1]]))[0])
