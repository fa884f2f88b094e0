"""Many rows as ids: encoded part by part, and kept on disk for the next run with the same rows.

`encoding.encode_texts` holds all texts as Python lists at once; a part of the rows at a time takes
a fraction of the memory. What took long is kept in the user's cache folder, under a key of the
rows, the tokenizer with its template, the settings and this package's own code, so that nothing
stale is read.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax import data
from rlhf_jax.data.encoding import EncodedTexts, NothingLeft, encode_texts
from rlhf_jax.data.rows import Row, Rows
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError, logger, read_file
from rlhf_jax.runs.writing import replacing
from rlhf_jax.training.common.setup import cache_folder

ROWS_AT_ONCE = 2048
LONG = 20.0  # seconds; what takes longer is kept
KEPT = 4  # entries of the cache
_SAID_EVERY = 10.0  # seconds
_VALUES = "values.json"


def encode(rows: Rows, tokenizer: Tokenizer, **settings: Any) -> EncodedTexts:
    """`encode_texts` of the rows with these settings, from the cache if an earlier run left them
    there. Prints how far it is.

    Raises:
      UserError: as `encode_texts`.
    """
    if len(rows) <= ROWS_AT_ONCE:
        return encode_texts(rows, tokenizer, **settings)
    base = cache_folder()
    entry = None if base is None else base / "rows" / key(rows, tokenizer, settings)
    is_kept = entry is not None and os.path.lexists(entry)
    if entry is not None and is_kept:
        kept = load(entry)
        if kept is not None:
            logger.info(f"{len(rows):,} rows: token ids of an earlier run, from {entry}")
            return kept
        logger.info(f"{entry}: is damaged; the token ids are made anew")
    start = time.monotonic()
    encoded = in_parts(rows, tokenizer, **settings)
    if entry is not None and (is_kept or time.monotonic() - start > LONG):
        _keep(encoded, entry)
    return encoded


def in_parts(rows: Rows, tokenizer: Tokenizer, **settings: Any) -> EncodedTexts:
    """`encode_texts` of `ROWS_AT_ONCE` rows at a time."""
    start = time.monotonic()
    said = start
    parts: list[EncodedTexts] = []
    before: list[Row] = []
    waiting: list[Row] = []
    done = 0
    for part in _split(rows):
        waiting += part
        done += len(part)
        # Rows of which nothing is left go with those that follow.
        with contextlib.suppress(NothingLeft):
            parts.append(encode_texts(waiting, tokenizer, **settings))
            before = waiting
            waiting = []
        now = time.monotonic()
        if now - said > _SAID_EVERY:
            said = now
            logger.info(f"{done:,} of {len(rows):,} rows are token ids, after {now - start:.0f} s")
    if waiting:
        parts[-1:] = [encode_texts([*before, *waiting], tokenizer, **settings)]
    return join(parts)


def _split(rows: Rows) -> Iterator[list[Row]]:
    """The rows in parts. Those of one source, such as the pairs of a ranking, whose weights belong
    together, stay in one part.
    """
    part: list[Row] = []
    for row in rows:
        if len(part) >= ROWS_AT_ONCE and row.source != part[-1].source:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


# --- Encoded rows put together


def join(parts: Sequence[EncodedTexts]) -> EncodedTexts:
    """The rows of all parts as one. Parts may have different numbers of answers."""
    if len(parts) == 1:
        return parts[0]
    num_answers = max(part.num_answers for part in parts)
    offsets = np.cumsum([0, *map(len, parts)])
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(parts[0]):
        values = [getattr(part, field.name) for part in parts]
        if field.name == "tokens":
            fields["tokens"] = _join_tokens(values, num_answers, parts)
        elif field.name == "counts":
            counts = Counter[str]()
            for value in values:
                counts.update(value)
            fields["counts"] = dict(counts)
        elif isinstance(values[0], dict):  # {(answer, row): values}
            merged: dict[tuple[int, int], np.ndarray] = {}
            for offset, value in zip(offsets, values, strict=False):
                merged |= {(k, n + int(offset)): mask for (k, n), mask in value.items()}
            fields[field.name] = merged
        elif isinstance(values[0], list):
            fields[field.name] = [item for value in values for item in value]
        elif any(isinstance(value, np.ndarray) for value in values):
            fields[field.name] = _join_arrays(values, num_answers, parts)
        else:
            fields[field.name] = values[0]
    return type(parts[0])(**fields)


def _join_tokens(
    values: Sequence[list[list[np.ndarray]]], num_answers: int, parts: Sequence[EncodedTexts]
) -> list[list[np.ndarray]]:
    """[K][N] arrays; answers that a part does not have are missing."""
    missing = np.zeros(0, np.int32)
    joined = []
    for answer in range(num_answers):
        texts: list[np.ndarray] = []
        for tokens, part in zip(values, parts, strict=True):
            has_answer = answer < len(tokens)
            texts += tokens[answer] if has_answer else [missing] * len(part)
        joined.append(texts)
    return joined


def _join_arrays(
    values: Sequence[np.ndarray | None], num_answers: int, parts: Sequence[EncodedTexts]
) -> np.ndarray:
    """[N] or [N, K]. A part without the array has zeros."""
    known = next(value for value in values if value is not None)
    joined = []
    for value, part in zip(values, parts, strict=True):
        shape = (len(part), num_answers)[: known.ndim]
        padded = np.zeros(shape, known.dtype)
        if value is not None and known.ndim == 1:
            padded[:] = value
        elif value is not None:
            padded[:, : value.shape[1]] = value
        joined.append(padded)
    return np.concatenate(joined)


# --- The cache


def key(rows: Rows, tokenizer: Tokenizer, settings: dict[str, Any]) -> str:
    """A sha256 of all that decides the ids."""
    digest = hashlib.sha256(_code())
    config = dict(tokenizer.config)
    special = (tokenizer.pad_id, *tokenizer.eos_ids, tokenizer.spelled_as)
    for value in (tokenizer.fingerprint, config, special, sorted(settings.items())):
        digest.update(f"{value!r}\n".encode())
    for row in rows:
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


@functools.cache
def _code() -> bytes:
    """A hash of the files that make ids of rows."""
    digest = hashlib.sha256()
    for file in sorted(Path(data.__file__).parent.glob("*.*")):
        digest.update(file.read_bytes())
    return digest.digest()


def _keep(encoded: EncodedTexts, entry: Path) -> None:
    """Writes an entry of the cache, or says why it could not, and removes the oldest ones."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with replacing(entry) as new:
            save(encoded, new)
        entries = [path for path in entry.parent.iterdir() if path.is_dir()]
        entries.sort(key=lambda path: path.stat().st_mtime)
        for old in entries[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, UserError) as error:
        logger.info(f"the token ids are not kept for the next run: {error}")
        return
    logger.info(f"the token ids are kept for the next run in {entry}")


