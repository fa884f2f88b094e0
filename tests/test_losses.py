"""losses: hand-worked numbers, and what must not matter: masked columns and absent rows;
``test_algorithm_losses`` has whole losses against slow loops.
"""

import functools
import math
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import losses, ops


def f32(*x):
    return np.array(x, np.float32)


# Comparisons and regression


@jax.jit
@jax.value_and_grad
def comparison(scores):
    return losses.comparison(scores, np.zeros(2, int)).sum()


def test_rows_without_their_best_answer_have_no_gradient():
    scores = f32([-np.inf, 1.0, 2.0], [-np.inf] * 3)
    value, gradient = comparison(scores)
    assert value == 0
    assert_array_equal(gradient, np.zeros((2, 3)))


def test_a_score_that_is_not_a_number_is_not_taken_for_an_absent_answer():
    assert np.isnan(comparison(f32([np.nan, 0.0, 1.0], [1.0, 2.0, 3.0]))[0])


# Policy and value losses


def kto(log_ratio, point, _):
    return losses.kto(log_ratio, reference_point=point, desirable=jnp.ones((1, 1)), beta=0.5)


def policy_gradient(log_probs, advantages, _):
    return losses.policy_gradient(log_probs, advantages, jnp.ones((1, 1)))


def weighted(surrogate, log_probs, old_log_probs, advantages):
    return surrogate(log_probs - old_log_probs, advantages, log_probs=log_probs)[0]


cispo = functools.partial(weighted, losses.cispo)
vespo = functools.partial(weighted, losses.vespo)


@pytest.mark.parametrize(
    "f",
    [policy_gradient, losses.clipped_surrogate, losses.clipped_value, cispo, vespo, kto],
)
def test_nothing_but_the_first_argument_is_differentiated(f):
    """What the advantages, old values and returns were made of does not learn from the policy's
    loss.
    """
    arrays = f32([0.1]), f32([0.2]), f32([0.7])
    gradient = jax.jit(jax.grad(lambda *x: f(*x).sum(), argnums=(0, 1, 2)))(*arrays)
    assert [np.any(g) for g in gradient] == [True, False, False]


def test_sapo_and_vespo_with_constants_of_ones_own():
    """By hand, at a ratio of 2."""
    log_ratio, advantages, log_probs = f32([math.log(2)] * 2), f32([3.0, -4.0]), f32([-1.0, -2.0])
    loss, clipped = losses.sapo(log_ratio, advantages, temperatures=(0.5, 2.0))
    assert_allclose(loss, [[-24 / (1 + math.exp(-0.5)), 8 / (1 + math.exp(-2))]], rtol=1e-6)
    assert clipped.tolist() == [[False, True]]
    fades = {"powers": (1.0, 2.0), "decays": (0.5, 3.0)}
    loss, clipped = losses.vespo(log_ratio, advantages, log_probs=log_probs, **fades)
    assert_allclose(loss, [[6 * math.exp(-0.5), -32 * math.exp(-3)]], rtol=1e-6)
    assert clipped.tolist() == [[False, True]]


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
    found = jax.jit(f)(f32(delta - 3, -5), f32(-3, -5))
    assert_allclose(found, [expected, at_start], atol=1e-5)


@pytest.mark.parametrize("kind", ["apo_zero", "apo_down"])
def test_apo_and_its_gradient_by_hand(kind):
    """D'Oosterlinck et al. 2024, eqs. 7 and 8, plus 1, in float64."""
    chosen, rejected, beta = np.array([[7.0, -3.0, 0.0], [-5.0, -4.0, 2.0], [0.3] * 3])

    def sigmoid(x):
        return 1 / (1 + np.exp(-beta * x))

    def slope(x):
        return beta * sigmoid(x) * (1 - sigmoid(x))

    expected = 1 - sigmoid(chosen) + sigmoid(rejected)
    by_chosen, by_rejected = -slope(chosen), slope(rejected)
    if kind == "apo_down":
        expected = sigmoid(chosen) + 1 - sigmoid(chosen - rejected)
        by_chosen = slope(chosen) - slope(chosen - rejected)
        by_rejected = slope(chosen - rejected)

    def total(*ratios):
        loss = losses.dpo(*ratios, 0.3, kind)
        return loss.sum(), loss

    found = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    gradients, loss = found(np.float32(chosen), np.float32(rejected))
    assert_allclose(loss, expected, rtol=1e-6)
    assert_allclose(gradients, [by_chosen, by_rejected], atol=1e-7)


