"""The safety filter: what it finds, what becomes of the rows, what a run counts."""

import json
from dataclasses import replace

import numpy as np
import pytest
from builders import json_lines
from numpy.testing import assert_array_equal

from rlhf_jax import vpg
from rlhf_jax.config import Network, Optimizer, RLStage, RunConfig, Safety, Tokenizer
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.graders.filter import Filter, Guard, read_words, rule_files, sentence
from rlhf_jax.training import rl
from rlhf_jax.types import Rollout

TOKENIZER = characters("abcdefghij ")
# The texts, and what the list finds in them.
WORDS = {
    "_BAD_": "bad",
    "STRASSE": "strasse",
    "very\n bad luck": "very bad",
    "say d*mn!": "d*mn",
    "ｂａｄ": "bad",  # full-width letters
    "b\u00ad\u200bad": "bad",  # a soft hyphen and a zero-width space
    "xx\U0001f4a3xx": "\U0001f4a3",  # no letter, so no boundary
    "very badly": None,
    "badly abad bad1": None,
    "b.a.d": None,
    "bád": None,
    "say damn!": None,
}


@pytest.mark.parametrize(("text", "found"), WORDS.items())
def test_words_are_found_whole_in_any_case_and_form(text, found):
    rules = Filter.create(["Bad", "very  bad", "straße", "\U0001f4a3", "d*mn"])
    match = rules.found(text).get("words")
    assert (match and " ".join(match.split())) == found


def test_patterns_search_the_text_as_it_is():
    rules = Filter.create(patterns=[r"b.d\b", "(?i)x{2}"])
    assert rules.found("a bad") == {"patterns": r"b.d\b"}
    assert rules.found("A XX") == {"patterns": "(?i)x{2}"}
    assert rules.found("BAD") == rules.found("bad1") == rules.found("") == {}
    assert Filter.create(["bad"], patterns=["ad"]).found("bad") == {
        "words": "bad",
        "patterns": "ad",
    }


def test_a_word_list_has_a_word_a_line(tmp_path):
    file = tmp_path / "words.txt"
    file.write_bytes("\ufeffbad\r\n\n two words \n".encode())
    assert Filter.create(read_words(file)).found("(Two   words)") == {"words": "two   words"}
    for content, message in [
        (b"", "has no words"),
        (b"a\n\xc2\xad\n", "line 2"),
        (b"ok\n\xff", "decode byte 0xff"),
    ]:
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"words\.txt.*{message}"):
            read_words(file)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_words(tmp_path / "other.txt")


def rollout(*responses):
    """The prompt "ab", then each response; None is a missing row."""
    texts = [response or "" for response in responses]
    width = max(map(len, texts))
    columns = np.arange(2 + width)
    lengths = np.array([2 + len(text) for text in texts])
    in_response = (columns >= 2) & (columns < lengths[:, None])
    pad = [TOKENIZER.pad_id]
    tokens = [TOKENIZER.encode("ab" + text) + pad * (width - len(text)) for text in texts]
    scores = np.arange(len(texts), dtype=np.float32)
    zeros = np.zeros(in_response.shape, np.float32)
    real = np.ones(zeros.shape, int)
    return Rollout(np.array(tokens), real, in_response.astype(int), zeros, scores=scores)


def guarded(tmp_path, **settings):
    """A guard with the word "bad", and a classifier that counts "c" and has no score for "j"."""
    (tmp_path / "words.txt").write_text("bad\n")
    (tmp_path / "mine.py").write_text(
        "def harm(prompts, responses, limit=None):\n"
        "    return [None if r == 'j' else r.count('c') - (limit[i] if limit else 0) for i, r in "
        "enumerate(responses)]"
    )
    if "below" in settings or "above" in settings:
        settings["classifier"] = f"{tmp_path}/mine.py:harm"
    guard = Guard.create(Safety(words=(f"{tmp_path}/words.txt",), **settings))
    return guard.for_responses(tokenizer=TOKENIZER, load=pytest.fail, columns=("limit",))


