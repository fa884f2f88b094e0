"""Checks that a run repeats: runs a part of it again in a scratch folder and compares the files,
byte by byte.

    audit = verify("runs/ppo")
    assert not audit.differences

The part begins at one of the run's own checkpoints, or at its seed. The folder of the run, which
may come from somebody else, does not change.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.algorithms import distill, grpo, ppo, rloo, vpg
from rlhf_jax.config import RunConfig, parse, to_yaml
from rlhf_jax.data import formats
from rlhf_jax.errors import AlertStop, UserError, logger
from rlhf_jax.runs import folder, manifest, reading
from rlhf_jax.runs.checkpoint import CheckpointError, Checkpoints
from rlhf_jax.training import dpo, kto, reward_model, rl, sft, supervised
from rlhf_jax.training.stage import MAY_CHANGE, fingerprints_of, set_up
from rlhf_jax.types import Algorithm

SPECS = {spec.section: spec for spec in (sft.SPEC, reward_model.SPEC, dpo.SPEC, kto.SPEC)}
METHODS: dict[str, Algorithm] = {"vpg": vpg, "ppo": ppo, "rloo": rloo, "grpo": grpo}
METHODS["distill"] = distill
ROWS = ("metrics.jsonl", "samples.jsonl")
OTHERS = (
    "model",
    "tokenizer",
    "environment",
    "teacher",
)  # names in a manifest that are no data files
NO_ROW = ("no row", dict[str, Any]())
EXCERPT = 24  # characters on either side of the first one that differs
MACHINE = ("backend", "devices", "cpu", "xla_flags", "versions")  # facts of a manifest

Names = Sequence[str]
Facts = Mapping[str, Any]  # of a manifest
Digests = Mapping[str, str]  # {name of what a run reads: sha256}
Array = np.ndarray | None  # None: a checkpoint has none of this name


class Difference(NamedTuple):
    """A value of the run, and the value of its repetition."""

    step: int | None  # None: a difference between the files or settings that the run reads
    file: str
    place: str  # a setting, a metric, an array with an index
    recorded: str
    repeated: str


class Audit(NamedTuple):
    """What the comparison of a run with its repetition found."""

    differences: list[Difference]  # the first one in each file
    machine: list[str]  # a sentence for each difference between the run's machine and this one
    unsure: list[str]  # a sentence for each part of the run that may not repeat
    compared: str  # the steps that were repeated, and the files that were compared


class Span(NamedTuple):
    """The steps that are repeated: those after ``start`` up to ``stop``."""

    start: int | None  # the step of a checkpoint; None: from the seed
    stop: int
    end: int  # the run's last step

    def has(self, step: int) -> bool:
        """Whether the step is repeated."""
        return step <= self.stop and (self.start is None or step > self.start)


def verify(
    run: str | Path,
    *,
    start: int | None = None,
    num_steps: int | None = None,
    from_scratch: bool = False,
    data: Names = (),
    model: str | None = None,
    reward: Names = (),
    trust_config: bool = False,
) -> Audit:
    """Repeats steps of a run and compares metrics.jsonl, samples.jsonl, checkpoints and, if they go
    to the run's end, ``model/``.

    Args:
        run: the folder of a run of one stage.
        start: the step of the checkpoint to begin at. None: the last but one, or the seed if there
            is only one.
        num_steps: how many steps. None: all to the run's last one.
        from_scratch: begin at the seed.
        data, model, reward: where on this machine the files are that the run read. Their checksums
            must be those of the manifest.
        trust_config: as ``--trust-config``.

    Raises:
        UserError: the folder is no run that can be repeated, a file that it read is missing, or a
            setting is wrong.
    """
    path = Path(run)
    recorded = _manifest(path)
    folder.check_links(path)
    span = _span(path, start, num_steps, from_scratch)
    stage = recorded["stage"]
    config = _config(path, model, reward, trust_config)
    config = set_up(_with_data(config, stage, recorded["data"], data))  # before JAX begins
    unsure = _unsure(config, stage, _last_start(recorded))
    here = _inputs(config, stage)
    expected = _renamed(recorded["data"], here, data, reward)
    differences = _setting_differences(path) + _input_differences(expected, here)
    if span.start is not None:
        differences += _damage(path, span.start)
    if differences:
        why = "nothing was repeated: the files or settings at the start differ"
        return Audit(differences, [], unsure, why)
    with tempfile.TemporaryDirectory(prefix="rlhf_jax_verify_") as scratch:
        ours = Path(scratch) / "run"
        goes_on = span.start is not None or (path / "judge").is_dir()
        config = dataclasses.replace(
            config, output_dir=str(ours), resume=goes_on, track=(), processes=None
        )
        if goes_on:
            _copy(path, ours, span.start, config, _facts(recorded, expected))
        with contextlib.suppress(AlertStop):  # the run was stopped at the same step, or rows differ
            _repeat(config, stage, span.stop)
        written = reading.read_json(ours / "manifest.json", reading.MANIFEST)
        differences, compared = _compare(path, ours, span)
    before = _machine(_last_start(recorded))
    now = _machine(_last_start(written))
    return Audit(differences, manifest.differences(before, now), unsure, compared)


def _last_start(recorded: Facts) -> Facts:
    """The facts of a manifest about the last time that the run was started or resumed."""
    starts = recorded.get("resumed", [recorded])
    return starts[-1]


def _machine(facts: Facts) -> Facts:
    return {key: facts[key] for key in MACHINE if key in facts}


def _facts(recorded: Facts, data: Digests) -> dict[str, Any]:
    """The facts of a manifest that --resume does not compare with this machine, with the names of
    this machine for what the run read.
    """
    here = (*MACHINE, "resumed")
    facts = {key: value for key, value in recorded.items() if key not in here}
    return facts | {"data": data}


# --- What the run is


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run of one of this package's stages that Python gave nothing to."""
    file = path / "manifest.json"
    inner = sorted(str(file.parent) for file in path.glob("*/manifest.json"))
    if not file.is_file() and inner:
        raise UserError(f"{path}: holds several runs; give one of them: {', '.join(inner)}")
    needed = ["stage", "data", "versions"]
    recorded: dict[str, Any] = reading.read_json(file, reading.MANIFEST, needed)
    stage = recorded["stage"]
    if stage not in SPECS and stage not in METHODS:
        raise UserError(
            f"{path}: its stage {stage} is not one of this package; only the script that made the "
            "run can repeat it"
        )
    if recorded.get("given"):
        raise UserError(
            f"{path}: Python gave it {', '.join(recorded['given'])}; only the script that made the "
            "run can repeat it"
        )
    return recorded


