"""The records of a data file or of a Hugging Face dataset, each with its place.

JSON, JSON lines, CSV (whose cells stay texts), Parquet and plain text are files; datasets are loaded by name with the
package ``datasets``, which is imported only then. A line or row that cannot be read becomes a record that holds its
error, so that `check` can name all of them and a run stops at the first.
"""

import csv
import difflib
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.data.rows import BadRow, Record
from rlhf_jax.errors import UserError

_SUFFIXES = (".json", ".jsonl", ".gz", ".csv", ".tsv", ".parquet", ".txt", ".yaml", ".yml")
_PACKED_AT_MOST, _MAY_UNPACK = 100, 1 << 26  # times its size, and bytes that any file may unpack to
_DATASET = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]:%+-]+))?", re.ASCII)
_OPENING = re.compile(r"\s*\[[ \t\r\n]*(\]?)[ \t\r\n]*")
_SEPARATOR = re.compile(r"[ \t\r\n]*([,\]]?)[ \t\r\n]*")
# CSV columns whose cells are JSON: what they hold has no spelling of its own there.
_JSON_COLUMNS = ("messages", "responses", "ranking", "ranks", "targets", "best")
# Files that are not the data, by their first bytes.
_NO_DATA = {
    b"version https://git-lfs": "is a pointer of git-lfs, not the data; run `git lfs pull`",
    b"PK\x03\x04": "is a zip archive; unpack it and name the file inside",
}
_WRAPPERS = ("data", "rows", "examples", "items", "train")  # keys under which whole files keep their rows
_INNER_MARK = re.compile("[\n\\]}]\ufeff")
csv.field_size_limit(1 << 27)  # characters of a cell; the module's own limit is 131072


class Source(NamedTuple):
    """What a file or dataset holds, sha256 of its content (of a file: unpacked bytes), and the format it was read as.

    Records are named ``FILE, line N`` in JSON lines, CSV (the line on which a row ends) and text, else ``FILE, row N``.
    """

    records: list[Record]
    fingerprint: str
    format: str


