"""Checks that a run repeats: runs a part of it again in a scratch folder and compares the files,
byte by byte.

    audit = verify("runs/ppo")
    assert not audit.differences

The part begins at one of the run's own checkpoints, or at its seed. The folder of the run, which
may come from somebody else, does not change.
"""

import contextlib
import json
import os
import random
import secrets
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from rlhf_jax.cli.console import print_table, show
from rlhf_jax.cli.stages import find_algorithm, find_method
from rlhf_jax.config import RunConfig, check_trusted, parse, to_yaml
from rlhf_jax.data import formats
from rlhf_jax.errors import (
    AlertStop,
    ServiceError,
    Stopped,
    UserError,
    logger,
    no_folder,
    read_file,
)
from rlhf_jax.runs import folder, keeping, manifest, objects, reading
from rlhf_jax.runs.checkpoint import CheckpointError, Checkpoints
from rlhf_jax.runs.writing import copy_files, unfinished_beside
from rlhf_jax.training import rl
from rlhf_jax.training.common.opening import MAY_CHANGE, fingerprints_of
from rlhf_jax.training.common.progress import PAUSE
from rlhf_jax.training.common.setup import set_up
from rlhf_jax.training.rl import inputs
from rlhf_jax.training.rl.job import sources_of
from rlhf_jax.training.supervised import run as supervised
from rlhf_jax.training.tasks import TASKS

ROWS = ("metrics.jsonl", "samples.jsonl")
# In place of the run's: how it was started, and whom it told.
STARTS: dict[str, Any] = {"output_dir": None, "resume": False, "overwrite": False}
STARTS |= {"allow_changed": (), "processes": None, "track": ()}
NUM_DRAWN = 3  # steps that --random draws without --steps
SECTIONS = ("lora", "rl.engine", "reward")  # of which verify has flags
WHOLE = "the row"  # the text of a row of metrics.jsonl or samples.jsonl, beside its values
EXCERPT = 24  # characters on either side of the first one that differs
# Facts of a manifest.
MACHINE = ("threads", "backend", "devices", "cpu", "xla_flags", "versions")

Names = Sequence[str]
Facts = dict[str, Any]  # of a manifest
Part = str | np.ndarray | None  # what is in one place of a file; None: nothing


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
    drawn: tuple[int, ...] = ()  # those of its steps that were drawn at random

    def has(self, step: int) -> bool:
        """Whether the step is repeated."""
        return step <= self.stop and (self.start is None or step > self.start)


def verify(
    run: str | Path,
    *,
    start: int | None = None,
    num_steps: int | None = None,
    from_scratch: bool = False,
    draw: int | None = None,
    data: Names = (),
    model: str | None = None,
    reward: Names = (),
    trust_config: bool = False,
) -> Audit:
    """Repeats steps of a run and compares metrics.jsonl, samples.jsonl, checkpoints and, if they go
    to the run's end, ``model/``.

    A run with ``compute.blocks`` gives the same bits on any number of devices, and is repeated on
    all that are here.

    Args:
        run: the folder of a run of one stage.
        start: the step of the checkpoint to begin at. None: the last but one, or the seed if there
            is only one.
        num_steps: how many steps. None: all to the run's last one, or NUM_DRAWN with ``draw``.
        from_scratch: begin at the seed.
        draw: the seed by which ``num_steps`` steps are drawn, each repeated from the nearest
            checkpoint before it. With ``from_scratch`` also steps before the first checkpoint are
            drawn, and repeated from the seed.
        data, model, reward: where on this machine the files are that the run read. Their checksums
            must be those of the manifest.
        trust_config: as ``--trust-config``.

    Raises:
        UserError: the folder is no run that can be repeated, a file that it read is missing, or a
            setting is wrong.
    """
    path = Path(run)
    recorded = read_manifest(path)
    spans = _spans(path, start, num_steps, from_scratch, draw)
    stage = recorded["stage"]
    flags = [] if model is None else ["--model", model]
    if reward:
        flags += ["--reward", *reward]
    if (path / "engine").is_dir():  # the samples that the run kept: no server is asked
        flags += ["--rl.engine", f"stored:{path / 'engine'}"]
    config = read_config(path, recorded, flags, data, trust_config)
    last_start = manifest.last_start(recorded)
    unsure = _unsure(config, stage, recorded)
    here = checksums(config, stage)
    starts = [span.start for span in spans if span.start is not None]
    differences = start_differences(path, starts, recorded["data"], here)
    if differences:
        why = "nothing was repeated: the files or settings at the start differ"
        return Audit(differences, [], unsure, why)
    sentences = []
    for span in spans:
        with tempfile.TemporaryDirectory(prefix="rlhf_jax_verify_") as scratch:
            ours = Path(scratch) / "run"
            _repeat(path, ours, config, span, {**recorded, "data": here})
            written = reading.read_json(ours / "manifest.json", reading.Manifest)
            found, compared = compare(path, ours, span)
        differences += found
        sentences.append(compared)
    machine = manifest.differences(_machine(last_start), _machine(manifest.last_start(written)))
    return Audit(differences, [*machine.values()], unsure, "\n".join(sentences))


