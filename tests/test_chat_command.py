"""rlhf-jax chat: what the model is given, what is shown, and that it is what Generator says."""

import contextlib
import io
import re
import shutil
import sys

import asked_runs
import numpy as np
import pytest
import yaml
from asked_runs import NEW
from safetensors.numpy import load_file, save_file

from rlhf_jax import cli
from rlhf_jax.data import tokenizers
from rlhf_jax.errors import UserError
from rlhf_jax.generation import stops
from rlhf_jax.generation.generator import Generator, LanguageModel
from rlhf_jax.inference import chat

HOW = {"max_new_tokens": NEW, "temperature": 0.7, "top_k": 9, "max_length": 80}


build_once = asked_runs.build_once


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return asked_runs.write(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def policy(runs):
    return Generator(runs / "policy" / "model", **HOW)


@pytest.fixture(scope="module")
def other(runs):
    """A run like the policy's whose model has other weights."""
    shutil.copytree(runs / "policy", runs / "other")
    file = runs / "other" / "model" / "model.safetensors"
    save_file({name: -leaf for name, leaf in load_file(file).items()}, file)
    return runs / "other"


@pytest.fixture
def talk(runs, monkeypatch):
    """Has a conversation; what was shown, and the notes about it. It is started beside the runs."""

    def talk(*lines, folder="policy", is_terminal=False, **config):
        monkeypatch.chdir((runs / folder).parent)
        said = []
        notes = []
        console = chat.Console(said.append, notes.append, is_terminal)
        chat.run(str(runs / folder), chat.Config(**config), lines, console)
        return "".join(said), notes

    return talk


def messages(*texts):
    """The user's and the assistant's in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def streamed(policy, *texts):
    """The policy's next turn, by the programs of chat."""
    [ids] = policy.ask([policy.row(messages(*texts), "", {}, policy.tokenizer)]).ids
    return policy.tokenizer.decode([*policy.stream(ids, 0)])


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["a", "abcdefghijklmno", "k" * 73])
def test_a_stream_is_the_first_sample_token_by_token(policy, prompt):
    for seed in range(4):
        asked = policy.ask([policy.row(prompt, "prompt", {}, policy.tokenizer)])
        _, rollout = policy.sample(asked, seed)
        stream = list(policy.stream(asked.ids[0], seed))
        np.testing.assert_array_equal(stream, rollout.tokens[0, rollout.mask[0]])
        assert (
            "".join(policy.tokenizer.decode_stream(stream)) == policy([prompt], seed=seed).texts[0]
        )


def test_a_stream_that_is_left_early_leaves_nothing_behind(policy):
    stream = policy.stream([5, 6, 7], 0)
    next(stream)
    stream.close()
    assert list(policy.batch.step()) == []


def test_a_character_is_shown_when_all_its_bytes_are_there():
    tokenizer = tokenizers.train_bpe(["a"], 258)
    text = "aß€😀b"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert list(tokenizer.decode_stream(ids)) == list(text)
    broken = [
        *tokenizer.encode("a"),
        ids[3],
        *tokenizer.encode("b"),
        ids[3],
    ]
    assert "".join(tokenizer.decode_stream(broken)) == tokenizer.decode(broken) == "a\ufffdb\ufffd"
    assert list(tokenizer.decode_stream([])) == []


def test_the_whole_conversation_is_rendered_each_turn(talk, policy):
    shown, notes = talk("who", "", "x", "and y")
    first = policy([messages("who")], seed=0).texts[0]
    second = streamed(policy, "who", first, "x")
    third = streamed(policy, "who", first, "x", second, "and y")
    assert policy(["who"]).texts[0] == first
    assert shown == f"{first}\n{second}\n{third}\n"
    assert notes == []
    assert third not in (streamed(policy, "and y"), streamed(policy, "x", second, "and y"))


@pytest.mark.parametrize(
    "pieces", [["ab\n\nHuman: c"], list("ab\n\nHuman: c"), ["ab\n", "\nHu", "man:"]]
)
def test_nothing_of_a_stop_string_is_shown(pieces):
    shown = list(stops.until(pieces, ["Robot", "\n\nHuman:"]))
    assert "".join(shown) == "ab"
    assert "".join(stops.until([*"ab\n\nHum"], ["\n\nHuman:"])) == "ab\n\nHum"
    assert list(stops.until(["a\n", "b"], ["\n\nHuman:"])) == ["a", "\nb"]


def test_a_system_message_stands_first(talk, policy):
    shown, _ = talk("who", system="be kind")
    system = {"role": "system", "content": "be kind"}
    assert shown == policy([[system, *messages("who")]], seed=0).texts[0] + "\n"


