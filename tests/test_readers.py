"""The readers: every format, where each row came from, and messages a user can act on."""

import gzip
import json
import sys
import types

import pytest

from rlhf_jax.data import readers, sources
from rlhf_jax.errors import UserError

PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}


@pytest.fixture
def write(tmp_path):
    def save(content, name="data.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(path)

    return save


def dialogue(prompt, response):
    return f"\n\nHuman: {prompt}\n\nAssistant:{response}"


def test_list_rows_carry_their_physical_lines(write):
    path = write('\n[\n  {"prompt": "a\\nb",\n   "response": "x"},\n\n  {"prompt": "c", "response": "y"}]\n')
    result = readers.read_demonstrations(path)
    assert result.rows == [
        readers.Demonstration("a\nb", "x", f"{path}, line 3"),
        readers.Demonstration("c", "y", f"{path}, line 6"),
    ]
    assert (result.kept, result.dropped) == (2, {})


def test_json_lines_gz_bom_crlf_and_blank_lines(write):
    text = '\ufeff{"prompt": "a\u2028b", "response": "x"}\r\n\r\n{"prompt": "c", "response": "é"}'
    path = write(gzip.compress(text.encode("utf-8")), "data.jsonl.gz")
    assert readers.read_demonstrations(path).rows == [
        readers.Demonstration("a\u2028b", "x", f"{path}, line 1"),
        readers.Demonstration("c", "é", f"{path}, line 3"),
    ]


def test_several_files_and_fingerprints_of_content(write):
    first, second = write(json.dumps([PAIR]), "a.json"), write(gzip.compress(json.dumps([PAIR]).encode()), "b.json.gz")
    result = readers.read_pairs([first, second])
    assert [row.source for row in result.rows] == [f"{first}, line 1", f"{second}, line 1"]
    assert result.fingerprints[first] == result.fingerprints[second]
    assert len(result.fingerprints[first]) == 64


def test_equal_pairs_are_dropped_and_counted(write):
    equal = PAIR | {"rejected": "good"}
    result = readers.read_pairs(write(json.dumps([PAIR, equal, equal])))
    assert (result.kept, result.dropped) == (1, {"chosen and rejected are identical": 2})
    assert result.describe() == "1 rows, 2 dropped (chosen and rejected are identical)"
    with pytest.raises(UserError, match=r"no usable row: 2 dropped \(chosen and rejected are identical\)"):
        readers.read_pairs(write(json.dumps([equal, equal])))


def test_dialogues_split_at_the_last_assistant_turn(write):
    history = dialogue("hi", " hello") + "\n\nHuman: and?"
    rows = [
        {"chosen": dialogue(history, " yes"), "rejected": dialogue(history, " no")},
        {"chosen": dialogue("a", " x"), "rejected": dialogue("b", " y")},
        {"chosen": dialogue("a", " x"), "rejected": dialogue("a", "")},
    ]
    path = write("\n".join(map(json.dumps, rows)), "data.jsonl")
    result = readers.read_pairs(path)
    prompt = f"\n\nHuman: {history}\n\nAssistant:"
    assert result.rows == [readers.Pair(prompt, " yes", " no", f"{path}, line 1")]
    assert result.dropped == {
        "dialogues differ before the last response": 1,
        "dialogue without a last response": 1,
    }
    demonstrations = readers.read_demonstrations(path).rows
    assert [row.response for row in demonstrations] == [" yes", " x", " x"]
    assert demonstrations[0].prompt == prompt
    assert readers.read_prompts(path).dropped == {"repeated prompt": 1}


def test_prompts_as_strings_objects_and_of_other_files(write):
    path = write(json.dumps(["a", {"prompt": "b", "topic": "bread", "level": 3}, "a"]))
    result = readers.read_prompts(path)
    assert [row.prompt for row in result.rows] == ["a", "b", "a"]
    assert result.rows[1].columns == {"topic": "bread", "level": 3}
    result = readers.read_prompts(write(json.dumps([PAIR, PAIR, {"prompt": "q", "response": "r", "topic": 1}])))
    assert [(row.prompt, row.columns) for row in result.rows] == [("p", {}), ("q", {"topic": 1})]
    assert result.dropped == {"repeated prompt": 1}


def test_pairs_serve_as_demonstrations(write):
    assert readers.read_demonstrations(write(json.dumps([PAIR]))).rows[0].response == "good"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "data.json: is empty"),
        (" \n ", "data.json: is empty"),
        ("[]", "data.json: is an empty list"),
        ('[\n{"prompt": "a", "response": "b"},\n{"prompt": "c", "resp', "line 3: the file is cut off inside the row"),
        ('[\n{"prompt": "a", "response": "b"},\n', "line 3: the file is cut off inside the row"),
        ('[\n{"prompt": "a", "response": "b"}\n', "the file is cut off: no ']'"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "c", "re', "line 2: not valid JSON.*the file seems cut off"),
        ('[\n{"prompt": "a" "response": "b"}]', "line 2: not valid JSON, expecting ',' delimiter at column 16"),
        ('[{"prompt": "a", "response": "b"}\n{"prompt": "c"}]', "line 2: expected ',' or ']' after a row, found '{'"),
        ('[{"prompt": "a", "response": "b"}]\nmore', "line 2: text after the end of the JSON list"),
        ('{\n"prompt": "a"}', "line 1: not valid JSON.*in JSON lines each row is one line"),
        ("prompt,response\na,b", "line 1: expected a JSON list or JSON lines, found 'prompt,response'"),
        ('[{"prompt": "a", "respnse": "b"}]', "line 1: expected keys prompt, response, found prompt, respnse; "),
        ('[{"prompt": "a", "respnse": "b"}]', "did you mean 'response' by 'respnse'"),
        ('[\n\n["a"]]', "line 3: expected an object with keys prompt, response, found a list"),
        ('[{"prompt": "a", "response": null}]', "line 1: 'response' must be a string, found null"),
        ('[{"prompt": "a", "response": 3}]', "line 1: 'response' must be a string, found the number 3"),
        ('[{"prompt": "a", "response": " "}]', "line 1: 'response' is empty"),
        ('[{"prompt": "", "response": "b"}]', "line 1: 'prompt' is empty"),
        ('[{"prompt": "a", "prompt": "b", "response": "c"}]', "line 1: the key 'prompt' stands twice"),
        ('[{"prompt": "a", "response": "b\\ud83d"}]', "line 1: 'response' holds half of a surrogate pair"),
        ('[{"chosen": "a", "rejected": "b"}]', "found chosen, rejected; without a prompt, 'chosen' must be a dialogue"),
        (b'[\n{"prompt": "caf\xe9", "response": "b"}]', "line 2: byte 0xe9 is not UTF-8, which is expected"),
        ('[{"prompt": "a"}]'.encode("utf-16"), "is UTF-16; UTF-8 is expected"),
        # Without the time, which would name the case differently in each of pytest-xdist's processes.
        (gzip.compress(b"[" + bytes(range(256)) * 9, mtime=0)[:40], "broken gzip file"),
    ],
)
def test_faults_are_named_with_file_and_line(write, content, message):
    with pytest.raises(UserError, match=message) as error:
        readers.read_demonstrations(write(content))
    assert "data.json" in str(error.value)