def _machine(facts: Facts) -> Facts:
    return {key: facts[key] for key in MACHINE if key in facts}


# --- What the run is


def read_manifest(path: Path) -> Facts:
    """The manifest of a run of this package's stages and methods that Python gave nothing to.

    Raises:
        UserError: it is not such a run, or a link in its folder leads elsewhere.
    """
    if not path.is_dir():
        raise no_folder(path)
    file = path / "manifest.json"
    inner = sorted(str(file.parent) for file in path.glob("*/manifest.json"))
    if not file.is_file() and inner:
        raise UserError(f"{path}: holds several runs; give one of them: {', '.join(inner)}")
    needed = ["stage", "data", "versions"]
    recorded: Facts = reading.read_json(file, reading.Manifest, needed)
    why = ""
    algorithm = find_algorithm(recorded["stage"])
    given = recorded.get("given", {})
    if recorded["stage"] not in TASKS and algorithm is None:
        why = f"its stage {recorded['stage']} is not one of this package"
    elif given not in ({}, {"algorithm": objects.describe(algorithm)}):
        why = f"Python gave it {', '.join(given)}"
    if why:
        raise UserError(f"{path}: {why}; only the script that made the run can repeat it")
    folder.check_links(path)
    return recorded


def _spans(
    path: Path, start: int | None, num_steps: int | None, from_scratch: bool, draw: int | None
) -> list[Span]:
    """The steps to repeat: one span, or with ``draw`` one from each checkpoint drawn steps need."""
    if start is not None and (from_scratch or draw is not None):
        raise UserError(
            "--random begins at the nearest checkpoint: leave out --from"
            if draw is not None
            else "--all begins at the seed, --from at a checkpoint: give one of them"
        )
    if num_steps is not None and num_steps < 1:
        raise UserError(f"--steps must be at least 1, got {num_steps}")
    steps = sorted({values["step"] for _, values in reading.json_lines(path / "metrics.jsonl")})
    if not steps:
        raise UserError(f"{path}: metrics.jsonl has no rows; there is nothing to compare")
    end = steps[-1]
    saved = folder.steps(path / "checkpoints")
    begins = [step for step in saved if step < end]
    listed = ", ".join(map(str, begins)) or "none"
    if draw is None:
        if start is None and not from_scratch and len(saved) > 1:
            start = saved[-2]
        if start is not None and start not in begins:
            raise UserError(
                f"--from {start}: {path} has these checkpoints before its end: {listed}"
            )
        return [Span(start, min(end, (start or 0) + (num_steps or end)), end)]
    places: list[int | None] = [None, *begins] if from_scratch else [*begins]
    first = (places[0] or 0) if places else end
    steps = [step for step in steps if step > first]
    number = NUM_DRAWN if num_steps is None else num_steps
    if number > len(steps):
        asked = f"--random --steps {number}: {path}"
        if from_scratch:
            raise UserError(f"{asked} has {end} steps; ask for fewer")
        raise UserError(
            f"{asked} keeps the checkpoints of these steps before its end: {listed}; {len(steps)} "
            f"of its {end} steps come after one. --all draws from all steps, and repeats from the "
            "seed those before the first checkpoint; a run with a larger --keep-last keeps more"
        )
    groups: dict[int | None, tuple[int, ...]] = {}
    for step in sorted(random.Random(draw).sample(steps, number)):
        nearest = [place for place in places if (place or 0) < step][-1]
        groups[nearest] = (*groups.get(nearest, ()), step)
    return [Span(place, drawn[-1], end, drawn) for place, drawn in groups.items()]


