"""A run as one static page: its figures, gates, tables and curves, with all that it needs inside the file.

    rows = report.read_rows(run.metrics)
    loss = report.Plot("SFT loss", "step", "nats per token", {"training": report.series(rows, "sft/loss")})
    report.write(run.report, "My run", facts={"seed": 0}, plots=[loss])

The same input gives the same bytes: a page holds no time, no path and no random identifier.
"""

import dataclasses
import functools
import io
import json
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf_jax.errors import UserError
from rlhf_jax.runs import write_atomically

# Okabe and Ito's colours: told apart with any colour vision, and dark enough for white paper.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00", "#56b4e9", "#444444")
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_MARKED = 30  # a series of so few points shows each of them
SIZE = (5.2, 3.3)  # inches; the page scales it
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "text.parse_math": False,
    "font.size": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#888888",
    "ytick.color": "#888888",
    "xtick.labelcolor": "#333333",
    "ytick.labelcolor": "#333333",
    "axes.labelcolor": "#333333",
    "legend.frameon": False,
    "lines.markersize": 4.0,
}
STRINGS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


@dataclasses.dataclass(frozen=True)
class Plot:
    """Curves over one pair of axes. A series without finite values is left out and named below the plot."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]
    """``{name: (xs [N], ys [N])}``; values that are not finite leave gaps and are counted below the plot."""
    band: tuple[float, float, str] | None = None
    """A horizontal band: low, high, label."""
    lines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Horizontal lines: ``{label: y}``."""
    order: str = ""
    """What the position in a series counts, such as ``iteration``: draws points, later ones darker, not curves."""


class _Curve(NamedTuple):
    """A series that can be drawn: x and y [N], NaN where either is not finite; place: its number in the plot."""

    place: int
    name: str
    x: np.ndarray
    y: np.ndarray


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of texts and numbers. Columns of numbers are aligned right; text keeps its line breaks and is wrapped."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    formats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """``{column: format specification}`` of numbers, such as ``.2f``; by default four significant digits."""


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``. The strings NaN, Infinity and -Infinity, which stand for floats, become floats.

    A last line without its end, which a run that is going on or was killed may leave, is passed over.

    Raises:
        UserError: the file does not exist, or a line is no row.
    """
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; give the folder of a run") from None
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}, line {number}: expected a JSON object with the key step") from None
        rows.append(
            {name: STRINGS.get(value, value) if isinstance(value, str) else value for name, value in row.items()}
        )
    return rows


