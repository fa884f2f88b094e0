"""Reads the files of a run and checks their content, so that other code can trust it, even if the
files are damaged or somebody else's.

    manifest = read_json(path / "manifest.json", Manifest, ["command"])
    settings = read_yaml(path / "config.yaml", Settings)
    rows = read_rows(path / "metrics.jsonl")

A typed dict says which types some keys have; what else a file holds is read as it is.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, get_args

import msgspec
import yaml

from rlhf_jax.errors import UserError, is_there, read_file

STRINGS = ("NaN", "Infinity", "-Infinity")  # of our files, for numbers that JSON lacks
TEXTS = ("prompt", "response", "chosen", "rejected")  # columns in which "NaN" is a text
MAX_YAML_BYTES = 1 << 17
_MAX_DEPTH = 32
_MAX_PARTS = 1_000_000
_SURROGATE = re.compile("[\ud800-\udfff]")
Row = dict[str, Any]
Number = float | bool
# libyaml's where PyYAML has it: eight times as fast, and it bounds how deep a text is nested.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Git(TypedDict, total=False):
    commit: str
    modified: bool


class _Devices(TypedDict, total=False):
    kind: str
    count: int


class _Start(TypedDict, total=False):
    """Of a run, the first or a resumed one."""

    command: str
    backend: str | None
    versions: dict[str, str]
    devices: _Devices
    cpu: str
    threads: int | None
    xla_flags: str
    git: _Git | None
    changed: list[str]


class RowCounts(TypedDict):
    """What became of the rows of a run's data: how many were read, how many were dropped and cut,
    by reason.
    """

    read: int
    dropped: dict[str, int]
    cut: dict[str, int]


class _Fork(TypedDict, total=False):
    changes: list[str]


class Manifest(_Start, total=False):
    """manifest.json."""

    stage: str
    seed: Number | None
    data: dict[str, str]
    given: dict[str, Any]
    resumed: list[_Start]
    fork: _Fork
    rows: RowCounts


class _Optimizer(TypedDict, total=False):
    learning_rate: Number | None


class _Stage(TypedDict, total=False):
    optimizer: _Optimizer


class _Rl(_Stage, total=False):
    batch_size: int
    kl_target: Number | None


class Settings(TypedDict, total=False):
    """config.yaml, as far as others than the run itself read it."""

    model: str | None
    output_dir: str | None
    compute: Row
    sft: _Stage
    reward_model: _Stage
    dpo: _Stage
    kto: _Stage
    rl: _Rl
    reward: list[str]
    text: Row


class _Figure(TypedDict, total=False):
    category: str
    metric: str
    value: Number | None
    low: Number | None
    high: Number | None
    n: int
    unit: str
    note: str


class Evaluation(TypedDict, total=False):
    """evaluation.json."""

    rows: list[_Figure]


class _Sample(TypedDict, total=False):
    score: Number | None
    length: Number
    target: Number
    score_chosen: Number
    score_rejected: Number


class _Alert(TypedDict, total=False):
    rule: str
    message: str


_ROWS: dict[str, Any] = {
    "metrics": dict[str, Number],
    "timing": dict[str, Number],
    "samples": _Sample,
    "alerts": _Alert,
}


def misfit(value: Any, kind: Any) -> str:
    """A sentence, which begins with the key, about the first place where a JSON value is not of a
    type that msgspec knows; "" if it is of that type.
    """
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        if not place.startswith("[...]"):
            return f"{place.strip('.`') or 'it'}: {what}"
        # msgspec does not name the keys of such a mapping.
        [_, of_items] = get_args(kind)
        return next(f"{name}: {what}" for name, item in value.items() if misfit(item, of_items))
    return ""


def read_json(path: Path, kind: Any, required: Sequence[str] = ()) -> Any:
    """The object in a JSON file.

    Raises:
      UserError: the file cannot be read, is no JSON, lacks a required key or is not of the kind, a
        type that msgspec knows.
    """
    return parse_json(read_file(path), kind, str(path), required)


def parse_json(text: str | bytes, kind: Any, where: str, required: Sequence[str] = ()) -> Any:
    """``read_json`` of a text; ``where`` names its source in messages."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read as JSON: {error}") from None
    return _checked(value, kind, required, where)


