"""Records as rows: what each format becomes, what is dropped, and sentences for wrong values."""

import numpy as np
import pytest

from rlhf_jax.data import batches, demo, encoding, formats, rows
from rlhf_jax.data.rows import Comparison, Demonstration, Pair, Prompt
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}
CHOICE = {"query": "p", "sample0": "a", "sample1": "b", "sample2": "c", "sample3": "d", "best": 2}
RANKED = {"prompt": "p", "responses": ["x", "y", "z"]}
W = "data.jsonl, line 1"


def dialogue(prompt, response):
    return f"\n\nHuman: {prompt}\n\nAssistant:{response}"


def pairs(*texts, weight):
    return [Pair("p", chosen, rejected, W, weight) for chosen, rejected in texts]


HUMAN = "\n\nHuman: h\n\nAssistant:"
DIALOGUES = {"chosen": HUMAN + " yes", "rejected": HUMAN + " no"}
TIES = {"prompt": "p", "responses": ["x", "y", "x"], "ranks": [0, 1, 2]}
ORDER = pairs("xy", "zx", "zy", weight=1 / 3)
BEST = [Comparison("p", ("a", "b", "c", "d"), W, best=2)]
# The columns of a table may lack their last samples.
TWO = CHOICE | {"sample2": None, "sample3": None, "best": 1}
# A record, its prompt, and what it becomes: its demonstration's response, pairs, comparisons (None: as the pairs).
FORMATS = [
    (PAIR, "p", "good", [Pair("p", "good", "bad", W)], None),
    (DIALOGUES, HUMAN, " yes", [Pair(HUMAN, " yes", " no", W)], None),
    (CHOICE, "p", "c", pairs("ca", "cb", "cd", weight=1 / 3), BEST),
    (TWO, "p", "b", [Pair("p", "b", "a", W)], None),
    *((RANKED | {"ranks": ranks}, "p", "z", ORDER, None) for ranks in ([1, 2, 0], [2.5, 3, 1])),
    (RANKED | {"ranking": [2, 0, 1]}, "p", "z", ORDER, None),
    (RANKED | {"ranks": [0, 1, 1]}, "p", "x", pairs("xy", "xz", weight=0.5), None),
    (TIES, "p", "x", pairs("xy", "yx", weight=0.5), None),  # ties and equal texts make no pair
]


@pytest.mark.parametrize(("record", "prompt", "response", "as_pairs", "comparisons"), FORMATS)
def test_formats(write, record, prompt, response, as_pairs, comparisons):
    path = write([record])
    assert formats.read("demonstrations", path).rows == [Demonstration(prompt, response, W)]
    assert formats.read("pairs", path).rows == as_pairs
    assert formats.read("comparisons", path).rows == (comparisons or as_pairs)
    assert formats.read("prompts", path).rows == [Prompt(prompt, W)]


def test_rows_that_teach_nothing_are_dropped_and_counted(write):
    equal = PAIR | {"rejected": "good"}
    differ = {"chosen": dialogue("a", " x"), "rejected": dialogue("b", " y")}
    silent = {"chosen": dialogue("a", " x"), "rejected": dialogue("a", "")}
    tied, same = RANKED | {"ranks": [1, 1, 1]}, {"prompt": "p", "responses": ["x", "x", "x"], "best": 0}
    path = write([PAIR, equal, equal, differ, silent, tied, same])
    result = formats.read("pairs", path)
    assert result.kept == 1
    assert result.dropped == {
        "chosen and rejected are identical": 2,
        "dialogues differ before the last response": 1,
        "dialogue without a last response": 1,
        "all responses are ranked equal": 1,
        "all responses are identical": 1,
    }
    # Chosen responses and prompts are what they are.
    assert [row.response for row in formats.read("demonstrations", write([differ, silent])).rows] == [" x", " x"]
    assert formats.read("prompts", write([differ, silent, silent])).dropped == {"repeated prompt": 2}
    result = formats.read("pairs", write([PAIR, equal]))
    assert result.describe() == "1 rows, 1 dropped (chosen and rejected are identical)"
    with pytest.raises(UserError, match=r"no usable row: 0 rows, 2 dropped \(chosen and rejected are identical\)"):
        formats.read("pairs", write([equal, equal]))


def test_prompts_as_strings_objects_and_of_rows_with_responses(write):
    texts = ["a", {"prompt": "b", "topic": "bread", "level": 3}, "a"]
    result = formats.read("prompts", write([*texts, PAIR, PAIR, {"prompt": "q", "response": "r", "topic": 1}]))
    assert [row.prompt for row in result.rows] == ["a", "b", "a", "p", "q"]
    assert [row.columns for row in result.rows] == [{}, {"topic": "bread", "level": 3}, {}, {}, {"topic": 1}]
    assert result.dropped == {"repeated prompt": 1}


