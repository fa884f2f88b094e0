"""Reads the files of a run and checks their content, so that other code can trust it, even if the
files are damaged or somebody else's.

    manifest = read_json(path / "manifest.json", MANIFEST, ["command"])
    settings = read_yaml(path / "config.yaml", SETTINGS)
    rows = read_rows(path / "metrics.jsonl")
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf_jax.errors import UserError, is_there, read_file

STRINGS = ("NaN", "Infinity", "-Infinity")  # of our files, for numbers that JSON lacks
TEXTS = ("prompt", "response", "chosen", "rejected")  # columns in which "NaN" is a text
MAX_YAML_BYTES = 1 << 17
_MAX_DEPTH = 32
_MAX_PARTS = 1_000_000
Row = dict[str, Any]

# Shapes of JSON values, see `misfit`.
NUMBER = (int, float, bool)
OPTIONAL_NUMBER = (*NUMBER, None)
OPTIONAL_TEXT = (str, None)
_START = {  # of a run, the first or a resumed one
    "command": str,
    "backend": OPTIONAL_TEXT,
    "versions": {str: str},
    "devices": {"kind": str, "count": int, str: int},
    "cpu": str,
    "threads": (int, None),
    "xla_flags": str,
    "git": ({"commit": str, "modified": bool}, None),
    "changed": [str],
}
MANIFEST = {
    **_START,
    "stage": str,
    "seed": OPTIONAL_NUMBER,
    "data": {str: str},
    "given": {str: object},
    "resumed": [_START],
}
# libyaml's where PyYAML has it: eight times as fast, and it bounds how deep a text is nested.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SETTINGS = {
    "model": OPTIONAL_TEXT,
    "output_dir": OPTIONAL_TEXT,
    "compute": {"dtype": str},
    "rl": {
        "kl_target": OPTIONAL_NUMBER,
        "max_new_tokens": int,
        "temperature": (float, int),
        "top_k": (int, None),
        "top_p": OPTIONAL_NUMBER,
        "min_p": OPTIONAL_NUMBER,
        "stop": [str],
    },
    "reward": [str],
    "text": {"template": str},
}
EVALUATION = {
    "rows": [
        {
            "category": str,
            "metric": str,
            "value": OPTIONAL_NUMBER,
            "low": OPTIONAL_NUMBER,
            "high": OPTIONAL_NUMBER,
            "n": int,
            "unit": str,
            "note": str,
        }
    ]
}
TRACKER = {"id": str, "project": str, "name": str, "services": [str]}
_ARRAY = {...: "all", "dtype": str, "shape": [int]}
CHECKPOINT: dict[Any, Any] = {
    ...: "all",
    "meta": {"step": int, "metrics": {str: NUMBER}, "config": {"rl": {str: object}}},
    "leaves": {str: ({**_ARRAY, "sha256": str}, {**_ARRAY, "parts": {str: str}})},
    "files": {str: {...: "all", "bytes": int, "sha256": str}},
}
START = {...: "all", "files": {str: str}, "sha256": str}
_ROWS: dict[str, Any] = {
    "metrics": {str: NUMBER},
    "timing": {str: NUMBER},
    "samples": {
        "score": OPTIONAL_NUMBER,
        "length": NUMBER,
        "target": NUMBER,
        "score_chosen": NUMBER,
        "score_rejected": NUMBER,
    },
    "alerts": {"rule": str, "message": str},
}


def misfit(value: Any, shape: Any, key: str = "it") -> str:
    """A sentence, which begins with the key, about the first place where a JSON value differs from
    a shape; "" if it fits.

    Args:
      shape: ``object`` (anything), a type, None (null), a tuple of shapes of which one must fit,
        [the shape of each item], or {key: shape} of a mapping, each of whose keys may be missing
        unless ``...`` is among them; the key ``str`` stands for all others.
    """
    if isinstance(shape, tuple):
        of_choices = [misfit(value, choice, key) for choice in shape]
        return "" if "" in of_choices else of_choices[0]
    if isinstance(shape, dict) and isinstance(value, dict):
        others = shape.get(str, object)
        for name in shape if ... in shape else ():
            if isinstance(name, str) and name not in value:
                return f"{key.removeprefix('it.')} lacks the key {name}"
        misfits = (
            misfit(item, shape.get(name, others), f"{key}.{name}") for name, item in value.items()
        )
        return next(filter(None, misfits), "")
    if isinstance(shape, list) and isinstance(value, list):
        misfits = (misfit(item, shape[0], f"{key}[{i}]") for i, item in enumerate(value))
        return next(filter(None, misfits), "")
    kind = shape if isinstance(shape, type) else type(shape)
    if shape is object or type(value) is kind:
        return ""
    return f"{key.removeprefix('it.')} is {value!r:.60}, expected {_KINDS[kind]}"


_KINDS = {
    int: "a number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    dict: "a mapping of keys",
    list: "a list",
    type(None): "null",
}


def read_json(path: Path, shape: Any, required: Sequence[str] = ()) -> Any:
    """The object in a JSON file.

    Raises:
      UserError: the file cannot be read, is no JSON, lacks a required key or has another shape.
    """
    return parse_json(read_file(path), shape, str(path), required)


def parse_json(text: str | bytes, shape: Any, where: str, required: Sequence[str] = ()) -> Any:
    """``read_json`` of a text; ``where`` names its source in messages."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read as JSON: {error}") from None
    return _checked(value, shape, required, where)


