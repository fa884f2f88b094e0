"""Rows beyond prompt and response: choices among K, rankings, CSV, Parquet and plain text."""

import gzip
import json

import numpy as np
import pytest

from rlhf_jax.data import batches, encoding, readers, rows
from rlhf_jax.data.readers import Comparison, Demonstration, Pair, Prompt
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError

CHOICE = {"query": "q", "sample0": "a", "sample1": "b", "sample2": "c", "sample3": "d", "best": 2}
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


@pytest.fixture
def write(tmp_path):
    def save(content, name="data.jsonl"):
        path = tmp_path / name
        if isinstance(content, list):
            content = "\n".join(json.dumps(row) for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(path)

    return save


def without_source(row):
    return {name: value for name, value in vars(row).items() if name not in ("source", "prompt")}


def test_the_choice_of_one_among_four(write):
    path = write([CHOICE])
    where = f"{path}, line 1"
    assert readers.read_comparisons(path).rows == [Comparison("q", ("a", "b", "c", "d"), where, best=2)]
    third = 1 / 3
    assert readers.read_pairs(path).rows == [Pair("q", "c", other, where, third) for other in "abd"]
    assert readers.read_demonstrations(path).rows == [Demonstration("q", "c", where)]
    assert readers.read_prompts(path).rows == [Prompt("q", where)]
    two = write([{"prompt": "q", "responses": ["a", "b"], "best": 1}])
    assert readers.read_comparisons(two).rows == [Pair("q", "b", "a", where)]


def test_token_ids_lose_their_padding_and_are_not_tokenised_again(write):
    row = {"query": [50259, 50259, 3, 2], "sample0": [4, 50259], "sample1": [5, 6], "best": 1}
    path = write(json.dumps([row]), "labels.json")
    [pair] = readers.read_comparisons(path).rows
    assert (pair.prompt, pair.chosen, pair.rejected) == ((3, 2), (5, 6), (4,))
    tokenizer = characters("abcdefgh")  # ids: a..h are 2..9
    data = encoding.encode_comparisons([pair], tokenizer)
    batch = batches.comparison_batch(data, np.array([0]), bucket_multiple=1)
    np.testing.assert_array_equal(batch.tokens, [[[3, 2, 5, 6], [3, 2, 4, 0]]])  # no EOS after token ids
    np.testing.assert_array_equal(batch.response_mask, [[[0, 0, 1, 1], [0, 0, 1, 0]]])
    framed = encoding.encode_prompts([Prompt((3,), "f")], tokenizer, template="a{prompt}bc")
    np.testing.assert_array_equal(framed.tokens, [[2, 3, 3, 4]])
    with pytest.raises(UserError, match=r"labels\.json, line 1: holds the token id 6, but .* ids up to 5 only"):
        encoding.encode_comparisons([pair], characters("abcd"))
    with pytest.raises(UserError, match=r"labels\.json, line 1: holds token ids, so no tokenizer can be trained"):
        list(rows.texts([pair]))


def test_columns_of_a_table_may_lack_their_last_samples(write):
    short = CHOICE | {"sample2": None, "sample3": None, "best": 1}
    assert without_source(readers.read_comparisons(write([short])).rows[0]) == {
        "chosen": "b",
        "rejected": "a",
        "weight": None,
    }


@pytest.mark.parametrize(
    "label",
    [{"ranking": [2, 0, 1]}, {"ranks": [1, 2, 0]}, {"ranks": [2.5, 3, 1]}],
)
def test_a_ranking_becomes_weighted_pairs(write, label):
    path = write([{"prompt": "p", "responses": ["x", "y", "z"]} | label])
    result = readers.read_comparisons(path)
    third, where = 1 / 3, f"{path}, line 1"
    assert sorted(result.rows, key=str) == [
        Pair("p", "x", "y", where, third),
        Pair("p", "z", "x", where, third),
        Pair("p", "z", "y", where, third),
    ]
    assert readers.read_pairs(path).rows == result.rows
    assert readers.read_demonstrations(path).rows[0].response == "z"


def test_ties_and_equal_texts_make_no_pair(write):
    ranked = [
        {"prompt": "p", "responses": ["x", "y", "z"], "ranks": [0, 1, 1]},
        {"prompt": "p", "responses": ["x", "y", "x"], "ranks": [0, 1, 2]},
        {"prompt": "p", "responses": ["x", "y"], "ranks": [1, 1]},
        {"prompt": "p", "responses": ["x", "x", "x"], "best": 0},
    ]
    result = readers.read_comparisons(write(ranked))
    assert [(row.chosen, row.rejected, row.weight) for row in result.rows] == [
        ("x", "y", 0.5),
        ("x", "z", 0.5),
        ("x", "y", 0.5),
        ("y", "x", 0.5),
    ]
    assert result.dropped == {"all responses are ranked equal": 1, "all responses are identical": 1}


def test_targets_of_each_answer(write):
    scored = [{"prompt": "p", "responses": ["x", "x"], "targets": [1, 0.5]}, {"prompt": "p", "responses": ["y"]}]
    scored[1]["targets"] = [2]
    result = readers.read_comparisons(write(scored))
    assert [row.targets for row in result.rows] == [(1.0, 0.5), (2.0,)]
    data = encoding.encode_comparisons(result.rows, characters("pxy"))
    batch = batches.comparison_batch(data, np.array([1, -1, 0]), bucket_multiple=1)
    np.testing.assert_array_equal(batch.targets, [[2, 0], [0, 0], [1, 0.5]])
    assert batch.targets.dtype == np.float32
    np.testing.assert_array_equal(batch.response_mask.any(axis=2), [[True, False], [False, False], [True, True]])
    assert batch.best is None
    with pytest.raises(UserError, match=r"line 2: has no targets but .* line 1 has; train on one kind"):
        readers.read_comparisons(write([scored[0], CHOICE]))
    with pytest.raises(UserError, match="line 1: holds targets, which are no preference"):
        readers.read_pairs(write(scored))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (CHOICE | {"best": 4}, "'best' must be the number of a response, 0 to 3, found the number 4"),
        (CHOICE | {"best": True}, "'best' must be .* found true or false"),
        ({"query": "q", "sample0": "a", "sample1": "b"}, "one of the keys best, ranking, ranks, targets, found query"),
        ({"query": "q", "sample0": "a", "sample2": "b", "best": 0}, "keys sample0, sample1, found query, sample0"),
        ({"quary": "q", "sample0": "a", "sample1": "b", "best": 0}, "expected keys prompt, found quary"),
        (CHOICE | {"sample1": ""}, "'sample1' is empty"),
        (CHOICE | {"sample1": [50259]}, "'sample1' is empty"),
        (CHOICE | {"sample1": ["a"]}, "'sample1' must hold token ids, found a string"),
        (CHOICE | {"sample1": None}, "'sample1' must be a string or a list of token ids, found null"),
        ({"prompt": "p", "responses": ["a"], "best": 0}, "needs at least 2 responses, found 1"),
        ({"prompt": "p", "responses": "a", "best": 0}, "'responses' must be a list, found a string"),
        ({"prompt": "p", "responses": ["a", 3], "best": 0}, r"'responses'\[1\] must be a string or a list"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [1, 2]}, "each response number from 0 to 1 once"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1]}, "list of 2 numbers, one for each response, found 1"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1, "2"]}, "'ranks' must hold numbers, found a string"),
        ({"prompt": "p", "responses": ["a", "b"], "targets": [1, float("nan")]}, "numbers, found the number nan"),
        ({"prompt": "p", "responses": ["a", "b"], "best": 0, "ranks": [0, 1]}, "expected one of .* best and ranks"),
    ],
)
def test_faults_of_choices_and_rankings(write, row, message):
    with pytest.raises(UserError, match=message) as error:
        readers.read_comparisons(write([{"prompt": "p", "chosen": "a", "rejected": "b"}, row]))
    assert "data.jsonl, line 2: " in str(error.value)


