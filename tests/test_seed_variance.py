"""experiments/seed_variance.py: variances that are known, disagreement and ensembles by hand, and a
short form of the whole.
"""

import functools
import json
from dataclasses import replace

import jax
import numpy as np
import overoptimisation
import pytest
import results
import seed_variance
from numpy.testing import assert_array_equal
from overoptimisation import Curve
from seed_variance import Measured, Sizes

from rlhf_jax import models


def test_effects_that_add_up_have_no_interaction():
    """The mean over a further axis is that of the variances."""
    weights = np.array([0.0, 1.0, 5.0])[:, None, None] * np.array([1.0, 2.0])
    order = np.array([3.0, 3.5])[None, :, None]
    found = seed_variance.components(weights + order, ("weights", "order"))
    expected = {"weights": (7 + 28) / 2, "order": 0.125, "weights x order": 0.0}
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_variances_of_three_factors_are_found_without_bias():
    rng = np.random.default_rng(0)
    shape = (3, 4, 2)
    expected = {"a": 4.0, "b": 1.0, "c": 0.0, "a x b": 2.0, "a x c": 0.0, "b x c": 1.0}
    expected["a x b x c"] = 0.5
    values = np.zeros((*shape, 40000))
    for name, variance in expected.items():
        size = [num if axis in name else 1 for axis, num in zip("abc", shape, strict=True)]
        values += variance**0.5 * rng.normal(size=(*size, 40000))
    assert seed_variance.components(values, tuple("abc")) == pytest.approx(expected, abs=0.15)


def test_disagreement_is_of_pairs_of_different_models():
    votes = np.zeros((2, 2, 3), bool)
    votes[:, 1, :2] = True  # the order decides, in two of three comparisons
    gold = np.arange(4.0)
    scores = np.stack([[gold, -gold]] * 2)  # and which answers are the better ones
    measured = Measured(gold, scores, votes, np.ones(3), None, {}, {})
    found = seed_variance.of_models(measured)
    assert found["two of other order", 0, "disagreement"] == pytest.approx(2 / 3)
    assert found["two of other weights", 0, "disagreement"] == 0
    assert found["any two", 0, "disagreement"] == pytest.approx(4 / 6 * 2 / 3)
    assert found["reward models: order", 0, "share of accuracy"] == pytest.approx(1)
    assert found["reward models: mean", 0, "rank correlation"] == pytest.approx(0)
    assert found["reward models: order", 0, "share of score"] == pytest.approx(1)
    assert found["reward models: mean", 0, "accuracy"] == pytest.approx(1 / 3)
    assert found["reward models: deviation", 0, "accuracy"] == pytest.approx(2 / 3 * 0.5**0.5)


def test_all_members_have_the_whole_gain_and_one_has_none(monkeypatch):
    monkeypatch.setattr(seed_variance, "N", 4)
    rng = np.random.default_rng(0)
    gold = rng.normal(size=256)
    scores = gold + rng.normal(size=(4, 4, 256)) * 2
    measured = Measured(gold, scores, None, None, None, {}, {})
    sizes = Sizes(numbers=(1, 4, 16), draws=40)
    found = seed_variance.of_ensembles(measured, 0, sizes)
    mean = scores.mean((0, 1))
    for metric, score in (("best of 64", mean), ("mean - sd", mean - scores.std((0, 1)))):
        values = [found[f"{k} members", 0, metric] for k in sizes.numbers]
        assert values[0] < values[1] < values[2]
        assert values[2] == pytest.approx(overoptimisation.best_of(gold, score, 4)[0])
        gains = [found[f"{k} members", 0, f"{metric}: share of the gain"] for k in sizes.numbers]
        assert gains == [0, pytest.approx((values[1] - values[0]) / (values[2] - values[0])), 1]
    rank = seed_variance.rank_correlation(gold, mean)
    assert found["16 members", 0, "rank correlation: 5% of draws"] == pytest.approx(rank)
    low, high = (found["4 members", 0, f"rank correlation: {edge}% of draws"] for edge in (5, 95))
    assert low < found["4 members", 0, "rank correlation"] < high < rank


