"""What `data check` prints: every problem with its place, lengths, repetitions and what files
share.
"""

import os
from pathlib import Path

import pytest
from builders import slow

from rlhf_jax import cli
from rlhf_jax.config import RunConfig, data_source
from rlhf_jax.data import check
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError, logger
from rlhf_jax.training.common import initial


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_a_good_file(write):
    report = check.check([write([pair("a b c", "x y", "z"), pair("a", "x " * 20, "z z z")])])
    assert report.num_problems == 0
    assert report.text.startswith(
        """\
data.jsonl: JSON lines, 2 rows, 2 comparisons kept
  rows: 2 of prompt, chosen, rejected
  words of a prompt: median 2, 95% up to 3, longest 3
  words of a response: median 2.5, 95% up to 20, longest 20
  examples:
data.jsonl, line 1
"""
    )
    assert report.text.endswith("no problems")


def test_lengths_in_tokens_are_those_of_the_batches(write):
    path = write([{"prompt": "abc", "response": "ab"}])
    text = check.check([path], characters("abc")).text
    assert "tokens of a prompt: median 3" in text
    assert "tokens of a response: median 3" in text  # EOS included
    assert (
        "line 1: the tokenizer's alphabet lacks 'c'" in check.check([path], characters("ab")).text
    )


def test_every_problem_is_named(write):
    text = """\
{"prompt": "a", "response": "b"}
{"prompt": "a", "respnse": "b"}
{"prompt": "a", "response": 3}
{"prompt": "a" "response": "b"}
{"prompt": "a", "prompt": "b", "response": "c"}
"a"
{"prompt": "c", "response": "b"}"""
    report = check.check([write(text)])
    assert report.text.startswith(
        """\
data.jsonl: JSON lines, 7 rows, 2 demonstrations kept
  rows: 3 of prompt, response; 1 of prompt; 1 of text
  problems: 5
    data.jsonl, line 2: expected keys prompt, response, found prompt, respnse; \
did you mean 'response' by 'respnse'?
    data.jsonl, line 3: 'response' must be a string, found the number 3
    data.jsonl, line 4: not valid JSON, expecting ',' delimiter at column 16
    data.jsonl, line 5: not valid JSON, the key 'prompt' occurs twice in \
{'prompt': 'b', 'response': 'c'}
    data.jsonl, line 6: expected an object with keys prompt, response, found a string
"""
    )
    assert report.text.endswith("\n\nproblems: 5, warnings: 0; a run would stop")
    report = check.check(
        [
            write(
                [
                    *[{"prompt": "a", "response": "b"}] * 61,
                    *[{"prompt": "a", "response": i} for i in range(30)] * 2,
                ]
            )
        ]
    )
    assert report.num_problems == 60
    first = (
        "\n  problems: 60\n    2 rows: 'response' must be a string, found the number 0 "
        "(data.jsonl, line 62, line 92)\n"
    )
    assert first in report.text
    assert "    and 10 more" in report.text


def test_missing_files_are_problems_too(write):
    write("[]", "data.json")
    report = check.check(["dta.json", "data.json", write([{"prompt": "a", "response": "b"}])])
    assert report.num_problems == 2
    assert "  problems: 1\n    dta.json: no such file; did you mean data.json?" in report.text
    assert "data.json: holds no rows" in report.text
    assert "a row must have the keys" not in report.text
    assert "1 demonstrations kept" in report.text
    with pytest.raises(UserError, match="no data file given"):
        check.check([])


def test_repetitions_equal_responses_and_opposite_preferences(write):
    rows = [
        pair("p", "x", "y"),
        pair("p", "x", "x"),
        pair("p", "x", "y"),
        pair("p", "y", "x"),
        pair("q", "y", "x"),
    ]
    report = check.check([write(rows)])
    assert report.num_problems == 0
    assert (
        """
  dropped, chosen and rejected are identical: 1
    data.jsonl, line 2
  duplicates: 1
    data.jsonl, line 3 repeats line 1
  opposite preferences: 1
    data.jsonl, line 4 prefers what line 1 rejects
  words"""
        in report.text
    )


def test_a_demonstration_that_comes_twice_is_no_opposite_preference(write):
    text = check.check([write([{"prompt": "p", "response": "r"}] * 2)]).text
    assert "  duplicates: 1\n    data.jsonl, line 2 repeats line 1\n  words" in text


def test_what_files_share(write):
    train = write([pair("p", "x", "y"), pair("q", "x", "y"), pair("r", "x", "y")], "train.jsonl")
    test = write([pair("p", "x", "y"), pair("q", "x", "z"), pair("s", "x", "y")], "test.jsonl")
    text = check.check([train, test, write("q\ns\nt\n", "prompts.txt")]).text
    assert (
        "test.jsonl shares 2 prompts with train.jsonl; 1 of its 3 rows are in that file too\n"
        in text
    )
    assert (
        "prompts.txt shares 2 prompts with test.jsonl; 0 of its 3 rows are in that file too\n"
        in text
    )


