"""PPO: numbers by hand and by a slow loop, a bandit whose optimum is known; what must not matter (masked columns,
absent rows, microbatches, devices, jit) and what must (steps, keys)."""

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
    three_ways,
    total_variation,
)

from rlhf_jax import sharding
from rlhf_jax.algorithms import ppo
from rlhf_jax.rollout import rescore
from rlhf_jax.types import PolicyOutput, Rollout, TrainState

# Eight rows for four devices: unequal numbers of tokens, and nothing at all on the third device.
LENGTHS = [4, 1, 2, 0, 0, 0, 3, 4]
KEY = jax.random.key(7)


SGD = optax.sgd(0.3)
ADAM = optax.adam(0.05, eps=1e-5)
# Several tests ask different questions of these two updates, which are compiled once.
SHUFFLED = ppo.Config(num_epochs=2, num_minibatches=2)
WHOLE = ppo.Config(num_epochs=2, entropy_coef=0.1)


def run_loss(batch, config, **kwargs):
    f = partial(ppo.loss, policy_fn=policy_fn, config=config, **kwargs)
    return jax.jit(f)(policy_params(0), batch, KEY)


def updater(config, optimizer, policy=policy_fn, **kwargs):
    return partial(ppo.update, policy_fn=policy, optimizer=optimizer, config=config, **kwargs)


@functools.cache
def jitted(config, optimizer):
    return jax.jit(updater(config, optimizer))


def one_token(log_ratio, **fields):
    """One row, one response token, two tokens of equal probability: the policy's log-prob is -ln 2, its value 1."""
    mask = jnp.array([[0, 1]])
    batch = Rollout(
        tokens=jnp.array([[0, 1]]),
        attention_mask=jnp.ones((1, 2), jnp.int32),
        response_mask=mask,
        log_probs=jnp.where(mask != 0, -np.log(2.0) - log_ratio, 0.0),
        values=jnp.zeros((1, 2)),
        advantages=jnp.array([[0.0, 1.0]]),
        returns=jnp.array([[0.0, 2.0]]),
    ).replace(**fields)
    params = {"logits": jnp.zeros((2, 2)), "values": jnp.ones(2)}
    return params, batch