def test_other_kinds_name_their_own_keys(write):
    with pytest.raises(UserError, match="expected keys prompt, chosen, rejected, found prompt, response"):
        readers.read_pairs(write('[{"prompt": "a", "response": "b"}]'))
    with pytest.raises(UserError, match="expected keys prompt, found promt; did you mean 'prompt' by 'promt'"):
        readers.read_prompts(write('[{"promt": "a"}]'))
    with pytest.raises(UserError, match="expected an object with keys prompt, or a string, found the number 3"):
        readers.read_prompts(write("[3]"))


def test_missing_files(write, tmp_path):
    write("[]", "sft_data.json")
    with pytest.raises(UserError, match=r"sft_dat\.json: no such file; did you mean .*sft_data\.json\?"):
        readers.read_pairs(str(tmp_path / "sft_dat.json"))
    with pytest.raises(UserError, match="is a folder"):
        readers.read_pairs(tmp_path)
    with pytest.raises(UserError, match="no data file given"):
        readers.read_pairs([])
    with pytest.raises(UserError, match=r"data/pairs\.json: no such file$"):  # not taken for a dataset's name
        readers.read_pairs("data/pairs.json")


def test_hugging_face_datasets(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "nobody/nothing":
            raise ConnectionError("offline")
        return [{"chosen": dialogue("a", " x"), "rejected": dialogue("a", " y")}, PAIR]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    result = readers.read_pairs("Some-Org/some_data:test[:2]")
    assert [row.source for row in result.rows] == [
        "Some-Org/some_data:test[:2], row 1",
        "Some-Org/some_data:test[:2], row 2",
    ]
    assert result.rows[0].rejected == " y"
    readers.read_prompts(["org/name"])
    assert asked == [("Some-Org/some_data", "test[:2]"), ("org/name", "train")]
    with pytest.raises(UserError, match=r"no such file, and it could not be loaded .*ConnectionError: offline"):
        readers.read_pairs("nobody/nothing")


def test_a_gzip_bomb_stops_early(write, monkeypatch):
    monkeypatch.setattr(sources, "_MAY_UNPACK", 1 << 21)
    row = b'{"prompt": "a", "response": "b"}'
    plain = b"[" + b" " * (1 << 24) + row + b"]"
    with pytest.raises(UserError, match=r"bomb\.json: unpacks to more than 100 times its size; .* gunzip"):
        readers.read_demonstrations(write(gzip.compress(plain), "bomb.json"))
    assert readers.read_demonstrations(write(plain, "plain.json")).kept == 1
    two_members = gzip.compress(b"[" + row + b",\n") + gzip.compress(row + b"]")
    assert readers.read_demonstrations(write(two_members, "two.json.gz")).kept == 2
