"""Curves, points and histograms as SVG or PNG, drawn with matplotlib.

    loss = figures.Plot("SFT loss", "step", "nats per token", {"training": ([1, 2], [3.0, 2.5])})
    figures.svg(loss)
    figures.png(loss)

The same plot gives the same bytes, whatever the user has set in matplotlib. Matplotlib takes long
to import, so it is imported when the first plot is drawn.
"""

import dataclasses
import html
import io
import json
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
SMOOTHED_PART = 25  # a long curve is smoothed by means over this part of its points
MAX_HOVERED = 400  # points of a curve whose values the page shows under the pointer
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
    series: dict[str, Series | tuple[npt.ArrayLike, npt.ArrayLike]] = {}
    outside = []
    x = np.r_[edges[0], edges]
    for place, (name, of_set) in enumerate(values.items()):
        counted, _ = np.histogram(np.asarray(of_set, np.float64), edges)
        counts = np.r_[0, counted, 0]
        if counts.any():
            series[name] = Series(x, counts, 0 * counts, counts, place, place, "steps")
        if lost := np.size(of_set) - counts.sum():
            outside.append(f"{name}: {lost} of {np.size(of_set)} values not finite or outside.")
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
    """The sentences below the plot: its own, what is smoothed, and which values are not drawn."""
    shown = _shown(plot)
    sentences = [plot.note] if plot.note else []
    windows = sorted({_window(series) for series in shown.values()} - {1})
    if windows:
        sentences.append(f"Thick: the mean over {windows[-1]} points; pale: each point.")
    for name, (x, *_) in plot.series.items():
        if name not in shown:
            values = "finite values" if np.size(x) else "values"
            sentences.append(f"{name}: left out, as it has no {values}.")
        elif lost := np.sum(np.isnan(shown[name].x)):
            sentences.append(f"{name}: {lost} of {np.size(x)} values not finite, not drawn.")
    return sentences


def alternative(plot: Plot) -> str:
    """What the plot shows, in words for those who do not see it."""
    text = f"{plot.title}: {plot.y_label} over {plot.x_label}."
    for name, series in _shown(plot).items():
        y = np.asarray(series.y)
        y = y[np.isfinite(y)]
        ends = f"first {y[0]:.4g}, last {y[-1]:.4g}"
        text += f" {name}: {ends}, lowest {y.min():.4g}, highest {y.max():.4g}."
    return text


def svg(plot: Plot, salt: str = "") -> str:
    """The plot as the text of an SVG file, all texts escaped; empty if no series has a finite
    value.

    salt: the ids inside the SVG are made from it; give another one to each plot of a page.
    """
    return _draw(plot, "svg", salt)[0].decode()


def png(plot: Plot) -> bytes:
    """The plot as a PNG file with its title; empty if no series has a finite value."""
    return _draw(plot, "png", "")[0]


def element(plot: Plot, salt: str) -> str:
    """:func:`svg` as an element of a page: without the head of the file, a fixed size, and the ids
    of groups, which would be the same in each plot. The attribute ``data-hover`` is what the page's
    script needs to show values.
    """
    file, axes = _draw(plot, "svg", salt)
    text = file.decode()
    box = re.search(r'viewBox="([^"]*)"', text)
    if box is None:
        return ""
    hover = html.escape(json.dumps(_hover(plot, axes, box[1]), ensure_ascii=False))
    label = html.escape(alternative(plot))
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r'<g id="[^"]*"', "<g", body).strip()
    return f'<svg {box[0]} role="img" aria-label="{label}" data-hover="{hover}">{body}'


def _window(series: Series) -> int:
    """Points of which the smoothed curve is the mean; 1: it is not smoothed."""
    width = np.isfinite(series.y).sum() // SMOOTHED_PART
    is_path = bool(series.labels)
    return int(width) if series.kind == "curve" and width > 2 and not is_path else 1


