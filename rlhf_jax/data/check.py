"""What data files hold and what is wrong with them, as text: `rlhf-jax data check` and `rlhf-jax data preview`.

A problem is what would stop a run from reading the file. All are found, each with its place, not the first one only.
A warning is a key that looks like a slip, so that the rows are read as something else. Duplicates, dropped rows and
overlap between files do not stop a run; they are counted and placed.
"""

import difflib
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import chat, formats
from rlhf_jax.data.columns import adapted
from rlhf_jax.data.encoding import prompt_ids, response_ids
from rlhf_jax.data.files import Source, read_source
from rlhf_jax.data.rows import (
    Annotated,
    BadRow,
    Comparison,
    Kind,
    OnBadRow,
    Pair,
    Prompt,
    Record,
    Row,
    Text,
    parts,
    places,
    summary,
)
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError

NUM_PLACES = 5  # that are named of each finding in a file
_EXAMPLE = 200  # characters of a text that a report shows
_BAR = 40  # characters of the highest bar
_UNKNOWN = "no known form"
_ANSWERS = ("prompt, responses, best or ranking or ranks or targets", "query, sample0, ..., best")
_ALIASES = {"completion": "response", "output": "response"}
_KNOWN = " | ".join([*map(", ".join, formats.FORMATS), *_ANSWERS])


class Report(NamedTuple):
    """The text to print, and how many rows or files have a problem: a run can read the files if there is none."""

    text: str
    num_problems: int


class _File(NamedTuple):
    rows: list[Row]  # that a run would read
    num_problems: int
    num_warnings: int
    text: str


def check(
    paths: Sequence[str],
    tokenizer: Tokenizer | None = None,
    kind: Kind | None = None,
    columns: Sequence[str] = (),
    on_bad_row: OnBadRow = "error",
) -> Report:
    """Reads every file to its end: problems, dropped rows, duplicates, lengths, examples, and what files share.

    Args:
      tokenizer: counts lengths in its tokens, renders messages by its chat template and decodes examples that are token
        ids; None: words and `chat.PLAIN`.
      kind: what the rows should be; None takes what the pipeline's name of the file says, or else what most rows are,
        so that the others are problems.
      columns, on_bad_row: as `formats.read`.
    """
    if not paths:
        raise UserError("no data file given")
    files = {path: _check_file(path, tokenizer, kind, columns, on_bad_row) for path in paths}
    texts = [file.text for file in files.values()]
    for (name, first), (other, second) in itertools.combinations(files.items(), 2):
        prompts = {row.prompt for row in first.rows} & {row.prompt for row in second.rows}
        wholes = set(map(parts, first.rows))
        same = sum(parts(row) in wholes for row in second.rows)
        shares = f"{other} shares {len(prompts)} prompts with {name}"
        texts.append(f"{shares}; {same} of its {len(second.rows)} rows stand there too")
    problems, warnings = (sum(column) for column in list(zip(*files.values(), strict=True))[1:3])
    counted = [f"{n} {what}{'s' * (n != 1)}" for n, what in ((problems, "problem"), (warnings, "warning")) if n]
    texts.append((", ".join(counted) or "no problems") + ": a run would stop" * bool(problems))
    return Report("\n\n".join(texts), problems)


def preview(
    path: str, tokenizer: Tokenizer | None = None, kind: Kind | None = None, count: int = 3, columns: Sequence[str] = ()
) -> str:
    """The first ``count`` rows in full, as a run would read them, messages rendered, and what is wrong with others.

    Raises:
      UserError: for a file that cannot be read.
    """
    source = read_source(path)
    kind, found = _parse(path, adapted(source.records, columns), tokenizer, kind)
    head = f"{path}: {source.format}, {len(source.records)} rows, {kind}"
    shown = [_render_row(row, tokenizer) for row in found.rows[:count]]
    findings = "\n".join([*_problems(found.errors), *_dropped(found.places)])
    return "\n\n".join([head, *shown, *[findings] * bool(findings)])


def _parse(
    name: str, records: list[Record], tokenizer: Tokenizer | None, kind: Kind | None, on_bad_row: OnBadRow = "error"
) -> tuple[Kind, formats.Parsed]:
    """The rows, of the kind that the pipeline's name of the file says, or else that most records are."""
    named: list[Kind] = [kind for kind, file in formats.FILES.items() if file == Path(name).name]
    kinds = Counter(form[0] for record in records if (form := formats.form_of(record.value)))
    kind = kind or [*named[-1:], *(kind for kind, _ in kinds.most_common(1)), "demonstrations"][0]
    return kind, formats.parse_all(kind, records, chat.template_of(tokenizer), on_bad_row)


