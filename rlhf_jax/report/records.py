"""Reads the folders of runs: rows, settings, and which runs belong together.

    runs = records.find(["runs/ppo-0", "runs/ppo-1"])
    for group in records.groups(runs):
        print(group.name, records.series(group.records[0].metrics, "objective/score"))

The folders do not change.
"""

import functools
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError, no_folder, read_file
from rlhf_jax.models.hf import OWN_NOTE
from rlhf_jax.runs import reading
from rlhf_jax.runs.manifest import dotted

# The seed, and settings that do not change the numbers of a run. Runs that differ only in these are
# one group.
FREE_SETTINGS = ["seed", "output_dir", "resume", "overwrite", "allow_changed", "alerts", "track"]
FREE_SETTINGS += ["checkpoint_interval", "checkpoint_async", "keep_last"]
# Each stage reads the section of its name.
STAGES = ("sft", "reward_model", "dpo", "kto", "vpg", "ppo", "rloo", "grpo", "distill")
# Runs of one kind share their figures.
KINDS = ("sft", "reward_model", "dpo", "kto", "policy")
EVALUATION = "evaluation.json"  # what `rlhf-jax evaluate` writes into a run's folder

Row = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder holds."""

    path: Path
    name: str
    """The folder's name, with the parents that make it differ from the other runs' names."""
    manifest: dict[str, Any]
    config: str
    """config.yaml."""
    settings: dict[str, Any]
    """The same, flat: ``{dotted key: value}``; in a pipeline its folder is written as "…"."""
    metrics: list[Row]
    timing: list[Row]
    samples: list[Row]
    """Rows of samples.jsonl; those of pairs have a ``margin`` too: score_chosen - score_rejected.
    """
    alerts: list[Row]
    evaluation: list[Row]
    """Rows of evaluation.json; empty if the run has not been evaluated."""
    cut: tuple[str, ...]
    """Files whose last line is incomplete, because the run is still writing or was killed."""
    folder: str
    """``output_dir`` as the run was given it."""

    @property
    def stage(self) -> str:
        """``sft``, ``reward_model``, ``ppo`` and so on."""
        return str(self.manifest.get("stage", "run"))

    @property
    def kind(self) -> str:
        """One of KINDS; a stage that is not named there is an algorithm that trains a policy."""
        return self.stage if self.stage in KINDS else "policy"

    @property
    def unit(self) -> str:
        """The name of a step of the run."""
        return "iteration" if self.kind == "policy" else "step"

    @property
    def steps(self) -> int:
        """The last step that it has recorded."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def planned_steps(self) -> int | None:
        """How many steps it is to have; None if it does not say."""
        if self.kind == "policy":
            return self.settings.get("rl.num_iterations")
        planned = self.last.get("validation/planned_steps")
        return int(planned) if planned else self.settings.get(f"{self.stage}.max_steps")

    @functools.cached_property
    def last(self) -> Row:
        """The last value of each metric."""
        return {name: value for row in self.metrics for name, value in row.items()}

    @property
    def finished(self) -> bool:
        """Whether its model has been saved."""
        return model_config(self.path) is not None or is_own(self.path)

    @property
    def seconds_per_step(self) -> float | None:
        """Median, without the first step, which compiles."""
        seconds = [
            row["timing/step"] for row in self.timing if row["step"] > 1 and "timing/step" in row
        ]
        return float(np.median(seconds)) if seconds else None

    @functools.cached_property
    def validations(self) -> list[tuple[int, list[Row]]]:
        """The samples of the first and of the last validation, each with its step; one if there was
        only one.
        """
        return _first_and_last(row for row in self.samples if "split" not in row)

    @functools.cached_property
    def training_samples(self) -> list[tuple[int, list[Row]]]:
        """The same of answers to prompts, or of pairs, that were trained on."""
        return _first_and_last(row for row in self.samples if "split" in row)

    @property
    def comparable(self) -> dict[str, Any]:
        """The settings that can change the results: all but those of other stages and
        ``FREE_SETTINGS``.
        """
        left_out = {*FREE_SETTINGS, *STAGES} - {self.stage}
        return {
            key: value
            for key, value in self.settings.items()
            if not {key, key.split(".")[0]} & left_out
        }


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seeds."""

    name: str
    records: tuple[RunRecord, ...]

    @property
    def validations(self) -> list[tuple[str, list[Row]]]:
        """The first and the last validation, pooled over the runs: their steps as a text, and their
        samples.
        """
        pooled = []
        for of_runs in itertools.zip_longest(*(run.validations for run in self.records)):
            ends = [end for end in of_runs if end is not None]
            steps = sorted({step for step, _ in ends})
            rows = [row for _, samples in ends for row in samples]
            pooled.append((" and ".join(map(str, steps)), rows))
        return pooled


def _first_and_last(samples: Iterable[Row]) -> list[tuple[int, list[Row]]]:
    by_step: dict[int, list[Row]] = {}
    for row in samples:
        by_step.setdefault(row["step"], []).append(row)
    steps = sorted(by_step.items())
    return steps[:1] + steps[1:][-1:]


def model_config(run: Path) -> Path | None:
    """config.json of the saved model, or of the first member of an ensemble; None if there is no
    model yet.
    """
    paths = [run / "model" / member / "config.json" for member in ("", "member_0")]
    return next((path for path in paths if path.is_file()), None)


def is_own(run: Path) -> bool:
    """Whether the saved policy is one that Python gave: no Hugging Face model."""
    return (run / "model" / OWN_NOTE).is_file()


def find(paths: Sequence[str | Path]) -> list[RunRecord]:
    """Reads runs. A folder of runs, such as a pipeline's, stands for the runs in it.

    Raises:
        UserError: no folder is given, one of them holds no run or a broken one, or a run is given
            twice.
    """
    if not paths:
        raise UserError("expected the folder of a run, or several")
    found: dict[Path, tuple[Path, bool]] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise no_folder(path)
        runs = folders(path)
        if not runs:
            raise UserError(
                f"{path}: this folder holds no run: it has no manifest.json; give the folder of a "
                "run"
            )
        for run in runs:
            place = run.resolve()
            if place in found:
                raise UserError(f"{run}: this run is given twice")
            found[place] = (run, run != path)
    common = os.path.commonpath([place.parent for place in found])
    return [
        _read(run, place.relative_to(common).as_posix(), is_inner)
        for place, (run, is_inner) in found.items()
    ]


def folders(path: Path) -> list[Path]:
    """The folder of a run, or those of the runs in a folder of runs; empty if it holds none."""
    if (path / "manifest.json").is_file():
        return [path]
    inner = [*path.glob("*/manifest.json"), *path.glob("round-*/*/manifest.json")]
    return sorted(file.parent for file in inner)


def _read(path: Path, name: str, is_inner: bool) -> RunRecord:
    """The run in a folder. is_inner: it is a stage of a pipeline, whose folder is written as "…" in
    its settings: two runs do not differ by it.
    """
    manifest = reading.read_json(path / "manifest.json", reading.Manifest, ["command"])
    place = path / "config.yaml"
    settings = reading.read_yaml(place, reading.Settings)
    config = read_file(place).decode("utf-8", "replace")
    given = str(settings.get("output_dir"))
    outer = Path(given).parent
    if is_inner and outer.name:
        renamed = config.replace(f"{outer}/", "…/")
        settings = reading.parse_yaml(renamed, reading.Settings, str(place))
    evaluation: list[Row] = []
    file = path / EVALUATION
    if file.exists():
        evaluation = reading.read_json(file, reading.Evaluation, ["rows"])["rows"]
    rows: dict[str, Any] = {}
    cut = []
    for kind in ("metrics", "timing", "samples", "alerts"):
        file = path / f"{kind}.jsonl"
        rows[kind] = reading.read_rows(file)
        if file.exists() and len(read_file(file, most=None).splitlines()) > len(rows[kind]):
            cut.append(file.name)
    for row in rows["samples"]:
        if "score_chosen" in row and "score_rejected" in row:
            row["margin"] = row["score_chosen"] - row["score_rejected"]
    flat = dotted(settings)
    return RunRecord(
        path,
        name,
        manifest,
        config,
        flat,
        **rows,
        evaluation=evaluation,
        cut=tuple(cut),
        folder=given,
    )


def groups(records: Iterable[RunRecord]) -> list[Group]:
    """The runs, in their order, those together that differ only in ``FREE_SETTINGS``."""
    members: dict[str, list[RunRecord]] = {}
    for record in records:
        key = json.dumps([record.stage, record.comparable], sort_keys=True, default=str)
        members.setdefault(key, []).append(record)
    names = []
    for group in members.values():
        common = os.path.commonprefix([record.name for record in group])  # noqa: RUF071
        common = re.sub(r"[-_. /=]*(seed)?[-_. /=]*$", "", common)
        name = group[0].name
        names.append(f"{common or name} (n = {len(group)})" if len(group) > 1 else name)
    if len(set(names)) < len(names):
        names = [f"{group[0].name} (n = {len(group)})" for group in members.values()]
    pairs = zip(names, members.values(), strict=True)
    return [Group(name, tuple(group)) for name, group in pairs]


def differences(compared: Sequence[Group]) -> dict[str, list[Any]]:
    """``{dotted key: [value in each group]}`` of the settings that are not the same in all groups,
    and the stage.

    A setting that a group lacks is "(none)"; it counts as a difference only between groups of one
    stage.
    """
    firsts = [group.records[0] for group in compared]
    settings = [{"stage": record.stage, **record.comparable} for record in firsts]
    result = {}
    for key in dict.fromkeys(itertools.chain(*settings)):
        row = [values.get(key, "(none)") for values in settings]
        stages = {values["stage"] for values in settings if key in values}
        of_stages = [
            value for value, record in zip(row, firsts, strict=True) if record.stage in stages
        ]
        if any(value != of_stages[0] for value in of_stages):
            result[key] = row
    return result


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a run's ``.jsonl`` file. The strings NaN, Infinity and -Infinity become floats,
    except in columns of texts. An incomplete last line, of a run that still writes or was killed,
    is skipped.

    Raises:
        UserError: the file does not exist, or a line is no row.
    """
    if not Path(path).exists():
        raise UserError(f"{path}: there is no such file; give the folder of a run")
    return reading.read_rows(Path(path))


def series(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, from the rows that have it: a series of a
    :class:`rlhf_jax.report.figures.Plot`.
    """
    recorded = [row for row in rows if name in row]
    return [row["step"] for row in recorded], [row[name] for row in recorded]
