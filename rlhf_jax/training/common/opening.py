"""The folder of a stage: taken, its settings and manifest written or compared with those of the run
to resume.
"""

import contextlib
import dataclasses
import errno
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax.config import RunConfig, model_source
from rlhf_jax.errors import TrainingFault, UserError, disk_fault, logger
from rlhf_jax.parallel import sharding
from rlhf_jax.runs import folder, keeping, manifest, objects, processes, reading, writing
from rlhf_jax.training.common import initial, layout, memory
from rlhf_jax.training.common.stage import Keeping, Stage, settings_text
from rlhf_jax.types import AlgorithmConfig

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


def run_folder(config: RunConfig, name: str) -> Path:
    """The folder of a stage's run."""
    return Path(config.output_dir or f"runs/{name}")


@contextlib.contextmanager
def open_stage(
    config: RunConfig,
    name: str,
    fingerprints: Mapping[str, str],
    sizes: Mapping[str, int] = {},
    files: Mapping[str, Path] = {},
    given: Mapping[str, Any] = {},
) -> Iterator[Stage]:
    """Takes the run folder and writes config and manifest into it (or compares them on resume).

    Args:
        fingerprints: of the data.
        sizes: {dotted setting: value} of the settings that help when memory runs out, such as
            {"sft.batch_size": 32}.
        files: {name: path} of the other files that the stage reads, beside ``config.model`` and the
            tokenizer.
        given: {name: function, object or module} that Python gives to the stage, such as "reward"
            and "optimizer", or None. See ``runs.objects``.

    Raises:
        UserError: the folder is used or locked, or the run to resume is another one.
        TrainingFault: the disk or the device's memory is full, now or at any time while the stage
            is open.
    """
    path = run_folder(config, name)
    with folder.open_run(path, resume=config.resume, overwrite=config.overwrite) as run:
        if run.resumed:
            processes.in_first(lambda: keeping.restore_start(run))
        config = _decided(config, run)
        stage = stage_of(config, name, run)
        with _explained(stage, sizes):
            processes.in_first(lambda: _describe(config, stage, fingerprints, files, given))
        is_set = sharding.is_set(stage.mesh)
        mesh = jax.set_mesh(stage.mesh) if is_set else contextlib.nullcontext()
        precision = stage.compute.matmul_precision
        precise = jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()
        with _explained(stage, sizes), mesh, precise:
            yield stage


def stage_of(config: RunConfig, name: str, run: folder.Run, mesh: Mesh | None = None) -> Stage:
    """The stage of a folder that is open.

    mesh: of the devices; None: of all that there are, as the settings say.
    """
    kept = {key: getattr(config, key) for key in Keeping._fields}
    return Stage(
        name,
        run,
        mesh or layout.mesh_of(config.mesh),
        config.compute,
        config.lora,
        Keeping(**kept),
        layout.sampling_mesh(config.mesh),
        dataclasses.asdict(config),
    )


@contextlib.contextmanager
def _explained(stage: Stage, sizes: Mapping[str, int]) -> Iterator[None]:
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
            f"{stage.run.path}: {advice}, then go on with --resume ({fault})"
        ) from error
    except (jax.errors.JaxRuntimeError, ValueError, MemoryError, memory.TooLarge) as error:
        if processes.is_lost(error):
            raise TrainingFault(
                f"{stage.name}: another process has gone; start all of them again, --resume"
            ) from error
        # XLA raises a ValueError if memory runs out while arrays are placed on a GPU.
        is_full = isinstance(error, MemoryError | memory.TooLarge)
        is_full = is_full or "RESOURCE_EXHAUSTED" in str(error)
        if not is_full:
            raise
        switches = {
            "lora.rank": stage.lora.rank,
            "compute.remat": int(stage.compute.remat is True),
        }
        off = {setting: value for setting, value in switches.items() if not value}
        raise memory.fault(stage.name, stage.held, {**sizes, **off}, error) from error


def _decided(config: RunConfig, run: folder.Run) -> RunConfig:
    """The settings without auto. A resumed run gets the recorded values, so that it continues in
    the same way on any machine; a new run gets ``compute.scan_layers`` by depth. The matrix
    products of a deterministic run are in full precision unless ``compute.matmul_precision`` is
    set.
    """
    compute = config.compute
    if run.resumed:
        recorded = {}
        with contextlib.suppress(UserError):  # check_unchanged reports what is wrong
            recorded = reading.read_yaml(run.config, reading.SETTINGS).get("compute", {})
        for key in ("scan_layers", "remat", "share_prompts"):
            value = recorded.get(key)
            if getattr(compute, key) == "auto" and isinstance(value, bool):
                changes: dict[str, Any] = {key: value}
                compute = dataclasses.replace(compute, **changes)
    if compute.scan_layers == "auto":
        compute = initial.by_depth(compute, initial.num_layers(model_source(config)))
    if config.deterministic and compute.matmul_precision is None:
        compute = dataclasses.replace(compute, matmul_precision="highest")
    return dataclasses.replace(config, compute=compute)


def fingerprints_of(config: RunConfig, files: Mapping[str, Path]) -> dict[str, str]:
    """The sha256 of the model, the tokenizer and other ``files`` that a stage reads, by name."""
    models_read = {"model": config.model, "tokenizer": config.tokenizer.name}
    folders = {
        key: Path(source) for key, source in models_read.items() if source and Path(source).is_dir()
    }
    sources = {**files, **folders}
    return {key: manifest.fingerprint(path) for key, path in sources.items()}


def _describe(
    config: RunConfig,
    stage: Stage,
    fingerprints: Mapping[str, str],
    files: Mapping[str, Path],
    given: Mapping[str, Any],
) -> None:
    """Writes the run's settings, files and given objects, or compares them with those of the run to
    resume.
    """
    run = stage.run
    text = settings_text(stage.settings)
    data = {**fingerprints, **fingerprints_of(config, files)}
    python = {key: objects.describe(value) for key, value in given.items() if value is not None}
    _report_unknown(python)
    changed = manifest.check_unchanged(
        run,
        config=text,
        data=data,
        given=python,
        may_change=MAY_CHANGE,
        allowed=config.allow_changed,
        fixed=_fixed(config),
    )
    facts = {"seed": config.seed, "data": data, "stage": stage.name}
    if config.compute.blocks:
        facts["moves"] = manifest.EXACT
    if python:
        facts["given"] = python
    manifest.write_manifest(run, facts, changed=changed, mesh=dict(stage.mesh.shape))
    if changed or not run.resumed:
        writing.write_atomically(run.config, text)
    keeping.keep_start(run)


def _fixed(config: RunConfig) -> list[str]:
    """The settings that --allow-changed cannot change in this run."""
    fixed = [*FIXED]
    if config.model is None and config.tokenizer.name is None:
        fixed.append("data")  # the run's tokenizer was trained on it
    for name, section in vars(config).items():
        if isinstance(section, AlgorithmConfig):
            fixed += [f"{name}.value", f"{name}.value_from"]
    return fixed


def _report_unknown(python: dict[str, Any]) -> None:
    """Names the given objects that cannot be fingerprinted."""
    for name, description in python.items():
        parts = manifest.dotted({name: description})
        unknown = [
            f"{key} ({value.removeprefix(objects.UNKNOWN).removeprefix(': ')})"
            for key, value in parts.items()
            if isinstance(value, str) and value.startswith(objects.UNKNOWN)
        ]
        if unknown:
            logger.info(
                f"manifest.json: {', '.join(unknown)} cannot be fingerprinted; --resume does not "
                "notice if it changes"
            )
