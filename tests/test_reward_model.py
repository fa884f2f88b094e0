"""Reward models: numbers by hand, what must not matter, and a table of rewards recovered from comparisons."""

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
    comparisons,
    numbers,
    score_fn,
)

from rlhf_jax.algorithms import reward_model
from rlhf_jax.data import encoding
from rlhf_jax.data.rows import Comparison, Pair
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.training.scoring import evenly, report, samples
from rlhf_jax.types import Comparisons, TrainState

KEY = jax.random.key(7)
SGD = optax.sgd(0.1)
PARAMS = {"scores": jnp.array([0.3, -0.5, 1.0, 0.1, -1.2])}
# Row 3 has three of four answers, rows 4 and 5 (a whole device) none.
ABSENT = [(3, 2), *((row, answer) for row in (4, 5) for answer in range(4))]


def updater(config, score=score_fn, optimizer=SGD):
    return partial(reward_model.update, score_fn=score, optimizer=optimizer, config=config)


@functools.cache
def jitted(config):
    return jax.jit(updater(config))


def start():
    return TrainState.create(PARAMS, SGD)


def of_scores(scores, absent=(), **fields):
    """Comparisons of one-token answers, and parameters that give answer k of row i ``scores[i][k]``."""
    rows, answers = np.shape(scores)
    mask = np.ones((rows, answers, 1))
    for row, answer in absent:
        mask[row, answer] = 0
    batch = Comparisons(
        tokens=jnp.arange(rows * answers).reshape(rows, answers, 1),
        attention_mask=jnp.asarray(mask, jnp.int32),
        response_mask=jnp.asarray(mask, jnp.int32),
        **{name: jnp.asarray(value) for name, value in fields.items()},
    )
    return {"scores": jnp.asarray(scores, jnp.float32).ravel()}, batch


def run(params, batch, config=reward_model.Config(), **kwargs):  # noqa: B008
    value, metrics = numbers(reward_model.loss)(params, batch, KEY, score_fn=score_fn, config=config, **kwargs)
    assert metrics["reward_model/loss"] == value
    metrics = {name.removeprefix("reward_model/"): float(x) for name, x in metrics.items()}
    return metrics.pop("loss"), metrics


def test_pairs_by_hand():
    assert_close(run(*of_scores([[1.0, 0.0]])), (0.313262, {"accuracy": 1.0, "margin": 1.0}))
    assert_close(run(*of_scores([[1.0, 0.0]], margin=[0.5]))[0], 0.474077)
    assert_close(run(*of_scores([[1.0, 0.0]], best=[1])), (1.313262, {"accuracy": 0.0, "margin": -1.0}))
    assert_close(run(*of_scores([[2.0, 2.0]])), (np.log(2.0), {"accuracy": 0.5, "margin": 0.0}))
    centred = reward_model.Config(centering=0.01)
    assert_close(run(*of_scores([[1.0, 2.0]]), config=centred)[0], 1.313262 + 0.09)


def test_choice_among_four_by_hand():
    """Equal scores give ln K; the margin is over the best of the others; an absent answer enters as -inf."""
    loss, metrics = run(*of_scores([[1.0] * 4, [0.0, 3.0, 2.0, 5.0]], best=[2, 1], absent=[(1, 3)]))
    second = -np.log(np.exp(3.0) / (1 + np.exp(2.0) + np.exp(3.0)))
    assert_close(loss, (np.log(4.0) + second) / 2)
    assert_close(metrics, {"accuracy": 0.75, "margin": 0.5})


def test_weights_are_relative():
    params, batch = of_scores([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], weight=[3.0, 1.0, 0.0])
    loss, metrics = run(params, batch)
    assert_close(loss, (3 * 0.313262 + 1.313262) / 4)
    assert_close(metrics, {"accuracy": 0.75, "margin": 0.5})
    assert_close(run(params, batch.replace(weight=2 * batch.weight)), (loss, metrics))


def test_regression_by_hand():
    """Squared errors over the answers that are there; the metrics have no comparison."""
    params, batch = of_scores([[1.0], [3.0], [9.0]], targets=[[0.0], [1.0], [np.nan]], absent=[(2, 0)])
    assert_close(run(params, batch), (2.5, {}))
    assert_close(run(params, batch.replace(weight=jnp.array([3.0, 1.0, 5.0])))[0], 7 / 4)
    params, batch = of_scores([[1.0, 2.0]], targets=[[0.0, 0.0]], absent=[(0, 1)])
    assert_close(run(params, batch)[0], 1.0)


