"""What data files hold and what is wrong with them, as text: `rlhf-jax data check` and `rlhf-jax data preview`.

A problem is what would stop a run from reading the file. All are found, each with its place, not the first one only.
Duplicates, dropped rows and overlap between files do not stop a run; they are counted and placed.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import chat, formats
from rlhf_jax.data.encoding import prompt_ids, response_ids
from rlhf_jax.data.files import Source, read_source
from rlhf_jax.data.formats import Kind
from rlhf_jax.data.rows import Comparison, Drop, Pair, Prompt, Record, Row, Text, parts
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError

NUM_PROBLEMS = 20  # that are named, of each file
NUM_PLACES = 5  # that are named of each other finding in a file
_EXAMPLE = 200  # characters of a text that a report shows
_BAR = 40  # characters of the highest bar
_UNKNOWN = "no known form"
_ANSWERS = ("prompt, responses, best or ranking or ranks or targets", "query, sample0, ..., best")
_KNOWN = " | ".join([*map(", ".join, formats.FORMATS), *_ANSWERS])


class Report(NamedTuple):
    """The text to print, and how many problems were found: a run can read the files if there is none."""

    text: str
    num_problems: int


class _File(NamedTuple):
    name: str
    rows: list[Row]  # that a run would read
    problems: list[str]
    text: str


def check(paths: Sequence[str], tokenizer: Tokenizer | None = None, kind: Kind | None = None) -> Report:
    """Reads every file to its end: problems, dropped rows, duplicates, lengths, examples, and what files share.

    Args:
      tokenizer: counts lengths in its tokens, renders messages by its chat template and decodes examples that are token
        ids; None: words and `chat.PLAIN`.
      kind: what the rows should be; None takes what most rows of a file are, so that the others are problems.
    """
    if not paths:
        raise UserError("no data file given")
    files = [_check_file(path, tokenizer, kind) for path in paths]
    texts = [file.text for file in files]
    for first, second in itertools.combinations(files, 2):
        prompts = {row.prompt for row in first.rows} & {row.prompt for row in second.rows}
        wholes = set(map(parts, first.rows))
        same = sum(parts(row) in wholes for row in second.rows)
        shares = f"{second.name} shares {len(prompts)} prompts with {first.name}"
        texts.append(f"{shares}; {same} of its {len(second.rows)} rows stand there too")
    count = sum(len(file.problems) for file in files)
    texts.append(f"{count} problem{'s' * (count != 1)}: a run would stop at the first" if count else "no problems")
    return Report("\n\n".join(texts), count)


def preview(path: str, tokenizer: Tokenizer | None = None, kind: Kind | None = None, count: int = 3) -> str:
    """The first ``count`` rows in full, as a run would read them, messages rendered, and what is wrong with others.

    Raises:
      UserError: for a file that cannot be read.
    """
    source = read_source(path)
    kind = kind or _guess_kind(source.records)
    rows, findings = _parse(source.records, kind, tokenizer)
    head = f"{path}: {source.format}, {len(source.records)} rows, {kind}"
    found = [line for title, places in findings.items() for line in _finding(title, places)]
    return "\n\n".join(
        [head, *(_render_row(row, tokenizer) for row in rows[:count]), *["\n".join(found)] * bool(found)]
    )


def _guess_kind(records: list[Record]) -> Kind:
    """What most rows are; demonstrations if none is of a known form."""
    kinds = Counter(form[0] for record in records if (form := formats.form_of(record.value)))
    return kinds.most_common(1)[0][0] if kinds else "demonstrations"


def _parse(records: list[Record], kind: Kind, tokenizer: Tokenizer | None) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows that a run would read, and the places of problems and of dropped rows."""
    template = chat.template_of(tokenizer)
    rows: list[Row] = []
    findings: dict[str, list[str]] = {"problems": []}
    for record in records:
        try:
            rows += formats.parse(kind, record, template)
        except Drop as drop:
            findings.setdefault(f"dropped, {drop}", []).append(record.source)
        except UserError as error:
            findings["problems"].append(str(error))
    return rows, findings


def _check_file(name: str, tokenizer: Tokenizer | None, kind: Kind | None) -> _File:
    try:
        source = read_source(name)
    except UserError as error:
        source = Source([Record(error, name)], "", "unreadable")
    kind = kind or _guess_kind(source.records)
    rows, findings = _parse(source.records, kind, tokenizer)
    lengths: dict[str, list[int]] = {}
    try:
        formats.check_labels(rows)
        lengths = _lengths(rows, tokenizer)
    except UserError as error:
        findings["problems"].append(str(error))
    read = [record.value for record in source.records if not isinstance(record.value, UserError)]
    forms = Counter((formats.form_of(value) or ("", _UNKNOWN))[1] for value in read)
    counted = "; ".join(f"{count} of {form}" for form, count in forms.most_common()) or "none"
    lines = [f"{name}: {source.format}, {len(source.records)} rows, {len(rows)} {kind} kept", f"  rows: {counted}"]
    if not forms.keys() - {_UNKNOWN}:
        lines.append(f"  a row must have the keys of one of these: {_KNOWN}")
    for title, places in (findings | _repeats(rows, name)).items():
        lines += _finding(title, places)
    for text, counts in lengths.items():
        lines += _histogram(f"{'tokens' if tokenizer else 'words'} of a {text}", counts)
    lines += ["  examples:"] * bool(rows) + [_render_row(row, tokenizer, _EXAMPLE) for row in rows[:3]]
    return _File(name, rows, findings["problems"], "\n".join(lines))


