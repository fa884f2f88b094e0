"""Overoptimisation of reward models: best of n by brute force, fits of curves that are known, and a
short form of the whole.
"""

import functools
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import hacking_alerts
import jax
import jax.numpy as jnp
import numpy as np
import overoptimisation
import pytest
import results
from jax.tree_util import Partial
from numpy.testing import assert_array_equal
from overoptimisation import COMPARISONS, HOW, Curve, Lane, Run, Sizes

from rlhf_jax import models


def test_best_of_n_is_the_mean_over_all_choices_of_n():
    rng = np.random.default_rng(0)
    gold = rng.normal(size=7)
    proxy = rng.normal(size=7)
    for n in (1, 2, 5, 7):
        best = [
            max(chosen, key=lambda i: proxy[i]) for chosen in itertools.combinations(range(7), n)
        ]
        expected = (gold[best].mean(), proxy[best].mean())
        assert overoptimisation.best_of(gold, proxy, n) == pytest.approx(expected)


def test_the_gold_reward_by_hand():
    values = np.zeros(overoptimisation.VOCABULARY)
    values[[3, 4]] = [1.5, -0.5]
    tokens = np.full((2, 1 + overoptimisation.LENGTH), 3)  # the first token is the prompt
    tokens[0, 1:] = [3, 3, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9]
    scores = overoptimisation.gold_reward(values, tokens)
    assert scores.tolist() == [2.5, 12 * 1.5 - 10**2]


def test_fits_find_the_curves_they_are_of():
    distance = np.linspace(0.3, 4, 20)
    of_rl = distance * (1.5 - 0.7 * np.log(distance))
    of_best = distance * (1.5 - 0.2 * distance)
    assert overoptimisation.fitted(distance, of_rl, is_rl=True) == pytest.approx((1.5, 0.7))
    assert overoptimisation.fitted(distance, of_best, is_rl=False) == pytest.approx((1.5, 0.2))


def test_a_curve_says_where_gold_is_highest_and_how_far_it_falls():
    curve = Curve(np.array([0.1, 0.9, 0.4]), np.array([0.2, 1.0, 2.0]), np.array([0.25, 1.0, 4.0]))
    rows = overoptimisation.curve_rows("RL: 64 comparisons", 3, [5, 10, 15], curve)
    found = {(row["variant"], row["step"], row["metric"]): row["value"] for row in rows}
    name = "RL: 64 comparisons"
    assert found[name, 15, "highest gold"] == 0.9
    assert found[name, 15, "sqrt(KL) there"] == 1.0
    assert found[name, 15, "fall of gold"] == 0.5
    assert found[name, 15, "sqrt(KL) at the end"] == 2.0
    assert found[f"{name}, gold", 5, "reward"] == 0.1
    assert found[f"{name}, proxy", 15, "reward"] == 2.0
    assert found[f"{name}, proxy", 5, "sqrt(KL)"] == 0.5
    alpha, beta = overoptimisation.fitted(np.array([0.5, 1.0, 2.0]), curve.gold, is_rl=True)
    assert found[name, 15, "alpha"] == pytest.approx(alpha, abs=1e-4)
    assert found[name, 15, "beta"] == pytest.approx(beta, abs=1e-4)


def test_seeds_that_end_below_the_start_are_counted_and_ensembles_paired_by_seed():
    ends = {
        "RL: 256 comparisons": [1.0, -2.0],
        "all labels: mean": [1.5, -1.0],
        "a quarter wrong: one": [-1.0, -3.0],
        "a quarter wrong: min": [0.0, -2.5],
    }
    rows = [
        results.row(name, seed, 7, overoptimisation.END, value)
        for name, values in ends.items()
        for seed, value in enumerate(values)
    ]
    found = {
        (row["variant"], row["metric"]): row["value"] for row in overoptimisation.ends_of(rows)
    }
    below = {name: found[name, overoptimisation.BELOW] for name in ends}
    assert list(below.values()) == [0.5, 0.5, 1.0, 0.5]
    assert found["all labels: mean", overoptimisation.GAIN] == 0.75
    assert found["a quarter wrong: min", overoptimisation.GAIN] == 0.75
    assert found["a quarter wrong: min", f"{overoptimisation.GAIN} low"] < 0
    assert ("RL: 256 comparisons", overoptimisation.GAIN) not in found


