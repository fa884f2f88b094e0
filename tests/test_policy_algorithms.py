"""VPG, PPO, RLOO, GRPO and GSPO: numbers by hand. ``test_updates`` has what holds for every
algorithm.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose
from tabular import assert_close, policy_fn, policy_params, rollout

from rlhf_jax import sharding
from rlhf_jax.algorithms import grpo, ppo, rloo, vpg
from rlhf_jax.types import Rollout, TrainState

KEY = jax.random.key(7)
SGD = optax.sgd(0.3)
# Groups of four answers: one with an absent answer, one with a single present answer, one that is
# absent.
LENGTHS = [4, 1, 2, 0, 3, 0, 0, 0, 0, 0, 0, 0, 2, 4, 1, 1]


def updater(module, optimizer=SGD, **config):
    return partial(
        module.update, policy_fn=policy_fn, optimizer=optimizer, config=module.Config(**config)
    )


def start(optimizer=SGD):
    return TrainState.create(policy_params(0), optimizer)


def prepared(rewards, values, mask, **config):
    made = Rollout(np.zeros(mask.shape, np.int32), mask, mask, np.zeros(mask.shape), values=values)
    made = made.replace(rewards=jnp.asarray(rewards, jnp.float32))
    return jax.jit(partial(ppo.prepare, config=ppo.Config(**config)))(made)


def explained(rewards, values, mask, **config):
    config = {"normalize_returns": False} | config
    of_rollout = prepared(rewards, values, mask, **config)
    found = ppo.explained_variance(of_rollout, ppo.Config(**config), None)
    return found["value/explained_variance"]


@pytest.mark.parametrize(
    ("gae_lambda", "advantages", "returns"),
    [
        (1.0, [[-1.5, -1, 0], [1, 2, 0]], [[-1, -1, 0], [1, 1, 0]]),
        (0.5, [[-1, -1, 0], [0, 2, 0]], [[-0.5, -1, 0], [0, 1, 0]]),
    ],
)
def test_normalized_returns_by_hand(gae_lambda, advantages, returns):
    """Monte-Carlo returns (1, 1) and (3, 3) have mean 2 and deviation 1, so that the values stand
    for (2.5, 2) and (2, 1). With lambda 1/2 deltas are (-.5, -1) and (-1, 2).
    """
    mask = np.array([[1, 1, 0], [1, 1, 0]])
    values = np.array([[0.5, 0, np.nan], [0, -1, 9]])
    found = prepared(
        [[0, 1, 7], [0, 3, 0]], values, mask, gae_lambda=gae_lambda, whiten_advantages=False
    )
    assert_allclose(found.advantages, advantages, atol=1e-6)
    assert_allclose(found.returns, returns, atol=1e-6)
    assert_allclose(found.values, values)  # they are the head's


@pytest.mark.parametrize("gae_lambda", [0.95, 1.0])
@pytest.mark.parametrize(("unit", "shift"), [(1e-8, 0.0), (0.01, 0.0), (1e8, 0.0), (1.0, -50.0)])
def test_the_unit_of_rewards_does_not_matter(gae_lambda, unit, shift):
    """Nor does a number that is added to each answer's reward."""
    rng = np.random.default_rng(0)
    mask = (np.arange(6) < rng.integers(1, 7, (16, 1))).astype(int)
    last = np.arange(6) == mask.sum(axis=1, keepdims=True) - 1
    rewards, values = rng.normal(size=(2, 16, 6))
    config = {"gae_lambda": gae_lambda, "gamma": 1.0}
    first = prepared(rewards, values, mask, **config)
    second = prepared(unit * rewards + shift * last, values, mask, **config)
    close = {"atol": 1e-4 if shift else 1e-5}
    assert_allclose(second.advantages, first.advantages, **close)
    assert_allclose(second.returns, first.returns, **close)
    found = [
        float(explained(factor * rewards, values, mask, **config, normalize_returns=True))
        for factor in (1.0, unit)
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_returns_are_normalized_over_all_devices():
    batch = rollout(0, LENGTHS).replace(advantages=None)
    config = ppo.Config(gae_lambda=0.9)
    mapped = jax.shard_map(
        partial(ppo.prepare, config=config, axis_name="data"),
        mesh=sharding.make_mesh(4),
        in_specs=P("data"),
        out_specs=P("data"),
    )
    whole = jax.jit(partial(ppo.prepare, config=config))(batch)
    assert_close(jax.jit(mapped)(batch), whole)


def test_a_critic_of_equal_returns_is_no_noise():
    """Whitening would scale its values to variance 1."""
    values = np.random.default_rng(0).normal(size=(8, 3))
    rewards = np.zeros((8, 3))
    rewards[:, -1] = 10.1
    found = prepared(rewards, values, np.ones((8, 3), int))
    assert not np.any(found.advantages)
    assert not np.any(found.returns)

    def squares(rewards):
        found = prepared(rewards, values, np.ones((8, 3), int))
        return jnp.sum(found.returns * values + found.advantages**2)

    assert np.isfinite(jax.grad(squares)(np.float32(rewards))).all()


def test_explained_variance_is_of_normalized_returns():
    """Values that are the normalised Monte-Carlo returns explain all of them at any lambda."""
    rewards = np.random.default_rng(0).normal(3.0, 5.0, (64, 1)) * np.array([[0, 0, 1.0]])
    mask = np.ones((64, 3), int)
    values = np.broadcast_to((rewards.sum(1, keepdims=True) - rewards.sum(1).mean()), (64, 3))
    values = values / rewards.sum(1).std()
    for gae_lambda in (0.5, 1.0):
        config = {"gae_lambda": gae_lambda, "normalize_returns": True}
        assert explained(rewards, values, mask, **config) == pytest.approx(1.0, abs=1e-5)
        less = explained(rewards, values * 0.5, mask, **config)
        assert less == pytest.approx(0.75, abs=1e-5)


@pytest.mark.parametrize("gae_lambda", [0.5, 1.0])
def test_explained_variance_by_hand(gae_lambda):
    """Returns (3, 2) and (1): variance 2/3. Errors (3, 1) and (-1) of values (0, 1) and (2): 8/3.
    Lambda, and what stands behind a response, count nowhere.
    """
    rewards, values = [[1, 2], [1, 9]], np.array([[0.0, 1.0], [2.0, np.nan]])
    found = explained(rewards, values, np.array([[1, 1], [1, 0]]), gae_lambda=gae_lambda)
    assert found == pytest.approx(1 - (8 / 3) / (2 / 3))
    units = [2 / 3, 1.0]  # of rewards, or normalised
    for is_normalized, variance in enumerate(units):
        config = {"gae_lambda": gae_lambda, "normalize_returns": bool(is_normalized)}
        made = prepared(rewards, values, np.array([[1, 1], [1, 0]]), **config)
        metrics = ppo.explained_variance(made, ppo.Config(**config), None)
        assert metrics["value/return_variance"] == pytest.approx(variance)
    # gamma 1/2: returns (2, 2) and (3).
    rewards = [[1, 2], [3, 0]]
    values = np.array([[2.0, 2.5], [3.0, 0.0]])
    found = explained(rewards, values, np.array([[1, 1], [1, 0]]), gamma=0.5)
    assert found == pytest.approx(1 - (1 / 18) / (2 / 9))


def test_a_random_critic_explains_nothing():
    """Of its own lambda-return it would explain .8 at 128 tokens."""
    rng = np.random.default_rng(0)
    mask = np.ones((64, 128), int)
    rewards = np.zeros((64, 128))
    rewards[:, -1] = rng.integers(0, 2, 64)
    values = rng.normal(size=(64, 128)).astype(np.float32)
    assert explained(rewards, values, mask, gae_lambda=0.95) < -1.0
    assert explained(0 * rewards + 0.1, values, mask, gamma=0.0) == 0.0  # returns are equal


def test_rewards_are_explained_as_they_are_learned_from():
    """Values of whitened rewards."""
    rewards = np.array([[2.0, 4.0], [6.0, 8.0]])
    white = (rewards - 5) / np.sqrt(5) + 5
    mask = np.ones((2, 2), int)
    found = explained(rewards, white, mask, gamma=0.0, whiten_rewards=True)
    assert found == pytest.approx(1.0, abs=1e-6)


def test_explained_variance_of_an_update():
    """gamma = lambda = 0: the return is the reward, so values equal to it explain everything, and
    twice it nothing.
    """
    settings = {"gamma": 0.0, "gae_lambda": 0.0, "normalize_returns": False}
    greedy = jax.jit(updater(ppo, **settings))
    batch = rollout(0, [3, 4]).replace(advantages=None)
    constant = np.where(batch.mask, np.float32(0.1), np.float32(np.nan))
    _, metrics = greedy(
        start(), batch.replace(rewards=constant), KEY
    )  # returns that differ by rounding
    assert metrics["value/explained_variance"] == 0.0
    for factor, explained in [(1.0, 1.0), (2.0, 0.0), (0.5, 0.75)]:
        _, metrics = greedy(
            start(),
            batch.replace(values=np.float32(factor) * np.asarray(batch.rewards)),
            KEY,
        )
        assert_allclose(metrics["value/explained_variance"], explained, atol=1e-6)


MASK = np.array([[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]])


@pytest.fixture
def two_rewards():
    """Rewards 8 and 12 of two responses and one that is absent; greedy responses earn 5 and 20."""
    tokens = np.zeros((3, 4), np.int32)
    batch = Rollout(tokens, np.ones_like(tokens), MASK, np.zeros((3, 4), np.float32))
    scores, greedy_rewards = np.array([[8.0, 12.0, np.nan], [5.0, 20.0, 1.0]], np.float32)
    return batch.replace(scores=scores, greedy_rewards=greedy_rewards)


def at_one_half():
    """A policy that says each of two tokens with probability 1/2; the moving baseline is 0."""
    params = {"logits": jnp.zeros((2, 2)), "values": jnp.zeros(2)}
    return vpg.State.create(params, SGD)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [("ema", [7.0, 11.0, 0.0]), ("none", [8.0, 12.0, 0.0]), ("greedy", [3.0, -8.0, 0.0])],
)
def test_the_baselines_of_vpg_by_hand(baseline, expected, two_rewards):
    """b0 = 0 and r = (8, 12) give b = 1 and A = (7, 11) (ALGORITHMS 4). Advantages that are given
    are kept.
    """
    config = vpg.Config(baseline=baseline)
    prepared = jax.jit(partial(vpg.prepare, config=config))(two_rewards)
    assert_allclose(prepared.advantages, MASK * np.array(expected)[:, None], rtol=1e-6)
    assert vpg.prepare(prepared, config=config) is prepared


