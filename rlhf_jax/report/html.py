"""One static page of facts, tables, figures and texts, with all that it needs inside the file.

    loss = figures.Plot("Loss", "step", "nats per token", {"training": (steps, losses)})
    text = html.render("My run", [html.Facts("Settings", {"seed": 0}), html.Figures("Curves", [loss])])

The same input gives the same bytes: a page holds no time, no path and no random identifier of its own.
"""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np

from rlhf_jax.report import figures

# Control characters, which a browser would drop or obey, become the pictures that Unicode has of them; those that turn
# the direction of the text become their numbers.
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
    """``{label: value}``: numbers and settings; lists are joined with commas."""

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

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers, and at least one."""
        cells = [[row[i] for row in self.rows if row[i] is not None] for i in range(len(self.columns))]
        return [bool(column) and all(map(_is_number, column)) for column in cells]


class Block(NamedTuple):
    """Text as it stands, such as a command or a file."""

    title: str
    text: str
    folded: bool = False
    """Shown only when the reader asks for it."""


class Figures(NamedTuple):
    """Figures side by side where there is room."""

    title: str
    figures: Sequence[figures.Plot]


Part = Heading | Text | Facts | Gates | Table | Block | Figures


def render(title: str, parts: Sequence[Part], summary: str = "") -> str:
    """The page as HTML, without scripts or anything from outside. All texts are escaped.

    Args:
      title: heading of the page.
      parts: what stands below it, in this order.
      summary: a sentence or two below the title.
    """
    loader = jinja2.PackageLoader("rlhf_jax.report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"text": _text, "svg": figures.element, "notes": figures.notes}
    kinds = [(type(part).__name__, part) for part in parts]
    page = environment.get_template("report.html").render(title=title, summary=summary, parts=kinds)
    # What a model writes may decode to half a surrogate pair, which no file can hold.
    return page.encode("utf-8", "replace").decode("utf-8")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _text(value: Any, format_spec: str = "") -> str:
    if value is None:
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    if _is_number(value) and (format_spec or not isinstance(value, numbers.Integral)):
        return format(value, format_spec or (".0f" if 1e4 <= abs(value) < 1e9 else ".4g"))
    return str(value).translate(PICTURES)