def test_token_ids_lose_their_padding_and_are_not_tokenised_again(write):
    path = write([{"query": [50259, 50259, 3, 2], "sample0": [4, 50259], "sample1": [5, 6], "best": 1}])
    [pair] = formats.read("comparisons", path).rows
    assert (pair.prompt, pair.chosen, pair.rejected) == ((3, 2), (5, 6), (4,))
    tokenizer = characters("abcdefgh")  # ids: a..h are 2..9
    data = encoding.encode_texts([pair], tokenizer)
    batch = batches.comparison_batch(data, np.array([0]), bucket_multiple=1)
    np.testing.assert_array_equal(batch.tokens, [[[3, 2, 5, 6], [3, 2, 4, 0]]])  # no EOS after token ids
    np.testing.assert_array_equal(batch.response_mask, [[[0, 0, 1, 1], [0, 0, 1, 0]]])
    framed = encoding.encode_prompts([Prompt((3,), "f")], tokenizer, template="a{prompt}bc")
    np.testing.assert_array_equal(framed.tokens, [[2, 3, 3, 4]])
    with pytest.raises(UserError, match=r"line 1: holds the token id 6, but .* ids up to 5 only"):
        encoding.encode_texts([pair], characters("abcd"))
    with pytest.raises(UserError, match=r"line 1: holds token ids, so no tokenizer can be trained"):
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
    np.testing.assert_array_equal(batch.targets, [[2, 0], [0, 0], [1, 0.5]])
    assert batch.targets.dtype == np.float32
    np.testing.assert_array_equal(batch.response_mask.any(axis=2), [[True, False], [False, False], [True, True]])
    assert batch.best is None
    with pytest.raises(UserError, match=r"line 2: has no targets but .* line 1 has; train on one kind"):
        formats.read("comparisons", write([scored[0], CHOICE]))
    with pytest.raises(UserError, match="line 1: holds targets, which are no preference"):
        formats.read("pairs", write(scored))


def test_the_generated_corpus_is_that_of_its_seed(tmp_path):
    demo.write(tmp_path, seed=3)
    for kind in formats.FILES:
        result, written = formats.read(kind, "demo", seed=3), formats.read(kind, tmp_path)
        assert [rows.parts(row) for row in result.rows] == [rows.parts(row) for row in written.rows]
        assert result.fingerprints == {f"demo/{formats.FILES[kind]}": next(iter(written.fingerprints.values()))}
    assert formats.read("prompts", "demo", seed=4).fingerprints != formats.read("prompts", "demo").fingerprints


# fmt: off
FAULTS = [
    ("demonstrations", {"prompt": "a", "respnse": "b"}, "found prompt, respnse; did you mean 'response' by 'respnse"),
    ("demonstrations", ["a"], "expected an object with keys prompt, response, found a list"),
    ("demonstrations", {"prompt": "a", "response": 3}, "'response' must be a string, found the number 3"),
    ("demonstrations", {"prompt": "a", "response": " "}, "'response' is empty; remove the row or fill it in"),
    ("demonstrations", {"prompt": "a", "response": "b\ud83d"}, "'response' holds half of a surrogate pair"),
    ("demonstrations", {"chosen": "a", "rejected": "b"}, "without a prompt, 'chosen' must be a dialogue"),
    ("pairs", {"prompt": "a", "response": "b"}, "expected keys prompt, chosen, rejected, found prompt, response"),
    ("prompts", {"prompt": ""}, "'prompt' is empty"),
    ("prompts", {"promt": "a"}, "expected keys prompt, found promt; did you mean 'prompt' by 'promt'"),
    ("prompts", 3, "expected an object with keys prompt, or a string, found the number 3"),
    ("comparisons", CHOICE | {"best": 4}, "'best' must be the number of a response, 0 to 3, found the number 4"),
    ("comparisons", CHOICE | {"best": True}, "'best' must be .* found true or false"),
    ("comparisons", {"query": "q", "sample0": "a", "sample1": "b"}, "one of the keys best, ranking, ranks, targets"),
    ("comparisons", {"query": "q", "sample0": "a", "sample2": "b", "best": 0}, "keys sample0, sample1, found query"),
    ("comparisons", {"quary": "q", "sample0": "a", "sample1": "b", "best": 0}, "expected keys prompt, found quary"),
    ("comparisons", CHOICE | {"sample1": ""}, "response 1 is empty"),
    ("comparisons", CHOICE | {"sample1": [50259]}, "response 1 is empty"),
    ("comparisons", CHOICE | {"sample1": ["a"]}, "response 1 must hold token ids, found a string"),
    ("comparisons", CHOICE | {"sample1": None}, "response 1 must be a string or a list of token ids, found null"),
    ("comparisons", RANKED | {"responses": ["a"], "best": 0}, "needs at least 2 responses, found 1"),
    ("comparisons", RANKED | {"ranking": [1, 2, 3]}, "each response number from 0 to 2 once"),
    ("comparisons", RANKED | {"ranks": [1]}, "list of 3 numbers, one for each response, found a list"),
    ("comparisons", RANKED | {"ranks": [1, "2", 3]}, "'ranks' must hold numbers, found a string"),
    ("comparisons", RANKED | {"targets": [1, 2, float("nan")]}, "numbers, found the number nan"),
    ("comparisons", RANKED | {"targets": [1, 2, 10**400]}, "hold numbers, found a number that is too large"),
    ("comparisons", RANKED | {"best": 0, "ranks": [0, 1, 2]}, "expected one of .*, found best, ranks"),
]
# fmt: on


@pytest.mark.parametrize(("kind", "record", "message"), FAULTS)
def test_faults_name_file_line_and_key(write, kind, record, message):
    with pytest.raises(UserError, match=message) as error:
        formats.read(kind, write([PAIR | {"response": "r"}, record]))
    assert str(error.value).startswith("data.jsonl, line 2: ")