def test_one_token_by_hand():
    params, batch = one_token(np.log(1.5))
    value, metrics = ppo.loss(params, batch, KEY, policy_fn=policy_fn, config=ppo.Config())
    expected = {
        "policy/loss": -1.2,  # the ratio of 1.5 is clipped
        "policy/clip_fraction": 1.0,
        "policy/approx_kl": 0.5 * np.log(1.5) ** 2,
        "policy/ratio_max": 1.5,
        "value/loss": 1.62,  # v = 1, old 0, R = 2 (ALGORITHMS 5)
        "objective/entropy": np.log(2.0),
    }
    assert_close(metrics, expected)
    np.testing.assert_allclose(value, -1.2 + 0.1 * 1.62, rtol=1e-6)
    free = ppo.Config(value_clip=None, entropy_coef=0.5)
    value, metrics = ppo.loss(params, batch, KEY, policy_fn=policy_fn, config=free)
    np.testing.assert_allclose(metrics["value/loss"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(value, -1.2 + 0.1 * 0.5 - 0.5 * np.log(2.0), rtol=1e-6)


def test_kl_term_by_hand():
    """d = ln 2: k2 0.240227, k3 0.193147 (ALGORITHMS 3), times the ratio, through which no gradient flows."""
    params, batch = one_token(np.log(1.1), ref_log_probs=jnp.array([[0.0, -2 * np.log(2.0)]], jnp.float32))
    for estimator, kl, slope in [("k2", 0.240227, np.log(2.0)), ("k3", 0.193147, 0.5)]:
        config = ppo.Config(kl_loss_coef=0.3, kl_loss_estimator=estimator, value_coef=0.0)
        f = partial(ppo.loss, policy_fn=policy_fn, config=config)
        (value, metrics), grads = jax.jit(jax.value_and_grad(f, has_aux=True))(params, batch, KEY)
        np.testing.assert_allclose(metrics["policy/kl_loss"], 1.1 * kl, rtol=1e-5)
        np.testing.assert_allclose(value, -1.1 + 0.3 * 1.1 * kl, rtol=1e-5)
        # d log p / d logit of the chosen token is 1/2; the surrogate's own slope is -ratio.
        np.testing.assert_allclose(grads["logits"][0, 1], 0.5 * (-1.1 + 0.3 * 1.1 * slope), rtol=1e-5)


def test_prepare():
    """GAE by hand (ALGORITHMS 5), then whitening over the tokens of all rows."""
    batch = rollout(0, [3, 0]).replace(
        rewards=jnp.zeros((2, 7)).at[0, 5].set(1.0), values=jnp.zeros((2, 7)).at[0, 3:6].set(jnp.array([0.1, 0.2, 0.3]))
    )
    plain = ppo.prepare(batch, ppo.Config(whiten_advantages=False))
    np.testing.assert_allclose(plain.advantages[0, 3:6], [0.82675, 0.765, 0.7], rtol=1e-6)
    np.testing.assert_allclose(plain.returns[0, 3:6], [0.92675, 0.965, 1.0], rtol=1e-6)
    white = ppo.prepare(batch, ppo.Config())
    a = np.array([0.82675, 0.765, 0.7])
    np.testing.assert_allclose(white.advantages[0, 3:6], (a - a.mean()) / a.std(), rtol=1e-4)
    assert_identical(white.returns, plain.returns)
    assert not white.advantages[1].any()
    scaled = ppo.prepare(batch, ppo.Config(whiten_rewards=True, whiten_advantages=False, gae_lambda=1.0))
    r = np.array([0.0, 0.0, 1.0])
    r = (r - r.mean()) / r.std() + r.mean()
    np.testing.assert_allclose(scaled.returns[0, 3:6], np.cumsum(r[::-1])[::-1], rtol=1e-5)


def test_golden_update():
    """One update's metrics, so that no change of them goes unnoticed."""
    state = TrainState.create(policy_params(0), ADAM)
    state, metrics = jitted(SHUFFLED, ADAM)(state, rollout(0, LENGTHS), KEY)
    golden = {
        "loss": 0.164194,
        "policy/loss": 0.054618,
        "policy/clip_fraction": 0.239583,
        "policy/approx_kl": 0.018355,
        "policy/ratio_max": 1.291154,
        "value/loss": 1.095765,
        "value/explained_variance": -0.089110,
        "objective/entropy": 4.183392,
        "grad_norm": 0.283639,
        "nonfinite": 0.0,
    }
    assert_close(metrics, golden, atol=2e-5)


@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_first_ratio_is_exactly_one(num_minibatches):
    optimizer = optax.sgd(0.0)
    state = TrainState.create(policy_params(0), optimizer)
    batch = jax.jit(partial(rescore, policy_fn=policy_fn))(rollout(0, LENGTHS), state.params)
    config = ppo.Config(num_epochs=1, num_minibatches=num_minibatches)
    _, metrics = jax.jit(updater(config, optimizer))(state, batch, KEY)
    assert metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/approx_kl"] == 0.0
    assert metrics["policy/clip_fraction"] == 0.0


def test_devices_agree_on_an_update():
    """Unequal token counts per device, one of them empty, several minibatches and microbatches, a KL term."""
    state = TrainState.create(policy_params(0), SGD)
    lengths = [4, 1, 2, 4, 2, 0, 1, 3, 0, 0, 0, 0, 3, 4, 1, 1]
    config = ppo.Config(
        num_epochs=2, num_minibatches=2, num_microbatches=2, shuffle_blocks=4, aggregate="sequence", kl_loss_coef=0.1
    )
    constraint = sharding.rows(sharding.make_mesh(4))
    one, spread, mapped = three_ways(
        updater(config, SGD), state, rollout(0, lengths), KEY, minibatch_sharding=constraint
    )
    assert_close(spread, one)
    assert_close(mapped, one)
    assert np.abs(one[0].params["logits"] - state.params["logits"]).max() > 0.01


def test_pmap_agrees():
    state = TrainState.create(policy_params(0), SGD)
    batch = rollout(0, LENGTHS)
    expected = jitted(WHOLE, SGD)(state, batch, KEY)
    shards = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), batch)
    mapped = jax.pmap(updater(WHOLE, SGD, axis_name="data"), axis_name="data", in_axes=(None, 0, None))
    results = mapped(state, shards, KEY)
    for device in range(4):
        assert_close(jax.tree.map(lambda x, device=device: x[device], results), expected)