def test_all_policies_have_their_proxies():
    lanes = overoptimisation.lanes_of(2)
    runs = overoptimisation.runs_of(2)
    assert len(set(lanes)) == len(lanes) == 2 * (len(COMPARISONS) + 6)
    assert len({(run.variant, run.seed) for run in runs}) == len(runs) == 2 * (len(COMPARISONS) + 8)
    for run in runs:
        members = [0] if run.how == "one" else range(overoptimisation.MEMBERS)
        assert {Lane(run.seed, run.comparisons, run.wrong, one) for one in members} <= set(lanes)
    assert Run(0, 256, 0.25, "one").variant == "a quarter wrong: one"
    assert {run.how for run in runs} == set(HOW)
    assert Run(0, 256, 0.0, overoptimisation.GOLD).variant == "RL: gold itself"


def test_no_policy_is_trained_on_its_judge():
    """The judge's comparisons begin where those of all others end, and so do its first weights."""
    judges = [overoptimisation.judge_of(seed) for seed in range(2)]
    others = set(overoptimisation.lanes_of(2)) - set(judges)
    assert {lane.first for lane in judges} == {max(COMPARISONS)}
    assert all(lane.first + lane.comparisons <= max(COMPARISONS) for lane in others)
    assert not {lane.member for lane in judges} & {lane.member for lane in others}


@pytest.mark.slow
def test_a_reward_model_learns_from_its_own_comparisons_alone(monkeypatch):
    """Other labels before its first comparison and behind its last one change nothing. Its network
    is one table here, which compiles in a moment.
    """
    table = np.random.default_rng(1).normal(size=(overoptimisation.VOCABULARY, 4))

    def score(params, tokens, *masks):
        return jnp.tanh(params["wte"]["embedding"][tokens]).sum((-2, -1))

    params = {"wte": {"embedding": jnp.asarray(table)}, "ln_f": {"scale": jnp.ones(4)}}
    network = SimpleNamespace(init=lambda key: params)
    monkeypatch.setattr(overoptimisation, "PROXY", network)
    monkeypatch.setattr(overoptimisation, "PROXY_FN", Partial(score))
    sizes = Sizes(pool=16, proxy_steps=10, proxy_batch=4)
    rng = np.random.default_rng(0)
    shape = (24, 2, 1 + overoptimisation.LENGTH)
    pairs = jnp.array(rng.integers(0, overoptimisation.VOCABULARY, shape))
    world = overoptimisation.World(
        start={},
        values=jnp.zeros(overoptimisation.VOCABULARY),
        mean=jnp.zeros(()),
        sd=jnp.ones(()),
        pool=pairs[:16, 0],
        gold_of_pool=jnp.zeros(16),
        pairs=pairs,
        best=jnp.zeros(24, jnp.int32),
        luck=jnp.ones(24),
    )
    train = jax.jit(functools.partial(overoptimisation.train_proxy, sizes=sizes))

    def scores(best):
        keys = jax.random.split(jax.random.key(0))
        return np.asarray(train(world._replace(best=best), 8, 8, 0.0, keys).scores)

    expected = scores(world.best)
    others = jnp.array([1] * 8 + [0] * 8 + [1] * 8)
    assert_array_equal(scores(others), expected)
    for mine in (8, 15):  # the last is held out: it chooses the step that is kept
        changed = scores(world.best.at[mine].set(1))
        assert np.abs(changed - expected).max() > 0 or mine == 15


def test_the_best_of_n_by_the_judge_is_not_among_the_proxies():
    lanes = overoptimisation.lanes_of(1)
    rng = np.random.default_rng(0)
    gold = rng.normal(size=(1, 64))
    scores = rng.normal(size=(len(lanes), 64))
    found = overoptimisation.Measured(gold, scores, None)
    rows = overoptimisation.best_of_n_rows(lanes, found)
    ranks = [row["variant"] for row in rows if row["metric"] == "rank correlation"]
    assert sorted(ranks) == sorted(f"best of n: {num} comparisons" for num in COMPARISONS)


def measured(gold, proxy, judge):
    return Curve(np.array(gold), np.array(proxy), np.zeros(len(gold)), np.array(judge))


RISE = [0.1 * number for number in range(11)]


