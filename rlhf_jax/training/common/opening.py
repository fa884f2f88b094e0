"""The folder of a run: taken, its settings and manifest written or compared with those of the run
to resume.
"""

import contextlib
import dataclasses
import errno
import math
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from jax import Array

from rlhf_jax.config import RunConfig, model_source, to_dict
from rlhf_jax.config.yaml_files import dotted_keys, dumped
from rlhf_jax.errors import TrainingFault, UserError, disk_fault, logger
from rlhf_jax.parallel import sharding
from rlhf_jax.runs import folder, keeping, manifest, objects, processes, reading, writing
from rlhf_jax.training.common import initial, memory, rates
from rlhf_jax.training.common.layout import Layout, layout_of
from rlhf_jax.types import AlgorithmConfig

SEEN_SECONDS = 30  # under NFS a host may see another one's file so late
Stream = Literal["init", "data", "rollout", "update", "eval", "choice"]

# A resumed run may change these settings and stays the same run.
MAY_CHANGE = (
    "resume",
    "overwrite",
    "allow_changed",
    "output_dir",
    "device",
    "processes",
    "mesh",
    "compute.offload",
    "track",
    "keep_last",
    "checkpoint_interval",
    "checkpoint_async",
    "engine",
)
# --allow-changed cannot change these: the checkpoint would not fit, or its token ids would mean
# other texts.
FIXED = (
    "model",
    "network",
    "lora",
    "tokenizer",
    "reward_model.ensemble_size",
    *(f"{name}.optimizer.frozen" for name in ("sft", "reward_model", "dpo", "kto", "rl")),
)


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run whose folder is open."""

    name: str  # of its stage or algorithm
    folder: folder.Run
    config: RunConfig  # its settings, as they are recorded
    layout: Layout
    held: dict[str, Any] = dataclasses.field(default_factory=dict)
    """{name: pytree of shapes} of the arrays on the devices, for the message when memory runs out;
    see ``hold``.
    """

    def key(self, stream: Stream) -> Array:
        """The key of one of the run's random streams."""
        return stream_key(self.config.seed, self.name, stream)

    def hold(self, trees: Mapping[str, Any]) -> None:
        """Records the shapes of arrays on the devices, by name."""
        self.held.update({name: memory.shapes(tree) for name, tree in trees.items()})

    def change(self, **sections: Any) -> "OpenRun":
        """The run with these sections of its settings."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **sections))

    def count_rows(self, rows: reading.RowCounts) -> None:
        """Writes to manifest.json what became of the rows of the data."""
        processes.in_first(lambda: manifest.add_facts(self.folder, {"rows": rows}))

    def decide(self, **sections: Any) -> "OpenRun":
        """The run with these sections, whose settings were auto; it writes them to config.yaml."""
        run = self.change(**sections)

        def write() -> None:
            writing.write_atomically(run.folder.config, _settings_text(run.config))
            keeping.keep_start(run.folder)

        processes.in_first(write)
        return run


def stream_key(seed: int, name: str, stream: Stream) -> Array:
    """The key of a random stream: the root key, folded with the names of the run and the stream."""
    root = jax.jit(jax.random.key, static_argnums=0)(seed)
    of_run = jax.random.fold_in(root, zlib.crc32(name.encode()))
    return jax.random.fold_in(of_run, zlib.crc32(stream.encode()))


def run_folder(config: RunConfig, name: str) -> Path:
    """The folder of a run."""
    return Path(config.output_dir or f"runs/{name}")


@contextlib.contextmanager
def open_run(
    config: RunConfig,
    name: str,
    fingerprints: Mapping[str, str],
    sizes: Mapping[str, int] = {},
    files: Mapping[str, Path] = {},
    given: Mapping[str, Any] = {},
) -> Iterator[OpenRun]:
    """Takes the run folder and writes config and manifest into it (or compares them on resume).

    Args:
        fingerprints: of the data.
        sizes: {dotted setting: value} of the settings that help when memory runs out, such as
            {"sft.batch_size": 32}.
        files: {name: path} of the other files that the run reads, beside ``config.model`` and the
            tokenizer.
        given: {name: function, object or module} that Python gives to the run, such as "reward"
            and "optimizer", or None. See ``runs.objects``.

    Raises:
        UserError: the folder is used or locked, the run to resume is another one, or processes
            have other settings, files, versions or run folders.
        TrainingFault: the disk or the device's memory is full, now or at any time while the run
            is open.
    """
    path = run_folder(config, name)
    how = {"resume": config.resume, "overwrite": config.overwrite}
    processes.in_first(lambda: folder.check_usable(path, **how))  # before large models are read
    data = {**fingerprints, **fingerprints_of(config, files)}
    python = {key: objects.describe(value) for key, value in given.items() if value is not None}
    _compare(name, config, data, python)
    with folder.open_run(path, **how) as opened:
        if opened.resumed:
            processes.in_first(lambda: keeping.restore_start(opened))
        config = _decided(config, name, opened)
        run = OpenRun(name, opened, config, layout_of(config))
        with _explained(run, sizes):
            written = processes.in_first(lambda: _describe(run, data, python))
            processes.agree(lambda: _see(run.folder, written))
        mesh = run.layout.mesh
        in_mesh = jax.set_mesh(mesh) if sharding.is_set(mesh) else contextlib.nullcontext()
        full = jax.default_matmul_precision("highest")
        precise = full if config.deterministic else contextlib.nullcontext()
        with _explained(run, sizes), in_mesh, precise:
            yield run


@contextlib.contextmanager
def _explained(run: OpenRun, sizes: Mapping[str, int]) -> Iterator[None]:
    """Turns errors of a full disk, of full memory and of a lost process into TrainingFaults."""
    try:
        yield
    except OSError as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = (
            "the disk is full; make room" if is_full else "the disk cannot be used; repair this"
        )
        raise TrainingFault(
            f"{run.folder.path}: {advice}, then go on with --resume ({fault})"
        ) from error
    except (jax.errors.JaxRuntimeError, ValueError, MemoryError, memory.TooLarge) as error:
        if processes.is_lost(error):
            raise TrainingFault(f"{run.name}: {processes.LOST}") from error
        # XLA raises a ValueError if memory runs out while arrays are placed on a GPU.
        is_full = isinstance(error, MemoryError | memory.TooLarge)
        is_full = is_full or "RESOURCE_EXHAUSTED" in str(error)
        if not is_full:
            raise
        switches = {
            "lora.rank": run.config.lora.rank,
            "compute.remat": int(run.config.compute.remat is True),
        }
        off = {setting: value for setting, value in switches.items() if not value}
        raise memory.fault(run.name, run.held, {**sizes, **off}, error) from error


def _decided(config: RunConfig, name: str, run: folder.Run) -> RunConfig:
    """The settings without auto. A resumed run gets the recorded values, so that it continues in
    the same way on any machine and at the same rate; a new run gets ``compute.scan_layers`` by
    depth.
    """
    compute = config.compute
    if run.resumed:
        recorded: Mapping[str, Any] = {}
        with contextlib.suppress(UserError):  # check_unchanged reports what is wrong
            recorded = reading.read_yaml(run.config, reading.Settings)
        for key in ("scan_layers", "remat", "share_prompts"):
            value = recorded.get("compute", {}).get(key)
            if getattr(compute, key) == "auto" and isinstance(value, bool):
                changes: dict[str, Any] = {key: value}
                compute = dataclasses.replace(compute, **changes)
        section = name if name in rates.POWERS else "rl"
        stage = getattr(config, section)
        if stage.optimizer.learning_rate is None:
            rate = recorded.get(section, {}).get("optimizer", {}).get("learning_rate")
            if rate is not None and math.isfinite(rate) and rate >= 0:
                adam = dataclasses.replace(stage.optimizer, learning_rate=rate)
                changes = {section: dataclasses.replace(stage, optimizer=adam)}
                config = dataclasses.replace(config, **changes)
    if compute.scan_layers == "auto":
        compute = initial.by_depth(compute, initial.num_layers(model_source(config)))
    return dataclasses.replace(config, compute=compute)


def fingerprints_of(config: RunConfig, files: Mapping[str, Path]) -> dict[str, str]:
    """The sha256 of the model, the tokenizer and other ``files`` that a stage reads, by name."""
    models_read = {"model": config.model, "tokenizer": config.tokenizer.name}
    folders = {
        key: Path(source) for key, source in models_read.items() if source and Path(source).is_dir()
    }
    sources = {**files, **folders}
    return {key: manifest.fingerprint(path) for key, path in sources.items()}


def _compare(name: str, config: RunConfig, data: Mapping[str, str], python: reading.Row) -> None:
    """Raises UserError in every process of a run unless all would do the same."""
    facts = {"stage": name, "given": python, **to_dict(config), **manifest.machine({})}
    facts["sha256"] = {key: digest[:12] for key, digest in data.items()}
    facts["devices of a process"] = jax.local_device_count()
    # Hosts may have others; the fingerprint tells folders of models apart, but not names.
    for key in ("output_dir", "processes", "cpu", "threads", *(data.keys() & {"model"})):
        del facts[key]
    found = processes.gather(lambda: facts)
    known = next((of["git"] for of in found if of["git"]), None)  # a host may lack git
    first, *others = [of | {"git": of["git"] or known} for of in found]
    differ = [
        f"{key} is {value} in process 0 and {of_other} in process {number}"
        for number, other in enumerate(others, start=1)
        for key, (value, of_other) in manifest.unequal(first, other).items()
    ]
    if differ:
        raise UserError(f"processes of one run differ; start all alike: {'; '.join(differ[:20])}")


def _see(run: folder.Run, written: str) -> None:
    """Raises UserError unless this process sees the manifest that the first one has written."""
    end = time.monotonic() + SEEN_SECONDS
    while not run.manifest.is_file() or manifest.fingerprint(run.manifest) != written:
        if time.monotonic() > end:
            raise UserError(f"{run.path}: all need to see the run folder of the first process")
        time.sleep(0.1)


def _describe(run: OpenRun, data: Mapping[str, str], python: reading.Row) -> str:
    """Writes the run's settings, files and given objects, or compares them with those of the run to
    resume. Returns the manifest's fingerprint.
    """
    config = run.config
    text = _settings_text(config)
    if run.folder.resumed:
        known = dotted_keys(type(config))
        fields = set(known) - {key.rpartition(".")[0] for key in known}
        recorded = manifest.dotted(reading.read_yaml(run.folder.config, reading.Settings))
        tops = {key: key.partition(".")[0] for key in recorded}
        # Other keys at the top are those of a script; other sections those of one's own algorithms.
        ours = [key for key, top in tops.items() if top in known or top != key]
        gone = [key for key in ours if not manifest.within(key, [*fields, *config.own])]
        if gone:
            names = ", ".join(gone[:3]) + " and others" * (len(gone) > 3)
            path = run.folder.path
            raise UserError(
                f"--resume: {path} is a run of {reading.revision(path)}, with settings that are "
                f"none here: {names}. Go on with that version, or start a new run with another "
                "--output-dir"
            )
    unknown = [
        f"{key} ({value.removeprefix(objects.UNKNOWN).removeprefix(': ')})"
        for key, value in manifest.dotted(python).items()
        if isinstance(value, str) and value.startswith(objects.UNKNOWN)
    ]
    if unknown:
        logger.info(
            f"manifest.json: {', '.join(unknown)} cannot be fingerprinted; --resume does not "
            "notice if it changes"
        )
    changed = manifest.check_unchanged(
        run.folder,
        config=text,
        data=data,
        given=python,
        may_change=MAY_CHANGE,
        allowed=config.allow_changed,
        fixed=fixed(config),
    )
    facts = {"seed": config.seed, "data": data, "stage": run.name}
    if config.compute.blocks:
        facts["moves"] = manifest.EXACT
    if python:
        facts["given"] = python
    mesh = dict(run.layout.mesh.shape)
    manifest.write_manifest(run.folder, facts, changed=changed, mesh=mesh)
    if changed or not run.folder.resumed:
        writing.write_atomically(run.folder.config, text)
    keeping.keep_start(run.folder)
    return manifest.fingerprint(run.folder.manifest)


def _settings_text(config: RunConfig) -> str:
    """The text of config.yaml: the settings of a run, without what says how it was started."""
    started = {"resume": False, "overwrite": False, "allow_changed": (), "processes": None}
    return dumped({**to_dict(config), **started})


def fixed(config: RunConfig) -> list[str]:
    """The settings that --allow-changed cannot change in this run."""
    keys = [*FIXED]
    if config.model is None and config.tokenizer.name is None:
        keys.append("data")  # the run's tokenizer was trained on it
    for name, section in {**vars(config), **config.own}.items():
        if name in config.own or isinstance(section, AlgorithmConfig):
            keys += [f"{name}.value", f"{name}.value_from"]
    return keys