def test_rows_without_a_choice():
    """No answers, or no best one: the row counts nowhere. A single answer: a certain choice, not a comparison."""
    expected = run(*of_scores([[1.0, 0.0]]))
    assert_close(run(*of_scores([[1.0, 0.0], [5.0, 6.0]], absent=[(1, 0), (1, 1)])), expected)
    assert_close(run(*of_scores([[1.0, 0.0], [5.0, 6.0]], absent=[(1, 0)])), expected)
    loss, metrics = run(*of_scores([[1.0, 0.0], [5.0, 6.0]], absent=[(1, 1)]))
    assert_close(loss, 0.313262 / 2)
    assert metrics == expected[1]
    assert run(*of_scores([[1.0, 0.0]], absent=[(0, 0), (0, 1)])) == (0.0, {"accuracy": 0.0, "margin": 0.0})


def test_absent_answers_change_no_gradient():
    batch = comparisons(0, 8, 4, absent=ABSENT)
    batch = batch.replace(best=jnp.array([0, 1, 2, 3, 0, 1, 0, 3]), margin=jnp.linspace(0.0, 1.0, 8))
    there = np.array([0, 1, 2, 3, 6, 7])

    def poisoned(poison, params, tokens, attention_mask, key):
        present = jnp.any(attention_mask != 0, axis=1)
        return score_fn(params, tokens, attention_mask, key) + jnp.where(present, 0.0, poison)

    @jax.jit
    def update(poison, batch):
        score = partial(poisoned, poison)
        return updater(reward_model.Config(), score)(start(), batch, KEY)

    expected = update(0.0, batch)
    assert expected[1]["grad_norm"] > 0
    for poison in (np.nan, 1e4, -1e4, np.inf):
        assert_identical(update(poison, batch), expected)
    assert_close(update(0.0, jax.tree.map(lambda x: x[there], batch)), expected)


def test_microbatches_and_jit_change_nothing():
    batch = comparisons(0, 8, 2, absent=[(row, 1) for row in (0, 5)] + [(2, 0), (2, 1)])
    config = reward_model.Config(centering=0.01)
    whole = jitted(config)(start(), batch, KEY)
    assert_close(jitted(dataclasses.replace(config, num_microbatches=4))(start(), batch, KEY), whole)
    assert_close(updater(config)(start(), batch, KEY), whole)


def test_dropout_keys():
    """Every microbatch has a key of its own; no key, no dropout."""

    def noisy(params, tokens, attention_mask, key):
        scores = score_fn(params, tokens, attention_mask, None)
        return scores if key is None else scores * 0.0 + jax.random.uniform(key, scores.shape)

    batch = comparisons(0, 4, 1).replace(targets=jnp.zeros((4, 1)))
    update = jax.jit(updater(reward_model.Config(num_microbatches=4), noisy))
    _, metrics = update(start(), batch, KEY)
    expected = [float(jax.random.uniform(jax.random.fold_in(KEY, row), (1,))[0]) ** 2 for row in range(4)]
    np.testing.assert_allclose(metrics["reward_model/loss"], np.mean(expected), rtol=1e-5)
    assert_close(update(start(), batch, None), jitted(reward_model.Config())(start(), batch, KEY))


def test_finite_guard_keeps_the_state():
    batch = comparisons(0, 4, 2).replace(margin=jnp.array([0.0, jnp.nan, 0.0, 0.0]))
    kept, metrics = jitted(reward_model.Config())(start(), batch, KEY)
    assert metrics["nonfinite"] == 1
    assert_identical(kept, start())


def test_errors():
    batch = comparisons(0, 4, 1)
    with pytest.raises(ValueError, match="at least 2 answers"):
        run(PARAMS, batch)
    with pytest.raises(ValueError, match="centering"):
        run(PARAMS, comparisons(0, 4, 3), config=reward_model.Config(centering=0.1))
    with pytest.raises(ValueError, match="centering must be at least 0"):
        reward_model.Config(centering=-0.1)
    column = lambda *args: score_fn(*args)[:, None]  # noqa: E731
    with pytest.raises(AssertionError, match=r"\(8, 1\)"):
        reward_model.loss(PARAMS, comparisons(0, 4, 2), KEY, score_fn=column, config=reward_model.Config())
    with pytest.raises(AssertionError, match="rank"):
        run(PARAMS, jax.tree.map(lambda x: x[:, 0], batch))
    with pytest.raises(ValueError, match="num_microbatches=3 does not divide the 4 rows"):
        jitted(reward_model.Config(num_microbatches=3))(start(), comparisons(0, 4, 2), KEY)


