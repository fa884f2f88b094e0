"""VPG, PPO, RLOO, GRPO and GSPO: numbers by hand. ``test_updates`` has what holds for every algorithm."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tabular import assert_close, assert_identical, numbers, policy_fn, policy_params, rollout

from rlhf_jax import sharding
from rlhf_jax.algorithms import grpo, policy, ppo, rloo, vpg
from rlhf_jax.rollout import rescore
from rlhf_jax.types import PolicyOutput, Rollout, TrainState

KEY = jax.random.key(7)
SGD = optax.sgd(0.3)
# Groups of four answers: one with an absent answer, one with a single present answer, one that is absent.
LENGTHS = [4, 1, 2, 0, 3, 0, 0, 0, 0, 0, 0, 0, 2, 4, 1, 1]


def updater(module, optimizer=SGD, **config):
    return partial(module.update, policy_fn=policy_fn, optimizer=optimizer, config=module.Config(**config))


def start(optimizer=SGD):
    return TrainState.create(policy_params(0), optimizer)


@pytest.mark.parametrize(("module", "fields"), [(ppo, {"num_epochs": 1}), (grpo, {"ratio": "sequence"})])
def test_first_ratio_is_exactly_one(module, fields):
    batch = jax.jit(partial(rescore, policy_fn=policy_fn))(rollout(0, LENGTHS), policy_params(0))
    frozen = optax.sgd(0.0)
    _, metrics = jax.jit(updater(module, frozen, **fields, num_minibatches=2))(start(frozen), batch, KEY)
    assert metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/approx_kl"] == 0.0
    assert metrics["policy/clip_fraction"] == 0.0


def test_gspo_by_hand():
    """Log-ratios (ln 1.44, 0, ln 1) of two tokens: each token has the ratio 1.44^(1/2) = 1.2 (GSPO, eq. 7), its
    gradient is A * 1.2 / 2 for each token's log-prob (eq. 10), and beyond the bound there is none (eq. 5)."""
    mask = jnp.array([[0, 1, 0, 1]])
    log_probs = jnp.where(mask != 0, -1.0, jnp.nan)
    batch = Rollout(jnp.zeros((1, 4), jnp.int32), mask, mask, log_probs.at[0, 1].add(-np.log(1.44)))
    batch = batch.replace(advantages=2.0 * mask)

    def table(params, tokens, attention_mask, key):
        return PolicyOutput(params, jnp.zeros_like(params))

    for clip_high, value, slope in [(0.3, -2.4, -1.2), (0.1, -2.2, 0.0)]:
        config = grpo.Config(ratio="sequence", kl_loss_coef=0.0, clip_high=clip_high)
        f = partial(numbers(grpo.loss), policy_fn=table, config=config)
        (found, metrics), gradient = jax.value_and_grad(f, has_aux=True)(log_probs, batch, KEY)
        np.testing.assert_allclose(found, value, rtol=1e-6)
        np.testing.assert_allclose(gradient, [[0, slope, 0, slope]], rtol=1e-6)
        np.testing.assert_allclose(metrics["policy/ratio_max"], 1.2, rtol=1e-6)
        assert metrics["policy/clip_fraction"] == (clip_high < 0.2)


def test_explained_variance():
    """gamma = lambda = 0: the return is the reward, so values equal to it explain everything, and twice it nothing."""
    greedy, batch = jax.jit(updater(ppo, num_epochs=1, gamma=0.0, gae_lambda=0.0)), rollout(0, [3, 4])
    constant = jnp.where(batch.response_mask != 0, 0.1, jnp.nan)
    _, metrics = greedy(start(), batch.replace(rewards=constant), KEY)  # returns that differ by rounding
    assert metrics["value/explained_variance"] == 0.0
    for factor, explained in [(1.0, 1.0), (2.0, 0.0), (0.5, 0.75)]:
        _, metrics = greedy(start(), batch.replace(values=factor * batch.rewards), KEY)
        np.testing.assert_allclose(metrics["value/explained_variance"], explained, atol=1e-6)


