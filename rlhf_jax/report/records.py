"""What finished or running runs have left in their folders, read back: rows, settings, and which runs belong together.

    records = run_records.find(["runs/ppo-0", "runs/ppo-1"])
    for group in run_records.groups(records):
        print(group.name, run_records.series(group.records[0].metrics, "objective/score"))

Nothing is written to them.
"""

import collections
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rlhf_jax.errors import UserError

STRINGS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
TEXTS = ("prompt", "response", "chosen", "rejected")  # columns of samples.jsonl that a model may fill with "NaN"
# Settings that change no number of a run, and the seed: runs that differ in nothing else are one group.
FREE_SETTINGS = (
    "seed",
    "output_dir",
    "resume",
    "overwrite",
    "checkpoint_interval",
    "checkpoint_async",
    "keep_last",
    "allow_changed",
    "alerts",
    "track",
)
STAGES = ("sft", "reward_model", "dpo", "vpg", "ppo", "rloo", "grpo")  # each reads the section of its name
POLICIES = ("vpg", "ppo", "rloo", "grpo")
EVALUATION = "evaluation.json"  # what `rlhf-jax evaluate` writes into a run's folder

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it."""

    path: Path
    name: str
    """The folder's name, with as many of its parents as make it differ from the other runs'."""
    manifest: dict[str, Any]
    config: str
    """config.yaml."""
    settings: dict[str, Any]
    """The same, flat: ``{dotted key: value}``."""
    metrics: list[Row]
    timing: list[Row]
    samples: list[Row]
    notes: tuple[str, ...]
    """What is missing or broken, in sentences."""
    outer: str | None = None
    """Folder of the pipeline that the run is a stage of, as the settings spell it."""

    @property
    def stage(self) -> str:
        """``sft``, ``reward_model``, ``ppo`` and so on."""
        return str(self.manifest.get("stage", "run"))

    @property
    def seed(self) -> Any:
        """Root of the run's randomness."""
        return self.manifest.get("seed")

    @property
    def steps(self) -> int:
        """The last step that it has recorded."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def finished(self) -> bool:
        """Whether its model, or the first of an ensemble, has been saved."""
        return any((self.path / "model" / name / "config.json").is_file() for name in ("", "member_0"))

    @property
    def seconds_per_step(self) -> float | None:
        """Median, without the first step, which compiles."""
        seconds = [row["timing/step"] for row in self.timing if "timing/step" in row and row["step"] > 1]
        return float(np.median(seconds)) if seconds else None


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ only in their seeds."""

    name: str
    records: tuple[RunRecord, ...]


def find(paths: Sequence[str | Path]) -> list[RunRecord]:
    """Reads runs; a folder that is no run but holds some, such as a pipeline's, stands for those in it.

    Raises:
        UserError: no folder is given, one of them holds no run, or a run is given twice.
    """
    if not paths:
        raise UserError("expected the folder of a run, or several")
    folders: list[tuple[Path, bool]] = []
    for path in map(Path, paths):
        if (path / "manifest.json").is_file():
            folders.append((path, False))
            continue
        inner = sorted(child.parent for child in path.glob("*/manifest.json"))
        if not inner:
            raise UserError(f"{path}: no run here, as there is no manifest.json; give the folder of a run")
        folders += [(child, True) for child in inner]
    places = [folder.resolve() for folder, _ in folders]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise UserError(f"{folders[i][0]}: this run is given twice")
    names = _names(places)
    return [_read(folder, name, inner) for (folder, inner), name in zip(folders, names, strict=True)]


def _read(path: Path, name: str, inner: bool) -> RunRecord:
    try:
        manifest = json.loads((path / "manifest.json").read_text("utf-8"))
        config = (path / "config.yaml").read_text("utf-8")
        settings = _flat(yaml.safe_load(config))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not the folder of a run: {error}") from None
    if not isinstance(manifest, dict) or "command" not in manifest:
        raise UserError(f"{path / 'manifest.json'}: expected a JSON object with the key command")
    rows: dict[str, list[Row]] = {}
    notes = []
    for kind in ("metrics", "timing", "samples"):
        file = path / f"{kind}.jsonl"
        rows[kind] = read_rows(file) if file.exists() else []
        if file.exists() and _is_cut(file):
            notes.append(f"{name}: the last line of {file.name} is cut and has been passed over.")
    output_dir = settings.get("output_dir")
    outer = str(Path(output_dir).parent) if inner and isinstance(output_dir, str) else None
    record = RunRecord(path, name, manifest, config, settings, **rows, notes=(), outer=outer)
    if not record.finished:
        notes.append(f"{name}: not finished, as there is no model yet; last recorded step: {record.steps}.")
    return dataclasses.replace(record, notes=tuple(notes))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix[:-1]: value}
    return {key: inner for name, child in value.items() for key, inner in _flat(child, f"{prefix}{name}.").items()}


