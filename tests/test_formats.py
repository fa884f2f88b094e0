"""Records as rows: what each format becomes, what is dropped, and sentences for wrong values."""

import re
from pathlib import Path

import numpy as np
import pytest
from builders import grid
from numpy.testing import assert_array_equal

from rlhf_jax.data import batches, demo, encoding, formats, rows
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
CHOICE = {"query": "p", "sample0": "a", "sample1": "b", "sample2": "c", "sample3": "d", "best": 2}
RANKED = {"prompt": "p", "responses": ["x", "y", "z"]}
W = "data.jsonl, line 1"


def dialogue(prompt, response):
    return f"\n\nHuman: {prompt}\n\nAssistant:{response}"


def pairs(*texts, weight):
    return [Row("p", (chosen, rejected), W, weight=weight) for chosen, rejected in texts]


HUMAN = "\n\nHuman: h\n\nAssistant:"
DIALOGUES = {"chosen": HUMAN + " yes", "rejected": HUMAN + " no"}
RIGHT_ONES = {"prompt": "p", "chosen": ["x", "y"], "rejected": ["z"]}
TIES = {"prompt": "p", "responses": ["x", "y", "x"], "ranks": [0, 1, 2]}
ORDER = pairs("xy", "zx", "zy", weight=1 / 3)
BEST = [Row("p", ("a", "b", "c", "d"), W, best=2)]
# The columns of a table may lack their last samples.
TWO = CHOICE | {"sample2": None, "sample3": None, "best": 1}
# A record, its prompt, and what it becomes: its demonstration's response, pairs, comparisons (None:
# as the pairs).
FORMATS = [
    (PAIR, "p", "good", [Row("p", ("good", "bad"), W)], None),
    (DIALOGUES, HUMAN, " yes", [Row(HUMAN, (" yes", " no"), W)], None),
    (CHOICE, "p", "c", pairs("ca", "cb", "cd", weight=1 / 3), BEST),
    (TWO, "p", "b", [Row("p", ("b", "a"), W)], None),
    *((RANKED | {"ranks": ranks}, "p", "z", ORDER, None) for ranks in ([1, 2, 0], [2.5, 3, 1])),
    (RANKED | {"ranking": [2, 0, 1]}, "p", "z", ORDER, None),
    (RANKED | {"ranks": [0, 1, 1]}, "p", "x", pairs("xy", "xz", weight=0.5), None),
    (RIGHT_ONES, "p", "x", pairs("xz", "yz", weight=0.5), None),
    (TIES, "p", "x", pairs("xy", "yx", weight=0.5), None),  # ties and equal texts make no pair
]


@pytest.mark.parametrize(("record", "prompt", "response", "as_pairs", "comparisons"), FORMATS)
def test_formats(write, record, prompt, response, as_pairs, comparisons):
    path = write([record])
    assert formats.read("demonstrations", path).rows == [Row(prompt, (response,), W)]
    assert formats.read("pairs", path).rows == as_pairs
    assert formats.read("comparisons", path).rows == (comparisons or as_pairs)
    [row] = formats.read("prompts", path).rows
    assert row.texts == (prompt,)


DIFFER = {"chosen": dialogue("a", " x"), "rejected": dialogue("b", " y")}
SILENT = {"chosen": dialogue("a", " x"), "rejected": dialogue("a", "")}
EMPTY = PAIR | {"rejected": ""}


def test_rows_that_teach_nothing_are_dropped_and_counted(write):
    equal = PAIR | {"rejected": "good"}
    tied = RANKED | {"ranks": [1, 1, 1]}
    same = {"prompt": "p", "responses": ["x", "x", "x"], "best": 0}
    result = formats.read("pairs", write([PAIR, equal, equal, tied, same]))
    assert len(result.rows) == 1
    assert result.places == {
        "chosen and rejected are identical": ["data.jsonl, line 2", "data.jsonl, line 3"],
        "all responses are ranked equal": ["data.jsonl, line 4"],
        "all responses are identical": ["data.jsonl, line 5"],
    }
    alike = {"prompt": "p", "responses": ["x", "x"], "best": 0, "targets": [1, 0]}
    assert formats.read("pairs", write([PAIR, alike])).dropped == {formats.ALL_EQUAL: 1}
    # Chosen responses and prompts are what they are.
    path = write([DIFFER, SILENT, SILENT])
    assert [row.responses[0] for row in formats.read("demonstrations", path).rows] == [" x"] * 3
    assert formats.read("prompts", path).dropped == {"repeated prompt": 2}
    result = formats.read("pairs", write([PAIR, *[equal] * 9]))
    places = "data.jsonl, line 2, line 3, line 4, line 5, line 6 and 4 more"
    assert result.describe() == f"1 rows, 9 dropped (chosen and rejected are identical: {places})"
    with pytest.raises(UserError, match=r"no usable row: .* 2 dropped \(chosen"):
        formats.read("pairs", write([equal, equal]))


