"""rlhf-jax label: blind order, what is written, going on, undoing.

tests/fifteen_minutes.py trains on the rows.
"""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import sys
import time

import asked_runs
import jax
import numpy as np
import pytest
from builders import json_lines

from rlhf_jax import cli, metrics, sampling
from rlhf_jax.data import formats
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import Generator, LanguageModel
from rlhf_jax.inference import label
from rlhf_jax.inference.chat import Console
from rlhf_jax.inference.labelling import pairs, store
from rlhf_jax.inference.labelling.settings import Config

NUM_PAIRS = 12
PROMPTS = [f"say {letter}" for letter in "abcdefzhijkl"]


build_once = asked_runs.build_once


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = asked_runs.write(tmp_path_factory.mktemp("runs"))
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    model, params, tokenizer = LanguageModel.load(root / "policy" / "model")
    how = sampling.SamplingConfig(6, eos_id=1, pad_id=0)
    reversed_params = jax.tree.map(lambda leaf: -np.asarray(leaf), params)
    other = LanguageModel(model, reversed_params, tokenizer)
    other.save(root / "other" / "model", template="{prompt}:", config=how)
    shutil.copy(root / "policy" / "config.yaml", root / "other")  # which samples alike
    return root


@pytest.fixture(scope="module")
def answers(runs):
    """Two answers to each prompt."""
    policy = Generator(
        runs / "policy" / "model", max_new_tokens=6, temperature=0.7, top_k=9, template="{prompt}:"
    )
    texts = policy(PROMPTS, num_samples=2).texts
    return [texts[2 * i : 2 * i + 2] for i in range(NUM_PAIRS)]


@pytest.fixture
def ask(runs, tmp_path):
    """Judges pairs: ``judge`` is the typed lines, or a function of the two answers as shown."""

    def ask(judge, *, is_terminal=False, name="out.jsonl", **config):
        shown = []
        notes = []

        def lines():
            for line in judge if isinstance(judge, list) else iter(int, 1):
                yield judge(*both(shown[-1])) if callable(judge) else line

        files = {"prompts": (str(runs / "prompts.txt"),), "out": str(tmp_path / name)}
        given = Config(**files, **config)
        console = Console(shown.append, notes.append, is_terminal)
        summary = label.run(str(runs / "policy"), given, lines(), console)
        return shown, notes, summary

    return ask


def both(text):
    """The two answers as shown."""
    return re.search(r"\na: (.*?)\n\nb: (.*?)\n\n", text, re.DOTALL).groups()


def letters(shown):
    """The letters of the prompts ``say LETTER`` that were asked."""
    return "".join(re.search("say (.)", text)[1] for text in shown)


def later(a, b):
    return "a" if a > b else "b"


@pytest.mark.slow
def test_the_rows_say_which_answer_was_chosen(ask, answers, tmp_path):
    shown, _, summary = ask(later)
    rows = json_lines(tmp_path / "out.jsonl")
    for row, prompt, pair in zip(rows, PROMPTS, answers, strict=True):
        assert row["seconds"] < 60
        assert row == row | {"prompt": prompt, "chosen": max(pair), "rejected": min(pair)}
        assert (row["annotator"], row["chosen_by"]) == ("you", "random")
    order = [f"a: {pair[0]}\n" in text for text, pair in zip(shown, answers, strict=False)]
    assert 3 <= sum(order) <= 9  # which of the two samples comes first is drawn
    assert ask(later, name="again.jsonl", batch_size=5)[0] == shown
    assert ask(later, name="seed.jsonl", seed=1)[0] != shown
    num_first = sum(
        (f"a: {max(pair)}\n" in text) for text, pair in zip(shown, answers, strict=False)
    )
    said = summary.splitlines()
    assert said[0] == "judgements: 12 of 12 pairs"
    assert f"skipped 0, first shown chosen {num_first} of 12, longer" in summary
    assert said[-1] == f"{tmp_path}/out.jsonl: 12 rows for reward-model, dpo and kto"


