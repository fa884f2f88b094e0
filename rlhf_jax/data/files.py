"""The records of a data file or of a Hugging Face dataset, each with its place.

JSON, JSON lines, CSV (whose cells stay texts), Parquet and plain text are files; datasets are
loaded by name with the package ``datasets``, which is imported only then. A line or row that cannot
be read becomes a record that holds its error, so that `check` can name all of them and a run stops
at the first.
"""

import csv
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
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.data.rows import BadRow, Record
from rlhf_jax.errors import UserError, did_you_mean, file_errors

_SUFFIXES = (".json", ".jsonl", ".gz", ".csv", ".tsv", ".parquet", ".txt", ".yaml", ".yml")
_PACKED_AT_MOST, _MAY_UNPACK = 100, 1 << 26  # times its size, and bytes that any file may unpack to
_DATASET = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]:%+-]+))?", re.ASCII)
# CSV columns whose cells are JSON: what they hold has no spelling of its own there.
_JSON_COLUMNS = ("messages", "responses", "ranking", "ranks", "targets", "best", "desirable")
csv.field_size_limit(1 << 27)  # characters of a cell; the module's own limit is 131072


class Source(NamedTuple):
    """What a file or dataset holds, sha256 of its content (of a file: unpacked bytes), and the
    format it was read as.

    Records are named ``FILE, line N`` in JSON lines, CSV (the line on which a row ends) and text,
    else ``FILE, row N``.
    """

    records: list[Record]
    fingerprint: str
    format: str


def read_source(name: str | os.PathLike[str], *, whole_text: bool = False) -> Source:
    """The content of a file, or of a dataset named ``org/name`` or ``org/name:split``.

    ``.csv``, ``.tsv``, ``.parquet`` and ``.txt`` (each also with ``.gz`` after it) are read as
    that, anything else as a JSON list or JSON lines. A name is a dataset's if it is no existing
    path and does not end like a data file. The default split is ``train``.

    Args:
      whole_text: a ``.txt`` file is one record ``{text}``; by default each of its lines is one.

    Raises:
      UserError: for a file or dataset that cannot be read at all.
    """
    path = Path(name)
    if os.path.isdir(path):  # of pathlib's forms, a name that is too long for a file raises
        raise UserError(f"{name}: is a folder; name the file inside it")
    match = _DATASET.fullmatch(str(name))
    if os.path.exists(path):
        source = _file(path, str(name), whole_text)
    elif match and not match["name"].endswith(_SUFFIXES):
        source = _dataset(match["name"], match["split"] or "train")
    else:
        others = os.listdir(path.parent) if os.path.isdir(path.parent) else []
        raise UserError(f"{name}: no such file{did_you_mean(path.name, others)}")
    if not source.records:
        raise UserError(f"{name}: holds no rows")
    return source


def _file(path: Path, name: str, whole_text: bool) -> Source:
    packed = path.suffix.lower() == ".gz"
    suffix = Path(path.stem if packed else path.name).suffix.lower()
    data = _bytes(path)
    if suffix == ".parquet" or data.startswith(b"PAR1"):
        records, form = iter(_parquet(data, name)), "Parquet"
    else:
        records, form = parse_text(_decode(name, data), name, suffix, whole_text)
    return Source(
        list(records), hashlib.sha256(data).hexdigest(), form + (", gzipped" if packed else "")
    )