def _span(path: Path, start: int | None, num_steps: int | None, from_scratch: bool) -> Span:
    if from_scratch and start is not None:
        raise UserError("--all begins at the seed, --from at a checkpoint: give one of them")
    if num_steps is not None and num_steps < 1:
        raise UserError(f"--steps must be at least 1, got {num_steps}")
    saved = folder.steps(path / "checkpoints")
    rows = reading.json_lines(path / "metrics.jsonl")
    if not rows:
        raise UserError(f"{path}: metrics.jsonl has no rows; there is nothing to compare")
    end = max(values["step"] for _, values in rows)
    if not from_scratch and start is None and len(saved) > 1:
        start = saved[-2]
    if start is not None and start not in saved:
        listed = ", ".join(map(str, saved)) or "none"
        raise UserError(f"--from {start}: {path} has checkpoints of the steps {listed}")
    if start is not None and start >= end:
        raise UserError(f"--from {start}: the run ends there; begin at an earlier checkpoint")
    if num_steps is None:
        return Span(start, end, end)
    first = 0 if start is None else start
    return Span(start, min(end, first + num_steps), end)


def _config(path: Path, model: str | None, reward: Names, trust_config: bool) -> RunConfig:
    """The settings of config.yaml, those of the script that made the run among them."""
    file = path / "config.yaml"
    argv = ["--config", str(file)]
    if (path / "engine").is_dir():  # the samples that the run kept: no server is asked
        argv += ["--rl.engine", f"stored:{path / 'engine'}"]
    if model is not None:
        argv += ["--model", model]
    if reward:
        argv += ["--reward", *reward]
    if trust_config:
        argv.append("--trust-config")
    kind = _settings_class(file)
    return parse(kind, argv, prog="rlhf-jax verify", sections=["lora", "rl.engine"])


