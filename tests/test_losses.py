"""losses: hand-worked numbers, and what must not matter: masked columns and absent rows;
``test_algorithm_losses`` has whole losses against slow loops.
"""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import losses


def f32(*x):
    return jnp.array(x, jnp.float32)


# Comparisons and regression


def test_rows_without_their_best_answer_have_no_gradient():
    scores = jnp.array([[-jnp.inf, 1.0, 2.0], [-jnp.inf] * 3])
    best = jnp.array([0, 0])
    loss = jax.value_and_grad(lambda scores: losses.comparison(scores, best).sum())
    value, gradient = loss(scores)
    assert value == 0
    assert_array_equal(gradient, jnp.zeros((2, 3)))


def test_a_score_that_is_not_a_number_is_not_taken_for_an_absent_answer():
    assert np.isnan(losses.comparison(jnp.array([[jnp.nan, 0.0]]), jnp.array([0]))[0])


# Policy and value losses


def kto(log_ratio, point, _):
    return losses.kto(log_ratio, reference_point=point, desirable=jnp.ones((1, 1)), beta=0.5)


def policy_gradient(log_probs, advantages, _):
    return losses.policy_gradient(log_probs, advantages, jnp.ones((1, 1)))


@pytest.mark.parametrize(
    "f",
    [policy_gradient, losses.clipped_surrogate, losses.clipped_value, losses.cispo, kto],
)
def test_nothing_but_the_first_argument_is_differentiated(f):
    """What the advantages, old values and returns were made of does not learn from the policy's
    loss.
    """
    arrays = jnp.array([[0.1]]), jnp.array([[0.2]]), jnp.array([[0.7]])
    gradient = jax.grad(lambda *x: f(*x).sum(), argnums=(0, 1, 2))(*arrays)
    assert [bool(g.any()) for g in gradient] == [True, False, False]


# DPO


@pytest.mark.parametrize(
    ("kind", "smoothing", "delta", "expected", "at_start"),
    [
        ("sigmoid", 0.0, 10.0, 0.313262, math.log(2)),
        ("sigmoid", 0.1, 10.0, 0.413262, math.log(2)),
        ("robust", 0.1, 10.0, 0.188262, math.log(2)),
        ("robust", 0.0, 10.0, 0.313262, math.log(2)),
        ("hinge", 0.0, 10.0, 0.0, 1.0),
        ("hinge", 0.0, 20.0, 0.0, 1.0),
        ("hinge", 0.0, -10.0, 2.0, 1.0),
        ("ipo", 0.0, 7.0, 4.0, 25.0),
        ("simpo", 0.0, 10.0, 0.693147, math.log1p(math.e)),  # h = 1 - gamma
        ("simpo", 0.1, 10.0, 0.693147, 0.9 * math.log1p(math.e) + 0.1 * math.log1p(1 / math.e)),
    ],
)
def test_dpo_by_hand(kind, smoothing, delta, expected, at_start):
    gamma = 1.0 if kind == "simpo" else 0.0
    f = functools.partial(losses.dpo, beta=0.1, kind=kind, label_smoothing=smoothing, gamma=gamma)
    assert f(f32(delta - 3), f32(-3.0))[0] == pytest.approx(expected, abs=1e-5)
    assert f(f32(-5), f32(-5))[0] == pytest.approx(at_start, abs=1e-5)


def test_orpo_of_a_certain_answer_is_finite():
    """Whose odds are infinite."""
    quarter = f32(math.log(0.25))
    sure = jax.value_and_grad(lambda x: losses.dpo(x, quarter, 0.1, "orpo").sum())(f32(0.0))
    chex.assert_tree_all_finite(sure)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("token_truncate", [[0.5, 0, 2, 2], [0, 3 / 4, 0, 0]]),
        ("token_mask", [[0.5, 0, 2, 0], [0, 3 / 4, 0, 0]]),
        ("sequence_truncate", [[2, 0, 2, 2], [0, 3 / 4, 0, 0]]),  # 0.5 * 2 * 4 = 4
        ("sequence_mask", [[0, 0, 0, 0], [0, 3 / 4, 0, 0]]),
    ],
)
def test_importance_weights_by_hand(how, expected):
    ratios = jnp.array(
        [
            [0.5, math.nan, 2, 4],
            [math.nan, 3 / 4, math.nan, math.nan],
        ]
    )
    mask = jnp.array([[1, 0, 1, 1], [0, 1, 0, 0]])
    weights = losses.importance_weights(
        jnp.log(ratios) - 3.0,
        behaviour_log_probs=jnp.full((2, 4), -3.0),
        mask=mask,
        cap=2.0,
        how=how,
    )
    assert_allclose(weights, expected, rtol=1e-6)


