"""ops: masked statistics, token log-probabilities, KL estimators, response masks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import ops


def test_masked_statistics_by_hand():
    x = np.array([[1.0, 2.0, np.nan], [6.0, np.nan, np.nan]], np.float32)
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    # The mean of these in bfloat16 arithmetic is another.
    low = np.full((1, 1000), 1.0078125, jnp.bfloat16)

    @jax.jit
    def statistics(x, mask, low):
        means = [ops.masked_mean(x, mask, axis=axis) for axis in (None, 0, 1)]
        variances = [ops.masked_var(x, mask, axis=axis) for axis in (None, 1)]
        # Packed documents are numbered 1, 2, ...
        return means, variances, ops.masked_mean(x, 7.0 * mask), ops.masked_mean(low, low)

    (mean, of_columns, of_rows), (var, var_of_rows), marked, of_low = statistics(x, mask, low)
    assert mean == marked == 3.0
    assert var == pytest.approx(14 / 3)  # (4 + 1 + 9) / 3: divided by n
    assert_allclose(of_low, np.float32(1.0078125), rtol=1e-6)
    assert_allclose(of_rows, [1.5, 6.0])
    assert_allclose(var_of_rows, [0.25, 0.0])
    assert_allclose(of_columns, [3.5, 2.0, 0.0])


def test_whiten_by_hand():
    x = np.array([[1.0, 3.0, np.nan]], np.float32)
    mask = np.array([[1, 1, 0]])
    whiten = jax.jit(ops.whiten, static_argnames="shift_mean")
    assert_allclose(whiten(x, mask), [[-1.0, 1.0, 0.0]], atol=1e-6)
    assert_allclose(whiten(x, mask, shift_mean=False), [[1.0, 3.0, 0.0]], atol=1e-6)
    assert_allclose(whiten(3 * x, mask, shift_mean=False), [[5.0, 7.0, 0.0]], atol=1e-6)
    # Of a mean of 1e7 the variance, 1, grows by 1.
    assert_allclose(whiten(x + 1e7 - 2, mask), [[-0.70711, 0.70711, 0.0]], atol=1e-5)


@pytest.mark.parametrize("unit", [1e-8, 1e-4, 1.0, -7.0, 1e8])
def test_whitening_knows_no_unit(unit):
    """Numbers that vary; equal ones give exactly 0 with a finite gradient, and their rounding stays
    below 1.
    """
    rng = np.random.default_rng(0)
    x, mask = np.float32(rng.normal(0.5, 1.0, (4, 9))), rng.random((4, 9)) < 0.8
    whiten = jax.jit(ops.whiten)
    expected = np.sign(unit) * (x - x[mask].mean()) / x[mask].std()
    assert_allclose(whiten(unit * x, mask), np.where(mask, expected, 0), atol=1e-5)
    same = np.full_like(x, 10.1 * unit)
    assert not np.any(whiten(same, mask))
    assert np.isfinite(jax.grad(lambda x: jnp.sum(whiten(x, mask) * expected))(same)).all()
    rounded = np.where(rng.random(x.shape) < 0.5, np.nextafter(same, np.float32(np.inf)), same)
    assert np.abs(whiten(rounded, mask)).max() < 0.7


def test_shape_mistakes_say_what_was_expected():
    with pytest.raises(AssertionError, match=r"shapes.*\(2, 3\).*\(3,\)"):
        ops.masked_mean(np.ones((2, 3)), np.ones(3))
    with pytest.raises(AssertionError, match=r"\(2, 3\)"):
        ops.token_log_probs(np.ones((2, 4, 5)), np.ones((2, 3), int))
    with pytest.raises(ValueError, match="above 0"):
        ops.token_log_probs(np.zeros((1, 2, 3)), np.zeros((1, 2), int), temperature=0)
    with pytest.raises(ValueError, match=r"k1, k2, k3.*'k4'"):
        ops.kl(np.zeros(1), np.zeros(1), "k4")
    with pytest.raises(AssertionError, match="rank"):
        ops.response_mask(np.ones(3, int), 1, 0)


def test_log_probs_and_entropy_with_their_gradients():
    """Huge logits and impossible tokens give finite numbers. The gradient of a log-prob is one-hot
    - softmax, that of an entropy -p (log p + entropy).
    """
    rng = np.random.default_rng(1)
    logits = 3 * rng.normal(size=(2, 5, 3))
    logits[0, :3] = [[1e4, -1e4, 0.0], [89.0, 88.0, -np.inf], [-1e2, -1e2, -1e2]]
    tokens = np.array([[0, 1, 1, 2, 0], [2, 0, 1, 1, 2]])
    temperature = 0.5  # exact in float32
    log_p = scipy.special.log_softmax(logits / temperature, axis=-1)[:, :-1]
    p = np.exp(log_p)
    chosen = np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)  # column t, predicted at t - 1
    possible = np.where(p > 0, log_p, 0.0)
    entropy = -np.sum(p * possible, axis=-1, keepdims=True)

    def check(function, expected, slope):
        @jax.jit
        def both(x):
            found, pull = jax.vjp(function, x)
            return found, pull(jnp.ones((2, 5)))[0]

        found, gradient = map(np.asarray, both(np.float32(logits)))
        assert_allclose(found[:, 1:], expected[..., 0], rtol=1e-5, atol=1e-5)
        assert_array_equal(found[:, 0], 0.0)
        assert_allclose(gradient[:, :-1], slope / temperature, rtol=1e-4, atol=1e-5)

    check(
        lambda x: ops.token_log_probs(x, tokens, temperature),
        chosen,
        np.eye(3)[tokens[:, 1:]] - p,
    )
    check(lambda x: ops.entropy(x, temperature), entropy, -p * (possible + entropy))


def test_kl_and_ratio_by_hand():
    """k3 is exact for tiny log-ratios; beyond 40 it points towards the reference, and ratios go on
    as a line.
    """

    @functools.partial(jax.jit, static_argnames="estimator")
    @jax.value_and_grad
    def kl(log_ratio, estimator):
        return ops.kl(log_ratio, jnp.zeros(()), estimator)

    for estimator, expected in (("k1", 0.693147), ("k2", 0.240227), ("k3", 0.193147)):
        found, _ = kl(np.float32(np.log(2.0)), estimator=estimator)
        assert found == pytest.approx(expected, abs=1e-6)
    assert kl(np.float32(1e-3), estimator="k3")[0] == pytest.approx(5e-7 - 1e-9 / 6, rel=1e-3)
    value, slope = kl(np.float32(-1e4), estimator="k3")
    assert 0 < value < np.inf
    assert -np.inf < slope < 0
    ratio = jax.jit(jax.value_and_grad(lambda x: ops.ratio(x, jnp.zeros(()))))
    value, slope = ratio(np.float32(41.0))
    assert_allclose([value, slope], [2 * math.exp(40), math.exp(40)], rtol=1e-5)
    assert np.isfinite(np.square(slope))


def test_response_mask_ends_at_the_first_eos_of_the_response():
    tokens = np.array(
        [[9, 5, 1, 9, 2, 9], [0, 5, 1, 2, 3, 4], [0, 5, 9, 0, 0, 0], [0, 5, 1, 2, 3, 9]]
    )
    expected = [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]]
    assert_array_equal(jax.jit(ops.response_mask, static_argnums=1)(tokens, 2, 9), expected)


def test_policy_fn_makes_a_policy_of_a_lookup_table():
    table = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3]]))
    policy_fn = ops.policy_fn(lambda params, tokens, attention_mask, key: params[tokens], 0.5)
    output = jax.jit(policy_fn)(table.astype(jnp.bfloat16), np.array([[0, 1, 2]]), None, None)
    output = jax.tree.map(np.asarray, output)
    assert output.log_probs.dtype == jnp.float32
    expected = [[0, math.log(1 / 6), math.log(0.49 / 0.54)]]  # of squared probabilities
    assert_allclose(output.log_probs, expected, atol=0.02)
    assert output.entropy[0, 1] == pytest.approx(math.log(6) - 2 / 3 * math.log(4), abs=0.02)
    assert output.values is None
