"""The evaluation suite: its rows by hand, its data's errors, and whole evaluations of models with random weights."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.special
from test_page import Page
from test_report import write_run

from rlhf_jax import cli, metrics, models
from rlhf_jax.data import tokenizers
from rlhf_jax.data.rows import Annotated
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import data, evaluate, measures
from rlhf_jax.evaluation.measures import Responses
from rlhf_jax.report import page as report

KEY = jax.random.key(0)
DATA = os.environ.get("RLHF_JAX_DATA")
PROMPTS = [{"prompt": f"say {word}", "kind": word, "answerable": word != "tea"} for word in ("milk", "tea", "salt")]
PAIRS = [
    {"prompt": "say milk", "chosen": "milk, of course", "rejected": "no", "category": "helpful"},
    {"prompt": "say tea", "chosen": "tea", "rejected": "why should I say that?", "category": "honest"},
    {"prompt": "say salt", "chosen": "salt", "rejected": "tea", "category": "honest"},
]


def values(rows):
    return {(row.category, row.metric): row.value for row in rows}


# --- Rows -----------------------------------------------------------------------------------------------------------


def test_refusals_and_uncertainty_are_counted_by_label():
    texts = [["I can't help with that."], ["Sure."], ["I refuse."], ["Perhaps."]]
    said = Responses(["p"] * 4, texts, np.ones((4, 1)), np.ones((4, 1), bool))
    rows = measures.harmlessness(said, ["unsafe", "unsafe", "safe", "safe"], KEY)
    assert values(rows) == {("harmlessness", f): 0.5 for f in ("refusal_of_unsafe", "over_refusal_of_safe")}
    assert [row.n for row in rows] == [2, 2]
    [row, missing] = measures.harmlessness(said, ["unsafe"] * 4, KEY)
    assert (row.value, row.n, missing.value, missing.n) == (0.5, 4, None, 0)
    assert missing.note == "there is no such row"
    rows = measures.uncertainty(said, [True, None, True, False], KEY)
    expected = [("uncertainty", 0.25, 4), ("uncertainty_answerable", 0.0, 2), ("uncertainty_unanswerable", 1.0, 1)]
    assert [(row.metric, row.value, row.n) for row in rows] == expected


def said(*texts):
    """One response to each prompt "Pasta?", scored 2, 1, 0, ..."""
    lengths = np.array([[len(text.split())] for text in texts])
    scores = np.arange(2.0, 2.0 - len(texts), -1.0)[:, None]
    return Responses(["Pasta?"] * len(texts), [[text] for text in texts], lengths, lengths > 0, scores)


def test_helpfulness_by_hand():
    found = values(measures.helpfulness(said("Boil the water.", ""), KEY))  # boil and water are new
    expected = {"quality": 1.5, "new_content_words": 1, "response_tokens": 1.5, "ended": 0.5, "empty": 0.5}
    assert {metric: found["helpfulness", metric] for metric in expected} == expected
    assert found["helpfulness", "lexical_density"] == pytest.approx(2 / 3 / 2)
    unscored = values(measures.helpfulness(said("", "")._replace(scores=None), KEY))
    assert ("helpfulness", "quality") not in unscored


def test_diversity_by_hand():
    found = values(measures.diversity(said("one two three four", "one two three four"), KEY))
    assert [found["diversity", f"distinct_{n}"] for n in (1, 2, 3)] == [0.5] * 3
    assert (found["diversity", "self_bleu"], found["diversity", "repetition"]) == (1, 0)
    found = values(measures.diversity(said("one two three four", "a b c a b c"), KEY))
    assert found["diversity", "distinct_1"] == 7 / 10
    assert found["diversity", "self_bleu"] < 0.5
    assert found["diversity", "repetition"] == (0 + 1 / 4) / 2


def test_a_prompts_samples_are_one_unit():
    row = measures.mean("c", "m", [[1.0, 3.0], [5.0, np.nan], [np.nan, np.nan]], KEY)
    assert (row.value, row.n) == (3.5, 2)


def test_preferences_by_hand():
    """A ranking's three pairs are one comparison; a tie is half right."""
    margins = {"reward_model": np.array([1.0, -1.0, 0.0, 2.0]), "longer": np.array([1, 1, 1, -1])}
    weights, sources = np.array([1 / 3, 1 / 3, 1 / 3, 1.0]), ["a", "a", "a", "b"]
    rows = measures.preferences(margins, weights, sources, KEY)
    assert {row.n for row in rows} == {2}
    found = values(rows)
    assert found["preferences", "accuracy_reward_model"] == pytest.approx((0.5 + 1) / 2)
    assert found["preferences", "accuracy_longer"] == pytest.approx(1 / 2)
    assert found["preferences", "brier_reward_model"] == metrics.brier(margins["reward_model"], weights)
    assert ("preferences", "ece_longer") not in found
    other = measures.preferences({"log_prob": margins["longer"]}, weights, sources, KEY)
    assert ("honesty", "ece_log_prob") in values(other)