def parse_text(
    text: str, name: str, suffix: str = ".json", whole_text: bool = False
) -> tuple[Iterator[Record], str]:
    """The records of a file's text, and the name of its format."""
    if suffix in (".csv", ".tsv"):
        return _csv(text, name, "," if suffix == ".csv" else "\t"), suffix[1:].upper()
    # Only \n ends a line: str.splitlines would also cut inside strings, at U+2028.
    lines = [
        (f"{name}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()
    ]
    if suffix == ".txt":
        if lines and isinstance(_json(lines[0][1], ""), dict):
            raise UserError(
                f"{lines[0][0]}: a JSON object, where a text should stand; call the file .jsonl"
            )
        if whole_text and lines:
            return iter([Record({"text": text.replace("\r\n", "\n")}, name)]), "text"
        return (Record(line.removesuffix("\r"), source) for source, line in lines), "text"
    if text.lstrip().startswith("["):
        rows = _json(text, name)
        if isinstance(rows, UserError):
            raise rows
        return (Record(row, f"{name}, row {n}") for n, row in enumerate(rows, 1)), "JSON list"
    if lines and text.lstrip()[0] not in '{"':
        raise UserError(
            f"{lines[0][0]}: expected a JSON list or JSON lines, found {lines[0][1][:20]!r}"
        )
    return (Record(_json(line, source), source) for source, line in lines), "JSON lines"


def _bytes(path: Path) -> bytes:
    with file_errors(path):
        data = path.read_bytes()
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
            f"{path}: unpacks to more than {_PACKED_AT_MOST} times its size; if that is meant, use "
            "gunzip"
        )
    return unpacked


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, unpacked if gzip packed it, without a byte order mark.

    Raises:
      UserError: the file cannot be read or is not UTF-8.
    """
    return _decode(str(path), _bytes(Path(path)))


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        content = error.object  # without a byte order mark, unlike data
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise UserError(
            f"{name}, line {line}: byte 0x{byte:02x} is not UTF-8, which is expected"
        ) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    [(key, count)] = Counter(key for key, _ in pairs).most_common(1) or [("", 1)]
    if count > 1:
        raise ValueError(f"the key {key!r} stands twice in {dict(pairs)!r:.80}")
    return dict(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _json(text: str, source: str) -> Any:
    """The JSON value that the text is; the error, if it is none."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        message = f"{error.msg[0].lower()}{error.msg[1:]}".removesuffix(" at")
        place = (
            f"line {error.lineno}, column {error.colno}"
            if error.lineno > 1
            else f"column {error.colno}"
        )
        cut = error.msg.startswith("Unterminated string") or error.pos >= len(error.doc.rstrip())
        what = (
            f"{message} at {place}"
            + "; the text ends there (in JSON lines each row is one line)" * cut
        )
    except RecursionError:
        what = "nested too deeply"
    except ValueError as error:  # a key twice, or a number of thousands of digits
        what = str(error)
    return BadRow(source, f"not valid JSON, {what}")


def _csv(text: str, name: str, delimiter: str) -> Iterator[Record]:
    """The rows under a header line. Every cell is text, but ``best`` and the columns of lists,
    which are JSON.
    """
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    source = f"{name}, line 1"
    try:
        header = table.fieldnames or []
        if "" in header or len(set(header)) < len(header):
            raise UserError(
                f"{source}: each column needs a name of its own, found "
                f"{', '.join(map(repr, header))}"
            )
        if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
            raise UserError(
                f"{source}: one column {header[0]!r}; separate columns by commas, or by tabs in a "
                ".tsv"
            )
        for row in table:
            source = f"{name}, line {table.line_num}"
            yield Record(_csv_row(row, len(header), source), source)
    except csv.Error as error:  # where the next row would start is unknown
        yield Record(
            UserError(f"{source}: not valid CSV in the row after this one: {error}"), source
        )


def _csv_row(row: dict[Any, Any], width: int, source: str) -> dict[str, Any] | UserError:
    """The row of a table; cells beyond its header stand under None, and None stands for missing
    ones.
    """
    count = width + len(row.pop(None, ())) - list(row.values()).count(None)
    if count != width:
        hint = "; quote cells that hold a delimiter or a line break" if count > width else ""
        return BadRow(source, f"{count} cells under a header of {width}{hint}")
    for key in set(_JSON_COLUMNS) & set(row):
        value = _json(row[key] or "null", source)
        if isinstance(value, UserError):
            return BadRow(source, f"the column {key!r} holds JSON, found {row[key][:40]!r}")
        row[key] = value
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
        what = (
            f"no such file, and it could not be loaded as a Hugging Face dataset (split {split!r})"
        )
        raise UserError(f"{name}: {what}: {type(error).__name__}: {error}") from error
    records = [
        Record(dict(row), f"{name}:{split}, row {number}") for number, row in enumerate(rows, 1)
    ]
    content = "".join(json.dumps(record.value, sort_keys=True, default=str) for record in records)
    return Source(records, hashlib.sha256(content.encode()).hexdigest(), "Hugging Face dataset")
