"""The tasks and the statistics of experiments/critic.py by hand, and a short form of the whole."""

import json

import critic
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import results
from critic import EXPLAINED, FINAL, MEAN, Curve, Measured, Sizes

from rlhf_jax import ppo
from rlhf_jax.training.common import rates
from rlhf_jax.types import Rollout

METHODS = (
    "RLOO",
    "PPO, 4 passes, separate critic",
    "PPO, 4 passes, critic from the reward model",
    "VPG",
)
SIZES = Sizes(seeds=1, calls=2, comparisons=2, last=2, most_steps=4)


def paid(pay, *rows):
    tokens = jnp.array(rows)
    said = jnp.ones_like(tokens).at[:, 0].set(0)
    batch = pay(Rollout(tokens, jnp.ones_like(tokens), said, jnp.zeros(tokens.shape)), {})
    given = batch.rewards if batch.dense else batch.scores
    return np.asarray(given).round(4).tolist()


def test_what_answers_are_paid():
    assert paid(critic.right_letter, [1, 5, 0, 5], [1, 0, 5, 0], [0, 0, 5, 5]) == [1, 0, 1]
    assert paid(critic.prompts_letter, [7, 7, 1], [7, 1, 7]) == [1, 0]
    assert paid(critic.next_letters, [18, 19, 0, 2, 3]) == [[0, 0.25, 0.25, 0, 0.25]]
    assert paid(critic.near_sum, [2, 5, 6], [2, 10, 10], [2, 19, 3]) == [-9, 0, -2]
    assert paid(critic.rising, [9, 5, 6, 6, 7], [0, 1, 0, 0, 0]) == pytest.approx([0.02, 0])
    assert paid(critic.three_times, [2, 2, 2, 2, 5], [2, 2, 2, 2, 2], [2, 0, 0, 2, 0]) == [
        0,
        -1,
        -2,
    ]
    assert paid(critic.matching, [18, 19, 0, 2])[0] == pytest.approx([0, -1, 0.3, 0.3])


def test_the_rule_behind_the_comparisons():
    order = sorted(set(critic.ENGLISH) - {" "})
    a, t = order.index("a"), order.index("t")
    assert len(order) <= critic.LETTERS
    assert critic.liked(jnp.array([[t, a, t, t], [a, a, t, t]])).tolist() == [7, 4]


def test_texts_are_of_letters():
    found = np.asarray(critic.texts(jax.random.key(0), 500, 24))
    assert found.shape == (500, 25)
    assert set(found.ravel().tolist()) == set(range(critic.LETTERS))


@pytest.mark.parametrize("passes", [1, 4])
def test_a_method_without_a_critic_differs_in_that_alone(passes):
    ours, theirs = (
        critic.METHODS[f"PPO, {passes} pass{'es' * (passes > 1)}{more}"]
        for more in ("", ", no critic")
    )
    assert ours.config == ppo.Config(num_epochs=passes)
    changed = {**vars(theirs.config), **theirs.changes}
    assert changed == vars(ours.config) | {"value_coef": 0}


def test_rates_are_chosen_by_some_seeds_and_measured_by_others(monkeypatch):
    """Of three rates the second is the best of the seeds that choose."""
    monkeypatch.setattr(critic, "RATES", (1e-3, 3e-3, 1e-2))
    score = np.zeros((3, 2, 4))
    score[1] = [[0.0, 0.0, 0.4, 0.6], [0.0, 0.2, 0.4, 0.8]]
    explained = np.zeros((3, 2, 4))
    explained[1] = [0.9, 0.9, -0.2, 0.4]
    ours = Measured(np.array([0.1, 0.3, 0.2]), Curve(score, explained))
    theirs = Measured(np.array([0.3, 0.1, 0.1]), Curve(score + 0.1, explained))
    rows = critic.rows_of("dense: PPO, 1 pass", ours, SIZES)
    rows += critic.rows_of("dense: PPO, 1 pass, no critic", theirs, SIZES)
    rows += critic.comparisons(rows)
    values = {(row["variant"], row["seed"], row["metric"]): row["value"] for row in rows}
    of_all = {
        metric: value
        for (of, seed, metric), value in values.items()
        if seed == results.ALL and of == "dense: PPO, 1 pass"
    }
    assert of_all["learning rate"] == critic.RATES[1]
    assert of_all[MEAN] == of_all[f"{MEAN} at 0.003"] == 0.3
    assert of_all[FINAL] == 0.55
    assert of_all[EXPLAINED] == 0.1
    assert of_all[f"{MEAN} minus no critic's"] == pytest.approx(0.3 - 0.1)
    assert of_all[f"{critic.AT_DEFAULT} minus no critic's"] == pytest.approx(-0.1)
    assert values["dense: PPO, 1 pass", 1, FINAL] == 0.6


def test_differences_are_those_of_each_seed():
    def rows_of(name, *scores):
        return [
            results.row(name, seed, 60, metric, score)
            for metric in (MEAN, FINAL, f"{MEAN} at 0.01")
            for seed, score in enumerate(scores)
        ]

    rows = rows_of("dense: PPO, 4 passes", 0.5, 0.75) + rows_of("dense: VPG", 0.25, 0.0)
    found = [
        (row["variant"], row["seed"], row["metric"], row["value"])
        for row in critic.comparisons(rows)
        if not row["metric"].endswith(results.EDGES)
    ]
    minus = f"{MEAN} minus VPG's"  # of the final score and of other rates no page tells
    expected = [(results.ALL, 0.5), (0, 0.25), (1, 0.75)]
    assert found == [("dense: PPO, 4 passes", seed, minus, value) for seed, value in expected]


def test_the_default_rate_is_the_packages():
    shapes = jax.eval_shape(critic.MODEL.init, jax.random.key(0))
    num = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    rate = rates.default_rate("rl", rates.Size(num, is_adapter=False))
    assert f"{MEAN} at {rate:g}" == critic.AT_DEFAULT


@pytest.mark.slow
def test_the_short_form(tmp_path):
    out = tmp_path / "critic.json"
    for _ in range(2):  # the second call has nothing to do
        critic.main(out, ("reward model",), METHODS, SIZES)
    rows = json.loads(out.read_text("utf-8"))["rows"]
    names = [row["variant"] for row in rows if row["metric"] == "learning rate"]
    assert names == [f"reward model: {name}" for name in METHODS]
    assert any(row["metric"] == "score" for row in rows)
