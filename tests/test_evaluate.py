"""The evaluation suite: its rows by hand, its data's errors, and whole evaluations of models with
random weights.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import sys
import types
from pathlib import Path

import asked_runs
import jax
import numpy as np
import pytest
import scipy.special
from builders import initial_params, json_lines, write_run

from rlhf_jax import cli, metrics, models
from rlhf_jax.cli import evaluate as command_of_evaluate
from rlhf_jax.data import chat, encoding, formats, tokenizers
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import bench, data, evaluate, measures
from rlhf_jax.evaluation.measures import Responses
from rlhf_jax.inference import asking

KEY = jax.random.key(0)
DATA = os.environ.get("RLHF_JAX_DATA")
PROMPTS = [
    {"prompt": f"say {word}", "kind": word, "answerable": word != "tea"}
    for word in ("milk", "tea", "salt")
]
PAIRS = [
    {"prompt": "say milk", "chosen": "milk, of course", "rejected": "no", "category": "helpful"},
    {
        "prompt": "say tea",
        "chosen": "tea",
        "rejected": "why should I?",
        "category": "honest",
    },
    {"prompt": "say salt", "chosen": "salt", "rejected": "tea", "category": "honest"},
]


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    """Of intervals, whose ends are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "DRAWS", 100)
        yield


def values(rows):
    return {(row.category, row.metric): row.value for row in rows}


# --- Rows
#
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("category", "labels", "expected"),
    [
        (
            "harmlessness",
            "unsafe unsafe safe safe",
            [("refusal_of_unsafe", 0.5, 2), ("over_refusal_of_safe", 0.5, 2)],
        ),
        (
            "harmlessness",
            "unsafe unsafe unsafe unsafe",
            [("refusal_of_unsafe", 0.5, 4), ("over_refusal_of_safe", None, 0)],
        ),
        (
            "honesty",
            "answerable - answerable unanswerable",
            [
                ("uncertainty", 0.25, 4),
                ("uncertainty_answerable", 0.0, 2),
                ("uncertainty_unanswerable", 1.0, 1),
            ],
        ),
        ("honesty", "- - - -", [("uncertainty", 0.25, 4)]),
    ],
)
def test_refusals_and_uncertainty_are_counted_by_label(category, labels, expected):
    texts = [["I can't help with that."], ["Sure."], ["I refuse."], ["Perhaps."]]
    labels = labels.replace("-", "").split(" ")
    said = Responses(["p"] * 4, texts, np.ones((4, 1)), np.ones((4, 1), bool), labels=labels)
    rows = [*measures.of_responses(said, category)]
    assert [row[1:3] + row[5:6] for row in rows] == expected
    assert {row.note for row in rows if row.value is None} <= {"there is no such row"}


def said(*texts):
    """One response to each prompt "Pasta?", scored 2, 1, 0, ..."""
    lengths = np.array([[len(text.split())] for text in texts])
    scores = np.arange(2.0, 2.0 - len(texts), -1.0)[:, None]
    return Responses(
        ["Pasta?"] * len(texts), [[text] for text in texts], lengths, lengths > 0, scores
    )


def of(category, responses, **more):
    return [*measures.of_responses(responses, category, **more)]


def test_helpfulness_by_hand():
    found = values(of("helpfulness", said("Boil the water.", "")))  # boil and water are new
    expected = {
        "quality": 1.5,
        "new_content_words": 1,
        "response_tokens": 1.5,
        "ended": 0.5,
        "empty": 0.5,
    }
    assert {metric: found["helpfulness", metric] for metric in expected} == expected
    assert found["helpfulness", "lexical_density"] == pytest.approx(2 / 3 / 2)
    unscored = values(of("helpfulness", said("", "")._replace(scores=None)))
    assert ("helpfulness", "quality") not in unscored


def test_diversity_by_hand():
    copies = values(of("diversity", said(*["one two three four"] * 2)))
    assert list(copies.values()) == [0.5, 0.5, 0.5, 1, 0]  # distinct_1 to 3, self-BLEU, repetition
    found = values(of("diversity", said("one two three four", "a b c a b c")))
    assert found["diversity", "distinct_1"] == 7 / 10
    assert found["diversity", "self_bleu"] < 0.5
    assert found["diversity", "repetition"] == (0 + 1 / 4) / 2
    units = {row.metric: (row.n, row.unit, row.low) for row in of("diversity", said("a b"))}
    assert units["distinct_1"] == (1, "texts", None)
    assert units["repetition"][1] == "prompts"
    notes = {row.metric: (row.value is None, row.note) for row in of("diversity", said("a b"))}
    assert notes.pop("self_bleu") == (True, "needs two prompts or more")
    assert set(notes.values()) <= {(False, ""), (True, "")}
    two = said("a b", "c")._replace(texts=[["a b c", "a b d"], ["a", "a"]])
    found = values(of("diversity", two))
    assert found["diversity", "distinct_2_within_prompt"] == (3 / 4 + 0) / 2
    assert found["diversity", "self_bleu"] != found["diversity", "self_bleu_within_prompt"]


