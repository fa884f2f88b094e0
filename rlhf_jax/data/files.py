"""The records of a data file or of a Hugging Face dataset, each with its place.

JSON, JSON lines, CSV (whose cells stay texts) and plain text are read here; Parquet and datasets by name by the package
``datasets``, which is imported only when such data is read. A line or row that cannot be read becomes a record that
holds its error, so that `check` can name all of them and a run stops at the first.
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
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.data.rows import Record
from rlhf_jax.errors import UserError

_SUFFIXES = (".json", ".jsonl", ".gz", ".csv", ".tsv", ".parquet", ".txt", ".yaml", ".yml")
_PACKED_AT_MOST, _MAY_UNPACK = 100, 1 << 26  # times its size, and bytes that any file may unpack to
_DATASET = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]:%+-]+))?", re.ASCII)
_SPACE = re.compile(r"[ \t\r\n]*")
# CSV columns whose cells are JSON: what they hold has no spelling of its own there.
_JSON_COLUMNS = ("messages", "responses", "ranking", "ranks", "targets", "best")
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

    ``.csv``, ``.tsv``, ``.parquet`` and ``.txt`` (each also with ``.gz`` after it, but Parquet) are read as that,
    anything else as a JSON list or JSON lines. A name is a dataset's if it is no existing path and does not end like a
    data file. The default split is ``train``.

    Raises:
      UserError: for a file or dataset that cannot be read at all.
    """
    path = Path(name)
    if os.path.isdir(path):  # of pathlib's forms, a name that is too long for a file raises
        raise UserError(f"{name}: is a folder; name the file inside it")
    if os.path.exists(path):
        return _file(path, str(name))
    match = _DATASET.fullmatch(str(name))
    if isinstance(name, str) and match and not match["name"].endswith(_SUFFIXES):
        return _dataset(match["name"], match["split"] or "train")
    others = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    near = difflib.get_close_matches(path.name, others, n=1)
    raise UserError(f"{name}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else ""))


def _file(path: Path, name: str) -> Source:
    packed = path.suffix.lower() == ".gz"
    suffix = Path(path.stem if packed else path.name).suffix.lower()
    data = _bytes(path)
    if data.startswith(b"PAR1"):
        if packed:
            raise UserError(f"{name}: Parquet packs its columns itself; unpack the file with gunzip")
        records, kind = _parquet(name), "Parquet"
    elif suffix == ".parquet":
        raise UserError(f"{name}: " + ("is not a Parquet file" if data else "is empty"))
    else:
        records, kind = parse_text(_decode(name, data), name, suffix)
    if not records:
        raise UserError(f"{name}: " + ("is an empty list" if kind == "JSON list" else "holds no rows"))
    return Source(records, hashlib.sha256(data).hexdigest(), kind + (", gzipped" if packed else ""))


def parse_text(text: str, name: str, suffix: str = ".json") -> tuple[list[Record], str]:
    """The records of a file's text, and the name of its format."""
    if not text.strip():
        raise UserError(f"{name}: is empty")
    if suffix in (".csv", ".tsv"):
        return list(_csv(text, name, "," if suffix == ".csv" else "\t")), suffix[1:].upper()
    # Only \n ends a line: str.splitlines would also cut inside strings, at U+2028.
    lines = [(n, line.removesuffix("\r")) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if suffix == ".txt":
        return [Record(line, f"{name}, line {n}") for n, line in lines], "text"
    if text.lstrip().startswith("["):
        return list(_json_list(text, name)), "JSON list"
    if text.lstrip()[0] not in '{"':
        raise UserError(f"{name}, line {lines[0][0]}: expected a JSON list or JSON lines, found {lines[0][1][:20]!r}")
    return list(_json_lines(lines, name)), "JSON lines"


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


def _decode(name: str, data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:2]:
        raise UserError(f"{name}: is UTF-16; UTF-8 is expected, save it as that")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1  # without a byte order mark, unlike data
        raise UserError(
            f"{name}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8, which is expected"
        ) from error


def _json_lines(lines: list[tuple[int, str]], name: str) -> Iterator[Record]:
    first, last = lines[0][0], lines[-1][0]
    for number, line in lines:
        source, row = f"{name}, line {number}", line.strip()
        hint = "; in JSON lines each row is one line" if number == first else ""
        if_cut = hint or ("; the file seems cut off" if number == last else "")
        try:
            value, end = _json_value(row, 0, source, hint, if_cut)
            if row[end:]:
                raise UserError(f"{source}: not valid JSON, text after the value at column {end + 1}{hint}")
            yield Record(value, source)
        except UserError as error:
            yield Record(error, source)


def _json_list(text: str, name: str) -> Iterator[Record]:
    """The elements of a JSON list, up to wrong syntax: behind it nothing more can be read."""
    position, number = _skip_space(text, text.index("[") + 1), 0
    closed = text.startswith("]", position)
    position = _skip_space(text, position + closed)
    while not closed:
        number += 1
        source = f"{name}, row {number}"
        try:
            value, position = _json_value(text, position, source, "", "; the file is cut off inside this row")
            yield Record(value, source)
            position = _skip_space(text, position)
            after = text[position : position + 1]
            if after not in (",", "]"):
                found = f"found {after!r}" if after else "the file is cut off"
                raise UserError(f"{source}: expected ',' or ']' after this row, {found}")
        except UserError as error:
            yield Record(error, source)
            return
        closed, position = after == "]", _skip_space(text, position + 1)
    if position < len(text):
        line = text.count("\n", 0, position) + 1
        yield Record(UserError(f"{name}, line {line}: text after the end of the JSON list"), name)


def _json_value(text: str, position: int, source: str, hint: str, hint_if_cut: str) -> tuple[Any, int]:
    """The value at that position (a UserError if a key stands twice in an object) and where it ends."""
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            twice.append(Counter(key for key, _ in pairs).most_common(1)[0][0])
        return row

    try:
        value, end = json.JSONDecoder(object_pairs_hook=unique).raw_decode(text, position)
    except json.JSONDecodeError as error:
        unterminated = error.msg.startswith("Unterminated string") and '"' not in text[error.pos + 1 :]
        cut = unterminated or error.pos >= len(text.rstrip())
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        what = f"{error.msg[0].lower()}{error.msg[1:]} at {place}{hint_if_cut if cut else hint}"
        raise UserError(f"{source}: not valid JSON, {what}") from error
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else "a number has thousands of digits"
        raise UserError(f"{source}: not valid JSON, {what}") from error
    return (UserError(f"{source}: the key {twice[0]!r} stands twice in one object") if twice else value), end


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _csv(text: str, name: str, delimiter: str) -> Iterator[Record]:
    """The rows under a header line. Every cell is text, but ``best`` and the columns of lists, which are JSON."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    source = f"{name}, line 1"
    try:
        for cells in filter(any, rows):
            source = f"{name}, line {rows.line_num}"
            if header:
                yield Record(_csv_row(header, cells, source), source)
                continue
            header = cells
            twice = [key for key, count in Counter(header).items() if count > 1]
            if "" in header:
                raise UserError(f"{source}: column {header.index('') + 1} of the header has no name")
            if twice:
                raise UserError(f"{source}: the column {twice[0]!r} stands twice in the header")
    except csv.Error as error:  # where the next row would start is unknown
        yield Record(UserError(f"{source}: not valid CSV in the row after this one: {error}"), source)


def _csv_row(header: list[str], cells: list[str], source: str) -> dict[str, Any] | UserError:
    if len(cells) != len(header):
        hint = "; quote cells that hold a delimiter or a line break" if len(cells) > len(header) else ""
        return UserError(f"{source}: {len(cells)} cells under a header of {len(header)}{hint}")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for key in (key for key in _JSON_COLUMNS if row.get(key) or (key in row and key != "best")):
        try:
            row[key] = json.loads(row[key])
        except (ValueError, RecursionError):
            return UserError(f"{source}: the column {key!r} holds JSON, found {row[key][:40]!r}")
    return row


def _parquet(name: str) -> list[Record]:
    import datasets  # a second, and only for this

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:  # the shared cache would outlive the run
            rows = datasets.Dataset.from_parquet(name, cache_dir=cache, keep_in_memory=True)
            return [Record(dict(row), f"{name}, row {number}") for number, row in enumerate(rows, 1)]
    except Exception as error:  # pyarrow's kinds and the library's own
        raise UserError(f"{name}: cannot be read as Parquet: {error}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _dataset(name: str, split: str) -> Source:
    import datasets  # a second, and only for this

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds, offline or for a wrong name
        raise UserError(
            f"{name}: no such file, and it could not be loaded as a Hugging Face dataset (split {split!r}): "
            f"{type(error).__name__}: {error}"
        ) from error
    records = [Record(dict(row), f"{name}:{split}, row {number}") for number, row in enumerate(rows, 1)]
    if not records:
        raise UserError(f"{name}:{split}: is empty")
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record.value, sort_keys=True, default=str).encode())
    return Source(records, digest.hexdigest(), "Hugging Face dataset")