def test_rows_that_a_stage_cannot_use_are_errors_together_or_dropped(write):
    path = write([PAIR, DIFFER, SILENT, EMPTY, EMPTY, PAIR | {"rejected": True}])
    with pytest.raises(UserError) as error:
        formats.read("pairs", path)
    assert str(error.value).split("\n") == [
        "data.jsonl, line 2: dialogues differ before the last response",
        "data.jsonl, line 3: dialogue without a last response",
        "2 rows: 'rejected' is empty (data.jsonl, line 4, line 5)",
        "data.jsonl, line 6: 'rejected' must be a string, found true or false",
        "--on-bad-row drop leaves such rows out and counts them",
    ]
    result = formats.read("pairs", path, on_bad_row="drop")
    assert [row.source for row in result.rows] == ["data.jsonl, line 1"]
    assert [*result.dropped.values()] == [1, 1, 2, 1]
    assert result.places["'rejected' is empty"] == ["data.jsonl, line 4", "data.jsonl, line 5"]
    with pytest.raises(UserError, match="the text ends there"):  # behind it nothing was read
        formats.read("prompts", write('["a", {"b', "cut.json"), on_bad_row="drop")


VOTED = {
    "instruction": "Add",
    "input": "1 2",
    "response1": "3",
    "response2": "4",
    "annotator1": 1,
    "annotator2": 0,
}
DATA_PAGE = (Path(__file__).resolve().parent.parent / "docs" / "data.md").read_text("utf-8")
COLUMNS = re.findall(r"^\| ([\w ]*\w).*`--columns ([^`]+)`", DATA_PAGE, re.MULTILINE)
ALPACA = {"instruction": "i", "input": "x", "output": "o"}
TURNS = [
    {"from": "system", "value": "s"},
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "hello"},
]
COMPLETIONS = [{"response": "a", "overall_score": 3}, {"response": "b", "overall_score": 1}]
TRUTHFUL = {"question": "p", "mc1_targets": {"choices": ["a", "b", "c"], "labels": [0, 0, 1]}}
TRUTHFUL_FILE = {"question": "p", "mc1_targets": {"a": 0, "b": 1}, "mc2_targets": {"a": 0, "b": 1}}
# A row of each data set in the page's recipes, and what its columns make of it.
RECIPES = [
    ("GSM8K", {"question": "q", "answer": "a"}, Row("q", ("a",), W)),
    ("Alpaca", ALPACA, Row("i\n\nx", ("o",), W)),
    ("Alpaca", ALPACA | {"input": ""}, Row("i", ("o",), W)),
    (
        "ShareGPT",
        {"conversations": TURNS},
        Row("System:\ns\n\nUser:\nhi\n\nAssistant:\n", ("hello",), W),
    ),
    ("TruthfulQA", TRUTHFUL, Row("p", ("a", "b", "c"), W, best=2)),
    ("TruthfulQA as published", TRUTHFUL_FILE, Row("p", ("b", "a"), W)),
    (
        "UltraFeedback",
        {"instruction": "p", "completions": COMPLETIONS},
        Row("p", ("a", "b"), W, None, (3.0, 1.0)),
    ),
    ("PandaLM", VOTED, Row("Add\n\n1 2", ("3", "4"), W, votes=(1, 0))),
    (
        "LLMBar",
        {"input": "i", "output_1": "x", "output_2": "y", "label": 2},
        Row("i", ("x", "y"), W, votes=(2,)),
    ),
]


@pytest.mark.parametrize(("name", "record", "expected"), RECIPES)
def test_recipes(write, name, record, expected):
    columns = dict(reversed(COLUMNS)).get(name, "").split()
    kind = "comparisons" if len(expected.responses) > 1 else "demonstrations"
    kind = "annotated" if expected.votes else kind
    assert formats.read(kind, write([record]), columns=columns).rows == [expected]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["prompt"], "--columns prompt: expected OURS=THEIRS, such as prompt=question"),
        (
            ["prompt=qestion"],
            "--columns prompt=qestion: no row has 'qestion'; did you mean question?",
        ),
        (
            ["responses=of.text"],
            "--columns responses=of.text: no row has 'of.text'; the keys are question, level, of",
        ),
        (["level=levle"], "--columns level=levle: no row has 'levle'; did you mean level?"),
        (["a=of.keys"], r"no row has 'of\.keys'"),  # of is a list
        (
            ["prompt=qestion", "level=levle"],
            r"has 'qestion'; did you mean question\?\n--columns level=levle: no row has 'levle'",
        ),
        (
            ["prompt=question+level"],
            r"line 1: question\+level joins texts with \+, found the number 3",
        ),
    ],
)
def test_faults_of_columns(write, columns, message):
    with pytest.raises(UserError, match=message):
        formats.read("prompts", write([{"question": "q", "level": 3, "of": [{}]}]), columns=columns)


