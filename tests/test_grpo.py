"""GRPO and Dr. GRPO: advantages within groups by hand, the loss by a slow loop, the gradient by enumeration, bandits
whose optima are known; what must not matter (masked columns, absent rows, microbatches, devices)."""

import dataclasses
import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tabular import (
    BANDIT_REF,
    BANDIT_REWARD,
    assert_close,
    assert_identical,
    bandit_params,
    bandit_policy_fn,
    bandit_rollout,
    policy_fn,
    policy_params,
    rollout,
)

from rlhf_jax.algorithms import grpo
from rlhf_jax.types import PolicyOutput, Rollout, TrainState

KEY = jax.random.key(7)
SGD = optax.sgd(0.3)
# Groups of four answers: one with an absent answer, one with a single present answer, one that is absent.
LENGTHS = [4, 1, 2, 0, 3, 0, 0, 0, 0, 0, 0, 0, 2, 4, 1, 1]
FOUR = grpo.Config(group_size=4)
# Several tests ask different questions of this update, which is compiled once.
SHUFFLED = grpo.Config(group_size=4, num_epochs=2, num_minibatches=2, kl_loss_coef=0.1)


def updater(config, policy=policy_fn, optimizer=SGD, **kwargs):
    return partial(grpo.update, policy_fn=policy, optimizer=optimizer, config=config, **kwargs)


@functools.cache
def jitted(config):
    return jax.jit(updater(config))


def start():
    return TrainState.create(policy_params(0), SGD)


def test_advantages_by_hand():
    """(1, 0, 0, 0) and (1, 2, 6), whose standard deviation with n - 1 is sqrt(7); equal rewards give exactly 0."""
    batch = rollout(0, [2, 3, 4, 1, 3, 1, 2, 0, 4, 4, 1, 2])
    batch = batch.replace(rewards=None, scores=jnp.array([1.0, 0, 0, 0, 1, 2, 6, np.nan, 0.1, 0.1, 0.1, 0.1]))
    deviation = np.sqrt(7.0)
    cases = [
        (grpo.Config(group_size=4, eps=0.0), [1.5, -0.5, -0.5, -0.5, -2 / deviation, -1 / deviation, 3 / deviation]),
        (FOUR, [1.4997, -0.4999, -0.4999, -0.4999, -2 / deviation, -1 / deviation, 3 / deviation]),
        (grpo.Config(group_size=4, scale=False), [0.75, -0.25, -0.25, -0.25, -2.0, -1.0, 3.0]),
    ]
    for config, expected in cases:
        prepared = grpo.prepare(batch, config).advantages
        rows = np.where(np.asarray(batch.response_mask) != 0, np.array([*expected, 0, 0, 0, 0, 0])[:, None], 0.0)
        np.testing.assert_allclose(prepared, rows, atol=2e-4 if config.eps else 1e-6)
        assert not prepared[7:].any()
    summed = batch.replace(rewards=jnp.where(batch.response_mask != 0, 0.5, jnp.nan), scores=None)
    lengths = batch.replace(scores=0.5 * batch.response_mask.sum(axis=1))
    assert_close(grpo.prepare(summed, FOUR).advantages, grpo.prepare(lengths, FOUR).advantages)


def test_golden_update():
    """One update's metrics, so that no change of them goes unnoticed."""
    state, metrics = jitted(SHUFFLED)(start(), rollout(0, LENGTHS), KEY)
    golden = {
        "loss": 0.061108,
        "policy/loss": 0.041556,
        "policy/clip_fraction": 0.156656,
        "policy/approx_kl": 0.022911,
        "policy/ratio_max": 1.615938,
        "policy/kl_loss": 0.195517,
        "objective/entropy": 3.293203,
        "grad_norm": 0.249110,
        "nonfinite": 0.0,
    }
    assert state.step == 4
    assert_close(metrics, golden, atol=2e-5)


def test_microbatches_change_nothing():
    batch = rollout(0, LENGTHS)
    expected = jitted(SHUFFLED)(start(), batch, KEY)
    assert_close(jitted(dataclasses.replace(SHUFFLED, num_microbatches=4))(start(), batch, KEY), expected)


def test_masked_columns_do_not_matter():
    batch = rollout(0, LENGTHS)
    inside = batch.response_mask != 0
    config = grpo.Config(group_size=4, entropy_coef=0.1)

    @jax.jit
    def run(poison):
        def poisoned(x):  # added, so that what is masked too late comes back as a gradient
            return x + jnp.where(inside, 0.0, poison)

        def poisoned_policy(*args):
            return PolicyOutput(*(poisoned(x) for x in policy_fn(*args)))

        fields = ("log_probs", "ref_log_probs", "rewards")
        bad = batch.replace(**{name: poisoned(getattr(batch, name)) for name in fields})
        return updater(config, poisoned_policy)(start(), bad, KEY)

    expected = run(0.0)
    assert expected[1]["grad_norm"] > 0
    for poison in (np.nan, 1e4, -1e4):
        assert_identical(run(poison), expected)


