"""Generated word problems, the reward that checks their answers, and policies that learn to solve
them.
"""

import collections
import json
import os
import re
from pathlib import Path

import arithmetic
import pytest
from builders import ROOT, metric_rows, run_script

from rlhf_jax.data import formats
from rlhf_jax.errors import UserError

DATA = os.environ.get("RLHF_JAX_DATA")


# The generator


def test_answers_are_right_by_the_words_of_the_problem(tmp_path):
    arithmetic.write(tmp_path, seed=1, num_prompts=600)
    problems = formats.read("prompts", tmp_path / "prompts.json").rows
    kinds = collections.Counter()
    answers = collections.Counter()
    for row in problems:
        first, second = map(int, re.findall("[0-9]+", row.prompt))
        more, less = (bool(re.search(rf"\b{word}\b", row.prompt)) for word in ("more", "away"))
        answer = first + second if more else first - second
        assert more != less
        assert row.columns == {"answer": answer}
        assert 1 <= answer <= 10
        assert first >= 2  # the noun after it is in the plural
        kinds[more] += 1
        answers[answer] += 1
    assert kinds[True] == kinds[False] == 300
    assert answers.most_common(1)[0][1] < 0.2 * 600  # no guess is much better than another
    assert len({row.prompt for row in problems}) == 600  # so that what is held out is new


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        arithmetic.write(tmp_path / name, seed, num_prompts=50)
    a, b, c = ((tmp_path / name / "prompts.json").read_bytes() for name in "abc")
    assert a == b != c


def test_every_problem_can_be_had_and_no_more(tmp_path):
    number = 2 * 3 * len(arithmetic.NAMES) * len(arithmetic.THINGS)
    assert len(arithmetic.problems(number, 0, 3)) == number  # 2 + 1, 3 - 1 and so on
    with pytest.raises(UserError, match=f"there are {number} problems .* {number + 1} asked for"):
        arithmetic.write(tmp_path, num_prompts=number + 1, largest=3)
    with pytest.raises(UserError, match="largest: expected at least 3, got 2"):
        arithmetic.write(tmp_path, largest=2)


# The reward


WORKED = "He has 2 x 500 = <<2*500=1000>>1000.\n#### 1,000"
RIGHT = [
    *(
        ("42", 42),
        (" 42.", 42),
        ("6 x 7 = 42", "42"),
        ("1000", WORKED),
        ("12,345,678 dollars", 12345678),
    ),
    *(("$42.00", 42), ("0.50", "1/2 is .5"), ("5-3", 3), ("007", 7), ("0", 0)),
]
WRONG = [
    *(
        ("42 it is, not 43", 42),
        ("4,2", 42),
        ("4 2", 42),
        ("5", ".5"),
        ("3", -3),
        ("٤٢", 42),
        ("", 0),
    ),
    ("9" * 400, "9" * 399 + "8"),
]


def test_the_last_number_is_compared():
    for pairs, score in ((RIGHT, 1.0), (WRONG, 0.0), ([("42", "no number")], None)):
        responses, answers = zip(*pairs, strict=True)
        assert arithmetic.correct(["?"], responses, answer=answers) == [score] * len(pairs)


@pytest.mark.skipif(DATA is None, reason="RLHF_JAX_DATA names no folder of public data files")
def test_gold_solutions_are_right_and_those_of_the_next_question_mostly_not():
    lines = Path(DATA, "gsm8k", "test_first660.jsonl").read_text("utf-8").splitlines()
    gold = [json.loads(line)["answer"] for line in lines]
    assert arithmetic.correct(gold, gold, answer=gold) == [1.0] * 660
    assert sum(arithmetic.correct(gold, gold, answer=gold[1:] + gold[:1])) < 0.05 * 660


def test_a_number_is_digits_alone():
    responses = ["7", " 12 ", "-3", "7.5", "seven", "", "1 2", "7.", "٤٢"]
    assert arithmetic.is_number(["?"] * 9, responses) == [
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ]


# The policies


@pytest.mark.parametrize(
    ("script", "iterations", "correct", "seed"),
    [
        pytest.param("grpo", 100, 0.05, 0, marks=pytest.mark.soak),
        *(pytest.param("grpo", 1000, 0.9, seed, marks=pytest.mark.soak) for seed in range(3)),
        *(pytest.param("rloo", 1000, 0.9, seed, marks=pytest.mark.soak) for seed in range(3)),
    ],
)
def test_a_policy_learns_to_answer_with_numbers_and_then_with_the_right_ones(
    script, iterations, correct, seed, tmp_path
):
    run_script("arithmetic", tmp_path / "problems")
    given = ("--data", tmp_path / "problems", "--output-dir", tmp_path / "run", "--seed", seed)
    config = ROOT / "configs" / "arithmetic.yaml"
    run_script(script, "--config", config, *given, "--rl.num-iterations", iterations)
    first, *_, last = (row for row in metric_rows(tmp_path / "run") if "validation/score" in row)
    assert first["validation/reward/is_number"] < 0.1
    assert first["validation/reward/correct"] < 0.05
    assert last["step"] == iterations
    assert last["validation/reward/is_number"] > 0.9
    assert last["validation/reward/correct"] > correct
