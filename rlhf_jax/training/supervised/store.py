"""Many rows as ids, kept on disk for the next run with the same rows.

What took long is kept in the user's cache folder, under a key of the rows, the tokenizer with its
template, the settings and this package's own code, so that nothing stale is read.
"""

import functools
import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rlhf_jax import data
from rlhf_jax.data.encoding import EncodedTexts, encode_texts
from rlhf_jax.data.rows import Rows
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError, logger, read_file
from rlhf_jax.runs.writing import replacing
from rlhf_jax.training.common.setup import cache_folder

LONG = 20.0  # seconds; what takes longer is kept
KEPT = 4  # entries of the cache
FILE = "rows"  # of an entry


def encode(rows: Rows, tokenizer: Tokenizer, **settings: Any) -> EncodedTexts:
    """`encode_texts` of the rows with these settings, from the cache if an earlier run left them
    there.

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
    encoded = encode_texts(rows, tokenizer, **settings)
    if entry is not None and (is_kept or time.monotonic() - start > LONG):
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            with replacing(entry) as new:
                save(encoded, new)
            entries = [path for path in entry.parent.iterdir() if path.is_dir()]
            entries.sort(key=lambda path: path.stat().st_mtime)
            for old in entries[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
            logger.info(f"the token ids are kept for the next run in {entry}")
        except (OSError, UserError) as error:
            logger.info(f"the token ids are not kept for the next run: {error}")
    return encoded


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
    """A hash of the files that make ids of rows and keep them."""
    digest = hashlib.sha256()
    for file in (*sorted(Path(data.__file__).parent.glob("*.*")), Path(__file__)):
        digest.update(file.read_bytes())
    return digest.digest()


def save(encoded: EncodedTexts, new: Path) -> None:
    """Writes the rows behind their checksum."""

    def packed(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
        return array.dtype.str, array.shape, array.tobytes()

    content = msgspec.msgpack.encode(encoded, enc_hook=packed)
    (new / FILE).write_bytes(hashlib.sha256(content).digest() + content)


def load(entry: Path) -> EncodedTexts | None:
    """What `save` wrote; None if it is damaged."""

    def unpacked(_: Any, parts: tuple[str, tuple[int, ...], bytes]) -> np.ndarray:
        dtype, shape, content = parts
        return np.frombuffer(content, dtype).reshape(shape)

    try:
        written = read_file(entry / FILE, most=None)
    except UserError:
        return None
    content = written[hashlib.sha256().digest_size :]
    if not written.startswith(hashlib.sha256(content).digest()):
        return None
    return msgspec.msgpack.decode(content, type=EncodedTexts, dec_hook=unpacked)
