"""What `data check` finds: every problem with its place, lengths, repetitions and what files share."""

import json

import pytest

from rlhf_jax.data import check, preview
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def save(rows, name="data.jsonl"):
        lines = rows if isinstance(rows, str) else "\n".join(json.dumps(row) for row in rows)
        (tmp_path / name).write_text(lines, encoding="utf-8")
        return name

    return save


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_a_good_file(write):
    path = write([pair("a b c", "x y", "z"), pair("a", "x " * 40, "z z z")])
    report = check.check([path])
    [file] = report.files
    assert (file.format, file.kind, file.forms) == ("JSON lines", "comparisons", {"prompt, chosen, rejected": 2})
    assert (file.num_records, file.kept, file.dropped, report.num_problems) == (2, 2, {}, 0)
    prompts, responses = file.lengths["prompt"], file.lengths["response"]
    assert (prompts.counts, prompts.edges, prompts.median) == ([0, 1, 0, 1], [0, 1, 2, 3, 4], 2.0)
    assert (responses.counts, responses.edges[:3], responses.longest) == ([3, 0, 0, 0, 0, 0, 0, 0, 1], [0, 5, 10], 40)
    text = preview.render(report)
    assert "data.jsonl: JSON lines, 2 rows, 2 comparisons kept" in text
    assert "words of a response: median 2.5, 95% up to 40, longest 40" in text
    assert "    0 to  4        3 ########################################" in text
    assert "    40 to 44        1 #############" in text
    assert text.endswith("no problems")


def test_lengths_in_tokens_are_those_of_the_batches(write):
    path = write([{"prompt": "abc", "response": "ab"}])
    [file] = check.check([path], characters("abc")).files
    assert (file.lengths["prompt"].longest, file.lengths["response"].longest) == (3, 3)  # EOS included
    report = check.check(
        [write([{"prompt": "abc", "response": "ab"}, {"prompt": "ax", "response": "b"}])], characters("abc")
    )
    assert report.files[0].problems.first == [
        "data.jsonl, line 2: the tokenizer's alphabet lacks 'x' (U+0078), found in 'ax'"
    ]


def test_every_problem_is_named(write):
    rows = [
        '{"prompt": "a", "response": "b"}',
        '{"prompt": "a", "respnse": "b"}',
        '{"prompt": "a", "response": 3}',
        '{"prompt": "a", "response": "b"',
        '{"prompt": "a", "prompt": "b", "response": "c"}',
        '"a"',
        '{"prompt": "c", "response": "b"}',
    ]
    report = check.check([write("\n".join(rows))])
    assert report.files[0].kept == 3
    assert sorted(report.files[0].problems.first) == [
        "data.jsonl, line 2: expected keys prompt, response, found prompt, respnse; did you mean 'response' by "
        "'respnse'?",
        "data.jsonl, line 3: 'response' must be a string, found the number 3",
        "data.jsonl, line 4: not valid JSON, expecting ',' delimiter at column 32",
        "data.jsonl, line 5: the key 'prompt' stands twice in one object",
        "data.jsonl, line 6: expected an object with keys prompt, response, found a string",
    ]
    text = preview.render(report)
    assert "  problems: 5\n    data.jsonl, line 4" in text
    assert text.endswith("5 problems: a run would stop at the first")


def test_many_problems_are_counted(write):
    good = [{"prompt": "a", "response": "b"}] * 31
    report = check.check([write([*good, *[{"prompt": "a"}] * 30])])
    assert (report.num_problems, len(report.files[0].problems.first)) == (30, check.NUM_PROBLEMS)
    assert "and 10 more" in preview.render(report)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "data.json", "data.json: is empty"),
        ("[]", "data.json", "data.json: is an empty list"),
        (
            '[{"prompt": "a", "response": "b"}\n{"prompt": "c"}]',
            "data.json",
            "data.json, line 2: expected ',' or ']' after a row, found '{'",
        ),
        (
            '[{"prompt": "a"}, {"prom',
            "data.json",
            "data.json, line 1: the file is cut off inside the row that starts here",
        ),
        ("prompt\na,b\nc\n", "data.csv", "data.csv, line 2: 2 cells under a header of 1; quote cells"),
        ('[{"promt": "a", "chosn": "b", "rejected": "c"}]', "data.json", "did you mean 'prompt' by 'promt'?"),
    ],
)
def test_problems_of_files_without_good_rows(write, content, name, message):
    report = check.check([write(content, name)])
    assert report.num_problems == 1
    assert message in preview.render(report)


