"""Reports on data files and their mistakes, as text: `rlhf-jax data check` and `rlhf-jax data
preview`. They show the rows that runs read (`formats.load`, `formats.parse_all`).

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
from typing import NamedTuple

import numpy as np

from rlhf_jax.data import chat, forms
from rlhf_jax.data.encoding import encode_texts, pieces, prompt_ids, spelled
from rlhf_jax.data.formats import (
    FILES,
    KNOWN,
    UNKNOWN,
    ReadResult,
    check_labels,
    form_of,
    framed,
    keys_read,
    load,
    mixed,
    parse_all,
)
from rlhf_jax.data.rows import Fields, Kind, OnBadRow, Record, Row, Text, places, summary
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.data.verified import reward_lines
from rlhf_jax.errors import UserError, escaped
from rlhf_jax.graders.verifiable import DEFAULT, Settings

NUM_PLACES = 5  # places that the report names for each finding in a file
_EXAMPLE = 200  # characters of a text that a report shows
_ANSWERS = "prompt, responses, best or ranking or ranks or targets"
_KNOWN = " | ".join([_ANSWERS, *map(", ".join, list(forms.OURS)[1:])])
_PUBLIC = f"or of a public form: {', '.join(form.name for form in forms.FORMS)}"


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
    found: ReadResult


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
    texts: list[str] = []
    num_problems = 0
    num_warnings = 0
    rows_of: dict[str, list[Row]] = {}
    for path in paths:
        tested: list[str] = []
        try:
            file = _read(path, tokenizer, kind, columns, on_bad_row)
            for entry in reward:
                tested += reward_lines(entry, file.found, math, on_bad_row)
        except UserError as error:
            nothing = ReadResult([], errors=[error])
            file = _File(f"{path}: unreadable, 0 rows", kind or "demonstrations", [], nothing)
            tested = []
        lines, warnings = _describe(path, file, tokenizer)
        texts.append("\n".join([*lines, *tested]))
        rows_of[path] = file.found.rows
        num_problems += len(file.found.errors)
        num_warnings += warnings + sum(line.startswith("  warning") for line in tested)
    for (name, first), (other, second) in itertools.combinations(rows_of.items(), 2):
        prompts = {row.prompt for row in first} & {row.prompt for row in second}
        whole = {row.texts for row in first}
        num_same = sum(row.texts in whole for row in second)
        shares = f"{other} shares {len(prompts)} prompts with {name}"
        texts.append(f"{shares}; {num_same} of its {len(second)} rows are in that file too")
    if num_problems or num_warnings:
        stops = "; a run would stop" if num_problems else ""
        texts.append(f"problems: {num_problems}, warnings: {num_warnings}{stops}")
    else:
        texts.append("no problems")
    return Report("\n\n".join(texts), num_problems)


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
    findings = "\n".join([*_problems(file.found), *_dropped(file.found)])
    return "\n\n".join(filter(None, [f"{file.head}, {file.kind}", *shown, findings]))


def _read(
    name: str,
    tokenizer: Tokenizer | None,
    kind: Kind | None,
    columns: Sequence[str],
    on_bad_row: OnBadRow,
) -> _File:
    """The rows of a file, of the given or the likely kind."""
    sources, records, _ = load(kind, name, columns)
    [source] = sources.values()
    if kind is None:
        of_names: dict[str, Kind] = {file: kind for kind, file in FILES.items()}
        kinds = [form_of(record.value).kind for record in records]
        counts = Counter(kind for kind in kinds if kind is not None)
        likely: Kind = max(counts, key=counts.__getitem__, default="demonstrations")
        kind = of_names.get(Path(name).name, likely)
    template = chat.template_of(tokenizer, chat.AUTO)
    found = parse_all(kind, records, template, on_bad_row)
    return _File(f"{name}: {source.format}, {len(source.records)} rows", kind, records, found)


def _describe(name: str, file: _File, tokenizer: Tokenizer | None) -> tuple[list[str], int]:
    """The lines on a file, and its number of warnings. Errors of labels and tokens are added to
    ``found.errors``.
    """
    found = file.found
    rows = found.rows
    lengths: dict[str, list[int]] = {}
    try:
        check_labels(rows)
        lengths = _lengths(rows, tokenizer) if rows else {}
    except UserError as error:
        found.errors.append(error)
    lines = [f"{file.head}, {len(rows)} {file.kind} kept"]
    counts = Counter(found.forms.values())
    if counts:
        counted = [f"{count} of {form}" for form, count in counts.most_common()]
        lines.append(f"  rows: {'; '.join(counted)}")
    if set(counts) == {UNKNOWN.name}:
        lines.append(f"  a row must have the keys of one of these: {_KNOWN}; {_PUBLIC}")
    warnings = _slips(file)
    if tokenizer is not None:
        warnings.append(spelled(rows, tokenizer))
        is_chat = chat.frame(chat.AUTO, tokenizer) is None
        warnings.append(framed(rows) if is_chat else mixed(rows))
    warnings = [f"  warning: {warning}" for warning in warnings if warning]
    lines += [*_problems(found), *warnings]
    unread = found.describe_unread(file.kind)
    if unread:
        lines.append(f"  {escaped(unread)}")
    lines += [*_dropped(found), *_repeats(rows, name)]
    learned = lengths.pop("", None)
    if learned:
        lines.append(f"  tokens: {learned[1]:,}, of which {learned[0]:,} are learned")
    unit = "tokens" if tokenizer else "words"
    for text, of_text in lengths.items():
        most = np.percentile(of_text, 95, method="inverted_cdf")
        spread = f"median {np.median(of_text):g}, 95% up to {most:g}, longest {max(of_text)}"
        lines.append(f"  {unit} of a {text}: {spread}")
    if rows:
        lines.append("  examples:")
    lines += [_render_row(row, tokenizer, _EXAMPLE) for row in rows[:3]]
    return lines, len(warnings)


def _slips(file: _File) -> list[str]:
    """Sentences on keys that look misspelled. Rows with a problem do not count."""
    bad = {getattr(error, "source", None) for error in file.found.errors}
    slips = defaultdict[str, list[str]](list)
    for record in file.records:
        row = record.value
        if record.source not in bad and isinstance(row, dict):
            read = keys_read(row, file.kind)
            for key in row.keys() - read:
                slips[_slip(key, row, read)].append(record.source)
    slips.pop("", None)
    return sorted(
        f"{slip} ({len(sources)} rows: {places(sources)})" for slip, sources in slips.items()
    )


def _slip(key: str, row: Fields, read: set[str]) -> str:
    """A sentence if the key looks like a known key that the row lacks, else ""."""
    of_steps = () if "steps" in row else ("labels",)  # a label of anything else is a column
    missing = [known for known in KNOWN if known not in row and known not in of_steps]
    name = key.strip().lower()
    name = "response" if name == "output" else name
    near = difflib.get_close_matches(name, missing, n=1, cutoff=0.85)
    near = near or forms.meant(key, tuple(row))
    if near:
        return f"the key {key!r} is not read; did you mean {near[0]!r}?"
    if key in forms.PAIR and read == {"prompt"}:
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
    if tokenizer is None:
        texts = {
            "prompt": [row.prompt for row in rows if not row.is_plain_text],
            "response": [text for row in answered for text in row.responses],
        }
        counts = {
            name: [len(text.split() if isinstance(text, str) else text) for text in texts[name]]
            for name in texts
        }
        return {name: lengths for name, lengths in counts.items() if lengths}
    if not answered:
        return {"prompt": list(map(len, prompt_ids(rows, tokenizer, chat.AUTO)))}
    is_text = answered[0].is_plain_text
    template = "{prompt}" if is_text else chat.AUTO
    cut = pieces(answered, tokenizer, sys.maxsize) if is_text else answered
    encoded = encode_texts(cut, tokenizer, template=template)
    num_masked = sum(int((counts == 0).sum()) for counts in encoded.learned.values())
    learned = int(encoded.response_lengths.sum()) - num_masked
    lengths = {
        "prompt": encoded.starts[:, 0].tolist(),
        "response": encoded.response_lengths[encoded.lengths > 0].tolist(),
        "": [learned, int(encoded.lengths.sum())],
    }
    if is_text:  # a piece of it begins with the last token of the piece before
        whole = Counter({row.source: 1 for row in answered})
        for source, length in zip(encoded.sources, lengths["response"], strict=True):
            whole[source.rpartition(", piece ")[0]] += length
        lengths["response"] = list(whole.values())
        del lengths["prompt"]
    return lengths


def _problems(found: ReadResult) -> list[str]:
    lines = [f"    {escaped(line)}" for line in summary(found.errors)]
    return [f"  problems: {len(found.errors)}", *lines] if lines else []


def _dropped(found: ReadResult) -> list[str]:
    lines = []
    for reason, sources in found.places.items():
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


def _render_row(row: Row, tokenizer: Tokenizer | None, limit: int | None = None) -> str:
    """One row with its place, each text under its name; of a text at most ``limit`` characters."""
    texts = dict(zip(answer_names(row), row.responses, strict=True))
    if not row.is_plain_text:
        prompt = chat.shown(row, tokenizer) if tokenizer else row.prompt
        texts = {"prompt": prompt, **texts}
    lines = [row.source]
    for name, text in texts.items():
        whole: str
        if isinstance(text, str):
            whole = text
        else:
            whole = tokenizer.decode(text) if tokenizer else f"token ids {' '.join(map(str, text))}"
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