def read_yaml(path: Path, kind: Any) -> Row:
    """The mapping in a YAML file of at most ``MAX_YAML_BYTES``.

    Raises:
      UserError: the file cannot be read, is no YAML or is not of the kind.
    """
    data = read_file(path)
    if len(data) > MAX_YAML_BYTES:
        raise UserError(f"{path}: {len(data)} bytes, more than the {MAX_YAML_BYTES} of any config")
    return parse_yaml(data, kind, str(path))


def parse_yaml(text: str | bytes, kind: Any, where: str) -> Row:
    """``read_yaml`` of a text; ``where`` names its source in messages."""
    try:
        value = _LOADER(text).get_single_data()
    except Exception as error:  # PyYAML raises a dozen kinds for values such as !!int ''
        line = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}: cannot be read as YAML: {line!s:.200}") from None
    return _checked(value, kind, (), where)


def _checked(value: Any, kind: Any, required: Sequence[str], where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a mapping of keys, found {value!r:.60}")
    if not is_plain(value):
        raise UserError(
            f"{where}: is nested too deeply, too large, or holds something other than texts, "
            "numbers of 64 bits, lists and mappings with texts as keys"
        )
    for key in required:
        if key not in value:
            raise UserError(f"{where}: lacks the key {key}")
    wrong = misfit(value, kind)
    if wrong:
        raise UserError(f"{where}: {wrong}")
    return value


def revision(folder: Path) -> str:
    """What a message calls the version of this package that began the run in a folder."""
    manifest = read_json(folder / "manifest.json", Manifest)
    git = manifest.get("git") or {}
    version = manifest.get("versions", {}).get("rlhf-jax", "another version")
    return f"revision {git['commit']}" if "commit" in git else f"rlhf-jax {version}"


def settings_file(folder: str) -> Path:
    """The path of config.yaml of a run, given the run or its ``model/``. Other models have no such
    file.
    """
    place = Path(folder)
    if place.name == "model" and not (place / "config.yaml").is_file():
        place = place.parent
    return place / "config.yaml"


def is_plain(value: Any) -> bool:
    """Whether a value can be in our files: mappings with texts as keys, lists, texts that UTF-8 can
    hold (without half a surrogate pair), numbers of 64 bits and null, at most 32 levels and a
    million parts.

    A YAML alias counts as a copy of what it names.
    """
    waiting = [(value, 0)]
    num_parts = 0
    while waiting:
        item, depth = waiting.pop()
        num_parts += 1
        if depth > _MAX_DEPTH or num_parts + len(waiting) > _MAX_PARTS:
            return False
        inner = item if isinstance(item, list) else []
        if isinstance(item, dict):
            if not all(isinstance(key, str) for key in item):
                return False
            inner = [*item, *item.values()]
        elif isinstance(item, str):
            if _SURROGATE.search(item):
                return False
        elif isinstance(item, int):
            if abs(item) >= 1 << 63:
                return False
        elif not isinstance(item, list | float | None):
            return False
        waiting += [(part, depth + 1) for part in inner]
    return True


def json_lines(path: Path) -> list[tuple[str, Row]]:
    """The lines of a run's ``.jsonl`` file with their rows, each of which has a ``step``.

    Empty if the file is missing. A last line that a kill truncated is left out.

    Raises:
      UserError: another line is no row, or the file is none.
    """
    lines = []
    if is_there(path):
        lines = read_file(path, most=None).splitlines(keepends=True)
    rows: list[tuple[str, Row]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode("utf-8"))
            is_row = type(row["step"]) is int and row["step"] >= 0 and is_plain(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            is_row = False
        if is_row:
            rows.append((line.decode("utf-8").rstrip("\n"), row))
        elif line.endswith(b"\n"):
            raise UserError(f"{path}, line {number}: expected a JSON object with the key step")
    return rows


def read_rows(path: Path) -> list[Row]:
    """The rows of a run's ``.jsonl`` file, none if it is missing. The strings NaN, Infinity and
    -Infinity become floats, save in columns of texts.

    Raises:
      UserError: a line is no row of the file's kind.
    """
    kind = _ROWS.get(path.stem, Row)
    rows = []
    for number, (_, row) in enumerate(json_lines(path), 1):
        numbers = {
            key: float(value) for key, value in row.items() if value in STRINGS and key not in TEXTS
        }
        wrong = misfit(row | numbers, kind)
        if wrong:
            raise UserError(f"{path}, line {number}: {wrong}")
        rows.append(row | numbers)
    return rows
