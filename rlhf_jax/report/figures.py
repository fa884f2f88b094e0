"""Curves, points and histograms as SVG or PNG, drawn with matplotlib.

    loss = figures.Plot("SFT loss", "step", "nats per token", {"training": ([1, 2], [3.0, 2.5])})
    figures.svg(loss)
    figures.png(loss)

The same plot gives the same bytes, whatever the user has set in matplotlib. Matplotlib takes long
to import, so it is imported when the first plot is drawn.
"""

import functools
import html
import io
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# Okabe and Ito's colours: told apart with any colour vision, and dark enough for white paper.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00", "#56b4e9", "#444444")
LINE_STYLES = ("-", "--", ":", "-.")
MAX_MARKED = 30  # a curve with at most this many points shows each of them
SMOOTHED_PART = 25  # a long curve is smoothed by means over this part of its points
MAX_HOVERED = 400  # points of a curve whose values the page shows under the pointer
SIZE = (5.2, 3.3)  # inches; the page scales it
# Inches around the axes, for numbers of seven characters and a label. Matplotlib's layouts measure
# them, which takes longer than drawing.
MARGINS = {"left": 1.0, "right": 0.15, "bottom": 0.5, "top": 0.22}
LONGEST = 50  # characters in a line of the legend; a label of the y axis has 35
PNG_DPI = 160
STYLE = Path(__file__).with_name("figures.mplstyle")


class Series(NamedTuple):
    """Points [N] of a plot. A pair ``(xs, ys)`` stands for a series whose other fields are the
    defaults.
    """

    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    """With ``high`` [N], the edges of a band around the curve, or of a bar through each point."""
    high: ArrayLike | None = None
    color: int | None = None
    """Number of the colour. None: the number of the series in its plot."""
    style: int = 0
    """Number of the line style."""
    kind: Literal["curve", "points", "steps"] = "curve"
    """Points have no lines between them; in steps y[i] holds from x[i] to x[i + 1], as in a
    histogram.
    """
    labels: Sequence[str] = ()
    """A text [N] above each point."""


Pair = tuple[ArrayLike, ArrayLike]