def test_vpg_by_hand(two_rewards):
    """The loss is -mean_i [A_i sum_t log p_it], here with p = 1/2; the next update starts from the
    moved baseline, which a reward that is not finite leaves where it is.
    """
    batch = two_rewards
    update = jax.jit(updater(vpg))
    state, metrics = update(at_one_half(), batch, KEY)
    total = (7 * 2 + 11) / 2
    assert_allclose(metrics["loss"], total * np.log(2.0), rtol=1e-6)
    logits = np.asarray(state.params["logits"])
    assert_allclose(logits[0], 0.3 * total * np.array([0.5, -0.5]), rtol=1e-6)
    infinite = batch.replace(scores=np.array([np.inf, 12.0, np.nan], np.float32))
    absent = batch.replace(response_mask=0 * MASK)
    given = jax.jit(partial(vpg.prepare, config=vpg.Config()))(batch)
    moved = [update(state, each, KEY)[0].baseline for each in (infinite, absent, given, batch)]
    assert moved == [1.0, 1.0, 1.0, np.float32(0.9 + 1.0)]


def test_vpg_without_its_own_state_needs_advantages(two_rewards):
    given = jax.jit(partial(vpg.prepare, config=vpg.Config()))(two_rewards)
    simple = TrainState.create(at_one_half().params, SGD)
    update = jax.jit(updater(vpg))
    after, _ = update(simple, given, KEY)
    expected, _ = update(at_one_half(), two_rewards, KEY)
    assert_close(after.params, expected.params)
    with pytest.raises(ValueError, match=r"vpg\.State"):
        updater(vpg)(simple, two_rewards, KEY)