def _check_file(
    name: str, tokenizer: Tokenizer | None, kind: Kind | None, columns: Sequence[str], on_bad_row: OnBadRow
) -> _File:
    source, records, errors = Source([], "", "unreadable"), list[Record](), list[UserError]()
    try:
        source = read_source(name)
        records = adapted(source.records, columns)
    except UserError as error:
        errors.append(error)
    kind, found = _parse(name, records, tokenizer, kind, on_bad_row)
    errors += found.errors
    lengths: dict[str, list[int]] = {}
    try:
        formats.check_labels(found.rows)
        lengths = _lengths(found.rows, tokenizer)
    except UserError as error:
        errors.append(error)
    values = [record.value for record in records if not isinstance(record.value, Exception)]
    forms = Counter((formats.form_of(value) or ("", _UNKNOWN))[1] for value in values)
    counted = "; ".join(f"{count} of {form}" for form, count in forms.most_common())
    lines = [f"{name}: {source.format}, {len(source.records)} rows, {len(found.rows)} {kind} kept"]
    lines += [f"  rows: {counted}"] * bool(forms)
    lines += [f"  a row must have the keys of one of these: {_KNOWN}"] * (set(forms) == {_UNKNOWN})
    bad = {error.source for error in errors if isinstance(error, BadRow)}
    unread, warnings = _unread([record for record in records if record.source not in bad], kind)
    lines += [*_problems(errors), *warnings, *unread, *_dropped(found.places), *_repeats(found.rows, name)]
    for text, counts in lengths.items():
        lines += _histogram(f"{'tokens' if tokenizer else 'words'} of a {text}", counts)
    lines += ["  examples:"] * bool(found.rows) + [_render_row(row, tokenizer, _EXAMPLE) for row in found.rows[:3]]
    return _File(found.rows, len(errors), len(warnings), "\n".join(lines))


def _unread(records: Sequence[Record], kind: Kind) -> tuple[list[str], list[str]]:
    """Which keys reach nothing but a reward, or no stage at all, and warnings of keys that look like slips."""
    others: Counter[str] = Counter()
    slips: dict[str, list[str]] = {}
    for record in records:
        read = formats.keys_read(record.value)
        for key in [key for key in record.value if key not in read] if isinstance(record.value, dict) else ():
            near = _near(key, [known for known in formats.KNOWN if known not in record.value])
            if near or (key in formats.PAIR and read == {"prompt"}):
                slip = f"the key {key!r} is not read" + (f"; did you mean {near!r}?" if near else "")
                slips.setdefault(f"{slip}, beside {', '.join(sorted(read)) or 'no other'}", []).append(record.source)
            others[key] += 1
    title = "columns for the reward" if kind == "prompts" else "keys that training does not read"
    counted = ", ".join(f"{_printable(key)} ({count} rows)" for key, count in others.most_common())
    warnings = [f"  warning: {slip} ({len(sources)} rows: {places(sources)})" for slip, sources in slips.items()]
    return [f"  {title}: {counted}"] * bool(others), warnings


def _near(key: str, known: Sequence[str]) -> str | None:
    """The key of ours that was likely meant."""
    name = key.strip().lower()
    return next(iter(difflib.get_close_matches(_ALIASES.get(name, name), known, n=1, cutoff=0.85)), None)


def _repeats(rows: list[Row], name: str) -> list[str]:
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
    return [*_finding("duplicates", duplicates), *_finding("opposite preferences", opposites)]


def _lengths(rows: list[Row], tokenizer: Tokenizer | None) -> dict[str, list[int]]:
    """Of prompts and responses: in tokens, EOS included, or in words (of token ids: tokens)."""
    texts: dict[str, list[Any]] = {"prompt": [row.prompt for row in rows]}
    texts["response"] = [text for row in rows for text in parts(row)[1:]]
    if tokenizer is not None:
        texts["prompt"] = prompt_ids(rows, tokenizer, "{prompt}")
        texts["response"] = [ids for responses in response_ids(rows, tokenizer) for ids in responses]
    lengths = {name: [len(text.split() if isinstance(text, str) else text) for text in texts[name]] for name in texts}
    return {name: counts for name, counts in lengths.items() if counts}


def _problems(errors: Sequence[UserError]) -> list[str]:
    lines = [f"    {_printable(line)}" for line in summary(errors)]
    return [f"  problems: {len(errors)}", *lines] if errors else []


def _dropped(left_out: dict[str, list[str]]) -> list[str]:
    return [line for reason, sources in left_out.items() for line in _finding(f"dropped, {reason}", sources)]


def _finding(title: str, lines: Sequence[str]) -> list[str]:
    shown = [f"    {_printable(line)}" for line in lines[:NUM_PLACES]]
    more = [f"    and {len(lines) - NUM_PLACES} more"] * (len(lines) > NUM_PLACES)
    return [f"  {title}: {len(lines)}", *shown, *more] if lines else []


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
    if isinstance(row, Annotated):
        names, notes = ["prompt", "response 1", "response 2"], [f"  votes: {', '.join(map(str, row.votes))}"]
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
