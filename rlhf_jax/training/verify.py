"""Whether a run repeats: a part of it is run again in a scratch folder and compared byte by byte.

    audit = verify("runs/ppo")
    assert not audit.differences

The part begins at one of the run's own checkpoints, or at its seed. Nothing is written into the
folder of the run, which may come from somebody else.
"""

import contextlib
import dataclasses
import itertools
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.algorithms import grpo, ppo, rloo, vpg
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
ROWS = ("metrics.jsonl", "samples.jsonl")
EXCERPT = 24  # characters on either side of the first one that differs
MACHINE = ("backend", "devices", "cpu", "xla_flags", "versions")  # facts of a manifest


class Difference(NamedTuple):
    """A value of the run, and what it is here."""

    step: int | None  # None: of what the run reads
    file: str
    place: str  # a setting, a metric, an array with an index
    recorded: str
    repeated: str


class Audit(NamedTuple):
    """What the comparison of a run with its repetition found."""

    differences: list[Difference]  # the first of each file
    machine: list[str]  # a sentence for each difference between the run's machine and this one
    unsure: list[str]  # what is not known to repeat, a sentence each
    compared: str  # what was repeated and compared


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
    data: Sequence[str] = (),
    model: str | None = None,
    reward: Sequence[str] = (),
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
    last_start = recorded.get("resumed", [recorded])[-1]
    unsure = _unsure(config, stage, last_start)
    here = _inputs(config, stage)
    expected = _renamed(recorded["data"], here, data, reward)
    differences = _setting_differences(path) + _input_differences(expected, here)
    if span.start is not None:
        differences += _damage(path, span.start)
    if differences:
        return Audit(
            differences, [], unsure, "nothing was repeated: what the run began with differs"
        )
    with tempfile.TemporaryDirectory(prefix="rlhf_jax_verify_") as scratch:
        ours = Path(scratch) / "run"
        config = dataclasses.replace(
            config, output_dir=str(ours), resume=span.start is not None, track=(), processes=None
        )
        if span.start is not None:
            # What is compared with this machine on --resume is left out.
            facts = {key: value for key, value in recorded.items() if key not in MACHINE}
            facts.pop("resumed", None)
            _copy(path, ours, span.start, config, facts | {"data": expected})
        with contextlib.suppress(AlertStop):  # the run was stopped at the same step, or rows differ
            _repeat(config, stage, span.stop)
        written = reading.read_json(ours / "manifest.json", reading.MANIFEST)
        this_start = written.get("resumed", [written])[-1]
        differences, compared = _compare(path, ours, span)
    before, now = (
        {key: facts[key] for key in MACHINE if key in facts} for facts in (last_start, this_start)
    )
    return Audit(differences, manifest.differences(before, now), unsure, compared)