def series(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, from the rows that have it: a series of a :class:`Plot`."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def write(path: str | Path, title: str, **content: Any) -> None:
    """Writes the page that :func:`render` makes of the rest, whole or not at all."""
    write_atomically(Path(path), render(title, **content))


def render(
    title: str,
    *,
    summary: str = "",
    facts: Mapping[str, Any] | None = None,
    gates: Mapping[str, tuple[bool, str]] | None = None,
    tables: Iterable[Table] = (),
    plots: Iterable[Plot] = (),
) -> str:
    """The page as HTML, without scripts or anything from outside. All texts are escaped.

    Args:
      title: heading of the page.
      summary: what was done, in a sentence or two.
      facts: figures and settings: ``{label: value}``; lists are joined with commas.
      gates: what the run had to reach: ``{name: (passed, numbers and thresholds)}``.
      tables, plots: in the order of the page.

    Raises:
        ValueError: a row has not a cell for each column, or a series not a y for each x.
    """
    template = _environment().get_template("report.html")
    page = template.render(
        title=title,
        summary=summary,
        facts={label: _text(value) for label, value in (facts or {}).items()},
        gates=gates or {},
        failed=[name for name, (passed, _) in (gates or {}).items() if not passed],
        tables=[_cells(table) for table in tables],
        plots=[_figure(plot) for plot in plots],
    )
    # What a model writes may decode to half a surrogate pair, which no file can hold.
    return page.encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("rlhf_jax")
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


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
    return str(value)


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
    return {"title": table.title, "columns": table.columns, "numeric": numeric, "rows": rows}


def _figure(plot: Plot) -> dict[str, Any]:
    curves, notes = [], []
    for i, (name, (xs, ys)) in enumerate(plot.series.items()):
        x, y = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
        if x.ndim != 1 or x.shape != y.shape:
            raise ValueError(f"plot {plot.title}, {name}: expected xs [N] and ys [N], got {x.shape} and {y.shape}")
        finite = np.isfinite(x) & np.isfinite(y)
        if finite.any():
            curves.append(_Curve(i, name, np.where(finite, x, np.nan), np.where(finite, y, np.nan)))
            if not finite.all():
                notes.append(f"{name}: {np.sum(~finite)} of {len(x)} values not finite, not drawn.")
        else:
            notes.append(f"{name}: left out, as it has no {'finite ' if len(x) else ''}values.")
    return {"title": plot.title, "notes": notes, "svg": _svg(plot, curves) if curves else ""}


def _svg(plot: Plot, curves: Sequence[_Curve]) -> str:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # what the user has set elsewhere must not show here
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": f"plot {plot.title}"})
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        handles = (_draw_points if plot.order else _draw_curves)(plot, axes, curves)
        if plot.band:
            low, high, label = plot.band
            handles[label] = axes.axhspan(low, high, color="#009e73", alpha=0.13, linewidth=0)
        for i, (label, y) in enumerate(plot.lines.items()):
            handles[label] = axes.axhline(y, color="#333333", linewidth=1, linestyle=("--", ":", "-.")[i % 3])
        axes.set(xlabel=plot.x_label, ylabel=plot.y_label)
        if all(np.all(curve.x[np.isfinite(curve.x)] % 1 == 0) for curve in curves):
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if len(handles) > 1:
            columns = min(4, max(1, 50 // (max(map(len, handles)) + 6)))  # the width of the plot is about 50 letters
            rows = -(-len(handles) // columns)
            figure.set_size_inches(SIZE[0], SIZE[1] + 0.22 * (rows - 1))
            figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=columns)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inline(file.getvalue())


def _draw_curves(plot: Plot, axes: Axes, curves: Sequence[_Curve]) -> dict[str, Artist]:
    handles: dict[str, Artist] = {}
    for curve in curves:
        marked = np.isfinite(curve.y).sum() <= MAX_MARKED
        (handles[curve.name],) = axes.plot(
            curve.x,
            curve.y,
            color=COLORS[curve.place % len(COLORS)],
            linestyle=LINE_STYLES[curve.place // len(COLORS) % len(LINE_STYLES)],
            linewidth=1.0 if marked else 1.4,
            marker="o" if marked else "",
            zorder=3 if marked else 2,
        )
    return handles


def _draw_points(plot: Plot, axes: Axes, curves: Sequence[_Curve]) -> dict[str, Artist]:
    # Fewer than 50 colours: matplotlib makes the bar of more a bitmap.
    colors = ListedColormap(matplotlib.colormaps["viridis_r"](np.linspace(0.1, 1.0, 32)))
    norm = Normalize(1, max(2, *(len(curve.x) for curve in curves)))
    handles: dict[str, Artist] = {}
    for curve in curves:
        axes.plot(curve.x, curve.y, color="#bbbbbb", linewidth=0.7)
        handles[curve.name] = axes.scatter(
            curve.x,
            curve.y,
            c=np.arange(1, len(curve.x) + 1),
            cmap=colors,
            norm=norm,
            s=22,
            marker=MARKERS[curve.place % len(MARKERS)],
            zorder=3,
        )
    ticks = MaxNLocator(6, integer=True)
    bar = axes.figure.colorbar(ScalarMappable(norm, colors), ax=axes, label=plot.order, ticks=ticks)
    bar.outline.set_visible(False)
    bar.ax.grid(False)
    assert bar.solids is not None
    bar.solids.set_edgecolor("face")  # else the paper shows between the colours
    return handles


def _inline(svg: str) -> str:
    """An SVG file as an element of a page: no XML head, no fixed size, no names of groups, which other plots share."""
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    return f"<svg {box[0]}>" + re.sub(r'<g id="[^"]*"', "<g", body).strip()