def test_orpo_of_a_certain_answer_is_finite():
    """Whose odds are infinite."""
    quarter = f32(math.log(0.25))
    loss = jax.jit(jax.value_and_grad(lambda x: losses.dpo(x, quarter, 0.1, "orpo").sum()))
    chex.assert_tree_all_finite(loss(f32(0.0)))


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
    ratios = f32([0.5, math.nan, 2, 4], [math.nan, 3 / 4, math.nan, math.nan])
    mask = np.array([[1, 0, 1, 1], [0, 1, 0, 0]])
    weights_of = jax.jit(functools.partial(losses.importance_weights, cap=2.0, how=how))
    behaviour = np.full((2, 4), -3.0, np.float32)
    weights = weights_of(np.log(ratios) - 3, behaviour_log_probs=behaviour, mask=mask)
    assert_allclose(weights, expected, rtol=1e-6)


RAW = [[0.25, 0, 2, 4], [0, 3 / 4, 0, 0]]


@pytest.mark.parametrize(
    ("how", "floor", "cap", "expected"),
    [
        ("token_truncate", 0.5, 3.0, [[0.5, 0, 2, 3], [0, 3 / 4, 0, 0]]),
        ("token_mask", 0.5, 3.0, [[0, 0, 2, 0], [0, 3 / 4, 0, 0]]),
        ("sequence_mask", 1.0, 3.0, [[2, 0, 2, 2], [0, 0, 0, 0]]),  # 0.25 * 2 * 4 = 2
        ("sequence_truncate", 1.0, 1.5, [[1.5, 0, 1.5, 1.5], [0, 1, 0, 0]]),
        ("geometric_truncate", 1.0, 1.2, [[1.2, 0, 1.2, 1.2], [0, 1, 0, 0]]),
        ("geometric_mask", 0.0, 1.2, [[0, 0, 0, 0], [0, 3 / 4, 0, 0]]),  # 2^(1/3) = 1.26
        ("geometric_mask", 0.8, 1.3, [[2 ** (1 / 3), 0, 2 ** (1 / 3), 2 ** (1 / 3)], [0] * 4]),
        # From an engine's 1/8: to 1/32, 1/4, 1/2 and 3/32.
        ("tv_mask", 0.0, 0.2, [[0.25, 0, 2, 0], [0, 3 / 4, 0, 0]]),
        ("tv_mask", 0.0, 0.09, [[0, 0, 0, 0], [0, 3 / 4, 0, 0]]),
        # .084, .048, .317 and .0046 nats.
        ("kl_mask", 0.0, 0.06, [[0, 0, 2, 0], [0, 3 / 4, 0, 0]]),
        ("kl_mask", 0.0, 0.1, [[0.25, 0, 2, 0], [0, 3 / 4, 0, 0]]),
        ("token_mask", 0.0, None, RAW),
        ("token_truncate", 0.0, math.inf, RAW),
        ("tv_mask", 0.0, None, RAW),
    ],
)
def test_bounds_of_importance_weights_by_hand(how, floor, cap, expected):
    """On both sides, by means of rows, and by the distance of a token's probability."""
    ratios = f32([0.25, math.nan, 2, 4], [math.nan, 3 / 4, math.nan, math.nan])
    mask = np.array([[1, 0, 1, 1], [0, 1, 0, 0]])
    how = {"cap": cap, "floor": floor, "how": how}
    behaviour = np.full((2, 4), math.log(1 / 8), np.float32)
    policy = np.log(ratios / 8)
    weights = losses.importance_weights(policy, behaviour_log_probs=behaviour, mask=mask, **how)
    assert_allclose(weights, expected, rtol=1e-6)