def test_a_sweep_under_vmap_equals_separate_runs():
    batch, values = comparisons(0, 8, 2, absent=[(2, 0), (3, 1)]), (0.0, 0.1)

    def run(centering):
        return updater(reward_model.Config(centering=centering))(start(), batch, KEY)

    together = jax.jit(jax.vmap(run))(jnp.array(values))
    for k, value in enumerate(values):
        assert_close(jax.tree.map(lambda x, k=k: x[k], together), run(value))


def test_recovers_a_table_of_rewards():
    """Labels drawn from Bradley-Terry: the scores are the rewards up to a constant (ALGORITHMS 8.2)."""
    rewards = jnp.array([0.0, 1.0, -0.5, 0.4, -1.2])
    pair_key, label_key = jax.random.split(KEY)
    tokens = jax.random.randint(pair_key, (20_000, 2, 1), 0, 5)
    margin = rewards[tokens[:, 0, 0]] - rewards[tokens[:, 1, 0]]
    best = 1 - jax.random.bernoulli(label_key, jax.nn.sigmoid(margin)).astype(jnp.int32)
    batch = Comparisons(tokens, jnp.ones_like(tokens), jnp.ones_like(tokens), best=best)
    optimizer = optax.adam(0.1)

    @jax.jit
    def train(batch):
        def step(state, key):
            return updater(reward_model.Config(), optimizer=optimizer)(state, batch, key)

        state = TrainState.create({"scores": jnp.zeros(5)}, optimizer)
        return jax.lax.scan(step, state, jax.random.split(KEY, 100))

    state, metrics = train(batch)
    scores = state.params["scores"]
    np.testing.assert_allclose(scores - scores.mean(), rewards - rewards.mean(), atol=0.06)
    assert metrics["reward_model/accuracy"][-1] > 0.6


LETTERS = characters("abcde? ")


def test_held_out_pairs_weigh_what_their_ranking_gives_them():
    """A ranking of three, of which one pair is right, and a pair: validation counts both rankings as one each."""
    rows = [
        Pair("a?", "b", "c", "one", weight=1 / 3),
        Pair("a?", "bc", "d", "one", weight=1 / 3),
        Pair("a?", "c", "d", "one", weight=1 / 3),
        Pair("b?", "c", "dde", "two"),
    ]
    encoded = encoding.encode_comparisons(rows, LETTERS)
    scores = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    every = report(encoded, np.arange(4), scores)
    assert every["accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    assert every["margin"] == pytest.approx((-1 / 3 + 1) / 2)
    assert every["length_accuracy"] == pytest.approx((0.5 / 3 + 1 / 3 + 0.5 / 3) / 2)
    part = np.array([3, 0])
    assert report(encoded, part, scores[part])["accuracy"] == 1.0


def test_samples_are_texts_without_special_tokens():
    rows = [Pair("a?", "b", "c d", "1"), Comparison("b?", ("c", "de", "b"), "2", best=1)]
    encoded = encoding.encode_comparisons(rows, LETTERS, template="a {prompt}")
    numbers, scores = np.array([1, 0]), np.array([[0.5, 1.0, 2.0], [0.25, -1.0, 7.0]])
    names = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected", "length_chosen", "length_rejected")
    found = samples(encoded, numbers, scores, LETTERS)
    assert [tuple(row) for row in found] == [names, names]
    assert [tuple(row.values()) for row in found] == [
        ("a b?", "de", "b", 1.0, 2.0, 3, 2),
        ("a a?", "b", "c d", 0.25, -1.0, 2, 4),
    ]


def test_samples_are_spread_over_the_held_out_rows():
    np.testing.assert_array_equal(evenly(5, 9), np.arange(5))
    np.testing.assert_array_equal(evenly(7, 3), [0, 3, 6])
    for num_rows in (257, 300, 511, 1000):
        found = evenly(num_rows, 256)
        assert (found[0], found[-1], len(found)) == (0, num_rows - 1, 256)
        assert set(np.diff(found)) <= {(num_rows - 1) // 255, (num_rows - 1) // 255 + 1}  # no row twice


def test_samples_with_targets_hold_every_answer():
    rows = [Comparison("a?", ("b", "c d"), "1", targets=(1.0, 0.0)), Comparison("b?", ("c",), "2", targets=(0.5,))]
    encoded = encoding.encode_comparisons(rows, LETTERS)
    found = samples(encoded, np.array([1, 0]), np.array([[3.0, 9.0], [1.0, 2.0]]), LETTERS)
    assert found == [
        {"prompt": "b?", "response": "c", "score": 3.0, "target": 0.5, "length": 2},
        {"prompt": "a?", "response": "b", "score": 1.0, "target": 1.0, "length": 2},
        {"prompt": "a?", "response": "c d", "score": 2.0, "target": 0.0, "length": 4},
    ]
