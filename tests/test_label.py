"""rlhf-jax label: blind order, what is written, going on, undoing.

tests/fifteen_minutes.py trains on the rows.
"""

import io
import json
import re
import shutil
import sys

import asked_runs
import jax
import numpy as np
import pytest
from builders import json_lines

from rlhf_jax import cli, sampling
from rlhf_jax.data import formats
from rlhf_jax.errors import UserError
from rlhf_jax.generation.generator import Generator, LanguageModel
from rlhf_jax.inference import label
from rlhf_jax.inference.chat import Console
from rlhf_jax.inference.labelling import pairs, settings, summary

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
        given = label.Config(**files, **config)
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
    expected = [
        {"prompt": prompt, "chosen": max(pair), "rejected": min(pair)}
        for prompt, pair in zip(PROMPTS, answers, strict=True)
    ]
    assert rows == expected
    order = [f"a: {pair[0]}\n" in text for text, pair in zip(shown, answers, strict=False)]
    assert 3 <= sum(order) <= 9  # which of the two samples comes first is drawn
    assert ask(later, name="again.jsonl", batch_size=5)[0] == shown
    assert ask(later, name="seed.jsonl", seed=1)[0] != shown
    num_first = sum(
        (f"a: {max(pair)}\n" in text) for text, pair in zip(shown, answers, strict=False)
    )
    assert summary.splitlines()[:2] == [
        "12 of 12 pairs: 12 preferences, 0 ties, 0 skipped, 0 with equal or empty answers",
        f"the answer shown first was chosen {num_first} times of 12",
    ]


def test_some_pairs_are_asked_again_in_the_other_order(ask, tmp_path):
    shown, _, summary = ask(later, again=0.25)
    assert len(shown) == NUM_PAIRS + 3
    assert "asked again, you said the same 3 times of 3" in summary
    for text in shown[NUM_PAIRS:]:
        assert text.startswith("\n[once more] say ")
        a, b = both(text)
        assert any(f"\na: {b}\n\nb: {a}\n" in first for first in shown[:NUM_PAIRS])
    assert len(json_lines(tmp_path / "out.jsonl")) == NUM_PAIRS
    _, _, summary = ask(lambda a, b: "a", name="first.jsonl")
    assert "chosen 12 times of 12" in summary
    assert "asked again, you said the same 0 times of 1" in summary


def test_ties_skips_undo_and_going_on(ask, tmp_path):
    out = tmp_path / "out.jsonl"
    shown, _, summary = ask(["a", "T", "b", "skip", "u", "undo", "tie", "q"])
    assert letters(shown) == "abcdedcd"
    rows = json_lines(out)
    assert ["chosen" in row for row in rows] == [True, False, False]
    assert rows[1] == rows[1] | {"prompt": "say b", "ranks": [0, 0]}
    assert rows[2] == rows[2] | {"prompt": "say c", "ranks": [0, 0]}
    assert summary.startswith("3 of 12 pairs: 1 preferences, 2 ties, 0 skipped")
    read = formats.read("pairs", out)
    assert len(read.rows) == 1
    assert read.dropped == {"all responses are ranked equal": 2}
    shown, _, summary = ask(["s", "a"])
    assert letters(shown) == "def"
    assert summary.startswith("5 of 12 pairs: 2 preferences, 2 ties, 1 skipped")
    assert json_lines(out)[:3] == rows
    _, _, whole = ask(later)
    assert whole.startswith("12 of 12 pairs: 9 preferences")
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
    assert summary.startswith(
        "6 of 6 pairs: 0 preferences, 0 ties, 0 skipped, 6 with equal or empty"
    )
    assert f"{runs}/policy was preferred 0 times of 0" in summary
    session = json.loads((tmp_path / "out.jsonl.session.json").read_text())
    assert [given["answers"] for given in session["judgements"]] == [[text, text] for text in texts]


def test_the_summary_counts_whose_answer_was_preferred(runs, ask, tmp_path):
    flags = {"temperature": 0.5, "count": 6}  # as above
    _, _, summary = ask(["a"] * 9, against=str(runs / "other"), **flags)
    session = json.loads((tmp_path / "out.jsonl.session.json").read_text())
    of_run = [given["order"][0] == 0 for given in session["judgements"] if given["choice"] == "a"]
    won = sum(of_run[:6])
    assert 0 < won < 6
    assert f"{runs}/policy was preferred {won} times of 6" in summary


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
            label.Config(prompts=("a",), out="b", **config)


def test_a_judgement_survives_a_kill_between_the_files(ask, tmp_path, monkeypatch):
    write = label.write_atomically

    def killed(path, content):
        if path.name == "out.jsonl" and content:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(label, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        ask(later)
    monkeypatch.setattr(label, "write_atomically", write)
    ask(["q"])
    assert len(json_lines(tmp_path / "out.jsonl")) == 1


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
    session = json.loads((tmp_path / "terminal.jsonl.session.json").read_text())
    answers = [given["answers"] for given in session["judgements"][:NUM_PAIRS]]
    files = {"prompts": (str(runs / "prompts.txt"),), "out": str(tmp_path / "out.jsonl")}
    how = {**files, "serve": True, "annotators": ("ana",)}
    source = pairs.open_source(str(runs / "policy"), settings.Config(**how))
    assert [source.pair(i).answers for i in range(NUM_PAIRS)] == answers
    assert source.num_pairs == source.settings["count"] == NUM_PAIRS
    how |= {"count": 6, "choose": "close", "reward": (str(runs / "reward"),), "random_share": 0.0}
    config = settings.Config(**how)
    source = pairs.open_source(str(runs / "policy"), config)
    assert (source.num_pairs, source.settings["count"]) == (NUM_PAIRS, 6)
    chosen = pairs.choose([source.pair(i) for i in range(NUM_PAIRS)], config)
    judge = LanguageModel.load(runs / "reward" / "model")
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    first, second = (judge.score_texts(asked, column) for column in zip(*answers, strict=True))
    closest = np.argsort(abs(first - second))[:6]
    assert {pair.prompt for pair in chosen} == {PROMPTS[i] for i in closest}
    with pytest.raises(UserError, match="has no score head"):
        pairs.choose([source.pair(0)], settings.Config(**how | {"reward": (str(runs / "policy"),)}))
    with pytest.raises(UserError, match="name the folder of a run"):
        pairs.open_source(None, config)


def test_the_summary_of_a_terminals_session(ask, tmp_path):
    ask(later, again=0.25)
    text = summary.text(summary.read(tmp_path / "out.jsonl")).splitlines()
    assert text[0] == "judgements: 12 of 12 pairs"
    assert text[1] == "an annotator prefers the same answer again: 3 of 3"
    assert text[2] == "best accuracy of a reward model on such judgements: 1.00 to 1.00"
    assert text[3].startswith("you: judgements 12, ties, both bad 0, skipped 0")
