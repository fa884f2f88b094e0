"""What data files hold and what is wrong with them, as text: `rlhf-jax data check` and `rlhf-jax
data preview`.

A problem is what would stop a run from reading the file. All are found, each with its place, not
the first one only. A warning is a key that looks like a slip, so that the rows are read as
something else. Duplicates, dropped rows and overlap between files do not stop a run; they are
counted and placed.
"""

import difflib
import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.data import chat, formats
from rlhf_jax.data.columns import adapted, unused
from rlhf_jax.data.encoding import prompt_ids, response_ids
from rlhf_jax.data.files import read_source
from rlhf_jax.data.rows import Kind, OnBadRow, Record, Row, Text, places, summary
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
    """The text to print, and how many rows or files have a problem: a run can read the files if
    there is none.
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
) -> Report:
    """Reads every file to its end: problems, dropped rows, duplicates, lengths, examples, and what
    files share.

    Args:
      tokenizer: counts lengths in its tokens, renders messages by its chat template and decodes
        examples that are token ids; None: words and `chat.PLAIN`.
      kind: what the rows should be; None takes what the pipeline's name of the file says, or else
        what most rows are, so that the others are problems.
      columns, on_bad_row: as `formats.read`.
    """
    if not paths:
        raise UserError("no data file given")
    texts, num_problems, num_warnings, rows_of = [], 0, 0, dict[str, list[Row]]()
    for path in paths:
        try:
            file = _read(path, tokenizer, kind, columns, on_bad_row)
        except UserError as error:
            nothing = formats.ReadResult([], errors=[error])
            file = _File(f"{path}: unreadable, 0 rows", kind or "demonstrations", [], nothing)
        text, warnings = _describe(path, file, tokenizer)
        texts.append(text)
        rows_of[path] = file.found.rows
        num_problems, num_warnings = num_problems + len(file.found.errors), num_warnings + warnings
    for (name, first), (other, second) in itertools.combinations(rows_of.items(), 2):
        prompts = {row.prompt for row in first} & {row.prompt for row in second}
        wholes = {row.texts for row in first}
        same = sum(row.texts in wholes for row in second)
        shares = f"{other} shares {len(prompts)} prompts with {name}"
        texts.append(f"{shares}; {same} of its {len(second)} rows stand there too")
    numbers = ((num_problems, "problem"), (num_warnings, "warning"))
    counted = ", ".join(f"{n} {what}{'s' * (n != 1)}" for n, what in numbers if n) or "no problems"
    return Report(
        "\n\n".join([*texts, counted + ": a run would stop" * bool(num_problems)]), num_problems
    )


def preview(
    path: str,
    tokenizer: Tokenizer | None = None,
    count: int = 3,
    *,
    kind: Kind | None = None,
    columns: Sequence[str] = (),
) -> str:
    """The first ``count`` rows in full, as a run would read them, messages rendered, and what is
    wrong with others.

    kind, columns: as `check`.

    Raises:
      UserError: for a file that cannot be read.
    """
    file = _read(path, tokenizer, kind, columns)
    shown = [_render_row(row, tokenizer) for row in file.found.rows[:count]]
    findings = "\n".join([*_problems(file.found.errors), *_dropped(file.found.places)])
    return "\n\n".join(filter(None, [f"{file.head}, {file.kind}", *shown, findings]))


def _read(
    name: str,
    tokenizer: Tokenizer | None,
    kind: Kind | None = None,
    columns: Any = (),
    on_bad_row: OnBadRow = "error",
) -> _File:
    """The rows, of the kind that the pipeline's name of the file says, or else that most records
    are.
    """
    source = read_source(name, whole_text=kind == "demonstrations")
    if unused_columns := unused(source.records, columns):
        raise UserError("\n".join(unused_columns.values()))
    records = adapted(source.records, columns)
    named: list[Kind] = [kind for kind, file in formats.FILES.items() if file == Path(name).name]
    kinds = Counter(form[0] for record in records if (form := formats.form_of(record.value)))
    kind = kind or [*named[-1:], *(kind for kind, _ in kinds.most_common(1)), "demonstrations"][0]
    template = chat.template_of(tokenizer, chat.AUTO)
    found = formats.parse_all(kind, records, template, on_bad_row)
    return _File(f"{name}: {source.format}, {len(source.records)} rows", kind, records, found)


def _describe(name: str, file: _File, tokenizer: Tokenizer | None) -> tuple[str, int]:
    """What is to be said of a file, and its number of warnings; faults of labels and tokens join
    ``found.errors``.
    """
    rows, errors = file.found.rows, file.found.errors
    lengths: dict[str, list[int]] = {}
    try:
        formats.check_labels(rows)
        lengths = _lengths(rows, tokenizer)
    except UserError as error:
        errors.append(error)
    values = [record.value for record in file.records if not isinstance(record.value, Exception)]
    forms = Counter((formats.form_of(value) or ("", _UNKNOWN))[1] for value in values)
    counted = "; ".join(f"{count} of {form}" for form, count in forms.most_common())
    bad = {getattr(error, "source", None) for error in errors}
    unread, warnings = _unread(
        [record for record in file.records if record.source not in bad], file.kind
    )
    lines = [f"{file.head}, {len(rows)} {file.kind} kept", *[f"  rows: {counted}"] * bool(forms)]
    lines += [f"  a row must have the keys of one of these: {_KNOWN}"] * (set(forms) == {_UNKNOWN})
    lines += [
        *_problems(errors),
        *warnings,
        *unread,
        *_dropped(file.found.places),
        *_repeats(rows, name),
    ]
    for text, counts in lengths.items():
        lines += _histogram(f"{'tokens' if tokenizer else 'words'} of a {text}", counts)
    lines += ["  examples:"] * bool(rows) + [
        _render_row(row, tokenizer, _EXAMPLE) for row in rows[:3]
    ]
    return "\n".join(lines), len(warnings)


def _unread(records: Sequence[Record], kind: Kind) -> tuple[list[str], list[str]]:
    """Which keys reach nothing but a reward, or no stage at all, and warnings of keys that look
    like slips.
    """
    others, slips = Counter[str](), defaultdict[str, list[str]](list)
    for record in [record for record in records if isinstance(record.value, dict)]:
        read = formats.keys_read(record.value)
        absent = [known for known in formats.KNOWN if known not in record.value]
        for key in [key for key in record.value if key not in read]:
            name = key.strip().lower()
            near = difflib.get_close_matches(_ALIASES.get(name, name), absent, n=1, cutoff=0.85)
            if near or (key in formats.PAIR and read == {"prompt"}):
                slip = f"the key {key!r} is not read" + (
                    f"; did you mean {near[0]!r}?" if near else ""
                )
                slips[f"{slip}, beside {', '.join(sorted(read)) or 'no other'}"].append(
                    record.source
                )
            others[key] += 1
    title = "columns for the reward" if kind == "prompts" else "keys that training does not read"
    counted = ", ".join(f"{_printable(key)} ({count} rows)" for key, count in others.most_common())
    warnings = [
        f"  warning: {slip} ({len(sources)} rows: {places(sources)})"
        for slip, sources in slips.items()
    ]
    return [f"  {title}: {counted}"] * bool(others), warnings


def _repeats(rows: list[Row], name: str) -> list[str]:
    """Rows, and pairs with the opposite preference, that were there before."""
    seen: dict[tuple[Text, ...], str] = {}
    duplicates, opposites = list[str](), list[str]()
    for row in rows:
        if row.texts in seen:
            duplicates.append(f"{row.source} repeats {seen[row.texts]}")
        if row.is_pair and (other := seen.get((row.prompt, *row.responses[::-1]))):
            opposites.append(f"{row.source} prefers what {other} rejects")
        seen.setdefault(row.texts, row.source.removeprefix(f"{name}, "))
    return [*_finding("duplicates", duplicates), *_finding("opposite preferences", opposites)]


def _lengths(rows: list[Row], tokenizer: Tokenizer | None) -> dict[str, list[int]]:
    """Of prompts and responses: in tokens, EOS included, or in words (of token ids: tokens)."""
    texts: dict[str, Sequence[Any]] = {"prompt": [row.prompt for row in rows]}
    texts["response"] = [text for row in rows for text in row.responses]
    if tokenizer is not None:
        responses = itertools.chain.from_iterable(response_ids(rows, tokenizer))
        texts = {"prompt": prompt_ids(rows, tokenizer, chat.AUTO), "response": list(responses)}
    return {
        name: [len(x.split() if isinstance(x, str) else x) for x in own]
        for name, own in texts.items()
        if own
    }


def _problems(errors: Sequence[UserError]) -> list[str]:
    lines = [f"    {_printable(line)}" for line in summary(errors)]
    return [f"  problems: {len(errors)}"] * bool(errors) + lines


def _dropped(left_out: dict[str, list[str]]) -> list[str]:
    return [
        line
        for reason, sources in left_out.items()
        for line in _finding(f"dropped, {reason}", sources)
    ]


def _finding(title: str, lines: Sequence[str]) -> list[str]:
    shown = [f"    {_printable(line)}" for line in lines[:NUM_PLACES]]
    more = [f"    and {len(lines) - NUM_PLACES} more"] * (len(lines) > NUM_PLACES)
    return [f"  {title}: {len(lines)}", *shown, *more] if lines else []


def _histogram(title: str, lengths: list[int]) -> list[str]:
    longest, p95 = max(lengths), np.percentile(lengths, 95, method="inverted_cdf")
    lines = [f"  {title}: median {np.median(lengths):g}, 95% up to {p95:g}, longest {longest}"]
    # At most ten bins whose width is 1, 2 or 5 times a power of ten.
    width = next(
        step * 10**power
        for power in range(20)
        for step in (1, 2, 5)
        if step * 10**power * 10 > longest
    )
    counts = np.bincount(np.array(lengths) // width)
    digits = len(str(len(counts) * width))
    for low, count in zip(range(0, longest + 1, width), counts, strict=True):
        span = f"{low:{digits}}" + (f" to {low + width - 1:{digits}}" if width > 1 else "")
        bar = "#" * max(round(_BAR * count / counts.max()), int(count > 0))
        lines.append(f"    {span} {count:8} {bar}".rstrip())
    return lines


def _render_row(row: Row, tokenizer: Tokenizer | None = None, limit: int | None = None) -> str:
    """One row with its place, each text under its name; ``limit`` characters of a text."""
    names = [f"response {i}" for i in range(len(row.responses))]
    if row.votes:
        names = ["response 1", "response 2"]
    elif len(names) == 1 and row.targets is None:
        names = ["response"]
    elif row.is_pair and row.best is None:
        names = ["chosen", "rejected"]
    if row.targets is not None:
        names = [
            f"{name} (target {target:g})" for name, target in zip(names, row.targets, strict=True)
        ]
    if row.best is not None:
        names[row.best] += " (best)"
    notes = [f"  votes: {', '.join(map(str, row.votes))}"] * bool(row.votes)
    notes += [
        f"  {_printable(key)}: {_printable(repr(value))}" for key, value in row.columns.items()
    ]
    notes += [] if row.weight is None else [f"  weight: {row.weight:.3g}"]
    texts = []
    prompt = chat.shown(row, tokenizer) if tokenizer else row.prompt
    for name, text in zip(("prompt", *names), (prompt, *row.responses), strict=True):
        if not isinstance(text, str):
            text = tokenizer.decode(text) if tokenizer else f"token ids {' '.join(map(str, text))}"
        shown = _printable(text[:limit]) + (
            " ..." if limit is not None and len(text) > limit else ""
        )
        texts += [f"  {name}:", *(f"    | {line}" for line in shown.split("\n"))]
    return "\n".join([row.source, *texts, *notes])


def _printable(text: str) -> str:
    """Control characters, which a terminal might obey, as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
