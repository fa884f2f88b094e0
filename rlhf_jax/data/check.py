"""What a data file holds and what is wrong with it, for `rlhf-jax data check`.

A problem is what would stop a run from reading the file, each with file and line, not the first one only. Duplicates,
dropped rows and overlap between files do not stop a run; they are counted and placed.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rlhf_jax.data import chat, readers, sources
from rlhf_jax.data.readers import Kind
from rlhf_jax.data.records import Record
from rlhf_jax.data.rows import Comparison, Demonstration, Drop, Pair, Prompt, Text, parts
from rlhf_jax.data.token_ids import prompt_ids, response_ids
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError

Row = Demonstration | Pair | Comparison | Prompt
UNKNOWN = "no known form"
NUM_PROBLEMS = 20  # that are named, of each file
NUM_PLACES = 5  # that are named of each other finding in a file


@dataclass(frozen=True)
class Finding:
    """Something found ``count`` times, with the first few places or messages."""

    count: int
    first: list[str]


class Lengths(NamedTuple):
    """Counts [bins] of texts of edges[i] up to, not including, edges[i + 1] units; and summary numbers."""

    counts: list[int]
    edges: list[int]
    median: float
    p95: int
    longest: int


@dataclass(frozen=True)
class FileReport:
    """What one file holds."""

    name: str
    format: str
    kind: Kind
    forms: dict[str, int]  # records by the keys that make their format
    num_records: int
    kept: int  # rows that a run would read
    dropped: dict[str, Finding]  # by reason
    problems: Finding
    duplicates: Finding  # rows that stand in the file before
    reversed: Finding  # pairs that stand in the file before with the opposite preference
    lengths: dict[str, Lengths]  # of prompts and responses
    examples: list[Row]


class Overlap(NamedTuple):
    """Prompts and whole rows of the second file that stand in the first too."""

    first: str
    second: str
    prompts: int
    rows: int
    num_rows: int  # of the second file


@dataclass(frozen=True)
class Report:
    """What `check` found. ``unit`` is what lengths are counted in."""

    files: list[FileReport]
    overlaps: list[Overlap]
    unit: str

    @property
    def num_problems(self) -> int:
        """Of all files; a run can read them if it is 0."""
        return sum(file.problems.count for file in self.files)


def check(paths: Sequence[str], tokenizer: Tokenizer | None = None, kind: Kind | None = None) -> Report:
    """Reads every file to its end.

    Args:
      tokenizer: counts lengths in its tokens and renders messages by its chat template; None: words and `chat.PLAIN`.
      kind: what the rows should be; None takes what most rows of a file are, so that the others are problems.
    """
    if not paths:
        raise UserError("no data file given")
    checked = [_file(path, tokenizer, kind) for path in paths]
    prompts = [{row_parts[0] for row_parts in map(parts, rows)} for _, rows in checked]
    wholes = [set(map(parts, rows)) for _, rows in checked]
    overlaps = [
        Overlap(
            first=checked[i][0].name,
            second=checked[j][0].name,
            prompts=len(prompts[i] & prompts[j]),
            rows=sum(parts(row) in wholes[i] for row in checked[j][1]),
            num_rows=len(checked[j][1]),
        )
        for j in range(len(checked))
        for i in range(j)
    ]
    return Report([file for file, _ in checked], overlaps, "tokens" if tokenizer else "words")


def guess_kind(records: list[Record]) -> Kind:
    """What most rows are; if none is of a known form, what the keys of the first come nearest to."""
    kinds = Counter(form[0] for record in records if (form := readers.form(record.value)))
    if kinds:
        return kinds.most_common(1)[0][0]
    keys = records[0].value if records and isinstance(records[0].value, dict) else {}
    expected: dict[Kind, tuple[str, ...]] = {
        "demonstrations": ("prompt", "response"),
        "comparisons": ("prompt", "chosen", "rejected"),
        "prompts": ("prompt",),
    }

    def nearness(kind: Kind) -> float:
        near = [bool(difflib.get_close_matches(key, keys, n=1)) for key in expected[kind]]
        return sum(near) - 0.5 * len(near)

    return max(expected, key=nearness)


def _file(name: str, tokenizer: Tokenizer | None, kind: Kind | None) -> tuple[FileReport, list[Row]]:
    problems: list[str] = []
    try:
        source = sources.read_source(name, fault=lambda error: problems.append(str(error)))
    except UserError as error:
        source, problems = sources.Source([], "", "unreadable"), [*problems, str(error)]
    found = [readers.form(record.value) for record in source.records]
    kind = kind or guess_kind(source.records)
    rows, dropped = _rows(source.records, kind, tokenizer, problems)
    duplicates, contradictions = _repeats(rows, name)
    lengths = {}
    if rows:
        try:
            lengths = _text_lengths(rows, tokenizer)
        except UserError as error:
            problems.append(str(error))
    report = FileReport(
        name=name,
        format=source.format,
        kind=kind,
        forms=dict(Counter(form[1] if form else UNKNOWN for form in found).most_common()),
        num_records=len(source.records),
        kept=len(rows),
        dropped={reason: _finding(places) for reason, places in dropped.items()},
        problems=_finding(problems, NUM_PROBLEMS),
        duplicates=duplicates,
        reversed=contradictions,
        lengths=lengths,
        examples=rows[:3],
    )
    return report, rows


def _rows(
    records: list[Record], kind: Kind, tokenizer: Tokenizer | None, problems: list[str]
) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows of the kind, and the places of dropped records by reason; adds to the problems."""
    parse: Callable[[Record], Sequence[Row]] = readers.parser(kind, chat.template_of(tokenizer))
    rows: list[Row] = []
    dropped: dict[str, list[str]] = {}
    for record in records:
        try:
            rows += parse(record)
        except Drop as drop:
            dropped.setdefault(str(drop), []).append(record.source)
        except UserError as error:
            problems.append(str(error))
    with_targets = [isinstance(row, Comparison) and row.targets is not None for row in rows]
    if len(set(with_targets)) > 1:
        odd = rows[with_targets.index(not with_targets[0])]
        problems.append(f"{odd.source}: some rows have targets and others a preference; this is the first to differ")
    return rows, dropped


