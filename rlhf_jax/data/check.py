"""Reports on data files and their mistakes, as text: `rlhf-jax data check` and `rlhf-jax data
preview`.

A problem would stop a run that reads the file; the report has all problems with their places. A
warning names a key that looks misspelled: the rows have another form than their author meant.
Duplicates, dropped rows and overlap between files do not stop a run; the report has their number
and places.
"""

import difflib
import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import chat, formats
from rlhf_jax.data.batches import comparison_batch
from rlhf_jax.data.encoding import EncodedTexts, encode_texts, pieces, prompt_ids, spelled
from rlhf_jax.data.files import read_source
from rlhf_jax.data.forms import table
from rlhf_jax.data.forms.columns import adapted, unused
from rlhf_jax.data.rows import Fields, Kind, OnBadRow, Record, Row, Text, places, summary
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.data.verified import reward_lines
from rlhf_jax.errors import UserError, escaped
from rlhf_jax.graders.verifiable import DEFAULT, Settings

NUM_PLACES = 5  # places that the report names for each finding in a file
_ROWS_AT_ONCE = 256
_EXAMPLE = 200  # characters of a text that a report shows
_ANSWERS = "prompt, responses, best or ranking or ranks or targets"
_ALIASES = {"output": "response"}
_KNOWN = " | ".join([_ANSWERS, *map(", ".join, list(table.OURS)[1:])])
_PUBLIC = f"or of a public form: {', '.join(known.name for known in table.FORMS)}"


class Report(NamedTuple):
    """The text to print, and the number of rows and files with a problem. Without a problem a run
    can read the files.
    """

    text: str
    num_problems: int


class _File(NamedTuple):
    head: str  # its name, format and number of rows
    kind: Kind
    records: list[Record]
    found: formats.ReadResult


def check(
    paths: Sequence[str],
    tokenizer: Tokenizer | None = None,
    *,
    kind: Kind | None = None,
    columns: Sequence[str] = (),
    on_bad_row: OnBadRow = "error",
    reward: Sequence[str] = (),
    math: Settings = DEFAULT,
) -> Report:
    """The report on all files: problems, dropped rows, duplicates, lengths, examples, and what the
    files share.

    Args:
      tokenizer: counts lengths in its tokens, renders messages by its chat template and decodes
        examples that are token ids. None: words and `chat.PLAIN`.
      kind: the kind that the rows should have. None: the kind that the pipeline has for this file
        name, or else the kind of most rows; rows of other kinds are problems.
      columns, on_bad_row: as in `formats.read`.
      reward: entries that are tried on prompts with answers: ``math``, ``regex:PATTERN`` and
        ``FILE.py:FUNCTION``.
      math: how ``math`` reads answers.
    """
    if not paths:
        raise UserError("no data file given")
    kind = kind or ("prompts" if reward else None)
    texts = []
    num_problems = 0
    num_warnings = 0
    rows_of: dict[str, list[Row]] = {}
    for path in paths:
        try:
            file = _read(path, tokenizer, kind, columns, on_bad_row)
            tested = [reward_lines(entry, file.found, math, on_bad_row) for entry in reward]
        except UserError as error:
            nothing = formats.ReadResult([], errors=[error])
            file = _File(f"{path}: unreadable, 0 rows", kind or "demonstrations", [], nothing)
            tested = []
        text, warnings = _describe(path, file, tokenizer)
        lines = [line for found in tested for line in found]
        warnings += sum(line.startswith("  warning") for line in lines)
        texts.append("\n".join([text, *lines]))
        rows_of[path] = file.found.rows
        num_problems += len(file.found.errors)
        num_warnings += warnings
    for (name, first), (other, second) in itertools.combinations(rows_of.items(), 2):
        texts.append(_overlap(name, first, other, second))
    texts.append(_total(num_problems, num_warnings))
    return Report("\n\n".join(texts), num_problems)