def test_kinds_and_labels(write):
    mixed = [pair("p", "x", "y"), {"prompt": "p", "responses": ["x"], "targets": [1]}]
    assert (
        "data.jsonl, line 1: has no targets but data.jsonl, line 2 has;"
        in check.check([write(mixed)]).text
    )
    path = write([pair("p", "x", "y")])
    assert "1 demonstrations kept" in check.check([path], kind="demonstrations").text
    assert check.check([write([{"prompt": "p"}])], kind="comparisons").num_problems == 1


def test_preview_shows_rows_as_a_run_reads_them(write):
    rows = [
        {"prompt": "p\nq\x1b[2J", "chosen": "x", "rejected": "x"},
        {"prompt": "p\nq\x1b[2J", "responses": ["x", "y", "z"], "best": 1},
        {"prompt": [{"role": "user", "content": "hi"}], "chosen": "a", "rejected": "b"},
        {"prompt": "r", "responses": ["x", "y"], "targets": [1, 0.5]},
    ]
    path = write(rows)
    assert check.preview(path, count=2).split("\n\n") == [
        "data.jsonl: JSON lines, 4 rows, comparisons",
        "data.jsonl, line 2\n  prompt:\n    | p\n    | q\\x1b[2J\n  response 0:\n    | x\n"
        "  response 1 (best):\n    | y\n  response 2:\n    | z",
        "data.jsonl, line 3\n  prompt:\n    | User:\n    | hi\n    | \n    | Assistant:\n    | \n  "
        "chosen:\n    | a\n"
        "  rejected:\n    | b",
        "  dropped, chosen and rejected are identical: 1\n    data.jsonl, line 1",
    ]
    assert "response 1 (target 0.5):" in check.preview(path, count=9)
    assert check.preview(write([{"prompt": "p", "topic": "tea"}])).endswith(
        "\n    | p\n  topic: 'tea'"
    )
    ids = write([{"query": [2], "sample0": [3], "sample1": [4], "best": 0}])
    assert "chosen:\n    | token ids 3" in check.preview(ids)
    assert "chosen:\n    | b" in check.preview(ids, characters("abc"))
    with pytest.raises(UserError, match="no such file"):
        check.preview("nothing.json")


# A row that is read as something else than was meant, and the warning.
SLIPS = [
    (
        {"prompt": "a", "choosen": "b", "rejected": "c"},
        "'choosen' is not read; did you mean 'chosen'?",
    ),
    ({"prompt": "a", "chosen": "b"}, "'chosen' is not read without the other one of a pair"),
    ({"prompt": "a", "respnse": "b"}, "'respnse' is not read; did you mean 'response'?"),
    ({"prompt": "a", "output": "b"}, "'output' is not read; did you mean 'response'?"),
    ({"prompt": "a", " response": "b"}, "' response' is not read; did you mean 'response'?"),
    (
        {"prompt": "a", "prompt_id": 1, "Response": "b"},
        "'Response' is not read; did you mean 'response'?",
    ),
    (
        {"prompt": "a", "response": "b", "message": []},
        "'message' is not read; did you mean 'messages'?",
    ),
    ({"prompt": "a", "cmpletion": "b"}, "'cmpletion' is not read; did you mean 'completion'?"),
    (
        {"prompt": "a", "response": "b", "helpfullness": 1},
        "'helpfullness' is not read; did you mean 'helpfulness'?",
    ),
]
USUAL = [
    {"answer": "b"},
    {"labels": [1]},
    {"turn": 1, "sample": 2},
    {"question": "b", "score": 1},
    {"question_id": 1},
]


@pytest.mark.parametrize("columns", USUAL)
def test_usual_columns_of_prompts_are_no_slips(columns, write):
    assert check.check([write([{"prompt": "a"} | columns])]).text.endswith("no problems")


def test_a_file_without_a_usable_row_is_reported_with_a_tokenizer_too(write):
    for row in ({"prompt": ""}, {"prompt": "a", "chosen": "b", "rejected": "b"}, {"key": 1}):
        report = check.check([write([row])], characters("ab"))
        assert "1 rows, 0 " in report.text


def test_a_long_column_is_cut_in_a_report(write):
    path = write([{"prompt": "a", "chosen": "b" * 999, "rejected": "c"}])
    text = check.check([path], kind="prompts").text
    assert max(map(len, text.split("\n"))) < 250


@pytest.mark.parametrize(("row", "warning"), SLIPS)
def test_a_key_that_looks_like_a_slip_is_a_warning(write, row, warning):
    text = check.check([write([row, row])]).text
    assert f"  warning: the key {warning}" in text
    assert "(2 rows: data.jsonl, line 1, line 2)" in text
    assert "\n\nproblems: 0, warnings: " in text


