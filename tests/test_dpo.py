"""DPO: numbers by hand, a table of rewards recovered from comparisons; what
must not matter (absent answers, masked columns, weights' scale, microbatches, devices)."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial
from tabular import (
    assert_close,
    assert_identical,
    bandit_policy_fn,
    comparisons,
    numbers,
    policy_fn,
    policy_params,
)

from rlhf_jax.algorithms import dpo
from rlhf_jax.types import Comparisons, PolicyOutput, TrainState

KEY = jax.random.key(7)
SGD = optax.sgd(0.5)
# Row 1 has a chosen answer alone, row 2 a rejected one alone, rows 4 and 5 (a whole device) none.
ABSENT = [(1, 1), (2, 0), *((row, answer) for row in (4, 5) for answer in range(2))]


def updater(config, policy=policy_fn, optimizer=SGD, **kwargs):
    return partial(dpo.update, policy_fn=policy, optimizer=optimizer, config=config, **kwargs)


@functools.cache
def jitted(config):
    return jax.jit(updater(config))


def start():
    return TrainState.create(policy_params(0), SGD)


def pairs(num_rows=8, absent=ABSENT, **fields):
    """Random pairs with the log-probs of another policy as reference."""
    batch = dpo.with_reference(comparisons(0, num_rows, 2, absent=absent), Partial(policy_fn, policy_params(1)))
    return batch.replace(**fields)


def of_log_ratios(log_ratios, absent=(), **fields):
    """Pairs of one-token answers whose log-ratios are given: a policy of log-prob -1 - position in the batch."""
    log_ratios = np.asarray(log_ratios, np.float32)
    rows = len(log_ratios)
    tokens = jnp.arange(2 * rows).reshape(rows, 2, 1)
    mask = np.ones((rows, 2, 1), np.int32)
    for row, answer in absent:
        mask[row, answer] = 0
    log_probs = -1.0 - np.arange(2.0 * rows, dtype=np.float32)
    batch = Comparisons(
        tokens=tokens,
        attention_mask=jnp.asarray(mask),
        response_mask=jnp.asarray(mask),
        ref_log_probs=jnp.asarray(log_probs.reshape(rows, 2) - log_ratios),
        **{name: jnp.asarray(value) for name, value in fields.items()},
    )
    return {"log_probs": jnp.asarray(log_probs)}, batch


def table_policy(params, tokens, attention_mask, key):
    """The log-prob of an answer's token from a table, with the prompt left out."""
    del attention_mask
    assert key is None  # no dropout
    log_probs = params["log_probs"][tokens]
    return PolicyOutput(log_probs, jnp.zeros_like(log_probs))


def run(params, batch, **config):
    value, metrics = numbers(dpo.loss)(params, batch, KEY, policy_fn=table_policy, config=dpo.Config(**config))
    assert metrics["dpo/loss"] == value
    metrics = {name.removeprefix("dpo/"): float(x) for name, x in metrics.items()}
    return metrics.pop("loss"), metrics


@pytest.mark.parametrize(
    ("config", "log_ratios", "expected"),
    [
        ({}, (7.0, -3.0), 0.313262),  # beta .1, Delta 10 (ALGORITHMS 6)
        ({"label_smoothing": 0.1}, (7.0, -3.0), 0.413262),
        ({"kind": "robust", "label_smoothing": 0.1}, (7.0, -3.0), 0.188262),
        ({"kind": "hinge"}, (7.0, -3.0), 0.0),
        ({"kind": "ipo"}, (4.0, -3.0), 4.0),
        ({}, (0.0, 0.0), np.log(2.0)),
        ({"label_smoothing": 0.1}, (0.0, 0.0), np.log(2.0)),
        ({"kind": "robust", "label_smoothing": 0.1}, (0.0, 0.0), np.log(2.0)),
        ({"kind": "hinge"}, (0.0, 0.0), 1.0),
        ({"kind": "ipo"}, (0.0, 0.0), 25.0),
    ],
)
def test_losses_by_hand(config, log_ratios, expected):
    assert_close(run(*of_log_ratios([log_ratios]), **config)[0], expected)


