"""RLOO: advantages within groups by hand, the loss by a slow loop, a bandit whose optimum is known; what must not
matter (masked columns, absent rows, microbatches, devices) and that minibatches may split groups."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tabular import (
    assert_close,
    assert_identical,
    bandit_params,
    bandit_policy_fn,
    bandit_rollout,
    policy_fn,
    policy_params,
    rollout,
    total_variation,
)

from rlhf_jax import sharding
from rlhf_jax.algorithms import rloo, vpg
from rlhf_jax.rollout import rescore
from rlhf_jax.types import PolicyOutput, TrainState

KEY = jax.random.key(7)
SGD = optax.sgd(0.3)
# Groups of four answers: one with an absent answer, one with a single present answer, one that is absent.
LENGTHS = [4, 1, 2, 0, 3, 0, 0, 0, 0, 0, 0, 0, 2, 4, 1, 1]
# Several tests ask different questions of this update, which is compiled once.
SHUFFLED = rloo.Config(num_epochs=2, num_minibatches=2, kl_loss_coef=0.1)


def updater(config, policy=policy_fn, optimizer=SGD, **kwargs):
    return partial(rloo.update, policy_fn=policy, optimizer=optimizer, config=config, **kwargs)


@functools.cache
def jitted(config):
    return jax.jit(updater(config))


def start():
    return TrainState.create(policy_params(0), SGD)


def row_advantages(batch, config):
    """[B]; checks that all response tokens of a row have the same advantage, and the others 0."""
    prepared = np.asarray(rloo.prepare(batch, config).advantages)
    mask = np.asarray(batch.response_mask)
    rows = np.max(np.where(mask != 0, prepared, -np.inf), axis=1, initial=-np.inf)
    rows = np.where(mask.any(axis=1), rows, 0.0)
    np.testing.assert_array_equal(prepared, np.where(mask != 0, rows[:, None], 0.0))
    return rows


def test_advantages_by_hand():
    """G / (G - 1) * (r - mean): (1, 0, 0, 0) gives 1, -1/3, -1/3, -1/3; of (1, 2, 6) each minus the others' mean."""
    batch = rollout(0, LENGTHS[:4] + [3] * 4).replace(rewards=None)
    scores = jnp.array([1.0, 2.0, 6.0, np.nan, 1.0, 0.0, 0.0, 0.0])  # nobody reads an absent row's score
    expected = [-3.0, -1.5, 4.5, 0.0, 1.0, -1 / 3, -1 / 3, -1 / 3]
    np.testing.assert_allclose(row_advantages(batch.replace(scores=scores), rloo.Config()), expected, rtol=1e-6)
    pairs = rloo.Config(group_size=2)
    expected = [-1.0, 1.0, 0.0, 0.0, 1.0, -1.0, 0.0, 0.0]
    np.testing.assert_allclose(row_advantages(batch.replace(scores=scores), pairs), expected, rtol=1e-6)


def test_rewards_come_before_scores_and_are_summed_over_the_response():
    batch = rollout(0, [4, 1, 2, 3]).replace(scores=jnp.array([9.0, 0.0, 0.0, 0.0]))
    mask = batch.response_mask != 0
    batch = batch.replace(rewards=jnp.where(mask, 1.0, jnp.nan))  # so the sum is the length
    expected = 4 / 3 * (np.array([4.0, 1, 2, 3]) - 2.5)
    np.testing.assert_allclose(row_advantages(batch, rloo.Config()), expected, rtol=1e-6)


def test_the_first_step_is_reinforce():
    """On the policy's own samples the gradient is that of REINFORCE with the same advantages (ALGORITHMS 4)."""
    params = policy_params(0)
    batch = rloo.prepare(rescore(rollout(0, LENGTHS), params, policy_fn=policy_fn), rloo.Config())

    @jax.jit
    def gradients(params):
        def value(params, algorithm):
            return algorithm.loss(params, batch, KEY, policy_fn=policy_fn, config=algorithm.Config())[0]

        return [jax.grad(value)(params, algorithm) for algorithm in (rloo, vpg)]

    ours, plain = gradients(params)
    assert np.abs(ours["logits"]).max() > 0.01
    assert_close(ours, plain)


def test_golden_update():
    """One update's metrics, so that no change of them goes unnoticed."""
    state, metrics = jitted(SHUFFLED)(start(), rollout(0, LENGTHS), KEY)
    golden = {
        "loss": 0.383393,
        "policy/loss": 0.335597,
        "policy/clip_fraction": 0.192370,
        "policy/approx_kl": 0.024983,
        "policy/ratio_max": 1.617270,
        "policy/kl_loss": 0.477966,
        "objective/entropy": 3.293788,
        "grad_norm": 0.627041,
        "nonfinite": 0.0,
    }
    assert state.step == 4
    assert_close(metrics, golden, atol=2e-5)