def test_absent_rows_are_not_there():
    """A group without its absent answers is a smaller group."""
    prepared = grpo.prepare(rollout(0, LENGTHS), FOUR)
    present = np.array(LENGTHS) > 0
    f = jax.jit(partial(grpo.loss, policy_fn=policy_fn, config=FOUR))
    smaller = jax.tree.map(lambda x: np.asarray(x)[present], prepared)
    assert_close(f(policy_params(0), smaller, KEY), f(policy_params(0), prepared, KEY))
    padded = rollout(0, [4, 2, 0, 0, 3, 1, 0, 0])
    kept = np.array([0, 1, 4, 5])
    expected = grpo.prepare(jax.tree.map(lambda x: np.asarray(x)[kept], padded), grpo.Config(group_size=2)).advantages
    assert_close(grpo.prepare(padded, FOUR).advantages[kept], expected)


def test_nothing_at_all_changes_nothing():
    after, metrics = jitted(SHUFFLED)(start(), rollout(0, [0] * 16), KEY)
    assert_identical(after.params, start().params)
    assert not any(np.asarray(x).any() for x in metrics.values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (grpo.Config(group_size=1), "group_size must be at least 2 .*got 1"),
        (grpo.Config(group_size=3), "16 rows .* group_size=3"),
        (grpo.Config(kl_loss_estimator="k1"), "use it in the reward"),
        (grpo.Config(aggregate="fixed"), "length"),
        (grpo.Config(eps=-1.0), "eps"),
        (grpo.Config(dual_clip=0.5), "dual_clip"),
    ],
)
def test_unusable_configs(config, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(updater(config), start(), rollout(0, LENGTHS), KEY)


def test_the_default_needs_a_reference():
    with pytest.raises(ValueError, match=r"rollout\.ref_log_probs .*kl_loss_coef=0"):
        jax.eval_shape(updater(FOUR), start(), rollout(0, LENGTHS).replace(ref_log_probs=None), KEY)


def test_gradient_by_enumeration():
    """All 27 groups of three bandit answers, each with its probability: the scaled advantages' expected gradient."""
    config = grpo.Config(group_size=3, kl_loss_coef=0.0)
    groups = np.array(list(itertools.product(range(3), repeat=3)))  # [27, 3]
    probs, rewards = np.asarray(BANDIT_REF, np.float64), np.asarray(BANDIT_REWARD, np.float64)
    expected = np.zeros(3)
    for group in groups:
        r = rewards[group]
        a = (r - r.mean()) / (r.std(ddof=1) + config.eps) if r.std() > 0 else np.zeros(3)
        slope = np.mean([-a[i] * (np.eye(3)[group[i]] - probs) for i in range(3)], axis=0)
        expected += np.prod(probs[group]) * slope

    @jax.jit
    def gradient(params):
        def of_group(arms):
            tokens = jnp.stack([jnp.zeros_like(arms), arms], axis=1)
            ones = jnp.ones_like(tokens)
            log_probs = bandit_policy_fn(bandit_params(), tokens, ones, None).log_probs
            batch = Rollout(tokens, ones, ones.at[:, 0].set(0), log_probs, scores=BANDIT_REWARD[arms])
            batch = grpo.prepare(batch, config)
            f = partial(grpo.loss, policy_fn=bandit_policy_fn, config=config)
            return jax.grad(f, has_aux=True)(params, batch, KEY)[0]["logits"]

        return jnp.sum(jax.vmap(of_group)(groups) * jnp.prod(BANDIT_REF[groups], axis=1)[:, None], axis=0)

    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(gradient(bandit_params()), expected, atol=1e-5)


def kl_optimum(coef):
    """argmax E[r] - coef KL(policy || reference)."""
    weights = np.asarray(BANDIT_REF) * np.exp(np.asarray(BANDIT_REWARD) / coef)
    return weights / weights.sum()


def reverse_kl_optimum(coef):
    """argmax E[r] - coef KL(reference || policy): coef ref / (lambda - r), lambda by bisection."""
    ref, rewards = np.asarray(BANDIT_REF, np.float64), np.asarray(BANDIT_REWARD, np.float64)
    low, high = rewards.max() + 1e-9, rewards.max() + 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(coef * ref / (middle - rewards)) > 1 else (low, middle)
    return coef * ref / (low - rewards)


@pytest.mark.parametrize(("estimator", "optimum"), [("k2", kl_optimum), ("k3", reverse_kl_optimum)])
def test_bandit_reaches_the_optimum(estimator, optimum):
    """Unscaled advantages are (G - 1) / G of the leave-one-out ones, so the optimum is that of the coefficient
    0.5 G / (G - 1) (ALGORITHMS 8.1)."""
    iterations, config = 300, grpo.Config(group_size=4, scale=False, kl_loss_coef=0.5, kl_loss_estimator=estimator)
    optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, iterations))
    update = updater(config, bandit_policy_fn, optimizer)

    def iteration(state, key):
        return update(state, bandit_rollout(state.params, key).replace(rewards=None), key)

    @jax.jit
    def train(key):
        state = TrainState.create(bandit_params(), optimizer)
        return jax.lax.scan(iteration, state, jax.random.split(key, iterations))

    state, metrics = train(KEY)
    target = optimum(0.5 * 4 / 3)
    np.testing.assert_allclose(target.sum(), 1.0, rtol=1e-5)

    def distance(logits):
        return 0.5 * np.sum(np.abs(np.asarray(jax.nn.softmax(logits)) - target))

    assert distance(bandit_params()["logits"]) > 0.2
    assert distance(state.params["logits"]) < 0.02
    assert not metrics["nonfinite"].any()
