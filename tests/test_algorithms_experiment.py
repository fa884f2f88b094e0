"""The comparison of methods in experiments/algorithms.py: words, scores and statistics by hand, and
a short form of the whole.
"""

import json

import algorithms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import results
import yaml
from algorithms import FINAL, KL, MEAN, TASKS, Curve, Measured, Sizes
from builders import ROOT

from rlhf_jax.errors import UserError

PRESETS = {
    "Dr. GRPO": "dr_grpo",
    "DAPO": "dapo",
    "GSPO": "gspo",
    "CISPO": "cispo",
    "SAPO": "sapo",
    "VESPO": "vespo",
    "REINFORCE++": "reinforce_pp",
}
OF_A_RUN = {"group_size", "num_epochs", "num_minibatches", "length"}
SIZES = Sizes(demonstrations=4, steps=4, batch_size=16, held_out=4, every=2, sweep_seeds=1)


def measured(scores, kls=None):
    """Of scores [tasks, seeds, steps]."""
    scores = np.asarray(scores, np.float64)
    kls = np.zeros_like(scores) if kls is None else np.asarray(kls, np.float64)
    sweep = np.zeros((len(TASKS), len(algorithms.RATES)))
    return Measured(Curve(scores, kls), [1e-3, 1e-2], sweep, 1.0)


def value_of(rows, variant, metric, step, seed=results.ALL):
    key = {"variant": variant, "metric": metric, "step": step, "seed": seed}
    [row] = [row for row in rows if key.items() <= row.items()]
    return row["value"]


@pytest.mark.parametrize("held_out", [False, True])
def test_no_held_out_word_is_trained_on(held_out):
    found = np.asarray(algorithms.words(jax.random.key(0), 4000, held_out=held_out))
    assert set((found.sum(axis=1) % 4).tolist()) == ({0} if held_out else {1, 2, 3})
    for letters in found.T:  # 500 of each are expected, with a deviation of 21
        assert np.abs(np.bincount(letters, minlength=algorithms.LETTERS) - 500).max() < 100


def test_scores_by_hand():
    asked = [1, 2, 3, 4]
    said = [[4, 3, 2, 1], [4, 3, 2, 8], [1, 2, 3, 4], [4, 2, 3, 1]]
    tokens = jnp.array([asked + answer for answer in said])
    share = algorithms.score(tokens, jnp.array(False))
    whole = algorithms.score(tokens, jnp.array(True))
    assert share.tolist() == [1.0, 0.75, 0.0, 0.5]
    assert whole.tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", PRESETS)
def test_methods_have_the_values_of_their_presets(name):
    text = (ROOT / "configs" / "algorithms" / f"{PRESETS[name]}.yaml").read_text("utf-8")
    module, config = algorithms.METHODS[name]
    section = yaml.safe_load(text)[module.__name__.rpartition(".")[2]]
    for key, value in section.items():
        if key not in OF_A_RUN:
            ours = getattr(config, key)
            assert (list(ours) if isinstance(ours, tuple) else ours) == value, key
    assert config.num_epochs * config.num_minibatches == 4


def test_an_interquartile_mean_leaves_a_quarter_out_on_each_side():
    found = algorithms.interquartile(np.array([0.0, 1, 2, 3, 4, 5, 6, 17, 18, 70]))
    assert found[""] == pytest.approx(37 / 6)
    assert 1.0 < found[" low"] < 37 / 6 < found[" high"] < 70
    assert algorithms.interquartile(np.full(8, 0.25)) == {"": 0.25, " low": 0.25, " high": 0.25}


def test_differences_are_paired_and_wider_for_several_comparisons():
    ours = np.array([5.0, 13.0])
    theirs = np.array([4.0, 10.0])  # differences 1 and 3, error 1
    one = algorithms.difference(ours, theirs, 1)
    assert one[""] == 2.0
    assert one[" high"] - one[""] == pytest.approx(12.7062, abs=1e-3)  # Student's t, one degree
    five = algorithms.difference(ours, theirs, 5)
    assert five[""] - five[" low"] == pytest.approx(63.6567, abs=1e-3)  # that of 99%


