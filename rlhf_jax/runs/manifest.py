"""What reproduces a run, in ``manifest.json``, and whether a resumed run is still the same one.

    with open_run("runs/ppo", resume=False, overwrite=False) as run:
        facts = {"seed": 0, "data": {"pairs.json": fingerprint(Path("pairs.json"))}}
        write_manifest(run, facts, {"data": 8})

The file is written whole or not at all.
"""

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

from rlhf_jax.errors import UserError, did_you_mean, file_errors, logger, read_file
from rlhf_jax.runs import devices, keeping
from rlhf_jax.runs.folder import Run
from rlhf_jax.runs.reading import (
    Manifest,
    Row,
    Settings,
    parse_json,
    parse_yaml,
    read_json,
    read_yaml,
)
from rlhf_jax.runs.writing import write_atomically

Keys = Sequence[str]
Texts = Mapping[str, str]
# The value of ``moves`` in the manifest of a run whose bits do not depend on the number of devices,
# and the entries that have this number.
EXACT = "exact"
COUNTS = ("devices.count", "devices.data")
PACKAGES = ["rlhf-jax", "jax", "jaxlib", "flax", "optax"]
PACKAGES += ["orbax-checkpoint", "numpy", "transformers"]


def fingerprint(path: Path) -> str:
    """The sha256 of a file's bytes, or of the names and bytes of all files in a folder."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        lines = [f"{file.relative_to(path).as_posix()}\0{fingerprint(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with file_errors(path), path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_manifest(
    run: Run, facts: Mapping[str, Any], mesh: Mapping[str, int], changed: Keys = ()
) -> None:
    """Writes ``manifest.json``. A resumed run keeps its manifest and adds this start to the list
    ``resumed`` in it.

    Prints a line if a resumed run has other devices or versions than before, because its bits
    depend on them.

    Args:
      run: the run.
      facts: JSON values, kept under their keys: ``seed``, ``stage``, ``data``, {file as the user
        named it: :func:`fingerprint`}, ``given``, {name: ``objects.describe``}, and ``moves``,
        `EXACT` if the run may go on with another number of devices.
      mesh: the sizes of the mesh's axes.
      changed: what differs from the run that is resumed; if anything does, the manifest gets the
        new facts.
    """
    now = machine(mesh)
    start = {"command": shlex.join(command_line()), **now}
    manifest = start | dict(facts)
    if run.resumed:
        manifest = read_json(run.manifest, Manifest)
        if changed:
            manifest |= facts
        last = last_start(manifest)
        before = {key: last[key] for key in now if key in last and key != "git"}
        changes = differences(before, {key: now[key] for key in before})
        exact = COUNTS if manifest.get("moves") == EXACT else ()
        moved = [changes.pop(key) for key in exact if key in changes]
        if moved:
            logger.info(f"--resume: {'; '.join(moved)}; compute.blocks keeps the bits")
        if changes:
            logger.info(
                f"--resume: {'; '.join(changes.values())}. The run goes on, but is no longer bit "
                "for bit what it would have been without the stop"
            )
        starts = manifest.setdefault("resumed", [])
        starts.append(start | ({"changed": list(changed)} if changed else {}))
    write_atomically(run.manifest, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def machine(mesh: Mapping[str, int]) -> Row:
    """What a run's bits depend on beside its settings and files."""
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {
        "backend": jax.default_backend(),
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count(), **mesh},
        "cpu": devices.cpu(),
        "threads": devices.num_threads(),
        "versions": {"python": platform.python_version(), **packages},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git": _git_state(),
    }


