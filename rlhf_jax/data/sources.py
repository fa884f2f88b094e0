"""The records of a data file, recognised by its name's ending, or of a Hugging Face dataset."""

import difflib
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.data import records, tables
from rlhf_jax.data.records import Fault, Record, throw
from rlhf_jax.errors import UserError

_SUFFIXES = (".json", ".jsonl", ".gz", ".csv", ".tsv", ".parquet", ".txt", ".yaml", ".yml")
_PACKED_AT_MOST, _MAY_UNPACK = 100, 1 << 26  # times its size, and bytes that any file may unpack to
_DATASET = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]:%+-]+))?", re.ASCII)


class Source(NamedTuple):
    """What a file or dataset holds, sha256 of its content (of a file: unpacked bytes), and the format it was read as.

    The names of a file's records are ``FILE, line N``, or ``FILE, row N`` for Parquet.
    """

    records: list[Record]
    fingerprint: str
    format: str


def read_source(name: str | PathLike[str], fault: Fault = throw) -> Source:
    """The content of a file, or of a dataset named ``org/name`` or ``org/name:split``.

    ``.csv``, ``.tsv``, ``.parquet`` and ``.txt`` (each also with ``.gz`` after it, but Parquet) are read as that,
    whatever else as a JSON list or JSON lines. A name is a dataset's if it is no existing path and does not end like a
    data file. The split is ``train`` unless said.

    Args:
      fault: told of each row that is wrong; by default the first is raised.

    Raises:
      UserError: for whatever cannot be read at all.
    """
    path = Path(name)
    if os.path.isdir(path):  # of pathlib's forms, a name that is too long for a file raises
        raise UserError(f"{name}: is a folder; name the file inside it")
    if os.path.exists(path):
        return _file(path, str(name), fault)
    match = _DATASET.fullmatch(str(name))
    if isinstance(name, str) and match and not match["name"].endswith(_SUFFIXES):
        return _dataset(match["name"], match["split"] or "train")
    others = os.listdir(path.parent) if os.path.isdir(path.parent) else []
    near = difflib.get_close_matches(path.name, others, n=1)
    raise UserError(f"{name}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else ""))


def _file(path: Path, name: str, fault: Fault) -> Source:
    data = _bytes(path)
    packed = path.suffix.lower() == ".gz"
    suffix = Path(path.stem if packed else path.name).suffix.lower()
    faults: list[UserError] = []

    def tell(error: UserError) -> None:
        faults.append(error)
        fault(error)

    if data.startswith(b"PAR1"):
        if packed:
            raise UserError(f"{name}: Parquet packs its columns itself; unpack the file with gunzip")
        read, kind = tables.read_parquet(path), "Parquet"
    elif suffix == ".parquet":
        raise UserError(f"{name}: " + ("is not a Parquet file" if data else "is empty"))
    else:
        text = _decode(path, data)
        if not text.strip():
            raise UserError(f"{name}: is empty")
        if suffix in (".csv", ".tsv"):
            read, kind = tables.read_csv(text, name, "," if suffix == ".csv" else "\t", tell), suffix[1:].upper()
        elif suffix == ".txt":
            read, kind = records.read_text(text, name), "text"
        elif records.is_list(text):
            read, kind = records.read_list(text, name, tell), "JSON list"
        else:
            read, kind = records.read_lines(text, name, tell), "JSON lines"
    if not read and not faults:
        raise UserError(f"{name}: " + ("is an empty list" if kind == "JSON list" else "holds no rows"))
    return Source(read, hashlib.sha256(data).hexdigest(), kind + (", gzipped" if packed else ""))


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not data.startswith(b"\x1f\x8b"):
        return data
    parts, most = [b""], max(_MAY_UNPACK, _PACKED_AT_MOST * len(data))
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while part := file.read(1 << 20):
                parts.append(part)
                most -= len(part)
                if most < 0:
                    raise UserError(
                        f"{path}: unpacks to more than {_PACKED_AT_MOST} times its size; if that is meant, use gunzip"
                    )
        return b"".join(parts)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: broken gzip file ({error}); copy it again") from error


def _decode(path: Path, data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:2]:
        raise UserError(f"{path}: is UTF-16; UTF-8 is expected, save it as that")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1  # without a byte order mark, unlike data
        raise UserError(
            f"{path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8, which is expected"
        ) from error


def _dataset(name: str, split: str) -> Source:
    read = tables.read_dataset(name, split)
    if not read:
        raise UserError(f"{name}:{split}: is empty")
    digest = hashlib.sha256()
    for record in read:
        digest.update(json.dumps(record.value, sort_keys=True, default=str).encode())
    return Source(read, digest.hexdigest(), "Hugging Face dataset")
