"""The human labels that lm-human-preferences published (Ziegler et al. 2019): fetched whole, and
decoded into texts.

    python experiments/labels.py download sentiment labels
    python experiments/labels.py decode labels/sentiment_offline_5k.json --tokenizer gpt2

Rows are {query, sample0, sample1, sample2, sample3, best}: lists of GPT-2's token ids filled up
with 50259, and the number of the best sample. Every stage reads them as they are.
"""

import difflib
import http.client
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from rlhf_jax import cli
from rlhf_jax.data import formats, tokenizers
from rlhf_jax.errors import UserError
from rlhf_jax.runs.writing import write_atomically

ROOT = "https://openaipublic.blob.core.windows.net/lm-human-preferences/labels"
SAMPLES = ("sample0", "sample1", "sample2", "sample3")
KEYS = ("query", *SAMPLES, "best")
PAD_ID = 50259  # GPT-2's vocabulary size + 2
TIMEOUT = 60  # seconds without a byte
# The path below ROOT, and the least number of rows: what the code published with it trains on.
LABEL_SETS = {
    "sentiment": ("sentiment/offline_5k.json", 4_992),
    "descriptiveness": ("descriptiveness/offline_5k.json", 4_992),
    "cnndm-offline": ("cnndm/offline_60k.json", 60_000),
    "cnndm-online": ("cnndm/online_45k.json", 46_000),
    "tldr-offline": ("tldr/offline_60k.json", 60_000),
    "tldr-online": ("tldr/online_45k.json", 46_000),
}


class Verified(NamedTuple):
    """A label file that was read to its end."""

    path: Path
    num_rows: int
    num_equal: int  # of which have four equal samples, which readers drop
    sha256: str


def fetch_labels(name: str, folder: str | Path, url: str | None = None) -> Verified:
    """Fetches a label set into ``folder``, checks every row of it, and writes its sha256 beside it.

    The file is called ``NAME.json.part`` until it is checked. A file that is there already is
    checked again.

    Args:
        url: another place that has the file; by default where it was published.

    Raises:
        UserError: there is no such set, it cannot be fetched or written, it is not what was
            expected (what came is then deleted), or the file that is there is not the one that was
            fetched.
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
    part = target.with_name(f"{target.name}.part")
    digest = target.with_name(f"{target.name}.sha256")
    if target.exists():
        verified = verify(target, least)
        if digest.exists() and digest.read_text("utf-8").split()[:1] != [verified.sha256]:
            raise UserError(
                f"{target}: is not the file that was fetched, by {digest.name}; delete it and "
                "fetch it again"
            )
        return verified
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            content = response.read()  # raises IncompleteRead where the connection ended too soon
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise UserError(
            f"{url}: could not be fetched: {reason or type(error).__name__}. Run the command "
            "again, or bring the file "
            f"from elsewhere as {target}"
        ) from error
    try:
        verified = verify(part, least)
    except UserError as error:
        part.unlink()
        raise UserError(f"{url}: is not the label set {name}, and was deleted: {error}") from error
    write_atomically(digest, f"{verified.sha256}  {target.name}\n")
    part.replace(target)
    return verified._replace(path=target)


def verify(path: str | Path, least: int = 1) -> Verified:
    """Reads a label file to its end.

    Raises:
        UserError: naming the row: it is no JSON, a key is missing, a field is wrong; or there are
            fewer than ``least``.
    """
    result = formats.read("comparisons", str(path))
    rows = load(path)
    for number, row in enumerate(rows, 1):
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise UserError(
                f"{path}, row {number}: expected the keys {', '.join(KEYS)}; {', '.join(missing)} "
                "missing"
            )
    if len(rows) < least:
        raise UserError(f"{path}: holds {len(rows)} rows, and at least {least} are expected")
    return Verified(
        Path(path),
        len(rows),
        sum(result.dropped.values()),
        next(iter(result.fingerprints.values())),
    )


def load(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON list or of JSON lines, which `readers` has found to be right."""
    text = Path(path).read_text("utf-8")
    return (
        json.loads(text)
        if text.lstrip().startswith("[")
        else [json.loads(line) for line in text.splitlines()]
    )