def _settings_class(file: Path) -> type[RunConfig]:
    """RunConfig with a field for each setting of the script that made the run."""
    known = {field.name for field in dataclasses.fields(RunConfig)}
    settings = reading.read_yaml(file, reading.SETTINGS)
    others = {}
    for key, value in settings.items():
        if key not in known and isinstance(value, bool | int | float | str):
            others[key] = value
    if others:
        names = ", ".join(others)
        logger.info(f"{file}: {names} is read by the script that made the run, not here")
    fields = [(key, type(value), value) for key, value in others.items()]
    return dataclasses.make_dataclass("RunConfig", fields, bases=(RunConfig,), frozen=True)


def _unsure(config: RunConfig, stage: str, last_start: Facts) -> list[str]:
    """A sentence for each part of the run that may not repeat."""
    sentences = []
    if stage in METHODS:
        read = [*config.reward, *config.rl.judge, config.safety.classifier, config.rl.environment]
        for name in read:
            if name is not None and ".py:" in name:
                sentences.append(
                    f"{name} is Python code, which is not known to repeat: it may use a clock or a "
                    "network"
                )
    if last_start.get("backend") == "gpu" and not config.deterministic:
        sentences.append(
            "the run was on a GPU without --deterministic: the order of its sums may differ from "
            "run to run"
        )
    changes = last_start.get("changed")
    if changes:
        sentences.append(f"the run went on with changed settings: {'; '.join(changes)}")
    return sentences


# --- What the run read


def _section(stage: str) -> str:
    """The section of the settings that names the data of a stage."""
    return "rl" if stage in METHODS else stage


def _kind(stage: str) -> Any:
    """Of the rows of its data."""
    return "prompts" if stage in METHODS else SPECS[stage].kind


def _data_names(config: RunConfig, stage: str) -> dict[str, Names]:
    """{field of the stage's section: the names of its data}."""
    section = getattr(config, _section(stage))
    names = {"data": section.data or config.data}
    if section.validation_data:
        names["validation_data"] = section.validation_data
    return names


def _with_data(config: RunConfig, stage: str, recorded: Digests, given: Names) -> RunConfig:
    """The settings with the ``given`` files in place of the run's: first files of equal content,
    then the others in their order.
    """
    if not given:
        return config
    kind = _kind(stage)
    here = formats.fingerprints(kind, given, seed=config.seed)
    same = {digest: name for name, digest in here.items()}
    others = [name for name, digest in here.items() if digest not in recorded.values()]

    def place_of(name: str) -> str:
        # The settings may name the folder that holds a file of the manifest.
        file = name if name in recorded else str(Path(name) / formats.FILES[kind])
        digest = recorded.get(file, "")
        if digest in same:
            return same[digest]
        return others.pop(0) if others else name

    changes: dict[str, Any] = {}
    for field, names in _data_names(config, stage).items():
        changes[field] = tuple(map(place_of, names))
    section = _section(stage)
    sections = {section: dataclasses.replace(getattr(config, section), **changes)}
    return dataclasses.replace(config, **sections)


def _renamed(recorded: Digests, here: Digests, data: Names, reward: Names) -> Digests:
    """The checksums of the manifest under the names that the files have on this machine."""
    new_names: dict[str, str] = {}
    for is_given, is_kind in ((data, _is_data), (reward, _is_reward)):
        old = list(filter(is_kind, recorded))
        new = list(filter(is_kind, here))
        if is_given and len(old) == len(new):
            new_names |= zip(old, new, strict=True)
    return {new_names.get(name, name): digest for name, digest in recorded.items()}


def _is_reward(name: str) -> bool:
    return name.startswith("reward ")


def _is_data(name: str) -> bool:
    return name not in OTHERS and not name.startswith(("reward ", "safety "))


def _inputs(config: RunConfig, stage: str) -> Digests:
    """The checksums of the files that the run would read on this machine."""
    kind = _kind(stage)
    files = rl.files(config, stage) if stage in METHODS else {}
    digests = fingerprints_of(config, files)
    for names in _data_names(config, stage).values():
        digests |= formats.fingerprints(kind, names, seed=config.seed)
    return digests


