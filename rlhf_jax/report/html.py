"""One static page of facts, tables, figures and texts, with all that it needs inside the file.

    loss = figures.Plot("Loss", "step", "nats per token", {"training": (steps, losses)})
    page.write("report.html", "My run", [page.Facts("Settings", {"seed": 0}), page.Figures("Curves", [loss])])

The same input gives the same bytes: a page holds no time, no path and no random identifier of its own.
"""

import functools
import numbers
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from rlhf_jax.report import figures
from rlhf_jax.runs.folder import write_atomically

# Control characters, which a browser would drop or obey, as the pictures that Unicode has of them, and those that turn
# the direction of the text by their numbers.
PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {0x7F: "␡"}
PICTURES |= {code: f"⟨U+{code:04X}⟩" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


class Heading(NamedTuple):
    """The beginning of a chapter; with chapters in a page, its sections are one level deeper."""

    title: str


class Text(NamedTuple):
    """Paragraphs."""

    title: str
    paragraphs: Sequence[str]


class Facts(NamedTuple):
    """``{label: value}``: figures and settings; lists are joined with commas."""

    title: str
    values: Mapping[str, Any]


class Gates(NamedTuple):
    """What a run had to reach: ``{name: (passed, numbers and thresholds)}``."""

    results: Mapping[str, tuple[bool, str]]


class Table(NamedTuple):
    """Rows of texts and numbers. Columns of numbers are aligned right; text keeps its line breaks and is wrapped."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    formats: Mapping[str, str] = {}
    """``{column: format specification}`` of numbers, such as ``.2f``; by default four significant digits."""
    note: str = ""
    """A sentence above the rows."""


class Block(NamedTuple):
    """Text as it stands, such as a command or a file."""

    title: str
    text: str
    folded: bool = False
    """Shown only when the reader asks for it."""


class Figures(NamedTuple):
    """Figures side by side where there is room."""

    title: str
    figures: Sequence[figures.Plot | figures.Histogram]


Part = Heading | Text | Facts | Gates | Table | Block | Figures


def write(path: str | Path, title: str, parts: Iterable[Part], summary: str = "") -> None:
    """Writes the page that :func:`render` makes, whole or not at all."""
    write_atomically(Path(path), render(title, parts, summary))


def render(title: str, parts: Iterable[Part], summary: str = "") -> str:
    """The page as HTML, without scripts or anything from outside. All texts are escaped.

    Args:
      title: heading of the page.
      parts: what stands below it, in this order.
      summary: a sentence or two below the title.

    Raises:
        ValueError: a row has not a cell for each column, or a series not a y for each x.
    """
    parts = list(parts)
    page = (
        _environment()
        .get_template("report.html")
        .render(
            title=title,
            summary=summary,
            level=3 if any(isinstance(part, Heading) for part in parts) else 2,
            parts=[_content(part, f"{i}") for i, part in enumerate(parts)],
        )
    )
    # What a model writes may decode to half a surrogate pair, which no file can hold.
    return page.encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("rlhf_jax.report")
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _content(part: Part, number: str) -> dict[str, Any]:
    """What the template reads of a part; ``kind`` is the name of its class."""
    content: dict[str, Any] = {"kind": type(part).__name__.lower(), **part._asdict()}
    match part:
        case Facts():
            content["values"] = {label: _text(value) for label, value in part.values.items()}
        case Gates():
            content["failed"] = [name for name, (passed, _) in part.results.items() if not passed]
        case Table():
            content |= _cells(part)
        case Block():
            content["text"] = _text(part.text)
        case Figures():
            content["figures"] = [
                figures.draw(figure, salt=f"{number}.{i}")._asdict() for i, figure in enumerate(part.figures)
            ]
    return content


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _text(value: Any, format_spec: str = "") -> str:
    if value is None:
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    if _is_number(value) and (format_spec or not isinstance(value, numbers.Integral)):
        return format(value, format_spec or (".4g" if abs(value) < 1e4 else ".0f" if abs(value) < 1e9 else ".4g"))
    return str(value).translate(PICTURES)


def _cells(table: Table) -> dict[str, Any]:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"table {table.title}: expected {len(table.columns)} cells in each row, got {list(row)}")
    numeric = [
        any(_is_number(row[i]) for row in table.rows)
        and all(row[i] is None or _is_number(row[i]) for row in table.rows)
        for i in range(len(table.columns))
    ]
    rows = [[_text(cell, table.formats.get(table.columns[i], "")) for i, cell in enumerate(row)] for row in table.rows]
    return {"columns": table.columns, "numeric": numeric, "rows": rows}
