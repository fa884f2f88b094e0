"""The folder of a run: what lies where, and who may use it.

    with open_run("runs/ppo", resume=False, overwrite=False) as run:
        write_atomically(run.config, to_yaml(config))

``config.yaml`` is the resolved configuration, ``manifest.json`` what reproduces the run (seed,
versions, devices, data fingerprints, command). ``metrics.jsonl`` (equal for equal seeds) and
``timing.jsonl`` hold a row of numbers or seconds per step, ``samples.jsonl`` texts, each row a JSON
object on a line. ``checkpoints/`` is the loop's state, ``model/`` the result as a Hugging Face
folder, ``adapter/`` the LoRA adapters, which ``model/`` holds merged, and ``report.html`` the page.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import filelock

from rlhf_jax.errors import UserError, file_errors, logger
from rlhf_jax.runs import processes

_LOCK_FILES = (".lock", ".pid")


class Run(contextlib.AbstractContextManager["Run"]):
    """An open run folder; closing it, or the end of the process in any way, lets the next writer
    in.

    Its files and folders are attributes; ``resumed`` says whether there is a checkpoint to go on
    from.
    """

    def __init__(self, path: Path, resumed: bool, was_empty: bool, lock: filelock.BaseFileLock):
        self.path, self.resumed, self._was_empty, self._lock = path, resumed, was_empty, lock
        self.config, self.manifest, self.report = (
            path / "config.yaml",
            path / "manifest.json",
            path / "report.html",
        )
        self.metrics, self.timing, self.samples = (
            path / f"{name}.jsonl" for name in ("metrics", "timing", "samples")
        )
        self.checkpoints, self.model, self.adapter = (
            path / "checkpoints",
            path / "model",
            path / "adapter",
        )

    def close(self) -> None:
        """Releases the folder."""
        self._lock.release()

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # Nothing has been computed yet, and the corrected command needs a free folder.
        is_refused = (
            isinstance(error, UserError) and self._was_empty and not steps(self.checkpoints)
        )
        if is_refused and processes.is_first():
            _clear(self.path)
        self.close()


def open_run(path: str | Path, *, resume: bool = False, overwrite: bool = False) -> Run:
    """Takes a run folder for this process and makes it if it is missing.

    If a UserError leaves the ``with`` block of a new run before its first checkpoint, the folder is
    emptied again.

    Args:
      path: the folder. It counts as used as soon as it holds any file.
      resume: go on with the run in it. Without a complete checkpoint the run starts from the
        beginning, and says so.
      overwrite: delete the run in it. A folder without the manifest of a run is never deleted.

    Raises:
      UserError: the folder is used and neither ``resume`` nor ``overwrite`` is given; there is
        nothing to resume; the path is a file; another process (named by its PID) writes to the
        folder.
    """
    path = Path(path)
    lock = filelock.FileLock(path / ".lock")
    resumed, was_empty = processes.in_first(lambda: _take(path, lock, resume, overwrite))
    return Run(path, resumed, was_empty, lock)


def _take(
    path: Path, lock: filelock.BaseFileLock, resume: bool, overwrite: bool
) -> tuple[bool, bool]:
    """Whether there is a checkpoint to go on from, and whether the folder is empty."""
    check_usable(path, resume, overwrite)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        pid = (path / ".pid").read_text().strip() if (path / ".pid").is_file() else ""
        holder = f"the process with PID {pid}" if pid else "another process"
        raise UserError(
            f"{path} is in use by {holder}; wait for it or choose another --output-dir"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be used as a run folder: {error.strerror or error}"
        ) from None
    check_usable(path, resume, overwrite)  # another process may have come and gone in between
    (path / ".pid").write_text(f"{os.getpid()}\n")
    if overwrite:
        _clear(path)
    resumed = resume and bool(steps(path / "checkpoints"))
    if resume and not resumed:
        logger.info(
            f"--resume: {path} holds no complete checkpoint; the run starts from the beginning"
        )
    return resumed, is_unused(path)


def check_usable(path: Path, resume: bool, overwrite: bool) -> None:
    """Raises UserError if ``open_run`` would refuse the folder, whoever has it open."""
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
        hint = (
            "give --resume to go on with the run in it, --overwrite to delete it, or choose "
            "another --output-dir"
        )
        raise UserError(f"{path} holds files already; {hint}")
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        if "rlhf-jax" in json.loads((path / "manifest.json").read_text("utf-8"))["versions"]:
            return
    holds = f"it has no manifest.json of a run, but {', '.join(sorted(os.listdir(path))[:3])}"
    raise UserError(
        f"--overwrite: {path} does not look like a run folder ({holds}); nothing was deleted"
    )


def steps(directory: str | Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, oldest first; touches neither JAX nor the
    folder.
    """
    entries = Path(directory).iterdir() if Path(directory).is_dir() else ()
    return sorted(int(entry.name) for entry in entries if entry.name.isdecimal() and entry.is_dir())


def is_unused(path: Path) -> bool:
    """Whether a folder holds nothing, or only the lock of a run that ended before it wrote
    anything.
    """
    with file_errors(path):
        return set(os.listdir(path)) <= set(_LOCK_FILES)


def _clear(path: Path) -> None:
    entries = [entry for entry in path.iterdir() if entry.name not in _LOCK_FILES]
    # The manifest goes last: it is the proof that the rest may be deleted.
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


def json_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a JSON lines file of this package, and the rows they hold, each with its
    ``step``.

    Nothing if the file is missing. A last line that was cut by a kill is left out.

    Raises:
      UserError: another line is no row.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(
        path.read_bytes().splitlines(keepends=True) if path.exists() else [], 1
    ):
        try:
            row = json.loads(line.decode("utf-8"))
            int(row["step"])
        except (ValueError, TypeError, KeyError):
            if line.endswith(b"\n"):
                raise UserError(
                    f"{path}, line {number}: expected a JSON object with the key step"
                ) from None
            break
        rows.append((line.decode("utf-8").rstrip("\n"), row))
    return rows