def _names(places: Sequence[Path]) -> list[str]:
    used = [1] * len(places)
    while True:
        names = ["/".join(place.parts[-count:]) for place, count in zip(places, used, strict=True)]
        clashing = {name for name, count in collections.Counter(names).items() if count > 1}
        if not clashing:
            return names
        used = [count + (name in clashing) for name, count in zip(names, used, strict=True)]


def groups(records: Iterable[RunRecord]) -> list[Group]:
    """The runs, in their order, those together that differ only in ``FREE_SETTINGS``."""
    found: dict[str, list[RunRecord]] = {}
    for record in records:
        key = json.dumps([record.stage, comparable(record)], sort_keys=True, default=str)
        found.setdefault(key, []).append(record)
    members = [tuple(together) for together in found.values()]
    names = [_group_name([record.name for record in together]) for together in members]
    if len(set(names)) < len(names):
        names = [f"{together[0].name} (n = {len(together)})" for together in members]
    return [Group(name, together) for name, together in zip(names, members, strict=True)]


def _group_name(names: Sequence[str]) -> str:
    """What the names have in common at their beginning."""
    if len(names) == 1:
        return names[0]
    equal = [len(set(letters)) == 1 for letters in zip(*names, strict=False)]
    common = re.sub(r"[-_. /=]*(seed)?[-_. /=]*$", "", names[0][: [*equal, False].index(False)])
    return f"{common or names[0]} (n = {len(names)})"


def comparable(record: RunRecord) -> dict[str, Any]:
    """The settings that may make a difference: not those of other stages, nor ``FREE_SETTINGS``.

    Paths in a run's own pipeline are told from that pipeline's folder.
    """

    def told(value: Any) -> Any:
        if isinstance(value, list):
            return [told(item) for item in value]
        if record.outer is not None and isinstance(value, str) and value.startswith(f"{record.outer}/"):
            return f"…{value[len(record.outer) :]}"
        return value

    others = {stage for stage in STAGES if stage != record.stage} if record.stage in STAGES else set()
    return {
        key: told(value)
        for key, value in record.settings.items()
        if key not in FREE_SETTINGS and key.split(".")[0] not in others
    }


def differences(found: Sequence[Group]) -> dict[str, list[Any]]:
    """``{dotted key: [value in each group]}`` of the settings that are not the same in all groups, and the stage.

    A setting that a group lacks is "(none)"; it counts as a difference only between groups of one stage.
    """
    settings = [{"stage": group.records[0].stage, **comparable(group.records[0])} for group in found]
    result = {}
    for key in dict.fromkeys(key for some in settings for key in some):
        concerned = {some["stage"] for some in settings if key in some}
        values = [some.get(key, "(none)") for some in settings]
        compared = [value for some, value in zip(settings, values, strict=True) if some["stage"] in concerned]
        if any(value != compared[0] for value in compared):
            result[key] = values
    return result


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a run's ``.jsonl`` file. The strings NaN, Infinity and -Infinity, which stand for floats, become
    floats, save in columns of texts.

    A last line without its end, which a run that is going on or was killed may leave, is passed over.

    Raises:
        UserError: the file does not exist, or a line is no row.
    """
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; give the folder of a run") from None
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}, line {number}: expected a JSON object with the key step") from None
        rows.append(
            {
                name: STRINGS.get(value, value) if isinstance(value, str) and name not in TEXTS else value
                for name, value in row.items()
            }
        )
    return rows


def evaluation(record: RunRecord) -> list[Row]:
    """The figures that `rlhf-jax evaluate` has left in the run's folder; none where it has not been there.

    Raises:
        UserError: the file is broken.
    """
    path = record.path / EVALUATION
    try:
        return [dict(row) for row in json.loads(path.read_text("utf-8"))["rows"]] if path.exists() else []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not what `rlhf-jax evaluate` writes: {error!r}; evaluate again") from None


def _is_cut(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(-1, os.SEEK_END)
        return size > 0 and file.read(1) != b"\n"


def series(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, from the rows that have it: a series of a :class:`rlhf_jax.report.figures.Plot`."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]