def test_the_greedy_baseline_needs_greedy_rewards_and_moves_no_other(two_rewards):
    update = jax.jit(updater(vpg, baseline="greedy"))
    after, metrics = update(at_one_half(), two_rewards, KEY)
    assert_allclose(metrics["loss"], (3 * 2 - 8) / 2 * np.log(2.0), rtol=1e-6)
    assert after.baseline == 0
    with pytest.raises(ValueError, match=r"rollout\.greedy_rewards is needed"):
        update(at_one_half(), two_rewards.replace(greedy_rewards=None), KEY)


def test_groups_do_not_cross_devices():
    prepare = partial(rloo.prepare, config=rloo.Config(group_size=8))
    mapped = jax.shard_map(
        prepare, mesh=sharding.make_mesh(4), in_specs=P("data"), out_specs=P("data")
    )
    batch = rollout(0, LENGTHS).replace(advantages=None)
    assert jax.eval_shape(prepare, batch).advantages.shape == (16, 7)
    with pytest.raises(ValueError, match=r"4 rows \(on each device.* group_size=8"):
        jax.eval_shape(mapped, batch)


def test_by_default_grpo_means_over_rows_and_rloo_sums_them():
    """Losses 1 of four tokens in a row and 0 of one token in another: GRPO (eq. 3) 1/2, RLOO 2,
    PPO 4/5.
    """
    mask = np.array([[1, 1, 1, 1], [1, 0, 0, 0]])
    per_token = np.array([[1.0] * 4, [0.0] * 4], np.float32)
    modules = (grpo, rloo, ppo, vpg)
    means = jax.jit(lambda *batch: [module.Config().mean(*batch).value for module in modules])
    assert_allclose(means(per_token, mask), [0.5, 2.0, 0.8, 2.0], rtol=1e-6)