def read_config(
    path: Path,
    recorded: Facts,
    flags: Names,
    data: Names,
    trust_config: bool,
    sections: Names = SECTIONS,
) -> RunConfig:
    """The settings of a run, as flags change them, with the places of its ``data`` here; without
    those of the script that made it, and without how it was started and whom it told. JAX begins
    with the run's number of threads.

    Args:
        sections: those that have flags.

    Raises:
        UserError: a flag is wrong, or the config names what is not trusted.
    """
    file = path / "config.yaml"
    argv = ["--config", str(file), *flags]
    if trust_config:
        argv.append("--trust-config")
    ours = {field.name for field in fields(RunConfig)}
    settings = reading.read_yaml(file, reading.Settings)
    others = [
        key
        for key, value in settings.items()
        if key not in ours and isinstance(value, bool | int | float | str)
    ]
    if others:
        names = ", ".join(others)
        logger.info(f"{file}: {names} is read by the script that made the run, not here")
    files = [f"{name}.{key}" for name in ("rl", *TASKS) for key in ("data", "validation_data")]
    config = parse(
        RunConfig,
        argv,
        prog="rlhf-jax",
        sections=sections,
        algorithm=find_method(recorded["stage"]),
        replaced=[*STARTS, "data", *files],
        ignored=others,
    )
    config = _with_data(replace(config, **STARTS), recorded, data)
    if not trust_config:
        every = _data_names(config, recorded["stage"]).values()
        left = tuple(name for names in every for name in names if name not in data)
        check_trusted({"data": (left, str(file))})
    if -1 not in (config.mesh.fsdp, config.mesh.tensor):
        # As many groups as this machine has devices for.
        config = replace(config, mesh=replace(config.mesh, data=-1))
    return set_up(config, threads=manifest.last_start(recorded).get("threads"))


def _unsure(config: RunConfig, stage: str, recorded: Facts) -> list[str]:
    """A sentence for each part of the run that may not repeat."""
    named: list[str | None] = []
    if stage not in TASKS:
        named = [*config.reward, *config.rl.judge, config.safety.classifier, config.rl.environment]
    sentences = [
        f"{name} is Python code, which is not known to repeat: it may use a clock or a network"
        for name in named
        if name is not None and ".py:" in name
    ]
    last_start = manifest.last_start(recorded)
    if last_start.get("backend") == "gpu" and not config.deterministic:
        sentences.append(
            "the run was on a GPU without --deterministic: the order of its sums may differ from "
            "run to run"
        )
    changes = last_start.get("changed") or recorded.get("fork", {}).get("changes")
    if changes:
        sentences.append(f"the run went on with changed settings: {'; '.join(changes)}")
    return sentences


# --- What the run read


def _kind(stage: str) -> Any:
    """Of the rows of its data."""
    return TASKS[stage].kind if stage in TASKS else "prompts"


def section_of(stage: str) -> str:
    """The section of the settings that names its data and its length."""
    return stage if stage in TASKS else "rl"


def _data_names(config: RunConfig, stage: str) -> dict[str, Names]:
    """{field of the stage's section: the names of its data}."""
    section = getattr(config, section_of(stage))
    names = {"data": section.data or config.data, "validation_data": section.validation_data}
    return {field: given for field, given in names.items() if given}


def _with_data(config: RunConfig, recorded: Facts, given: Names) -> RunConfig:
    """The settings with ``given`` files for the run's: those of equal content, then by order."""
    if not given:
        return config
    stage = recorded["stage"]
    known = recorded["data"]
    kind = _kind(stage)
    here = formats.fingerprints(kind, given, seed=config.seed)
    same = {digest: name for name, digest in here.items()}
    others = iter([name for name, digest in here.items() if digest not in known.values()])
    changes: dict[str, Any] = {}
    for field, names in _data_names(config, stage).items():
        # The settings may name the folder that holds a file of the manifest.
        files = [name if name in known else str(Path(name) / formats.FILES[kind]) for name in names]
        places = [same.get(known.get(file, "")) for file in files]
        changes[field] = tuple(
            place or next(others, name) for place, name in zip(places, names, strict=True)
        )
    section = section_of(stage)
    sections = {section: replace(getattr(config, section), **changes)}
    return replace(config, **sections)


