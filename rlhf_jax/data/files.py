"""The records of a data file or of a Hugging Face dataset, each with its place.

JSON, JSON lines, CSV (whose cells stay texts), Parquet and plain text are files; folders of
``save_to_disk`` and datasets of the hub are read by the package ``datasets``, which is imported
only then. A line or row that cannot be read becomes a record that holds its error, so that `check`
can name all of them and a run stops at the first.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import statistics
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.data.conversation import are_turns
from rlhf_jax.data.rows import BadRow, Fields, Record
from rlhf_jax.errors import UserError, did_you_mean, is_hub_name, read_file

_ENDINGS = (".json", ".jsonl", ".gz", ".csv", ".tsv", ".parquet", ".txt", ".yaml", ".yml")
_PACKED_AT_MOST = 100  # a gzip or Parquet file may unpack to this many times its size
_MAY_UNPACK = 1 << 26  # bytes that any file may unpack to
_VALUE = 64  # bytes that a value of Parquet takes in memory, even if it is empty
_DATASET = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]:%+-]+))?", re.ASCII
)
_MOST_DEEP = 200  # lists and objects inside each other
_AT_ONCE = 256  # rows of Parquet that are unpacked at once
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# CSV columns whose cells are JSON, since CSV has no lists and numbers.
_JSON_COLUMNS = {"messages", "responses", "ranking", "ranks", "targets", "best", "margin"}
_INDEX = "Unnamed: 0"  # what pandas calls the index that it writes without a name
csv.field_size_limit(1 << 27)  # characters of a cell; the module's own limit is 131072


class Source(NamedTuple):
    """The records of a file or dataset, the sha256 of its content (for a file: of its unpacked
    bytes), and its format.

    Records are named ``FILE, line N`` in JSON lines, CSV (the line on which a row ends) and text,
    otherwise ``FILE, row N``.
    """

    records: list[Record]
    fingerprint: str
    format: str


def read_source(name: str | os.PathLike[str], *, whole_text: bool = False) -> Source:
    """The content of a file, of a folder that ``datasets.save_to_disk`` wrote, or of a dataset
    named ``org/name``, ``org/name:split``, ``org/name/config`` or ``org/name/config:split``.

    ``.csv``, ``.tsv``, ``.parquet`` and ``.txt`` (each also with ``.gz`` after it) are read as such
    files, anything else as a JSON list, one JSON object or JSON lines. A name is a dataset's if no
    such path exists and it does not end like a data file. The default split is ``train``.

    Args:
      whole_text: a ``.txt`` file is one record ``{text}``; by default each of its lines is one.

    Raises:
      UserError: for a file or dataset that cannot be read at all.
    """
    path = Path(name)
    match = _DATASET.fullmatch(str(name))
    if is_saved_dataset(name):
        source = _saved_dataset(path)
    elif os.path.isdir(path):  # the methods of Path raise for a name that is too long
        raise UserError(f"{name}: is a folder; name the file inside it")
    elif os.path.exists(path):
        source = parse_bytes(_bytes(path), str(name), whole_text)
        if path.suffix.lower() == ".gz":
            source = source._replace(format=f"{source.format}, gzipped")
    elif match and is_hub_name(match["name"]) and not str(name).endswith(_ENDINGS):
        source = _dataset(match["name"], match["config"], match["split"] or "train")
    else:
        others = os.listdir(path.parent) if os.path.isdir(path.parent) else []
        raise UserError(f"{name}: no such file{did_you_mean(path.name, others)}")
    if not source.records:
        raise UserError(f"{name}: holds no rows")
    return source


def from_python(rows: Iterable[Any], name: str) -> Source:
    """Rows of Python, such as dicts or a ``datasets.Dataset``, as JSON holds them: arrays become
    lists, and the nulls that `datasets` adds to messages go. What JSON cannot hold, such as a date,
    stays: it is a fault only where a stage reads it. Iterated once; named ``NAME, row N``.

    Raises:
      UserError: these are no rows, or there are none.
    """
    is_table = isinstance(rows, Mapping) or hasattr(rows, "columns")  # which yields no rows
    if is_table or isinstance(rows, str | bytes) or not hasattr(rows, "__iter__"):
        found = type(rows).__name__
        if isinstance(rows, Mapping):
            found += f" of {', '.join(map(str, rows))}; give one split, or rows"
        elif is_table:
            found += '; of a table of pandas give table.to_dict("records")'
        raise UserError(f"{name}: expected a list of dicts or a datasets.Dataset, found {found}")
    is_arrow = hasattr(rows, "features")
    content = hashlib.sha256()
    records = []
    for number, row in enumerate(rows, 1):
        source = f"{name}, row {number}"
        if isinstance(row, str) and os.path.isfile(row):
            raise UserError(f"{source}: {row} is a file; name it in the settings' data")
        value = _as_json(row)
        content.update(json.dumps(value, default=str).encode() + b"\n")
        records.append(Record(_unfilled(value) if is_arrow else value, source))
    if not records:
        raise UserError(f"{name}: holds no rows")
    return Source(records, content.hexdigest(), "Python")


def _as_json(row: Any) -> Any:
    if not isinstance(row, Mapping):
        return row
    fields = {}
    for key, value in row.items():
        fields[str(key)] = value
        with contextlib.suppress(AttributeError, TypeError, ValueError, RecursionError):
            text = json.dumps(value, default=lambda array: array.tolist())
            fields[str(key)] = json.loads(text)
    return fields


def parse_bytes(data: bytes, name: str, whole_text: bool = False) -> Source:
    """The records in the bytes of a file, unpacked; the name decides how, as in `read_source`."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    fingerprint = hashlib.sha256(data).hexdigest()
    records: Iterable[Record]
    if suffix == ".parquet" or data.startswith(b"PAR1"):
        return Source(_of_arrow(_parquet(data, name), name), fingerprint, "Parquet")
    text = _decode(name, data)
    del data  # not twice in memory while its lines are read
    if suffix in _DELIMITERS:
        form = suffix[1:].upper()
        records = _csv(text, name, _DELIMITERS[suffix])
    elif suffix == ".txt":
        form = "text"
        records = _text(text, name, whole_text)
    else:
        form, records = _json_records(text, name)
    return Source(list(records), fingerprint, form)