def _input_differences(expected: Digests, here: Digests) -> list[Difference]:
    """The files that differ.

    Raises:
        UserError: one is missing.
    """
    missing = [name for name in expected if name not in here]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: the run read it, and it is not on this machine; give its place "
            "by --data, --model or --reward"
        )
    differences = []
    for name, digest in here.items():
        before = expected.get(name, "not read")
        if digest != before:
            differences.append(Difference(None, name, "sha256", before, digest))
    return differences


def _setting_differences(path: Path) -> list[Difference]:
    """The settings of config.yaml that differ from the record of the newest checkpoint, which has a
    checksum.
    """
    saved = folder.steps(path / "checkpoints")
    if not saved:
        return []
    step = saved[-1]
    try:
        with Checkpoints(path / "checkpoints") as checkpoints:
            recorded = checkpoints.record(step)["meta"].get("config")
    except CheckpointError as error:
        return [_damaged(step, error)]
    if not isinstance(recorded, dict):
        return []
    old = manifest.dotted(recorded)
    new = manifest.dotted(reading.read_yaml(path / "config.yaml", reading.SETTINGS))
    differences = []
    for key in old | new:
        before = old.get(key, "not set")
        now = new.get(key, "not set")
        if before != now and not manifest.within(key, MAY_CHANGE):
            differences.append(Difference(None, "config.yaml", key, str(before), str(now)))
    return differences


# --- The repetition


def _arrays(path: Path, step: int) -> dict[str, np.ndarray]:
    with Checkpoints(path / "checkpoints") as checkpoints:
        return checkpoints.arrays(step)


def _damage(path: Path, step: int) -> list[Difference]:
    """The damage of a checkpoint, if any."""
    try:
        _arrays(path, step)
    except CheckpointError as error:
        return [_damaged(step, error)]
    return []


def _damaged(step: int, error: CheckpointError) -> Difference:
    return Difference(step, f"checkpoints/{step}", "", str(error), "")


def _copy(path: Path, ours: Path, start: int | None, config: RunConfig, facts: Facts) -> None:
    """Makes a run folder as the run's was at the checkpoint ``start``, with ``facts`` as its
    manifest. It has the replies of judges and teachers, so that no server is asked again.
    """
    ours.mkdir()
    if (path / "judge").is_dir():
        shutil.copytree(path / "judge", ours / "judge")
    if start is not None:
        for step in folder.steps(path / "checkpoints"):
            if step <= start:
                name = f"checkpoints/{step}"
                shutil.copytree(path / name, ours / name)
        for file in (*ROWS, "alerts.jsonl"):
            content = _content(path / file)
            if content is not None:
                (ours / file).write_bytes(content)
    (ours / "config.yaml").write_text(to_yaml(config), "utf-8")
    (ours / "manifest.json").write_text(json.dumps(facts), "utf-8")


def _repeat(config: RunConfig, stage: str, stop: int) -> None:
    """Runs the stage up to the step ``stop``."""

    def is_over(step: int, *of_step: Any) -> bool:
        return step >= stop

    if stage in SPECS:
        supervised.run(config, SPECS[stage], is_over)
    else:
        rl.run(config, METHODS[stage], on_step=is_over)


# --- The comparison


def _compare(theirs: Path, ours: Path, span: Span) -> tuple[list[Difference], str]:
    """The differences, the earliest first, and a sentence about what was compared."""
    names = list(ROWS)
    differences = []
    for name in ROWS:
        differences += _row_differences(theirs / name, ours / name, span)
    repeated = folder.steps(ours / "checkpoints")
    for step in folder.steps(theirs / "checkpoints"):
        if step in repeated and span.has(step):
            names.append(f"checkpoints/{step}")
            differences += _state_differences(theirs, ours, step)
    if span.stop == span.end and (theirs / "model").is_dir():
        names.append("model/")
        differences += _file_differences(theirs, ours, span.stop)
    differences.sort(key=lambda difference: difference.step or 0)
    begin = "the seed" if span.start is None else f"the checkpoint of step {span.start}"
    compared = f"repeated from {begin} to step {span.stop} of {span.end}: {', '.join(names)}"
    return differences, compared