def _total(num_problems: int, num_warnings: int) -> str:
    """The last line of a report."""
    if not num_problems and not num_warnings:
        return "no problems"
    total = f"problems: {num_problems}, warnings: {num_warnings}"
    return f"{total}; a run would stop" if num_problems else total


def _overlap(
    name: str,
    first: list[Row],
    other: str,
    second: list[Row],
) -> str:
    """The number of prompts and of rows that two files share."""
    prompts = {row.prompt for row in first} & {row.prompt for row in second}
    texts = {row.texts for row in first}
    num_same = sum(row.texts in texts for row in second)
    shares = f"{other} shares {len(prompts)} prompts with {name}"
    return f"{shares}; {num_same} of its {len(second)} rows are in that file too"


def preview(
    path: str,
    tokenizer: Tokenizer | None = None,
    count: int = 3,
    *,
    kind: Kind | None = None,
    columns: Sequence[str] = (),
) -> str:
    """The first ``count`` rows in full, as a run would read them, with messages rendered; and the
    problems of the other rows.

    kind, columns: as in `check`.

    Raises:
      UserError: the file cannot be read.
    """
    file = _read(path, tokenizer, kind, columns, "error")
    shown = [_render_row(row, tokenizer) for row in file.found.rows[:count]]
    findings = "\n".join([*_problems(file.found.errors), *_dropped(file)])
    blocks = [f"{file.head}, {file.kind}", *shown, findings]
    return "\n\n".join(filter(None, blocks))


def _read(
    name: str,
    tokenizer: Tokenizer | None,
    kind: Kind | None,
    columns: Sequence[str],
    on_bad_row: OnBadRow,
) -> _File:
    """The rows of a file, of the given or the likely kind."""
    source = read_source(name, whole_text=kind == "demonstrations")
    unused_columns = unused(source.records, columns)
    if unused_columns:
        raise UserError("\n".join(unused_columns.values()))
    records = adapted(source.records, columns)
    kind = kind or _kind_of(name, records)
    template = chat.template_of(tokenizer, chat.AUTO)
    found = formats.parse_all(kind, records, template, on_bad_row)
    return _File(f"{name}: {source.format}, {len(source.records)} rows", kind, records, found)


def _kind_of(name: str, records: Sequence[Record]) -> Kind:
    """The kind that the pipeline has for this file name, or the kind of most records."""
    of_names: dict[str, Kind] = {file: kind for kind, file in formats.FILES.items()}
    kinds = [formats.form_of(record.value).kind for record in records]
    counts = Counter(kind for kind in kinds if kind is not None)
    likely: Kind = max(counts, key=counts.__getitem__, default="demonstrations")
    return of_names.get(Path(name).name, likely)


def _describe(
    name: str,
    file: _File,
    tokenizer: Tokenizer | None,
) -> tuple[str, int]:
    """The report on a file, and its number of warnings. Errors of labels and tokens are added to
    ``found.errors``.
    """
    rows = file.found.rows
    errors = file.found.errors
    lengths: dict[str, list[int]] = {}
    try:
        formats.check_labels(rows)
        lengths = _lengths(rows, tokenizer) if rows else {}
    except UserError as error:
        errors.append(error)
    warnings = _slips(file)
    unread = file.found.describe_unread(file.kind)
    if tokenizer is not None:
        is_chat = chat.frame(chat.AUTO, tokenizer) is None
        notes = (spelled(rows, tokenizer), formats.framed(rows) if is_chat else "")
        warnings += [f"  warning: {note}" for note in notes if note]
    lines = [
        f"{file.head}, {len(rows)} {file.kind} kept",
        *_forms(file.found),
        *_problems(errors),
        *warnings,
        *([f"  {escaped(unread)}"] if unread else []),
        *_dropped(file),
        *_repeats(rows, name),
    ]
    unit = "tokens" if tokenizer else "words"
    learned = lengths.pop("", None)
    if learned:
        lines.append(f"  tokens: {learned[1]:,}, of which {learned[0]:,} are learned")
    for text, counts in lengths.items():
        lines.append(_spread(f"{unit} of a {text}", counts))
    if rows:
        lines.append("  examples:")
    lines += [_render_row(row, tokenizer, _EXAMPLE) for row in rows[:3]]
    return "\n".join(lines), len(warnings)


