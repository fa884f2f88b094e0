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
from tabular import assert_close, numbers, policy_fn, policy_params, rollout

from rlhf_jax import sharding
from rlhf_jax.algorithms import grpo, ppo, rloo, vpg
from rlhf_jax.types import PolicyOutput, Rollout, TrainState

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


def test_the_weight_of_the_kl_term_is_capped_at_ten():
    """Of two tokens whose log-ratio to the reference is .1 (k3: .0048), one has the ratio e^20
    (4.9e8), one 1.
    """
    mask = jnp.array([[0, 1, 1]])
    batch = Rollout(
        jnp.zeros((1, 3), jnp.int32), mask, mask, mask * jnp.array([[0.0, -21.0, -1.0]])
    )
    batch = batch.replace(
        advantages=0.0 * mask,
        ref_log_probs=-1.1 * mask,
    )
    said = PolicyOutput(-1.0 * mask, 0.0 * mask)
    loss, metrics = numbers(grpo.loss)(
        None, batch, KEY, policy_fn=lambda *_: said, config=grpo.Config()
    )
    assert_allclose(metrics["policy/kl_loss"], (10 + 1) / 2 * (np.exp(-0.1) - 0.9), rtol=1e-4)
    assert_allclose(loss, 0.04 * metrics["policy/kl_loss"], rtol=1e-6)
    assert metrics["policy/kl_capped_fraction"] == 0.5


def test_explained_variance():
    """gamma = lambda = 0: the return is the reward, so values equal to it explain everything, and
    twice it nothing.
    """
    greedy = jax.jit(updater(ppo, num_epochs=1, gamma=0.0, gae_lambda=0.0))
    batch = rollout(0, [3, 4])
    constant = jnp.where(batch.response_mask != 0, 0.1, jnp.nan)
    _, metrics = greedy(
        start(), batch.replace(rewards=constant), KEY
    )  # returns that differ by rounding
    assert metrics["value/explained_variance"] == 0.0
    for factor, explained in [(1.0, 1.0), (2.0, 0.0), (0.5, 0.75)]:
        _, metrics = greedy(
            start(),
            batch.replace(values=factor * batch.rewards),
            KEY,
        )
        assert_allclose(metrics["value/explained_variance"], explained, atol=1e-6)


def test_vpg_by_hand():
    """b0 = 0 and r = (8, 12) give b = 1 and A = (7, 11) (ALGORITHMS 4); the loss is -mean_i [A_i
    sum_t log p_it], here with p = 1/2; the next update starts from b = 1, and one whose reward is
    not finite leaves it there."""
    mask = jnp.array(
        [
            [0, 0, 1, 1],
            [0, 0, 1, 0],
            [0, 0, 0, 0],
        ]
    )
    batch = Rollout(
        jnp.zeros((3, 4), jnp.int32), jnp.ones((3, 4), jnp.int32), mask, jnp.zeros((3, 4))
    )
    batch = batch.replace(scores=jnp.array([8.0, 12.0, jnp.nan]))
    prepared = vpg.prepare(batch, config=vpg.Config())
    assert_allclose(prepared.advantages, mask * jnp.array([[7.0], [11.0], [0.0]]), rtol=1e-6)
    plain = vpg.prepare(batch, config=vpg.Config(baseline="none"))
    assert_allclose(plain.advantages, mask * jnp.array([[8.0], [12.0], [0.0]]), rtol=1e-6)
    assert vpg.prepare(prepared, config=vpg.Config()) is prepared
    remax = batch.replace(greedy_rewards=jnp.array([5.0, 20.0, 1.0]))
    greedy = vpg.prepare(remax, config=vpg.Config(baseline="greedy"))
    assert_allclose(greedy.advantages, mask * jnp.array([[3.0], [-8.0], [0.0]]), rtol=1e-6)
    with pytest.raises(ValueError, match=r"rollout\.greedy_rewards \[B\] is needed"):
        vpg.prepare(batch, config=vpg.Config(baseline="greedy"))

    params = {
        "logits": jnp.zeros((2, 2)),
        "values": jnp.zeros(2),
    }
    update = jax.jit(updater(vpg))
    state = vpg.State.create(params, SGD)
    assert state.baseline == 0
    state, metrics = update(state, batch, KEY)
    assert_allclose(
        metrics["loss"],
        (7 * 2 + 11) / 2 * np.log(2.0),
        rtol=1e-6,
    )
    assert_allclose(
        state.params["logits"][0], 0.3 * (7 * 2 + 11) / 2 * np.array([0.5, -0.5]), rtol=1e-6
    )
    assert state.baseline == 1.0
    assert (
        update(state, batch.replace(scores=batch.scores.at[0].set(jnp.inf)), KEY)[0].baseline == 1.0
    )
    assert update(state, batch, KEY)[0].baseline == np.float32(0.9 + 1.0)
    assert update(state, batch.replace(response_mask=0 * mask), KEY)[0].baseline == 1.0
    # Advantages that are given are used as they are, by a plain TrainState too.
    given, _ = update(state, prepared, KEY)
    assert given.baseline == 1.0
    simple, _ = update(
        TrainState.create(state.params, SGD),
        prepared,
        KEY,
    )
    assert_close(simple.params, given.params)
    after, metrics = updater(vpg, baseline="greedy")(
        vpg.State.create(params, SGD),
        remax,
        KEY,
    )
    assert_allclose(
        metrics["loss"],
        (3 * 2 - 8) / 2 * np.log(2.0),
        rtol=1e-6,
    )
    assert after.baseline == 0
    with pytest.raises(ValueError, match=r"vpg\.State"):
        updater(vpg)(TrainState.create(params, SGD), batch, KEY)