def _numbered(values: Iterable[Any], name: str) -> list[Record]:
    return [Record(value, f"{name}, row {n}") for n, value in enumerate(values, 1)]


def _lines(text: str, name: str) -> Iterator[Record]:
    """The lines that are not blank, each with its number."""
    # Only \n ends a line: str.splitlines would also cut inside strings, at U+2028.
    for number, line in enumerate(re.finditer(r"(.*)(?:\n|\Z)", text), 1):
        if line[1] and not line[1].isspace():
            yield Record(line[1], f"{name}, line {number}")


def _text(text: str, name: str, whole_text: bool) -> list[Record]:
    lines = list(_lines(text, name))
    if lines and isinstance(_json(lines[0].value, name), dict):
        fault = "expected a text, found a JSON object; call the file .jsonl"
        raise UserError(f"{lines[0].source}: {fault}")
    if whole_text and lines:
        return [Record({"text": text.replace("\r\n", "\n")}, name)]
    return [Record(line.value.removesuffix("\r"), line.source) for line in lines]


def _json_records(text: str, name: str) -> tuple[str, list[Record]]:
    """The format of a JSON file and its records."""
    first = next(_lines(text, name), None)
    if first and first.value.lstrip()[0] not in '[{"':
        start = first.value[:20]
        raise UserError(f"{first.source}: expected a JSON list or JSON lines, found {start!r}")
    if first and first.value.lstrip().startswith("["):
        whole = _json(text, name)
        if not isinstance(whole, UserError):  # of messages it is one conversation
            return "JSON list", _numbered([whole] if are_turns(whole) else whole, name)
        if not are_turns(_json(first.value, name)):
            raise whole
    lines = _lines(text, name)
    records = [Record(_json(line.value, line.source), line.source) for line in lines]
    if records and isinstance(records[0].value, UserError):
        whole = _json(text, name)
        if isinstance(whole, dict):
            return "JSON object", _numbered([whole], name)
    return "JSON lines", records