def add_facts(run: Run, facts: Mapping[str, Any]) -> None:
    """Adds facts to ``manifest.json``, or replaces them: those that are known last."""
    manifest = read_json(run.manifest, Manifest) | dict(facts)
    write_atomically(run.manifest, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    keeping.keep_start(run)


def threads_of(path: Path) -> int | None:
    """XLA's threads at the last start of the run in a folder, as its manifest records them; None
    without a manifest that does.
    """
    file = path / "manifest.json"
    try:
        kept = keeping.kept_start(path).get(file.name) or read_file(file)
        return last_start(parse_json(kept, Manifest, str(file))).get("threads")
    except UserError:  # who opens the run says what is wrong
        return None


def last_start(recorded: Row) -> Row:
    """The facts of a manifest about the last time that the run was started or resumed."""
    return (recorded.get("resumed") or [recorded])[-1]


def command_line() -> list[str]:
    """The words that start this process again: ``rlhf-jax COMMAND`` or ``python SCRIPT``."""
    return sys.argv if sys.argv[0] == "rlhf-jax" else ["python", *sys.argv]


def check_unchanged(
    run: Run,
    *,
    config: str,
    data: Texts,
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
    after = dotted(parse_yaml(config, Settings, "config.yaml")) | dotted(dict(given))
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
    manifest = read_json(run.manifest, Manifest)
    before = dotted(read_yaml(run.config, Settings)) | dotted(manifest.get("given", {}))
    unequal = differences(before | _hashes(manifest.get("data", {})), after | _hashes(data))
    changed = {key: text for key, text in unequal.items() if not within(_setting(key), may_change)}
    never = [_setting(key) for key in changed if within(_setting(key), fixed)]
    problems = [
        text
        for key, text in changed.items()
        if _setting(key) in never or not within(_setting(key), allowed)
    ]
    sentences = "; ".join(problems or changed.values())
    if problems:
        names = " ".join(dict.fromkeys(_setting(key) for key in changed))
        use = f"cannot help with {', '.join(never)}" if never else f"{names} lets this differ"
        raise UserError(
            f"--resume: {run.path} is another run: {sentences}. Undo this, or start a new run with "
            f"another --output-dir; --allow-changed {use}"
        )
    if changed:
        logger.info(f"--resume: the run continues with other settings or data: {sentences}")
    return list(changed.values())


def _hashes(fingerprints: Texts) -> dict[str, str]:
    return {f"sha256 of {name}": digest[:12] for name, digest in fingerprints.items()}


def _setting(key: str) -> str:
    """The setting of a difference: the key itself, or the one that names the file of a sha256."""
    match = re.match(r"sha256 of (?:(model|tokenizer)$|(reward|safety) )?", key)
    return (match[1] or match[2] or "data") if match else key


def within(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of the names or below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def differences(before: Row, now: Row) -> dict[str, str]:
    """{dotted key: sentence with both values} for each value that differs between two trees."""
    differ = unequal(before, now).items()
    return {key: f"{key} was {old} and is now {new}" for key, (old, new) in differ}


def unequal(before: Row, after: Row) -> dict[str, tuple[str, str]]:
    """{dotted key: both values as texts} of two trees for the keys whose values differ. An int is
    equal to the float of its value, since YAML reads a float where a script gave an int.
    """
    texts = {}
    before, after = dotted(before), dotted(after)
    for key in before | after:
        old = repr(before[key]) if key in before else "not set"
        new = repr(after[key]) if key in after else "not set"
        kinds = {type(before.get(key)), type(after.get(key))}
        if old != new and not (kinds == {int, float} and before[key] == after[key]):
            texts[key] = (old, new)
    return texts


def dotted(value: Any, prefix: str = "") -> Row:
    """{"section.key": value} of a tree of dicts."""
    if not isinstance(value, dict) or (prefix and not value):
        return {prefix[:-1]: value}
    keys: Row = {}
    for name, child in value.items():
        keys |= dotted(child, f"{prefix}{name}.")
    return keys


def _git_state() -> Row | None:
    """The commit of this package's checkout, and whether files differ from it; None without one."""
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", *words]
        options: Any = {"capture_output": True, "text": True, "timeout": 10, "check": True}
        return subprocess.run(command, cwd=here.parent, **options).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # fails in a checkout of another project
        text = git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": text.removesuffix("-dirty"), "modified": text.endswith("-dirty")}