def test_an_alert_is_late_by_the_steps_from_the_highest_gold():
    """Gold falls in the twelfth measurement, the judge in the fourteenth only; the mean of three is
    lower in the next one.
    """
    gold = [*RISE, 0.4, -0.2, -0.8, -1.4, -2.0]
    judge = [*RISE, 1.1, 1.2, 0.4, -0.2, -0.8]
    steps = list(range(5, 85, 5))
    found = hacking_alerts.seen(measured(gold, np.arange(16.0), judge), steps)
    assert found["gold"] == (65, 10, pytest.approx(1.2))
    assert found["judge"] == (75, 20, pytest.approx(2.4))


def test_a_run_that_only_gets_better_raises_no_alert():
    gold = [0.0, 0.21, 0.39, 0.6, 0.81, 1.0, 1.19, 1.4, 1.6, 1.8, 2.0]
    found = hacking_alerts.seen(measured(gold, np.arange(11.0), gold), list(range(11)))
    assert found == {"judge": (None, 0, 0.0), "gold": (None, 0, 0.0)}


def test_alerts_are_counted_over_seeds():
    of_seeds = [
        {"judge": hacking_alerts.Seen(30, late, lost), "gold": hacking_alerts.Seen(None, 0, 0.0)}
        for late, lost in ((5, 0.25), (15, 0.75))
    ]
    rows = hacking_alerts.rows("RL: 64 comparisons", of_seeds, 50)
    found = {(row["variant"], row["metric"]): row["value"] for row in rows if row["seed"] == "all"}
    name = "RL: 64 comparisons, a judge looks on"
    assert found[name, "share of seeds with an alert"] == 1
    assert found[name, hacking_alerts.LATE] == 10
    assert found[name, hacking_alerts.LOST] == 0.5
    late = [row["value"] for row in rows if row["seed"] in (0, 1) and "steps" in row["metric"]]
    assert late == [5, 15]
    other = "RL: 64 comparisons, gold looks on"
    assert found[other, "share of seeds with an alert"] == 0
    assert (other, hacking_alerts.LOST) not in found


@pytest.mark.slow
def test_the_short_form(tmp_path, monkeypatch):
    monkeypatch.setattr(overoptimisation, "COMPARISONS", (64, 256))
    monkeypatch.setattr(overoptimisation, "OF_JUDGE", 64)
    for name, function in (
        ("PROXY", models.score_fn),
        ("POLICY", functools.partial(models.policy_fn, prompt_length=1)),
    ):
        config = replace(getattr(overoptimisation, name).config, num_layers=1)
        model = models.build(config)
        monkeypatch.setattr(overoptimisation, name, model)
        monkeypatch.setattr(overoptimisation, f"{name}_FN", function(model))
    sizes = Sizes(seeds=2, pool=128, proxy_steps=10, proxy_batch=8, steps=4, batch_size=16, every=2)
    out = tmp_path / "overoptimisation.json"
    overoptimisation.main(out, sizes)
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert all(np.isfinite(row["value"]) for row in rows)
    of_seeds = [row for row in rows if row["seed"] != results.ALL]
    of_alerts = {hacking_alerts.LATE, hacking_alerts.LOST}
    assert {row["metric"] for row in of_seeds} - of_alerts == set(overoptimisation.OF_SEEDS)
    assert {row["seed"] for row in of_seeds} == {0, 1}
    rows = [row for row in rows if row["seed"] == results.ALL]
    found = {(row["variant"], row["step"], row["metric"]): row["value"] for row in rows}
    for num in overoptimisation.COMPARISONS:
        name = f"best of n: {num} comparisons"
        proxies = [found[f"{name}, proxy", n, "reward"] for n in (2, 4, 8, 16)]
        assert proxies == sorted(proxies)  # more answers to choose from
        assert found[name, 16, "sqrt(KL) at the end"] == pytest.approx(1.354, abs=1e-3)
        for judge in hacking_alerts.JUDGES.values():
            share = found[f"RL: {num} comparisons, {judge}", 4, "share of seeds with an alert"]
            assert 0 <= share <= 1
    for step in (2, 4):
        paid, gold = (
            found[f"RL: gold itself, {name}", step, "reward"] for name in ("proxy", "gold")
        )
        assert paid == gold
    assert ("RL: gold itself, gold looks on", 4, "share of seeds with an alert") not in found
