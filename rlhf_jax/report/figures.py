"""Curves, points and histograms as SVG or PNG, drawn with matplotlib.

    loss = figures.Plot("SFT loss", "step", "nats per token", {"training": ([1, 2], [3.0, 2.5])})
    figures.svg(loss)
    figures.png(loss)

The same plot gives the same bytes, whatever the user has set in matplotlib. Matplotlib takes long
to import, so it is imported when the first plot is drawn.
"""

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

# Okabe and Ito's colours: told apart with any colour vision, and dark enough for white paper.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00", "#56b4e9", "#444444")
LINE_STYLES = ("-", "--", ":", "-.")
MAX_MARKED = 30  # a curve with at most this many points shows each of them
SIZE = (5.2, 3.3)  # inches; the page scales it
PNG_DPI = 160
STYLE = Path(__file__).with_name("figures.mplstyle")


class Series(NamedTuple):
    """Points [N] of a plot. A pair ``(xs, ys)`` stands for one whose other fields are the defaults."""

    x: npt.ArrayLike
    y: npt.ArrayLike
    low: npt.ArrayLike | None = None
    """With ``high`` [N], the edges of a band around the curve."""
    high: npt.ArrayLike | None = None
    color: int | None = None
    """Number of the colour; None: that of the series in its plot."""
    style: int = 0
    """Number of the line style."""
    kind: Literal["curve", "points", "steps"] = "curve"
    """Points have no lines between them; in steps y[i] holds from x[i] to x[i + 1], as in a
    histogram.
    """
    labels: Sequence[str] = ()
    """A text [N] above each point."""


@dataclasses.dataclass(frozen=True)
class Plot:
    """Series over one pair of axes. A series without finite values is left out and named below the
    plot.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Series | tuple[npt.ArrayLike, npt.ArrayLike]]
    """``{name: series}``; values that are not finite leave gaps and are counted below the plot."""
    band: tuple[float, float, str] | None = None
    """A horizontal band: low, high, label."""
    lines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Horizontal lines: ``{label: y}``."""
    diagonal: str = ""
    """Label of the line y = x; empty: no such line."""
    note: str = ""
    """A sentence below the plot."""


def histogram(
    title: str, x_label: str, y_label: str, values: Mapping[str, npt.ArrayLike], edges: np.ndarray
) -> Plot:
    """How many of the values lie in each bin, for several sets ``{name: [N]}`` over the same bins.

    edges: [bins + 1] where the bins begin and end; see :func:`bin_edges`.
    """
    series, outside = {}, []
    for place, name in enumerate(values):
        counts = np.r_[0, np.histogram(np.asarray(values[name], np.float64), edges)[0], 0]
        if counts.any():
            x = np.r_[edges[0], edges]
            series[name] = Series(
                x, counts, low=0 * counts, high=counts, color=place, style=place, kind="steps"
            )
        if lost := np.size(values[name]) - counts.sum():
            outside.append(
                f"{name}: {lost} of {np.size(values[name])} values not finite or outside."
            )
    return Plot(title, x_label, y_label, series, note=" ".join(outside))


def bin_edges(values: npt.ArrayLike, max_bins: int = 20) -> np.ndarray:
    """[bins + 1] edges of equal bins over all finite values; bins of integers hold equally many
    integers each.
    """
    numbers = np.asarray(values, np.float64)
    numbers = numbers[np.isfinite(numbers)]
    span = np.ptp(numbers) if numbers.size else 0
    if numbers.size and np.all(numbers == np.round(numbers)) and span < 2**52:
        width = np.ceil((span + 1) / max_bins)
        return numbers.min() - 0.5 + width * np.arange(np.ceil((span + 1) / width) + 1)
    return np.histogram_bin_edges(numbers, max_bins if span else 1)


def notes(plot: Plot) -> list[str]:
    """The sentences below the plot: its own, and which values are not drawn."""
    sentences, shown = [plot.note] if plot.note else [], _shown(plot)
    for name, (x, *_) in plot.series.items():
        if name not in shown:
            sentences.append(
                f"{name}: left out, as it has no {'finite ' if np.size(x) else ''}values."
            )
        elif lost := np.sum(np.isnan(shown[name].x)):
            sentences.append(f"{name}: {lost} of {np.size(x)} values not finite, not drawn.")
    return sentences


def svg(plot: Plot, salt: str = "") -> str:
    """The plot as the text of an SVG file, all texts escaped; empty if no series has a finite
    value.

    salt: the ids inside the SVG are made from it; give another one to each plot of a page.
    """
    return _draw(plot, "svg", salt).decode()


def png(plot: Plot) -> bytes:
    """The plot as a PNG file with its title; empty if no series has a finite value."""
    return _draw(plot, "png", "")