VOTES = [(1, 1, 2), (2, 2, 0), (1, 2, 0), (0, 0, 1), (2, 1, 1), (1, 1, 1)]


@pytest.mark.parametrize("kind", ["comparisons", "pairs", "demonstrations", "feedback"])
def test_annotated_rows_train_by_majority(write, kind):
    """The second row prefers 2, the third and fourth nothing; the last one's answers are equal."""
    path = write(
        [
            {"instruction": "Add", "input": str(i), "response1": "3", "response2": "4"}
            | {f"annotator{number}": vote for number, vote in enumerate(votes, 1)}
            | ({"response2": "3"} if i == 5 else {})
            for i, votes in enumerate(VOTES)
        ]
    )
    result = formats.read(kind, path)
    pairs = [("Add\n\n0", "3", "4"), ("Add\n\n1", "4", "3"), ("Add\n\n4", "3", "4")]
    rows_of = {
        "demonstrations": [(prompt, better) for prompt, better, _ in pairs],
        "feedback": [(prompt, text) for prompt, *both in pairs for text in both],
    }
    assert [row.texts for row in result.rows] == rows_of.get(kind, pairs)
    if kind == "feedback":
        assert [row.targets for row in result.rows] == [(1.0,), (0.0,)] * 3
    assert result.dropped == {
        "no majority of the annotators prefers one response": 2,
        "chosen and rejected are identical": 1,
    }


def test_columns_that_other_data_of_an_evaluation_has(write):
    path = write([{"prompt": "p"}, {"prompt": "q"}])
    with pytest.raises(UserError, match="--columns prompt=zzz: no row has 'zzz'"):
        formats.read("prompts", path, columns=["prompt=zzz"])
    result = formats.read("prompts", path, columns=["prompt=zzz"], shares_columns=True)
    assert [row.prompt for row in result.rows] == ["p", "q"]
    assert list(result.unused_columns) == ["prompt=zzz"]
    first = write([{"zzz": "z"}], "first.jsonl")
    both = formats.read("prompts", [first, path], columns=["prompt=zzz"])  # one row has it
    assert [row.prompt for row in both.rows] == ["z", "p", "q"]


@pytest.mark.parametrize(("name", "content"), [("b.txt", "a\r\n\nb"), ("b.jsonl", None)])
def test_a_text_for_a_language_model_is_one_row(write, name, content):
    path = write(content or [{"text": "a\n\nb"}], name)
    [row] = formats.read("demonstrations", path).rows
    assert row.texts == ("", "a\n\nb")
    assert row.is_plain_text
    with pytest.raises(UserError, match=r"plain text .* r.jsonl, line 1 "):
        formats.read(
            "demonstrations", [path, write([{"prompt": "p", "response": "r"}] * 2, "r.jsonl")]
        )


def test_pieces_hold_every_token_once():
    """Ids of a..h are 2..9, EOS is 1. Each piece begins with the last token of the one before."""
    tokenizer = characters("abcdefgh")
    cut = encoding.pieces([Row("", ("abcdefgh",), "f"), Row("", ("a",), "g")], tokenizer, 4)
    ids = [[prompt, (*prompt, *response)] for prompt, response in (row.texts for row in cut)]
    assert ids == [[(2,), (2, 3, 4, 5)], [(5,), (5, 6, 7, 8)], [(8,), (8, 9, 1)], [(2,), (2, 1)]]
    assert [row.source for row in cut] == [*(f"f, piece {i}" for i in (1, 2, 3)), "g, piece 1"]
    long = encoding.pieces([Row("", ("abcdefgh" * 400,), "f")], tokenizer, 8192)
    assert [1 + len(row.responses[0]) for row in long] == [1024, 1024, 1024, 132]


def test_messages_may_repeat_the_prompt_after_a_system_message(write):
    roles = {"system": "s", "user": "p", "assistant": "r"}
    turns = [{"role": role, "content": text} for role, text in roles.items()]
    [row] = formats.read("demonstrations", write([{"prompt": "p", "response": turns}])).rows
    assert row.texts == ("System:\ns\n\nUser:\np\n\nAssistant:\n", "r")


