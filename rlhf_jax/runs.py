"""The folder of a run: who may use it, and what it says about itself.

    with open_run("runs/ppo", resume=False, overwrite=False) as run:
        write_config(run, to_yaml(config))
        write_manifest(run, seed=0, data_fingerprints={"pairs.json": fingerprint("pairs.json")})

``config.yaml`` is the resolved configuration, ``manifest.json`` what reproduces the run, ``metrics.jsonl``,
``timing.jsonl`` and ``samples.jsonl`` hold a JSON object per line, ``checkpoints/`` the loop's state, ``model/`` the
result as a Hugging Face folder, ``report.html`` the figures.
"""

import dataclasses
import difflib
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock
import jax
import yaml

from rlhf_jax import checkpoint, processes
from rlhf_jax.errors import UserError

_LOCK_FILES = (".lock", ".pid")
_RUN_FILES = (
    *("config.yaml", "manifest.json", "metrics.jsonl", "timing.jsonl", "samples.jsonl", "summary.json"),
    *("report.html", "checkpoints", "model", *_LOCK_FILES),
)
_PACKAGES = ("rlhf-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")


@dataclasses.dataclass(frozen=True)
class Run:
    """An opened run folder; closing it, or the end of the process in any way, lets the next writer in."""

    path: Path
    resumed: bool
    """Whether there is a checkpoint to go on from; if not, the run starts from the beginning."""
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
        """Folder for :class:`rlhf_jax.checkpoint.Checkpoints`."""
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
        self.close()


def open_run(path: str | Path, *, resume: bool = False, overwrite: bool = False) -> Run:
    """Takes a run folder for this process, making it where needed.

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
    return Run(path, processes.in_first(lambda: _take(path, lock, resume, overwrite)), lock)


def _take(path: Path, lock: filelock.BaseFileLock, resume: bool, overwrite: bool) -> bool:
    """Whether there is a checkpoint to go on from."""
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
        return resumed
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
    try:
        names = {entry.name.removesuffix(".tmp") for entry in path.iterdir()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if names <= set(_LOCK_FILES) or resume:
        return
    if not overwrite:
        raise UserError(
            f"{path} holds files already; give --resume to go on with the run in it, --overwrite to delete it, "
            "or choose another --output-dir"
        )
    if not names <= set(_RUN_FILES) and not _is_manifest(path / "manifest.json"):
        strange = ", ".join(sorted(names - set(_RUN_FILES))[:3])
        raise UserError(
            f"--overwrite: {path} does not look like a run folder (it holds {strange}); nothing was deleted"
        )


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


# --- What a run says about itself -----------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Writes a file whole or not at all, whatever happens meanwhile."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def fingerprint(path: str | Path) -> str:
    """sha256 of a file's bytes, or of the names and bytes of all files in a folder."""
    path = Path(path)
    try:
        if not path.is_dir():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file_path.relative_to(path).as_posix()}\0{fingerprint(file_path)}\n".encode())
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def write_config(run: Run, text: str) -> None:
    """Writes ``config.yaml``; ``text`` comes from ``flags.to_yaml``."""
    write_atomically(run.config, text)


