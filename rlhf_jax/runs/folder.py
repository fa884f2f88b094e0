"""The folder of a run: its files, and its lock.

    with open_run("runs/ppo", resume=False, overwrite=False) as run:
        writing.write_atomically(run.config, to_yaml(config))

- ``config.yaml``: the resolved configuration
- ``manifest.json``: what reproduces the run (seed, versions, devices, data fingerprints, command)
- ``metrics.jsonl``: a JSON object of numbers per step, equal for equal seeds
- ``timing.jsonl``: a JSON object of seconds per step
- ``samples.jsonl``: texts of the validations, or without any of training prompts
- ``checkpoints/``: the state of the loop
- ``model/``: the result as a Hugging Face folder, LoRA's adapters merged in
- ``adapter/``: LoRA's adapters
- ``judge/``: the replies of a judge (`graders.service`) and of a teacher's server
- ``engine/``: the samples of an engine (`training.engine`)
- ``report.html``: the page

Nothing is written through a symbolic link inside the folder. The folder itself, or a folder above
it, may be a link.
"""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from rlhf_jax.errors import UserError, file_errors, logger, read_file
from rlhf_jax.runs import processes
from rlhf_jax.runs.writing import delete, refuse_links, take_lock

_LOCK_FILES = (".lock", ".pid")  # the latter of runs of 0.3
# What a run, its report and its evaluation write.
_FILES = (
    "config.yaml",
    "manifest.json",
    "metrics.jsonl",
    "timing.jsonl",
    "samples.jsonl",
    "alerts.jsonl",
    "tracker.json",
    "report.html",
    "evaluation.json",
    "evaluation_samples.jsonl",
)
_FOLDERS = ("checkpoints", "model", "adapter", "tensorboard", "judge", "engine")
# What a killed run leaves: files that it wrote, and the weights that it gave to an engine.
_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.(unfinished|weights)")


class Run:
    """An open run folder: its files and folders. ``resumed`` says whether it has a checkpoint to
    continue from.
    """

    def __init__(self, path: Path, resumed: bool):
        self.path = path
        self.resumed = resumed
        self.config = path / "config.yaml"
        self.manifest = path / "manifest.json"
        self.report = path / "report.html"
        self.metrics = path / "metrics.jsonl"
        self.timing = path / "timing.jsonl"
        self.samples = path / "samples.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.adapter = path / "adapter"
        self.judge = path / "judge"
        self.engine = path / "engine"
        # For an engine, while the run is open.
        self.weights = path / f".{secrets.token_hex(8)}.weights"


@contextlib.contextmanager
def open_run(path: str | Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[Run]:
    """Takes a run folder for this process, and makes it if it is missing. No other process can open
    it before the ``with`` block or this process ends.

    If a UserError leaves the block of a new run before its first checkpoint, the folder is emptied
    again.

    Args:
      path: the folder. It counts as used as soon as it holds any file.
      resume: continue the run in it. Without a complete checkpoint the run starts from the
        beginning, and says so.
      overwrite: delete the run in it. A folder without the manifest of a run is never deleted.

    Raises:
      UserError: the folder is used and neither ``resume`` nor ``overwrite`` is given; there is
        nothing to resume; the path is a file; another process (named by its PID) writes to the
        folder; what would be written is a symbolic link.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        resumed, was_empty = processes.in_first(lambda: _take(path, resume, overwrite, stack))
        try:
            yield Run(path, resumed)
        except UserError:
            # Nothing has been computed yet, and the corrected command needs a free folder.
            if was_empty and not steps(path / "checkpoints") and processes.is_first():
                _clear(path)
            raise


def _take(
    path: Path, resume: bool, overwrite: bool, stack: contextlib.ExitStack
) -> tuple[bool, bool]:
    """Takes the folder until the stack closes. Is there a checkpoint, and is the folder empty?"""
    check_usable(path, resume=resume, overwrite=overwrite)
    try:
        path.mkdir(parents=True, exist_ok=True)
        advice = "wait for it or choose another --output-dir"
        stack.callback(take_lock(path / ".lock", f"{path} is in use", advice))
    except OSError as error:
        raise UserError(f"{path}: cannot be used as a run folder: {error.strerror}") from None
    # Another process may have used it in between.
    check_usable(path, resume=resume, overwrite=overwrite)
    if overwrite:
        _clear(path)
    check_links(path)
    for entry in path.iterdir():
        if _UNFINISHED.fullmatch(entry.name):  # of a process that was killed while it wrote
            delete(entry)
    resumed = resume and bool(steps(path / "checkpoints"))
    if resume and not resumed:
        logger.info(
            f"--resume: {path} holds no complete checkpoint; the run starts from the beginning"
        )
    return resumed, is_unused(path)


def check_links(path: Path) -> None:
    """Raises UserError if a symbolic link in the folder would make the run write elsewhere, or a
    pipe would make it wait.
    """
    refuse_links(path / name for name in (*_FILES, *_FOLDERS))
    for folder in _FOLDERS:
        check_ordinary(path / folder)


def check_ordinary(folder: Path) -> None:
    """Raises UserError if anything in the folder is neither a file nor a folder, such as a pipe, or
    is a symbolic link.
    """
    for place, folders, files in os.walk(folder):
        refuse_links(Path(place, name) for name in (*folders, *files))
        for name in files:
            if not Path(place, name).is_file():
                raise UserError(f"{Path(place, name)}: is no file; delete it")


def check_usable(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises UserError if ``open_run`` would refuse the folder, even if no process has it open."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; --output-dir needs a folder")
    if resume and not path.is_dir():
        raise UserError(
            f"--resume: {path} does not exist; leave out --resume to start a new run there"
        )
    if resume or not path.is_dir() or is_unused(path):
        return
    if not overwrite:
        raise UserError(
            f"{path} holds files already; give --resume to continue the run in it, --overwrite to "
            "delete it, or choose another --output-dir"
        )
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        if "rlhf-jax" in json.loads(read_file(path / "manifest.json"))["versions"]:
            return
    raise UserError(
        f"--overwrite: {path} does not look like a run folder (it has no manifest.json of a run, "
        f"but {', '.join(sorted(os.listdir(path))[:3])}); nothing was deleted"
    )


def steps(directory: str | Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, oldest first; empty if it is missing."""
    folders = Path(directory).glob("*/")
    return sorted(
        int(folder.name) for folder in folders if re.fullmatch("0|[1-9][0-9]{0,17}", folder.name)
    )


def is_unused(path: Path) -> bool:
    """Whether a folder is empty, or has only the lock of a run that ended without writing."""
    with file_errors(path):
        names = os.listdir(path)
    return all(name in _LOCK_FILES or _UNFINISHED.fullmatch(name) for name in names)


def _clear(path: Path) -> None:
    entries = [entry for entry in path.iterdir() if entry.name not in _LOCK_FILES]
    # The manifest goes last: it is the proof that the rest may be deleted.
    for entry in sorted(entries, key=lambda entry: entry.name == "manifest.json"):
        delete(entry)