def read_yaml(path: Path, shape: Any) -> Row:
    """The mapping in a YAML file of at most ``MAX_YAML_BYTES``.

    Raises:
      UserError: the file cannot be read, is no YAML or has another shape.
    """
    data = read_file(path)
    if len(data) > MAX_YAML_BYTES:
        raise UserError(f"{path}: {len(data)} bytes, more than the {MAX_YAML_BYTES} of any config")
    return parse_yaml(data, shape, str(path))


def revision(folder: Path) -> str:
    """What a message calls the version of this package that began the run in a folder."""
    manifest = read_json(folder / "manifest.json", MANIFEST)
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


def settings_of(folder: str) -> Row:
    """config.yaml of a run, given the run or its ``model/``; empty for other models."""
    file = settings_file(folder)
    return read_yaml(file, SETTINGS) if file.is_file() else {}


def parse_yaml(text: str | bytes, shape: Any, where: str) -> Row:
    """``read_yaml`` of a text; ``where`` names its source in messages."""
    try:
        value = _LOADER(text).get_single_data()
    except Exception as error:  # PyYAML raises a dozen kinds for values such as !!int ''
        line = getattr(error, "problem", None) or str(error)
        raise UserError(f"{where}: cannot be read as YAML: {line!s:.200}") from None
    return _checked(value, shape, (), where)


def _checked(value: Any, shape: Any, required: Sequence[str], where: str) -> Any:
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
    wrong = misfit(value, shape)
    if wrong:
        raise UserError(f"{where}: {wrong}")
    return value


def is_plain(value: Any) -> bool:
    """Whether a value can be in our files: mappings with texts as keys, lists, texts that UTF-8 can
    hold, numbers of 64 bits and null, at most 32 levels and a million parts.

    A YAML alias counts as a copy of what it names.
    """
    waiting = [(value, 0)]
    num_parts = 0
    while waiting:
        item, depth = waiting.pop()
        num_parts += 1
        if depth > _MAX_DEPTH or num_parts + len(waiting) > _MAX_PARTS:
            return False
        if isinstance(item, dict):
            if not all(isinstance(key, str) and _is_scalar(key) for key in item):
                return False
            item = list(item.values())
        if isinstance(item, list):
            waiting += [(inner, depth + 1) for inner in item]
        elif not _is_scalar(item):
            return False
    return True


def _is_scalar(value: Any) -> bool:
    """Whether a value is a number of 64 bits, null or a text that UTF-8 can hold: one without half
    a surrogate pair.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "ignore").decode("utf-8") == value
    if isinstance(value, int):
        return abs(value) < 1 << 63
    return isinstance(value, float | None)


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
        row = _row(line)
        if row is not None:
            rows.append((line.decode("utf-8").rstrip("\n"), row))
        elif line.endswith(b"\n"):
            raise UserError(f"{path}, line {number}: expected a JSON object with the key step")
    return rows


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line.decode("utf-8"))
        is_row = type(row["step"]) is int and row["step"] >= 0 and is_plain(row)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return row if is_row else None


def read_rows(path: Path) -> list[Row]:
    """The rows of a run's ``.jsonl`` file, none if it is missing. The strings NaN, Infinity and
    -Infinity become floats, save in columns of texts.

    Raises:
      UserError: a line is no row of the file's kind.
    """
    shape = _ROWS.get(path.stem, object)
    rows = []
    for number, (_, row) in enumerate(json_lines(path), 1):
        numbers = {
            key: float(value) for key, value in row.items() if value in STRINGS and key not in TEXTS
        }
        wrong = misfit(row | numbers, shape)
        if wrong:
            raise UserError(f"{path}, line {number}: {wrong}")
        rows.append(row | numbers)
    return rows
