"""Rows and what `check` found as text for a terminal, for `rlhf-jax data check` and `rlhf-jax data preview`."""

from rlhf_jax.data import chat, readers, sources
from rlhf_jax.data.check import UNKNOWN, FileReport, Finding, Lengths, Report, Row, guess_kind
from rlhf_jax.data.readers import Kind
from rlhf_jax.data.rows import Comparison, Demonstration, Drop, Pair, Prompt, Text
from rlhf_jax.data.tokenizers import Tokenizer

_EXAMPLE = 200  # characters of a text that a report shows
_BAR = 40  # characters of the highest bar
_KNOWN = (
    "prompt, response | prompt, chosen, rejected | chosen, rejected (dialogues or messages) | messages | "
    "query, sample0, ..., best | prompt, responses, best or ranking or ranks or targets | prompt, ... | text"
)


def preview(path: str, tokenizer: Tokenizer | None = None, kind: Kind | None = None, count: int = 3) -> str:
    """The first ``count`` rows in full, as a run would read them, messages rendered.

    Raises:
      UserError: for a file that cannot be read or whose first rows are wrong.
    """
    source = sources.read_source(path)
    kind = kind or guess_kind(source.records)
    parse = readers.parser(kind, chat.template_of(tokenizer))
    shown: list[str] = []
    dropped: dict[str, int] = {}
    for record in source.records:
        try:
            shown += [render_row(row, tokenizer) for row in parse(record)]
        except Drop as drop:
            dropped[str(drop)] = dropped.get(str(drop), 0) + 1
        if len(shown) >= count:
            break
    left_out = [f"dropped before these: {number} ({reason})" for reason, number in dropped.items()]
    head = f"{path}: {source.format}, {len(source.records)} rows, {kind}"
    return "\n\n".join([head, *shown[:count], *left_out])


def render(report: Report, tokenizer: Tokenizer | None = None) -> str:
    """The report as text; problems come first in each file. The tokenizer decodes examples that are token ids."""
    parts = [_file(file, report.unit, tokenizer) for file in report.files]
    for overlap in report.overlaps:
        parts.append(
            f"{overlap.second} shares {overlap.prompts} prompts with {overlap.first}; {overlap.rows} of its "
            f"{overlap.num_rows} rows stand there too"
        )
    count = report.num_problems
    parts.append(f"{count} problem{'s' * (count != 1)}: a run would stop at the first" if count else "no problems")
    return "\n\n".join(parts)


def render_row(row: Row, tokenizer: Tokenizer | None = None, limit: int | None = None) -> str:
    """One row with its place, each text under its name; ``limit`` characters of a text."""
    texts: list[tuple[str, Text]] = [("prompt", row.prompt)]
    notes: list[str] = []
    match row:
        case Demonstration():
            texts.append(("response", row.response))
        case Pair():
            texts += [("chosen", row.chosen), ("rejected", row.rejected)]
        case Comparison():
            labels = [f" (target {target:g})" for target in row.targets or ()] or [""] * len(row.responses)
            if row.best is not None:
                labels[row.best] += " (best)"
            names = [f"response {i}{label}" for i, label in enumerate(labels)]
            texts += zip(names, row.responses, strict=True)
        case Prompt():
            notes += [f"  {_printable(key)}: {_printable(repr(value))}" for key, value in row.columns.items()]
    if isinstance(row, Pair | Comparison) and row.weight is not None:
        notes.append(f"  weight: {row.weight:.3g}")
    shown = [f"  {name}:\n{_indented(text, tokenizer, limit)}" for name, text in texts]
    return "\n".join([row.source, *shown, *notes])


def _file(file: FileReport, unit: str, tokenizer: Tokenizer | None) -> str:
    forms = "; ".join(f"{count} of {form}" for form, count in file.forms.items()) or "none"
    lines = [f"{file.name}: {file.format}, {file.num_records} rows, {file.kept} {file.kind} kept", f"  rows: {forms}"]
    if not any(known != UNKNOWN for known in file.forms):
        lines.append(f"  a row must have the keys of one of these: {_KNOWN}")
    lines += _finding("problems", file.problems)
    for reason, finding in file.dropped.items():
        lines += _finding(f"dropped, {reason}", finding)
    lines += _finding("duplicates", file.duplicates)
    lines += _finding("opposite preferences", file.reversed)
    for name, lengths in file.lengths.items():
        lines += _histogram(f"{unit} of a {name}", lengths)
    examples = [render_row(row, tokenizer, _EXAMPLE) for row in file.examples]
    return "\n".join([*lines, *(["  examples:"] if examples else []), *examples])


def _finding(title: str, finding: Finding) -> list[str]:
    if not finding.count:
        return []
    more = finding.count - len(finding.first)
    lines = [f"  {title}: {finding.count}", *(f"    {_printable(place)}" for place in finding.first)]
    return [*lines, f"    and {more} more"] if more else lines


def _histogram(title: str, lengths: Lengths) -> list[str]:
    lines = [f"  {title}: median {lengths.median:g}, 95% up to {lengths.p95:g}, longest {lengths.longest}"]
    most, digits = max(lengths.counts), len(str(lengths.edges[-1]))
    for count, low, high in zip(lengths.counts, lengths.edges, lengths.edges[1:], strict=False):
        bar = "#" * max(round(_BAR * count / most), count > 0)
        span = f"{low:{digits}} to {high - 1:{digits}}" if high > low + 1 else f"{low:{digits}}"
        lines.append(f"    {span} {count:8} {bar}".rstrip())
    return lines


def _indented(text: Text, tokenizer: Tokenizer | None, limit: int | None) -> str:
    if not isinstance(text, str):
        text = tokenizer.decode(text) if tokenizer else f"token ids {' '.join(map(str, text))}"
    cut = limit is not None and len(text) > limit
    shown = _printable(text[:limit]) + (" ..." if cut else "")
    return "\n".join(f"    | {line}" for line in shown.split("\n"))


def _printable(text: str) -> str:
    """Control characters, which a terminal might obey, as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