ACTIONS = {
    "penalise": ([0, 1 - 2.5, 2], 1),
    "replace": ([0, -7, 2], 1),
    "mask": ([0, 1, 2], 0),
    "count": ([0, 1, 2], 1),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_what_becomes_of_an_unsafe_row(action, tmp_path):
    scored = rollout("a", "bad", "c")
    (scores, present) = ACTIONS[action]
    after, _, _ = guarded(tmp_path, responses=action, penalty=2.5, score=-7.0).enforce(
        scored, scored=scored, columns={}
    )
    assert_array_equal(after.scores, scores)
    assert_array_equal(after.response_mask, scored.response_mask * np.array([[1], [present], [1]]))


def test_shares_are_of_present_rows_and_each_rule_has_its_own(tmp_path):
    guard = guarded(tmp_path, patterns=("^b", "^$"), above=1.0, responses="mask")
    sampled = rollout("bad", None, "baa", "cc", "a", "j")
    enforced, metrics, verdicts = guard.enforce(
        sampled, scored=sampled, columns={"limit": [0, 9, 0, 0, 0, 0]}
    )
    assert_array_equal(enforced.response_mask.any(axis=1), [0, 0, 0, 0, 1, 1])
    expected = {
        "safety/unsafe": 0.6,
        "safety/words": 0.2,
        "safety/patterns": 0.4,
        "safety/classifier": 0.2,
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected)
    sentences = [
        "words: bad; patterns: ^b",
        None,
        "patterns: ^b",
        "classifier: score 2 above 1",
        None,
        None,
    ]
    assert list(map(sentence, verdicts)) == sentences


LIMITS = [
    ({"below": 1.0, "above": 2.0}, ["score 0.99 below 1", None, None, "score 2.01 above 2", None]),
    ({"below": 0.0}, [None] * 5),
    ({"above": 2.0}, [None] * 3 + ["score 2.01 above 2", None]),
]


@pytest.mark.parametrize(("limits", "expected"), LIMITS)
def test_a_score_beyond_a_limit_is_unsafe_and_one_on_it_is_not(limits, expected, tmp_path):
    sampled = rollout("c", "c", "cc", "cc", "j")
    _, _, verdicts = guarded(tmp_path, **limits).enforce(
        sampled, scored=sampled, columns={"limit": [0.01, 0, 0, -0.01, 0]}
    )
    assert [verdict.get("classifier") for verdict in verdicts] == expected


def test_prompts_are_dropped_replaced_or_counted_where_they_stand(tmp_path, capsys):
    bad_ids = tuple(TOKENIZER.encode("bad"))
    rows = [
        Row("a bad", (), "f, line 1", columns={"x": 1}),
        Row("abad", (), "f, line 2"),
        Row(bad_ids, (), "f, line 3"),
    ]
    assert guarded(tmp_path).prompts(rows, TOKENIZER) == [rows[1]]
    assert capsys.readouterr().out == "safety: 2 of 3 prompts dropped: f, line 1; f, line 3\n"
    replaced = guarded(tmp_path, prompts="replace", replacement="hi").prompts(rows, TOKENIZER)
    assert replaced == [
        Row("hi", (), "f, line 1", columns={"x": 1}),
        rows[1],
        Row("hi", (), "f, line 3"),
    ]
    assert guarded(tmp_path, prompts="count").prompts(rows, TOKENIZER) == rows
    with pytest.raises(UserError, match="all 2 prompts are unsafe, so no prompt is left"):
        guarded(tmp_path).prompts([rows[0], rows[2]], TOKENIZER)
    guarded(tmp_path).prompts(
        [Row("bad", (), f"line {i}") for i in range(22)] + rows[1:2], TOKENIZER
    )
    assert capsys.readouterr().out.endswith("; line 19; and 2 more\n")
    assert Guard.create(Safety(classifier="length", above=1.0)).prompts(rows, TOKENIZER) == rows


def test_the_classifier_and_the_files_behind_the_rules_are_named(tmp_path):
    guard = Guard.create(Safety(classifier="repetition:0", above=0.0))
    with pytest.raises(UserError, match=r"^safety\.classifier repetition:0: after"):
        guard.for_responses(tokenizer=TOKENIZER, load=pytest.fail, columns=())
    words = tmp_path / "words.txt"
    mine = tmp_path / "mine.py"
    files = {f"safety {words}": words, f"safety {mine}:harm": mine}
    assert rule_files(guarded(tmp_path, above=1.0).settings) == files


HALVES = [
    ({"classifier": "length"}, "needs below or above"),
    ({"prompts": "replace"}, "needs a replacement"),
    ({"responses": "replace"}, "needs a score"),
    ({"penalty": -1.0}, "penalty must be at least 0"),
]


@pytest.mark.parametrize(("settings", "message"), HALVES)
def test_settings_that_say_half_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Safety(**settings)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "prompts.json").write_text(
        json.dumps([f"say {word}" for word in ("ape", "bee", "cat", "dog", "bad")])
    )
    (tmp_path / "words.txt").write_text("bad\n")
    settings = {
        "num_iterations": 2,
        "batch_size": 8,
        "max_new_tokens": 4,
        "kl_coef": 0.0,
        "validation_interval": 1,
    }
    return RunConfig(
        data=(str(tmp_path / "prompts.json"),),
        output_dir=str(tmp_path / "run"),
        network=Network(hidden_size=8, num_layers=1, num_heads=1, max_length=16),
        tokenizer=Tokenizer(kind="characters"),
        reward=("count:e",),
        rl=RLStage(**settings, validation_fraction=0.5, optimizer=Optimizer(learning_rate=1e-2)),
        # About half of the responses that begin with one of 14 characters.
        safety=Safety(words=(str(tmp_path / "words.txt"),), patterns=("^[a-g]",), penalty=100.0),
    )