def test_what_no_bound_of_weights_can_be_is_refused():
    zeros = np.zeros((1, 2), np.float32)
    weights = functools.partial(losses.importance_weights, zeros, behaviour_log_probs=zeros)
    for changes, message in (
        ({"cap": 0.0}, "cap must be above 0"),
        ({"cap": 2.0, "floor": -0.5}, "floor must be at least 0"),
        ({"cap": 2.0, "floor": 3.0}, "floor must be at most 2.0"),
        ({"cap": 2.0, "how": "token_clip"}, "how must be one of token_truncate"),
    ):
        with pytest.raises(ValueError, match=message):
            weights(mask=zeros, **changes)


def test_a_binary_divergence_is_that_of_two_outcomes():
    """Also where a token is certain, or nearly so."""
    p, q = np.array([[0.3, 0.9, 0.999, 1e-4]]), np.array([[0.5, 0.2, 0.99, 0.5]])
    kl = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    found = [losses.binary_divergence(f32(*np.log(p)), f32(*np.log(q)), k) for k in ("tv", "kl")]
    assert_allclose(found[0], np.abs(p - q), rtol=1e-5, atol=1e-7)
    assert_allclose(found[1], kl, rtol=1e-4, atol=1e-7)
    certain = losses.binary_divergence(f32(0.0, 0.0), f32(0.0, math.log(0.5)), "kl")
    assert_allclose(certain, [0.0, 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-6)], atol=1e-3)


# Where the policy is the one that sampled, or its own reference

AT_ONE = f32([-0.5, -1.2, -2.0])
ADVANTAGES_THERE = f32([2.0, 2.0, 2.0], [-0.7, -0.7, -0.7], [0.0, 0.0, 0.0])


@pytest.mark.parametrize("bounds", [0.0, 0.2])
@pytest.mark.parametrize("kind", get_args(losses.Surrogate))
def test_each_surrogate_begins_as_the_policy_gradient(kind, bounds):
    """Also with a bound at a ratio of 1; a token without an advantage has no gradient."""
    log_probs = jnp.broadcast_to(AT_ONE, (3, 3))
    bound = {"clip_low": bounds, "clip_high": bounds}
    bound |= {"dual_clip": 3.0} if kind == "clip" else {}

    def total(new):
        how = {"log_ratio": new - log_probs, **bound}
        return losses.surrogate(kind, new, ADVANTAGES_THERE, **how)[0].sum()

    assert_allclose(jax.grad(total)(log_probs), -ADVANTAGES_THERE, rtol=1e-6)


@pytest.mark.parametrize("gate", [gate for gate in get_args(losses.Gate) if gate != "none"])
def test_no_gate_drops_a_token_that_did_not_move(gate):
    new = jnp.broadcast_to(AT_ONE, (3, 3))
    dropped = losses.gated(gate, new, new, ADVANTAGES_THERE, np.ones((3, 3)), 0.0)
    assert not dropped.any()


def distances():
    """{name: a function of log-probabilities or logits, and where it is 0}."""
    logits = f32([0.3, -1.0, 2.0, -1e30])
    measured = {}
    for kind in ("k2", "k3"):
        measured[f"kl {kind}"] = functools.partial(ops.kl, estimator=kind), AT_ONE
    for kind in ("tv", "kl"):
        apart = functools.partial(losses.binary_divergence, kind=kind)
        measured[f"binary {kind}"] = apart, f32(-0.5, -1e-3, 0.0)
    for kind in get_args(losses.Divergence):
        apart = functools.partial(losses.divergence, kind=kind, beta=0.3)
        measured[f"divergence {kind}"] = (lambda p, q, f=apart: f(p, teacher_logits=q)), logits
    measured["absolute"] = (lambda x, y: ops.absolute(x - y)), AT_ONE
    measured["values"] = (lambda v, r: losses.clipped_value(v, AT_ONE, r)), AT_ONE
    return measured


@pytest.mark.parametrize("name", distances())
def test_what_is_0_at_equality_has_no_gradient_there(name):
    apart, point = distances()[name]
    loss, gradient = jax.value_and_grad(lambda x: apart(x, point).sum())(point)
    assert_allclose(loss, 0, atol=1e-7)
    assert_allclose(gradient, np.zeros(point.shape), atol=3e-6)
    assert np.any(
        jax.grad(lambda x: apart(x, point).sum())(point + f32(0.1, -0.2, -0.05, 0)[: len(point)])
    )