def _forms(found: formats.ReadResult) -> list[str]:
    """The number of records of each form."""
    if not found.forms:
        return []
    most_first = Counter(found.forms.values()).most_common()
    counted = "; ".join(f"{count} of {name}" for name, count in most_first)
    lines = [f"  rows: {counted}"]
    if set(found.forms.values()) == {formats.UNKNOWN.name}:
        lines.append(f"  a row must have the keys of one of these: {_KNOWN}; {_PUBLIC}")
    return lines


def _slips(file: _File) -> list[str]:
    """Warnings of keys that look misspelled. Rows with a problem do not count."""
    bad = {getattr(error, "source", None) for error in file.found.errors}
    slips = defaultdict[str, list[str]](list)
    for record in file.records:
        row = record.value
        if record.source in bad or not isinstance(row, dict):
            continue
        read = formats.keys_read(row, file.kind)
        for key in row.keys() - read:
            slips[_slip(key, row, read)].append(record.source)
    slips.pop("", None)
    warnings = []
    for slip, sources in slips.items():
        warnings.append(f"  warning: {slip} ({len(sources)} rows: {places(sources)})")
    return sorted(warnings)


def _slip(
    key: str,
    row: Fields,
    read: frozenset[str],
) -> str:
    """A sentence if the key looks like a known key that the row lacks, else ""."""
    missing = [known for known in formats.KNOWN if known not in row]
    name = key.strip().lower()
    near = difflib.get_close_matches(_ALIASES.get(name, name), missing, n=1, cutoff=0.85)
    near = near or table.meant(key, tuple(row))
    if near:
        return f"the key {key!r} is not read; did you mean {near[0]!r}?"
    if key in table.PAIR and read == {"prompt"}:
        return f"the key {key!r} is not read without the other one of a pair"
    return ""


def _repeats(rows: list[Row], name: str) -> list[str]:
    """Rows that repeat an earlier row, and pairs that prefer what an earlier row rejects."""
    seen: dict[tuple[Text, ...], str] = {}
    duplicates: list[str] = []
    opposites: list[str] = []
    for row in rows:
        if row.texts in seen:
            duplicates.append(f"{row.source} repeats {seen[row.texts]}")
        opposite = seen.get((row.prompt, *row.responses[::-1]))
        if row.is_pair and opposite:
            opposites.append(f"{row.source} prefers what {opposite} rejects")
        seen.setdefault(row.texts, row.source.removeprefix(f"{name}, "))
    return [*_finding("duplicates", duplicates), *_finding("opposite preferences", opposites)]


def _lengths(rows: list[Row], tokenizer: Tokenizer | None) -> dict[str, list[int]]:
    """Lengths of prompts and responses in tokens, their ends included, or without a tokenizer in
    words (of token ids: in tokens). "" has how many tokens of all texts are learned, and how many
    there are.
    """
    answered = [row for row in rows if row.responses]
    prompted = [row for row in rows if not row.is_plain_text]
    if tokenizer is None:
        parts_of: dict[str, list[Any]] = {
            "prompt": [_words(row.prompt) for row in prompted],
            "response": [_words(text) for row in answered for text in row.responses],
        }
        return {name: list(map(len, parts)) for name, parts in parts_of.items() if parts}
    if not answered:
        return {"prompt": list(map(len, prompt_ids(rows, tokenizer, chat.AUTO)))}
    is_text = answered[0].is_plain_text
    template = "{prompt}" if is_text else chat.AUTO
    texts = pieces(answered, tokenizer, sys.maxsize) if is_text else answered
    encoded = encode_texts(texts, tokenizer, template=template)
    is_there = encoded.lengths > 0
    lengths = {
        "prompt": encoded.starts[:, 0].tolist(),
        "response": encoded.response_lengths[is_there].tolist(),
        "": [_num_learned(encoded), int(encoded.lengths.sum())],
    }
    if is_text:  # a piece of it begins with the last token of the piece before
        whole = Counter({row.source: 1 for row in answered})
        for source, length in zip(encoded.sources, lengths["response"], strict=True):
            whole[source.rpartition(", piece ")[0]] += length
        lengths["response"] = list(whole.values())
        del lengths["prompt"]
    return lengths


