"""What a run says about itself in ``config.yaml`` and ``manifest.json``, and whether a resumed one is still the same.

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
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
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
        digest = hashlib.sha256()
        for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file_path.relative_to(path).as_posix()}\0{fingerprint(file_path)}\n".encode())
        return digest.hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


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
      config: the new configuration as ``config.to_yaml`` writes it.
      data_fingerprints: those of the data as it is now.
      may_change: dotted keys, or sections, that may differ without a word.
      allowed: those that the user lets differ. ``data``, of any section, stands for the contents of all data files too,
        ``reward`` and ``safety`` for those of the rewards and of the filter.
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
        kind = (
            name.split(" ")[0] if name in ("model", "tokenizer") or name.startswith(("reward ", "safety ")) else "data"
        )
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
