"""What describes a run, in ``config.yaml`` and ``manifest.json``, and whether a resumed run is still the same one.

    with open_run("runs/ppo", resume=False, overwrite=False) as run:
        write_config(run, to_yaml(config))
        write_manifest(run, seed=0, data_fingerprints={"pairs.json": fingerprint("pairs.json")})

Both are written whole or not at all.
"""

import difflib
import hashlib
import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import yaml

from rlhf_jax.errors import UserError
from rlhf_jax.runs.folder import Run, write_atomically

_PACKAGES = ("rlhf-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")


def fingerprint(path: str | Path) -> str:
    """sha256 of a file's bytes, or of the names and bytes of all files in a folder."""
    path = Path(path)
    try:
        if not path.is_dir():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    digest = hashlib.sha256()
    for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file_path.relative_to(path).as_posix()}\0{fingerprint(file_path)}\n".encode())
    return digest.hexdigest()


def write_config(run: Run, text: str) -> None:
    """Writes ``config.yaml``; ``text`` comes from ``config.to_yaml``."""
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

    Prints a line if a resumed run has other devices or versions than before, because its bits depend on them.

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
    new = {"seed": seed, "data": dict(data_fingerprints)}
    manifest = start | new | dict(extra or {})
    if run.resumed:
        manifest = _read(run.manifest, json.loads)
        starts = manifest.get("resumed", [])
        before, after = (
            _dotted({key: there.get(key) for key in ("backend", "devices", "versions")})
            for there in ((starts or [manifest])[-1], start)
        )
        if differences := _differences(before, after).values():
            print(
                f"--resume: {'; '.join(differences)}. The run goes on, but is no longer bit for bit what it would have "
                "been without the stop",
                flush=True,
            )
        if changed:
            manifest |= new
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
    """Refuses to resume a run as another one; returns the differences that were allowed, a sentence each.

    Args:
      run: only a run with ``resumed`` set is compared with anything.
      config: the new configuration as ``config.to_yaml`` writes it.
      data_fingerprints: those of the data as it is now.
      may_change: dotted keys, or sections, whose differences do not count.
      allowed: keys or sections that the user lets differ. ``data``, of any section, also stands for the contents of all
        data files, ``reward`` and ``safety`` for those of the rewards and of the filter.
      fixed: those that must not differ even so: the state could not be read, or its tokens would mean something else.

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
    before = _dotted(_read(run.config, yaml.safe_load))
    differences = [(key, text) for key, text in _differences(before, after).items() if not _within(key, may_change)]
    differences += _data_differences(_read(run.manifest, json.loads).get("data", {}), data_fingerprints)
    if any(key.rpartition(".")[2] in ("data", "validation_data") for key in allowed):
        allowed.append("data")
    never = [key for key, _ in differences if _within(key, fixed) and _within(key, allowed)]
    problems = [text for key, text in differences if _within(key, fixed) or not _within(key, allowed)]
    if problems:
        hint = f"cannot help with {', '.join(never)}" if never else "lets those differ that you name"
        raise UserError(
            f"--resume: {run.path} is another run: {'; '.join(problems)}. Undo this, or start a new run with another "
            f"--output-dir; --allow-changed {hint}"
        )
    changed = [text for _, text in differences]
    if changed:
        print(f"--resume: goes on as another run than it began: {'; '.join(changed)}", flush=True)
    return changed


def _data_differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[tuple[str, str]]:
    """(``data``, or the setting that names the file; the difference) of each file that differs."""
    differences = []
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            setting = re.match(r"(model|tokenizer)$|(reward|safety) ", name)
            how = "has changed" if name in before else "was not used before"
            how = how if name in after else "is not used any more"
            differences.append((setting[0].strip() if setting else "data", f"the data {name} {how}"))
    return differences


def _within(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of the names or below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """{key: what it was and what it is now} of the keys whose values differ."""
    texts = {}
    for key in dict.fromkeys([*before, *after]):
        old, new = (repr(values[key]) if key in values else "not set" for values in (before, after))
        if old != new:
            texts[key] = f"{key} was {old} and is now {new}"
    return texts


def _dotted(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix[:-1]: value}
    return {key: inner for name, child in value.items() for key, inner in _dotted(child, f"{prefix}{name}.").items()}


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--resume: {path} cannot be read: {error}") from None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from, and whether its files differ from it; None without one."""
    here = Path(__file__)

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)

    try:
        # An installed package may lie inside another project's checkout, which does not track it.
        commit = git("rev-parse", "HEAD").stdout.strip() if git("ls-files", "--error-unmatch", here.name).stdout else ""
        return {"commit": commit, "modified": git("diff", "--quiet", "HEAD").returncode != 0} if commit else None
    except (OSError, subprocess.TimeoutExpired):
        return None