def test_an_answer_ends_at_a_stop_string(talk, policy):
    whole = policy([messages("who")], seed=0).texts[0]
    assert talk("who", stop=(whole[2:4],))[0] == whole[: whole.find(whole[2:4])] + "\n"


def test_commands(talk, policy):
    shown, notes = talk(
        "who", "/reset", "/seed 5", "who", "/temperature 0", "/reset", "who", "/help"
    )
    of_seeds = [policy([messages("who")], seed=seed).texts[0] for seed in (0, 5)]
    greedy, _ = talk("who", temperature=0.0)
    assert shown.split("\n") == [*of_seeds, *greedy.split("\n")]
    assert len({*shown.split("\n")}) == 4
    assert notes == [chat.HELP]
    assert talk("/quit", "who") == ("", [])


def test_a_score_is_the_reward_models_of_the_last_answer(runs, talk, policy):
    shown, _ = talk("who", "/score")
    scored = Generator(runs / "policy" / "model", runs / "reward" / "model", **HOW)
    generations = scored([messages("who")], seed=0)
    assert shown == f"{generations.texts[0]}\nscore {generations.rewards[0]:.3f}\n"
    counted, _ = talk("who", "/score", reward=("length*2",))
    assert counted.endswith(f"score {2 * len(generations.token_log_probs[0]):.3f}\n")
    again, _ = talk("who", "/reset", "who", "/score", reward=("length*2",))
    assert again.splitlines()[-1] == counted.splitlines()[-1]


@pytest.mark.parametrize("reward", ["theirs.py:score", "http://their.host/score"])
def test_a_reward_of_somebody_elses_run_is_neither_run_nor_asked(
    runs, tmp_path, talk, reward, monkeypatch
):
    """Also in the current folder, and without the manifest by which other files know a run."""
    monkeypatch.chdir(tmp_path)
    theirs = tmp_path / "theirs"
    shutil.copytree(runs / "policy", theirs)
    ran = tmp_path / "ran"
    code = f"import pathlib; pathlib.Path({str(ran)!r}).touch(); score = len"
    (theirs / "theirs.py").write_text(code)
    named = reward if "://" in reward else f"{theirs}/{reward}"
    settings = yaml.safe_load((theirs / "config.yaml").read_text("utf-8"))
    (theirs / "config.yaml").write_text(yaml.safe_dump(settings | {"reward": [named]}))
    for mark in ("manifest.json", "checkpoints/start.json"):
        (theirs / mark).unlink(missing_ok=True)

    with pytest.raises(UserError, match="no reward; give --reward"):
        talk("who", "/score", folder=str(theirs))
    assert not ran.exists()
    shown, [note] = talk("who", folder=str(theirs))
    assert named in note
    assert note.endswith("/score needs --reward")
    assert shown


@pytest.mark.slow
def test_two_models_answer_with_their_own_histories(runs, talk, policy, tmp_path):
    shutil.copytree(runs / "policy" / "model", tmp_path / "other")
    shown, notes = talk(
        "who",
        "x",
        "/score",
        compare=str(tmp_path / "other"),
        temperature=0.5,
    )
    assert notes == [f"A is {runs / 'policy'}, B is {tmp_path / 'other'}"]
    expected = []
    for label, slots in {"A": NEW, "B": 45}.items():  # half of a model's positions
        top_k = 9 if label == "A" else None
        model = Generator(tmp_path / "other", max_new_tokens=slots, temperature=0.5, top_k=top_k)
        first = model([messages("who")], seed=0).texts[0]
        second = "" if label == "B" else model([messages("who", first, "x")], seed=0).texts[0]
        expected += [f"{label}: {first}\n", f"{label}: {second}"]
    assert shown.startswith(expected[0] + expected[2] + expected[1] + "\n" + expected[3])
    assert re.search(r"\nA: score .+\nB: score .+\n$", shown)


@pytest.mark.slow
def test_turns_that_no_longer_fit_are_dropped_and_it_is_said(talk, policy):
    line = "a" * 22
    shown, notes = talk(
        line,
        line,
        line,
        line,
        system="be brief",
    )
    assert notes == ["(the oldest turn is dropped: 73 tokens fit)"] * 2
    system = {"role": "system", "content": "be brief"}
    answers = shown.split("\n")
    kept = [system, *messages(line, answers[1], line)]
    assert policy([kept], seed=0).texts[0] == answers[2]
    with pytest.raises(UserError, match="81 tokens, and 73 fit"):
        talk("a" * 80)


@pytest.mark.slow
def test_a_note_stands_before_the_label_of_its_answer(runs, monkeypatch):
    monkeypatch.chdir(runs)
    shown = []
    console = chat.Console(shown.append, shown.append, False)
    folder = str(runs / "policy")
    chat.run(folder, chat.Config(compare=folder, system="be brief"), ["a" * 22] * 3, console)
    places = [i for i, piece in enumerate(shown) if "oldest" in piece]
    assert [shown[i + 1] for i in places] == ["A: ", "B: "]