def test_csv_rows_carry_their_physical_lines(write):
    text = '\ufeffprompt,level,response\r\n1,7,NA\r\n\r\n"a ""b""\nc,d",8,null\r\ne,,5\r\n'
    path = write(gzip.compress(text.encode("utf-8")), "data.csv.gz")
    assert readers.read_demonstrations(path).rows == [
        Demonstration("1", "NA", f"{path}, line 2"),
        Demonstration('a "b"\nc,d', "null", f"{path}, line 4"),
        Demonstration("e", "5", f"{path}, line 6"),
    ]
    assert readers.read_prompts(path).rows[0].columns == {"level": "7"}
    path = write("prompt\tresponse\na,b\tc\n", "data.tsv")
    assert readers.read_demonstrations(path).rows == [Demonstration("a,b", "c", f"{path}, line 2")]
    path = write('prompt,responses,ranks\np,"[""x"", ""y""]","[1, 0]"\n', "data.csv")
    assert readers.read_pairs(path).rows == [Pair("p", "y", "x", f"{path}, line 2")]
    path = write("query,sample0,sample1,best\nq,x,y,1\n", "data.csv")
    assert readers.read_pairs(path).rows == [Pair("q", "y", "x", f"{path}, line 2")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,response\na,b\nc,d,e\n", "line 3: 3 cells under a header of 2; quote cells"),
        ("prompt,response\na,b\nc\n", "line 3: 1 cells under a header of 2$"),
        ('prompt,response\na,"b\nc', "line 2: not valid CSV in the row that starts here"),
        ("prompt,prompt\na,b\n", "line 1: the column 'prompt' stands twice"),
        ("prompt,\na,b\n", "line 1: column 2 of the header has no name"),
        ("prompt,response\na,\n", "line 2: 'response' is empty"),
        ("promt,response\na,b\n", "line 2: expected keys prompt, response, found promt, .* did you mean 'prompt'"),
        ("prompt,messages\na,b\n", "line 2: the column 'messages' holds JSON, found 'b'"),
        ("prompt,response\n", "data.csv: holds no rows"),
        ("\n", "data.csv: is empty"),
    ],
)
def test_faults_of_csv(write, content, message):
    with pytest.raises(UserError, match=message):
        readers.read_demonstrations(write(content, "data.csv"))


