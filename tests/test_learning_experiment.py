"""The experiment of five stages: its data, and how its numbers are put together."""

import json

import learning
import numpy as np
import peers
import pytest

from rlhf_jax.errors import UserError

SIZES = learning.Sizes(largest=4, held_out=6)


def test_no_held_out_sum_is_trained_on(tmp_path):
    (tmp_path / "answers.json").write_text(json.dumps(["I do not know"] * 16), "utf-8")
    learning.write_data(tmp_path, SIZES)
    for kind in ("rows", "pairs", "prompts"):
        train, held_out = (
            {row["prompt"] for row in json.loads((tmp_path / f"{part}_{kind}.json").read_text())}
            for part in ("train", "held_out")
        )
        assert len(train) == 10
        assert len(held_out) == 6
        assert not train & held_out


def test_a_folder_keeps_its_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(learning.sums, "write_model", lambda folder: None)
    (tmp_path / "answers.json").write_text(json.dumps(["I do not know"] * 16), "utf-8")
    learning.prepare(tmp_path, SIZES)
    written = (tmp_path / "train_rows.json").read_bytes()
    learning.prepare(tmp_path, SIZES)
    with pytest.raises(UserError, match=r"held_out=6.* asked for .*held_out=8"):
        learning.prepare(tmp_path, SIZES._replace(held_out=8))
    assert (tmp_path / "train_rows.json").read_bytes() == written


def test_pairs_by_turns_hold_a_near_number_and_a_wrong_answer_of_the_model():
    rows = learning.problems(SIZES)[:4]
    said = ["It is 99.", "It is 99.", "It is 99.", rows[3]["answer"]]
    pairs = learning.pairs_of(rows, said)
    assert [pair["chosen"] for pair in pairs] == [row["answer"] for row in rows]
    assert pairs[1]["rejected"] == "It is 99."
    for number in (0, 2, 3):  # the last: a right answer of the model is no wrong one
        gap = int(pairs[number]["rejected"]) - int(rows[number]["answer"])
        assert abs(gap) in (1, 2, 10)


def test_a_change_is_the_mean_over_sums_of_the_mean_over_seeds():
    before = np.array([[0.0, 0, 0, 1], [0, 0, 1, 1]])
    after = np.array([[1.0, 0, 1, 1], [1, 0, 1, 1]])
    # Of each sum: 1, 0, .5, 0: mean .375, standard deviation .4787, error .2394.
    found = learning.change(before, after)
    expected = {"": 0.375, " low": 0.375 - 1.96 * 0.23936, " high": 0.375 + 1.96 * 0.23936}
    assert found == pytest.approx(expected, abs=1e-4)


def test_each_library_has_its_own_curve(tmp_path, monkeypatch):
    """The metric of each stage's own run, and TRL with as many steps and rows."""
    asked = []

    def ours(run, flags, key):
        assert flags[-1] == str(run)
        return {0: 0.25, 10: 0.75} if (run.name, key) == ("grpo", "validation/score") else {0: 0.5}

    def theirs(command, *places, **how):
        asked.append((command, how))
        return {0: 0.0, 10: 1.0}

    monkeypatch.setattr(peers, "ours", ours)
    monkeypatch.setattr(peers, "theirs", theirs)
    rows = peers.of_seed(tmp_path, 1, ["grpo", "dpo"])
    found = {(row["variant"], row["step"], row["metric"]): row["value"] for row in rows}
    assert found["rlhf_jax", 10, "right answers of GRPO"] == 0.75
    assert found["TRL 1.16", 10, "right answers of GRPO"] == 1.0
    assert found["rlhf_jax", 0, "held-out accuracy of DPO"] == 0.5
    assert 0.66 < found["rlhf_jax", 10, "right answers of GRPO low"] < 0.67  # of 128, Wilson
    assert asked == [
        ("grpo", {"seed": 1, "steps": 10, "batch": 64}),
        ("dpo", {"seed": 1, "steps": 0, "batch": 16}),
    ]


def test_the_table_has_each_stage_before_and_after():
    outcomes = [
        {
            "SFT": learning.Outcome(7, np.array([1.0, right]), 2.0, loss, {}),
            learning.JUDGE: learning.Outcome(9, None, 0.5, 0.75, {"length": 0.25}),
        }
        for right, loss in ((1.0, 1.0), (0.0, 1.5))
    ]
    rows = learning.table(np.array([[0.0, 0], [1, 0]]), outcomes)
    values = {(row["variant"], row["seed"], row["metric"]): row["value"] for row in rows}
    assert values["SFT", "all", "right answers before"] == 0.25
    assert values["SFT", "all", "right answers after"] == 0.75
    assert values["SFT", "all", "change of right answers"] == 0.5
    assert [values["SFT", seed, "right answers after"] for seed in (0, 1)] == [1, 0.5]
    assert values["SFT", "all", "held-out rows before"] == 2
    assert values["SFT", "all", "held-out rows after"] == 1.25
    assert values[learning.JUDGE, "all", "held-out rows after"] == 0.75
    assert values[learning.JUDGE, "all", "length"] == 0.25
    assert {row["step"] for row in rows if row["variant"] == "SFT"} == {7}


def test_rl_is_paid_by_the_reward_model_of_its_own_seed(tmp_path):
    found = learning.stages(tmp_path, tmp_path / "seed-1", SIZES, 1)
    flags = found["RLOO, reward model"].flags
    assert flags[flags.index("--reward") + 1] == str(tmp_path / "seed-1" / "reward_model")
    assert flags[flags.index("--seed") + 1] == "1"
    assert list(found).index(learning.JUDGE) < list(found).index("RLOO, reward model")


def test_the_seconds_are_those_of_all_stages(tmp_path):
    for name, rows in {"sft": [1.5, 2.0], "dpo": [0.25]}.items():
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": 7, "timing/step": value}) for value in rows]
        (tmp_path / name / "timing.jsonl").write_text("\n".join(lines), "utf-8")
    assert learning.seconds_of(tmp_path) == 3.75
