"""experiments/kto_imbalance.py: its rules by hand, the order of rows, a short form of the whole."""

import json

import kto_imbalance
import numpy as np
import pytest
import results
from kto_imbalance import TASKS, Sizes, Text

SIZES = Sizes(demonstrations=2, rows=80, rare=16, asked=4, seeds=2, rates=(1e-4, 1e-3))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("(abcdab.", (True, True)),
        ("[abcdabe!", (True, True)),  # six letters of seven
        ("{abcdae?", (True, False)),  # five of six
        ("(efghef.", (True, False)),
        ("(abcda.", (False, False)),  # too short
        ("(abcdabcdabc.", (False, False)),
        ("abcdabc.", (False, False)),
        ("(abcdab", (False, False)),
        ("(abc.ab.", (False, False)),
        ("", (False, False)),
    ],
)
def test_answers_of_letters_by_hand(answer, expected):
    assert kto_imbalance.judge_letters(Text("dhhhh", answer)) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("lmnr!", (True, True)),
        ("lmn.", (True, False)),
        ("lmnrl?", (True, False)),
        ("lmnr", (False, False)),
        ("lmx!", (False, False)),
        (".", (False, False)),
        ("", (False, False)),
    ],
)
def test_answers_of_lengths_by_hand(answer, expected):
    assert kto_imbalance.judge_lengths(Text("x4y", answer)) == expected


def test_rows_in_their_proportion():
    """Each of three batches of 32 has a fifth of the good rows, or one more or less."""
    for in_proportion, most in ((True, 1), (False, 9)):
        numbers = kto_imbalance.order(20, 80, 0, in_proportion)
        assert numbers.shape == (6, 32)
        assert len(set(numbers[:3].ravel())) == 96
        counts = (numbers < 20).sum(axis=1)
        assert np.abs(counts - 6.4).max() <= most
        assert (np.diff(numbers, axis=1) < 0).any(axis=1).all()


def test_the_share_of_good_demonstrations():
    for name, task in TASKS.items():
        texts = task.draw(500, 0)
        formed, good = np.mean([task.judge(text) for text in texts], axis=0)
        assert formed == 1, name
        assert 0.15 < good < 0.35, name


@pytest.mark.parametrize(
    ("num_good", "expected"),
    [
        (300, {"weights 1": (1, 1), "totals 1": (4, 1), "totals 1.5": (6, 1)}),
        (750, {"weights 1": (1, 1), "totals 1.5": (1.5, 1)}),
        (1200, {"weights 1": (1, 1), "totals 1": (1, 4), "totals 1.5": (1, 8 / 3)}),
    ],
)
def test_weights_of_the_variants(num_good, expected):
    found = kto_imbalance.variants(num_good, 1500 - num_good, (1e-3,), why=False)
    assert found.pop("before").rate == 0
    for name, lane in found.items():
        both = (lane.desirable_weight, lane.undesirable_weight)
        assert both == pytest.approx(expected.pop(name.removesuffix(", 0.001")))
        assert lane[3:] == (0.1, 0.0, 0.0)
    assert not expected


def test_gains_are_of_the_same_rate_and_seed():
    cell = "letters, 16 of 80 good"
    values = {"weights 1, 0.001": 0.25, "weights 1, 0.01": 0.5, "totals 1.5, 0.001": 1.0}
    rows = [
        results.row(f"{cell}: {name}", seed, 9, "good", value - seed)
        for name, value in values.items()
        for seed in (0, 1)
    ]
    rows.append(results.row("lengths, 16 of 80 good: totals 1.5, 0.001", 0, 9, "good", 1))
    found = [(row["variant"], row["seed"], row["value"]) for row in kto_imbalance.gains(rows)]
    assert found == [(f"{cell}: totals 1.5, 0.001", seed, 0.75) for seed in (0, 1)]


@pytest.mark.slow
def test_a_short_form(tmp_path):
    out = tmp_path / "results.json"
    kto_imbalance.main(out, SIZES)
    content = json.loads(out.read_text("utf-8"))
    names = {row["variant"] for row in content["rows"]}
    assert "letters, 16 of 80 good: totals 1, beta 0.5, 0.001" in names
    assert "lengths, 64 of 80 good: totals 1.5, 0.0001" in names
    assert not any("64 of 80" in name and "beta" in name for name in names)
    of_one = [row for row in content["rows"] if row["seed"] == 11]
    assert {row["metric"] for row in of_one} == {
        *(*kto_imbalance.FIGURES, "well-formed", "good"),
        kto_imbalance.GAIN,
    }
    assert any(row["seed"] == results.ALL for row in content["rows"])
    before = out.read_text("utf-8")
    kto_imbalance.main(out, SIZES)
    assert out.read_text("utf-8") == before  # all is in the file
