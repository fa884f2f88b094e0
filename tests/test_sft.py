"""Supervised fine-tuning: numbers by hand, and what must not matter."""

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
    policy_fn,
    policy_params,
    rollout,
)

from rlhf_jax import sharding
from rlhf_jax.algorithms import sft
from rlhf_jax.types import Demonstrations, PolicyOutput, TrainState

# Eight rows for four devices: unequal numbers of tokens, and nothing at all on the third device.
LENGTHS = [4, 1, 2, 0, 0, 0, 3, 4]
KEY = jax.random.key(7)
SGD = optax.sgd(0.5)


def demonstrations(lengths=LENGTHS):
    batch = rollout(0, lengths)
    return Demonstrations(batch.tokens, batch.attention_mask, batch.response_mask)


@functools.cache
def updater(config, policy=policy_fn):
    return jax.jit(partial(sft.update, policy_fn=policy, optimizer=SGD, config=config), static_argnames="axis_name")


@pytest.mark.parametrize(("aggregate", "expected"), [("token", 1.25), ("sequence", 1.5), ("sum", 2.5)])
def test_loss_by_hand(aggregate, expected):
    """Losses [2] and [1, 1, 1] of two rows (ALGORITHMS 4)."""
    mask = jnp.array([[0, 0, 0, 1], [0, 1, 1, 1]])
    log_probs = jnp.where(jnp.array([[True], [False]]), -2.0, -1.0) * jnp.ones((2, 4))
    batch = Demonstrations(tokens=jnp.zeros((2, 4), jnp.int32), attention_mask=jnp.ones((2, 4)), response_mask=mask)

    def fixed(params, tokens, attention_mask, key):
        del params, tokens, attention_mask, key
        return PolicyOutput(log_probs, jnp.zeros_like(log_probs))

    loss, metrics = sft.loss({}, batch, None, policy_fn=fixed, config=sft.Config(aggregate=aggregate))
    assert loss.value == expected
    assert loss.count == {"token": 4, "sequence": 2, "sum": 2}[aggregate]
    assert metrics == {"sft/loss": loss}


def test_update_takes_the_gradient():
    state = TrainState.create(policy_params(0), SGD)
    batch, config = demonstrations(), sft.Config()
    grads = jax.grad(lambda p: sft.loss(p, batch, None, policy_fn=policy_fn, config=config)[0].value)(state.params)
    after, metrics = updater(config)(state, batch, KEY)
    assert_close(after.params, jax.tree.map(lambda p, g: p - 0.5 * g, state.params, grads))
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    assert metrics["sft/tokens"] == sum(LENGTHS)
    assert after.step == 1
    eager, _ = sft.update(state, batch, KEY, policy_fn=policy_fn, optimizer=SGD, config=config)
    assert_close(eager, after)


def test_microbatches_change_nothing():
    state = TrainState.create(policy_params(0), SGD)
    for aggregate in ("token", "sequence"):
        whole = updater(sft.Config(aggregate=aggregate))(state, demonstrations(), KEY)
        assert_close(updater(sft.Config(aggregate=aggregate, num_microbatches=4))(state, demonstrations(), KEY), whole)
    with pytest.raises(ValueError, match="num_microbatches=3 does not divide the 8 rows"):
        updater(sft.Config(num_microbatches=3))(state, demonstrations(), KEY)


def test_masked_columns_and_absent_rows_do_not_matter():
    state = TrainState.create(policy_params(0), SGD)
    batch = demonstrations()
    inside = batch.response_mask != 0

    @jax.jit
    def run(poison):
        def poisoned(*args):
            return PolicyOutput(*(x + jnp.where(inside, 0.0, poison) for x in policy_fn(*args)))

        return sft.update(state, batch, KEY, policy_fn=poisoned, optimizer=SGD, config=sft.Config())

    expected = run(0.0)
    for poison in (np.nan, 1e4, -1e4):
        assert_identical(run(poison), expected)
    present = np.array(LENGTHS) > 0
    smaller = jax.tree.map(lambda x: x[present], batch)
    assert_close(updater(sft.Config())(state, smaller, KEY), expected)


def test_dropout_keys():
    """Every microbatch and every device drops with a key of its own; no key, no dropout."""

    def noisy(params, tokens, attention_mask, key):
        output = policy_fn(params, tokens, attention_mask, None)
        if key is None:
            return output
        # Each row is worth a number of its own, so that the loss shows which keys were used.
        noise = jax.random.uniform(key, (tokens.shape[0], 1))
        return output._replace(log_probs=output.log_probs * 0.0 - noise)

    state = TrainState.create(policy_params(0), SGD)
    batch = demonstrations([1] * 8)
    config = sft.Config(num_microbatches=8)
    _, metrics = updater(config, noisy)(state, batch, KEY)
    keys = [jax.random.fold_in(KEY, row) for row in range(8)]
    np.testing.assert_allclose(
        metrics["sft/loss"], np.mean([float(jax.random.uniform(k, (1, 1))[0, 0]) for k in keys]), rtol=1e-5
    )
    assert_close(updater(config, noisy)(state, batch, None), updater(config)(state, batch, KEY))

    def on_device(state, batch):
        return updater(sft.Config(num_microbatches=2), noisy)(state, batch, KEY, axis_name="data")[1]["sft/loss"]

    mapped = jax.shard_map(
        on_device, mesh=sharding.make_mesh(4), in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, row), device) for device in range(4) for row in range(2)]
    np.testing.assert_allclose(
        jax.jit(mapped)(state, batch), np.mean([float(jax.random.uniform(k, (1, 1))[0, 0]) for k in keys]), rtol=1e-5
    )


def test_finite_guard_keeps_the_state():
    state = TrainState.create(policy_params(0), SGD)

    def nan(*args):
        return PolicyOutput(*(x * jnp.nan for x in policy_fn(*args)))

    kept, metrics = updater(sft.Config(), nan)(state, demonstrations(), KEY)
    assert metrics["nonfinite"] == 1
    assert_identical(kept, state)


def test_unusable_configs():
    with pytest.raises(ValueError, match="token, sequence, sum"):
        sft.Config(aggregate="mean")
    with pytest.raises(ValueError, match="num_microbatches must be at least 1"):
        sft.Config(num_microbatches=0)


def test_learns_a_bigram_table():
    """Full-batch SFT reaches the empirical conditional frequencies, whose loss is the conditional entropy."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 5, size=(64, 7))
    batch = Demonstrations(jnp.asarray(tokens, jnp.int32), jnp.ones((64, 7)), jnp.ones((64, 7)).at[:, 0].set(0))
    optimizer = optax.adam(0.1)

    @jax.jit
    def train(state):
        def step(state, key):
            return sft.update(state, batch, key, policy_fn=policy_fn, optimizer=optimizer, config=sft.Config())

        return jax.lax.scan(step, state, jax.random.split(KEY, 200))

    state, metrics = train(TrainState.create(policy_params(0), optimizer))
    counts = np.zeros((5, 5))
    np.add.at(counts, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
    frequencies = counts / counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(jax.nn.softmax(state.params["logits"], axis=1), frequencies, atol=1e-3)
    entropy = -np.sum(counts * np.log(frequencies)) / counts.sum()
    np.testing.assert_allclose(metrics["sft/loss"][-1], entropy, rtol=1e-4)