def test_microbatches_change_nothing():
    state = TrainState.create(policy_params(0), SGD)
    batch = rollout(0, LENGTHS)
    for aggregate in ("token", "sequence"):
        config = dataclasses.replace(WHOLE, aggregate=aggregate)
        parts = jitted(dataclasses.replace(config, num_microbatches=4), SGD)(state, batch, KEY)
        assert_close(parts, jitted(config, SGD)(state, batch, KEY))


def test_denominator_is_what_the_loss_divides_by():
    batch = rollout(0, LENGTHS)
    value, _ = run_loss(batch, ppo.Config())
    doubled, _ = run_loss(batch, ppo.Config(), denominator=jnp.array(2.0 * sum(LENGTHS)))
    np.testing.assert_allclose(2 * doubled, value, rtol=1e-6)


def test_number_of_steps_and_fresh_shuffles():
    state = TrainState.create(policy_params(0), ADAM)
    batch = rollout(0, LENGTHS)
    update = jitted(SHUFFLED, ADAM)
    first, _ = update(state, batch, KEY)
    assert first.step == 2 * 2
    assert jitted(WHOLE, SGD)(TrainState.create(policy_params(0), SGD), batch, KEY)[0].step == 2
    assert_identical(update(state, batch, KEY)[0], first)
    other, _ = update(state, batch, jax.random.key(8))
    assert np.any(other.params["logits"] != first.params["logits"])


def test_masked_columns_do_not_matter():
    state = TrainState.create(policy_params(0), SGD)
    config = ppo.Config(num_epochs=2, kl_loss_coef=0.1, entropy_coef=0.1, whiten_rewards=True)
    batch = rollout(0, LENGTHS)
    inside = batch.response_mask != 0

    @jax.jit
    def run(poison):
        def poisoned(x):  # added, so that what is masked too late comes back as a gradient
            return x + jnp.where(inside, 0.0, poison)

        def poisoned_policy(*args):
            return PolicyOutput(*(poisoned(x) for x in policy_fn(*args)))

        fields = ("log_probs", "ref_log_probs", "values", "rewards", "advantages", "returns")
        bad = batch.replace(**{name: poisoned(getattr(batch, name)) for name in fields})
        return updater(config, SGD, poisoned_policy)(state, bad, KEY)

    expected = run(0.0)
    assert expected[1]["grad_norm"] > 0
    for poison in (np.nan, 1e4, -1e4):
        assert_identical(run(poison), expected)


def test_absent_rows_are_not_there():
    state = TrainState.create(policy_params(0), SGD)
    batch = rollout(0, LENGTHS)
    present = np.array(LENGTHS) > 0
    smaller = jax.tree.map(lambda x: x[present], batch)
    for aggregate in ("token", "sequence"):
        update = jitted(dataclasses.replace(WHOLE, aggregate=aggregate), SGD)
        assert_close(update(state, batch, KEY), update(state, smaller, KEY))


def test_nothing_at_all_changes_nothing():
    state = TrainState.create(policy_params(0), SGD)
    after, metrics = jitted(WHOLE, SGD)(state, rollout(0, [0] * 8), KEY)
    assert_identical(after.params, state.params)
    assert not any(np.asarray(x).any() for x in metrics.values())


def test_mask_types():
    batch = rollout(0, LENGTHS)
    expected = run_loss(batch, ppo.Config())
    for mask in (batch.response_mask != 0, batch.response_mask.astype(jnp.float32) * 2):
        assert_identical(run_loss(batch.replace(response_mask=mask), ppo.Config()), expected)


def test_jit_and_vmap_change_nothing():
    state = TrainState.create(policy_params(0), ADAM)
    batch = rollout(0, LENGTHS)
    keys = jax.random.split(KEY, 2)
    seeds = jax.jit(jax.vmap(updater(SHUFFLED, ADAM), in_axes=(None, None, 0)))(state, batch, keys)
    for seed in range(2):
        expected = jitted(SHUFFLED, ADAM)(state, batch, keys[seed])
        assert_close(jax.tree.map(lambda x, seed=seed: x[seed], seeds), expected, atol=1e-5)
    state = TrainState.create(policy_params(0), SGD)
    assert_close(updater(WHOLE, SGD)(state, batch, KEY), jitted(WHOLE, SGD)(state, batch, KEY))