def checksums(config: RunConfig, stage: str) -> dict[str, str]:
    """The checksums of the files that the run would read on this machine."""
    others = {}
    if stage not in TASKS:
        others = inputs.files(sources_of(config), config.rl, (vars(config) | config.own)[stage])
    digests = fingerprints_of(config, others)
    for names in _data_names(config, stage).values():
        digests |= formats.fingerprints(_kind(stage), names, seed=config.seed)
    return digests


def start_differences(
    path: Path, steps: Sequence[int], recorded: Mapping[str, str], here: Mapping[str, str]
) -> list[Difference]:
    """What is not as the run left or read it: its settings, the checkpoints of these steps, and the
    files of the manifest's checksums, of which there are other ones ``here``.
    """
    damage = [found for step in steps for found in _arrays(path, step)[1]]
    return [*_setting_differences(path), *_input_differences(recorded, here), *damage]


def _input_differences(recorded: Mapping[str, str], here: Mapping[str, str]) -> list[Difference]:
    """The files whose content the run did not read; a new name may replace one that is gone."""
    gone = [name for name in recorded if name not in here and recorded[name] not in here.values()]
    differences = []
    for name, digest in here.items():
        if name not in recorded and digest in recorded.values():
            continue  # a file that was read, in another place
        before = recorded.get(name)
        if before is None:
            before = recorded[gone.pop(0)] if gone else "not read"
        if digest != before:
            differences.append(Difference(None, name, "sha256", before, digest))
    if gone:
        raise UserError(
            f"{', '.join(gone)}: the run read it, and it is not on this machine; give its place by "
            "--data, --model or --reward"
        )
    return differences


def _setting_differences(path: Path) -> list[Difference]:
    """The settings of config.yaml that differ from the newest checkpoint, which has a checksum."""
    saved = folder.steps(path / "checkpoints")
    if not saved:
        return []
    try:
        with Checkpoints(path / "checkpoints") as checkpoints:
            recorded = checkpoints.record(saved[-1])["meta"].get("config")
    except CheckpointError as error:
        return [Difference(saved[-1], f"checkpoints/{saved[-1]}", "", str(error), "")]
    if not isinstance(recorded, dict):
        return []
    settings = reading.read_yaml(path / "config.yaml", reading.Settings)
    return [
        Difference(None, "config.yaml", key, old, new)
        for key, (old, new) in manifest.unequal(recorded, settings).items()
        if not manifest.within(key, MAY_CHANGE)
    ]


def _arrays(path: Path, step: int) -> tuple[dict[str, np.ndarray], list[Difference]]:
    """The arrays of a checkpoint, or its damage."""
    try:
        with Checkpoints(path / "checkpoints") as checkpoints:
            return checkpoints.arrays(step), []
    except CheckpointError as error:
        return {}, [Difference(step, f"checkpoints/{step}", "", str(error), "")]


# --- The repetition


def _repeat(path: Path, ours: Path, config: RunConfig, span: Span, recorded: Facts) -> None:
    """Runs the steps of the span in the folder ``ours``, from what the run's own folder holds: the
    files that a run goes on from, and the replies of judges and teachers, so that no server is
    asked again.

    Args:
        recorded: the manifest, with this machine's names for the data.
    """
    resume = span.start is not None or (path / "judge").is_dir()
    config = replace(config, output_dir=str(ours), resume=resume)
    if resume:
        # --resume compares the other facts with this machine.
        facts = {key: recorded[key] for key in recorded if key not in (*MACHINE, "resumed")}
        copy_start(path, ours, config, span.start, facts)

    def is_over(step: int, *of_step: Any) -> object:
        return PAUSE if step >= span.stop else None

    with _stopped_alike(path):
        train(config, recorded["stage"], is_over)