@pytest.mark.parametrize(
    ("name", "key"), [("preference_data.json", "chosen"), ("sft_data.json", "output")]
)
def test_the_pipelines_names_say_the_kind(write, name, key):
    report = check.check([write([{"prompt": "a", key: "b"}], name)])
    assert report.num_problems == 1
    assert f"found prompt, {key}" in report.text


def test_columns_and_bad_rows_of_check_and_of_a_stage(write, capsys, caplog, monkeypatch):
    path = write([{"prompt": "a", "answer": "b", "id": 3}, {"prompt": "c", "answer": "", "id": 4}])
    assert "  columns for the reward: answer (2 rows), id (2 rows)" in check.check([path]).text
    assert (
        cli.run(["data", "check", path, "--columns", "response=answer", "--on-bad-row", "drop"])
        == 0
    )
    text = capsys.readouterr().out
    assert "1 demonstrations kept" in text
    assert "  keys that training does not read: id (1 rows)" in text
    assert "  dropped, 'response' is empty: 1\n    data.jsonl, line 2" in text
    assert text.endswith("no problems\n")
    config = RunConfig(data=(path,), columns=("response=answer",), on_bad_row="drop")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level("INFO"):
        rows = initial.stage_rows(data_source(config), "demonstrations", ())
    assert rows.dropped == {"'response' is empty": 1}
    # A run names it too.
    assert "demonstrations: keys that training does not read: id (1 rows)" in caplog.messages
    voted = {
        "instruction": "a",
        "response1": "b",
        "response2": "c",
        "annotator1": 1,
        "annotator2": 2,
    }
    text = check.check([write([voted])]).text
    assert (
        "1 annotated kept\n  rows: 1 of instruction, response1, response2, annotator1\n  words"
        in text
    )
    assert "  response 2:\n    | c\n  votes: 1, 2" in text


def test_a_label_is_a_misspelling_beside_steps_alone(write):
    text = check.check([write([{"prompt": "a", "label": "safe"}])]).text
    assert text.endswith("no problems")
    text = check.check([write([{"prompt": "a", "steps": ["b"], "label": [True]}])]).text
    assert "'label' is not read; did you mean 'labels'?" in text


def test_a_plain_text_has_no_prompt(write):
    path = write("a bc\n\nab", "book.txt")
    for tokenizer, count in (
        (None, "words of a response: median 3"),
        (characters("abc\n "), "tokens of a response: median 9"),  # EOS included
    ):
        text = check.check([path], tokenizer, kind="demonstrations").text
        assert count in text
        assert "prompt" not in text
        assert "  response:\n    | a bc\n    | \n    | ab" in text
        assert text.endswith("no problems")


# The form that the report names, rows and kept rows, counted apart from the library.
RAW = {
    "hh_rlhf/harmless-base-test.dev.jsonl.gz": ("pairs", "JSON lines, gzipped", 1163, 1160),
    "hhh/hhh_alignment.dev.jsonl": ("pairs", "JSON lines", 113, 113),
    "oasst/en_trees_first70.jsonl": ("pairs", "JSON lines", 70, 507),
    "pandalm/testset-v1.dev.json": ("annotated", "JSON list", 445, 412),
    "gsm8k/train_first2000.jsonl": ("demonstrations", "JSON lines", 2000, 2000),
    "xstest/xstest_prompts.csv": ("prompts", "CSV", 450, 450),
    "forms/alpaca_en_demo.first150.json": ("demonstrations", "JSON list", 150, 150),
    "forms/dpo_en_demo.first60.json": ("pairs", "JSON list", 60, 60),
    "forms/kto_en_demo.first60.json": ("feedback", "JSON list", 60, 96),
}

LARGE = [name for name in RAW if name.startswith(("hh_rlhf", "oasst", "gsm8k"))]


@pytest.mark.skipif(
    "RLHF_JAX_DATA" not in os.environ, reason="RLHF_JAX_DATA names no folder of public data files"
)
@pytest.mark.parametrize("name", [slow(name) if name in LARGE else name for name in RAW])
def test_published_files_as_they_are(name):
    kind, form, num_rows, num_kept = RAW[name]
    path = str(Path(os.environ["RLHF_JAX_DATA"], name))
    columns = ("prompt=question", "response=answer") if "gsm8k" in name else ()
    report = check.check([path], kind=kind, columns=columns, on_bad_row="drop")
    assert report.text.startswith(f"{path}: {form}, {num_rows} rows, {num_kept} {kind} kept\n")
    assert report.text.endswith("\nno problems")
    num_bad = check.check([path], kind=kind, columns=columns).num_problems
    assert num_bad == max(num_rows - num_kept, 0)  # a row may become several