def test_some_pairs_are_asked_again_in_the_other_order(ask, tmp_path):
    shown, _, summary = ask(later, again=0.25)
    assert len(shown) == NUM_PAIRS + 3
    assert "an annotator prefers the same answer again: 3 of 3" in summary
    for text in shown[NUM_PAIRS:]:
        assert text.startswith("\n[once more] say ")
        a, b = both(text)
        assert any(f"\na: {b}\n\nb: {a}\n" in first for first in shown[:NUM_PAIRS])
    assert len(json_lines(tmp_path / "out.jsonl")) == NUM_PAIRS
    _, _, summary = ask(lambda a, b: "a", name="first.jsonl")
    assert "first shown chosen 12 of 12" in summary
    assert "an annotator prefers the same answer again: 0 of 1" in summary


def test_ties_skips_undo_and_going_on(ask, tmp_path):
    out = tmp_path / "out.jsonl"
    shown, _, summary = ask(["a", "T", "b", "skip", "u", "undo", "tie", "q"])
    assert letters(shown) == "abcdedcd"
    rows = json_lines(out)
    assert ["chosen" in row for row in rows] == [True, False, False]
    assert rows[1] == rows[1] | {"prompt": "say b", "ranks": [0, 0]}
    assert rows[2] == rows[2] | {"prompt": "say c", "ranks": [0, 0]}
    assert "you: judgements 3, ties, both bad 2, skipped 0," in summary
    read = formats.read("pairs", out)
    assert len(read.rows) == 1
    assert read.dropped == {"all responses are ranked equal": 2}
    shown, _, summary = ask(["s", "a"])
    assert letters(shown) == "def"
    assert "you: judgements 4, ties, both bad 2, skipped 1," in summary
    assert "4 of 11 judgements that are needed; 0 pairs with equal" in summary
    assert json_lines(out)[:3] == rows
    _, _, whole = ask(later)
    assert "you: judgements 11, ties, both bad 2, skipped 1," in whole
    assert ask(later)[2] == whole
    _, notes, _ = ask(["u", "what", "undone", "a"], name="none.jsonl", is_terminal=True)
    assert notes == ["nothing to undo", label.QUESTION, label.QUESTION]
    with pytest.raises(UserError, match="'what' is none of a, b"):
        ask(["what"], name="wrong.jsonl")


def test_another_run_gives_the_second_answer(runs, ask, tmp_path):
    other = runs / "policy" / "model"
    shown, _, summary = ask(
        later,
        against=str(other),
        temperature=0.5,
        count=6,
    )
    how = {"max_new_tokens": 6, "temperature": 0.5, "top_k": 9, "template": "{prompt}:"}
    texts = Generator(other, **how)(PROMPTS[:6]).texts
    assert len(shown) == 0  # the same model says the same to the same seed: nothing to choose
    assert f"{runs}/policy was preferred 0 times of 0" in summary
    assert "0 of 0 judgements that are needed; 6 pairs with equal or empty answers" in summary
    config = Config(answers="a", out=str(tmp_path / "out.jsonl"))
    with contextlib.closing(store.Store(tmp_path / "out.jsonl.session.sqlite", config)) as kept:
        assert kept.num_pairs() == 6
        assert kept._db.execute("SELECT answers FROM pairs").fetchall() == [
            (json.dumps([text, text]),) for text in texts
        ]


def test_the_summary_counts_whose_answer_was_preferred(runs, ask, tmp_path):
    flags = {"temperature": 0.5, "count": 6}  # as above
    _, _, summary = ask(["a"] * 9, against=str(runs / "other"), **flags)
    given = store.read(store.file_of(tmp_path / "out.jsonl"))
    of_run = [one.order[0] == 0 for one in given if one.choice == "a"]
    won = sum(of_run[:6])
    assert 0 < won < 6
    low, high = metrics.wilson(won / 6, num=6)
    assert f"{runs}/policy was preferred {won} times of 6, which speaks for {low:.0%} to" in summary
    assert f" to {high:.0%} (95%" in summary