def test_metrics_and_best_by_hand():
    """The margin is in units of reward, log-ratios in nats; a tie is half right; best = 1 swaps the answers."""
    ratios = [(2.0, -1.0), (-1.0, 4.0), (0.5, 0.5), (3.0, 1.0)]
    expected = {"accuracy": 2.5 / 4, "margin": 0.2 * 0.0, "chosen_log_ratio": 4.5 / 4, "rejected_log_ratio": 4.5 / 4}
    _, metrics = run(*of_log_ratios(ratios), beta=0.2)
    assert_close(metrics, expected)
    swapped = [ratios[0], ratios[1][::-1], ratios[2], ratios[3]]
    loss, metrics = run(*of_log_ratios(ratios, best=[0, 1, 0, 0]), beta=0.2)
    assert_close((loss, metrics), run(*of_log_ratios(swapped), beta=0.2))
    expected = {"accuracy": 3.5 / 4, "margin": 0.2 * 2.5, "chosen_log_ratio": 9.5 / 4, "rejected_log_ratio": -0.5 / 4}
    assert_close(metrics, expected)


def test_weights_are_relative_and_half_a_pair_is_none():
    ratios = [(7.0, -3.0), (0.0, 0.0), (1.0, 9.0), (9.0, 1.0)]
    params, batch = of_log_ratios(ratios, absent=[(2, 0), (3, 1)], weight=[3.0, 1.0, 5.0, 5.0])
    loss, metrics = run(params, batch)
    assert_close(loss, (3 * 0.313262 + np.log(2.0)) / 4)
    assert_close((metrics["accuracy"], metrics["margin"]), (3.5 / 4, 0.75))
    assert_close(run(params, batch.replace(weight=2 * batch.weight)), (loss, metrics))
    nobody = batch.replace(response_mask=jnp.zeros_like(batch.response_mask))
    assert run(params, nobody) == (0.0, dict.fromkeys(metrics, 0.0))


def test_gradient_by_hand():
    """-beta * sigmoid(-beta * Delta) for the chosen answer's log-prob, its opposite for the other's (eq. 7 of the
    paper, differentiated)."""
    params, batch = of_log_ratios([(7.0, -3.0), (2.0, 4.0)], best=[0, 1])
    f = partial(numbers(dpo.loss), policy_fn=table_policy, config=dpo.Config())
    gradient, _ = jax.grad(f, has_aux=True)(params, batch, KEY)
    slopes = 0.1 / (1 + np.exp(0.1 * np.array([10.0, 2.0]))) / 2
    np.testing.assert_allclose(gradient["log_probs"], np.outer(slopes, [-1, 1]).ravel() * [1, 1, -1, -1], rtol=1e-5)