def read_source(name: str | PathLike[str]) -> Source:
    """The content of a file, or of a dataset named ``org/name`` or ``org/name:split``.

    ``.csv``, ``.tsv``, ``.parquet`` and ``.txt`` (each also with ``.gz`` after it) are read as that, anything else as a
    JSON list or JSON lines. A name is a dataset's if it is no existing path and does not end like a data file. The
    default split is ``train``.

    Raises:
      UserError: for a file or dataset that cannot be read at all.
    """
    path = Path(name)
    if os.path.isdir(path):  # of pathlib's forms, a name that is too long for a file raises
        raise UserError(f"{name}: is a folder; name the file inside it")
    match = _DATASET.fullmatch(str(name))
    if os.path.exists(path):
        source = _file(path, str(name))
    elif match and not match["name"].endswith(_SUFFIXES):
        source = _dataset(match["name"], match["split"] or "train")
    else:
        others = os.listdir(path.parent) if os.path.isdir(path.parent) else []
        near = difflib.get_close_matches(path.name, others, n=1)
        raise UserError(f"{name}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    if not source.records:
        raise UserError(f"{name}: holds no rows")
    return source


def _file(path: Path, name: str) -> Source:
    packed = path.suffix.lower() == ".gz"
    suffix = Path(path.stem if packed else path.name).suffix.lower()
    data = _bytes(path)
    for start, what in _NO_DATA.items():
        if data.startswith(start):
            raise UserError(f"{name}: {what}")
    if suffix == ".parquet" or data.startswith(b"PAR1"):
        records, form = _parquet(data, name), "Parquet"
    else:
        records, form = parse_text(_decode(name, data), name, suffix)
    return Source(records, hashlib.sha256(data).hexdigest(), form + (", gzipped" if packed else ""))


def parse_text(text: str, name: str, suffix: str = ".json") -> tuple[list[Record], str]:
    """The records of a file's text, and the name of its format."""
    if suffix in (".csv", ".tsv"):
        return list(_csv(text, name, "," if suffix == ".csv" else "\t")), suffix[1:].upper()
    # Only \n ends a line: str.splitlines would also cut inside strings, at U+2028.
    lines = [(n, line.removesuffix("\r")) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if suffix == ".txt":
        return list(_texts(lines, name)), "text"
    if text.lstrip().startswith("["):
        return list(_json_list(text, name)), "JSON list"
    if lines and text.lstrip()[0] not in '{"':
        raise UserError(f"{name}, line {lines[0][0]}: expected a JSON list or JSON lines, found {lines[0][1][:20]!r}")
    records = list(_json_lines(lines, name))
    whole = _decoded(text) if len(records) == 1 or (records and isinstance(records[0].value, UserError)) else None
    if isinstance(whole, dict) and not {"prompt", "query", "messages", "chosen"} & set(whole):
        for key in [key for key in _WRAPPERS if isinstance(whole.get(key), list)]:
            raise UserError(f"{name}: the rows must be the list itself, without the key {key!r} around it")
    return records, "JSON lines"


def _texts(lines: list[tuple[int, str]], name: str) -> Iterator[Record]:
    """A prompt a line; a file of JSON objects or of a table is an error."""
    source = f"{name}, line {lines[0][0]}" if lines else name
    if len(lines) > 1 and all("\t" in line for _, line in lines):
        raise UserError(f"{source}: each line has tabs, as a table has; call the file .tsv, with a line of names first")
    if lines and isinstance(_decoded(lines[0][1]), dict):
        raise UserError(f"{source}: a JSON object, where a text should stand; call the file .jsonl")
    yield from (Record(line, f"{name}, line {n}") for n, line in lines)


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
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
        raise UserError(f"{path}: unpacks to more than {_PACKED_AT_MOST} times its size; if that is meant, use gunzip")
    return unpacked


def read_text(path: str | PathLike[str]) -> str:
    """The text of a UTF-8 file, unpacked if gzip packed it, without a byte order mark.

    Raises:
      UserError: the file cannot be read or is not UTF-8.
    """
    return _decode(str(path), _bytes(Path(path)))


def _decode(name: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        content = error.object  # without a byte order mark, unlike data
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise UserError(f"{name}, line {line}: byte 0x{byte:02x} is not UTF-8, which is expected") from error
    if mark := _INNER_MARK.search(text):
        line = text.count("\n", 0, mark.end()) + 1
        raise UserError(
            f"{name}, line {line}: a byte order mark in the middle of the file, as joined files have; remove it"
        )
    return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    [(key, count)] = Counter(key for key, _ in pairs).most_common(1) or [("", 1)]
    if count > 1:
        raise ValueError(f"the key {key!r} stands twice in one object")
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_NOT_JSON = (ValueError, RecursionError)  # JSONDecodeError is a ValueError; so is a number of thousands of digits


def _decoded(text: str) -> Any:
    """The JSON value that the text is; None if it is none."""
    try:
        return _DECODER.decode(text.strip())
    except _NOT_JSON:
        return None


def _not_json(error: Exception, hint: str, hint_if_cut: str) -> str:
    """What is wrong with the syntax; ``hint_if_cut`` where the text ends too soon."""
    what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    if isinstance(error, json.JSONDecodeError):
        cut = error.msg.startswith("Unterminated string") or error.pos >= len(error.doc.rstrip())
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        message = f"{error.msg[0].lower()}{error.msg[1:]}".removesuffix(" at")
        what = f"{message} at {place}{hint_if_cut if cut else hint}"
    return f"not valid JSON, {what}"


def _json_lines(lines: list[tuple[int, str]], name: str) -> Iterator[Record]:
    for number, line in lines:
        source = f"{name}, line {number}"
        try:
            yield Record(_DECODER.decode(line.strip()), source)
        except _NOT_JSON as error:
            hint = "; in JSON lines each row is one line" if number == lines[0][0] else ""
            cut = "; the file seems cut off" if number == lines[-1][0] else ""
            yield Record(BadRow(source, _not_json(error, hint, hint or cut)), source)


def _json_list(text: str, name: str) -> Iterator[Record]:
    """The elements of a JSON list, up to wrong syntax: behind it nothing more can be read."""
    mark, number = _OPENING.match(text), 0
    try:
        while mark and mark[1] != "]":
            number += 1
            value, end = _DECODER.raw_decode(text, mark.end())
            yield Record(value, f"{name}, row {number}")
            mark = _SEPARATOR.match(text, end)
            if mark and not mark[1]:
                raise json.JSONDecodeError("Expecting ',' or ']'", text, mark.end())
        if mark and mark.end() < len(text):
            raise json.JSONDecodeError("Extra data", text, mark.end())
    except _NOT_JSON as error:
        source = f"{name}, row {number}"
        what = _not_json(error, "", "; the file is cut off inside this row")
        yield Record(UserError(f"{source}: {what}"), source)


def _csv(text: str, name: str, delimiter: str) -> Iterator[Record]:
    """The rows under a header line. Every cell is text, but ``best`` and the columns of lists, which are JSON."""
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    source = f"{name}, line 1"
    try:
        for cells in filter(None, table):
            source = f"{name}, line {table.line_num}"
            if header:
                yield Record(_csv_row(header, cells, source), source)
            elif "" in cells or len(set(cells)) < len(cells):
                raise UserError(f"{source}: each column needs a name of its own, found {', '.join(map(repr, cells))}")
            elif len(cells) == 1 and (";" in cells[0] or "\t" in cells[0]):
                what = f"one column {cells[0]!r}; separate columns by commas, or by tabs in a .tsv"
                raise UserError(f"{source}: {what}")
            else:
                header = cells
    except csv.Error as error:  # where the next row would start is unknown
        yield Record(UserError(f"{source}: not valid CSV in the row after this one: {error}"), source)


def _csv_row(header: list[str], cells: list[str], source: str) -> dict[str, Any] | UserError:
    if len(cells) != len(header):
        hint = "; quote cells that hold a delimiter or a line break" if len(cells) > len(header) else ""
        return BadRow(source, f"{len(cells)} cells under a header of {len(header)}{hint}")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for key in set(_JSON_COLUMNS) & set(header):
        try:
            row[key] = json.loads(row[key] or "null")
        except _NOT_JSON:
            return BadRow(source, f"the column {key!r} holds JSON, found {row[key][:40]!r}")
    return row


def _parquet(data: bytes, name: str) -> list[Record]:
    import pyarrow.parquet  # type: ignore[import-untyped]  # datasets brings it

    try:
        rows = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).read().to_pylist()
    except Exception as error:  # pyarrow's kinds
        raise UserError(f"{name}: cannot be read as Parquet: {error}") from error
    return [Record(row, f"{name}, row {number}") for number, row in enumerate(rows, 1)]


def _dataset(name: str, split: str) -> Source:
    import datasets  # a second, and only for this

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds, offline or for a wrong name
        what = f"no such file, and it could not be loaded as a Hugging Face dataset (split {split!r})"
        raise UserError(f"{name}: {what}: {type(error).__name__}: {error}") from error
    records = [Record(dict(row), f"{name}:{split}, row {number}") for number, row in enumerate(rows, 1)]
    content = "".join(json.dumps(record.value, sort_keys=True, default=str) for record in records)
    return Source(records, hashlib.sha256(content.encode()).hexdigest(), "Hugging Face dataset")