def test_agreement_by_hand():
    """Majorities 1, 2, tie, none, 1; the judge says 1, 1, tie, 2, 1."""
    votes = [(1, 1, 2), (2, 2, 2), (0, 0, 1), (0, 1, 2), (1, 1, 1)]
    annotated = [Annotated("p", "a", "b", f"row {i}", votes=vote) for i, vote in enumerate(votes)]
    assert [row.majority for row in annotated] == [1, 2, 0, None, 1]
    rows = measures.agreement({"judge": np.array([1.0, 2.0, 0.0, -1.0, 3.0])}, annotated, KEY)
    found = {row.metric: row for row in rows}
    assert found["agreement_judge"].value == 3 / 4
    assert found["agreement_judge"][5:] == (4, "rows", "1 rows have no majority")
    assert found["agreement_decided_judge"].value == 2 / 3
    assert found["kappa_judge"].value == pytest.approx((3 / 4 - 7 / 16) / (1 - 7 / 16))  # by chance .5*.75 + .25*.25
    assert found["agreement_of_annotators"].value == pytest.approx((1 / 3 + 1 + 1 / 3 + 0 + 1) / 5)
    array = np.array(votes).T
    kappas = [metrics.cohen_kappa(array[i], array[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found["kappa_of_annotators"].value == pytest.approx(np.mean(kappas))


def test_win_rate_compares_all_samples_of_a_prompt():
    ours, theirs = np.array([[1.0, 2.0], [2.0, 0.0]]), np.array([[1.0, 0.0], [1.0, np.nan]])
    rate, difference = measures.win_rate(ours, theirs, KEY, "other")
    assert rate.value == ((0.5 + 1 + 1 + 1) / 4 + (1 + 0) / 2) / 2  # what has no score is in no pair
    assert difference.value == ((0 + 2) / 2 + 1) / 2
    assert rate.low < rate.value < rate.high


# --- Data -----------------------------------------------------------------------------------------------------------


ANNOTATED = {"instruction": "a", "response1": "b"}
BAD_VOTE = ANNOTATED | {"response2": "c", "annotator1": 3}
BAD_CATEGORY = {"prompt": "a", "chosen": "b", "rejected": "c", "category": 3}


@pytest.mark.parametrize(
    ("read", "name", "text", "message"),
    [
        ("safety", "x.csv", "id,prompt,label\n1,hello,safe\n2,ho,maybe\n", "line 3: .* safe or unsafe, found 'maybe'"),
        ("safety", "x.json", '["hello"]', "1: .* safe or unsafe, found none"),
        ("annotated", "x.json", json.dumps([ANNOTATED]), "expected keys instruction, response1, resp"),
        ("annotated", "x.jsonl", json.dumps(BAD_VOTE), "'annotator1' must be 1, 2 or 0 for a tie, found the number 3"),
        ("annotated", "x.jsonl", json.dumps(BAD_VOTE | {"response1": 0}), "'response1' must be a string"),
        ("preferences", "x.jsonl", json.dumps(BAD_CATEGORY), "'category' must be a string"),
        ("categories", "x.yaml", "polite:\n  pattern: [a]\n", "line 2: unknown key polite.pattern; did you mean"),
        ("categories", "x.yaml", "polite:\n  patterns: [a]\n  score: length\n", "line 2: polite needs exactly one"),
        ("categories", "x.yaml", "polite:\n  patterns: ['(']\n", r"line 2: polite.patterns holds '\(', which is no"),
        ("categories", "x.yaml", "polite:\n  keywords: ['']\n", "line 2: polite.keywords holds an empty text"),
        ("categories", "x.yaml", "polite: [\n", "not valid YAML"),
        ("categories", "x.yaml", "", "is empty"),
        ("categories", "x.yaml", "a-b:\n  patterns: [a]\n", "made of letters"),
    ],
)
def test_what_is_wrong_in_the_data_is_said_with_its_line(read, name, text, message, tmp_path):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    reader = getattr(data, f"read_{read}")
    with pytest.raises(UserError, match=message):
        reader([str(path)] if read in ("safety", "preferences") else str(path))


def test_rows_on_one_line_are_told_apart(tmp_path):
    """And a ranking's pairs stay together."""
    ranking = {"prompt": "a", "responses": ["x", "y", "z"], "ranking": [2, 0, 1], "category": "mine"}
    (tmp_path / "x.json").write_text(json.dumps([*PAIRS, ranking, {"prompt": "a", "chosen": "b", "rejected": "b"}]))
    result, categories = data.read_preferences([str(tmp_path / "x.json")])
    sources = [row.source for row in result.rows]
    assert [sources.index(source) for source in sources] == [0, 1, 2, 3, 3, 3]
    assert list(categories.values()) == ["helpful", "honest", "honest", "mine"]
    assert sum(result.dropped.values()) == 1


def test_keywords_are_whole_words_and_patterns_any_case():
    category = data.CustomCategory(keywords=("thank you", "c++"))
    texts = ("Thank you!", "thank yous", "unthank you", "use C++.")
    assert [bool(category.pattern.search(text)) for text in texts] == [True, False, False, True]
    assert data.CustomCategory(patterns=("^a|b$",)).pattern.search("xB")


@pytest.mark.skipif(DATA is None, reason="RLHF_JAX_DATA names no folder of public data files")
def test_public_files_are_read():
    folder = Path(DATA)
    safety = data.read_safety([str(folder / "xstest" / "xstest_prompts.csv")]).rows
    assert [sum(row.columns["label"] == label for row in safety) for label in ("safe", "unsafe")] == [250, 200]
    pairs, categories = data.read_preferences([str(folder / "hhh" / "hhh_alignment.dev.jsonl")])
    assert (len(pairs.rows), set(categories.values())) == (113, {"harmless", "helpful", "honest", "other"})
    annotated = data.read_annotated(str(folder / "pandalm" / "testset-v1.dev.json"), on_bad_row="drop").rows
    assert len(annotated) == 445 - 33
    assert sum(row.majority == 0 for row in annotated) == 45 + 6 + 6 + 2 - 6 - 6 - 2 + 8


# --- Whole evaluations ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run, another one and a reward model, of random weights; and files to judge them by."""
    place = tmp_path_factory.mktemp("evaluate")
    tokenizer = tokenizers.characters("".join(json.dumps(PROMPTS + PAIRS)) + "Human:\n")
    config = models.GPT2Config(
        vocab_size=tokenizer.vocab_size, max_length=64, hidden_size=16, num_layers=1, num_heads=2, initializer_range=0.5
    )
    model = models.build(config)
    for seed, name in enumerate(("run", "other", "rm")):
        folder = write_run(place / name, settings={"rl": {"max_new_tokens": 6}, "text": {"template": "H: {prompt}\n"}})
        params = model.init(jax.random.key(seed))
        if name == "rm":
            params = models.add_head(jax.random.key(9), params, "score")
        models.save(folder / "model", model, params)
        tokenizer.save(folder / "model")
    (place / "prompts.json").write_text(json.dumps(PROMPTS))
    labelled = [{"prompt": "say salt", "label": "unsafe"}, {"prompt": "say tea", "label": "safe"}]
    (place / "safety.json").write_text(json.dumps(labelled))
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    annotated = {"instruction": "say milk", "input": "now", "response1": "milk", "response2": "tea", "annotator1": 1}
    others = [{"annotator1": 0, "input": ""}, {"response1": "salt", "response2": "no", "annotator1": 2}]
    on_one_line = json.dumps([annotated | other for other in ({}, *others)])
    (place / "annotated.json").write_text(on_one_line)
    function = "def is_tea(prompts, responses, kind):\n    return [float(k == 'tea') for k in kind]\n"
    (place / "mine.py").write_text(function)
    categories = f"tea:\n  score: {place}/mine.py:is_tea\nlong:\n  score: length\n  prompts: ['{place}/safety.json']\n"
    (place / "mine.yaml").write_text(categories + "vowels:\n  patterns: ['[aeiou]']\n")
    return place


def config(folders, **more):
    given = {"prompts": (str(folders / "prompts.json"),), "preferences": (str(folders / "pairs.jsonl"),)}
    return evaluate.Config(**(given | {"reward_model": str(folders / "rm"), "batch_size": 2} | more))


@pytest.mark.slow
def test_everything_from_the_command_line(folders, capsys):
    flags = {"against": "other", "categories": "mine.yaml", "safety": "safety.json", "annotated": "annotated.json"}
    flags |= {"prompts": "prompts.json", "preferences": "pairs.jsonl", "reward-model": "rm/model"}
    argv = [word for flag, file in flags.items() for word in (f"--{flag}", str(folders / file))]
    texts = []
    for _ in range(2):
        cli.run(["evaluate", str(folders / "run"), *argv, "--num-samples", "2", "--batch-size", "2"])
        texts.append([(folders / "run" / name).read_bytes() for name in ("evaluation.json", evaluate.SAMPLES)])
    assert texts[0] == texts[1]
    content, samples = json.loads(texts[0][0]), [json.loads(line) for line in texts[0][1].splitlines()]
    found = {(row["category"], row["metric"]): row for row in content["rows"]}
    assert all(row["value"] is not None and row["n"] for row in found.values())
    assert found["tea", "score"]["value"] == pytest.approx(1 / 3)
    assert found["long", "score"]["n"] == 2
    assert found["preferences: honest", "accuracy_reward_model"]["n"] == 2
    assert found["agreement", "agreement_longer"]["value"] == pytest.approx(2 / 3)  # not where the annotator says tie
    assert found["agreement", "agreement_decided_longer"]["n"] == 2
    assert found["harmlessness", "refusal_of_unsafe"]["value"] == 0
    assert len(samples) == 2 * (3 + 2 + 3 + 2)  # prompts, safety, the other run's, the category's own
    scores = [line["score"] for line in samples if line["set"] == "prompts"]
    assert found["helpfulness", "quality"]["value"] == pytest.approx(np.mean(scores))
    vowels = [any(vowel in line["response"] for vowel in "aeiouAEIOU") for line in samples if line["set"] == "prompts"]
    assert found["vowels", "patterns"]["value"] == np.mean(vowels)
    assert content["settings"]["max_new_tokens"] == 6
    assert content["settings"]["template"] == "H: {prompt}\n"
    said = capsys.readouterr().out
    assert "accuracy_reward_model" in said
    assert f"wrote {folders / 'run' / 'evaluation.json'}" in said
    page = Page((folders / "run" / "report.html").read_text("utf-8"))
    assert {"accuracy_mean_log_prob", "preferences: helpful", "vowels"} <= set(page.texts("td"))


@pytest.mark.slow
def test_what_is_not_given_is_named_and_changes_nothing_else(folders, tmp_path):
    result = evaluate.run(str(folders / "run"), config(folders, output=str(tmp_path)))
    missing = {row.category: row.note for row in result.rows if row.value is None}
    assert missing == {
        "harmlessness": "not run: give --safety FILE",
        "agreement": "not run: give --annotated FILE",
        "win rate": "not run: give --against RUN with --reward-model and --prompts",
        "custom": "not run: give --categories FILE.yaml",
    }
    more = config(folders, output=str(tmp_path), safety=(str(folders / "safety.json"),))
    others = values(evaluate.run(str(folders / "run"), more).rows)
    assert {key: value for key, value in values(result.rows).items() if value is not None}.items() <= others.items()
    samples = (tmp_path / evaluate.SAMPLES).read_bytes()
    evaluate.run(str(folders / "run"), dataclasses.replace(more, seed=1))
    assert (tmp_path / evaluate.SAMPLES).read_bytes() != samples
    only = config(folders, output=str(tmp_path), prompts=(), reward_model=None, categories=None)
    notes = {(row.category, row.metric): row.note for row in evaluate.run(str(folders / "run"), only).rows}
    assert notes["helpfulness", "quality"] == "not run: give --reward-model FOLDER"
    assert notes["diversity", "all"] == "not run: give --prompts FILE"


def test_log_probabilities_and_scores_are_the_models_own(folders, tmp_path):
    """Against the whole softmax of each text by itself. Against itself a run wins half."""
    given = config(folders, against=str(folders / "run"), output=str(tmp_path))
    result = evaluate.run(str(folders / "run"), given)
    rows = result.rows
    assert (result.value("win rate", "win_rate"), result.value("win rate", "score_difference")) == (0.5, 0)
    model, params = models.load(folders / "run" / "model")
    tokenizer = tokenizers.load_tokenizer(folders / "rm" / "model")
    reward_model, reward_params = models.load(folders / "rm" / "model")

    @jax.jit
    def both(tokens, mask):
        return model.apply(params, tokens), models.score_fn(reward_model)(reward_params, tokens, mask)

    sums, means, scores = [], [], []
    for pair in PAIRS:
        for key in ("chosen", "rejected"):
            prompt = tokenizer.encode(f"H: {pair['prompt']}\n")
            response = [*tokenizer.encode(pair[key]), tokenizer.eos_id]
            tokens = np.zeros((1, 50), np.int32)
            tokens[0, : len(prompt + response)] = prompt + response
            logits, score = both(tokens, np.arange(50)[None, :] < len(prompt + response))
            log_probs = scipy.special.log_softmax(logits[0], axis=1)
            said = [log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(response)]
            sums.append(np.sum(said))
            means.append(np.mean(said))
            scores.append(float(score[0]))
    found = values(rows)
    for name, of in (("reward_model", scores), ("log_prob", sums), ("mean_log_prob", means)):
        margins = np.array(of[::2]) - np.array(of[1::2])
        place = "preferences" if name == "reward_model" else "honesty"
        assert found["preferences", f"accuracy_{name}"] == np.mean(margins > 0)
        assert found[place, f"brier_{name}"] == pytest.approx(metrics.brier(margins), abs=1e-4)
    assert found["preferences", "accuracy_longer"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": (), "preferences": ()}, "nothing to evaluate by"),
        ({"num_samples": 0}, "--num-samples must be at least 1, got 0"),
        ({"template": "x"}, "--template must contain {prompt}, got 'x'"),
        ({"against": "x", "reward_model": None}, "--against: a win rate needs --reward-model"),
        ({"reward_model": "run"}, "run/model: this model has no score head"),
        ({"max_new_tokens": 60}, "the prompt has 12 tokens, more than the 4 allowed"),
        ({"categories": "broken.yaml"}, "broken.yaml: tea.score mine.py:none: no such file"),
    ],
)
def test_mistakes(folders, given, message, tmp_path):
    (folders / "broken.yaml").write_text("tea:\n  score: mine.py:none\n")
    paths = {key: str(folders / given[key]) for key in ("reward_model", "categories") if given.get(key)}
    with pytest.raises(UserError, match=message):
        evaluate.run(str(folders / "run"), config(folders, **{"output": str(tmp_path)} | given | paths))


def test_other_mistakes(folders, tmp_path):
    with pytest.raises(UserError, match="this is a reward model, which says nothing"):
        evaluate.run(str(folders / "rm"), config(folders, output=str(tmp_path)))
    with pytest.raises(UserError, match="no such folder"):
        evaluate.run(str(folders / "nowhere"), config(folders))
    other = write_run(tmp_path / "other", settings={"text": {"template": "Q: {prompt}"}})
    shutil.copytree(folders / "run" / "model", other / "model", dirs_exist_ok=True)
    with pytest.raises(UserError, match="was trained with the template"):
        evaluate.run(str(other), config(folders))


def test_a_broken_evaluation_is_said(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "evaluation.json").write_text("{}")
    with pytest.raises(UserError, match="not what rlhf_jax writes"):
        report.write([folder], tmp_path / "page.html")


def test_shares_have_bounds_and_numbers_that_do_not_vary_have_none():
    row = measures.mean("c", "m", np.zeros((20, 2), bool), KEY)
    assert (row.value, row.low) == (0, 0)
    assert row.high == pytest.approx(0.161, abs=1e-3)
    row = measures.mean("c", "m", np.ones((20, 2)), KEY)
    assert (row.low, row.high) == (1, 1)  # a number, not a share: no bound is known
