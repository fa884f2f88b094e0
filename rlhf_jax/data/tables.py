"""CSV, Parquet and Hugging Face datasets as records with their lines or rows.

CSV is read by the standard library, which knows the physical line on which a row starts; Parquet and datasets by name
go through ``datasets``, imported only here and only when such data is read.
"""

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from rlhf_jax.data.records import Fault, Record
from rlhf_jax.errors import UserError

# What has no spelling of its own in CSV stands there as JSON.
_JSON_COLUMNS = ("messages", "responses", "ranking", "ranks", "targets", "best")
csv.field_size_limit(1 << 27)  # characters of a cell; the module's own limit is 131072


def read_csv(text: str, name: str, delimiter: str, fault: Fault) -> list[Record]:
    """The rows under a header line. Every cell is text, but ``best`` and the columns of lists, which are JSON.

    A quoted cell may hold line breaks: a row's line is the one on which it starts.
    """
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: list[Record] = []
    header: list[str] = []
    line = 1
    while True:
        source = f"{name}, line {line}"
        try:
            cells = next(lines, None)
        except csv.Error as error:
            fault(UserError(f"{source}: not valid CSV in the row that starts here, {error}"))
            break  # where the next row would start is unknown
        line = lines.line_num + 1
        if cells is None:
            break
        if not any(cells):
            continue
        if not header:
            header = cells
            _check_header(header, source)
        elif len(cells) != len(header):
            hint = "; quote cells that hold a delimiter or a line break" if len(cells) > len(header) else ""
            fault(UserError(f"{source}: {len(cells)} cells under a header of {len(header)}{hint}"))
        else:
            row = zip(header, cells, strict=True)
            try:
                records.append(Record({key: _cell(key, value, source) for key, value in row}, source))
            except UserError as error:
                fault(error)
    return records


def _check_header(header: list[str], source: str) -> None:
    if "" in header:
        raise UserError(f"{source}: column {header.index('') + 1} of the header has no name")
    twice = [key for key in header if header.count(key) > 1]
    if twice:
        raise UserError(f"{source}: the column {twice[0]!r} stands twice in the header")


def _cell(key: str, value: str, source: str) -> Any:
    if key not in _JSON_COLUMNS or (key == "best" and not value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: the column {key!r} holds JSON, found {value[:40]!r}") from error


def read_parquet(path: Path) -> list[Record]:
    """The rows of a Parquet file, named ``FILE, row N``."""
    import datasets  # a second, and only for this

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:  # the shared cache would outlive the run
            rows = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
            return [Record(dict(row), f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    except Exception as error:  # pyarrow's kinds and the library's own
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def read_dataset(name: str, split: str) -> list[Record]:
    """The rows of a Hugging Face dataset, named ``NAME:SPLIT, row N``."""
    import datasets  # a second, and only for this

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds, offline or for a wrong name
        raise UserError(
            f"{name}: no such file, and it could not be loaded as a Hugging Face dataset (split {split!r}): "
            f"{type(error).__name__}: {error}"
        ) from error
    return [Record(dict(row), f"{name}:{split}, row {number}") for number, row in enumerate(rows, 1)]