def write_manifest(
    run: Run,
    *,
    seed: int,
    data_fingerprints: Mapping[str, str],
    command: Sequence[str] | None = None,
    extra: Mapping[str, Any] | None = None,
    changed: Sequence[str] = (),
) -> None:
    """Writes ``manifest.json``; a resumed run keeps its first one and adds this start to its list ``resumed``.

    Says so where a resumed run has other devices or versions than before, on which its bits depend.

    Args:
      run: the run.
      seed: root of the run's randomness.
      data_fingerprints: {file as the user named it: :func:`fingerprint`}.
      command: the command that reproduces the run; by default this process's own.
      extra: further JSON values, kept under their keys.
      changed: what differs from the run that is resumed; seed and fingerprints are then the new ones.
    """
    start: dict[str, Any] = {
        "command": shlex.join(command if command is not None else ["python", *sys.argv]),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "backend": jax.default_backend(),
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "git": _git_state(),
    }
    manifest = start | {"seed": seed, "data": dict(data_fingerprints)} | dict(extra or {})
    if run.resumed:
        manifest = _read_manifest(run)
        starts = manifest.get("resumed", [])
        before, after = (
            _dotted({key: here.get(key) for key in ("backend", "devices", "versions")})
            for here in ((starts or [manifest])[-1], start)
        )
        if differences := list(_differences(before, after).values()):
            print(
                f"--resume: {'; '.join(differences)}. The run goes on, but is no longer bit for bit what it would have "
                "been without the stop",
                flush=True,
            )
        if changed:
            manifest |= {"seed": seed, "data": dict(data_fingerprints)}
            start["changed"] = list(changed)
        manifest["resumed"] = [*starts, start]
    write_atomically(run.manifest, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def check_unchanged(
    run: Run,
    *,
    config: str,
    data_fingerprints: Mapping[str, str],
    may_change: Sequence[str] = (),
    allowed: Sequence[str] = (),
    fixed: Sequence[str] = (),
) -> list[str]:
    """Refuses to resume a run as something else, and says what differs and was allowed to.

    Args:
      run: a run with ``resumed`` set; for any other there is nothing to compare.
      config: the new configuration as ``flags.to_yaml`` writes it.
      data_fingerprints: those of the data as it is now.
      may_change: dotted keys, or sections, that may differ without a word.
      allowed: those that the user lets differ. ``data``, of any section, stands for the contents of all data files too,
        ``reward`` for those of the rewards.
      fixed: those that must not differ even so, since the state would be unreadable or its tokens mean something else.

    Returns:
      What differs and was allowed to, a sentence each.

    Raises:
      UserError: lists the keys with both values, and the data that differs; a key of ``allowed`` is no setting.
    """
    after = _dotted(yaml.safe_load(config))
    allowed = [key.replace("-", "_") for key in allowed]
    for key in allowed:
        if not any(_within(setting, [key]) for setting in after):
            near = difflib.get_close_matches(key, after, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--allow-changed {key}: there is no such setting{hint}")
    if not run.resumed:
        return []
    try:
        before = _dotted(yaml.safe_load(run.config.read_text("utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--resume: {run.config} cannot be read: {error}") from None
    found = [(key, text) for key, text in _differences(before, after).items() if not _within(key, may_change)]
    if any(key.rpartition(".")[2] in ("data", "validation_data") for key in allowed):
        allowed.append("data")
    data = _read_manifest(run).get("data", {})
    for name in [*data, *(name for name in data_fingerprints if name not in data)]:
        kind = name.split(" ")[0] if name in ("model", "tokenizer") or name.startswith("reward ") else "data"
        if name not in data_fingerprints:
            found.append((kind, f"the data {name} is not used any more"))
        elif name not in data:
            found.append((kind, f"the data {name} was not used before"))
        elif data[name] != data_fingerprints[name]:
            found.append((kind, f"the data {name} has changed"))
    problems = [text for key, text in found if _within(key, fixed) or not _within(key, allowed)]
    if problems:
        never = [key for key, _ in found if _within(key, fixed) and _within(key, allowed)]
        raise UserError(
            f"--resume: {run.path} is another run: {'; '.join(problems)}. Undo this, or start a new run with another "
            "--output-dir"
            + (
                f"; --allow-changed cannot help with {', '.join(never)}"
                if never
                else ", or name what may differ with --allow-changed"
            )
        )
    changed = [text for _, text in found]
    if changed:
        print(f"--resume: goes on as another run than it began: {'; '.join(changed)}", flush=True)
    return changed


def _within(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of the names or below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """{key: what it was and what it is now} of the keys whose values are not the same."""
    found = {}
    for key in [*before, *(key for key in after if key not in before)]:
        old, new = (repr(side[key]) if key in side else "not set" for side in (before, after))
        if old != new:
            found[key] = f"{key} was {old} and is now {new}"
    return found


def _dotted(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix[:-1]: value}
    return {key: inner for name, child in value.items() for key, inner in _dotted(child, f"{prefix}{name}.").items()}


def _read_manifest(run: Run) -> dict[str, Any]:
    try:
        return json.loads(run.manifest.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--resume: {run.manifest} cannot be read: {error}") from None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from, and whether its files differ from it; None outside of one."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)

    try:
        # An installed package may lie below another project's checkout, which does not track it.
        if git("ls-files", "--error-unmatch", Path(__file__).name).returncode:
            return None
        commit = git("rev-parse", "HEAD").stdout.strip()
        return {"commit": commit, "modified": git("diff", "--quiet", "HEAD").returncode != 0} if commit else None
    except (OSError, subprocess.TimeoutExpired):
        return None