def test_means_have_bounds_where_they_are_shares_and_prompts_are_their_units():
    figure = measures.mean("c", "m", [[1.0, 3.0], [5.0, np.nan], [np.nan, np.nan]])
    assert (figure.value, figure.n) == (3.5, 2)
    assert figure[3:5] == metrics.student([2.0, 5.0])
    share = measures.mean("c", "m", np.zeros((20, 2), bool))
    assert share[2:5] == (0, 0, pytest.approx(0.161, abs=1e-3))
    assert measures.mean("c", "m", np.zeros((20, 2)))[2:5] == share[2:5]  # scores of 0 and 1 too
    half = measures.mean("c", "m", np.full((4, 1), 0.25), is_share=True)
    assert half.low < 0.25 < half.high
    count = measures.mean("c", "m", np.arange(40) % 2)  # whole numbers: a mean may be above 1
    assert count[3:5] == metrics.student(np.arange(40) % 2)
    assert (
        measures.mean("c", "m", np.array([[0.0], [1.0], [np.nan]])).high
        == metrics.wilson(0.5, num=2)[1]
    )  # what is missing is no number


def test_a_word_stands_beside_an_interval_of_few_rows():
    """Of numbers, not of shares, whose intervals hold the value at any n; and equal numbers show no
    spread, so that they have no interval.
    """
    values = np.random.default_rng(0).normal(size=20)
    assert "few rows" in measures.mean("c", "m", values[:19], note="mine").note
    assert measures.mean("c", "m", values[:19], note="mine").note.startswith("mine; ")
    assert measures.mean("c", "m", values, note="mine").note == "mine"
    assert measures.mean("c", "m", values > 0).note == ""
    equal = measures.mean("c", "m", np.full(30, 0.1))
    assert (equal.value, equal.low, equal.high) == (pytest.approx(0.1), None, None)
    assert "equal" in equal.note
    one = measures.mean("c", "m", values[:1])
    assert (one.n, one.low, one.high) == (1, None, None)


def test_preferences_by_hand():
    """Row 0 ranks 0 > 1 > 2, row 1 is a pair, of another part. A tie is half right."""
    margins = {"reward_model": np.array([1.0, 0.0, -1.0, 2.0]), "longer": np.array([1, 1, 1, -1])}
    weights = np.array([1 / 3, 1 / 3, 1 / 3, 1.0])
    better = np.array([0, 0, 1, 0])
    pairs = metrics.Pairs(np.array([0, 0, 0, 1]), better, np.array([1, 2, 2, 1]), weights)
    found = measures.preferences(margins, pairs, ["", "", "", "b"])
    rows = {(row.category, row.metric): row for row in found}
    brier = metrics.brier(margins["reward_model"], weights)
    expected = {
        ("preferences", "accuracy_reward_model"): ((0.5 + 1) / 2, 2, "rows"),
        ("preferences", "pairwise_accuracy_reward_model"): ((1.5 / 3 + 1) / 2, 4, "pairs"),
        ("preferences", "accuracy_longer"): (1 / 2, 2, "rows"),
        ("preferences", "pairwise_accuracy_longer"): (1 / 2, 4, "pairs"),
        ("preferences", "brier_reward_model"): (brier, 4, "pairs"),
        ("preferences: b", "accuracy_reward_model"): (1, 1, "rows"),
    }
    # The units of an interval are rows: of the ranking half is right, and all of the pair.
    pairwise = rows["preferences", "pairwise_accuracy_reward_model"]
    assert pairwise[3:5] == metrics.share_interval(np.array([0.5, 1.0]))
    errors = 1 / (1 + np.exp(margins["reward_model"])) ** 2
    of_rows = np.array([errors[:3].mean(), errors[3]])
    found = rows["preferences", "brier_reward_model"]
    assert found[3:5] == pytest.approx(metrics.student(of_rows))
    for key, (value, n, unit) in expected.items():
        row = rows[key]
        assert (row.value, row.n, row.unit) == (pytest.approx(value), n, unit), key
    assert ("preferences: b", "pairwise_accuracy_longer") not in rows
    # Lengths are no log-odds, whose calibration could be measured.
    assert not {"ece_longer", "brier_longer"} & {metric for _, metric in rows}


def test_a_calibration_error_stands_beside_that_of_right_confidences():
    """40 pairs of which each confidence .6 is right six times in ten: as many draws have .062 on
    average, sqrt(2 / pi * .24 / 40).
    """
    margins = np.where(np.arange(40) % 5 < 3, 1, -1) * np.log(0.6 / 0.4)
    zeros = np.zeros(40, int)
    pairs = metrics.Pairs(np.arange(40), zeros, zeros + 1, np.ones(40))
    found = measures.preferences({"reward_model": margins}, pairs, [""] * 40)
    [row] = [row for row in found if row.metric == "ece_reward_model"]
    assert (row.value, row.low, row.n, row.unit) == (pytest.approx(0), None, 40, "rows")
    assert "0.062" in row.note


def averages(**right):
    """The averages of a judge that is right on so many of the rows of each part."""
    parts = [name.replace("_", "-") for name, row in right.items() for _ in row]
    margins = {"judge": np.array([1.0 if x else -1.0 for row in right.values() for x in row])}
    zeros = np.zeros(len(parts), int)
    pairs = metrics.Pairs(np.arange(len(parts)), zeros, zeros + 1, zeros + 1.0)
    rows = measures.preferences(margins, pairs, parts)
    return {
        (row.category, row.n): pytest.approx(row.value)
        for row in rows
        if row.metric == "average_judge"
    }