def _hover(plot: Plot, axes: Any, box: str) -> dict[str, Any]:
    """Where the axes begin and end in the SVG, and at most ``MAX_HOVERED`` points of each series."""
    series = []
    for name, shown in _shown(plot).items():
        points = np.c_[shown.x, shown.y]
        points = points[np.isfinite(points[:, 0])]
        stride = -(-len(points) // MAX_HOVERED)
        numbers = np.char.mod("%.5g", points[::stride])
        series.append([name, shown.kind, numbers.tolist()])
    width = float(box.split()[2])
    place = axes.get_position()
    left = width * place.x0
    right = width * place.x1
    low, high = axes.get_xlim()
    ends = [left, right, low, high]
    return {"x": plot.x_label, "ends": ends, "series": series}


def _shown(plot: Plot) -> dict[str, Series]:
    """The series that have finite values, each with its colour; x and y are NaN where either is not
    finite.
    """
    shown = {}
    for place, (name, pair) in enumerate(plot.series.items()):
        series = Series(*pair)
        x = np.asarray(series.x, np.float64)
        y = np.asarray(series.y, np.float64)
        finite = np.isfinite(x) & np.isfinite(y)
        if finite.any():
            color = place if series.color is None else series.color
            x = np.where(finite, x, np.nan)
            y = np.where(finite, y, np.nan)
            shown[name] = series._replace(x=x, y=y, color=color)
    return shown


def _draw(plot: Plot, kind: Literal["svg", "png"], salt: str) -> tuple[bytes, Any]:
    """The file, empty if nothing is drawn, and matplotlib's axes."""
    shown = _shown(plot)
    if not shown:
        return b"", None
    import matplotlib.style
    from matplotlib.figure import Figure

    own = {"svg.hashsalt": f"figure {salt} {plot.title}", "savefig.transparent": kind == "svg"}
    # "default" first: what the user has set elsewhere must not show here.
    with matplotlib.style.context(["default", STYLE, own]):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        title = plot.title if kind == "png" else ""
        axes.set(xlabel=plot.x_label, ylabel=plot.y_label, title=title)
        handles = _draw_series(axes, shown) | _draw_marks(axes, plot)
        if len(handles) > 1:
            _draw_legend(figure, handles)
        file = io.BytesIO()
        metadata = ("Software",) if kind == "png" else ("Creator", "Date", "Format", "Type")
        figure.savefig(file, format=kind, dpi=PNG_DPI, metadata=dict.fromkeys(metadata))
    return file.getvalue(), axes


def _draw_legend(figure: Any, handles: Mapping[str, Any]) -> None:
    """Above the axes, in as many columns as the longest label leaves room for."""
    longest = max(map(len, handles))
    columns = min(4, max(1, 50 // (longest + 6)))  # the plot is about 50 letters wide
    rows = -(-len(handles) // columns)
    width, height = SIZE
    figure.set_size_inches(width, height + 0.22 * (rows - 1))
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=columns)


def _draw_series(axes: Any, shown: Mapping[str, Series]) -> dict[str, Any]:
    """Curves, points and steps; matplotlib's artists by their names in the legend."""
    handles = {name: _draw_one(axes, series) for name, series in shown.items()}
    has_bins = any(series.kind == "steps" for series in shown.values())
    if has_bins:
        axes.locator_params(axis="y", nbins=6, integer=True)
        axes.set_ylim(bottom=0)
    x = np.concatenate([series.x for series in shown.values()])
    x = x[np.isfinite(x)]
    # The edges of bins of integers lie half-way between them.
    are_integers = np.all(x % 1 == (0.5 if has_bins else 0))
    how: dict[str, Any] = {"nbins": 6}  # more labels like -0.025 would touch
    if are_integers:
        how = {"nbins": 8, "integer": True, "steps": [1, 2, 5, 10], "min_n_ticks": 1}
    axes.locator_params(axis="x", **how)
    return handles


def _draw_one(axes: Any, series: Series) -> Any:
    """A series with its band, its smoothed curve and its labels; the artist of the legend."""
    x = np.asarray(series.x)
    y = np.asarray(series.y)
    finite = np.isfinite(x)
    number = series.color or 0
    color = COLORS[number % len(COLORS)]
    round_of_colors = number // len(COLORS)
    style = LINE_STYLES[(series.style + 2 * round_of_colors) % len(LINE_STYLES)]
    look: dict[str, Any] = {"color": color, "linestyle": style, "linewidth": 1.4}
    step = None
    if series.kind == "steps":
        step = "post"
        look["drawstyle"] = "steps-post"
    elif series.kind == "points" or finite.sum() <= MAX_MARKED:
        look |= {"marker": "o", "linewidth": 1.0, "zorder": 3}
    if series.kind == "points":
        look["linestyle"] = ""
    width = _window(series)
    (artist,) = axes.plot(x, y, alpha=1.0 if width == 1 else 0.35, **look)
    if width > 1:
        import scipy.ndimage

        means = scipy.ndimage.uniform_filter1d(y[finite], width, mode="nearest")
        some = slice(None, None, -(-width // 8))  # between them a smooth curve is straight
        (artist,) = axes.plot(x[finite][some], means[some], **look | {"linewidth": 1.9})
    if series.low is not None and series.high is not None:
        band: dict[str, Any] = {"color": color, "alpha": 0.2, "linewidth": 0}
        axes.fill_between(x, series.low, series.high, step=step, **band)
    offset: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 9}
    for i in np.flatnonzero(finite).tolist() if series.labels else ():
        axes.annotate(series.labels[i], (x[i], y[i]), (0, 5), **offset)
    return artist


def _draw_marks(axes: Any, plot: Plot) -> dict[str, Any]:
    """The band, the lines and the diagonal of the plot."""
    handles: dict[str, Any] = {}
    if plot.band:
        low, high, label = plot.band
        handles[label] = axes.axhspan(low, high, color="#009e73", alpha=0.13, linewidth=0)
    for i, (label, y) in enumerate(plot.lines.items()):
        style = ("--", ":", "-.")[i % 3]
        handles[label] = axes.axhline(y, color="#333333", linewidth=1, linestyle=style)
    if plot.diagonal:
        start, _ = axes.get_xlim()
        look: dict[str, Any] = {"color": "#777777", "linewidth": 1, "linestyle": ":"}
        handles[plot.diagonal] = axes.axline((start, start), slope=1, **look)
    return handles