def test_reinforce_pp_with_a_group_baseline_by_hand():
    """Rewards less their group's mean are -1, 1, -2 and 2 (and 0 of a group with one answer); over
    the six tokens their mean is 1 / 6 and their variance 11 / 6 - 1 / 36. Whatever reward a group's
    answers share changes nothing."""
    lengths = jnp.array([1, 2, 1, 1, 1, 0])
    mask = jnp.arange(3)[None, :] < lengths[:, None]
    batch = Rollout(
        *[mask.astype(jnp.int32)] * 4, scores=jnp.array([1.0, 3.0, 10.0, 14.0, 7.0, jnp.nan])
    )
    prepared = rloo.prepare(batch, config=rloo.Config(baseline="both", group_size=2))
    expected = (np.array([-1.0, 1.0, -2.0, 2.0, 0.0, 0.0]) - 1 / 6) / np.sqrt(11 / 6 - 1 / 36)
    assert_allclose(
        prepared.advantages, np.where(mask, expected[:, None], 0.0), rtol=1e-5, atol=1e-6
    )


def test_reinforce_pp_with_absent_answers_by_hand():
    """Scores 0 and 1 with two absent answers, and 0, 1, 0, 1: each differs from its group's mean by
    one half (eq. 6), so each whitened advantage is 1 or -1 (eq. 7), whatever number of answers a
    group has.
    """
    mask = jnp.array([1, 1, 0, 0, 1, 1, 1, 1])[:, None]
    scores = jnp.array([0.0, 1.0, jnp.nan, 9.0, 0.0, 1.0, 0.0, 1.0])
    batch = Rollout(*[mask] * 4, scores=scores)
    config = rloo.Config(baseline="both", group_size=4)
    prepared = rloo.prepare(batch, config=config)
    expected = [-1, 1, 0, 0, -1, 1, -1, 1]
    assert_allclose(
        prepared.advantages[:, 0],
        expected,
        rtol=1e-5,
    )


def test_groups_do_not_cross_devices():
    prepare = partial(rloo.prepare, config=rloo.Config(group_size=8))
    mapped = jax.shard_map(
        prepare, mesh=sharding.make_mesh(4), in_specs=P("data"), out_specs=P("data")
    )
    assert jax.eval_shape(prepare, rollout(0, LENGTHS)).advantages.shape == (16, 7)
    with pytest.raises(ValueError, match=r"4 rows \(on each device.* group_size=8"):
        jax.eval_shape(mapped, rollout(0, LENGTHS))
