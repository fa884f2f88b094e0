"""Replies of servers, kept in a run's folder, so that no question is asked twice."""

import hashlib
import json
import threading
from pathlib import Path

import jax
import msgspec

from rlhf_jax.errors import logger, read_file


class _Kept(msgspec.Struct):
    sha256: str
    reply: str


class Replies:
    """Replies to questions, kept in a folder by the sha256 of the question: a JSON line each, in a
    file for each process. A line that a kill cut off, or that is none of them, is left out with a
    warning.

    Args:
      folder: None keeps nothing.
      name: what the names of the files begin with.

    Raises:
      UserError: a file cannot be read.
    """

    def __init__(self, folder: Path | None, name: str = "replies"):
        self._file: Path | None = None
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        if folder is None:
            return
        for file in sorted(folder.glob(f"{name}_*.jsonl")):
            left_out = 0
            for line in read_file(file, most=None).splitlines():
                try:
                    kept = msgspec.json.decode(line, type=_Kept)
                    self._known[kept.sha256] = kept.reply
                except (msgspec.MsgspecError, UnicodeError, RecursionError):
                    left_out += 1
            if left_out:
                logger.warning(f"{file}: {left_out} lines are no replies and are left out")
        self._file = folder / f"{name}_{jax.process_index()}.jsonl"
        if self._file.exists() and not read_file(self._file, most=None).endswith(b"\n"):
            self._append("")  # ends the line that was cut off

    def __contains__(self, question: str) -> bool:
        return _sha256(question) in self._known

    def __getitem__(self, question: str) -> str:
        return self._known[_sha256(question)]

    def add(self, question: str, reply: str) -> None:
        """Keeps a reply; threads may call it at once."""
        key = _sha256(question)
        line = json.dumps({"sha256": key, "reply": reply}, ensure_ascii=False)
        with self._lock:
            self._known[key] = reply
            self._append(line)

    def _append(self, line: str) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as opened:
            opened.write(line + "\n")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
