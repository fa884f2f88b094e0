"""Vanilla policy gradient: numbers by hand, what must not matter, and a bandit whose optimum is known."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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

from rlhf_jax import advantages
from rlhf_jax.algorithms import vpg
from rlhf_jax.types import PolicyOutput, Rollout, TrainState

# Eight rows for four devices: unequal numbers of tokens, and nothing at all on the third device.
LENGTHS = [4, 1, 2, 0, 0, 0, 3, 4]
KEY = jax.random.key(7)
SGD = optax.sgd(0.3)


def updater(config, policy=policy_fn, optimizer=SGD):
    return partial(vpg.update, policy_fn=policy, optimizer=optimizer, config=config)


@functools.cache
def jitted(config):
    return jax.jit(updater(config))


def start():
    return TrainState.create(policy_params(0), SGD)


def test_loss_by_hand():
    """b0 = 0 and r = (8, 12) give A = (7, 11); the loss is -mean_i [A_i sum_t log p_it], here with p = 1/2."""
    _, advantage = advantages.ema_baseline(0.0, jnp.array([8.0, 12.0]))
    np.testing.assert_allclose(advantage, [7.0, 11.0], rtol=1e-6)
    mask = jnp.array([[0, 0, 1, 1], [0, 0, 1, 0]])
    batch = Rollout(
        tokens=jnp.zeros((2, 4), jnp.int32),
        attention_mask=jnp.ones((2, 4), jnp.int32),
        response_mask=mask,
        log_probs=jnp.zeros((2, 4)),
        advantages=jnp.where(mask != 0, advantage[:, None], 0.0),
    )
    params = {"logits": jnp.zeros((2, 2)), "values": jnp.zeros(2)}
    f = jax.jit(partial(vpg.loss, policy_fn=policy_fn, config=vpg.Config(entropy_coef=0.1)))
    value, metrics = f(params, batch, KEY)
    policy_loss, entropy = (7 * 2 + 11) / 2 * np.log(2.0), 1.5 * np.log(2.0)
    assert_close(metrics, {"policy/loss": policy_loss, "objective/entropy": entropy})
    np.testing.assert_allclose(value, policy_loss - 0.1 * entropy, rtol=1e-6)
    assert_identical(f(params, batch.replace(advantages=advantage), KEY), (value, metrics))  # one per row: [B]
    gradient = jax.grad(lambda p: f(p, batch, KEY)[0])(params)["logits"]
    np.testing.assert_allclose(gradient[0], (7 * 2 + 11) / 2 * np.array([-0.5, 0.5]), rtol=1e-6)


def test_microbatches_and_absent_rows_change_nothing():
    batch = rollout(0, LENGTHS)
    smaller = jax.tree.map(lambda x: x[np.array(LENGTHS) > 0], batch)
    for aggregate in ("sum", "token"):
        config = vpg.Config(aggregate=aggregate, entropy_coef=0.1)
        whole = jitted(config)(start(), batch, KEY)
        assert_close(jitted(dataclasses.replace(config, num_microbatches=4))(start(), batch, KEY), whole)
        assert_close(jitted(config)(start(), smaller, KEY), whole)


def test_masked_columns_do_not_matter():
    batch = rollout(0, LENGTHS)
    inside = batch.response_mask != 0

    @jax.jit
    def run(poison):
        def poisoned(*args):
            return PolicyOutput(*(x + jnp.where(inside, 0.0, poison) for x in policy_fn(*args)))

        bad = batch.replace(advantages=jnp.where(inside, batch.advantages, poison), log_probs=poison + batch.log_probs)
        return updater(vpg.Config(entropy_coef=0.1), poisoned)(start(), bad, KEY)

    expected = run(0.0)
    assert expected[1]["grad_norm"] > 0
    for poison in (np.nan, 1e4, -1e4):
        assert_identical(run(poison), expected)


def test_jit_changes_nothing():
    batch = rollout(0, LENGTHS)
    config = vpg.Config(entropy_coef=0.1)
    assert_close(updater(config)(start(), batch, KEY), jitted(config)(start(), batch, KEY))


def test_finite_guard_keeps_the_state():
    batch = rollout(0, LENGTHS)
    bad = batch.replace(advantages=batch.advantages.at[0, 3].set(jnp.inf))
    kept, metrics = jitted(vpg.Config(entropy_coef=0.1))(start(), bad, KEY)
    assert metrics["nonfinite"] == 1
    assert_identical(kept, start())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (vpg.Config(baseline="mean"), "ema, none"),
        (vpg.Config(baseline_decay=1.5), "baseline_decay"),
        (vpg.Config(aggregate="mean"), "token, sequence, sum, fixed"),
        (vpg.Config(aggregate="fixed"), "length"),
        (vpg.Config(num_minibatches=3), "8 rows .* num_minibatches=3"),
        (vpg.Config(num_microbatches=3), "num_microbatches=3 does not divide the 8 rows"),
    ],
)
def test_unusable_configs(config, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(updater(config), start(), rollout(0, LENGTHS), KEY)


def test_advantages_are_required():
    with pytest.raises(ValueError, match=r"rollout\.advantages"):
        jax.eval_shape(updater(vpg.Config()), start(), rollout(0, LENGTHS).replace(advantages=None), KEY)


@pytest.mark.parametrize("baseline", ["ema", "none"])
def test_bandit_reaches_the_optimum(baseline):
    iterations = 200
    optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, iterations))
    update = updater(vpg.Config(baseline=baseline), bandit_policy_fn, optimizer)

    def iteration(carry, key):
        state, mean = carry
        rollout_key, update_key = jax.random.split(key)
        batch = bandit_rollout(state.params, rollout_key)
        mean, advantage = advantages.ema_baseline(mean, batch.rewards[:, 1])
        advantage = advantage if baseline == "ema" else batch.rewards[:, 1]
        state, metrics = update(state, batch.replace(advantages=advantage), update_key)
        return (state, mean), metrics

    @jax.jit
    def train(key):
        state = TrainState.create(bandit_params(), optimizer)
        return jax.lax.scan(iteration, (state, jnp.zeros(())), jax.random.split(key, iterations))

    (state, _), _ = train(KEY)
    assert total_variation(state.params) < 0.02