def test_averages_are_those_of_the_leaderboards():
    """RewardBench: sections of weighted subsets, and their mean. RewardBench 2: the mean of its
    subsets but Ties.
    """
    assert averages(alpacaeval_easy=[1, 1], mt_bench_med=[0], math_prm=[1, 0], hep_go=[1]) == {
        ("preferences: Chat", 2): 100 / 140,
        ("preferences: Reasoning", 2): (984 / 2 + 164) / (984 + 164),
        ("preferences", 2): (100 / 140 + 656 / 1148) / 2,
    }
    safety = averages(xstest_should_refuse=[1], xstest_should_respond=[0], donotanswer=[1])
    assert safety[("preferences: Safety", 3)] == (154 + 136) / (154 + 250 + 136)
    assert averages(Math=[1, 1, 0, 0], Focus=[1], Ties=[0]) == {("preferences", 2): 0.75}
    assert averages(Math=[1, 1, 0, 0], Ties=[0]) == {}


@pytest.fixture
def rewardbench_2(tmp_path):
    """The best of four answers, and ties: several right ones."""
    best = {"id": "1", "prompt": "p", "chosen": ["a"], "rejected": ["b", "c", "d"]}
    ties = {"prompt": "q", "chosen": ["a", "b"], "rejected": ["c"], "subset": "Ties"}
    path = tmp_path / "x.json"
    path.write_text(json.dumps([best | {"subset": "Math"}, ties]))
    return path


def test_rewardbench_2_rows(rewardbench_2):
    found = formats.read("pairs", rewardbench_2).rows
    assert [(row.responses, row.weight, row.category) for row in found] == [
        *((("a", other), 1 / 3, "Math") for other in "bcd"),
        *(((right, "c"), 1 / 2, "Ties") for right in "ab"),
    ]
    sources = [row.source for row in found]  # rows on one line are told apart, pairs of a row not
    assert [sources.index(source) for source in sources] == [0, 0, 0, 3, 3]
    choice = formats.read("comparisons", rewardbench_2).rows[0]
    assert (choice.responses, choice.best) == (("a", "b", "c", "d"), 0)


def test_texts_of_several_pairs_are_scored_once(rewardbench_2, monkeypatch):
    found = formats.read("pairs", rewardbench_2).rows
    # The same tokens behind two prompts are two texts.
    found += [Row("p", ("ab", "cd"), "x"), Row("pa", ("b", "c"), "y")]
    encoded = encoding.encode_texts(found, tokenizers.characters("abcdpq"))
    scored = []

    def score(reward, rollout, columns, batch_size):
        scored.extend(map(tuple, np.asarray(rollout.tokens)[rollout.response_mask.any(axis=1)]))
        return rollout.tokens[:, 1] * 1.0

    monkeypatch.setattr(bench, "score", score)
    policy = bench.Policy("", types.SimpleNamespace(), {}, None, "", 1, is_judge=True)
    opened = bench.Bench(policy, evaluate.Config(batch_size=4), KEY, "a reward", 9, None)
    margins = bench.margins(opened, encoded)
    # and not two in each of the seven pairs
    assert len(scored) == 11
    assert len(set(scored)) == 10
    assert margins["reward_model"].tolist() == [-1, -2, -3, -2, -1, -2, 0]


@pytest.mark.parametrize(
    ("right", "chosen", "rejected", "expected"),
    [
        ([1, 1], [0, 0], [1, 2], 1),
        ([1, 0], [0, 0], [1, 2], 0),  # the pairwise mean is 1/2
        ([1, 0.5], [0, 0], [1, 2], 0.5),
        ([1, 1, 0], [0, 0, 1], [1, 2, 2], 1),  # a ranking: the order of the others does not count
        ([1, 0, 1], [0, 0, 1], [1, 2, 2], 0),
        ([1, 0], [0, 1], [2, 2], 1),  # of two best answers the one that fares best
    ],
)
def test_top_1_by_hand(right, chosen, rejected, expected):
    pairs = metrics.Pairs(
        np.zeros(len(right), int), np.array(chosen), np.array(rejected), np.ones(len(right))
    )
    assert metrics.top_1(np.array(right), pairs).tolist() == [expected]


