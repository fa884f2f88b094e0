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

from rlhf_jax import losses, ops


def f32(*x):
    return jnp.array(x, jnp.float32)


# Comparisons and regression


def test_comparison_by_hand():
    pair = jnp.array([[1.0, 0.0]])
    best = jnp.array([0])
    assert losses.comparison(pair, best)[0] == pytest.approx(0.313262, abs=1e-6)
    assert losses.comparison(pair, best, margin=f32(0.5))[0] == pytest.approx(0.474077, abs=1e-6)
    assert losses.comparison(pair, jnp.array([1]))[0] == pytest.approx(1.313262, abs=1e-6)
    centred = losses.comparison(jnp.array([[1.0, 2.0]]), best, centering=0.01)
    assert centred[0] - losses.comparison(jnp.array([[1.0, 2.0]]), best)[0] == pytest.approx(
        0.09, abs=1e-6
    )
    for k in (2, 4, 9):
        assert losses.comparison(jnp.ones((1, k)), best)[0] == pytest.approx(math.log(k), abs=1e-6)


def test_absent_answers_give_no_gradient_and_no_nan():
    scores = jnp.array(
        [
            [1.0, -jnp.inf, 0.5],
            [-jnp.inf, 1.0, 2.0],
            [-jnp.inf, -jnp.inf, -jnp.inf],
        ]
    )
    best = jnp.array([0, 0, 0])

    @jax.jit
    def f(scores, margin):
        return jax.value_and_grad(lambda s: losses.comparison(s, best[: len(s)], margin).sum())(
            scores
        )

    value, gradient = f(scores, f32(0.1, jnp.nan, 0.1))
    two, two_gradient = f(scores[:1, ::2], f32(0.1))
    assert value == pytest.approx(float(two))  # a row whose best answer is absent says nothing
    assert_allclose(
        gradient[0],
        [two_gradient[0, 0], 0, two_gradient[0, 1]],
        rtol=1e-6,
    )
    assert_array_equal(gradient[1:], np.zeros((2, 3)))


def test_a_score_that_is_not_a_number_is_not_taken_for_an_absent_answer():
    assert np.isnan(losses.comparison(jnp.array([[jnp.nan, 0.0]]), jnp.array([0]))[0])


def test_regression_is_the_squared_error_of_each_score():
    assert_allclose(
        losses.regression(f32(1, 2), f32(4, 2)),
        [9, 0],
    )
    assert losses.regression(jnp.zeros((2, 1), jnp.bfloat16), jnp.ones((2, 1))).dtype == jnp.float32


# Policy and value losses


def test_policy_gradient_by_hand():
    """Masked columns hold NaN."""
    log_probs = jnp.array(
        [
            [math.nan, -1.0, -2.0],
            [math.nan, -3.0, math.nan],
        ]
    )
    mask = jnp.array([[0, 1, 1], [0, 1, 0]])
    assert_array_equal(
        losses.cross_entropy(log_probs, mask),
        [[0, 1, 2], [0, 3, 0]],
    )
    expected = [[0, 7, 14], [0, 33, 0]]
    assert_allclose(losses.policy_gradient(log_probs, f32(7, 11), mask), expected)
    by_token = jnp.where(mask, f32(7, 11)[:, None], math.nan)
    assert_allclose(losses.policy_gradient(log_probs, by_token, mask), expected)
    # VPG's loss: -mean_i A_i sum_t log p_it
    total = losses.aggregate(losses.policy_gradient(log_probs, f32(7, 11), mask), mask, "sum")
    assert total.value == pytest.approx((21 + 33) / 2)


def test_clipped_surrogate_by_hand():
    ratios = f32(0.5, 0.5, 1.5, 1.5, 1.0)
    advantages = f32(1, -1, 1, -1, 2)
    got = losses.clipped_surrogate(jnp.log(ratios), jnp.zeros(5), advantages)
    assert_allclose(
        got,
        [-0.5, 0.8, -1.2, 1.5, -2.0],
        rtol=1e-6,
    )
    asymmetric = losses.clipped_surrogate(
        jnp.log(ratios), jnp.zeros(5), advantages, clip_low=0.1, clip_high=0.3
    )
    assert_allclose(
        asymmetric,
        [-0.5, 0.9, -1.3, 1.5, -2.0],
        rtol=1e-6,
    )
    far = losses.clipped_surrogate(
        jnp.log(f32(9, 9)),
        jnp.zeros(2),
        f32(-1, 1),
        dual_clip=3.0,
    )
    assert_allclose(far, [3.0, -1.2], rtol=1e-6)  # dual clip: for A < 0 only


def test_on_policy_the_surrogates_gradient_is_the_policy_gradient():
    log_probs = jnp.array([[-1.0, -2.0]])
    advantages = jnp.array([[3.0, -4.0]])
    gradient = jax.grad(lambda x: losses.clipped_surrogate(x, x, advantages).sum())(log_probs)
    assert_allclose(gradient, -advantages)


def test_clipped_value_by_hand():
    assert losses.clipped_value(f32(1), f32(0), f32(2))[0] == pytest.approx(1.62)
    assert losses.clipped_value(f32(0.1), f32(0), f32(2))[0] == pytest.approx(0.5 * 1.9**2)
    assert losses.clipped_value(f32(1), f32(0), f32(-1), clip=0.5)[0] == pytest.approx(
        2.0
    )  # the larger of the two
    gradient = jax.grad(
        lambda *x: losses.clipped_value(*x).sum(),
        argnums=(0, 1),
    )
    chex.assert_trees_all_close(
        gradient(f32(0.1), f32(0), f32(2)),
        (f32(-1.9), f32(0)),
    )
    chex.assert_trees_all_close(
        gradient(f32(1), f32(0), f32(2)), (f32(0), f32(0))
    )  # clipped: not old values