def test_what_was_begun_otherwise_is_refused(ask, tmp_path):
    ask(["a"])
    before = (tmp_path / "out.jsonl").read_bytes()
    for config, said in (
        ({"seed": 1}, "seed 0, .* 1"),
        ({"count": 3}, "count 12, .* 3"),
        ({"temperature": 0.1}, "temperature 0.7"),
        ({"again": 0.5}, r"again 0.1, .* 0.5"),
    ):
        with pytest.raises(UserError, match=said):
            ask(["a"], **config)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    (tmp_path / "mine.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"mine.jsonl: exists already"):
        ask(["a"], name="mine.jsonl")
    for config, said in (
        ({"again": 1.5}, "--again .* got 1.5"),
        ({"count": 0}, "--count .* got 0"),
    ):
        with pytest.raises(UserError, match=said):
            Config(prompts=("a",), out="b", **config)


def test_judgements_survive_a_kill_between_the_files(ask, tmp_path, monkeypatch):
    write = label.write_atomically

    def killed(path, content):
        if path.name == "out.jsonl" and content:
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(label, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(["a", "b", "q"])
    assert json_lines(tmp_path / "out.jsonl") == []
    ask(["q"])
    assert len(json_lines(tmp_path / "out.jsonl")) == 2


def test_a_file_has_the_pairs_of_the_terminal_too_and_the_page_goes_on(tmp_path, monkeypatch):
    """One store: what is begun in the terminal is continued by several people."""
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "p", "responses": ["yes", "no"]}\n' * 3)
    out = tmp_path / "out.jsonl"
    shown = []
    console = Console(shown.append, print, False)
    config = Config(answers=str(file), out=str(out), annotators=("ana",), again=0.0)
    label.run(None, config, iter(["a", "tie"]), console)
    assert shown[0].startswith("\n[1 of 3] p\n\na: ")
    rows = json_lines(out)
    assert [row["annotator"] for row in rows] == ["ana", "ana"]
    assert (rows[0]["chosen"], rows[0]["rejected"]) == both(shown[0])
    later = time.time() + 1000
    monkeypatch.setattr(time, "time", lambda: later)
    label.run(None, config, iter(["b"]), console)
    rows = json_lines(out)
    assert max(row["seconds"] for row in rows) < 60  # not since the pair was shown before
    config = dataclasses.replace(config, serve=True, annotators=("ana,ben",))
    with label.opened(config, lambda: pairs.open_source(None, config)) as (kept, _):
        assert [given.annotator for given in kept.judgements()] == ["ana"] * 3
    with pytest.raises(UserError, match="--annotators lacks ana"):
        label.run(None, Config(answers=str(file), out=str(out), again=0.0), iter([]), console)


def test_the_command_reads_the_choices_from_a_pipe(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\ntie\n"))
    out = tmp_path / "out.jsonl"
    given = [
        "--prompts",
        str(runs / "prompts.txt"),
        "--out",
        str(out),
        "--count",
        "3",
    ]
    cli.run(["label", str(runs / "policy"), *given])
    assert "3 rows for reward-model, dpo and kto" in capsys.readouterr().out
    assert ["chosen" in row for row in json_lines(out)] == [True, True, False]


def test_the_page_shows_what_the_terminal_shows(runs, ask, tmp_path):
    """The run's answers; and of all of them those on which reward models disagree."""
    ask(later, name="terminal.jsonl")
    judged = store.read(store.file_of(tmp_path / "terminal.jsonl"))
    answers = [given.answers for given in judged[:NUM_PAIRS]]
    files = {"prompts": (str(runs / "prompts.txt"),), "out": str(tmp_path / "out.jsonl")}
    how = {**files, "serve": True, "annotators": ("ana",)}
    source = pairs.open_source(str(runs / "policy"), Config(**how))
    assert [one.answers for batch in source.batches(0) for one in batch] == answers
    assert source.num_pairs == source.settings["count"] == NUM_PAIRS
    how |= {"count": 6, "choose": "close", "reward": (str(runs / "reward"),), "random_share": 0.0}
    config = Config(**how)
    source = pairs.open_source(str(runs / "policy"), config)
    assert source.num_pairs == source.settings["count"] == 6
    *waiting, chosen = source.batches(0)
    assert waiting == [[]] * NUM_PAIRS
    assert [pair.number for pair in chosen] == [*range(6)]
    assert [*source.batches(6)] == []
    judge = LanguageModel.load(runs / "reward" / "model")
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    first, second = (judge.score_texts(asked, column) for column in zip(*answers, strict=True))
    closest = np.argsort(abs(first - second))[:6]
    assert {pair.prompt for pair in chosen} == {PROMPTS[i] for i in closest}
    policy = [str(runs / "policy")]
    with pytest.raises(UserError, match="has no score head"):
        pairs.choose(chosen, "close", policy, count=1, random_share=0, seed=0)
    with pytest.raises(UserError, match="name the folder of a run"):
        pairs.open_source(None, config)
