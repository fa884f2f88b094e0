"""Second copies, with checksums, of what ``--resume`` needs beside the arrays of a checkpoint: any
one damaged or missing file of a run's folder is restored.

``checkpoints/start.json`` has ``config.yaml``, ``manifest.json`` and ``tracker.json`` as they were
when the run was started last. Each checkpoint has the rows up to its step.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

from rlhf_jax.errors import UserError, logger, read_file
from rlhf_jax.runs.checkpoint import Checkpoints, digest_of
from rlhf_jax.runs.folder import Run
from rlhf_jax.runs.reading import read_json
from rlhf_jax.runs.writing import write_atomically

FILES = ("config.yaml", "manifest.json", "tracker.json")
ROWS = ("metrics.jsonl", "timing.jsonl", "samples.jsonl", "alerts.jsonl")
START = Path("checkpoints", "start.json")


class _Copies(TypedDict):
    files: dict[str, str]
    sha256: str


def keep_start(run: Run) -> None:
    """Writes the copy of the files with which the run was started."""
    contents = {name: _content(run.path / name) for name in FILES}
    texts = {
        name: text.decode("utf-8", "replace") for name, text in contents.items() if text is not None
    }
    run.checkpoints.mkdir(exist_ok=True)
    content = {"files": texts, "sha256": _hash(texts)}
    write_atomically(run.path / START, json.dumps(content, ensure_ascii=False) + "\n")


def kept_start(path: Path) -> dict[str, str]:
    """{name: text} of the copies in a run's folder; empty if they are missing or damaged.

    Raises:
      UserError: one is of a file of which no run keeps a copy.
    """
    try:
        content = read_json(path / START, _Copies)
    except UserError:
        return {}
    texts: dict[str, str] = content["files"]
    if content["sha256"] != _hash(texts):
        return {}
    _check_names(path / START, texts, FILES)
    return texts


def restore_start(run: Run) -> None:
    """Restores the files with which the run was started where they differ from their copies, and
    says so.
    """
    texts = kept_start(run.path)
    if not texts and (run.path / START).exists():
        logger.info(f"--resume: {run.path / START} is damaged; it is written anew")
    for name, text in texts.items():
        if _content(run.path / name) != text.encode():
            _restore(run.path / name, text.encode(), run.path / START)


def rows_of(run: Run) -> dict[str, bytes]:
    """{name: content} of the files of rows, for a checkpoint."""
    contents = {name: _content(run.path / name) for name in ROWS}
    return {name: content for name, content in contents.items() if content is not None}


def restore_rows(run: Run, checkpoints: Checkpoints, step: int) -> None:
    """Cuts the files of rows to what they were at the checkpoint of a step. One that is damaged is
    restored from the checkpoint's copy, and a line says so.

    Raises:
      CheckpointError: the copy is damaged too.
      UserError: a file is none of the rows of a run.
    """
    recorded = checkpoints.record(step)["files"]
    folder = run.checkpoints / str(step)
    _check_names(folder, recorded, ROWS)
    for name, about in recorded.items():
        content = _content(run.path / name) or b""
        up_to_step = content[: about["bytes"]]
        if digest_of(up_to_step) != about["sha256"]:
            _restore(run.path / name, checkpoints.file(step, name), folder)
        elif len(content) > len(up_to_step):
            write_atomically(run.path / name, up_to_step)


def _check_names(source: Path, names: Iterable[str], known: Sequence[str]) -> None:
    """Raises UserError for another name, such as ../../.bashrc: a copy would be written to it."""
    others = [name for name in names if name not in known]
    if others:
        raise UserError(
            f"{source}: holds copies of {', '.join(others)}, which no run keeps there; somebody "
            "has changed it. Nothing was restored"
        )


def _content(path: Path) -> bytes | None:
    """The content of a file; None if it is missing or is none."""
    with contextlib.suppress(UserError):
        return read_file(path, most=None)
    return None


def _restore(path: Path, content: bytes, source: Path) -> None:
    """Writes the file again; what had its name is kept as ``damaged-NAME``."""
    what = "is missing"
    if os.path.lexists(path):
        aside = path.with_name(f"damaged-{path.name}")
        path.replace(aside)
        what = f"is not as the run left it (it is now {aside.name})"
    write_atomically(path, content)
    logger.info(f"--resume: {path} {what}; restored from {source}")


def _hash(texts: dict[str, str]) -> str:
    text = json.dumps(texts, sort_keys=True)
    return digest_of(text.encode())