def test_at_the_reference_the_loss_is_ln_2():
    same = dpo.with_reference(pairs(best=jnp.arange(8) % 2), Partial(policy_fn, policy_params(0)))
    state, metrics = jitted(dpo.Config())(start(), same, KEY)
    np.testing.assert_allclose(metrics["dpo/loss"], np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(metrics["dpo/margin"], 0.0, atol=1e-6)
    assert state.step == 1


def test_microbatches_change_nothing():
    batch = pairs(weight=jnp.linspace(0.5, 2.0, 8))
    whole = jitted(dpo.Config())(start(), batch, KEY)
    assert_close(jitted(dpo.Config(num_microbatches=4))(start(), batch, KEY), whole)


def test_masked_columns_and_absent_pairs_do_not_matter():
    batch = pairs()
    there = np.array([0, 3, 6, 7])
    smaller = jax.tree.map(lambda x: np.asarray(x)[there], batch)

    @jax.jit
    def update(poison, batch):
        response = batch.response_mask != 0
        pair = response.any(axis=2).all(axis=1)

        def poisoned_policy(*args):
            outside = ~response.reshape(-1, response.shape[2])
            return PolicyOutput(*(x + jnp.where(outside, poison, 0.0) for x in policy_fn(*args)))

        # The present answer of half a pair has a reference that nobody reads either.
        bad = batch.replace(ref_log_probs=batch.ref_log_probs + jnp.where(pair, 0.0, poison)[:, None])
        return updater(dpo.Config(), poisoned_policy)(start(), bad, KEY)

    expected = update(0.0, batch)
    assert expected[1]["grad_norm"] > 0
    for poison in (np.nan, 1e4, -1e4, np.inf):
        assert_identical(update(poison, batch), expected)
    assert_close(update(0.0, smaller), expected)


def test_a_reference_that_is_not_finite_keeps_the_state():
    batch = pairs()
    bad = batch.replace(ref_log_probs=batch.ref_log_probs.at[0, 1].set(jnp.nan))
    kept, metrics = jitted(dpo.Config())(start(), bad, KEY)
    assert metrics["nonfinite"] == 1
    assert_identical(kept, start())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "bradley"}, "sigmoid, robust, hinge, ipo"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be below 0.5"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"num_microbatches": 3}, "num_microbatches=3 does not divide the 8 rows"),
    ],
)
def test_unusable_configs(fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(updater(dpo.Config(**fields)), start(), pairs(), KEY)


def test_unusable_comparisons():
    def refused(error, batch, message, policy=policy_fn):
        with pytest.raises(error, match=message):
            jax.eval_shape(updater(dpo.Config(), policy), start(), batch, KEY)

    refused(ValueError, pairs(ref_log_probs=None), r"ref_log_probs .*got None: dpo\.with_reference")
    four = comparisons(0, 4, 4).replace(ref_log_probs=jnp.zeros((4, 4)))
    refused(ValueError, four, r"K = 2, got tokens \(4, 4, 6\)")
    refused(AssertionError, pairs(ref_log_probs=jnp.zeros((8, 1))), r"\(8, 1\).*\(8, 2\)")
    refused(AssertionError, pairs(weight=jnp.ones((8, 1))), r"\(8, 1\)")
    refused(AssertionError, jax.tree.map(lambda x: x[:, 0], pairs()), "rank")
    column = lambda *args: PolicyOutput(*(x[:, :1] for x in policy_fn(*args)))  # noqa: E731
    refused(AssertionError, pairs(), r"\(16, 6\).*\(16, 1\)", column)


@pytest.mark.parametrize(
    "values", [{"beta": (0.1, 0.5), "label_smoothing": (0.0, 0.2)}, {"kind": "ipo", "beta": (0.1, 0.5)}]
)
def test_a_sweep_under_vmap_equals_separate_runs(values):
    kind, batch = {"kind": values.pop("kind", "sigmoid")}, pairs()

    def run(fields):
        return updater(dpo.Config(**kind, **fields))(start(), batch, KEY)

    together = jax.jit(jax.vmap(run))({name: jnp.array(pair) for name, pair in values.items()})
    for k in range(2):
        assert_close(jax.tree.map(lambda x, k=k: x[k], together), run({name: pair[k] for name, pair in values.items()}))


def test_recovers_a_table_of_rewards():
    """Labels drawn from Bradley-Terry: beta * log-ratio differences are reward differences (ALGORITHMS 8.3)."""
    rewards, beta = jnp.array([0.0, 1.0, -0.5]), 0.5
    pair_key, label_key = jax.random.split(KEY)
    arms = jax.random.randint(pair_key, (20_000, 2), 0, 3)
    margin = rewards[arms[:, 0]] - rewards[arms[:, 1]]
    best = 1 - jax.random.bernoulli(label_key, jax.nn.sigmoid(margin)).astype(jnp.int32)
    tokens = jnp.stack([jnp.zeros_like(arms), arms], axis=2)  # a prompt token, then the answer
    ones = jnp.ones_like(tokens)
    reference = {"logits": jnp.log(jnp.array([0.5, 0.3, 0.2])), "value": jnp.zeros(())}
    batch = Comparisons(tokens, ones, ones.at[:, :, 0].set(0), best=best)
    optimizer = optax.adam(optax.linear_schedule(0.2, 0.0, 100))

    @jax.jit
    def train(batch):
        batch = dpo.with_reference(batch, Partial(bandit_policy_fn, reference))

        def step(state, key):
            return updater(dpo.Config(beta=beta), bandit_policy_fn, optimizer)(state, batch, key)

        return jax.lax.scan(step, TrainState.create(reference, optimizer), jax.random.split(KEY, 100))

    state, metrics = train(batch)
    implied = beta * (jax.nn.log_softmax(state.params["logits"]) - jax.nn.log_softmax(reference["logits"]))
    np.testing.assert_allclose(implied - implied.mean(), rewards - rewards.mean(), atol=0.05)
    assert metrics["dpo/loss"][-1] < metrics["dpo/loss"][0] - 0.03