def _bytes(path: Path) -> bytes:
    data = read_file(path, most=None)
    if not data.startswith(b"\x1f\x8b"):
        return data
    most = max(_MAY_UNPACK, _PACKED_AT_MOST * len(data))
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            # Piece by piece: one large read allocates all of its size.
            pieces = (file.read(1 << 20) for _ in range((most >> 20) + 2))
            unpacked = b"".join(itertools.takewhile(bool, pieces))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: broken gzip file ({error}); copy it again") from error
    if len(unpacked) > most:
        raise UserError(
            f"{path}: unpacks to more than {_PACKED_AT_MOST} times its size; if that is intended, "
            "unpack it with gunzip"
        )
    return unpacked


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, unpacked if gzip packed it, without a byte order mark.

    Raises:
      UserError: the file cannot be read or is not UTF-8.
    """
    return _decode(str(path), _bytes(Path(path)))


def _decode(name: str, data: bytes) -> str:
    how = f"convert it to UTF-8: iconv -f {{}} -t UTF-8 {name.removesuffix('.gz')} > NEW_FILE"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4]:
        encoding = "UTF-32" if b"\0\0" in data[:4] else "UTF-16"
        raise UserError(f"{name}: seems to be {encoding}; {how.format(encoding)}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        content = error.object  # without a byte order mark, unlike data
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8, which is "
            f"expected; if it is Windows-1252, {how.format('WINDOWS-1252')}"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> Fields:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice = statistics.mode(key for key, _ in pairs)
        raise ValueError(f"the key {twice!r} occurs twice in {unique!r:.80}")
    return unique


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _json(text: str, source: str) -> Any:
    """The JSON value of the text, or the error if it has none."""
    try:
        value = _DECODER.decode(text)
        if _is_deep(value, text):
            raise RecursionError
        return value
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        what = f"{error.msg.lower().removesuffix(' at')} at {line}column {error.colno}"
        if error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()):
            what += "; the text ends there (in JSON lines each row is one line)"
    except RecursionError:
        what = "nested too deeply"
    except ValueError as error:  # a key twice, or a number of thousands of digits
        what = str(error)
    return BadRow(source, f"not valid JSON, {what}")


def _is_deep(value: Any, text: str) -> bool:
    """Whether lists and objects are nested so deep that what reads the value may fail."""
    if text.count("[") + text.count("{") <= _MOST_DEEP:
        return False
    level = [value]
    for _ in range(_MOST_DEEP):
        nested = [inner.values() if isinstance(inner, dict) else inner for inner in level]
        level = [i for inner in nested for i in inner if isinstance(i, dict | list)]
        if not level:
            return False
    return True


def _csv(text: str, name: str, delimiter: str) -> Iterator[Record]:
    """The rows under a header line. Every cell is text, except ``best`` and the columns of lists,
    which are JSON. (`datasets` fills rows of too few cells silently and knows no lines.)
    """
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    source = f"{name}, line 1"
    try:
        header = next(table, [])
        if header[:1] == [""]:
            header[0] = _INDEX
        if "" in header or len(set(header)) < len(header):
            names = ", ".join(map(repr, header))
            raise UserError(f"{source}: the names of the columns must differ, found {names}")
        if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
            advice = "separate columns by commas, or by tabs in a .tsv"
            raise UserError(f"{source}: one column {header[0]!r}; {advice}")
        for cells in filter(None, table):
            source = f"{name}, line {table.line_num}"
            if len(cells) != len(header):
                advice = "quote cells that hold a delimiter or a line break"
                what = f"{len(cells)} cells under a header of {len(header)}; {advice}"
                yield Record(BadRow(source, what), source)
                continue
            row: Any = dict(zip(header, cells, strict=True))
            for key in _JSON_COLUMNS.intersection(header):
                value = _json(row[key] or "null", source)
                if isinstance(value, UserError):
                    what = f"the column {key!r} holds JSON, found {row[key][:40]!r}"
                    row = BadRow(source, what)
                    break
                row[key] = value
            yield Record(row, source)
    except csv.Error as error:  # where the next row would start is unknown
        what = f"{source}: not valid CSV in the row after this one: {error}"
        yield Record(UserError(what), source)


def _parquet(data: bytes, name: str) -> list[Fields]:
    import pyarrow.parquet  # type: ignore[import-untyped]  # datasets brings it

    rows: list[Fields] = []
    num_bytes = 0
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            twice = statistics.mode(names)
            raise UserError(f"{name}: has two columns {twice!r}; rename one of them")
        for batch in file.iter_batches(_AT_ONCE):
            num_bytes += batch.nbytes + _VALUE * batch.num_rows * batch.num_columns
            if num_bytes > max(_MAY_UNPACK, _PACKED_AT_MOST * len(data)):
                what = f"unpacks to more than {_PACKED_AT_MOST} times its size"
                raise UserError(f"{name}: {what}; if that is intended, write it as JSON lines")
            rows += batch.to_pylist()
    except UserError:
        raise
    except Exception as error:  # pyarrow's kinds
        raise UserError(f"{name}: cannot be read as Parquet: {error}") from error
    return rows


def _of_arrow(rows: Iterable[Fields], name: str) -> list[Record]:
    """The records of rows of Arrow, which gives each object of a column the keys of all of them,
    with null: such keys are left out of messages and tools, as in TRL. What else a reward reads
    stays as it is.
    """
    values = ({key: _unfilled(value, key) for key, value in row.items()} for row in rows)
    return _numbered(values, name)


def _unfilled(value: Any, key: str = "") -> Any:
    """The value without nulls in the messages and tools inside it."""
    if key in ("tools", "functions") or are_turns([value]):
        return _without_nulls(value)
    if isinstance(value, dict):
        return {key: _unfilled(inner, key) for key, inner in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [_unfilled(inner) for inner in value]
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def is_saved_dataset(name: str | os.PathLike[str]) -> bool:
    """Whether ``datasets.save_to_disk`` wrote this folder."""
    files = [os.path.join(name, file) for file in ("state.json", "dataset_dict.json")]
    return any(map(os.path.isfile, files))


def _saved_dataset(folder: Path) -> Source:
    import datasets  # a second, and only for this

    if (folder / "dataset_dict.json").exists():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise UserError(
            f"{folder}: holds the splits {', '.join(splits)}; name one as {folder}/SPLIT"
        )
    try:
        return _of_dataset(datasets.load_from_disk(folder), str(folder), "saved dataset")
    except Exception as error:  # pyarrow's kinds, and what a broken state.json makes
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder}: cannot be read as a saved dataset: {what}") from error


def _dataset(name: str, config: str | None, split: str) -> Source:
    import datasets  # a second, and only for this

    configs = [] if config is None else [config]
    try:
        rows = datasets.load_dataset(name, *configs, split=split)
    except Exception as error:  # the library raises a dozen kinds, offline or for a wrong name
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{name}: no such file, and it could not be loaded as a Hugging Face dataset (split "
            f"{split!r}): {reason}"
        ) from error
    return _of_dataset(rows, f"{'/'.join([name, *configs])}:{split}", "Hugging Face dataset")


def _of_dataset(rows: Iterable[Any], name: str, form: str) -> Source:
    values = list(map(dict, rows))
    content = hashlib.sha256()
    for value in values:
        content.update(json.dumps(value, sort_keys=True, default=str).encode())
    return Source(_of_arrow(values, name), content.hexdigest(), form)