def test_a_measurement_is_the_mean_of_its_steps():
    scores = np.zeros((2, 4, 4))
    scores[1] = [0.0, 0.2, 0.4, 0.8]  # of each of four seeds
    kls = np.zeros((2, 4, 4))
    kls[1, :, 2:] = [1.0, 2.0]
    rows = algorithms.rows_of(1, "GRPO", measured(scores, kls), SIZES)
    name = "whole word: GRPO"
    assert value_of(rows, name, "score", 2) == pytest.approx(0.1)
    assert value_of(rows, name, "score", 4) == pytest.approx(0.6)
    assert value_of(rows, name, FINAL, 4) == pytest.approx(0.6)
    assert value_of(rows, name, FINAL, 4, seed=3) == pytest.approx(0.6)
    assert value_of(rows, name, MEAN, 4) == pytest.approx(0.35)
    assert value_of(rows, name, KL, 4) == pytest.approx(1.5)
    assert value_of(rows, name, "learning rate", 4) == 1e-2


def test_each_method_is_compared_with_ppo_and_with_grpo():
    scores = np.tile(np.array([0.1, 0.2, 0.3, 0.4])[:, None], (2, 1, 4))
    of_methods = {
        "PPO": scores,
        "GRPO": scores + 0.1,
        "GSPO": scores + np.array([0, 0, 0.3, 0.3]),
    }
    rows = []
    for name, values in of_methods.items():
        rows += algorithms.rows_of(0, name, measured(values), SIZES)
        rows += algorithms.rows_of(1, name, measured(values), SIZES)
    found = algorithms.comparisons(rows)
    name = "each letter: GSPO"
    assert value_of(found, name, f"{FINAL} minus PPO's", 4) == pytest.approx(0.3)
    assert value_of(found, name, f"{MEAN} minus GRPO's", 4) == pytest.approx(0.05)
    assert value_of(found, "each letter: PPO", f"{FINAL} minus GRPO's", 4) == -0.1
    assert {row["variant"] for row in found if "minus GRPO's" in row["metric"]} == {
        f"{task}: {name}" for task in TASKS for name in ("PPO", "GSPO")
    }


def test_a_second_call_goes_on_with_what_the_file_has(tmp_path):
    out = tmp_path / "algorithms.json"
    assert algorithms.done_before(out, SIZES) == ([], 0.0)
    kept = results.row("each letter: PPO", 0, 4, FINAL, 0.5)
    compared = results.row("each letter: PPO", results.ALL, 4, f"{FINAL} minus GRPO's", 0.1)
    results.write(out, "a command", 7.4, [kept, compared], sizes=SIZES._asdict())
    assert algorithms.done_before(out, SIZES) == ([kept], 7)
    with pytest.raises(UserError, match="other sizes"):
        algorithms.done_before(out, SIZES._replace(steps=6))


@pytest.mark.slow
def test_the_short_form(tmp_path):
    out = tmp_path / "algorithms.json"
    algorithms.main(out, ("PPO",), SIZES)
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert {row["variant"] for row in rows} == {
        f"{task}: {name}" for task in TASKS for name in ("PPO", "first policy", "best of 8")
    }
    steps = {row["step"] for row in rows if row["metric"] == "score"}
    assert steps == {2, 4}
    for task in TASKS:
        first = value_of(rows, f"{task}: first policy", FINAL, 0)
        assert 0 <= first <= value_of(rows, f"{task}: best of 8", FINAL, 0) <= 1
        assert value_of(rows, f"{task}: PPO", "learning rate", 4) in algorithms.RATES
    assert value_of(rows, "whole word: PPO", FINAL, 4) <= value_of(
        rows, "each letter: PPO", FINAL, 4
    )
