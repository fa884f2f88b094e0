"""The folder of a run: what lies where, and who may use it.

    with open_run("runs/ppo", resume=False, overwrite=False) as run:
        manifest.write_config(run, to_yaml(config))

``config.yaml`` is the resolved configuration, ``manifest.json`` what reproduces the run, ``metrics.jsonl``,
``timing.jsonl`` and ``samples.jsonl`` hold a JSON object per line, ``checkpoints/`` the loop's state, ``model/`` the
result as a Hugging Face folder, ``report.html`` the figures.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import TracebackType

import filelock

from rlhf_jax.errors import UserError
from rlhf_jax.runs import checkpoint, processes

_LOCK_FILES = (".lock", ".pid")
_RUN_FILES = (
    *("config.yaml", "manifest.json", "metrics.jsonl", "timing.jsonl", "samples.jsonl", "alerts.jsonl"),
    *("summary.json", "report.html", "checkpoints", "model", "adapter", "tracker.json", "tensorboard"),
    *("evaluation.json", "evaluation_samples.jsonl", *_LOCK_FILES),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """An opened run folder; closing it, or the end of the process in any way, lets the next writer in."""

    path: Path
    resumed: bool
    """Whether there is a checkpoint to go on from; if not, the run starts from the beginning."""
    _was_empty: bool
    _lock: filelock.BaseFileLock

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """Seed, versions, devices, data fingerprints, command."""
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        """A row of numbers per step; equal for equal seeds."""
        return self.path / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        """A row of seconds per step."""
        return self.path / "timing.jsonl"

    @property
    def samples(self) -> Path:
        """Texts, one row each."""
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder for :class:`rlhf_jax.runs.checkpoint.Checkpoints`."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """Folder of the trained model."""
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """Folder of the LoRA adapters that ``model`` holds merged."""
        return self.path / "adapter"

    @property
    def report(self) -> Path:
        """The run as a page."""
        return self.path / "report.html"

    def close(self) -> None:
        """Releases the folder."""
        self._lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Nothing was computed that anybody could want back, and the mended command is to find a free folder.
        is_refused = isinstance(error, UserError) and self._was_empty and not checkpoint.steps(self.checkpoints)
        if is_refused and processes.is_first():
            _clear(self.path)
        self.close()


def open_run(path: str | Path, *, resume: bool = False, overwrite: bool = False) -> Run:
    """Takes a run folder for this process, making it where needed.

    Where a UserError leaves the ``with`` block of a new run before its first checkpoint, the folder is emptied again.

    Args:
      path: the folder. It is used as soon as it holds any file.
      resume: go on with the run in it. Without a complete checkpoint the run starts from the beginning, and says so.
      overwrite: delete the run in it. Only what looks like a run is ever deleted.

    Raises:
      UserError: the folder is used and neither ``resume`` nor ``overwrite`` is given; nothing is there to resume; the
        path is a file; another process (named by its PID) writes to the folder.
    """
    path = Path(path)
    lock = filelock.FileLock(path / ".lock")
    resumed, was_empty = processes.in_first(lambda: _take(path, lock, resume, overwrite))
    return Run(path, resumed, was_empty, lock)


def _take(path: Path, lock: filelock.BaseFileLock, resume: bool, overwrite: bool) -> tuple[bool, bool]:
    """Whether there is a checkpoint to go on from, and whether the folder is empty."""
    _check(path, resume, overwrite)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{path} is in use by {_holder(path)}; wait for it or choose another --output-dir") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be used as a run folder: {error.strerror or error}") from None
    try:
        _check(path, resume, overwrite)  # another process may have come and gone in between
        (path / ".pid").write_text(f"{os.getpid()}\n")
        if overwrite:
            _clear(path)
        resumed = False
        if resume:
            resumed = bool(checkpoint.steps(path / "checkpoints"))
            if not resumed:
                print(f"--resume: {path} holds no complete checkpoint; the run starts from the beginning")
        return resumed, is_unused(path)
    except BaseException:
        lock.release()
        raise


def _holder(path: Path) -> str:
    try:
        return f"the process with PID {int((path / '.pid').read_text())}"
    except (OSError, ValueError):
        return "another process"


def _check(path: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; --output-dir needs a folder")
    if not path.is_dir():
        if resume:
            raise UserError(f"--resume: {path} does not exist; leave out --resume to start a new run there")
        return
    if is_unused(path) or resume:
        return
    if not overwrite:
        raise UserError(
            f"{path} holds files already; give --resume to go on with the run in it, --overwrite to delete it, "
            "or choose another --output-dir"
        )
    names = {entry.name.removesuffix(".tmp") for entry in path.iterdir()}
    if not names <= set(_RUN_FILES) and not _is_manifest(path / "manifest.json"):
        strange = ", ".join(sorted(names - set(_RUN_FILES))[:3])
        raise UserError(
            f"--overwrite: {path} does not look like a run folder (it holds {strange}); nothing was deleted"
        )


def is_unused(path: Path) -> bool:
    """Whether a folder holds nothing, or only what marked a run that ended before it wrote anything.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return {entry.name for entry in path.iterdir()} <= set(_LOCK_FILES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _is_manifest(path: Path) -> bool:
    try:
        return "rlhf-jax" in json.loads(path.read_text("utf-8"))["versions"]
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _clear(path: Path) -> None:
    entries = [entry for entry in path.iterdir() if entry.name not in _LOCK_FILES]
    # The manifest is what proves that the rest may be deleted, so it goes last.
    for entry in sorted(entries, key=lambda entry: entry.name == "manifest.json"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Writes a file whole or not at all, whatever happens meanwhile."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
