"""The experiment of preferences on a chat model: its tastes, labels, commands and measures."""

import json
import random
from pathlib import Path

import numpy as np
import preferences
import pytest
import tastes
import tyro

from rlhf_jax.cli.stages import STAGES
from rlhf_jax.config import RunConfig, parse

ASKED = "Should I try green tea?"
SIZES = preferences.Sizes(held_out=2)


def test_instructions_are_a_thousand_and_no_subject_is_on_both_sides():
    train, held_out = preferences.instructions()
    assert (len({*train}), len({*held_out}), len({*train, *held_out})) == (800, 200, 1000)
    subjects = {text.rsplit(" about ")[-1] for text in held_out if text.startswith("Tell me about")}
    assert len(subjects) == preferences.HELD_OUT
    assert not [text for text in train for subject in subjects if subject[:-1] in text]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Yes, it is mild.", 1.0),
        ("Yes. It is mild. Buy it.", 0.75),  # three sentences
        ("You should try green tea.", 0.75),  # the question again
        ("Yes, it is mild", 0.5),  # no end
        ("I try green tea and I", 0.25),
    ],
)
def test_a_brief_answer_ends_is_short_and_does_not_repeat_the_question(text, score):
    assert tastes.brief(responses=[text], asked=[ASKED]) == [score]


def test_labels_are_wrong_as_often_as_the_labeller_says():
    """Of differences of 1 and 3 a fifth is wrong at the temperature t with
    1 / (1 + e^(1 / t)) + 1 / (1 + e^(3 / t)) = .4.
    """
    one = [preferences.Comparison("", ("a", "b"), (0.0, gap)) for gap in (1.0, 3.0)]
    temperature = preferences.temperature(one)
    wrong = [1 / (1 + np.exp(gap / temperature)) for gap in (1.0, 3.0)]
    assert np.mean(wrong) == pytest.approx(0.2)
    found = preferences.label(one * 4000, temperature, random.Random(0))
    assert 1 - np.mean(found) == pytest.approx(0.2, abs=0.015)  # number 1 is better
    assert one[0].pair(1) == {"prompt": "", "chosen": "b", "rejected": "a"}


def test_pairs_of_an_instruction_are_first_of_different_answers():
    """Of four answers, two of which score alike, five pairs: 0-1 and 2-3 come first."""
    answers = {ASKED: ["Yes.", "Yes", "No.", "I do not"]}
    scores = preferences.gold("brief", [ASKED] * 4, answers[ASKED])
    assert scores.tolist() == [1.0, 0.5, 1.0, 0.5]
    found = preferences.comparisons(answers, "brief", random.Random(0))
    assert len(found) == 4  # without 0-2 and 1-3
    assert {one.answers for one in found[:2]} == {("Yes.", "Yes"), ("No.", "I do not")}
    assert all(one.answers[one.better].endswith(".") for one in found)