def _row_differences(theirs: Path, ours: Path, span: Span) -> list[Difference]:
    """The first row of a file that differs, by the first key whose values differ."""
    recorded = _rows(theirs, span)
    repeated = _rows(ours, span)
    for before, now in itertools.zip_longest(recorded, repeated, fillvalue=NO_ROW):
        old, old_values = before
        new, new_values = now
        if old == new:
            continue
        step = old_values.get("step", new_values.get("step"))
        place = "the row"
        keys = [
            key for key in old_values | new_values if old_values.get(key) != new_values.get(key)
        ]
        if keys and NO_ROW not in (before, now):
            place = keys[0]
            old = str(old_values.get(place, "not there"))
            new = str(new_values.get(place, "not there"))
        return [Difference(step, theirs.name, place, *_excerpts(old, new))]
    return []


def _rows(file: Path, span: Span) -> list[tuple[str, dict[str, Any]]]:
    """The lines of the steps that are repeated, as texts and as values."""
    rows = reading.json_lines(file)
    return [row for row in rows if span.has(row[1]["step"])]


def _excerpts(old: str, new: str) -> tuple[str, str]:
    """The characters around the first one that differs."""
    place = len(os.path.commonprefix([old, new]))  # noqa: RUF071
    first = max(place - EXCERPT, 0)
    last = place + EXCERPT
    return old[first:last], new[first:last]


def _state_differences(theirs: Path, ours: Path, step: int) -> list[Difference]:
    """The first array of a checkpoint that differs, by its first number that does."""
    file = f"checkpoints/{step}"
    try:
        recorded = _arrays(theirs, step)
    except CheckpointError as error:
        return [_damaged(step, error)]
    repeated = _arrays(ours, step)
    unequal = []
    for name in recorded | repeated:
        if not _are_equal(recorded.get(name), repeated.get(name)):
            unequal.append(name)
    if not unequal:
        return []
    name = unequal[0]
    index, before, now = _first_number(recorded.get(name), repeated.get(name))
    others = f" (first of {len(unequal)} arrays)" if len(unequal) > 1 else ""
    return [Difference(step, file, name + index + others, before, now)]


def _first_number(old: Array, new: Array) -> tuple[str, str, str]:
    """The index of the first number that differs, and both numbers; of arrays of different shapes
    or dtypes no index, and both descriptions.
    """
    if old is None or new is None or _description(old) != _description(new):
        return "", _description(old), _description(new)
    byte = _first_byte(old.tobytes(), new.tobytes())
    index = np.unravel_index(byte // old.itemsize, old.shape)
    place = ", ".join(map(str, index))
    return f"[{place}]", str(old[index]), str(new[index])


def _are_equal(old: Array, new: Array) -> bool:
    """Whether both arrays are there and have the same dtype, shape and bytes."""
    if old is None or new is None or _description(old) != _description(new):
        return False
    return old.tobytes() == new.tobytes()


def _description(array: Array) -> str:
    if array is None:
        return "not there"
    return f"{array.dtype}{list(array.shape)}"


def _first_byte(old: bytes, new: bytes) -> int:
    """The number of the first byte that differs."""
    size = min(len(old), len(new))
    old_bytes = np.frombuffer(old, np.uint8, size)
    new_bytes = np.frombuffer(new, np.uint8, size)
    places = np.flatnonzero(old_bytes != new_bytes)
    return int(places[0]) if places.size else size


def _file_differences(theirs: Path, ours: Path, step: int) -> list[Difference]:
    """The files of ``model/``, and the weights of ``adapter/``, that differ."""
    differences = []
    for name in sorted(_results(theirs) | _results(ours)):
        old = _content(theirs / name)
        new = _content(ours / name)
        if old is None:
            differences.append(Difference(step, name, "", "not there", "there"))
        elif new is None:
            differences.append(Difference(step, name, "", "there", "not there"))
        elif old != new:
            place = _first_byte(old, new)
            before = old[place : place + 1].hex() or "the end"
            now = new[place : place + 1].hex() or "the end"
            differences.append(Difference(step, name, f"byte {place}", before, now))
    return differences


def _content(file: Path) -> bytes | None:
    return reading.read_bytes(file) if file.is_file() else None


def _results(path: Path) -> set[str]:
    """The names of a run's result files, from its folder."""
    model = (path / "model").rglob("*")
    adapters = (path / "adapter").rglob("*.safetensors")
    files = filter(Path.is_file, itertools.chain(model, adapters))
    return {file.relative_to(path).as_posix() for file in files}
