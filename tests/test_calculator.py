"""A calculator as an environment: what it replies and pays, and a policy that learns to call it."""

import json

import calculator
import pytest
from builders import ROOT, metric_rows, run_script, soak

from rlhf_jax.errors import UserError

ROW = {"a": 47, "b": 36}


@pytest.mark.parametrize(
    ("said", "reply", "reward"),
    [
        ("[47+36]", "83", 1.0),
        ("[47+63]", "110", 5 / 7),  # another sum than the one that was asked for
        ("[47+36", None, 6 / 7),
        ("47+36", None, 0.0),  # each character is in the wrong place
        ("[47+36]]", None, 7 / 8),
        ("83", None, 0.0),
        ("", None, 0.0),
        ("[4٧+36]", None, 6 / 7),
    ],
)
def test_replies_and_rewards(said, reply, reward):
    turns = [{"role": "user", "content": "[+] 47+36="}, {"role": "assistant", "content": said}]
    assert calculator.calculator(turns, ROW) == (reply, pytest.approx(reward))
    after = [*turns, {"role": "user", "content": "83"}, {"role": "assistant", "content": said}]
    right = {"83": 1.0, "47+36": 0.0, "": 0.0}.get(said, 0.0)
    assert calculator.calculator(after, ROW) == (None, right)


def test_what_counts_as_correct():
    responses = ["[47+36]83", "83", "[47+36]83 ", "[47+36][47+36]83", "[9+9]83", "x83", "838", ""]
    given = calculator.correct(["?"] * 8, responses, a=[47] * 8, b=[36] * 8)
    assert given == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]


def test_the_data(tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        calculator.write(tmp_path / name, seed=seed, num_prompts=300)
    one, same, other = (
        (tmp_path / name / "prompts.json").read_text("utf-8") for name in ("one", "same", "other")
    )
    assert one == same != other
    data = json.loads(one)
    assert len({row["prompt"] for row in data}) == 300
    assert all(
        row["prompt"] == f"[+] {row['a']}+{row['b']}=" and min(row["a"], row["b"]) >= 10
        for row in data
    )
    with pytest.raises(UserError, match="there are 8100 sums, 8101 asked for"):
        calculator.write(tmp_path, num_prompts=8101)


@pytest.mark.parametrize(
    ("iterations", "reward", "correct"),
    [
        soak(80, 0.25, 0.0),
        soak(600, 1.9, 0.9),
    ],
)
def test_a_policy_learns_to_call_it_and_then_to_answer(iterations, reward, correct, tmp_path):
    """First the characters of a call, which pay one by one, then whole calls, then the answer."""
    run_script("calculator", tmp_path / "sums")
    given = (
        "--data",
        tmp_path / "sums",
        "--output-dir",
        tmp_path / "run",
        "--rl.num-iterations",
        iterations,
    )
    run_script("grpo", "--config", ROOT / "configs" / "calculator.yaml", *given, "--seed", 1)
    first, *_, last = (row for row in metric_rows(tmp_path / "run") if "validation/score" in row)
    assert first["validation/environment/turns"] < 1.05  # no call
    assert first["validation/environment/reward"] < 0.1
    assert last["validation/environment/reward"] > reward
    assert last["validation/reward/correct"] >= correct
