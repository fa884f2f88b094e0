"""experiments/rounds.py: who says what about a pair, and two small rounds with real models."""

import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import rounds
from builders import json_lines

from rlhf_jax import metrics
from rlhf_jax.config import RunConfig, parse
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError


@pytest.fixture
def by_length(monkeypatch):
    """A rubric that likes long texts."""
    monkeypatch.setattr(rounds.rubric, "score", lambda row, text: float(len(text)))


def test_annotators_are_wrong_in_a_fifth_of_the_pairs_whatever_the_order(by_length):
    said = [
        [rounds.say(both, Row(f"prompt {i}", (), "")) for both in (["long", "no"], ["no", "long"])]
        for i in range(500)
    ]
    assert {tuple(both) for both in said} == {(0, 1), (1, 0)}
    assert 0.75 < np.mean([first == 0 for first, _ in said]) < 0.85
    assert rounds.say(["abc", "xyz"], Row("prompt", (), "")) is None


def test_useful_pairs_become_rows_once(by_length, tmp_path, monkeypatch):
    texts = ["a", "bb", "same", "same", "ccc", "d", "", "e"]
    model = SimpleNamespace(ask=lambda rows, num: None, sample=lambda *_: (texts, None))
    monkeypatch.setattr(rounds.asking, "open_policy", lambda *_: model)
    monkeypatch.setattr(rounds.asking, "as_given", lambda row, _: row.prompt)
    monkeypatch.setattr(rounds, "WRONG", 0.0)
    model.tokenizer = None
    prompts = [Row(f"prompt {i}", (), "") for i in range(4)]
    for _ in range(2):
        rounds.compare(tmp_path / "prefs", tmp_path, prompts, [], 2, seed=0)
    expected = [("prompt 0", "bb", "a"), ("prompt 2", "ccc", "d")]
    assert [(*row.values(),) for row in json_lines(tmp_path / "prefs")] == expected
    texts[:] = ["same"] * 8
    with pytest.raises(UserError, match="nothing to compare"):
        rounds.compare(tmp_path / "other", tmp_path, prompts, [], 2, seed=0)


def test_a_policy_is_measured_by_prompt_with_ties_half(tmp_path, monkeypatch):
    """Four answers to each of three prompts; a prompt is a row of the intervals."""
    said = {"new": [[1.0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]], "first": [[0.0] * 4] * 3}
    monkeypatch.setattr(
        rounds, "answer", lambda folder, file, seed: (None, folder.name, None, None)
    )
    monkeypatch.setattr(rounds, "gold", lambda rows, texts: np.array(said[rows]))
    found = rounds.measure(tmp_path / "new", tmp_path / "first", tmp_path, seed=0)
    means = np.array([0.5, 1.0, 0.25])
    wins = np.array([0.75, 1.0, 0.625])
    edges = zip(("", " low", " high"), (np.mean(means), *metrics.student(means)), strict=True)
    expected = {f"gold score{edge}": value for edge, value in edges}
    won = (np.mean(wins), *metrics.share_interval(wins))
    for edge, value in zip(("", " low", " high"), won, strict=True):
        expected[f"win rate against the first policy{edge}"] = value
    assert found == pytest.approx(expected)


@pytest.mark.slow
def test_two_rounds_go_on_where_they_were_stopped(by_length, tmp_path, monkeypatch):
    base = parse(RunConfig, ["--config", "tiny"], prog="rounds")
    base = replace(base, rl=replace(base.rl, batch_size=4, max_new_tokens=4))
    base = replace(base, reward_model=replace(base.reward_model, batch_size=4, normalize_samples=4))
    monkeypatch.setattr(rounds, "parse", lambda *_, **__: base)
    sizes = {"sft_data.json": 64, "prompts.json": 40, "heldout_prompts.json": 4}
    monkeypatch.setattr(rounds.demo, "write", functools.partial(rounds.demo.write, sizes=sizes))
    monkeypatch.setitem(rounds.VARIANTS, "two", (2, "disagreement"))
    small = rounds.Sizes(labels=24, iterations=2, pool=2, members=2, epochs=1)
    learn = rounds.training.rl.run
    with monkeypatch.context() as patch:
        patch.setattr(rounds.training.rl, "run", lambda *_: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            rounds.rows_of(tmp_path, "two", 0, small)
    before = (tmp_path / "two" / "round-1" / "prefs.jsonl").read_bytes()
    assert rounds.training.rl.run is learn
    rows = rounds.rows_of(tmp_path, "two", 0, small)
    assert (tmp_path / "two" / "round-1" / "prefs.jsonl").read_bytes() == before
    assert rows == rounds.rows_of(tmp_path, "two", 0, small)
    values = {(row["step"], row["metric"]): row["value"] for row in rows}
    assert {step for step, _ in values} == {0, 1, 2}
    assert values[0, "win rate against the first policy"] == 0.5
    assert (2, "reward model accuracy on the policy's own pairs") in values
    second = tmp_path / "two" / "round-2"
    manifest = json.loads((second / "reward_model" / "manifest.json").read_text())
    both = {str(tmp_path / "two" / f"round-{i}" / "prefs.jsonl") for i in (1, 2)}
    assert both <= manifest["data"].keys()
    before = tmp_path / "two" / "round-1" / "rl" / "model"
    assert f"model: {before}\n" in (second / "rl" / "config.yaml").read_text()
