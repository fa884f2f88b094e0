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
from safetensors import numpy as safetensors

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
FILE = "rows"  # of an entry


def encode(rows: Rows, tokenizer: Tokenizer, **settings: Any) -> EncodedTexts:
    """`encode_texts` of the rows with these settings, from the cache if an earlier run left them
    there. Prints how far it is.

    Raises:
      UserError: as `encode_texts`.
    """
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
    number = max(part.num_answers for part in parts)
    missing = np.zeros(0, np.int32)
    tokens: list[list[np.ndarray]] = [[] for _ in range(number)]
    counts = Counter[str]()
    learned: dict[tuple[int, int], np.ndarray] = {}
    for part, first in zip(parts, np.cumsum([0, *map(len, parts)]), strict=False):
        for k in range(number):
            tokens[k] += part.tokens[k] if k < part.num_answers else [missing] * len(part)
        counts.update(part.counts)
        learned |= {(k, n + int(first)): mask for (k, n), mask in part.learned.items()}
    return dataclasses.replace(
        parts[0],
        tokens=tokens,
        starts=_join_arrays("starts", parts, number),
        prompts=[prompt for part in parts for prompt in part.prompts],
        sources=[source for part in parts for source in part.sources],
        counts=dict(counts),
        best=_join_arrays("best", parts),
        weight=_join_arrays("weight", parts),
        targets=_join_arrays("targets", parts, number),
        margin=_join_arrays("margin", parts),
        learned=learned,
    )


def _join_arrays(name: str, parts: Sequence[EncodedTexts], *answers: int) -> Any:
    """[N, *answers]; parts that lack the array have zeros. None: all lack it."""
    arrays = [getattr(part, name) for part in parts]
    known = next((array for array in arrays if array is not None), None)
    if known is None:
        return None
    joined = np.zeros((sum(map(len, parts)), *answers), known.dtype)
    end = 0
    for part, array in zip(parts, arrays, strict=True):
        end += len(part)
        if array is not None:
            place = joined[end - len(part) : end]
            place[tuple(slice(size) for size in array.shape)] = array
    return joined


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
    """Writes the rows as arrays, among them the JSON of what is none, behind their checksum."""
    values: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
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
    arrays["values"] = np.frombuffer(json.dumps(values).encode(), np.uint8)
    content = safetensors.save({name: np.ascontiguousarray(x) for name, x in arrays.items()})
    (new / FILE).write_bytes(hashlib.sha256(content).digest() + content)


def _flat(name: str, texts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of different lengths as one, with their lengths."""
    return {
        name: np.concatenate(texts) if texts else np.zeros(0, np.int32),
        f"{name} lengths": np.array([len(text) for text in texts], np.int64),
    }


def load(entry: Path) -> EncodedTexts | None:
    """What `save` wrote; None if it is damaged."""
    try:
        written = read_file(entry / FILE, most=None)
    except UserError:
        return None
    content = written[hashlib.sha256().digest_size :]
    if not written.startswith(hashlib.sha256(content).digest()):
        return None
    arrays = safetensors.load(content)
    return EncodedTexts(**_restored(json.loads(arrays.pop("values").tobytes()), arrays))


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