# --- What the run is


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run of one of this package's stages that Python gave nothing to."""
    file = path / "manifest.json"
    inner = sorted(file.parent for file in path.glob("*/manifest.json"))
    if not file.is_file() and inner:
        listed = ", ".join(map(str, inner))
        raise UserError(f"{path}: holds several runs; give one of them: {listed}")
    recorded: dict[str, Any] = reading.read_json(
        file, reading.MANIFEST, ["stage", "data", "versions"]
    )
    stage = recorded["stage"]
    if stage not in SPECS and stage not in METHODS:
        raise UserError(
            f"{path}: its stage {stage} is none of this package's; only the script that made the "
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
    end = max(row["step"] for _, row in rows)
    if not from_scratch and start is None and len(saved) > 1:
        start = saved[-2]
    if start is not None and start not in saved:
        listed = ", ".join(map(str, saved)) or "none"
        raise UserError(f"--from {start}: {path} has checkpoints of the steps {listed}")
    if start is not None and start >= end:
        raise UserError(f"--from {start}: the run ends there; begin at an earlier checkpoint")
    stop = end if num_steps is None else min(end, (start or 0) + num_steps)
    return Span(start, stop, end)


def _config(path: Path, model: str | None, reward: Sequence[str], trust_config: bool) -> RunConfig:
    """The settings of config.yaml, those of the script that made the run among them."""
    file = path / "config.yaml"
    known = {field.name for field in dataclasses.fields(RunConfig)}
    settings = reading.read_yaml(file, reading.SETTINGS)
    own = {
        key: value
        for key, value in settings.items()
        if key not in known and isinstance(value, bool | int | float | str)
    }
    if own:
        logger.info(f"{file}: {', '.join(own)} is read by the script that made the run, not here")
    fields = [(key, type(value), value) for key, value in own.items()]
    kind: type[RunConfig] = dataclasses.make_dataclass(
        "RunConfig", fields, bases=(RunConfig,), frozen=True
    )
    argv = ["--config", str(file)]
    if model is not None:
        argv += ["--model", model]
    if reward:
        argv += ["--reward", *reward]
    if trust_config:
        argv.append("--trust-config")
    return parse(kind, argv, prog="rlhf-jax verify", sections=["lora"])


def _unsure(config: RunConfig, stage: str, last_start: Mapping[str, Any]) -> list[str]:
    """What is not known to repeat."""
    sentences = []
    if stage in METHODS:
        read = [*config.reward, *config.rl.judge, config.safety.classifier, config.rl.environment]
        sentences += [
            f"{name} is Python code, which is not known to repeat: it may ask a clock or a network"
            for name in read
            if name is not None and ".py:" in name
        ]
    if last_start.get("backend") == "gpu" and not config.deterministic:
        sentences.append(
            "the run was on a GPU without --deterministic: the order of its sums may differ from "
            "run to run"
        )
    changes = [change for start in (last_start,) for change in start.get("changed", [])]
    if changes:
        sentences.append(f"the run went on with changed settings: {'; '.join(changes)}")
    return sentences


# --- What the run read


def _data_names(config: RunConfig, stage: str) -> dict[str, Sequence[str]]:
    """{field of the stage's section: the names of its data}."""
    section = config.rl if stage in METHODS else getattr(config, stage)
    names = {"data": section.data or config.data, "validation_data": section.validation_data}
    return {field: given for field, given in names.items() if given}


def _kind(stage: str) -> Any:
    return "prompts" if stage in METHODS else SPECS[stage].kind


def _recorded_name(name: str, stage: str, recorded: Mapping[str, str]) -> str:
    """What the manifest calls a data file that the settings name: a folder stands for a file."""
    return name if name in recorded else str(Path(name) / formats.FILES[_kind(stage)])


def _with_data(
    config: RunConfig, stage: str, recorded: Mapping[str, str], given: Sequence[str]
) -> RunConfig:
    """The settings with the ``given`` files in place of the run's: those of equal content, then the
    others in their order.
    """
    if not given:
        return config
    here = formats.fingerprints(_kind(stage), given, seed=config.seed)
    by_digest = {digest: name for name, digest in here.items()}
    spare = [name for name, digest in here.items() if digest not in recorded.values()]
    places: dict[str, tuple[str, ...]] = {}
    for field, names in _data_names(config, stage).items():
        digests = [recorded.get(_recorded_name(name, stage, recorded), "") for name in names]
        places[field] = tuple(
            by_digest[digest] if digest in by_digest else spare.pop(0) if spare else name
            for name, digest in zip(names, digests, strict=True)
        )
    name = "rl" if stage in METHODS else stage
    section = dataclasses.replace(getattr(config, name), **places)
    changes: dict[str, Any] = {name: section}
    return dataclasses.replace(config, **changes)


def _renamed(
    recorded: Mapping[str, str],
    here: Mapping[str, str],
    data: Sequence[str],
    reward: Sequence[str],
) -> dict[str, str]:
    """The checksums of the manifest under the names that the files have on this machine."""
    new_names: dict[str, str] = {}
    for is_given, is_kind in ((data, _is_data), (reward, _is_reward)):
        old = list(filter(is_kind, recorded))
        new = list(filter(is_kind, here))
        if is_given and len(old) == len(new):
            new_names |= dict(zip(old, new, strict=True))
    return {new_names.get(name, name): digest for name, digest in recorded.items()}


def _is_reward(name: str) -> bool:
    return name.startswith("reward ")


def _is_data(name: str) -> bool:
    is_other = name in ("model", "tokenizer", "environment") or name.startswith("safety ")
    return not is_other and not _is_reward(name)


def _inputs(config: RunConfig, stage: str) -> dict[str, str]:
    """The checksums of what the run would read here."""
    digests: dict[str, str] = {}
    for names in _data_names(config, stage).values():
        digests |= formats.fingerprints(_kind(stage), names, seed=config.seed)
    files = rl.files(config) if stage in METHODS else {}
    return digests | fingerprints_of(config, files)


def _input_differences(expected: Mapping[str, str], here: Mapping[str, str]) -> list[Difference]:
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
    return [
        Difference(None, name, "sha256", expected.get(name, "not read"), digest)
        for name, digest in here.items()
        if digest != expected.get(name)
    ]


def _setting_differences(path: Path) -> list[Difference]:
    """The settings of config.yaml that are not those of the newest checkpoint's record, which has a
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
        return [Difference(step, f"checkpoints/{step}", "", str(error), "")]
    if not isinstance(recorded, dict):
        return []
    old = manifest.dotted(recorded)
    new = manifest.dotted(reading.read_yaml(path / "config.yaml", reading.SETTINGS))
    return [
        Difference(None, "config.yaml", key, str(old.get(key, "not set")), str(new.get(key)))
        for key in old | new
        if old.get(key) != new.get(key) and not manifest.within(key, MAY_CHANGE)
    ]


# --- The repetition


def _arrays(path: Path, step: int) -> dict[str, np.ndarray]:
    with Checkpoints(path / "checkpoints") as checkpoints:
        return checkpoints.arrays(step)


def _damage(path: Path, step: int) -> list[Difference]:
    """The damage of a checkpoint, if any."""
    try:
        _arrays(path, step)
    except CheckpointError as error:
        return [Difference(step, f"checkpoints/{step}", "", str(error), "")]
    return []


def _copy(path: Path, ours: Path, start: int, config: RunConfig, facts: Mapping[str, Any]) -> None:
    """A run folder as the run's was at the checkpoint ``start``; ``facts`` are its manifest."""
    for step in folder.steps(path / "checkpoints"):
        if step <= start:
            name = f"checkpoints/{step}"
            shutil.copytree(path / name, ours / name)
    for file in (*ROWS, "alerts.jsonl"):
        if (path / file).exists():
            (ours / file).write_bytes(reading.read_bytes(path / file))
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
    """What differs, the earliest first, and what was compared."""
    found = [_first_row(theirs, ours, name, span) for name in ROWS]
    names = list(ROWS)
    repeated = folder.steps(ours / "checkpoints")
    for step in folder.steps(theirs / "checkpoints"):
        if span.has(step) and step in repeated:
            names.append(f"checkpoints/{step}")
            found.append(_first_array(theirs, ours, step))
    if span.stop == span.end and (theirs / "model").is_dir():
        names.append("model/")
        found += _files(theirs, ours, span.stop)
    begin = "the seed" if span.start is None else f"the checkpoint of step {span.start}"
    compared = f"repeated from {begin} to step {span.stop} of {span.end}: {', '.join(names)}"
    differences = [difference for difference in found if difference is not None]
    return sorted(differences, key=lambda difference: difference.step or 0), compared


def _first_row(theirs: Path, ours: Path, name: str, span: Span) -> Difference | None:
    """The first row that differs in a file, by the first key that does."""
    recorded, repeated = (
        [line for line in reading.json_lines(path / name) if span.has(line[1]["step"])]
        for path in (theirs, ours)
    )
    none = ("no row", dict[str, Any]())
    for (old, before), (new, now) in itertools.zip_longest(recorded, repeated, fillvalue=none):
        if old == new:
            continue
        step = before.get("step", now.get("step"))
        keys = [key for key in before | now if before.get(key) != now.get(key)]
        if keys and before and now:
            old = str(before.get(keys[0], "not there"))
            new = str(now.get(keys[0], "not there"))
        place = keys[0] if keys and before and now else "the row"
        return Difference(step, name, place, *_excerpts(old, new))
    return None


def _excerpts(old: str, new: str) -> tuple[str, str]:
    """What stands around the first character that differs."""
    pairs = enumerate(zip(old, new, strict=False))
    at = next((number for number, (a, b) in pairs if a != b), min(len(old), len(new)))
    around = slice(max(at - EXCERPT, 0), at + EXCERPT)
    return old[around], new[around]


def _first_array(theirs: Path, ours: Path, step: int) -> Difference | None:
    """The first array of a checkpoint that differs, by its first number that does."""
    file = f"checkpoints/{step}"
    try:
        recorded = _arrays(theirs, step)
    except CheckpointError as error:
        return Difference(step, file, "", str(error), "")
    repeated = _arrays(ours, step)
    unequal = [
        name
        for name in recorded | repeated
        if name not in recorded
        or name not in repeated
        or _description(recorded[name]) != _description(repeated[name])
        or recorded[name].tobytes() != repeated[name].tobytes()
    ]
    if not unequal:
        return None
    name = unequal[0]
    old, new = recorded.get(name), repeated.get(name)
    others = f" (first of {len(unequal)} arrays)" if len(unequal) > 1 else ""
    if old is None or new is None or _description(old) != _description(new):
        return Difference(step, file, name + others, _description(old), _description(new))
    byte = _first_byte(old.tobytes(), new.tobytes())
    index = np.unravel_index(byte // old.itemsize, old.shape)
    place = f"{name}[{', '.join(map(str, index))}]{others}"
    return Difference(step, file, place, str(old[index]), str(new[index]))


def _description(array: np.ndarray | None) -> str:
    return "not there" if array is None else f"{array.dtype}{list(array.shape)}"


def _first_byte(old: bytes, new: bytes) -> int:
    """The number of the first byte that differs."""
    size = min(len(old), len(new))
    unequal = np.frombuffer(old, np.uint8)[:size] != np.frombuffer(new, np.uint8)[:size]
    return int(unequal.argmax()) if unequal.any() else size


def _files(theirs: Path, ours: Path, step: int) -> list[Difference]:
    """The files of ``model/``, and the weights of ``adapter/``, that differ."""
    found = []
    for name in sorted(_results(theirs) | _results(ours)):
        old, new = (
            reading.read_bytes(path / name) if (path / name).is_file() else None
            for path in (theirs, ours)
        )
        if old is None or new is None:
            sizes = ["not there" if content is None else "there" for content in (old, new)]
            found.append(Difference(step, name, "", *sizes))
        elif old != new:
            at = _first_byte(old, new)
            values = [content[at : at + 1].hex() or "the end" for content in (old, new)]
            found.append(Difference(step, name, f"byte {at}", *values))
    return found


def _results(path: Path) -> set[str]:
    files = [*(path / "model").rglob("*"), *(path / "adapter").rglob("*.safetensors")]
    return {file.relative_to(path).as_posix() for file in files if file.is_file()}
