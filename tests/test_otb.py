"""The optimal token baseline against loops over answers, columns and the vocabulary."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import Rollout, TrainState, ops
from rlhf_jax.algorithms import otb

V, T = 4, 6
RANDOM = np.random.default_rng(1)
TABLE = {"table": jnp.asarray(RANDOM.normal(0, 1.5, (V, V)), jnp.float32)}
TOKENS = RANDOM.integers(0, V, (6, T))
# Two groups of three answers: one with a hole, and one alone at its end; one answer is missing.
MASK = np.array(
    [
        [0, 0, 1, 1, 1, 1],
        [0, 0, 1, 0, 1, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0],
    ]
)
REWARDS = np.where(MASK, RANDOM.normal(size=MASK.shape), 0.0)
POLICY = ops.policy_fn(lambda params, tokens, mask, key: params["table"][tokens], 0.8)
CONFIG = otb.Config(group_size=3, num_minibatches=2, aggregate="sum")


def rollout(rewards=REWARDS):
    log_probs = ops.masked(POLICY(TABLE, TOKENS, None, None).log_probs, MASK)
    arrays = (jnp.asarray(TOKENS), jnp.ones_like(TOKENS), jnp.asarray(MASK), log_probs)
    return Rollout(*arrays, rewards=jnp.asarray(rewards, jnp.float32))


def loop(rewards, group_size=3):
    """R_t - sum_i W_it R_it / sum_i W_it, with W summed from the gradients of log-probs."""
    logits = np.asarray(TABLE["table"], np.float64)[TOKENS[:, :-1]] / 0.8
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    energy, to_go, out = np.zeros((3, *MASK.shape))
    for i in range(len(MASK)):
        total = 0.0
        for t in np.nonzero(MASK[i])[0]:
            slope = -probs[i, t - 1]  # of log p with respect to the logits
            slope[TOKENS[i, t]] += 1.0
            total += np.sum(slope**2)
            energy[i, t] = total
            to_go[i, t] = sum(rewards[i, s] for s in range(t, T) if MASK[i, s])
    for i, t in zip(*np.nonzero(MASK), strict=True):
        start = i // group_size * group_size
        others = [k for k in range(start, start + group_size) if MASK[k, t]]
        weight = [energy[k, t] for k in others]
        baseline = np.dot(weight, [to_go[k, t] for k in others]) / np.sum(weight)
        out[i, t] = to_go[i, t] - baseline
    return out


START = TrainState.create(TABLE, optax.sgd(0.1))
prepare = jax.jit(partial(otb.prepare, policy_fn=POLICY, config=CONFIG))


def test_each_token_has_the_baseline_of_its_group_and_column():
    found = prepare(rollout(), state=START).advantages
    expected = loop(REWARDS)
    assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected[:2]).max() > 0.1
    assert found[0, 5] == 0.0  # no other answer is that long
    at_end = np.where(np.cumsum(MASK, axis=1) * MASK == MASK.sum(axis=1, keepdims=True), 1.0, 0.0)
    equal = prepare(rollout(np.float32(10.1) * at_end), state=START).advantages
    assert_array_equal(equal, np.zeros(MASK.shape))


def test_the_weights_are_of_the_policy_that_learns():
    """Log-probs of a rollout may be an older policy's, or an engine's."""
    stale = replace(rollout(), log_probs=rollout().log_probs - 0.7)
    assert_array_equal(
        prepare(stale, state=START).advantages, prepare(rollout(), state=START).advantages
    )


def test_an_update_learns_from_these_advantages():
    """One step without a clip is that of the policy gradient by a loop over tokens."""
    config = replace(CONFIG, num_minibatches=1, num_microbatches=2)
    optimizer = optax.sgd(0.1)
    update = partial(otb.update, policy_fn=POLICY, optimizer=optimizer, config=config)
    state, metrics = jax.jit(update)(
        TrainState.create(TABLE, optimizer), rollout(), jax.random.key(0)
    )
    expected = loop(REWARDS)
    logits = np.asarray(TABLE["table"], np.float64) / 0.8
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    slope = np.zeros((V, V))
    for i, t in zip(*np.nonzero(MASK), strict=True):
        before, token = TOKENS[i, t - 1], TOKENS[i, t]
        slope[before] += expected[i, t] * (np.eye(V)[token] - probs[before]) / 0.8
    moved = (state.params["table"] - TABLE["table"]) / 0.1
    assert_allclose(moved, slope / 5, rtol=1e-4, atol=1e-5)  # five answers
    assert metrics["nonfinite"] == 0
    given = replace(rollout(), advantages=jnp.zeros(MASK.shape))
    with pytest.raises(ValueError, match=r"rollout\.advantages is given"):
        jax.jit(update)(state, given, jax.random.key(0))