def test_policies_are_counted_below_the_first_and_have_a_band():
    gold = np.zeros((2, 2, 2, 2))
    gold[..., 0] = 1.0
    gold[0, :, :, 1] = -2.0
    gold[1, 0, 0, 0] = 3.0
    curves = Curve(gold, np.arange(16.0).reshape(gold.shape), np.full(gold.shape, 4.0))
    found = seed_variance.of_policies(curves, [5, 10])
    assert found["policies: mean", 0, "gold at the end"] == -1
    assert found["policies: mean", 0, "highest gold"] == 1.25
    assert found["policies: mean", 0, "share below the start"] == 1 / 2
    assert found["policies: weights", 0, "share of gold at the end"] == 1
    assert found["gold, mean of the seeds", 10, "reward"] == -1
    assert found["gold, mean of the seeds", 5, "sqrt(KL)"] == 2
    proxies = np.arange(0, 16, 2)
    for edge in (5, 95):
        expected = np.percentile(proxies, edge)
        assert found[f"proxy, {edge}% of the seeds", 5, "reward"] == expected


def test_a_policy_on_a_mean_is_compared_with_those_on_one():
    of_means = {
        k: Curve(np.array(gold), None, None) for k, gold in ((1, [[3.0, 1]]), (4, [[2.0, 5]]))
    }
    found = seed_variance.of_trained(of_means)
    name = f"{seed_variance.TRAINED_ON} 4"
    assert found[name, 0, "gold at the end: gain"] == 4
    assert found[name, 0, "highest gold: gain"] == 2


@pytest.fixture
def small(monkeypatch):
    """Networks of one layer, and 64 comparisons."""
    monkeypatch.setattr(seed_variance, "COMPARISONS", 64)
    monkeypatch.setattr(overoptimisation, "COMPARISONS", (64,))
    monkeypatch.setattr(overoptimisation, "OF_JUDGE", 64)
    for name, function in (
        ("PROXY", models.score_fn),
        ("POLICY", functools.partial(models.policy_fn, prompt_length=1)),
    ):
        model = models.build(replace(getattr(overoptimisation, name).config, num_layers=1))
        monkeypatch.setattr(overoptimisation, name, model)
        monkeypatch.setattr(overoptimisation, f"{name}_FN", function(model))
    of = overoptimisation.Sizes(pool=512, proxy_steps=10, proxy_batch=8, steps=4, batch_size=16)
    return of._replace(every=2)


@pytest.mark.slow
def test_a_key_changes_the_first_weights_or_the_order(small):
    """Without steps of any length the order does nothing."""
    world = overoptimisation.make_world(jax.random.key(0), small)
    a, b = jax.random.split(jax.random.key(1))
    keys = jax.numpy.stack([jax.numpy.stack(pair) for pair in ((a, a), (a, b), (b, a))])
    still = seed_variance.reward_models(world, keys, small._replace(proxy_rate=0.0)).scores
    assert_array_equal(still[0], still[1])
    moved = seed_variance.reward_models(world, keys, small).scores
    for scores, pair in ((still, (0, 2)), (moved, (0, 1)), (moved, (0, 2))):
        assert np.abs(scores[pair[0]] - scores[pair[1]]).max() > 1e-3


@pytest.mark.slow
def test_the_short_form(tmp_path, small):
    out = tmp_path / "seed_variance.json"
    sizes = Sizes(2, 2, 2, 2, numbers=(1, 4), draws=3, trained_on=(1, 4), runs=1, of_each=small)
    seed_variance.main(out, sizes)
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert all(np.isfinite(row["value"]) for row in rows if not row["metric"].endswith("gain"))
    found = {
        (row["variant"], row["step"], row["metric"]): row["value"]
        for row in rows
        if row["seed"] == results.ALL
    }
    gap = "reward models: millionths apart"
    assert found["64 beside one", 0, gap] < 100
    assert found["64 beside one", 0, "policies: times as long"] > 0
    assert ("policies: weights x order x sampling", 0, "share of highest gold") in found
    for k in (1, 4):
        assert (f"{seed_variance.TRAINED_ON} {k}", 0, "highest gold") in found
    assert {step for name, step, _ in found if name == "gold, mean of the seeds"} == {2, 4}