def test_the_script_tells_its_flags(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(preferences.main, args=["--help"])
    assert "--curve" in capsys.readouterr().out


def test_commands_are_settings_of_a_run(tmp_path):
    lines = preferences.commands(tmp_path, tmp_path / "kind", "kind", 3, SIZES)
    assert [*lines] == ["reward-model", "ppo", "ppo, KL x 4", "rloo", "dpo"]
    for stage, words in lines.items():
        command = stage.partition(",")[0]
        reads = (*STAGES[command].reads, command.replace("-", "_"))
        settings = parse(RunConfig, words[1:], sections=reads)
        assert (words[0], settings.seed, settings.lora.rank) == (command, 3, 16)
        assert settings.rl.kl_coef == (0.2 if stage.endswith("KL x 4") else None)
        assert settings.output_dir == str(tmp_path / "kind" / stage)
        assert settings.rl.max_new_tokens == (128 if stage == "dpo" else SIZES.new_tokens)
    assert settings.dpo.validation_data == (str(tmp_path / "kind" / "held_out_pairs.json"),)


class Lengths:
    """A reward model that counts letters."""

    def score_texts(self, messages, responses):
        assert [talk[0]["role"] for talk in messages] == ["user"] * len(responses)
        return np.array([float(len(text)) for text in responses])


def test_what_a_judge_says_of_answers():
    """Gold 1, 1, .5 and .5 before; an answer of .75 wins against two of the four."""
    why = "What is the problem with big dogs?"
    before = {ASKED: ["Yes.", "Yes", "No.", "I do not"], why: ["So.", "So.", "So", "So"]}
    judge = preferences.Judge("brief", before, Lengths())
    answers = {ASKED: "Yes. It is. It is.", why: "So."}
    found = judge.numbers(answers, 4.0, judge.scores([*answers], [*answers.values()]))
    assert found["gold"] == pytest.approx((0.75 + 1) / 2)
    assert found["win rate"] == pytest.approx((0.5 + 0.75) / 2)  # two of the second are ties
    assert (found["sqrt(KL)"], found["score"]) == (2.0, (18 + 3) / 2)
    assert found["names the subject"] == 0
    best = preferences.best_of(judge)  # the longest: "I do not", and the first "So."
    assert best[4]["gold"] == pytest.approx((0.5 + 1) / 2)
    assert (best[1]["gold"], best[1]["KL"], best[2]["score"]) == (1, 0, 3.5)
    assert best[4]["KL"] == pytest.approx(np.log(4) - 0.75)


def test_accuracies_stand_at_their_numbers_of_labels(tmp_path, monkeypatch):
    """Of reward models, each in a folder of its own, and of heads alone."""
    seen = []

    def finish(run, words):
        seen.append(run.relative_to(tmp_path))
        run.mkdir(parents=True)
        accuracy = len(preferences.read_json(run.parent / "pairs.json")) / 1000 + (
            "seed-2" in str(run)
        )
        (run / "metrics.jsonl").write_text(json.dumps({"step": 7, "validation/accuracy": accuracy}))

    answers = {text: ["Yes.", "Yes", "No.", "I do not"] for text in preferences.instructions()[0]}
    monkeypatch.setattr(preferences, "prepare", lambda *of: None)
    monkeypatch.setattr(preferences, "first_answers", lambda folder, part: answers)
    monkeypatch.setattr(preferences, "finish", finish)
    monkeypatch.setattr(preferences, "head_alone", lambda *of: of[3] / 2000)
    out = tmp_path / "out.json"
    preferences.main(tmp_path, out, (0, 2), ("brief",), curve=(100, 300), heads=(500,))
    found = json.loads(out.read_text())
    rows = [(row["variant"], row["step"], row["value"]) for row in found["rows"]]
    tried = [("reward model", 100, 0.1), ("reward model", 300, 0.3), ("head alone", 500, 0.25)]
    other = [("reward model", 100, 1.1), ("reward model", 300, 1.3), ("head alone", 500, 0.25)]
    assert rows == [(f"brief: {name}", *of) for name, *of in tried + 2 * other]
    assert [row["seed"] for row in found["rows"]] == [0] * 3 + [2] * 3 + ["all"] * 3
    assert found["command"].endswith("--seeds 0 2 --of brief --curve 100 300 --heads 500")
    of_seed = Path("brief") / "seed-2"
    assert seen[2:] == [of_seed / "labels-100" / "reward-model", of_seed / "reward-model"]


@pytest.mark.parametrize(
    ("text", "named"), [("Greens are good.", 1), ("Try TEAS", 1), ("Grey", 0), ("Yes.", 0)]
)
def test_an_answer_names_its_subject_by_four_letters(text, named):
    """Of green tea "gree" or "tea"."""
    assert preferences.names_subject([ASKED], [text]).tolist() == [named]


def test_the_seconds_are_those_of_the_stages_that_were_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(preferences, "prepare", lambda *of: None)
    monkeypatch.setattr(preferences, "of_seed", lambda *of: [])
    for seed, stage, seconds in (
        (2, "ppo", 1),
        (2, "rloo", 2),
        (3, "ppo", 4),
        (2, "reward-model", 8),
    ):
        run = tmp_path / "brief" / f"seed-{seed}" / stage
        run.mkdir(parents=True)
        (run / "timing.jsonl").write_text(json.dumps({"timing/step": seconds}))
    found = []
    for only in ((), ("ppo",)):
        out = tmp_path / "out.json"
        preferences.main(tmp_path, out, (2,), ("brief",), only=only)
        found.append(json.loads(out.read_text())["seconds"])
    assert found == [11, 9]