def element(plot: Plot, salt: str) -> str:
    """:func:`svg` as an element of a page: without the head of the file, a fixed size, and the ids
    of groups, which would be the same in each plot."""
    text = svg(plot, salt)
    box = re.search(r'viewBox="[^"]*"', text)
    if box is None:
        return ""
    body = text[text.index(">", text.index("<svg")) + 1 :]
    return f"<svg {box[0]}>" + re.sub(r'<g id="[^"]*"', "<g", body).strip()


def _shown(plot: Plot) -> dict[str, Series]:
    """The series that have finite values, each with its colour; x and y are NaN where either is not
    finite.
    """
    shown = {}
    for place, (name, pair) in enumerate(plot.series.items()):
        series = Series(*pair)
        x, y = np.asarray(series.x, np.float64), np.asarray(series.y, np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        if finite.any():
            color = place if series.color is None else series.color
            shown[name] = series._replace(
                x=np.where(finite, x, np.nan), y=np.where(finite, y, np.nan), color=color
            )
    return shown


def _draw(plot: Plot, kind: Literal["svg", "png"], salt: str) -> bytes:
    if not (shown := _shown(plot)):
        return b""
    import matplotlib.style
    from matplotlib.figure import Figure

    # "default" first: what the user has set elsewhere must not show here.
    with matplotlib.style.context(
        ["default", STYLE, {"svg.hashsalt": f"figure {salt} {plot.title}"}]
    ):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set(
            xlabel=plot.x_label, ylabel=plot.y_label, title=plot.title if kind == "png" else ""
        )
        handles = _draw_series(axes, shown) | _draw_marks(axes, plot)
        if len(handles) > 1:
            columns = min(
                4, max(1, 50 // (max(map(len, handles)) + 6))
            )  # the plot is about 50 letters wide
            rows = -(-len(handles) // columns)
            figure.set_size_inches(SIZE[0], SIZE[1] + 0.22 * (rows - 1))
            figure.legend(
                list(handles.values()), list(handles), loc="outside upper left", ncols=columns
            )
        file = io.BytesIO()
        metadata = dict.fromkeys(
            ("Software",) if kind == "png" else ("Creator", "Date", "Format", "Type")
        )
        figure.savefig(file, format=kind, dpi=PNG_DPI, metadata=metadata)
    return file.getvalue()


def _draw_series(axes: Any, shown: Mapping[str, Series]) -> dict[str, Any]:
    """Curves, points and steps; matplotlib's artists by their names in the legend."""
    handles: dict[str, Any] = {}
    for name, series in shown.items():
        x, y, number, kind = (
            np.asarray(series.x),
            np.asarray(series.y),
            series.color or 0,
            series.kind,
        )
        finite, color = np.isfinite(x), COLORS[number % len(COLORS)]
        marked = kind == "points" or (finite.sum() <= MAX_MARKED and kind == "curve")
        line = (
            ""
            if kind == "points"
            else LINE_STYLES[(series.style + 2 * (number // len(COLORS))) % 4]
        )
        look: Any = {"marker": "o", "linewidth": 1.0, "zorder": 3} if marked else {"linewidth": 1.4}
        drawstyle = "steps-post" if kind == "steps" else "default"
        (handles[name],) = axes.plot(x, y, color=color, linestyle=line, drawstyle=drawstyle, **look)
        if series.low is not None and series.high is not None:
            step = "post" if kind == "steps" else None
            axes.fill_between(
                x, series.low, series.high, step=step, color=color, alpha=0.2, linewidth=0
            )
        for i in np.flatnonzero(finite).tolist() if series.labels else ():
            axes.annotate(
                series.labels[i],
                (x[i], y[i]),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
    bins = any(series.kind == "steps" for series in shown.values())
    if bins:
        axes.locator_params(axis="y", nbins=6, integer=True)
        axes.set_ylim(bottom=0)
    x = np.concatenate([series.x for series in shown.values()])
    are_integers = np.all(
        x[np.isfinite(x)] % 1 == (0.5 if bins else 0)
    )  # or bins that hold integers
    integers = {"nbins": 8, "integer": True, "steps": [1, 2, 5, 10], "min_n_ticks": 1}
    axes.locator_params(
        axis="x", **(integers if are_integers else {"nbins": 6})
    )  # more labels like -0.025 would touch
    return handles


def _draw_marks(axes: Any, plot: Plot) -> dict[str, Any]:
    """The band, the lines and the diagonal of the plot."""
    handles: dict[str, Any] = {}
    if plot.band:
        low, high, label = plot.band
        handles[label] = axes.axhspan(low, high, color="#009e73", alpha=0.13, linewidth=0)
    for i, (label, y) in enumerate(plot.lines.items()):
        handles[label] = axes.axhline(
            y, color="#333333", linewidth=1, linestyle=("--", ":", "-.")[i % 3]
        )
    if plot.diagonal:
        start = axes.get_xlim()[0]
        handles[plot.diagonal] = axes.axline(
            (start, start), slope=1, color="#777777", linewidth=1, linestyle=":"
        )
    return handles
