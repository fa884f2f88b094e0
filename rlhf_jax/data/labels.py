"""The human labels that lm-human-preferences published (Ziegler et al. 2019): fetched whole, and decoded into texts.

Rows are ``{query, sample0 .. sample3, best}``, lists of GPT-2's token ids filled up with 50259; `formats` reads them.
"""

import difflib
import http.client
import json
import shutil
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_jax.data import encoding, formats
from rlhf_jax.data.chat import ChatTemplate
from rlhf_jax.data.files import read_source
from rlhf_jax.data.rows import Drop, Text, fields, require
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.runs.folder import write_atomically

ROOT = "https://openaipublic.blob.core.windows.net/lm-human-preferences/labels"
KEYS = ("query", "sample0", "sample1", "sample2", "sample3", "best")
_TIMEOUT = 60  # seconds without a byte


class LabelSet(NamedTuple):
    """A published file: its place below ``ROOT``, and how many rows it holds at least."""

    path: str
    least: int  # what the code published with it trains on


LABEL_SETS = {
    "sentiment": LabelSet("sentiment/offline_5k.json", 4_992),
    "descriptiveness": LabelSet("descriptiveness/offline_5k.json", 4_992),
    "cnndm-offline": LabelSet("cnndm/offline_60k.json", 60_000),
    "cnndm-online": LabelSet("cnndm/online_45k.json", 46_000),
    "tldr-offline": LabelSet("tldr/offline_60k.json", 60_000),
    "tldr-online": LabelSet("tldr/online_45k.json", 46_000),
}


class Verified(NamedTuple):
    """A label file that was read to its end."""

    path: Path
    num_rows: int
    num_equal: int  # of which have four equal samples, which readers drop
    sha256: str


def download(name: str, folder: str | Path, url: str | None = None) -> Verified:
    """Fetches a label set into ``folder``, checks every row of it, and writes its sha256 beside it.

    Until it is checked it is called ``NAME.json.part``; what an earlier call left there is gone on with. A file that is
    there already is checked again.

    Args:
        url: another place that has the file; by default where it was published.

    Raises:
        UserError: there is no such set, it cannot be fetched or written, it is not what was expected (what came is then
            deleted), or the file that is there is not the one that was fetched.
    """
    if name not in LABEL_SETS:
        near = difflib.get_close_matches(name, LABEL_SETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"no label set {name!r}; there are {', '.join(LABEL_SETS)}{hint}")
    path, least = LABEL_SETS[name]
    url = url or f"{ROOT}/{path}"
    if not url.startswith(("https://", "http://")):
        raise UserError(f"--url {url}: expected an address that begins with https://")
    target = Path(folder) / path.replace("/", "_")
    part, digest = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.sha256")
    if target.exists():
        found = verify(target, least)
        if digest.exists() and digest.read_text("utf-8").split()[:1] != [found.sha256]:
            raise UserError(
                f"{target}: is not the file that was fetched, by {digest.name}; delete it and fetch it again"
            )
        return found
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part)
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(
            f"{url}: could not be fetched: {reason or type(error).__name__}. The same command goes on where this one "
            f"stopped; or bring the file from elsewhere as {target}"
        ) from error
    try:
        found = verify(part, least)
    except UserError as error:
        part.unlink()
        raise UserError(f"{url}: is not the label set {name}, and was deleted: {error}") from error
    write_atomically(digest, f"{found.sha256}  {target.name}\n")
    part.replace(target)
    return found._replace(path=target)


def _fetch(url: str, part: Path) -> None:
    """Appends to ``part`` what is missing of it, or fetches all of it where the server cannot do so."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is missing
        raise
    with response:
        goes_on = response.status == http.HTTPStatus.PARTIAL_CONTENT
        with part.open("ab" if goes_on else "wb") as file:
            shutil.copyfileobj(response, file)
        length = response.headers.get("Content-Length")
        expected = None if length is None else int(length) + start * goes_on
    if expected is not None and part.stat().st_size < expected:
        raise http.client.HTTPException(f"the connection ended after {part.stat().st_size} of {expected} bytes")


def verify(path: str | Path, least: int) -> Verified:
    """Reads a label file to its end.

    Raises:
        UserError: naming the row: it is no JSON, a key is missing, a field is wrong; or there are fewer than ``least``.
    """
    source = read_source(path)
    num_equal = 0
    for record in source.records:
        fields(record, ", ".join(KEYS))
        require(record, KEYS)
        try:
            formats.answers(record, ChatTemplate())
        except Drop:
            num_equal += 1
    if len(source.records) < least:
        raise UserError(f"{path}: holds {len(source.records)} rows, and at least {least} are expected")
    return Verified(Path(path), len(source.records), num_equal, source.fingerprint)


class Decoded(NamedTuple):
    """What was written, and what to know about it."""

    num_rows: int
    num_broken: int  # of its texts hold U+FFFD, mostly a character that was cut at the text's end
    dropped: dict[str, int]


def decode(path: str | Path, output: str | Path, tokenizer: Tokenizer) -> Decoded:
    """Writes a label file as JSON lines with texts in place of token ids, without their padding.

    Other keys stay, texts too. Rows that no reader keeps, those whose samples are all equal, are left out and counted.

    Raises:
        UserError: what is wrong in a row, such as an id that the tokenizer does not have; ``output`` exists, or cannot
            be written.
    """
    if Path(output).exists():
        raise UserError(f"{output}: exists already; delete it, or give another --output")
    lines: list[str] = []
    dropped: Counter[str] = Counter()
    num_broken = 0
    for record in read_source(path).records:
        row: dict[str, Any] = dict(fields(record, ", ".join(KEYS)))
        try:
            answers = formats.answers(record, ChatTemplate())
        except Drop as drop:
            dropped[str(drop)] += 1
            continue
        prompt, *samples = _texts((answers.prompt, *answers.responses), tokenizer, record.source)
        num_broken += sum("\ufffd" in text for text in (prompt, *samples))
        row[formats.prompt_key(row)] = prompt
        row |= {"responses": samples} if "responses" in row else {f"sample{i}": text for i, text in enumerate(samples)}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    try:
        write_atomically(Path(output), "".join(lines))
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    return Decoded(len(lines), num_broken, dict(dropped))


def _texts(texts: tuple[Text, ...], tokenizer: Tokenizer, source: str) -> list[str]:
    ids = [text for text in texts if not isinstance(text, str)]
    checked = iter(encoding.response_ids(ids, tokenizer, [source] * len(ids)))
    return [text if isinstance(text, str) else tokenizer.decode(next(checked)) for text in texts]