class Decoded(NamedTuple):
    """What was written, and how much of it is broken or left out."""

    num_rows: int
    num_broken: int  # of its texts hold U+FFFD, mostly a character that was cut at the text's end
    num_equal: int  # rows with equal samples, left out


def decode_labels(path: str | Path, output: str | Path, tokenizer: tokenizers.Tokenizer) -> Decoded:
    """Writes a label file as JSON lines with texts in place of token ids, without their padding.

    Other keys stay, texts too. Rows whose samples are all equal, which no reader keeps, are left
    out and counted.

    Raises:
        UserError: what is wrong in a row, such as an id that the tokenizer does not have;
            ``output`` exists, or cannot be written.
    """
    if Path(output).exists():
        raise UserError(f"{output}: exists already; delete it, or give another --output")
    verify(path)
    rows = load(path)
    lines: list[str] = []
    num_broken = 0
    for number, row in enumerate(rows, 1):
        values = {key: without_padding(row[key]) for key in ("query", *SAMPLES)}
        if all(values[key] == values[SAMPLES[0]] for key in SAMPLES):
            continue
        texts = {
            key: text_of(value, tokenizer, f"{path}, row {number}") for key, value in values.items()
        }
        num_broken += sum("\ufffd" in text for text in texts.values())
        lines.append(json.dumps(row | texts, ensure_ascii=False) + "\n")
    try:
        write_atomically(Path(output), "".join(lines))
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from error
    return Decoded(len(lines), num_broken, len(rows) - len(lines))


def without_padding(value: str | list[int]) -> str | list[int]:
    """Token ids without the padding, a text as it is."""
    return value if isinstance(value, str) else [token for token in value if token != PAD_ID]


def text_of(value: str | list[int], tokenizer: tokenizers.Tokenizer, source: str) -> str:
    """The text of token ids, a text as it is."""
    if isinstance(value, str):
        return value
    last = tokenizer.vocab_size - 1
    if max(value) > last:
        raise UserError(
            f"{source}: holds the token id {max(value)}, but the tokenizer has ids up to {last}; "
            "give the tokenizer "
            "that made the ids"
        )
    return tokenizer.decode(value)


def download(
    name: tyro.conf.Positional[str], folder: tyro.conf.Positional[str], url: str | None = None
) -> None:
    """Fetch a label set that lm-human-preferences published, check every row, and write its sha256
    beside it.

    Args:
        name: sentiment, descriptiveness, cnndm-offline, cnndm-online, tldr-offline or tldr-online.
        folder: where to write; made if missing.
        url: another place that has the file.
    """
    verified = fetch_labels(name, folder, url)
    print(
        f"{verified.path}: {verified.num_rows} rows, of which {verified.num_equal} have four equal "
        "samples"
    )
    print(f"sha256 {verified.sha256}: of what came; no published one is known to compare it with")


def decode(file: tyro.conf.Positional[str], tokenizer: str, output: str | None = None) -> None:
    """Write a label file with texts in place of token ids, as JSON lines.

    Args:
        file: rows {query, sample0, ..., best}; the padding id 50259 is removed.
        tokenizer: folder or name of the tokenizer that made the ids; of the published labels,
            GPT-2's.
        output: the new file; by default FILE with the ending .decoded.jsonl.
    """
    path = str(Path(file).with_suffix(".decoded.jsonl")) if output is None else output
    done = decode_labels(file, path, tokenizers.load_tokenizer(tokenizer))
    dropped = f", {done.num_equal} dropped (all responses are identical)" if done.num_equal else ""
    print(
        f"wrote {path}: {done.num_rows} rows{dropped}; {done.num_broken} texts hold a broken "
        "character, U+FFFD"
    )


def main(argv: list[str] | None = None) -> None:
    commands = {"download": download, "decode": decode}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, args=argv or sys.argv[1:])


if __name__ == "__main__":
    cli.run_script(main)
