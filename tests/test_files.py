"""Data files: every format, the place of each record, and sentences for what cannot be read."""

import gzip
import json
import os
import sys
import types

import pytest

from rlhf_jax.data import files, formats
from rlhf_jax.data.rows import Row
from rlhf_jax.errors import UserError

ROW = '{"prompt": "a", "response": "b"}'


def read_demonstrations(path):
    return formats.read("demonstrations", path).rows


def test_rows_of_a_list_and_lines_of_json_lines(write):
    path = write(
        '\n[\n  {"prompt": "a\\nb",\n   "response": "x"},\n\n  {"prompt": "c", "response": "y"}]\n',
        "data.json",
    )
    expected = [Row("a\nb", ("x",), "data.json, row 1"), Row("c", ("y",), "data.json, row 2")]
    assert read_demonstrations(path) == expected
    text = '\ufeff{"prompt": "a\u2028b", "response": "x"}\r\n\r\n {"prompt": "c", "response": "é"}'
    assert formats.read("prompts", write('{"prompt": "a", "items": [1]}')).rows[0].columns == {
        "items": [1]
    }
    path = write(gzip.compress(text.encode("utf-8")), "data.jsonl.gz")
    expected = [Row("a\u2028b", ("x",), f"{path}, line 1"), Row("c", ("é",), f"{path}, line 3")]
    assert read_demonstrations(path) == expected
    assert files.read_source(path).format == "JSON lines, gzipped"


def test_several_files_and_fingerprints_of_content(write):
    first = write(f"[{ROW}]", "a.json")
    second = write(gzip.compress(f"[{ROW}]".encode()), "b.json.gz")
    result = formats.read("demonstrations", [first, second])
    assert [row.source for row in result.rows] == ["a.json, row 1", "b.json.gz, row 1"]
    assert result.fingerprints[first] == result.fingerprints[second]


def test_csv_cells_are_texts_on_the_line_where_their_row_ends(write):
    text = '\ufeffprompt,level,response\r\n1,7,NA\r\n\r\n"a ""b""\nc,d",8,null\r\ne,,007\r\n'
    path = write(gzip.compress(text.encode("utf-8")), "data.csv.gz")
    assert read_demonstrations(path) == [
        Row("1", ("NA",), f"{path}, line 2"),
        Row('a "b"\nc,d', ("null",), f"{path}, line 5"),
        Row("e", ("007",), f"{path}, line 6"),
    ]
    columns = formats.read("prompts", path).rows[0].columns
    assert columns == {"level": "7", "response": "NA"}
    path = write("prompt\tresponse\na,b\tc\n", "data.tsv")
    assert read_demonstrations(path) == [Row("a,b", ("c",), "data.tsv, line 2")]
    path = write('prompt,responses,ranks\np,"[""x"", ""y""]","[1, 0]"\n', "data.csv")
    assert formats.read("pairs", path).rows == [Row("p", ("y", "x"), "data.csv, line 2")]
    path = write("query,sample0,sample1,best\nq,x,y,1\n", "data.csv")
    assert formats.read("pairs", path).rows == [Row("q", ("y", "x"), "data.csv, line 2")]


def test_plain_text_is_a_prompt_a_line(write):
    path = write("[one\r\n\n  \n two\u2028\tthree\n", "prompts.txt")
    expected = [
        Row("[one", (), "prompts.txt, line 1"),
        Row(" two\u2028\tthree", (), "prompts.txt, line 4"),
    ]
    assert formats.read("prompts", path).rows == expected
    with pytest.raises(
        UserError,
        match=r"2 rows: expected an object with keys .* "
        r"found a string \(prompts.txt, line 1, line 4\)",
    ):
        formats.read("pairs", path)


def test_parquet(write):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    def save(rows):
        parquet.write_table(pyarrow.Table.from_pylist(rows), "data.parquet")

    turn = {"role": "user", "content": "hi"}
    save([{"messages": [turn], "level": n} for n in (3, 4)])
    result = formats.read("prompts", ["data.parquet", write('["text"]', "data.json")])
    assert [(row.source, row.columns) for row in result.rows] == [
        ("data.parquet, row 1", {"level": 3}),
        ("data.parquet, row 2", {"level": 4}),
        ("data.json, row 1", {}),
    ]
    choice = {"prompt": "q", "sample0": "a", "sample1": "b", "best": 1}
    save([choice | {"sample2": last} for last in (None, "c")])
    rows = formats.read("comparisons", "data.parquet").rows
    assert [len(row.responses) for row in rows] == [2, 3]
    for content in ("hello", "PAR1hello", gzip.compress(b"PAR1hello")):
        with pytest.raises(UserError, match=r"bad\.parquet: cannot be read as Parquet: "):
            formats.read("prompts", write(content, "bad.parquet"))


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(write):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    column = pyarrow.array(["a"])
    table = pyarrow.Table.from_arrays([column, column, column], ["prompt", "response", "prompt"])
    parquet.write_table(table, "data.parquet")
    with pytest.raises(UserError, match=r"data\.parquet: .* 'prompt'; rename"):
        formats.read("prompts", "data.parquet")