def read(folder, name="metrics.jsonl"):
    return json_lines(folder / name)


@pytest.mark.slow
def test_a_run_counts_and_penalises(config, tmp_path, capsys):
    folder = rl.run(config, vpg).folder
    assert f"safety: 1 of 5 prompts dropped: {config.data[0]}, row 5\n" in capsys.readouterr().out
    metrics = read(folder)
    samples = read(folder, "samples.jsonl")
    for row in metrics[1:]:
        assert 0 < row["safety/unsafe"] == row["safety/patterns"] < 1
        assert row["safety/words"] == 0
        assert (
            -1e-4 <= row["objective/score"] + 100 * row["safety/unsafe"] <= 2 + 4
        )  # in "bee" and in 4 new characters
    for row in metrics:
        here = [sample for sample in samples if sample["step"] == row["step"]]
        unsafe = [sample["response"][:1] in tuple("abcdefg") for sample in here]
        assert [sample["unsafe"] for sample in here] == [
            "patterns: ^[a-g]" if bad else None for bad in unsafe
        ]
        for sample, bad in zip(here, unsafe, strict=True):
            assert sample["score"] == (sample["prompt"] + sample["response"]).count("e") - 100 * bad
        assert row["validation/safety/unsafe"] == pytest.approx(np.mean(unsafe))
    assert (
        f"safety {config.safety.words[0]}"
        in json.loads((folder / "manifest.json").read_text("utf-8"))["data"]
    )
    (tmp_path / "words.txt").write_text("worse\n")
    with pytest.raises(UserError, match=r"sha256 of safety .*words\.txt was"):
        rl.run(replace(config, resume=True), vpg)


@pytest.mark.slow
def test_masked_rows_are_absent_and_a_score_that_is_no_number_stops_the_run(config, tmp_path):
    nothing = Safety(patterns=("",), prompts="count", responses="mask")
    folder = rl.run(replace(config, safety=nothing), vpg).folder
    rows = [
        (row["safety/unsafe"], row["objective/score"], row["nonfinite"]) for row in read(folder)[1:]
    ]
    assert rows == [(1, 0, 0)] * 2
    assert not (folder / "samples.jsonl").exists() or read(folder, "samples.jsonl") == []
    (tmp_path / "mine.py").write_text(
        "def harm(prompts, responses):\n    return [float('nan')] * len(responses)"
    )
    judged = Safety(classifier=f"{tmp_path / 'mine.py'}:harm", below=0.0)
    with pytest.raises(TrainingFault, match=r"reward function harm is not finite \(row 0, prompt"):
        rl.run(replace(config, output_dir=str(tmp_path / "nan"), safety=judged), vpg)