def _repeats(rows: list[Row], name: str) -> dict[str, list[str]]:
    """Rows, and pairs with the opposite preference, that were there before."""
    seen: dict[tuple[Text, ...], str] = {}
    duplicates, opposites = [], []
    for row in rows:
        texts = parts(row)
        if texts in seen:
            duplicates.append(f"{row.source} repeats {seen[texts]}")
        if isinstance(row, Pair) and (other := seen.get((row.prompt, row.rejected, row.chosen))):
            opposites.append(f"{row.source} prefers what {other} rejects")
        seen.setdefault(texts, row.source.removeprefix(f"{name}, "))
    return {"duplicates": duplicates, "opposite preferences": opposites}


def _lengths(rows: list[Row], tokenizer: Tokenizer | None) -> dict[str, list[int]]:
    """Of prompts and responses: in tokens, EOS included, or in words (of token ids: tokens)."""
    texts: dict[str, list[Any]] = {"prompt": [row.prompt for row in rows]}
    texts["response"] = [text for row in rows for text in parts(row)[1:]]
    if tokenizer is not None:
        texts["prompt"] = prompt_ids(rows, tokenizer, "{prompt}")
        texts["response"] = [ids for responses in response_ids(rows, tokenizer) for ids in responses]
    lengths = {name: [len(text.split() if isinstance(text, str) else text) for text in texts[name]] for name in texts}
    return {name: counts for name, counts in lengths.items() if counts}


def _finding(title: str, places: list[str]) -> list[str]:
    if not places:
        return []
    shown = NUM_PROBLEMS if title == "problems" else NUM_PLACES
    lines = [f"  {title}: {len(places)}", *(f"    {_printable(place)}" for place in places[:shown])]
    return [*lines, f"    and {len(places) - shown} more"] if len(places) > shown else lines


def _histogram(title: str, lengths: list[int]) -> list[str]:
    longest = max(lengths)
    p95 = np.percentile(lengths, 95, method="inverted_cdf")
    lines = [f"  {title}: median {np.median(lengths):g}, 95% up to {p95:g}, longest {longest}"]
    # At most ten bins whose width is a round number.
    width = next(step * 10**power for power in range(20) for step in (1, 2, 5) if step * 10**power * 10 > longest)
    counts = np.bincount(np.array(lengths) // width)
    digits = len(str(len(counts) * width))
    for low, count in zip(range(0, longest + 1, width), counts, strict=True):
        span = f"{low:{digits}} to {low + width - 1:{digits}}" if width > 1 else f"{low:{digits}}"
        bar = "#" * max(round(_BAR * count / counts.max()), int(count > 0))
        lines.append(f"    {span} {count:8} {bar}".rstrip())
    return lines


def _render_row(row: Row, tokenizer: Tokenizer | None = None, limit: int | None = None) -> str:
    """One row with its place, each text under its name; ``limit`` characters of a text."""
    names = ["prompt", *(["chosen", "rejected"] if isinstance(row, Pair) else ["response"])]
    notes: list[str] = []
    if isinstance(row, Comparison):
        labels = [f" (target {target:g})" for target in row.targets or ()] or [""] * len(row.responses)
        if row.best is not None:
            labels[row.best] += " (best)"
        names = ["prompt", *(f"response {i}{label}" for i, label in enumerate(labels))]
    if isinstance(row, Prompt):
        notes += [f"  {_printable(key)}: {_printable(repr(value))}" for key, value in row.columns.items()]
    if isinstance(row, Pair | Comparison) and row.weight is not None:
        notes.append(f"  weight: {row.weight:.3g}")
    texts = [f"  {name}:\n{_indented(text, tokenizer, limit)}" for name, text in zip(names, parts(row), strict=False)]
    return "\n".join([row.source, *texts, *notes])


def _indented(text: Text, tokenizer: Tokenizer | None, limit: int | None) -> str:
    if not isinstance(text, str):
        text = tokenizer.decode(text) if tokenizer else f"token ids {' '.join(map(str, text))}"
    cut = limit is not None and len(text) > limit
    shown = _printable(text[:limit]) + (" ..." if cut else "")
    return "\n".join(f"    | {line}" for line in shown.split("\n"))


def _printable(text: str) -> str:
    """Control characters, which a terminal might obey, as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