def test_minibatches_may_split_groups():
    """Advantages are made before the shuffle: small steps on quarters of the batch add up to those on all of it."""
    optimizer = optax.sgd(1e-3)
    batch = rollout(0, [4, 3, 2, 1] * 2)
    state = TrainState.create(policy_params(0), optimizer)

    def moved(**fields):
        after, _ = jax.jit(updater(rloo.Config(**fields), optimizer=optimizer))(state, batch, KEY)
        return np.asarray(after.params["logits"] - state.params["logits"])

    whole = moved()
    np.testing.assert_allclose(moved(num_minibatches=4) / 4, whole, atol=0.02 * np.abs(whole).max())


def test_microbatches_change_nothing():
    batch = rollout(0, LENGTHS)
    expected = jitted(SHUFFLED)(start(), batch, KEY)
    assert_close(jitted(dataclasses.replace(SHUFFLED, num_microbatches=4))(start(), batch, KEY), expected)


def test_masked_columns_do_not_matter():
    batch = rollout(0, LENGTHS)
    inside = batch.response_mask != 0
    config = rloo.Config(kl_loss_coef=0.1, entropy_coef=0.1)

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
    batch = rollout(0, LENGTHS)
    present = np.array(LENGTHS) > 0
    prepared = rloo.prepare(batch, SHUFFLED)
    f = jax.jit(partial(rloo.loss, policy_fn=policy_fn, config=SHUFFLED))
    assert_close(
        f(policy_params(0), jax.tree.map(lambda x: np.asarray(x)[present], prepared), KEY),
        f(policy_params(0), prepared, KEY),
    )
    pairs = rloo.Config(group_size=2)
    padded = rollout(0, [4, 2, 0, 0, 3, 1, 0, 0])
    kept = np.array([0, 1, 4, 5])
    expected = rloo.prepare(jax.tree.map(lambda x: np.asarray(x)[kept], padded), pairs).advantages
    assert_close(rloo.prepare(padded, rloo.Config()).advantages[kept], expected)


def test_nothing_at_all_changes_nothing():
    after, metrics = jitted(SHUFFLED)(start(), rollout(0, [0] * 16), KEY)
    assert_identical(after.params, start().params)
    assert not any(np.asarray(x).any() for x in metrics.values())


def test_a_reward_that_is_not_finite_keeps_the_state():
    batch = rollout(0, LENGTHS)
    kept, metrics = jitted(SHUFFLED)(start(), batch.replace(rewards=batch.rewards.at[0, 3].set(jnp.nan)), KEY)
    assert metrics["nonfinite"] == 1
    assert_identical(kept, start())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (rloo.Config(group_size=1), "group_size must be at least 2 .*got 1"),
        (rloo.Config(group_size=3), "16 rows .* group_size=3"),
        (rloo.Config(kl_loss_estimator="k1"), "use it in the reward"),
        (rloo.Config(aggregate="mean"), "token, sequence, sum, fixed"),
        (rloo.Config(aggregate="fixed"), "length"),
        (rloo.Config(clip_high=-0.1), "clip_high"),
        (rloo.Config(num_minibatches=3), "16 rows .* num_minibatches=3"),
    ],
)
def test_unusable_configs(config, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(updater(config), start(), rollout(0, LENGTHS), KEY)


def test_groups_do_not_cross_devices():
    prepare = partial(rloo.prepare, config=rloo.Config(group_size=8))
    mapped = jax.shard_map(prepare, mesh=sharding.make_mesh(4), in_specs=P("data"), out_specs=P("data"))
    assert jax.eval_shape(prepare, rollout(0, LENGTHS)).advantages.shape == (16, 7)
    with pytest.raises(ValueError, match=r"4 rows \(on each device.* group_size=8"):
        jax.eval_shape(mapped, rollout(0, LENGTHS))


def test_missing_fields_are_named():
    batch = rollout(0, LENGTHS)
    with pytest.raises(ValueError, match="got neither"):
        rloo.prepare(batch.replace(rewards=None), rloo.Config())
    for wrong in ({"rewards": batch.rewards[:, 1:]}, {"rewards": None, "scores": jnp.zeros(3)}):
        with pytest.raises(ValueError, match="expected equal shapes"):
            rloo.prepare(batch.replace(**wrong), rloo.Config())
    for name, config in [("advantages", rloo.Config()), ("ref_log_probs", SHUFFLED)]:
        with pytest.raises(ValueError, match=rf"rollout\.{name} .*got None"):
            rloo.loss(policy_params(0), batch.replace(**{name: None}), KEY, policy_fn=policy_fn, config=config)


def test_bandit_reaches_the_optimum():
    """Reward minus 0.5 times k1 (ALGORITHMS 8.1)."""
    iterations = 300
    optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, iterations))
    update = updater(rloo.Config(), bandit_policy_fn, optimizer)

    def iteration(state, key):
        return update(state, bandit_rollout(state.params, key), key)

    @jax.jit
    def train(key):
        state = TrainState.create(bandit_params(), optimizer)
        return jax.lax.scan(iteration, state, jax.random.split(key, iterations))

    state, metrics = train(KEY)
    assert total_variation(bandit_params()) > 0.3
    assert total_variation(state.params) < 0.02
    assert not metrics["nonfinite"].any()
