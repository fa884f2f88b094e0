"""Generated word problems, the reward that checks their answers, and policies that learn to solve them."""

import collections
import json
import os
import re
from pathlib import Path

import arithmetic
import pytest
from test_scripts import ROOT, rows, run

from rlhf_jax.data import formats
from rlhf_jax.errors import UserError

DATA = os.environ.get("RLHF_JAX_DATA")
real = pytest.mark.skipif(DATA is None, reason="RLHF_JAX_DATA names no folder of public data files")


# The generator


def test_answers_are_right_by_the_words_of_the_problem(tmp_path):
    arithmetic.write(tmp_path, seed=1, num_prompts=600)
    rows = json.loads((tmp_path / "prompts.json").read_text("utf-8"))
    kinds = collections.Counter()
    for row in rows:
        assert row.keys() == {"prompt", "answer"}
        first, second = map(int, re.findall("[0-9]+", row["prompt"]))
        more = bool(re.search(r"\bmore\b", row["prompt"]))
        less = bool(re.search(r"\baway\b", row["prompt"]))
        assert more != less
        assert row["answer"] == (first + second if more else first - second)
        assert 1 <= row["answer"] <= 10
        assert first >= 2  # the noun after it is in the plural
        kinds[more] += 1
    assert kinds[True] == kinds[False] == 300
    commonest = collections.Counter(row["answer"] for row in rows).most_common(1)[0][1]
    assert commonest < 0.2 * len(rows)  # no guess is much better than another


def test_no_two_problems_are_the_same_so_that_what_is_held_out_is_new(tmp_path):
    arithmetic.write(tmp_path)
    result = formats.read("prompts", tmp_path / "prompts.json")
    assert len({row.prompt for row in result.rows}) == result.kept == 4000
    assert {type(row.columns["answer"]) for row in result.rows} == {int}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        arithmetic.write(tmp_path / name, seed, num_prompts=50)
    a, b, c = ((tmp_path / name / "prompts.json").read_bytes() for name in "abc")
    assert a == b != c


def test_every_problem_can_be_had_and_no_more(tmp_path):
    number = 2 * 3 * len(arithmetic.NAMES) * len(arithmetic.THINGS)
    rows = arithmetic.problems(number, 0, 3)  # 2 + 1, 3 - 1 and so on
    assert len({row["prompt"] for row in rows}) == number
    with pytest.raises(UserError, match=f"there are {number} problems .* {number + 1} asked for"):
        arithmetic.write(tmp_path, num_prompts=number + 1, largest=3)
    with pytest.raises(UserError, match="largest: expected at least 3, got 2"):
        arithmetic.write(tmp_path, largest=2)


# The reward


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("42", 42, 1),
        (" 42.", 42, 1),
        ("6 x 7 = 42", "42", 1),
        ("42 it is, not 43", 42, 0),
        ("It is 1,000.", "#### 1000", 1),
        ("1000", "He has 2 x 500 = <<2*500=1000>>1000.\n#### 1,000", 1),
        ("12,345,678 dollars", 12345678, 1),
        ("4,2", 42, 0),
        ("4 2", 42, 0),
        ("$42.00", 42, 1),
        ("0.50", "1/2 is .5", 1),
        ("5", ".5", 0),
        ("-3", -3, 1),
        ("5-3", 3, 1),
        ("3", -3, 0),
        ("007", 7, 1),
        ("9" * 400, "9" * 400, 1),
        ("9" * 400, "9" * 399 + "8", 0),
        ("forty-two", 42, 0),
        ("٤٢", 42, 0),
        ("", 0, 0),
        ("0", 0, 1),
        ("42", "no number", None),
    ],
)
def test_the_last_number_is_compared(response, answer, score):
    assert arithmetic.correct(["?"], [response], answer=[answer]) == [score]


@pytest.mark.parametrize("source", ["generated", pytest.param("real", marks=real)])
def test_gold_solutions_are_right_and_those_of_the_next_question_mostly_not(source):
    if source == "generated":
        gold = [f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b:,}" for a in range(40) for b in (7, 2000)]
    else:
        lines = Path(DATA, "gsm8k", "test_first660.jsonl").read_text("utf-8").splitlines()
        gold = [json.loads(line)["answer"] for line in lines]
        assert len(gold) == 660
    assert arithmetic.correct(gold, gold, answer=gold) == [1.0] * len(gold)
    shifted = arithmetic.correct(gold, gold, answer=gold[1:] + gold[:1])
    assert sum(shifted) < 0.05 * len(gold)


def test_a_number_is_digits_alone():
    responses = ["7", " 12 ", "-3", "7.5", "seven", "", "1 2", "7.", "٤٢"]
    assert arithmetic.is_number(["?"] * 9, responses) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


# The policies


def validations(script, tmp_path, *flags):
    """The rows of metrics.jsonl with a validation, by step; the problems are written by the script, as a user does."""
    folder = tmp_path / "run"
    run("arithmetic", tmp_path / "problems")
    given = ("--data", tmp_path / "problems", "--output-dir", folder, *flags)
    run(script, "--config", ROOT / "configs" / "arithmetic.yaml", *given)
    return {row["step"]: row for row in rows(folder) if "validation/score" in row}


@pytest.mark.parametrize(
    ("script", "seed", "iterations", "is_number", "correct"),
    [
        pytest.param("grpo", 0, 100, 0.9, 0.05, marks=pytest.mark.slow),
        pytest.param("rloo", 0, 100, 0.9, 0.05, marks=pytest.mark.soak),
        *(
            pytest.param(script, seed, 1000, 0.9, 0.9, marks=pytest.mark.soak)
            for script in ("grpo", "rloo")
            for seed in range(3)
        ),
    ],
)
def test_a_policy_learns_to_answer_with_numbers_and_then_with_the_right_ones(
    script, seed, iterations, is_number, correct, tmp_path
):
    by_step = validations(script, tmp_path, "--rl.num-iterations", iterations, "--seed", seed)
    assert by_step[0]["validation/reward/is_number"] < 0.1
    assert by_step[0]["validation/reward/correct"] < 0.05
    assert by_step[iterations]["validation/reward/is_number"] > is_number
    assert by_step[iterations]["validation/reward/correct"] > correct