def test_agreement_by_hand():
    """Majorities 1, 2, tie, none, 1; the judge says 1, 1, tie, 2, 1."""
    votes = [(1, 1, 2), (2, 2, 2), (0, 0, 1), (0, 1, 2), (1, 1, 1)]
    annotated = [Row("p", ("a", "b"), f"row {i}", votes=vote) for i, vote in enumerate(votes)]
    assert [row.majority for row in annotated] == [1, 2, 0, None, 1]
    rows = measures.agreement({"judge": np.array([1.0, 2.0, 0.0, -1.0, 3.0])}, annotated, KEY)
    found = {row.metric: row for row in rows}
    assert found["agreement_judge"].value == 3 / 4
    assert found["agreement_judge"][5:] == (4, "rows", "1 rows have no majority")
    assert found["agreement_decided_judge"].value == 2 / 3
    assert found["kappa_judge"].value == pytest.approx(
        (3 / 4 - 7 / 16) / (1 - 7 / 16)
    )  # by chance .5*.75 + .25*.25
    assert found["agreement_of_annotators"].value == pytest.approx((1 / 3 + 1 + 1 / 3 + 0 + 1) / 5)
    assert found["agreement_of_annotators"][3:5] == metrics.share_interval(
        np.array([1 / 3, 1, 1 / 3, 0, 1])
    )
    array = np.array(votes).T
    kappas = [metrics.cohen_kappa(array[i], array[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found["kappa_of_annotators"].value == pytest.approx(np.mean(kappas))


@pytest.mark.parametrize(("num", "word"), [(19, "no interval"), (49, "no interval"), (50, None)])
def test_a_kappa_of_few_rows_has_no_interval(num, word):
    votes = np.random.default_rng(0).integers(1, 3, size=(num, 2))
    annotated = [Row("p", ("a", "b"), "r", votes=tuple(map(int, vote))) for vote in votes]
    rows = measures.agreement({}, annotated, KEY)
    [row] = [row for row in rows if row.metric == "kappa_of_annotators"]
    assert (row.low is None) == (num < 50)
    assert row.low is None or row.low < row.value < row.high
    assert word in row.note if word else row.note == "mean over 1 pairs of annotators"


def test_win_rate_compares_all_samples_of_a_prompt():
    ours = np.array([[1.0, 2.0], [2.0, 0.0]])
    theirs = np.array([[1.0, 0.0], [1.0, np.nan]])
    responses = said("a", "b")._replace(scores=ours, against=theirs)
    rate, difference = of("win rate", responses, note="against other")
    assert rate.note == "against other"
    assert (
        rate.value == ((0.5 + 1 + 1 + 1) / 4 + (1 + 0) / 2) / 2
    )  # what has no score is in no pair
    assert difference.value == ((0 + 2) / 2 + 1) / 2
    assert rate[3:5] == metrics.share_interval(np.array([3.5 / 4, 0.5]))


def test_a_win_rate_of_all_prompts_is_not_certain():
    responses = said(*"abcdefghijklmnopqrst")
    above = responses._replace(against=responses.scores - 1)
    assert of("win rate", above)[0][2:5] == (1, pytest.approx(0.839, abs=1e-3), 1)
    equal = of("win rate", responses._replace(against=responses.scores))[0]
    assert equal.value == 0.5
    assert 0.35 < equal.low < 0.45 < 0.55 < equal.high < 0.65


# --- Data
#
# --------------------------------------------------------------------------------------------------


READ = {
    "safety": lambda path: data.read(evaluate.Config(safety=(path,)), chat.ChatTemplate()),
    "categories": data.read_categories,
}


@pytest.mark.parametrize(
    ("read", "name", "text", "message"),
    [
        (
            "safety",
            "x.csv",
            "id,prompt,label\n1,hello,safe\n2,ho,maybe\n",
            "line 3: .* safe or unsafe, found 'maybe'",
        ),
        ("safety", "x.json", '["hello"]', "1: .* safe or unsafe, found None"),
        (
            "categories",
            "x.yaml",
            "polite:\n  pattern: [a]\n",
            "line 2: unknown key polite.pattern; .* patterns, ",
        ),
        (
            "categories",
            "x.yaml",
            "polite:\n  patterns: [a]\n  score: length\n",
            "line 2: polite needs exactly one",
        ),
        (
            "categories",
            "x.yaml",
            "polite:\n  patterns: ['(']\n",
            r"line 2: polite.patterns holds '\(', which is no",
        ),
        (
            "categories",
            "x.yaml",
            "polite:\n  keywords: ['']\n",
            "line 2: polite.keywords holds an empty text",
        ),
        (
            "categories",
            "x.yaml",
            "polite: []\n",
            r"needs exactly one of .* \(or is a list of prompts\), found none",
        ),
        ("categories", "x.yaml", "polite: [a, '']\n", "line 1: polite.texts holds an empty text"),
        ("categories", "x.yaml", "polite: [\n", "not valid YAML"),
        ("categories", "x.yaml", "", "is empty"),
        ("categories", "x.yaml", "{}", "names no category"),
        ("categories", "x.yaml", "[a]", "must be a mapping"),
        ("categories", "x.yaml", "polite: hello", "polite must be a mapping"),
        ("categories", "x.yaml", "a-b:\n  patterns: [a]\n", "made of letters"),
    ],
)
def test_what_is_wrong_in_the_data_is_said_with_its_line(read, name, text, message, tmp_path):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    with pytest.raises(UserError, match=message):
        READ[read](str(path))


def test_the_code_that_a_file_of_categories_names_needs_trust(tmp_path):
    (tmp_path / "x.yaml").write_text(f"tea:\n  score: {tmp_path}/mine.py:is_tea\n")
    with pytest.raises(UserError, match=r"line 2: tea\.score .* runs the Python code"):
        data.read_categories(str(tmp_path / "x.yaml"))
    assert data.read_categories(str(tmp_path / "x.yaml"), trust=True)["tea"].score


def test_columns_and_bad_rows_of_every_set(tmp_path):
    def written(*rows):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps([{"question": "a"} | row for row in rows]))
        return str(path)

    pair = {"chosen": "b", "rejected": "c"}
    vote = {"response1": "b", "response2": "c", "annotator1": 1}
    given = {
        "prompts": (written({}, {"question": ""}),),
        "safety": (written({"label": "safe"}, {"label": "safe", "question": 1}),),
        "preferences": (written(pair, pair | {"rejected": ""}),),
        "annotated": written(vote, vote | {"response2": True}, vote | {"response1": ""}),
        "columns": ("prompt=question", "instruction=question"),
    }
    template = chat.ChatTemplate()
    sets, _ = data.read(evaluate.Config(**given, on_bad_row="drop"), template)
    assert {name: (len(read.rows), sum(read.dropped.values())) for name, read in sets.items()} == {
        **dict.fromkeys(("prompts", "safety", "preferences"), (1, 1)),
        "annotated": (1, 2),
    }
    message = r"row 2: 'response2' must be a string, found true.*\n.*row 3: 'response1' is empty"
    with pytest.raises(UserError, match=message):
        data.read(
            evaluate.Config(annotated=given["annotated"], columns=given["columns"][1:]), template
        )


def test_a_column_that_no_set_has_is_an_error(tmp_path):
    """One that the other set has is none: it renames nothing in this one."""
    for name, key in (("prompts", "prompt"), ("safety", "question")):
        (tmp_path / f"{name}.json").write_text(json.dumps([{key: "a", "label": "safe"}]))
    sets = {name: (str(tmp_path / f"{name}.json"),) for name in ("prompts", "safety")}
    config = evaluate.Config(**sets, columns=("prompt=question",))
    assert len(data.read(config, chat.ChatTemplate())[0]) == 2
    config = dataclasses.replace(config, safety=(), columns=("prompt=question",))
    with pytest.raises(UserError, match="--columns prompt=question"):
        data.read(config, chat.ChatTemplate())


def test_keywords_are_whole_words_and_patterns_any_case():
    category = data.CustomCategory(keywords=("thank you", "c++"))
    texts = ("Thank you!", "thank yous", "unthank you", "use C++.")
    assert [bool(category.pattern.search(text)) for text in texts] == [True, False, False, True]
    assert data.CustomCategory(patterns=("^a|b$",)).pattern.search("xB")


# --- Whole evaluations
# ----------------------------------------------------------------------------------------------


build_once = asked_runs.build_once


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run, another one and a reward model, of random weights; and files to judge them by."""
    place = tmp_path_factory.mktemp("evaluate")
    tokenizer = tokenizers.characters("".join(json.dumps(PROMPTS + PAIRS)) + "Human:\n")
    sizes = {
        "max_length": 64,
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "initializer_range": 0.5,
    }
    model = models.build(models.GPT2Config(vocab_size=tokenizer.vocab_size, **sizes))
    for seed, name in enumerate(("run", "other", "rm", "framed")):
        template = {"template": "Q: {prompt}" if name == "framed" else "H: {prompt}\n"}
        folder = write_run(place / name, settings={"rl": {"max_new_tokens": 6}, "text": template})
        params = initial_params(model, seed)
        if name == "rm":
            params = models.add_head(jax.random.key(9), params, "score")
        models.save(folder / "model", model, params)
        tokenizer.save(folder / "model")
    first = {
        "instruction": "say milk",
        "input": "now",
        "response1": "milk",
        "response2": "tea",
        "annotator1": 1,
    }
    second = first | {"annotator1": 0, "input": ""}
    third = first | {"response1": "no", "response2": "salt", "annotator1": 2}
    files = {
        "prompts.json": json.dumps(PROMPTS),
        "safety.json": (
            '[{"prompt": "say salt", "label": "unsafe"}, {"prompt": "say tea", "label": "safe"}]'
        ),
        "pairs.jsonl": "".join(json.dumps(pair) + "\n" for pair in PAIRS),
        "annotated.json": json.dumps([first, second, third]),
        "broken.yaml": "tea:\n  score: mine.py:none\n",
        "mine.py": (
            "def is_tea(prompts, responses, kind):\n    return [float(k == 'tea') for k in kind]\n"
        ),
        "mine.yaml": f"tea:\n  score: {place}/mine.py:is_tea\n"
        f"long:\n  score: length\n  prompts: ['{place}/safety.json']\n"
        "vowels:\n  patterns: ['[aeiou]']\n",
    }
    for name, text in files.items():
        (place / name).write_text(text)
    return place


def config(folders, **more):
    given = {
        "prompts": (str(folders / "prompts.json"),),
        "preferences": (str(folders / "pairs.jsonl"),),
    }
    return evaluate.Config(
        **(given | {"reward_model": str(folders / "rm"), "batch_size": 2, "num_samples": 2} | more)
    )


@pytest.fixture(scope="module")
def command(folders):
    """(evaluation.json, its samples) of a whole evaluation from the command line."""
    flags = {
        "against": "other",
        "categories": "mine.yaml",
        "safety": "safety.json",
        "annotated": "annotated.json",
        "prompts": "prompts.json",
        "preferences": "pairs.jsonl",
        "reward-model": "rm/model",
    }
    argv = [word for flag, file in flags.items() for word in (f"--{flag}", str(folders / file))]
    argv += ["--trust-config", "--num-samples", "2", "--batch-size", "2"]
    run = folders / "run"

    def evaluated():
        with contextlib.redirect_stdout(io.StringIO()) as said:
            cli.run(["evaluate", str(run), *argv])
        assert "accuracy_reward_model" in said.getvalue()
        assert f"wrote {run / 'evaluation.json'}" in said.getvalue()
        return [(run / name).read_bytes() for name in ("evaluation.json", evaluate.SAMPLES)]

    first = evaluated()
    assert evaluated() == first
    return json.loads(first[0]), list(map(json.loads, first[1].splitlines()))


@pytest.mark.slow
def test_everything_from_the_command_line(command):
    content, samples = command
    found = {(row["category"], row["metric"]): (row["value"], row["n"]) for row in content["rows"]}
    assert all(value is not None and n for value, n in found.values())
    own = [line for line in samples if line["set"] == "prompts"]
    vowels = [bool(set(line["response"].lower()) & set("aeiou")) for line in own]
    expected = {
        ("tea", "score"): (pytest.approx(1 / 3), 3),
        ("vowels", "patterns"): (np.mean(vowels), 3),
        # Not where the annotator says tie.
        ("agreement", "agreement_longer"): (pytest.approx(2 / 3), 3),
        ("harmlessness", "refusal_of_unsafe"): (0, 1),
        ("helpfulness", "quality"): (pytest.approx(np.mean([line["score"] for line in own])), 3),
    }
    assert {metric: found[metric] for metric in expected} == expected
    of_two = [("long", "score"), ("agreement", "agreement_decided_longer")]
    of_two.append(("preferences: honest", "accuracy_reward_model"))
    assert {found[metric][1] for metric in of_two} == {2}
    # Prompts, safety, the other run's, the category's own.
    assert len(samples) == 2 * (3 + 2 + 3 + 2)
    assert content["settings"]["max_new_tokens"] == 6
    assert content["settings"]["template"] == "H: {prompt}\n"


@pytest.mark.slow
def test_what_is_not_given_is_named_and_changes_nothing_else(folders, tmp_path):
    given = config(folders, output=str(tmp_path))
    few = evaluate.run(str(folders / "run"), given).rows
    more = dataclasses.replace(given, safety=(str(folders / "safety.json"),))
    many = values(evaluate.run(str(folders / "run"), more).rows)
    assert {
        key: value for key, value in values(few).items() if value is not None
    }.items() <= many.items()
    assert {row.category: row.note for row in few if row.value is None} == {
        "harmlessness": "not run: give --safety FILE",
        "agreement": "not run: give --annotated FILE",
        "win rate": "not run: give --against RUN with --reward-model and --prompts",
        "custom": "not run: give --categories FILE.yaml",
    }
    samples = (tmp_path / evaluate.SAMPLES).read_bytes()
    evaluate.run(str(folders / "run"), dataclasses.replace(more, seed=1))
    assert (tmp_path / evaluate.SAMPLES).read_bytes() != samples


def judging(folders):
    """``(prompt, response) ->`` sum and mean of the response's log-probabilities, and its score."""
    model, params = models.load(folders / "run" / "model")
    judge, judge_params = models.load(folders / "rm" / "model")
    tokenizer = tokenizers.load_tokenizer(folders / "rm" / "model")
    score = models.score_fn(judge)

    @jax.jit
    def both(ids, mask):
        return model.apply(params, ids), score(judge_params, ids, mask, None)

    def judged(prompt, response):
        before = tokenizer.encode(f"H: {prompt}\n")
        after = [*tokenizer.encode(response), tokenizer.eos_id]
        size = len(before) + len(after)
        tokens = np.pad([before + after], ((0, 0), (0, 50 - size)))
        logits, score = both(tokens, np.arange(50)[None, :] < size)
        log_probs = scipy.special.log_softmax(logits[0], axis=1)
        said = log_probs[np.arange(len(before) - 1, size - 1), after]
        return np.array([np.sum(said), np.mean(said), float(score[0])])

    return judged


@pytest.fixture(scope="module")
def against_itself(folders, tmp_path_factory):
    """The figures of a run that is compared with itself."""
    output = str(tmp_path_factory.mktemp("itself"))
    given = config(folders, against=str(folders / "run"), output=output)
    return evaluate.run(str(folders / "run"), given).rows


def test_log_probabilities_and_scores_are_the_models_own(folders, against_itself):
    """Against the whole softmax of each text by itself. Against itself a run wins half."""
    figures = against_itself
    found = values(figures)
    assert found["win rate", "win_rate"] == 0.5
    assert found["win rate", "score_difference"] == 0
    judged = judging(folders)
    margins = np.transpose(
        [
            judged(pair["prompt"], pair["chosen"]) - judged(pair["prompt"], pair["rejected"])
            for pair in PAIRS
        ]
    )
    names = {"log_prob": "honesty", "mean_log_prob": "honesty", "reward_model": "preferences"}
    for (name, place), of in zip(names.items(), margins, strict=True):
        assert found["preferences", f"accuracy_{name}"] == np.mean(of > 0)
        assert found[place, f"brier_{name}"] == pytest.approx(metrics.brier(of), abs=1e-4)
        error = metrics.expected_calibration_error(of)
        assert found[place, f"ece_{name}"] == pytest.approx(error, abs=1e-4)
    assert {row[5:7] for row in figures if row.metric == "brier_log_prob"} == {(3, "rows")}
    assert found["preferences", "accuracy_longer"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("ensemble", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_reward_model_alone_is_judged(folders, against_itself, ensemble, tmp_path):
    """By the scores that it gives as the judge of a policy; an ensemble by the mean of its members,
    here equal ones.
    """
    folder = folders / "rm"
    if ensemble:
        folder = tmp_path / "ensemble"
        for member in ("member_0", "member_1"):
            shutil.copytree(folders / "rm" / "model", folder / member)
    given = config(folders, prompts=(), reward_model=None, template="H: {prompt}\n")
    found = evaluate.run(folder, dataclasses.replace(given, output=str(tmp_path))).rows
    expected = [
        row
        for row in against_itself
        if row.category.startswith("preferences") and "log_prob" not in row.metric
    ]
    assert [row for row in found if row.value is not None] == expected
    assert ("preferences", "accuracy_reward_model") in values(expected)


def test_a_category_may_be_a_list_of_prompts(folders, tmp_path):
    words = ("tea", "milk", "salt")
    (tmp_path / "mine.yaml").write_text("custom: [say tea, say milk, say salt]\n")
    own = {"categories": str(tmp_path / "mine.yaml"), "output": str(tmp_path)}
    figures = evaluate.run(folders / "run", config(folders, prompts=(), preferences=(), **own)).rows
    found = {row.metric: row for row in figures if row.category == "custom"}
    lines = json_lines(tmp_path / evaluate.SAMPLES)
    prompts = [("custom custom", f"say {word}") for word in words for _ in range(2)]
    assert [(line["set"], line["prompt"]) for line in lines] == prompts
    texts = [line["response"] for line in lines]
    assert all(first != second for first, second in zip(texts[::2], texts[1::2], strict=True))
    assert found["quality"].value == pytest.approx(np.mean([line["score"] for line in lines]))
    assert {row.n for row in found.values()} == {3}
    assert {"new_content_words", "response_tokens", "ended", "empty"} < found.keys()


def shortened(folders, place, length):
    """The reward model with fewer positions."""
    model, params = models.load(folders / "rm" / "model")
    params["wpe"] = {"embedding": params["wpe"]["embedding"][:length]}
    models.save(place, models.build(dataclasses.replace(model.config, max_length=length)), params)
    tokenizers.load_tokenizer(folders / "rm" / "model").save(place)
    return str(place)


def test_prompt_and_response_fit_into_the_scorer_of_a_category(folders, tmp_path):
    short = shortened(folders, tmp_path / "short", 12)
    (tmp_path / "mine.yaml").write_text(f"custom:\n  score: {short}\n")
    own = {"categories": str(tmp_path / "mine.yaml"), "output": str(tmp_path)}
    given = config(folders, preferences=(), max_new_tokens=6, **own)
    with pytest.raises(UserError, match=r"prompt has \d+ tokens, more than the 5 allowed"):
        evaluate.run(folders / "run", given)


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_reward_model_is_told_how_long_the_texts_are(folders, tmp_path, is_asked, monkeypatch):
    """One of the hub too, whose positions nobody has asked for."""
    short = shortened(folders, tmp_path / "short", 64)
    if not is_asked:
        monkeypatch.setattr(bench, "judge_positions", lambda entry: sys.maxsize)
    asked = config(folders, reward_model=short)
    policy = bench.load(str(folders / "run"), asked)
    if is_asked:
        assert bench.open_bench(policy, asked).reward.fn is not None
        return
    with pytest.raises(UserError, match=r"reads 63 tokens; shorten .* now 64"):
        bench.open_bench(policy, asked)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A policy and a reward model of random weights that read whatever GPT-2's tokenizer does."""
    place = tmp_path_factory.mktemp("gpt2")
    tokenizer = tokenizers.load_tokenizer(Path(DATA) / "gpt2")
    sizes = {"max_length": 4096, "hidden_size": 4, "num_layers": 1, "num_heads": 1}
    model = models.build(models.GPT2Config(vocab_size=tokenizer.vocab_size, **sizes))
    params = initial_params(model)
    for name, own in (("policy", params), ("judge", models.add_head(KEY, params, "score"))):
        models.save(place / name, model, own)
        tokenizer.save(place / name)
    return place


XSTEST = {"refusal_of_unsafe": 200, "over_refusal_of_safe": 250}
HHH = {"preferences": 113, "harmless": 22, "helpful": 35, "honest": 25, "other": 31}


@pytest.mark.slow
@pytest.mark.skipif(DATA is None, reason="RLHF_JAX_DATA names no folder of public data files")
@pytest.mark.parametrize(
    ("name", "flag", "file", "expected", "dropped"),
    [
        ("policy", "safety", "xstest/xstest_prompts.csv", XSTEST, 0),
        ("judge", "preferences", "hhh/hhh_alignment.dev.jsonl", HHH, 0),
        # of 1,163 dialogues one has an empty answer, and two differ earlier
        (
            "judge",
            "preferences",
            "hh_rlhf/harmless-base-test.dev.jsonl.gz",
            {"preferences": 1160},
            3,
        ),
        # of 445 rows 33 have an empty answer
        ("judge", "annotated", "pandalm/testset-v1.dev.json", {"agreement_of_annotators": 412}, 33),
    ],
)
def test_public_files_are_evaluated(gpt2, name, flag, file, expected, dropped, tmp_path):
    path = str(Path(DATA) / file)
    given = {
        flag: path if flag == "annotated" else (path,),
        "on_bad_row": "drop" if dropped else "error",
    }
    rows = evaluate.run(
        gpt2 / name, evaluate.Config(**given, max_new_tokens=1, output=str(tmp_path))
    ).rows
    found = {row.metric: row.n for row in rows}
    found |= {
        row.category.removeprefix("preferences: "): row.n
        for row in rows
        if row.metric == "accuracy_longer"
    }
    assert {metric: found[metric] for metric in expected} == expected
    left_out = json.loads((tmp_path / "evaluation.json").read_text("utf-8"))["left_out"]
    assert sum(sum(reasons.values()) for reasons in left_out.values()) == dropped


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": (), "preferences": ()}, "nothing to evaluate by"),
        ({"num_samples": 0}, "--num-samples .* got 0"),
        ({"temperature": 1e-7}, "--temperature must be at least 1e-06, got 1e-07"),
        ({"template": "x"}, "--template .*{prompt}, got 'x'"),
        ({"against": "x", "reward_model": None}, "--against: a win rate needs --reward-model"),
        ({"reward_model": "run"}, "run/model: this model has no score head"),
        ({"max_new_tokens": 60}, "12 tokens, more than the 3"),
        (
            {"categories": "broken.yaml", "preferences": ()},
            "broken.yaml: tea.score mine.py:none: no such file",
        ),
        ({"against": "x", "prompts": ()}, "--against: a win rate needs --prompts"),
        (
            {"run": "rm"},
            "this is a reward model, which writes no text: .* not by --prompts, --reward-model",
        ),
        ({"against": "rm", "preferences": ()}, "--against .*rm: this is a reward model"),
        ({"run": "nowhere", "output": None}, "no such folder"),
        ({"run": "framed"}, "was trained with the template"),
    ],
)
def test_mistakes(folders, given, message, tmp_path):
    paths = {
        key: str(folders / given[key])
        for key in ("reward_model", "categories", "against")
        if given.get(key)
    }
    settings = {"output": str(tmp_path)} | given | paths
    with pytest.raises(UserError, match=message):
        evaluate.run(str(folders / settings.pop("run", "run")), config(folders, **settings))


def test_a_function_in_place_of_a_reward_model_reads_the_columns_of_the_prompts(folders, tmp_path):
    function = {"reward_model": f"{folders}/mine.py:is_tea", "output": str(tmp_path)}
    found = evaluate.run(folders / "run", config(folders, preferences=(), **function))
    kinds = [row["kind"] == "tea" for row in PROMPTS]
    assert found.value("helpfulness", "quality") == pytest.approx(np.mean(kinds))
    assert 0 < sum(kinds) < len(kinds)
    counts = {row.metric: row.n for row in found.rows}
    assert (counts["uncertainty_answerable"], counts["uncertainty_unanswerable"]) == (2, 1)
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([pair | {"kind": "tea"} for pair in PAIRS]))
    with pytest.raises(UserError, match="kind"):  # given answers are scored without columns
        evaluate.run(folders / "run", config(folders, preferences=(str(pairs),), **function))


def test_the_table_fits_a_terminal_and_names_the_flags_that_would_tell_more(capsys):
    figures = [
        measures.Figure("helpfulness", "quality", -12.5, -13.25, -11.75, 3000, "prompts"),
        measures.Figure("helpfulness", "ended", None, note="word " * 20),
        measures.Figure("harmlessness", "all", note="not run: give --safety FILE"),
        measures.Figure("agreement", "all", note="not run: give --annotated FILE"),
        measures.Figure("agreement", "again", note="not run: give --annotated FILE"),
    ]
    lines = [*command_of_evaluate.lines(figures)]
    assert max(map(len, lines)) <= 80
    assert lines[1] == "helpfulness"
    assert " ".join(lines[2].split()) == "quality -12.500 -13.250 to -11.750 3000 prompts"
    assert lines[3].split() == ["ended", "–"]
    assert lines[4].startswith("    word word")
    assert lines[6:] == ["More is measured with --safety FILE, --annotated FILE"]


@pytest.mark.parametrize(
    ("given", "rewards", "expected"),
    [
        (None, ["rm"], "rm"),  # the run's folder
        (None, ["mean:rm/model,rm/model"], "mean:rm/model,rm/model"),
        ("length", ["rm"], "length"),
        (None, ["rm", "length"], None),
        (None, ["length"], None),
        (None, ["gone/model"], None),
        (None, ["mean:rm/model,gone/model"], None),
        (None, [], None),
    ],
)
def test_the_runs_own_reward_model_judges_by_default(
    folders, monkeypatch, given, rewards, expected
):
    monkeypatch.chdir(folders)
    monkeypatch.setattr(evaluate, "recorded", lambda folder: {"reward": rewards})
    policy = bench.Policy("run", None, {}, None, "auto", 8, is_judge=False)
    asked = evaluate.Config(prompts=("p",), reward_model=given)
    assert evaluate._with_judge(policy, asked).reward_model == expected
    against = dataclasses.replace(asked, against="other")
    if expected is None:
        with pytest.raises(UserError, match="--against: a win rate needs --reward-model"):
            evaluate._with_judge(policy, against)


def test_a_reward_of_somebody_elses_run_is_no_code_and_needs_trust_elsewhere(folders, monkeypatch):
    """Also where a folder that looks like a model has the name of a Python function."""
    monkeypatch.chdir(folders)
    model = folders / "rm" / "model"
    trap = folders / "trap.py:score"
    shutil.copytree(model, trap)
    policy = bench.Policy("run", None, {}, None, "auto", 8, is_judge=False)
    asked = evaluate.Config(prompts=("p",))
    for reward, trusts, expected in [
        (["trap.py:score"], True, None),
        (["trap.py:score*2"], True, None),
        ([str(model)], True, str(model)),
        ([str(model)], False, UserError),
        (["rm"], False, "rm"),
        (["../rm"], False, None),  # there is none
        (["pairs:judge:rm"], True, None),
    ]:
        monkeypatch.setattr(evaluate, "recorded", lambda folder, given=reward: {"reward": given})
        config = dataclasses.replace(asked, trust_config=trusts)
        if expected is UserError:
            with pytest.raises(UserError, match=r"run/config\.yaml: reward .*\n.*--trust-config"):
                evaluate._with_judge(policy, config)
        else:
            assert evaluate._with_judge(policy, config).reward_model == expected
    shutil.rmtree(trap)


def test_a_model_of_no_run_has_the_same_slots_in_every_command(folders, tmp_path):
    shutil.copytree(folders / "run" / "model", tmp_path / "model")
    policy = bench.load(str(tmp_path / "model"), evaluate.Config(prompts=("p",)))
    asked = asking.open_policy(str(tmp_path / "model"), asking.Settings())
    assert policy.max_new_tokens == asked.config.max_new_tokens
    assert policy.max_new_tokens == min(256, policy.model.config.max_length // 2)