@pytest.mark.parametrize("kind", [*get_args(losses.DPOKind), *get_args(losses.KTOKind)])
def test_losses_of_answers_have_a_finite_gradient_at_equality(kind):
    """At the reference, at a margin of 0, and of certain answers; there a hinge is at its end."""

    def total(chosen, rejected):
        if kind in get_args(losses.KTOKind):
            point = {"reference_point": 0.0, "desirable": f32(1, 0), "beta": 0.5, "kind": kind}
            return losses.kto(chosen - rejected, **point).sum()
        return losses.dpo(chosen, rejected, 0.5, kind).sum()

    of_both = jax.grad(total, argnums=(0, 1))
    assert np.isfinite(of_both(f32(0, 0), f32(0, 0))).all()
    at_its_end = of_both(f32(2, 2), f32(0, 0))
    assert np.isfinite(at_its_end).all()
    assert np.any(at_its_end) == (kind != "hinge")


# One number from many


@pytest.mark.parametrize(
    ("how", "expected"), [("token", 1.25), ("sequence", 1.5), ("sum", 2.5), ("fixed", 0.625)]
)
def test_aggregate_by_hand(how, expected):
    """Masked columns hold NaN."""
    nan = math.nan
    per_token = f32([nan, 2, nan, nan, nan], [nan, 1, 1, 1, nan], [nan] * 5)
    mask = np.array([[0, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
    wider = [np.pad(x, ((0, 0), (3, 2))) for x in (per_token, mask)]

    @jax.jit
    def means(*batches):
        return [losses.aggregate(*batch, how, length=4).value for batch in batches]

    assert means((per_token, mask), wider) == pytest.approx([expected] * 2)


def test_weighted_mean_by_hand():
    """Entries of weight 0 are not read, neither for the value nor for the gradient."""

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def total(x, weight):
        mean = losses.weighted_mean(x, weight)
        return mean.total, (mean.value, mean.count)

    x, weight = f32(1, math.nan, 4), f32(3, 0, 1)
    (_, (value, count)), gradient = total(x, weight)
    assert (value, count) == (7 / 4, 4)
    assert_array_equal(gradient, [3, 0, 1])
    assert total(x, 0 * weight)[0][1][0] == 0


def test_weights_of_any_sign_count_as_written():
    """And the gradients are sum-normalised ones of x and of the weights, also at a weight of 0."""

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def value_and_gradients(x, weight):
        return losses.weighted_mean(x, weight).value

    for x, weight, expected in (
        ((1, 2, 3), (1, -1, 1), 2.0),  # (1 - 2 + 3) / 1
        ((1, 2, 3), (-1, -1, -2), 9 / 4),
        ((4, 1, 0), (0.5, -1.5, 0), -0.5),  # (2 - 1.5) / -1
        ((5, 7, 0), (0, 2, 0), 7.0),
    ):
        x, weight = f32(*x), f32(*weight)
        found, (of_x, of_weight) = value_and_gradients(x, weight)
        assert found == pytest.approx(expected)
        assert_allclose(of_x, weight / weight.sum(), rtol=1e-6)
        assert_allclose(of_weight, (x - expected) / weight.sum(), rtol=1e-6)
    assert jax.jit(losses.weighted_mean)(f32(), f32()).value == 0


ONES = np.ones((2, 3))
BEST = np.zeros(1, int)


@pytest.mark.parametrize(
    ("f", "args", "error", "message"),
    [
        (losses.comparison, (np.zeros(4), BEST), AssertionError, "rank"),
        (losses.comparison, (np.zeros((2, 2)), np.zeros(3, int)), AssertionError, r"\(3,\)"),
        (losses.regression, (np.zeros((2, 1)), np.zeros(2)), AssertionError, "shapes"),
        (losses.aggregate, (ONES, ONES, "fixed", 0), ValueError, "length"),
        (losses.aggregate, (np.ones(3), np.ones(3)), AssertionError, "rank"),
        (losses.aggregate, (ONES, ONES[:, :1]), AssertionError, "shapes"),
    ],
)
def test_what_a_loss_cannot_mean_is_refused(f, args, error, message):
    with pytest.raises(error, match=message):
        f(*args)
