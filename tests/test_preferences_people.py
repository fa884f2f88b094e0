"""The experiment on people's own pairs: its parts, commands and judge."""

import json

import numpy as np
import preferences
import preferences_people as people
import pytest

from rlhf_jax.config import RunConfig, parse

SIZES = people.FULL._replace(held_out=2, prompts=1, words=12)


def dialogue(question, chosen="Yes", rejected="No"):
    context = f"\n\nHuman: {question}\n\nAssistant: Well?\n\nHuman: So?\n\nAssistant:"
    return {"chosen": f"{context} {chosen}", "rejected": f"{context} {rejected}"}


def test_a_question_stands_on_one_side():
    dialogues = [dialogue(f"Q{number // 2}", f"Yes{number}") for number in range(20)]
    bad = [
        dialogue("long", "a " * 12),
        dialogue("empty", rejected=""),
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
    ]
    parts = people.parted(dialogues + bad, SIZES)
    assert {name: len(rows) for name, rows in parts.items()} == {
        "held_out": 2,
        "first": 10,
        "second": 8,
    }
    questions = [{people.question(row) for row in rows} for rows in parts.values()]
    assert set.union(*questions) == {f"Q{number}" for number in range(10)}
    assert sum(map(len, questions)) == 10


def test_each_command_reads_its_own_part(tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(json.dumps(dialogue(f"Q{number}")) for number in range(6)))
    people.write_data(file, tmp_path, SIZES)
    configs = {
        name: parse(RunConfig, words[1:])
        for name, words in people.commands(tmp_path, 3, SIZES).items()
    }
    read = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in people.HALVES}
    for half in people.HALVES:
        assert configs[half].data == (str(tmp_path / f"{half}.json"),)
        assert configs[half].reward_model.validation_data == (str(tmp_path / "held_out.json"),)
    ppo = configs["ppo"]
    assert ppo.reward == (configs["first"].output_dir,)
    prompts = {
        name: [row["prompt"] for row in json.loads((tmp_path / f"prompts_{name}.json").read_text())]
        for name in ("first", "held_out")
    }
    assert set(prompts["first"]) == {people.question(row) for row in read["first"]}
    assert len(prompts["held_out"]) == SIZES.prompts
    assert not set(prompts["held_out"]) & {
        people.question(row) for rows in read.values() for row in rows
    }
    assert ppo.data == (str(tmp_path / "prompts_first.json"),)
    assert ppo.rl.validation_data == (str(tmp_path / "prompts_held_out.json"),)


class Lengths:
    """A judge that likes long answers."""

    def score_texts(self, conversations, responses):
        assert all(one[0]["role"] == "user" for one in conversations)
        return np.array([float(len(text)) for text in responses])


def test_the_judge_compares_answers_to_the_same_question(tmp_path):
    said = {0: {"a": "xx", "b": "x", "c": "x"}, 5: {"c": "x", "b": "xxx", "a": "x"}}
    samples = [
        {"step": step, "prompt": prompt, "response": text, "score": float(step)}
        for step, answers in said.items()
        for prompt, text in answers.items()
    ]
    metrics = [{"step": 0}, {"step": 5, "objective/kl": 0.5}]
    for name, rows in (("samples", samples), ("metrics", metrics)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = people.judged(tmp_path, Lengths())
    assert found[0]["judge"] == pytest.approx(4 / 3)
    assert (found[0]["win rate"], found[0]["judge's change"], found[0]["KL"]) == (0.5, 0, 0)
    assert found[5]["judge"] == pytest.approx(5 / 3)
    assert found[5]["judge's change"] == pytest.approx(1 / 3)  # -1, 2 and 0
    assert found[5]["win rate"] == 0.5  # one better, one worse, one tie
    assert (found[5]["score"], found[5]["KL"]) == (5, 0.5)


def test_the_table_has_both_reward_models_and_ppo(tmp_path, monkeypatch):
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(json.dumps(dialogue(f"Q{number}")) for number in range(6)))

    def finish(run, words):
        run.mkdir(parents=True, exist_ok=True)
        right = {"validation/accuracy": 0.5, "validation/length_accuracy": 1.0}
        (run / "metrics.jsonl").write_text(json.dumps({"step": 7, **right}))

    monkeypatch.setattr(preferences, "finish", finish)
    monkeypatch.setattr(people.smollm2, "write_model", lambda folder: None)
    monkeypatch.setattr(people.LanguageModel, "load", lambda folder, **how: folder)
    runs = tmp_path / "runs" / "seed-0"

    def judged(run, judge):
        assert (run, judge) == (runs / "ppo", runs / "second" / "model")
        return {20: {"judge": 1.5}}

    monkeypatch.setattr(people, "judged", judged)
    out = tmp_path / "out.json"
    people.main(file, tmp_path / "runs", out, sizes=SIZES)
    rows = json.loads(out.read_text())["rows"]
    found = {(row["variant"], row["metric"]): row["value"] for row in rows}
    for half in people.HALVES:
        name = f"reward model of the {half} half"
        assert (found[name, "accuracy"], found[name, "length_accuracy"]) == (0.5, 1)
        assert found[name, "accuracy low"] == pytest.approx(0.0945, abs=1e-4)  # Wilson, 1 of 2
    assert found["PPO", "judge"] == 1.5
