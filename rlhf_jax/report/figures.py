"""Curves, points and histograms as SVG elements or PNG files, drawn with matplotlib.

    loss = figures.Plot("SFT loss", "step", "nats per token", {"training": ([1, 2], [3.0, 2.5])})
    drawing = figures.draw(loss)
    figures.png(loss)

The same figure gives the same bytes, whatever the user has set in matplotlib. Matplotlib takes long to import, so it is
imported when the first figure is drawn.
"""

import dataclasses
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# Okabe and Ito's colours: told apart with any colour vision, and dark enough for white paper.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00", "#56b4e9", "#444444")
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_MARKED = 30  # a series of so few points shows each of them
SIZE = (5.2, 3.3)  # inches; the page scales it
PNG_DPI = 160
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
    points: bool = False
    """Separate points, no line between them."""
    labels: Sequence[str] = ()
    """A text [N] above each point."""


@dataclasses.dataclass(frozen=True)
class Plot:
    """Curves over one pair of axes. A series without finite values is left out and named below the plot."""

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
    order: str = ""
    """What the position in a series counts, such as ``iteration``: draws points, later ones darker, not curves."""
    last: float | None = None
    """With ``order``: what the last point's colour stands for; None: the number of points."""
    note: str = ""
    """A sentence below the plot."""


@dataclasses.dataclass(frozen=True)
class Histogram:
    """How many values lie in each bin, for several sets of values over the same bins."""

    title: str
    x_label: str
    y_label: str
    values: Mapping[str, npt.ArrayLike]
    """``{name: [N]}``; values that are not finite are counted below the plot."""
    edges: npt.ArrayLike
    """[bins + 1] where the bins begin and end; see :func:`bin_edges`. Values outside are counted below the plot."""
    note: str = ""
    """A sentence below the plot."""


class Drawing(NamedTuple):
    """A figure as an SVG element, empty where there is nothing to draw, with the notes that belong below it."""

    title: str
    svg: str
    notes: list[str]


class _Curve(NamedTuple):
    """A series that can be drawn: x and y [N], NaN where either is not finite; place: its number in the plot."""

    place: int
    name: str
    x: np.ndarray
    y: np.ndarray
    given: Series

    @property
    def color(self) -> str:
        return COLORS[(self.place if self.given.color is None else self.given.color) % len(COLORS)]


def bin_edges(values: Iterable[npt.ArrayLike], max_bins: int = 20) -> np.ndarray:
    """[bins + 1] edges of equal bins over all finite values; bins of integers hold equally many of them each."""
    every = np.concatenate([np.zeros(0), *(np.ravel(np.asarray(some, np.float64)) for some in values)])
    every = every[np.isfinite(every)]
    if not every.size:
        return np.array([0.0, 1.0])
    low, high = every.min(), every.max()
    if np.all(every == np.round(every)) and high - low < 2**52:
        width = np.ceil((high - low + 1) / max_bins)
        return low - 0.5 + width * np.arange(np.ceil((high - low + 1) / width) + 1)
    return np.linspace(low, high, max_bins + 1) if high > low else np.array([low - 0.5, low + 0.5])


class _Picture(NamedTuple):
    """What is to be drawn: a function that draws it, None where there is nothing; the notes below it."""

    paint: Callable[["Axes"], dict[str, "Artist"]] | None
    notes: list[str]
    integer_x: bool = False


def draw(figure: Plot | Histogram, salt: str = "") -> Drawing:
    """The figure as SVG, without scripts or anything from outside. All texts are escaped.

    salt: what the ids inside the SVG are made from; another one for each figure of a page.

    Raises:
        ValueError: a series has not a y for each x.
    """
    picture = _picture(figure)
    svg = _file(figure, picture, "svg", salt).decode()
    return Drawing(figure.title, _inline(svg) if svg else "", picture.notes)


def png(figure: Plot | Histogram) -> bytes:
    """The figure as a PNG file with its title; empty where there is nothing to draw.

    Raises:
        ValueError: a series has not a y for each x.
    """
    return _file(figure, _picture(figure), "png", "")


def _picture(figure: Plot | Histogram) -> _Picture:
    if isinstance(figure, Histogram):
        return _histogram(figure)
    curves, notes = [], [figure.note] if figure.note else []
    for i, (name, value) in enumerate(figure.series.items()):
        given = Series(*value)
        x, y = np.asarray(given.x, np.float64), np.asarray(given.y, np.float64)
        if x.ndim != 1 or x.shape != y.shape:
            raise ValueError(f"plot {figure.title}, {name}: expected xs [N] and ys [N], got {x.shape} and {y.shape}")
        finite = np.isfinite(x) & np.isfinite(y)
        if finite.any():
            curves.append(_Curve(i, name, np.where(finite, x, np.nan), np.where(finite, y, np.nan), given))
            if not finite.all():
                notes.append(f"{name}: {np.sum(~finite)} of {len(x)} values not finite, not drawn.")
        else:
            notes.append(f"{name}: left out, as it has no {'finite ' if len(x) else ''}values.")
    if not curves:
        return _Picture(None, notes)

    def paint(axes: "Axes") -> dict[str, "Artist"]:
        handles = (_draw_points if figure.order else _draw_curves)(figure, axes, curves)
        if figure.band:
            low, high, label = figure.band
            handles[label] = axes.axhspan(low, high, color="#009e73", alpha=0.13, linewidth=0)
        for i, (label, y) in enumerate(figure.lines.items()):
            handles[label] = axes.axhline(y, color="#333333", linewidth=1, linestyle=("--", ":", "-.")[i % 3])
        if figure.diagonal:
            on_it = next(float(x) for x in curves[0].x if np.isfinite(x))
            handles[figure.diagonal] = axes.axline((on_it, on_it), slope=1, color="#777777", linewidth=1, linestyle=":")
        return handles

    whole = all(np.all(curve.x[np.isfinite(curve.x)] % 1 == 0) for curve in curves)
    return _Picture(paint, notes, whole)