def test_explained_variance():
    """gamma = lambda = 0: the return is the reward, so values equal to it explain everything, and twice it nothing."""
    state = TrainState.create(policy_params(0), SGD)
    greedy = jitted(ppo.Config(gamma=0.0, gae_lambda=0.0), SGD)
    batch = rollout(0, [3, 4])
    rewards = batch.rewards
    constant = jnp.where(batch.response_mask != 0, 0.1, 0.0)
    _, metrics = greedy(state, batch.replace(rewards=constant), KEY)  # returns that differ by rounding
    assert metrics["value/explained_variance"] == 0.0
    for factor, explained in [(1.0, 1.0), (2.0, 0.0), (0.5, 0.75)]:
        _, metrics = greedy(state, batch.replace(rewards=rewards, values=factor * rewards), KEY)
        np.testing.assert_allclose(metrics["value/explained_variance"], explained, atol=1e-6)


def test_finite_guard_keeps_the_state():
    state = TrainState.create(policy_params(0), ADAM)
    batch = rollout(0, LENGTHS)
    update = jitted(SHUFFLED, ADAM)
    state, metrics = update(state, batch, KEY)
    assert metrics["nonfinite"] == 0
    kept, metrics = update(state, batch.replace(rewards=batch.rewards.at[0, 3].set(jnp.nan)), KEY)
    assert metrics["nonfinite"] == 1
    assert_identical(kept, state)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ppo.Config(kl_loss_estimator="k1"), "use it in the reward"),
        (ppo.Config(kl_loss_estimator="k4"), "k1, k2, k3"),
        (ppo.Config(aggregate="mean"), "token, sequence, sum, fixed"),
        (ppo.Config(aggregate="fixed"), "length"),
        (ppo.Config(dual_clip=0.5), "dual_clip"),
        (ppo.Config(clip_low=-0.1), "clip_low"),
        (ppo.Config(value_clip=0.0), "value_clip"),
        (ppo.Config(num_minibatches=3), "8 rows .* num_minibatches=3"),
        (ppo.Config(num_microbatches=3), "num_microbatches=3 does not divide the 8 rows"),
        (ppo.Config(num_epochs=0), "num_epochs"),
    ],
)
def test_unusable_configs(config, message):
    state = TrainState.create(policy_params(0), SGD)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(updater(config, SGD), state, rollout(0, LENGTHS), KEY)


def test_missing_fields_are_named():
    batch = rollout(0, LENGTHS)
    for name in ("rewards", "values"):
        with pytest.raises(ValueError, match=rf"rollout\.{name} .*got None"):
            ppo.prepare(batch.replace(**{name: None}), ppo.Config())
    for name in ("advantages", "returns", "values"):
        with pytest.raises(ValueError, match=rf"rollout\.{name} .*got None"):
            run_loss(batch.replace(**{name: None}), ppo.Config())
    with pytest.raises(ValueError, match=r"rollout\.ref_log_probs .*kl_loss_coef"):
        run_loss(batch.replace(ref_log_probs=None), ppo.Config(kl_loss_coef=0.1))
    with pytest.raises(ValueError, match="values=None"):
        ppo.loss(
            policy_params(0),
            batch,
            KEY,
            policy_fn=lambda *args: policy_fn(*args)._replace(values=None),
            config=ppo.Config(),
        )
    with pytest.raises(ValueError, match="rewards"):
        ppo.prepare(batch.replace(rewards=batch.rewards[:, 1:]), ppo.Config())


def test_bandit_reaches_the_optimum():
    iterations = 100
    optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, 4 * iterations))
    update = updater(ppo.Config(), optimizer, bandit_policy_fn)

    def iteration(state, key):
        rollout_key, update_key = jax.random.split(key)
        return update(state, bandit_rollout(state.params, rollout_key), update_key)

    @jax.jit
    def train(key):
        state = TrainState.create(bandit_params(), optimizer)
        return jax.lax.scan(iteration, state, jax.random.split(key, iterations))

    state, metrics = train(KEY)
    assert total_variation(bandit_params()) > 0.3
    assert total_variation(state.params) < 0.02
    assert not metrics["nonfinite"].any()