@pytest.mark.parametrize(
    "f", [losses.policy_gradient, losses.clipped_surrogate, losses.clipped_value]
)
def test_nothing_but_the_first_argument_is_differentiated(f):
    """What the advantages, old values and returns were made of does not learn from the policy's
    loss.
    """
    arrays = jnp.array([[0.1]]), jnp.array([[0.2]]), jnp.array([[0.7]])
    if f is losses.policy_gradient:
        gradient = jax.grad(lambda x, a: f(x, a, jnp.ones((1, 1))).sum(), argnums=(0, 1))(
            *arrays[:2]
        )
    else:
        gradient = jax.grad(
            lambda *x: f(*x).sum(),
            argnums=(0, 1, 2),
        )(*arrays)
    assert [bool(g.any()) for g in gradient] == [True] + [False] * (len(gradient) - 1)


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


def test_orpo_by_hand():
    """Chosen tokens of probability 1/2 (odds 1), rejected ones of 1/4 (odds 1/3): ln 2 + lambda
    ln(1 + 1/3).
    """
    half = f32(math.log(0.5))
    quarter = f32(math.log(0.25))
    assert losses.dpo(half, quarter, 0.1, "orpo")[0] == pytest.approx(
        math.log(2) + 0.1 * math.log(4 / 3), abs=1e-6
    )
    assert losses.dpo(quarter, half, 0.1, "orpo")[0] == pytest.approx(
        math.log(4) + 0.1 * math.log(4), abs=1e-6
    )
    sure = jax.value_and_grad(lambda x: losses.dpo(x, quarter, 0.1, "orpo").sum())(f32(0.0))
    chex.assert_tree_all_finite(sure)  # whose odds are infinite


def test_kto_by_hand():
    """beta (l - z) = ln 3 for a log-ratio of 3 ln 3, a reference point of ln 3 and beta = 1/2:
    sigmoid 3/4.
    """
    args = (
        f32(
            3 * math.log(3),
            3 * math.log(3),
        ),
        f32(math.log(3))[0],
        jnp.array([True, False]),
    )
    assert_allclose(losses.kto(*args, 0.5), [0.25, 0.75], rtol=1e-6)
    slopes = jax.grad(
        lambda *x: losses.kto(*x, args[2], 0.5).sum(),
        argnums=(0, 1),
    )(*args[:2])
    assert_allclose(
        slopes[0],
        [-0.5 * 3 / 16, 0.5 * 3 / 16],
        rtol=1e-6,
    )
    assert slopes[1] == 0


def test_cispo_by_hand():
    """The clipped ratio is a weight: clipped tokens keep their gradient, -weight * A."""
    log_probs = f32(-1, -1, -2, -2)
    ratio = f32(0.1, 1, 3, 9)
    advantages = f32(1, 2, -1, 1)
    f = functools.partial(
        losses.cispo, ratio=ratio, advantages=advantages, clip_low=0.5, clip_high=4.0
    )
    assert_allclose(f(log_probs), [0.5, 2, -6, 10], rtol=1e-6)
    assert_allclose(jax.grad(lambda x: f(x).sum())(log_probs), [-0.5, -2, 3, -5], rtol=1e-6)


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
        jnp.log(ratios) - 3.0, jnp.full((2, 4), -3.0), mask, 2.0, how
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


NONE = jnp.zeros(1)
ONES = jnp.ones((2, 3))
BEST = jnp.zeros(1, int)


@pytest.mark.parametrize(
    ("f", "args", "error", "message"),
    [
        (losses.comparison, (jnp.zeros((1, 4)), BEST, None, 0.1), ValueError, "K = 4"),
        (losses.comparison, (jnp.zeros(4), BEST), AssertionError, "rank"),
        (losses.comparison, (jnp.zeros((2, 2)), jnp.zeros(3, int)), AssertionError, r"\(3,\)"),
        (losses.regression, (jnp.zeros((2, 1)), jnp.zeros(2)), AssertionError, "shapes"),
        (losses.clipped_surrogate, (NONE, NONE, NONE, 0.2, 0.2, 0.5), ValueError, "dual_clip"),
        (losses.dpo, (NONE, NONE, 0.1, "kto"), ValueError, r"sigmoid, robust, hinge, ipo.*'kto'"),
        (losses.dpo, (NONE, NONE, 0.1, "robust", 0.5), ValueError, "label_smoothing"),
        (losses.dpo, (NONE, NONE, 0.1, "ipo", 0.1), ValueError, "not defined for 'ipo'"),
        (
            losses.aggregate,
            (ONES, ONES, "mean"),
            ValueError,
            r"token, sequence, sum, fixed.*'mean'",
        ),
        (losses.aggregate, (ONES, ONES, "fixed"), ValueError, "length"),
        (losses.aggregate, (ONES, ONES, "fixed", 0), ValueError, "length"),
        (losses.aggregate, (jnp.ones(3), jnp.ones(3)), AssertionError, "rank"),
        (losses.aggregate, (ONES, ONES[:, :1]), AssertionError, "shapes"),
    ],
)
def test_what_a_loss_cannot_mean_is_refused(f, args, error, message):
    with pytest.raises(error, match=message):
        f(*args)


def test_the_exponentials_of_ratio_and_kl_are_continued_by_their_tangent():
    """e^x from 40 on: 11 e^40 at 50."""
    expected = pytest.approx(11 * math.exp(40), rel=1e-6)
    assert ops.ratio(f32(50), f32(0))[0] == expected
    assert ops.kl(f32(-50), f32(0), "k3")[0] == expected