def test_a_model_without_a_chat_template_is_given_each_line_alone(
    runs, tmp_path, talk, monkeypatch
):
    scored = []

    def score(reward, rollout, columns, batch_size):
        scored.extend(columns["messages"])
        return [0.5]

    monkeypatch.setattr(chat.bench, "score", score)
    shutil.copytree(runs / "reward", tmp_path / "reward")
    bare = Generator(runs / "policy" / "model", **HOW, template="{prompt}")
    LanguageModel.load(runs / "policy" / "model").save(
        tmp_path / "policy" / "model", template="{prompt}", config=bare.config
    )
    settings = (runs / "policy" / "config.yaml").read_text("utf-8").replace("{prompt}:", "{prompt}")
    (tmp_path / "policy" / "config.yaml").write_text(settings, "utf-8")
    shown, notes = talk("who", "and why", "/score", folder=tmp_path / "policy")
    assert scored == [messages("and why")]
    assert notes == [
        f"{tmp_path}/policy gets each line without the earlier ones, as '{{prompt}}': it has no "
        "chat template"
    ]
    expected = [bare([line], seed=0).texts[0] for line in ("who", "and why")]
    assert shown.split("\n")[:2] == expected
    _, notes = talk("who", template="a{prompt}")
    assert notes[0].endswith("gets each line without the earlier ones, as 'a{prompt}'")
    with pytest.raises(UserError, match=r"--system: .* has no chat template"):
        talk("who", folder=tmp_path / "policy", system="be brief")


@pytest.mark.parametrize(
    ("line", "said"),
    {
        "/temprature 0": "no command /temprature; there are\n/reset",
        "/temperature": "/temperature: expected one number, got ''",
        "/temperature warm": "/temperature: expected one number, got 'warm'",
        "/temperature -1": "/temperature: temperature must be at least 0",
        "/seed 1.5": "/seed: expected one number, got '1.5'",
        "/score": "/score: nothing has been answered yet",
        "?": "your line: the chat template failed: Exception: WordLevel",
    }.items(),
)
def test_a_mistake_ends_a_script_but_not_a_conversation(talk, line, said):
    with pytest.raises(ValueError, match=said):
        talk(line)
    shown, notes = talk(line, "who", is_terminal=True)
    assert said in notes[0]
    assert shown.count("\n") == 1


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(talk, monkeypatch):
    stream = Generator.stream

    def interrupted(self, ids, seed):
        yield from list(stream(self, ids, seed))[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "stream", interrupted)
    shown, notes = talk("who", "/score", is_terminal=True)
    assert notes == ["\n(stopped)"]
    assert len(shown.split("\n")[0]) == 2


def test_lines_from_a_pipe_are_answered_on_stdout(runs, policy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("who\n/quit\nmore\n"))
    cli.run(["chat", str(runs / "policy"), "--seed", "3"])
    shown = capsys.readouterr()
    assert shown.out == policy([messages("who")], seed=3).texts[0] + "\n"
    assert "text.template auto" in shown.err


def test_a_terminal_has_a_mark_and_no_answer_moves_it(runs, monkeypatch, capsys):
    marks = []

    def typed(mark):
        marks.append(mark)
        if len(marks) > 1:
            raise EOFError
        return "who"

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(tokenizers.Tokenizer, "decode_stream", lambda self, ids: ["\x1b[2J"])
    cli.run(["chat", str(runs / "policy")])
    assert marks == ["> ", "> "]
    assert capsys.readouterr().out == "\\x1b[2J\n"


def test_on_a_terminal_two_answers_grow_side_by_side(runs, talk, policy, other):
    """The same answers as one after the other, a token of each in turn."""
    shown = []
    notes = []

    @contextlib.contextmanager
    def columns(labels):
        assert labels == [f"A: {runs / 'policy'}", f"B: {other}"]
        yield shown.append

    console = chat.Console(notes.append, notes.append, True, columns)
    config = chat.Config(compare=str(other))
    chat.run(str(runs / "policy"), config, ["who", "and why"], console)
    beside, _ = talk("who", "and why", compare=str(other))
    texts = [text.removesuffix("\n") for text in re.split("^[AB]: ", beside, flags=re.M)[1:]]
    assert texts[0] == policy([messages("who")]).texts[0]
    assert texts[0] != texts[1]
    assert shown[-1] == texts[2:]
    assert texts[:2] in shown
    assert all(len(text) <= 1 for text in shown[0])
    assert len(notes) == 1