def _num_learned(encoded: EncodedTexts) -> int:
    """The tokens that the masks of all batches count."""
    total = 0
    for start in range(0, len(encoded), _ROWS_AT_ONCE):
        numbers = np.arange(start, min(start + _ROWS_AT_ONCE, len(encoded)))
        total += int(np.sum(comparison_batch(encoded, numbers, 1).response_mask))
    return total


def _words(text: Text) -> Sequence[Any]:
    return text.split() if isinstance(text, str) else text


def _problems(errors: Sequence[UserError]) -> list[str]:
    if not errors:
        return []
    lines = [f"    {escaped(line)}" for line in summary(errors)]
    return [f"  problems: {len(errors)}", *lines]


def _dropped(file: _File) -> list[str]:
    lines = []
    for reason, sources in file.found.places.items():
        lines += _finding(f"dropped, {reason}", sources)
    return lines


def _finding(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    shown = [f"  {title}: {len(lines)}"]
    shown += [f"    {escaped(line)}" for line in lines[:NUM_PLACES]]
    if len(lines) > NUM_PLACES:
        shown.append(f"    and {len(lines) - NUM_PLACES} more")
    return shown


def _spread(title: str, lengths: list[int]) -> str:
    median = np.median(lengths)
    most = np.percentile(lengths, 95, method="inverted_cdf")
    return f"  {title}: median {median:g}, 95% up to {most:g}, longest {max(lengths)}"


def _render_row(
    row: Row,
    tokenizer: Tokenizer | None,
    limit: int | None = None,
) -> str:
    """One row with its place, each text under its name; of a text at most ``limit`` characters."""
    texts = dict(zip(answer_names(row), row.responses, strict=True))
    if not row.is_plain_text:
        prompt = chat.shown(row, tokenizer) if tokenizer else row.prompt
        texts = {"prompt": prompt, **texts}
    lines = [row.source]
    for name, text in texts.items():
        whole = _as_text(text, tokenizer)
        shown = escaped(whole[:limit])
        if len(whole) > len(whole[:limit]):
            shown += " ..."
        lines += [f"  {name}:", *(f"    | {line}" for line in shown.split("\n"))]
    if row.votes:
        lines.append(f"  votes: {', '.join(map(str, row.votes))}")
    for key, value in row.columns.items():
        lines.append(f"  {escaped(key)}: {escaped(repr(value)[:limit])}")
    if row.weight is not None:
        lines.append(f"  weight: {row.weight:.3g}")
    return "\n".join(lines)


def answer_names(row: Row) -> list[str]:
    """The names of a row's responses."""
    numbers = range(len(row.responses))
    if row.votes:
        return ["response 1", "response 2"]
    if row.targets is not None:
        return [f"response {i} (target {row.targets[i]:g})" for i in numbers]
    if row.is_pair:
        return ["chosen", "rejected"]
    if len(numbers) == 1:
        return ["response"]
    names = [f"response {i}" for i in numbers]
    if row.best is not None:
        names[row.best] += " (best)"
    return names


def _as_text(text: Text, tokenizer: Tokenizer | None) -> str:
    if isinstance(text, str):
        return text
    return tokenizer.decode(text) if tokenizer else f"token ids {' '.join(map(str, text))}"