def test_a_small_parquet_file_that_holds_much_is_refused(write, monkeypatch):
    """Before, 46 kB with 20 million empty values took 4.6 GB."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    def save(values):
        parquet.write_table(pyarrow.table({"prompt": values}), "data.parquet")

    monkeypatch.setattr(files, "_MAY_UNPACK", 1 << 20)
    for values in (
        pyarrow.nulls(200_000, pyarrow.string()),
        pyarrow.array([[None] * 2_000_000], pyarrow.list_(pyarrow.string())),
        pyarrow.array(["x" * (1 << 16)] * 300),  # the file holds this text once
    ):
        save(values)
        with pytest.raises(UserError, match=r"data\.parquet: .* more than 100 times"):
            formats.read("prompts", "data.parquet")
    save(pyarrow.array([f"{number}" for number in range(2000)]))
    assert len(formats.read("prompts", "data.parquet").rows) == 2000


def test_folders_of_save_to_disk(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": text, "response": "r"} for text in "ab"]
    parts = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows)}
    datasets.DatasetDict(parts).save_to_disk("saved", num_shards={"train": 2, "test": 1})
    expected = [Row("a", ("r",), "saved/train, row 1"), Row("b", ("r",), "saved/train, row 2")]
    assert read_demonstrations("saved/train") == expected
    assert files.read_source("saved/train").format == "saved dataset"
    with pytest.raises(UserError, match=r"saved: .* test, train; .* saved/"):
        read_demonstrations("saved")
    [arrow] = (tmp_path / "saved" / "test").glob("*.arrow")
    arrow.write_bytes(b"no")
    with pytest.raises(UserError, match=r"saved/test: cannot be read as a saved dataset: "):
        read_demonstrations("saved/test")


def test_one_object_is_a_row(write):
    text = '{\n  "prompt": "a",\n  "response": "b"\n}\n'
    assert read_demonstrations(write(text, "data.json")) == [Row("a", ("b",), "data.json, row 1")]
    assert files.read_source("data.json").format == "JSON object"


def test_csv_files_as_pandas_writes_them(write):
    path = write(",prompt,response,desirable\n0,a,b,True\n1,c,d,False\n", "data.csv")
    found = formats.read("feedback", path)
    assert [row.targets for row in found.rows] == [(1.0,), (0.0,)]
    assert found.unread == {"Unnamed: 0": 2}
    path = write("prompt,chosen,rejected,margin\na,b,c,0.5\nd,e,f,\n", "data.csv")
    assert [row.margin for row in formats.read("comparisons", path).rows] == [0.5, 0.0]


def called(**arguments):
    """A row whose assistant calls a tool with these arguments, and the tool."""
    properties = {name: {"type": "string"} for name in arguments}
    function = {"name": "f", "parameters": {"type": "object", "properties": properties}}
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    turns += [{"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}]
    return {"messages": turns, "tools": [{"type": "function", "function": function}]}


def test_rows_of_arrow_are_those_of_json_lines(write, tmp_path, monkeypatch):
    """Arrow gives each object the keys of all rows, with null."""
    datasets = pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [called(city="Paris"), called(a="1", b="2")]
    for row in rows:  # as OpenAI publishes pairs, with functions, and inside another column
        row |= {"input": dict(row), "functions": row["tools"], "chosen": row["messages"][1]}
        row["data"] = [{"turns": row["messages"]}]
    expected = [record.value for record in files.read_source(write(rows)).records]
    table = pyarrow.Table.from_pylist(rows)
    assert table.to_pylist() != expected
    parquet.write_table(table, "data.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: table.to_pylist())
    for name in ("data.parquet", "saved", "org/name"):
        assert [record.value for record in files.read_source(name).records] == expected
    # A null that somebody wrote into JSON lines is a value; a column of Arrow stays.
    given = called(city=None) | {"extra": None}
    assert files.read_source(write([given])).records[0].value == given
    row = {"prompt": "a", "extra": None, "info": {"x": None, "y": 1}}
    parquet.write_table(pyarrow.Table.from_pylist([row]), "data.parquet")
    assert files.read_source("data.parquet").records[0].value == row


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SAID = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize("talk", [TALK, SAID])
def test_a_list_of_messages_is_a_row(talk, write):
    lines = "".join(f"{json.dumps(talk)}\n" for _ in range(2))
    expected = [("User:\na\n\nAssistant:\n", "b")]

    def read(content, name):
        return [row.texts for row in formats.read("demonstrations", write(content, name)).rows]

    assert read(lines, "data.jsonl") == expected * 2
    assert read(json.dumps([talk, talk], indent=1), "data.json") == expected * 2
    assert read(json.dumps(talk), "data.jsonl") == expected
    with pytest.raises(UserError, match=r"data\.jsonl, line 2: not valid JSON"):
        read(f'{json.dumps(talk)}\n[{{"role": \n', "data.jsonl")
    # Rows that have a column "role" stay rows.
    roles = [{"prompt": "a", "response": "b", "role": "teacher"}] * 2
    assert read(json.dumps(roles), "data.json") == [("a", "b")] * 2
    roles = [row | {"content": "c"} for row in roles]
    assert read(json.dumps(roles), "data.json") == [("a", "b")] * 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_of_unicode_is_named_with_its_conversion(encoding, write):
    path = write(f"prompt,response\n{'é'},b\n".encode(encoding), "data.csv")
    width = encoding[:6].upper()
    with pytest.raises(UserError, match=f"{width}; .* iconv -f {width} -t UTF-8 data.csv"):
        read_demonstrations(path)


def test_a_file_of_windows_is_named_with_its_conversion(write):
    path = write("prompt,response\na,b\né,“c”\n".encode("cp1252"), "data.csv")
    with pytest.raises(UserError, match=r"line 3: byte 0xe9 is not .*iconv -f WINDOWS-1252 -t UTF"):
        read_demonstrations(path)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet", "csv", "txt"])
def test_data_that_are_no_file_are_refused_at_once(ending, tmp_path):
    os.mkfifo(tmp_path / f"pipe.{ending}")
    (tmp_path / f"zero.{ending}").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(UserError, match=rf"{name}\.{ending}: is no file"):
            files.read_source(tmp_path / f"{name}.{ending}")


def test_a_value_that_is_nested_too_deep_is_refused(write):
    def nested(depth):
        return {"prompt": "a", "x": json.loads("[" * depth + "]" * depth), "y": "[" * 999}

    assert len(formats.read("prompts", write([nested(150)])).rows) == 1
    for depth in (250, 900):
        path = write([{"prompt": "a"}, nested(depth)])
        with pytest.raises(UserError, match="line 2: not valid JSON, nested too deeply"):
            formats.read("prompts", path)
    deep = json.dumps("[" * 100_000)
    call = {"from": "function_call", "value": "[" * 100_000}
    for row in ({"messages": TALK, "tools": "[" * 100_000}, {"conversations": [SAID[0], call]}):
        with pytest.raises(UserError, match=r"line 1: .* is not JSON"):
            read_demonstrations(write([row]))
    assert files.read_source(write(f'{{"prompt": {deep}}}')).records


def test_hugging_face_datasets(monkeypatch, tmp_path):
    def load_dataset(name, *configs, split):
        if configs:
            return [{"prompt": f"{configs[0]} of {name}"}]
        if name == "nobody/nothing":
            raise ConnectionError("offline")
        return [{"prompt": name}, {"prompt": split}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = formats.read("prompts", ["Some-Org/some_data:test[:2]", "org/name"]).rows
    assert [row.prompt for row in rows] == ["Some-Org/some_data", "test[:2]", "org/name", "train"]
    assert rows[1].source == "Some-Org/some_data:test[:2], row 2"
    [row] = formats.read("prompts", "openai/gsm8k/main:test").rows
    assert (row.prompt, row.source) == ("main of openai/gsm8k", "openai/gsm8k/main:test, row 1")
    with pytest.raises(UserError, match=r"no such file.*\(split 'train'\): offline$"):
        formats.read("pairs", "nobody/nothing")
    (tmp_path / "org").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("org/name", "runs/mine", "./name", "org/name/config:train"):
        with pytest.raises(UserError, match=f"^{path}: no such file$"):
            formats.read("prompts", path)


FAULTS_OF_JSON = [
    ("", "data.json: holds no rows"),
    ("[ ]", "data.json: holds no rows"),
    (
        (f'[\n{ROW},\n{{"prompt": "c", "resp'),
        "not valid JSON, unterminated .* line 3, column 17; the text ends there",
    ),
    (f"[\n{ROW},\n", "not valid JSON, expecting value at line 3, column 1; the text ends there"),
    (f"[{ROW}\n{ROW}]", r"not valid JSON, expecting ',' delimiter at line 2, column 1$"),
    (
        '[\n{"prompt": "a" "response": "b"}]',
        "not valid JSON, expecting ',' delimiter at line 2, column 16$",
    ),
    (f"[{ROW}]\nmore", "not valid JSON, extra data at line 2, column 1"),
    (
        (f'{ROW}\n\n{{"prompt": "c", "re'),
        "line 3: not valid JSON.* at column 17; the text ends there",
    ),
    (
        '{"prompt": "a",\n"response": "b"}\n{"prompt": "c"}',
        "line 1: not valid JSON.*; the text ends there .in JSON lines",
    ),
    ("prompt,response\na,b", "line 1: expected a JSON list or JSON lines, found 'prompt,response'"),
    ('{"a": ' + "[" * 200_000, "line 1: not valid JSON, nested too deeply"),
    (f'[{ROW},\n{{"a": {"9" * 5000}}}]', "not valid JSON, Exceeds the limit .* digits"),
    (
        '[{"prompt": "a", "prompt": "b", "response": "c"}]',
        "not valid JSON, the key 'prompt' occurs twice in {'prompt'",
    ),
    (b'\xef\xbb\xbf[\n"caf\xe9"]', "line 2: byte 0xe9 is not UTF-8, which is expected"),
    (
        '{"prompt": "a", "response": "b',
        "line 1: not valid JSON, unterminated string starting at column 29;",
    ),
    # Without the time, which would name the case differently in each of pytest-xdist's processes.
    (gzip.compress(b"[" + bytes(range(256)) * 9, mtime=0)[:40], "broken gzip file"),
]
FAULTS_OF_CSV = [
    ("prompt,response\na,b\nc,d,e\n", "line 3: 3 cells under a header of 2; quote cells"),
    ("prompt,response\na,b\nc\n", "line 3: 1 cells under a header of 2; quote cells"),
    (
        'prompt,response\na,"b\nc',
        "line 1: not valid CSV in the row after this one: unexpected end of data",
    ),
    (
        "prompt,prompt\na,b\n",
        "line 1: the names of the columns must differ, found 'prompt', 'prompt'",
    ),
    ("prompt,\na,b\n", "line 1: the names of the columns must differ"),
    ("prompt,response\na,\n", "line 2: 'response' is empty"),
    ("prompt,messages\na,b\n", "line 2: the column 'messages' holds JSON, found 'b'"),
    ("best\n" + "[" * 200_000, "line 2: the column 'best' holds JSON"),
    ("prompt,response\n", "data.csv: holds no rows"),
    ("prompt,response\na,b\n,\n", "line 3: 'prompt' is empty"),
    (
        "prompt;response\na;b\n",
        "line 1: one column 'prompt;response'; separate columns by commas, or by tabs",
    ),
]
FAULTS_OF_TEXT = [
    (ROW, "line 1: expected a text, found a JSON object; call the file .jsonl"),
]
TABLES = {"data.json": FAULTS_OF_JSON, "data.csv": FAULTS_OF_CSV, "data.txt": FAULTS_OF_TEXT}
FAULTS = [(name, *fault) for name, faults in TABLES.items() for fault in faults]


@pytest.mark.parametrize(("name", "content", "message"), FAULTS, ids=lambda value: str(value)[:30])
def test_faults(write, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        read_demonstrations(write(content, name))
    assert str(error.value).startswith(name)


def test_names(write, tmp_path):
    write("[]", "sft_data.json")
    with pytest.raises(
        UserError, match=r"sft_dat\.json: no such file; did you mean .*sft_data\.json\?"
    ):
        files.read_source(str(tmp_path / "sft_dat.json"))
    with pytest.raises(
        UserError, match=r"data/pairs\.json: no such file$"
    ):  # not taken for a dataset's name
        formats.read("pairs", "data/pairs.json")
    with pytest.raises(UserError, match="is a folder"):
        files.read_source(tmp_path)
    with pytest.raises(
        UserError,
        match=r"give --data FILE .* preference_data",
    ):
        formats.read("pairs", [])
    with pytest.raises(UserError, match=r"/preference_data\.json: no such file"):
        formats.read("pairs", tmp_path)
    with pytest.raises(UserError, match="--data demo x: `demo` cannot be mixed with files"):
        formats.read("pairs", ["demo", "x"])
    write(f"[{ROW}]", "sft_data.json")
    assert read_demonstrations(tmp_path)[0].source == str(tmp_path / "sft_data.json") + ", row 1"


def test_a_gzip_bomb_stops_early(write, monkeypatch):
    monkeypatch.setattr(files, "_MAY_UNPACK", 1 << 21)
    plain = b"[" + b" " * (1 << 24) + ROW.encode() + b"]"
    with pytest.raises(UserError, match=r"bomb\.json: .* more than 100 times .* gunzip"):
        read_demonstrations(write(gzip.compress(plain), "bomb.json"))
    assert len(read_demonstrations(write(plain, "plain.json"))) == 1
    two_members = gzip.compress(f"[{ROW},\n".encode()) + gzip.compress(f"{ROW}]".encode())
    assert len(read_demonstrations(write(two_members, "two.json.gz"))) == 2