def copy_start(path: Path, ours: Path, config: RunConfig, step: int | None, facts: Facts) -> None:
    """Makes the folder ``ours`` with what the run goes on from after a step, or from its seed: its
    checkpoints and rows, the replies of judges and teachers, and the given settings and manifest.

    A kill leaves it unused, or without a manifest if it comes while the names change.
    """
    names = ["judge"]
    if step is not None:
        saved = folder.steps(path / "checkpoints")
        names += [f"checkpoints/{number}" for number in saved if number <= step]
        names += keeping.ROWS
    ours.mkdir(parents=True, exist_ok=True)
    with unfinished_beside(ours / "copy", Path.mkdir) as new:
        for name in names:
            copy_files([path / name, *(path / name).rglob("*")], path, new)
        (new / "config.yaml").write_text(to_yaml(config), "utf-8")
        (new / "manifest.json").write_text(json.dumps(facts), "utf-8")
        # Folders first: they replace none that another process has made since.
        entries = sorted(new.iterdir(), key=lambda entry: entry.is_file())
        for entry in sorted(entries, key=lambda entry: entry.name == "manifest.json"):
            entry.rename(ours / entry.name)


def train(config: RunConfig, stage: str, on_step: Callable[..., object] | None = None) -> None:
    """Runs a stage by its name."""
    if (algorithm := find_algorithm(stage)) is not None:
        rl.run(config, algorithm, on_step=on_step)
    else:
        supervised.run(config, TASKS[stage], on_step)


@contextlib.contextmanager
def _stopped_alike(path: Path) -> Iterator[None]:
    """Goes on after an alert: the run was stopped at the same step, or rows differ. A signal, or a
    disk or server that fails, ends the comparison: the scratch folder cannot be resumed.
    """
    try:
        yield
    except AlertStop:
        pass
    except Stopped as stop:
        number = stop.exit_code - 128
        raise Stopped(
            f"{signal.Signals(number).name}: stopped before anything was compared; {path} is as it "
            "was. Start verify again",
            number,
        ) from None
    except ServiceError as error:  # without the advice to resume
        raise error.__cause__ or error from None


# --- The comparison


def compare(theirs: Path, ours: Path, span: Span) -> tuple[list[Difference], str]:
    """The differences, the earliest first, and a sentence about what was compared."""
    names = list(ROWS)
    differences = []
    for name in ROWS:  # the first row that differs, by the first value that does
        rows = zip_longest(
            _rows(theirs / name, span), _rows(ours / name, span), fillvalue=dict[str, str]()
        )
        for old, new in rows:
            found = _differences(int((old | new)["step"]), name, old, new)
            if found:
                differences.append(found[0])
                break
    repeated = folder.steps(ours / "checkpoints")
    for step in folder.steps(theirs / "checkpoints"):
        if step in repeated and span.has(step):
            names.append(f"checkpoints/{step}")
            arrays, found = _arrays(theirs, step)
            if not found:
                found = _differences(step, names[-1], arrays, _arrays(ours, step)[0])
            if len(found) > 1:
                place = f"{found[0].place} (first of {len(found)} arrays)"
                found = [found[0]._replace(place=place)]
            differences += found
    if span.stop == span.end and (theirs / "model").is_dir():
        names.append("model/")
        recorded = _results(theirs)
        written = _results(ours)
        for name in sorted(recorded.keys() | written.keys()):
            found = _differences(span.stop, name, recorded.get(name, {}), written.get(name, {}))
            differences += found
    differences.sort(key=lambda difference: difference.step or 0)
    begin = "the seed" if span.start is None else f"the checkpoint of step {span.start}"
    compared = f"repeated from {begin} to step {span.stop} of {span.end}: {', '.join(names)}"
    if span.drawn:
        compared = f"drawn {', '.join(map(str, span.drawn))}: {compared}"
    return differences, compared


def _rows(file: Path, span: Span) -> list[dict[str, str]]:
    """The rows of the steps that are repeated: their values as texts, and then their lines."""
    return [
        {key: str(value) for key, value in values.items()} | {WHOLE: line}
        for line, values in reading.json_lines(file)
        if span.has(values["step"])
    ]