def message(role, text, *replies, rank=None):
    return {"role": role, "text": text, "rank": rank, "replies": list(replies)}


def test_message_trees_are_rankings(write):
    two = (
        message("assistant", "y", rank=1),
        message("assistant", "x", rank=0),
        message("prompter", "z", rank=2),
    )
    deep = message(
        "prompter", "p", *two, message("assistant", "z", message("prompter", "more", *two), rank=2)
    )
    unranked = message("prompter", "p", message("assistant", "y"))
    path = write(
        [{"prompt": deep}, {"prompt": unranked}, {"prompt": unranked | {"replies": 3}}, PAIR]
    )
    with pytest.raises(UserError, match=r"line 3: .* Open Assistant .*TypeError"):
        formats.read("pairs", path)
    result = formats.read("pairs", path, on_bad_row="drop")
    p = "User:\np\n\nAssistant:\n"
    more = "User:\np\n\nAssistant:\nz\n\nUser:\nmore\n\nAssistant:\n"
    ranked = [Row(p, tuple(texts), f"{W}, prompt 1", weight=1 / 3) for texts in ("yz", "xy", "xz")]
    assert result.rows[:-1] == [*ranked, Row(more, ("x", "y"), f"{W}, prompt 2")]
    assert [*result.places.values()] == [["data.jsonl, line 2"], ["data.jsonl, line 3"]]


def test_prompts_as_strings_objects_and_of_rows_with_responses(write):
    texts = ["a", {"prompt": "b", "topic": "bread", "level": 3}, "a"]
    result = formats.read(
        "prompts", write([*texts, PAIR, PAIR, {"prompt": "q", "response": "r", "topic": 1}])
    )
    assert [row.prompt for row in result.rows] == ["a", "b", "a", "p", "q"]
    assert [row.columns for row in result.rows] == [
        {},
        {"topic": "bread", "level": 3},
        {},
        {"chosen": PAIR["chosen"], "rejected": PAIR["rejected"]},
        {"response": "r", "topic": 1},
    ]
    assert result.dropped == {"repeated prompt": 1}


def test_token_ids_lose_their_padding_and_are_not_tokenised_again(write):
    record = {"query": [50259, 50259, 3, 2], "sample0": [4, 50259], "sample1": [5, 6], "best": 1}
    [pair] = formats.read("comparisons", write([record])).rows
    assert pair.texts == ((3, 2), (5, 6), (4,))
    tokenizer = characters("abcdefgh")  # ids: a..h are 2..9
    data = encoding.encode_texts([pair], tokenizer)
    batch = batches.comparison_batch(data, np.array([0]), bucket_multiple=1)
    assert_array_equal(batch.tokens, [grid("3256", "3240")])  # no EOS after token ids
    assert_array_equal(batch.response_mask, [grid("0011", "0010")])
    framed = encoding.encode_prompts([Row((3,), (), "f")], tokenizer, template="a{prompt}bc")
    assert_array_equal(framed.tokens, grid("2334"))
    with pytest.raises(UserError, match=r"line 1: .* id 6, .* up to 5"):
        encoding.encode_texts([pair], characters("abcd"))
    with pytest.raises(UserError, match=r"line 1: holds token ids"):
        list(rows.texts([pair]))


def test_targets_of_each_answer(write):
    scored = [
        {"prompt": "p", "responses": ["x", "x"], "targets": [1, 0.5]},
        {"prompt": "p", "responses": ["y"], "targets": [2], "best": 0},
    ]
    result = formats.read("comparisons", write(scored))
    assert [(row.targets, row.best) for row in result.rows] == [((1.0, 0.5), None), ((2.0,), None)]
    data = encoding.encode_texts(result.rows, characters("pxy"))
    batch = batches.comparison_batch(data, np.array([1, -1, 0]), bucket_multiple=1)
    assert_array_equal(batch.targets, [[2, 0], [0, 0], [1, 0.5]])
    assert batch.targets.dtype == np.float32
    assert_array_equal(
        batch.response_mask.any(axis=2), [[True, False], [False, False], [True, True]]
    )
    assert batch.best is None
    with pytest.raises(UserError, match=r"line 2: has no targets .* line 1"):
        formats.read("comparisons", write([scored[0], CHOICE]))
    with pytest.raises(UserError, match="line 1: holds targets, which are no preference"):
        formats.read("pairs", write(scored))