def save(encoded: EncodedTexts, new: Path) -> None:
    """Writes the rows as arrays, and as JSON what is none, with the checksums of the arrays; its
    first line is the checksum of the rest.
    """
    values: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for field in dataclasses.fields(encoded):
        value = getattr(encoded, field.name)
        if field.name == "tokens":
            for answer, texts in enumerate(value):
                arrays |= _flat(f"tokens {answer}", texts)
        elif isinstance(value, dict) and field.name != "counts":
            values[field.name] = list(value)
            arrays |= _flat(field.name, list(value.values()))
        elif isinstance(value, np.ndarray):
            arrays[field.name] = value
        else:
            values[field.name] = value
    written = {}
    for name, array in arrays.items():
        content = array.tobytes()
        (new / name).write_bytes(content)
        written[name] = (array.dtype.name, array.shape, _sum(content).decode())
    content = json.dumps({"values": values, "arrays": written}).encode()
    (new / _VALUES).write_bytes(_sum(content) + b"\n" + content)


def _sum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def _flat(name: str, texts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of different lengths as one, with their lengths."""
    return {
        name: np.concatenate(texts) if texts else np.zeros(0, np.int32),
        f"{name} lengths": np.array([len(text) for text in texts], np.int64),
    }


def load(entry: Path, kind: type[EncodedTexts] = EncodedTexts) -> EncodedTexts | None:
    """What `save` wrote of this class; None if it is damaged."""
    try:
        checksum, _, content = read_file(entry / _VALUES, most=None).partition(b"\n")
        if _sum(content) != checksum:
            return None
        written = json.loads(content)
        arrays = {}
        for name, (dtype, shape, checksum) in written["arrays"].items():
            content = read_file(entry / name, most=None)
            if _sum(content).decode() != checksum:
                return None
            arrays[name] = np.frombuffer(content, dtype).reshape(shape)
    except UserError:
        return None
    return kind(**_restored(written["values"], arrays))


def _restored(values: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields that `save` wrote."""
    fields: dict[str, Any] = dict(values)
    tokens: list[list[np.ndarray]] = []
    while (name := f"tokens {len(tokens)}") in arrays:
        tokens.append(_texts(arrays, name))
    fields["tokens"] = tokens
    for name, array in arrays.items():
        if name in values:
            keys = map(tuple, values[name])
            fields[name] = dict(zip(keys, _texts(arrays, name), strict=True))
        elif not name.startswith("tokens ") and not name.endswith(" lengths"):
            fields[name] = array
    return fields


def _texts(arrays: dict[str, np.ndarray], name: str) -> list[np.ndarray]:
    """The arrays of different lengths that `_flat` put into one."""
    ends = np.cumsum(arrays[f"{name} lengths"])
    return np.split(arrays[name], ends[:-1]) if len(ends) else []