def _results(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """The bytes of the files of ``model/``, and of the weights of ``adapter/``."""
    files = [*(path / "model").rglob("*"), *(path / "adapter").rglob("*.safetensors")]
    return {
        file.relative_to(path).as_posix(): {
            "bytes": np.frombuffer(read_file(file, most=None), np.uint8)
        }
        for file in files
        if file.is_file()
    }


def _differences(
    step: int, file: str, old: Mapping[str, Part], new: Mapping[str, Part]
) -> list[Difference]:
    """The places of a file whose contents differ: ``old`` and ``new`` are the contents by place."""
    differences = []
    for place in {**old, **new}:
        unequal = _unequal(old.get(place), new.get(place))
        if unequal is not None:
            index, before, now = unequal
            differences.append(Difference(step, file, place + index, before, now))
    return differences


def _unequal(old: Part, new: Part) -> tuple[str, str, str] | None:
    """What differs first: a number, a part of a text, or shape and dtype; None if nothing does."""
    if isinstance(old, str) and isinstance(new, str):
        place = len(os.path.commonprefix([old, new]))  # noqa: RUF071
        excerpt = slice(max(place - EXCERPT, 0), place + EXCERPT)
        return None if old == new else ("", old[excerpt], new[excerpt])
    before, now = (
        f"{part.dtype}{list(part.shape)}"
        if isinstance(part, np.ndarray)
        else (part or "not there")[:EXCERPT]
        for part in (old, new)
    )
    if not (isinstance(old, np.ndarray) and isinstance(new, np.ndarray)) or before != now:
        return "", before, now
    old_bytes = np.frombuffer(old.tobytes(), np.uint8)
    unequal = np.flatnonzero(old_bytes != np.frombuffer(new.tobytes(), np.uint8))
    if not unequal.size:
        return None
    index = np.unravel_index(unequal[0] // old.itemsize, old.shape)
    return f"[{', '.join(map(str, index))}]", str(old[index]), str(new[index])


def verify_run(
    run: tyro.conf.Positional[str],
    start: Annotated[int | None, tyro.conf.arg(name="from")] = None,
    steps: int | None = None,
    from_scratch: Annotated[bool, tyro.conf.arg(name="all")] = False,
    at_random: Annotated[bool, tyro.conf.arg(name="random")] = False,
    seed: int | None = None,
    data: tuple[str, ...] = (),
    model: str | None = None,
    reward: tuple[str, ...] = (),
    trust_config: bool = False,
) -> int:
    """Repeat a part of a run from its own checkpoint, and compare metrics, samples and state byte
    by byte.

    Writes nothing into the run's folder, which may be somebody else's. Exits with 1 if anything
    differs, after a table of what differs first.

    For example: rlhf-jax verify runs/ppo --random

    Args:
        run: the folder of a run of one stage.
        start: the step of a checkpoint to begin at; by default the last but one.
        steps: how many steps; by default all to the run's last one, with --random 3.
        from_scratch: begin at the seed; with --random, draw from all steps.
        at_random: repeat steps drawn at random, each from the nearest checkpoint before it.
        seed: of --random; by default a new one, which is printed.
        data: where the run's data files are here, if not where they were.
        model: where its --model is here.
        reward: where its --reward is here.
        trust_config: use the Python files, servers and places that its config names.
    """
    if seed is not None and not at_random:
        raise UserError("--seed is that of --random; the run's own seed is in its config")
    draw = (secrets.randbelow(2**32) if seed is None else seed) if at_random else None
    if at_random:
        show(f"steps drawn at random by --seed {draw}")
    audit = verify(
        run,
        start=start,
        num_steps=steps,
        from_scratch=from_scratch,
        draw=draw,
        data=data,
        model=model,
        reward=reward,
        trust_config=trust_config,
    )
    show(audit.compared)
    for sentence in audit.unsure:
        show(f"not sure to repeat: {sentence}")
    for sentence in audit.machine:
        show(f"this machine differs: {sentence}")
    if not audit.differences:
        show("the same bytes")
        return 0
    rows = [["" if step is None else str(step), *texts] for step, *texts in audit.differences]
    print_table(("step", "file", "where", "recorded", "repeated"), rows)
    return 1
