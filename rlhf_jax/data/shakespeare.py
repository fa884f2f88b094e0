"""The data of jRLHF's Shakespeare job: one text, the rows to pretrain on, and chunks labelled with a character's count.

Rows of the reward model are token ids, since text would get an EOS after it: a policy that has not learnt to stop ends
its samples without one. Some end in EOS all the same, so that the model can score both.
"""

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError

CAP = 100  # the highest target, as in rewards.token_count
ENDED = 8  # few, since a token more may need the next wider batch
_TIMEOUT = 30  # seconds without an answer


def fetch(url: str, sha256: str, path: Path) -> None:
    """Downloads ``url`` to ``path``, unless a file with this sha256 is there already.

    Raises:
        UserError: nothing came, or a file with another sha256, which is removed.
    """
    if path.is_file() and digest(path) == sha256:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            partial.write_bytes(answer.read())
    except (OSError, ValueError) as error:  # URLError is an OSError; ValueError: not a URL
        partial.unlink(missing_ok=True)
        # Of its subclass HTTPError, the text says more than the reason: the code.
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise UserError(f"{url}: could not be fetched ({reason}); download the file and give --data PATH") from error
    found = digest(partial)
    if found != sha256:
        partial.unlink()
        raise UserError(
            f"{url}: sha256 {found} was fetched, {sha256} is expected; the file was removed. Download the text by hand "
            "and give --data PATH"
        )
    partial.replace(path)


def digest(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(path: Path) -> str:
    """The text of a UTF-8 file, its line ends as they are.

    Raises:
        UserError: the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start}; save it as UTF-8") from error


def chunks(text: str, size: int, overlap: int = 0) -> list[str]:
    """Pieces of ``size`` characters, each beginning ``size - overlap`` after the one before.

    The last one ends where the text ends, so that it may overlap the one before by more.

    Raises:
        ValueError: an overlap that is not between 0 and ``size - 1``, or a text shorter than ``size``.
    """
    if not 0 <= overlap < size:
        raise ValueError(f"the overlap must be at least 0 and below the size {size}, got {overlap}")
    if len(text) < size:
        raise ValueError(f"the text has {len(text)} characters, fewer than the {size} of a chunk")
    last = len(text) - size
    starts = [*range(0, last, size - overlap), last]
    return [text[start : start + size] for start in starts]


def spaced(items: Sequence[str], limit: int | None) -> list[str]:
    """``limit`` items at even distances, or all of them if there are no more."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def write_demonstrations(path: Path, text: str, length: int) -> int:
    """Cuts the text into demonstrations that fill a model of ``length`` positions; returns how many.

    A row's prompt is its first character, and no room is left for the EOS after its response: with
    ``text.too_long: truncate`` it is cut, since the end of a row is no end of a text.

    Raises:
        ValueError: as ``chunks``.
    """
    rows = chunks(text, length)
    _write(path, ({"prompt": row[0], "response": row[1:]} for row in rows))
    return len(rows)


def write_counts(path: Path, pieces: Sequence[str], character: str, tokenizer: Tokenizer) -> None:
    """Writes rows ``{prompt: ids, responses: [ids], targets: [min(count, CAP)]}``, together the ids of each piece.

    One piece in ``ENDED`` ends in EOS.
    """

    def rows() -> Iterator[dict[str, Any]]:
        for i, (piece, ids) in enumerate(zip(pieces, tokenizer.encode_batch(pieces), strict=True)):
            ended = [*ids, tokenizer.eos_id] if i % ENDED == ENDED - 1 else ids
            target = min(piece.count(character), CAP)
            yield {"prompt": ended[:1], "responses": [ended[1:]], "targets": [target]}

    _write(path, rows())


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