# One number from many


@pytest.mark.parametrize(
    ("how", "expected"), [("token", 1.25), ("sequence", 1.5), ("sum", 2.5), ("fixed", 0.625)]
)
def test_aggregate_by_hand(how, expected):
    """Masked columns hold NaN."""
    nan = math.nan
    per_token = jnp.array(
        [
            [nan, 2, nan, nan, nan],
            [nan, 1, 1, 1, nan],
            [nan] * 5,
        ]
    )
    mask = jnp.array(
        [
            [0, 1, 0, 0, 0],
            [0, 1, 1, 1, 0],
            [0, 0, 0, 0, 0],
        ]
    )
    assert losses.aggregate(per_token, mask, how, length=4).value == pytest.approx(expected)
    wider = [
        jnp.pad(
            x,
            ((0, 0), (3, 2)),
        )
        for x in (per_token, mask)
    ]
    assert losses.aggregate(*wider, how, length=4).value == pytest.approx(expected)


def test_weighted_mean_by_hand():
    """Entries of weight 0 are not read, neither for the value nor for the gradient."""
    x = f32(1, math.nan, 4)
    weight = f32(3, 0, 1)
    mean = losses.weighted_mean(x, weight)
    assert mean.value == 7 / 4
    assert mean.count == 4
    assert_array_equal(jax.grad(lambda x: losses.weighted_mean(x, weight).total)(x), [3, 0, 1])
    assert losses.weighted_mean(x, 0 * weight).value == 0


@pytest.mark.parametrize(
    ("x", "weight", "expected"),
    [
        ((1, 2, 3), (1, -1, 1), 2.0),  # (1 - 2 + 3) / 1
        ((1, 2, 3), (-1, -1, -2), 9 / 4),
        ((4, 1), (0.5, -1.5), -0.5),  # (2 - 1.5) / -1
        ((5, 7), (0, 2), 7.0),
        ((), (), 0.0),
    ],
)
def test_weights_of_any_sign_count_as_written(x, weight, expected):
    """And the gradients are sum-normalised ones of x and of the weights, also at a weight of 0."""
    x, weight = f32(*x), f32(*weight)

    def value(x, weight):
        return losses.weighted_mean(x, weight).value

    assert value(x, weight) == pytest.approx(expected)
    of_x, of_weight = jax.grad(value, argnums=(0, 1))(x, weight)
    total = weight.sum()
    assert_allclose(of_x, weight / total, rtol=1e-6)
    assert_allclose(of_weight, (x - expected) / total, rtol=1e-6)


ONES = jnp.ones((2, 3))
BEST = jnp.zeros(1, int)


@pytest.mark.parametrize(
    ("f", "args", "error", "message"),
    [
        (losses.comparison, (jnp.zeros(4), BEST), AssertionError, "rank"),
        (losses.comparison, (jnp.zeros((2, 2)), jnp.zeros(3, int)), AssertionError, r"\(3,\)"),
        (losses.regression, (jnp.zeros((2, 1)), jnp.zeros(2)), AssertionError, "shapes"),
        (losses.aggregate, (ONES, ONES, "fixed", 0), ValueError, "length"),
        (losses.aggregate, (jnp.ones(3), jnp.ones(3)), AssertionError, "rank"),
        (losses.aggregate, (ONES, ONES[:, :1]), AssertionError, "shapes"),
    ],
)
def test_what_a_loss_cannot_mean_is_refused(f, args, error, message):
    with pytest.raises(error, match=message):
        f(*args)