@dataclass(frozen=True)
class Plot:
    """Series over one pair of axes. A series without finite values is left out and named below the
    plot.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Series | Pair]
    """``{name: series}``; values that are not finite leave gaps and are counted below the plot."""
    band: tuple[float, float, str] | None = None
    """A horizontal band: low, high, label."""
    lines: Mapping[str, float] = field(default_factory=dict)
    """Horizontal lines: ``{label: y}``."""
    diagonal: str = ""
    """Label of the line y = x. Empty: no such line."""
    note: str = ""
    """A sentence below the plot."""

    @functools.cached_property
    def shown(self) -> dict[str, Series]:
        """The series that have finite values, each with its colour. Both x and y are NaN where one
        of them is not finite.
        """
        shown = {}
        for number, (name, pair) in enumerate(self.series.items()):
            series = Series(*pair)
            points = np.array([series.x, series.y], np.float64)
            finite = (np.abs(points) < 1e300).all(axis=0)  # matplotlib adds margins
            if finite.any():
                x, y = np.where(finite, points, np.nan)
                color = number if series.color is None else series.color
                shown[name] = series._replace(x=x, y=y, color=color)
        return shown


def histogram(
    title: str, x_label: str, y_label: str, values: Mapping[str, ArrayLike], edges: np.ndarray
) -> Plot:
    """How many of the values lie in each bin, for several sets ``{name: [N]}`` over the same bins.

    edges: [bins + 1] where the bins begin and end; see :func:`bin_edges`.
    """
    series: dict[str, Series | Pair] = {}
    outside = []
    x = np.r_[edges[0], edges]
    for number, (name, of_set) in enumerate(values.items()):
        num_values = np.size(of_set)
        counts, _ = np.histogram(np.asarray(of_set, np.float64), edges)
        num_outside = num_values - counts.sum()
        if num_outside:
            outside.append(f"{name}: {num_outside} of {num_values} values not finite or outside.")
        if counts.any():
            top = np.r_[0, counts, 0]
            bottom = np.zeros_like(top)
            series[name] = Series(x, top, bottom, top, color=number, style=number, kind="steps")
    return Plot(title, x_label, y_label, series, note=" ".join(outside))


def bin_edges(values: ArrayLike, max_bins: int = 20) -> np.ndarray:
    """[bins + 1] edges of equal bins over all finite values; bins of integers hold equally many
    integers each.
    """
    numbers = np.asarray(values, np.float64)
    numbers = numbers[np.isfinite(numbers)]
    span = np.ptp(numbers) if numbers.size else 0
    are_integers = numbers.size and np.all(numbers == np.round(numbers))
    if not are_integers or span >= 2**52:
        return np.histogram_bin_edges(numbers, max_bins if span else 1)
    width = np.ceil((span + 1) / max_bins)
    num_bins = np.ceil((span + 1) / width)
    return numbers.min() - 0.5 + width * np.arange(num_bins + 1)


def notes(plot: Plot) -> list[str]:
    """The sentences below the plot: its own, what is smoothed, and which values are not drawn."""
    sentences = [plot.note] if plot.note else []
    width = max([1, *map(_window, plot.shown.values())])
    if width > 1:
        sentences.append(f"Thick: the mean over {width} points; pale: each point.")
    for name, (x, *_) in plot.series.items():
        if name not in plot.shown:
            sentences.append(f"{name}: left out, as it has no finite values.")
            continue
        num_lost = np.sum(np.isnan(plot.shown[name].x))
        if num_lost:
            sentences.append(f"{name}: {num_lost} of {np.size(x)} values not finite, not drawn.")
    return sentences


def alternative(plot: Plot) -> str:
    """What the plot shows, in words for readers who do not see it."""
    text = f"{plot.title}: {plot.y_label} over {plot.x_label}."
    for name, series in plot.shown.items():
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
    """:func:`svg` as an element of a page: without the head of the file, its fixed size, and the
    ids of groups, which would be the same in each plot. The page's script reads the values that it
    shows from the attribute ``data-hover``: at most ``MAX_HOVERED`` points of each series, and
    where the axes begin and end in the SVG.
    """
    file, axes = _draw(plot, "svg", salt)
    text = file.decode()
    tag = re.search(r'<svg [^>]*(viewBox="0 0 (\S+) [^"]*")[^>]*>', text)
    if tag is None:
        return ""
    points = []
    for name, series in plot.shown.items():
        of_series = np.c_[series.x, series.y]
        of_series = of_series[np.isfinite(of_series[:, 0])]
        stride = math.ceil(len(of_series) / MAX_HOVERED)
        points.append([name, series.kind, np.char.mod("%.5g", of_series[::stride]).tolist()])
    place = axes.get_position()
    ends = [*(float(tag[2]) * end for end in (place.x0, place.x1)), *axes.get_xlim()]
    hover = json.dumps({"x": plot.x_label, "ends": ends, "series": points}, ensure_ascii=False)
    attributes = f'aria-label="{html.escape(alternative(plot))}" data-hover="{html.escape(hover)}"'
    body = re.sub(r'<g id="[^"]*"', "<g", text[tag.end() :])
    return f'<svg {tag[1]} role="img" {attributes}>{body.strip()}'


def _window(series: Series) -> int:
    """The number of points in each mean of the smoothed curve; 1 if it is not smoothed."""
    if series.kind != "curve" or series.labels:  # labels stand along a path
        return 1
    width = int(np.isfinite(series.y).sum()) // SMOOTHED_PART
    return width if width > 2 else 1


def _draw(plot: Plot, kind: Literal["svg", "png"], salt: str) -> tuple[bytes, Any]:
    """The file, empty if nothing is drawn, and matplotlib's axes."""
    if not plot.shown:
        return b"", None
    # Without a home folder it would say twice that it keeps its fonts elsewhere.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib.style
    from matplotlib.figure import Figure

    own = {"svg.hashsalt": f"figure {salt} {plot.title}", "savefig.transparent": kind == "svg"}
    # Matplotlib's own settings and ours over them: what the user has set must not show.
    with matplotlib.style.context([STYLE, own], after_reset=True):
        figure = Figure(figsize=SIZE)
        axes = figure.add_subplot()
        title = plot.title if kind == "png" else ""
        axes.set(xlabel=plot.x_label, ylabel=_cut(plot.y_label, 35), title=title)
        handles = {name: _draw_series(axes, series) for name, series in plot.shown.items()}
        has_bins = any(series.kind == "steps" for series in plot.shown.values())
        if has_bins:
            axes.locator_params(axis="y", nbins=6, integer=True)
            axes.set_ylim(bottom=0)
        x = np.concatenate([series.x for series in plot.shown.values()])
        # The edges of bins of integers lie half-way between them.
        if np.all(x[np.isfinite(x)] % 1 == (0.5 if has_bins else 0)):
            steps = [1, 2, 5, 10]
            axes.locator_params(axis="x", nbins=8, integer=True, steps=steps, min_n_ticks=1)
        else:
            axes.locator_params(axis="x", nbins=6)  # more labels like -0.025 would touch
        low, high = axes.get_ylim()
        short = 1e-3 * max(abs(low), abs(high)) - (high - low)  # for numbers of few digits
        if short > 0:
            axes.set_ylim(low - short / 2, high + short / 2)
        if plot.band:
            low, high, label = plot.band
            handles[label] = axes.axhspan(low, high, color="#009e73", alpha=0.13, linewidth=0)
        for i, (label, y) in enumerate(plot.lines.items()):
            style = LINE_STYLES[1 + i % 3]
            handles[label] = axes.axhline(y, color="#333333", linewidth=1, linestyle=style)
        if plot.diagonal:
            left, _ = axes.get_xlim()
            dotted: dict[str, Any] = {"color": "#777777", "linewidth": 1, "linestyle": ":"}
            handles[plot.diagonal] = axes.axline((left, left), slope=1, **dotted)
        width, height = SIZE
        above = MARGINS["top"] + (0.25 if title else 0.0)
        if len(handles) > 1:
            names = [_cut(name, LONGEST) for name in handles]
            columns = min(4, max(1, LONGEST // (max(map(len, names)) + 6)))
            rows = math.ceil(len(handles) / columns)
            height += 0.22 * (rows - 1)
            above += 0.22 * rows + 0.06
            figure.legend(list(handles.values()), names, loc="upper left", ncols=columns)
        figure.set_size_inches(width, height)
        figure.subplots_adjust(
            left=MARGINS["left"] / width,
            right=1 - MARGINS["right"] / width,
            bottom=MARGINS["bottom"] / height,
            top=1 - above / height,
        )
        file = io.BytesIO()
        metadata = ("Software",) if kind == "png" else ("Creator", "Date", "Format", "Type")
        figure.savefig(file, format=kind, dpi=PNG_DPI, metadata=dict.fromkeys(metadata))
    return file.getvalue(), axes


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _draw_series(axes: Any, series: Series) -> Any:
    """A series with its band, its smoothed curve and its labels; the artist of the legend."""
    x = np.asarray(series.x)
    y = np.asarray(series.y)
    finite = np.isfinite(x)
    round_of_colors, number = divmod(series.color or 0, len(COLORS))
    style = LINE_STYLES[(series.style + 2 * round_of_colors) % len(LINE_STYLES)]
    look: dict[str, Any] = {"color": COLORS[number], "linestyle": style, "linewidth": 1.4}
    if series.kind == "steps":
        look["drawstyle"] = "steps-post"
    elif series.kind == "points" or finite.sum() <= MAX_MARKED:
        look |= {"marker": "o", "linewidth": 1.0, "zorder": 3}
    if series.kind == "points":
        look["linestyle"] = ""
    width = _window(series)
    (artist,) = axes.plot(x, y, alpha=0.35 if width > 1 else 1.0, **look)
    if width > 1:
        before = width // 2
        known = np.pad(y[finite], (before, width - 1 - before), mode="edge")
        means = np.convolve(known, np.full(width, 1 / width), "valid")
        every = math.ceil(width / 8)  # between these points a smooth curve is straight
        (artist,) = axes.plot(x[finite][::every], means[::every], **look | {"linewidth": 1.9})
    if series.kind == "points" and series.low is not None and series.high is not None:
        axes.vlines(x, series.low, series.high, color=look["color"], linewidth=1.0, alpha=0.6)
    elif series.low is not None:
        step = "post" if series.kind == "steps" else None
        band = {"color": look["color"], "alpha": 0.2, "linewidth": 0}
        axes.fill_between(x, series.low, series.high, step=step, **band)
    for label, *point in zip(series.labels, x, y, strict=False):
        if np.isfinite(point).all():
            above = {"textcoords": "offset points", "ha": "center", "fontsize": 9}
            axes.annotate(label, point, (0, 5), **above)
    return artist