def test_vpg_by_hand():
    """b0 = 0 and r = (8, 12) give b = 1 and A = (7, 11) (ALGORITHMS 4); the loss is -mean_i [A_i sum_t log p_it], here
    with p = 1/2; the next update starts from b = 1, and one whose reward is not finite leaves it there."""
    mask = jnp.array([[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    batch = Rollout(jnp.zeros((3, 4), jnp.int32), jnp.ones((3, 4), jnp.int32), mask, jnp.zeros((3, 4)))
    batch = batch.replace(scores=jnp.array([8.0, 12.0, jnp.nan]))
    prepared = vpg.prepare(batch, config=vpg.Config())
    np.testing.assert_allclose(prepared.advantages, mask * jnp.array([[7.0], [11.0], [0.0]]), rtol=1e-6)
    plain = vpg.prepare(batch, config=vpg.Config(baseline="none"))
    np.testing.assert_allclose(plain.advantages, mask * jnp.array([[8.0], [12.0], [0.0]]), rtol=1e-6)
    assert vpg.prepare(prepared, config=vpg.Config()) is prepared

    params = {"logits": jnp.zeros((2, 2)), "values": jnp.zeros(2)}
    f = jax.jit(partial(numbers(vpg.loss), policy_fn=policy_fn, config=vpg.Config(entropy_coef=0.1)))
    value, metrics = f(params, prepared, KEY)
    policy_loss, entropy = (7 * 2 + 11) / 2 * np.log(2.0), 1.5 * np.log(2.0)
    assert_close(metrics, {"policy/loss": policy_loss, "objective/entropy": entropy})
    np.testing.assert_allclose(value, policy_loss - 0.1 * entropy, rtol=1e-6)
    one_a_row = prepared.replace(advantages=jnp.array([7.0, 11.0, 0.0]))
    assert_identical(f(params, one_a_row, KEY), (value, metrics))  # [B]
    gradient = jax.grad(lambda p: f(p, prepared, KEY)[0])(params)["logits"]
    np.testing.assert_allclose(gradient[0], (7 * 2 + 11) / 2 * np.array([-0.5, 0.5]), rtol=1e-6)

    update = jax.jit(updater(vpg))
    state = vpg.State.create(params, SGD)
    assert state.baseline == 0
    state, _ = update(state, batch, KEY)
    np.testing.assert_allclose(state.params["logits"][0], 0.3 * (7 * 2 + 11) / 2 * np.array([0.5, -0.5]), rtol=1e-6)
    assert state.baseline == 1.0
    assert update(state, batch.replace(scores=batch.scores.at[0].set(jnp.inf)), KEY)[0].baseline == 1.0
    assert update(state, batch, KEY)[0].baseline == np.float32(0.9 + 1.0)
    assert update(state, batch.replace(response_mask=0 * mask), KEY)[0].baseline == 1.0
    # Advantages that are given are used as they are, by a plain TrainState too.
    given, _ = update(state, prepared, KEY)
    assert given.baseline == 1.0
    simple, _ = update(TrainState.create(state.params, SGD), prepared, KEY)
    assert_close(simple.params, given.params)
    with pytest.raises(ValueError, match=r"vpg\.State"):
        updater(vpg)(TrainState.create(params, SGD), batch, KEY)


def group_advantages(module, config, batch):
    """[B]; checks that all response tokens of a row have the same advantage, and the others 0."""
    prepared, mask = np.asarray(module.prepare(batch, config=config).advantages), np.asarray(batch.response_mask) != 0
    rows = np.where(mask.any(axis=1), np.max(np.where(mask, prepared, -np.inf), axis=1, initial=-np.inf), 0.0)
    np.testing.assert_array_equal(prepared, np.where(mask, rows[:, None], 0.0))
    return rows


SEVEN = np.sqrt(7.0)  # the standard deviation of (1, 2, 6) with n - 1
GROUPS_BY_HAND = [
    (rloo, rloo.Config(), [1, -1 / 3, -1 / 3, -1 / 3, -3, -1.5, 4.5, 0, 0, 0, 0, 0]),
    (rloo, rloo.Config(group_size=2), [1, -1, 0, 0, -1, 1, 0, 0, 0, 0, 0, 0]),
    (grpo, grpo.Config(group_size=4, eps=0.0), [1.5, -0.5, -0.5, -0.5, -2 / SEVEN, -1 / SEVEN, 3 / SEVEN, *[0] * 5]),
    (grpo, grpo.Config(group_size=4, scale=False), [0.75, -0.25, -0.25, -0.25, -2, -1, 3, *[0] * 5]),
]


@pytest.mark.parametrize(("module", "config", "expected"), GROUPS_BY_HAND)
def test_group_advantages_by_hand(module, config, expected):
    """Rewards (1, 0, 0, 0), then (1, 2, 6) and an absent answer, whose score nobody reads, then equal ones."""
    batch = rollout(0, [2, 3, 4, 1, 3, 1, 2, 0, 4, 4, 1, 2])
    scores = jnp.array([1.0, 0, 0, 0, 1, 2, 6, np.nan, 0.1, 0.1, 0.1, 0.1])
    batch = batch.replace(rewards=None, scores=scores)
    np.testing.assert_allclose(group_advantages(module, config, batch), expected, rtol=1e-6)
    # Rewards come before scores and are summed over the response: here the sum is the length.
    ones = batch.replace(rewards=jnp.where(batch.response_mask != 0, 1.0, jnp.nan))
    lengths = batch.replace(scores=batch.response_mask.sum(axis=1))
    assert_close(group_advantages(module, config, ones), group_advantages(module, config, lengths))


def test_groups_do_not_cross_devices():
    prepare = partial(rloo.prepare, config=rloo.Config(group_size=8))
    mapped = jax.shard_map(prepare, mesh=sharding.make_mesh(4), in_specs=P("data"), out_specs=P("data"))
    assert jax.eval_shape(prepare, rollout(0, LENGTHS)).advantages.shape == (16, 7)
    with pytest.raises(ValueError, match=r"4 rows \(on each device.* group_size=8"):
        jax.eval_shape(mapped, rollout(0, LENGTHS))


def test_an_update_of_ones_own():
    """``policy.updater`` of another prepare and loss: GRPO's advantages with VPG's loss on a rollout's own samples."""
    batch = rescore(rollout(0, LENGTHS), policy_params(0), policy_fn=policy_fn)
    config = grpo.Config(group_size=4, kl_loss_coef=0.0)
    own = policy.updater(grpo.prepare, vpg.loss, lambda prepared, axis_name: {"rows": prepared.tokens.shape[0]})
    options = {"policy_fn": policy_fn, "optimizer": SGD, "config": config}
    after, metrics = own(start(), batch, KEY, **options)
    assert metrics["rows"] == 16
    assert_close(after, grpo.update(start(), batch, KEY, **options)[0])