def test_the_generated_corpus_is_that_of_its_seed(tmp_path):
    demo.write(tmp_path, seed=3)
    for file, kind in {file: kind for kind, file in formats.FILES.items()}.items():
        [written] = formats.fingerprints(kind, tmp_path).values()
        assert formats.fingerprints(kind, "demo", seed=3) == {f"demo/{file}": written}
    result = formats.read("prompts", "demo", seed=4)
    assert len(result.rows) == 600
    assert result.fingerprints == formats.fingerprints("prompts", "demo", seed=4)
    assert written not in result.fingerprints.values()


FAULTS = [
    (
        "demonstrations",
        {"prompt": "a", "respnse": "b"},
        "found prompt, respnse; did you mean 'response' by 'respnse",
    ),
    ("demonstrations", ["a"], "prompt, response, found a list"),
    (
        "demonstrations",
        {"prompt": "a", "response": 3},
        "'response' .* number 3",
    ),
    ("demonstrations", {"prompt": "a", "response": " "}, "'response' is empty"),
    (
        "demonstrations",
        {"prompt": "a", "response": "b\ud83d"},
        "'response' holds half",
    ),
    (
        "demonstrations",
        {"chosen": "a", "rejected": "b"},
        "'chosen' .* dialogue",
    ),
    ("pairs", {"promt": "a", "chosen": "b", "rejected": "c"}, "'prompt' by 'promt'"),
    (
        "pairs",
        DIALOGUES | {"rejected": HUMAN + (" no\n\nHuman: why?")},
        "'rejected' ends with a human turn",
    ),
    (
        "pairs",
        PAIR | RANKED | {"chosen": "x", "best": 1},
        "'chosen' is not the response",
    ),
    ("pairs", PAIR | {"best": 1}, "'chosen' is not the response"),
    (
        "pairs",
        {"prompt": "a", "response": "b"},
        "prompt, chosen, rejected, found prompt, response",
    ),
    ("prompts", {"prompt": ""}, "'prompt' is empty"),
    (
        "prompts",
        {"promt": "a"},
        "found promt; .* 'prompt'",
    ),
    ("prompts", 3, "prompt, or a string, found the number 3"),
    (
        "comparisons",
        CHOICE | {"best": 4},
        "'best' .* 0 to 3, found the number 4",
    ),
    ("comparisons", CHOICE | {"best": True}, "'best' .* true or false"),
    (
        "comparisons",
        {"query": "q", "sample0": "a", "sample1": "b"},
        "one of the keys best, ranking, ranks, targets",
    ),
    (
        "comparisons",
        {"quary": "q", "sample0": "a", "sample1": "b", "best": 0},
        "prompt; .* quary",
    ),
    ("comparisons", CHOICE | {"sample1": ""}, "response 1 is empty"),
    ("comparisons", CHOICE | {"sample1": [50259]}, "response 1 is empty"),
    ("comparisons", CHOICE | {"sample1": ["a"]}, "response 1 .* token ids, found a string"),
    (
        "comparisons",
        CHOICE | {"sample1": None},
        "response 1 .* found null",
    ),
    (
        "comparisons",
        RANKED | {"responses": ["a"], "best": 0},
        "at least 2 responses",
    ),
    ("comparisons", RANKED | {"ranking": [1, 2, 3]}, "from 0 to 2 once"),
    (
        "comparisons",
        RANKED | {"ranks": [1]},
        "list of 3 numbers",
    ),
    ("comparisons", RANKED | {"ranks": [1, "2", 3]}, "'ranks' .* numbers, found a string"),
    ("comparisons", RANKED | {"targets": [1, 2, float("nan")]}, "'targets' .* nan"),
    (
        "comparisons",
        RANKED | {"targets": [1, 2, 10**400]},
        "'targets' .* too large",
    ),
    (
        "annotated",
        VOTED | {"annotator2": 3},
        "'annotator2' .* 1, 2 or 0 .* number 3",
    ),
    ("annotated", VOTED | {"input": 3}, "'input' .* number 3"),
    (
        "comparisons",
        RANKED | {"best": 0, "ranks": [0, 1, 2]},
        "found best, ranks",
    ),
]


# Of every kind but one. That 'chosen' is one of the best is enough.
RIGHT = PAIR | {"response": "r", "ranks": [1, 1]}


@pytest.mark.parametrize(("kind", "record", "message"), FAULTS)
def test_faults_name_file_line_and_key(write, kind, record, message):
    with pytest.raises(UserError, match=message) as error:
        formats.read(kind, write([VOTED if kind == "annotated" else RIGHT, record]))
    assert str(error.value).startswith("data.jsonl, line 2: ")