def test_missing_files_are_problems_too(write):
    write("[]", "data.json")
    report = check.check(["dta.json", write([{"prompt": "a", "response": "b"}])])
    assert report.files[0].problems.first == ["dta.json: no such file; did you mean data.json?"]
    assert report.files[1].kept == 1
    with pytest.raises(UserError, match="no data file given"):
        check.check([])


def test_repetitions_equal_responses_and_opposite_preferences(write):
    rows = [pair("p", "x", "y"), pair("p", "x", "x"), pair("p", "x", "y"), pair("p", "y", "x"), pair("q", "y", "x")]
    [file] = check.check([write(rows)]).files
    assert file.duplicates == check.Finding(1, ["data.jsonl, line 3 repeats line 1"])
    assert file.reversed == check.Finding(1, ["data.jsonl, line 4 prefers what line 1 rejects"])
    assert file.dropped == {"chosen and rejected are identical": check.Finding(1, ["data.jsonl, line 2"])}
    assert file.problems.count == 0
    text = preview.render(check.check(["data.jsonl"]))
    assert "  dropped, chosen and rejected are identical: 1\n    data.jsonl, line 2\n  duplicates: 1\n" in text


def test_what_files_share(write):
    train = write([pair("p", "x", "y"), pair("q", "x", "y"), pair("r", "x", "y")], "train.jsonl")
    test = write([pair("p", "x", "y"), pair("q", "x", "z"), pair("s", "x", "y")], "test.jsonl")
    prompts = write("q\ns\nt\n", "prompts.txt")
    report = check.check([train, test, prompts])
    assert report.overlaps == [
        check.Overlap(train, test, prompts=2, rows=1, num_rows=3),
        check.Overlap(train, prompts, prompts=1, rows=0, num_rows=3),
        check.Overlap(test, prompts, prompts=2, rows=0, num_rows=3),
    ]
    text = preview.render(report)
    assert "test.jsonl shares 2 prompts with train.jsonl; 1 of its 3 rows stand there too" in text


def test_mixed_labels_are_a_problem(write):
    rows = [pair("p", "x", "y"), {"prompt": "p", "responses": ["x"], "targets": [1]}]
    [file] = check.check([write(rows)]).files
    assert file.problems.first[0].startswith("data.jsonl, line 2: some rows have targets and others a preference")


def test_the_kind_can_be_said(write):
    path = write([pair("p", "x", "y")])
    assert check.check([path], kind="demonstrations").files[0].kind == "demonstrations"
    assert check.check([write([{"prompt": "p"}])], kind="comparisons").num_problems == 1


def test_preview_shows_rows_as_a_run_reads_them(write):
    rows = [
        {"prompt": "p\nq\x1b[2J", "chosen": "x", "rejected": "x"},
        {"prompt": "p\nq\x1b[2J", "responses": ["x", "y", "z"], "best": 1},
        {"prompt": [{"role": "user", "content": "hi"}], "chosen": "a", "rejected": "b"},
        {"prompt": "r", "responses": ["x", "y"], "targets": [1, 0.5]},
    ]
    path = write(rows)
    text = preview.preview(path, count=2)
    assert text.split("\n\n") == [
        "data.jsonl: JSON lines, 4 rows, comparisons",
        "data.jsonl, line 2\n  prompt:\n    | p\n    | q\\x1b[2J\n  response 0:\n    | x\n"
        "  response 1 (best):\n    | y\n  response 2:\n    | z",
        "data.jsonl, line 3\n  prompt:\n    | User:\n    | hi\n    | \n    | Assistant:\n    | \n  chosen:\n    | a\n"
        "  rejected:\n    | b",
        "dropped before these: 1 (chosen and rejected are identical)",
    ]
    assert "response 1 (target 0.5):" in preview.preview(path, count=9)
    prompts = write([{"prompt": "p", "topic": "tea"}])
    assert preview.preview(prompts).endswith("line 1\n  prompt:\n    | p\n  topic: 'tea'")
    ids = write([{"query": [2], "sample0": [3], "sample1": [4], "best": 0}])
    assert "chosen:\n    | token ids 3" in preview.preview(ids)
    assert "chosen:\n    | b" in preview.preview(ids, characters("abc"))
    with pytest.raises(UserError, match="no such file"):
        preview.preview("nothing.json")
