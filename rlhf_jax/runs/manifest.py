"""What reproduces a run, in ``manifest.json``, and whether a resumed run is still the same one.

    with open_run("runs/ppo", resume=False, overwrite=False) as run:
        write_manifest(run, {"seed": 0, "data": {"pairs.json": fingerprint("pairs.json")}}, {"data":
        8})

It is written whole or not at all.
"""

import functools
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import yaml

from rlhf_jax.errors import UserError, did_you_mean, file_errors, logger
from rlhf_jax.runs import devices
from rlhf_jax.runs.folder import Run, write_atomically
from rlhf_jax.runs.reading import MANIFEST, SETTINGS, read_json, read_yaml

Keys = Sequence[str]
# The value of ``moves`` in the manifest of a run whose bits do not depend on the number of devices,
# and the entries that tell this number.
EXACT = "exact"
COUNTS = ("devices.count", "devices.data")
PACKAGES = (
    "rlhf-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
)


def fingerprint(path: str | Path) -> str:
    """sha256 of a file's bytes, or of the names and bytes of all files in a folder."""
    path = Path(path)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        lines = [f"{file.relative_to(path).as_posix()}\0{fingerprint(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with file_errors(path), path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_manifest(
    run: Run,
    facts: Mapping[str, Any],
    mesh: Mapping[str, int],
    changed: Keys = (),
) -> None:
    """Writes ``manifest.json``; a resumed run keeps its first one and adds this start to its list
    ``resumed``.

    Prints a line if a resumed run has other devices or versions than before, because its bits
    depend on them.

    Args:
      run: the run.
      facts: JSON values, kept under their keys: ``seed``, ``stage``, ``data``, {file as the user
        named it: :func:`fingerprint`}, ``given``, {name: ``objects.describe``}, and ``moves``,
        `EXACT` if the run may go on with another number of devices.
      mesh: the sizes of the mesh's axes.
      changed: what differs from the run that is resumed; the facts are then the new ones.
    """
    packages = {name: metadata.version(name) for name in PACKAGES}
    machine: dict[str, Any] = {
        "backend": jax.default_backend(),
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), **mesh},
        "cpu": devices.cpu(),
        "versions": {"python": platform.python_version(), **packages},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    start = {"command": shlex.join(command_line()), **machine, "git": _git_state()}
    manifest = start | dict(facts)
    if run.resumed:
        manifest = read_json(run.manifest, MANIFEST)
        if changed:
            manifest |= facts
        starts = manifest.setdefault("resumed", [])
        last = starts[-1] if starts else manifest
        recorded = {key: last[key] for key in machine if key in last}
        now = {key: machine[key] for key in recorded}
        _report_other_machine(recorded, now, moves=manifest.get("moves") == EXACT)
        starts.append(start | ({"changed": list(changed)} if changed else {}))
    write_atomically(run.manifest, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _report_other_machine(before: dict[str, Any], now: dict[str, Any], moves: bool) -> None:
    """moves: whether the number of devices makes no difference."""
    changes = _differences(dotted(before), dotted(now))
    if moves:
        moved = [changes.pop(key) for key in COUNTS if key in changes]
        if moved:
            logger.info(f"--resume: {'; '.join(moved)}; compute.blocks keeps the bits")
    if changes:
        logger.info(
            f"--resume: {'; '.join(changes.values())}. The run goes on, but is no longer bit for "
            "bit what it would have been without the stop"
        )


def command_line() -> list[str]:
    """The words that start this process once more: ``rlhf-jax COMMAND ...`` or ``python SCRIPT
    ...``.
    """
    return sys.argv if sys.argv[0] == "rlhf-jax" else ["python", *sys.argv]


def check_unchanged(
    run: Run,
    *,
    config: str,
    data: Mapping[str, str],
    given: Mapping[str, Any] = {},
    may_change: Keys = (),
    allowed: Keys = (),
    fixed: Keys = (),
) -> list[str]:
    """Refuses to resume a run with settings or data of another run. Returns a sentence for each
    difference that is allowed.

    Args:
      run: only a run with ``resumed`` set is compared with anything.
      config: the new configuration as ``config.to_yaml`` writes it.
      data: {name: :func:`fingerprint`} of the data as it is now.
      given: {name: ``objects.describe``} of what Python gives to the run.
      may_change: dotted keys, or sections, that may differ.
      allowed: keys or sections that the user lets differ. ``data``, of any section, also stands for
        the contents of all data files, ``reward`` and ``safety`` for those of the rewards and of
        the filter.
      fixed: keys or sections that ``allowed`` may not name: with another value the state could not
        be read, or its tokens would have other meanings.

    Raises:
      UserError: lists the keys with both values, and the data that differs; a key of ``allowed`` is
        no setting.
    """
    after = dotted(yaml.safe_load(config)) | _parts(given)
    allowed = [key.replace("-", "_") for key in allowed]
    for key in allowed:
        if not any(within(setting, [key]) for setting in after):
            raise UserError(
                f"--allow-changed {key}: there is no such setting{did_you_mean(key, after)}"
            )
    if not run.resumed:
        return []
    if any(key.rpartition(".")[2] in ("data", "validation_data") for key in allowed):
        allowed.append("data")
    recorded = read_json(run.manifest, MANIFEST)
    before = dotted(read_yaml(run.config, SETTINGS))
    before |= _parts(recorded.get("given", {})) | _hashes(recorded.get("data", {}))
    unequal = _differences(before, after | _hashes(data))
    changed = {key: text for key, text in unequal.items() if not within(_setting(key), may_change)}
    never = [_setting(key) for key in changed if within(_setting(key), fixed)]
    problems = [
        text
        for key, text in changed.items()
        if _setting(key) in never or not within(_setting(key), allowed)
    ]
    if problems:
        help_of_flag = "lets those differ that you name"
        if never:
            help_of_flag = f"cannot help with {', '.join(never)}"
        raise UserError(
            f"--resume: {run.path} is another run: {'; '.join(problems)}. Undo this, or start a "
            f"new run with another --output-dir; --allow-changed {help_of_flag}"
        )
    if changed:
        sentences = "; ".join(changed.values())
        logger.info(f"--resume: the run continues with other settings or data: {sentences}")
    return list(changed.values())


def _hashes(fingerprints: Mapping[str, str]) -> dict[str, str]:
    return {f"sha256 of {name}": digest[:12] for name, digest in fingerprints.items()}


def _setting(key: str) -> str:
    """The setting that a difference belongs to: the key itself, or the one that names the file of a
    sha256.
    """
    match = re.match(r"sha256 of (?:(model|tokenizer)$|(reward|safety) )?", key)
    return (match[1] or match[2] or "data") if match else key


def within(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of the names or below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A sentence for each value that differs between two trees of dicts."""
    return list(_differences(dotted(dict(before)), dotted(dict(now))).values())


def _differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """{key: sentence with both values} for the keys whose values differ."""
    texts = {}
    for key in before | after:
        old = repr(before[key]) if key in before else "not set"
        new = repr(after[key]) if key in after else "not set"
        if old != new:
            texts[key] = f"{key} was {old} and is now {new}"
    return texts


def dotted(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"section.key": value} of a tree of dicts."""
    if not isinstance(value, dict) or not value:
        return {prefix[:-1]: value}
    return {
        key: inner
        for name, child in value.items()
        for key, inner in dotted(child, f"{prefix}{name}.").items()
    }


def _parts(given: Mapping[str, Any]) -> dict[str, Any]:
    """``dotted``, with no key for no description."""
    return dotted(dict(given)) if given else {}


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from, and whether its files differ from it;
    None without one.
    """
    git = functools.partial(
        subprocess.run, cwd=Path(__file__).parent, capture_output=True, timeout=10, check=True
    )
    try:
        git(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name]
        )  # not another project's checkout around us
        text = git(
            ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"], text=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": text.removesuffix("-dirty"), "modified": text.endswith("-dirty")}