def _repeats(rows: list[Row], name: str) -> tuple[Finding, Finding]:
    """Rows, and pairs with the opposite preference, that were there before."""
    seen: dict[tuple[Text, ...], str] = {}
    duplicates, contradictions = [], []
    for row in rows:
        texts = parts(row)
        if texts in seen:
            duplicates.append(f"{row.source} repeats {seen[texts]}")
        opposite = (row.prompt, row.rejected, row.chosen) if isinstance(row, Pair) else ()
        if opposite in seen:
            contradictions.append(f"{row.source} prefers what {seen[opposite]} rejects")
        seen.setdefault(texts, row.source.removeprefix(f"{name}, "))
    return _finding(duplicates), _finding(contradictions)


def _finding(places: list[str], shown: int = NUM_PLACES) -> Finding:
    return Finding(len(places), places[:shown])


def _text_lengths(rows: list[Row], tokenizer: Tokenizer | None) -> dict[str, Lengths]:
    """Of prompts and responses: in tokens, EOS included, or in words (of token ids: tokens)."""
    responses = [(text, row.source) for row in rows for text in parts(row)[1:]]
    if tokenizer is None:
        counted = [[_words(row.prompt) for row in rows], [_words(text) for text, _ in responses]]
    else:
        ids = response_ids([text for text, _ in responses], tokenizer, [source for _, source in responses])
        counted = [[*map(len, prompt_ids(rows, tokenizer, "{prompt}"))], [*map(len, ids)]]
    return {name: _lengths(counts) for name, counts in zip(("prompt", "response"), counted, strict=True) if counts}


def _words(text: Text) -> int:
    return len(text.split() if isinstance(text, str) else text)


def _lengths(counts: list[int]) -> Lengths:
    longest = max(counts)
    # At most ten bins whose width is a round number.
    width = next(step * 10**power for power in range(20) for step in (1, 2, 5) if step * 10**power * 10 > longest)
    edges = list(range(0, longest + width + 1, width))
    histogram = np.histogram(counts, bins=edges)[0].tolist()
    p95 = int(np.percentile(counts, 95, method="inverted_cdf"))
    return Lengths(histogram, edges, float(np.median(counts)), p95, longest)