def test_plain_text_is_a_prompt_a_line(write):
    path = write("[one\r\n\n  \n two\u2028three\n", "prompts.txt")
    assert readers.read_prompts(path).rows == [
        Prompt("[one", f"{path}, line 1"),
        Prompt(" two\u2028three", f"{path}, line 4"),
    ]
    with pytest.raises(UserError, match=r"prompts.txt, line 1: expected an object with keys .* found a string"):
        readers.read_pairs(path)


def test_parquet(tmp_path, write):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = str(tmp_path / "data.parquet")
    chats = [{"messages": [USER, ANSWER], "level": 3}, {"messages": [USER, ANSWER, USER], "level": 4}]
    parquet.write_table(pyarrow.Table.from_pylist(chats), path)
    result = readers.read_prompts([path, write(["text"])])
    assert [(row.source, row.columns) for row in result.rows] == [
        (f"{path}, row 1", {"level": 3}),
        (f"{path}, row 2", {"level": 4}),
        (str(tmp_path / "data.jsonl") + ", line 1", {}),
    ]
    parquet.write_table(pyarrow.Table.from_pylist([CHOICE | {"sample3": None}, CHOICE]), path)
    rows_read = readers.read_comparisons(path).rows
    assert [len(row.responses) for row in rows_read] == [3, 4]
    batch = batches.comparison_batch(encoding.encode_comparisons(rows_read, characters("qabcd")), np.array([0, 1]))
    np.testing.assert_array_equal(batch.response_mask.any(axis=2), [[True, True, True, False], [True] * 4])
    np.testing.assert_array_equal(batch.best, [2, 2])
    with pytest.raises(UserError, match=r"bad\.parquet: is not a Parquet file"):
        readers.read_prompts(write("hello", "bad.parquet"))
    with pytest.raises(UserError, match=r"bad\.parquet: cannot be read as Parquet: "):
        readers.read_prompts(write("PAR1hello", "bad.parquet"))