def _histogram(figure: Histogram) -> _Picture:
    edges = np.asarray(figure.edges, np.float64)
    counts, notes = {}, [figure.note] if figure.note else []
    for name, some in figure.values.items():
        values = np.asarray(some, np.float64)
        shown = values[np.isfinite(values) & (values >= edges[0]) & (values <= edges[-1])]
        if shown.size:
            counts[name] = np.histogram(shown, edges)[0]
            if shown.size < values.size:
                notes.append(f"{name}: {values.size - shown.size} of {values.size} values not finite or outside.")
        else:
            notes.append(f"{name}: left out, as it has no {'finite ' if values.size else ''}values.")
    if not counts:
        return _Picture(None, notes)

    def paint(axes: "Axes") -> dict[str, "Artist"]:
        handles: dict[str, Artist] = {}
        for i, name in enumerate(figure.values):
            if name in counts:
                color = COLORS[i % len(COLORS)]
                axes.stairs(counts[name], edges, fill=True, color=color, alpha=0.22, linewidth=0)
                style = LINE_STYLES[i % len(LINE_STYLES)]
                handles[name] = axes.stairs(counts[name], edges, color=color, linewidth=1.4, linestyle=style)
        axes.set_ylim(bottom=0)
        return handles

    return _Picture(paint, notes, bool(np.all(edges % 1 == 0.5)))


def _file(figure: Plot | Histogram, picture: _Picture, kind: Literal["svg", "png"], salt: str) -> bytes:
    if picture.paint is None:
        return b""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # what the user has set elsewhere must not show here
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": f"figure {salt} {figure.title}"})
        canvas = Figure(figsize=SIZE, layout="constrained")
        axes = canvas.subplots()
        handles = picture.paint(axes)
        axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
        if picture.integer_x:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        if isinstance(figure, Histogram):
            axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(handles) > 1:
            columns = min(4, max(1, 50 // (max(map(len, handles)) + 6)))  # the width of the plot is about 50 letters
            rows = -(-len(handles) // columns)
            canvas.set_size_inches(SIZE[0], SIZE[1] + 0.22 * (rows - 1))
            canvas.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=columns)
        file = io.BytesIO()
        if kind == "png":
            axes.set_title(figure.title, fontsize=12)  # a figure's own title would lie on the legend
            canvas.savefig(file, format="png", dpi=PNG_DPI, metadata={"Software": None})
        else:
            canvas.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return file.getvalue()


def _draw_curves(plot: Plot, axes: "Axes", curves: Sequence[_Curve]) -> dict[str, "Artist"]:
    handles: dict[str, Artist] = {}
    for curve in curves:
        given = curve.given
        marked = given.points or np.isfinite(curve.y).sum() <= MAX_MARKED
        style = LINE_STYLES[(given.style + curve.place // len(COLORS) * (given.color is None)) % len(LINE_STYLES)]
        (handles[curve.name],) = axes.plot(
            curve.x,
            curve.y,
            color=curve.color,
            linestyle="" if given.points else style,
            linewidth=1.0 if marked else 1.4,
            marker="o" if marked else "",
            zorder=3 if marked else 2,
        )
        if given.low is not None and given.high is not None:
            low, high = np.asarray(given.low, np.float64), np.asarray(given.high, np.float64)
            drawn = np.isfinite(curve.y) & np.isfinite(low) & np.isfinite(high)
            axes.fill_between(curve.x, low, high, where=drawn, color=curve.color, alpha=0.18, linewidth=0)
        for x, y, label in zip(curve.x, curve.y, given.labels, strict=False):
            if np.isfinite(x) and np.isfinite(y):
                place: dict[str, Any] = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 9}
                axes.annotate(label, (x, y), color="#333333", **place)
    return handles


def _draw_points(plot: Plot, axes: "Axes", curves: Sequence[_Curve]) -> dict[str, "Artist"]:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    # Fewer than 50 colours: matplotlib makes the bar of more a bitmap.
    colors = ListedColormap(matplotlib.colormaps["viridis_r"](np.linspace(0.1, 1.0, 32)))
    longest = max(len(curve.x) for curve in curves)
    norm = Normalize(1, max(2, plot.last or longest))
    handles: dict[str, Artist] = {}
    for curve in curves:
        axes.plot(curve.x, curve.y, color="#bbbbbb", linewidth=0.7)
        marker = MARKERS[curve.place % len(MARKERS)]
        handles[curve.name] = Line2D([], [], color="#555555", linestyle="", marker=marker)
        axes.scatter(
            curve.x,
            curve.y,
            c=np.arange(1, len(curve.x) + 1) * (plot.last or longest) / longest,
            cmap=colors,
            norm=norm,
            s=22,
            marker=marker,
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
