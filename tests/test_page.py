"""The page: what a model writes stays text, nothing comes from outside, and the same input gives
the same bytes.
"""

import functools
import json
import math
import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from builders import HOSTILE, Page
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax.report import figures
from rlhf_jax.report.figures import Plot, Series, histogram
from rlhf_jax.report.page import Facts, Figures, Gates, Table, render

COLORS = figures.COLORS
EDGES = np.array([-0.5, 0.5, 1.5, 2.5])
CURVE = ([0, 1, 2], [0.5, 0.25, 0.125])


def drawn(*plots) -> str:
    return render("t", [Figures("Curves", plots)])


@functools.cache
def full_page(text: str = "text") -> str:
    series = {
        f"a {text}": Series(*CURVE, low=[0, 0, 0], high=[1, 1, 1], labels=[text] * 3),
        "_b": CURVE,
    }
    more = {
        "band": (0.2, 0.4, f"band {text}"),
        "lines": {f"line {text}": 0.3},
        "diagonal": f"diagonal {text}",
    }
    curves = [
        Plot(f"plot {text}", f"x {text}", f"y {text}", series, **more, note=f"note {text}"),
        histogram(
            "same", f"bins {text}", "y", {f"before {text}": [0, 1, 1], "after": [1, 2]}, EDGES
        ),
        *[Plot("same", "x", "y", {"a": Series(*CURVE, kind="points")})] * 2,
    ]
    parts = [
        Gates({f"gate {text}": (True, f"detail {text}"), "other": (False, "0.4, at least 0.5")}),
        Facts(f"facts {text}", {f"label {text}": text, "seed": 0}),
        Table(
            f"table {text}",
            (f"column {text}", "response", "score"),
            [(text, text, 0.5)],
            note=f"rows {text}",
        ),
        Figures(f"figures {text}", curves),
    ]
    return render(f"title {text}", parts, summary=f"summary {text}")


# --- What is safe in a page
# ----------------------------------------------------------------------------------------


def test_texts_are_escaped_wherever_they_stand():
    page = Page(full_page(HOSTILE))
    assert page.texts("script") == Page(full_page()).texts("script")  # our own alone
    assert page.all("b") == page.all("td", data_label="") == []
    expected = {
        "title": ["title"],
        "h1": ["title"],
        "h2": ["facts", "table", "figures"],
        "h3": ["plot"],
    }
    expected |= {
        "dt": ["label"],
        "th": ["column"],
        "td": ["gate", "detail"],
        "p": ["summary", "rows", "note"],
    }
    expected["text"] = [
        "a",
        "x",
        "y",
        "band",
        "line",
        "diagonal",
        "bins",
        "before",
    ]  # no mathematics either
    for tag, labels in expected.items():
        most = 34 if tag == "text" else None  # a figure cuts longer ones
        texts = {text[:most] for text in page.texts(tag)}
        assert {f"{label} {HOSTILE}"[:most] for label in labels} <= texts, tag
    assert all(HOSTILE in page.texts(tag) for tag in ("dd", "td", "text"))
    assert {"_b", "after"} <= set(page.texts("text"))


def test_nothing_comes_from_outside():
    """The browser is told so too, whatever a text may smuggle in."""
    html = full_page().replace("http-equiv", "")
    assert not re.search("http|@import|<(link|img|image|iframe|object)|<script [a-z]", html)
    [policy] = [e["content"] for e in Page(full_page()).all("meta") if "http-equiv" in e]
    allowed = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert allowed.pop("default-src") == "'none'"
    assert set(allowed.values()) == {"'unsafe-inline'"}
    elements = Page(html).elements
    references = {
        value
        for e in elements
        for name, value in e.items()
        if name in ("src", "href", "xlink:href")
    }
    assert references
    assert references | set(re.findall(r"url\(([^)]*)\)", html)) <= {
        f"#{e['id']}" for e in elements if "id" in e
    }


def test_same_input_same_bytes_whatever_the_user_has_set():
    first = full_page()
    theirs = {
        "lines.linewidth": 9,
        "font.size": 30,
        "svg.hashsalt": "other",
        "axes.facecolor": "red",
    }
    with matplotlib.rc_context(theirs):
        before = dict(
            dict.items(matplotlib.rcParams)
        )  # as stored: reading the backend would choose one
        assert full_page.__wrapped__() == first
        assert dict(dict.items(matplotlib.rcParams)) == before


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_control_characters_and_half_pairs_are_shown_not_obeyed():
    table = Table(
        "half a pair: \ud83d, whole: 😀", ("a",), [("\x00a\x1b[2J\r\x7f\tb\nc\u202ed\x85",)]
    )
    page = Page(render("t", [table]))
    assert page.texts("td") == ["␀a␛[2J␍␡\tb\nc⟨U+202E⟩d⟨U+0085⟩"]
    assert page.texts("h2") == ["half a pair: ?, whole: 😀"]
    odd = "\x1bx\u202ey\r"
    labelled = drawn(Plot(odd, odd, odd, {odd: Series(*CURVE, labels=[odd] * 3)}, note=odd))
    assert not re.search("[^\n\t\x20-\x7e\xa0-\u2029\u202f-\uffff]", labelled)


# --- Its sections
#
# --------------------------------------------------------------------------------------------------


def test_facts_and_columns_of_numbers_which_are_aligned_right():
    facts = {
        "a": 12345.6,
        "b": 123456,
        "c": 1e-5,
        "d": [1.0, 2.5],
        "e": "1e-5",
        "f": 2e12,
        "g": -0.33333,
    }
    rows = [("12", 3, np.float32(0.5), None, True), ("ab\n c", 10, math.nan, 0.123456, False)]
    table = Table("t", ("text", "count", "score", "maybe", "flag"), rows, formats={"score": ".2f"})
    page = Page(render("t", [table, Facts("Figures", facts)]))
    assert page.texts("dd") == ["12346", "123456", "1e-05", "1, 2.5", "1e-5", "2e+12", "-0.3333"]
    assert page.texts("th", class_="number short") == ["count", "score", "maybe"]
    assert page.texts("td") == [
        "12",
        "3",
        "0.50",
        "–",
        "yes",
        "ab\n c",
        "10",
        "nan",
        "0.1235",
        "no",
    ]
    assert [cell["data-label"] for cell in page.all("td")] == list(table.columns) * 2


def test_gates():
    passed = (True, "0.9, at least 0.85")
    failed = (False, "0.5, at least 0.75")
    page = Page(render("t", [Gates({"accuracy": passed, "wins": failed})]))
    assert page.texts("strong") == ["Failed: 1 of 2 checks."]
    assert page.texts("td") == [
        "✓ pass",
        "accuracy",
        "0.9, at least 0.85",
        "✗ FAIL",
        "wins",
        "0.5, at least 0.75",
    ]
    assert Page(render("t", [Gates({"accuracy": passed})])).texts("strong") == [
        "Passed: 1 of 1 checks."
    ]


# --- Its figures
#
# --------------------------------------------------------------------------------------------------


def vertices(html: str, color: str = COLORS[0]) -> np.ndarray:
    """[N, 2] vertices of the first line of a colour, y growing upwards."""
    path = re.search(rf'<path d="([^"]*)" clip-path[^>]*stroke: {color}', html)
    assert path is not None
    return np.array([(float(x), -float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path[1])])


def test_a_curve_is_drawn_where_its_values_are():
    # zigzag: nothing to simplify
    x = np.arange(40)
    y = np.where(np.arange(40) % 2 == 0, 0.0, np.arange(40))
    points = vertices(drawn(Plot("p", "x", "y", {"a": (x, y)})))
    assert len(points) == 40
    for at, given in zip(points.T, (x, y), strict=True):
        assert_allclose((at - at.min()) / np.ptp(at), given / 39, atol=1e-4)
    html = drawn(
        Plot(
            "p",
            "x",
            "y",
            {"a": ([2, 5], [2, 5])},
            diagonal="x = y",
        )
    )
    line, diagonal = (np.polyfit(*vertices(html, color).T, 1) for color in (COLORS[0], "#777777"))
    assert_allclose(line, diagonal, rtol=1e-3)


def test_long_names_and_numbers_of_many_digits_do_not_leave_their_figure():
    nearly = ([0, 1, 2], [1.0, 1.0 + 1e-7, 1.0])
    html = drawn(Plot("p", "x", "y" * 80, {"a" * 80: nearly, "b": nearly}))
    texts = [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)", html)]
    number, label, name = sorted(map(len, texts))[-3:]
    assert number <= 7
    assert (label, name) == (35, 50)


def test_a_series_has_its_own_colour_or_that_of_its_place():
    plot = Plot("p", "x", "y", {"a": CURVE, "b": Series(*CURVE, color=0), "c": CURVE})
    assert [series.color for series in plot.shown.values()] == [0, 0, 2]


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_values_that_are_not_finite_leave_a_gap_and_are_counted(bad):
    values = [float(i % 3) for i in range(20)] + [bad] + [float(i % 3) for i in range(19)]
    html = drawn(Plot("p", "step", "y", {"loss": (range(40), values)}))
    assert Page(html).texts("p", class_="note") == ["loss: 1 of 40 values not finite, not drawn."]
    assert len(vertices(html)) == 39
    assert re.search(rf'd="M [^"]*M [^"]*"[^>]*stroke: {COLORS[0]}', html)  # two pieces
    assert "nan" not in html[html.index("<svg") : html.index("</svg>")].lower()


def test_series_without_values_are_left_out_with_a_note():
    series = {
        "validation": ([], []),
        "train": CURVE,
        "broken": ([0, 1], [math.nan, math.inf]),
    }
    page = Page(
        drawn(
            Plot("p", "x", "y", series),
            Plot("empty", "x", "y", {"c": ([], [])}, band=(0.0, 1.0, "band")),
        )
    )
    notes = [
        "validation: left out, as it has no finite values.",
        "broken: left out, as it has no finite values.",
    ]
    assert page.texts("p", class_="note") == [*notes, "c: left out, as it has no finite values."]
    assert not {"validation", "train", "broken"} & set(page.texts("text"))  # one series: no legend
    assert len(page.all("svg")) == 1


def test_odd_sizes_are_drawn():
    sizes = ([3], [1.0]), ([1, 2], [5.0, 5.0]), ([1, 2], [3e38, -3e38]), ([1, 1], [0.0, 1e-30])
    assert (
        len(Page(drawn(*(Plot("p", "x", "y", {"a": points}) for points in sizes))).all("svg")) == 4
    )


def test_bins_of_integers_hold_equally_many_of_them():
    assert_array_equal(figures.bin_edges([0, 3, 1]), [-0.5, 0.5, 1.5, 2.5, 3.5])
    assert_array_equal(figures.bin_edges([0, 24], max_bins=10), np.arange(-0.5, 27, 3))
    assert_array_equal(
        figures.bin_edges([0.5, 1.5, math.nan], max_bins=4), [0.5, 0.75, 1.0, 1.25, 1.5]
    )
    assert_array_equal(figures.bin_edges([0.25, 0.25]), [-0.25, 0.75])
    assert_array_equal(figures.bin_edges([math.inf]), [0.0, 1.0])


def test_a_histogram_is_as_high_as_its_counts():
    values = {
        "before": [0, 1, 1, math.nan, 9],
        "after": [2, 2, 2, 2],
        "bad": [math.inf],
    }
    html = drawn(histogram("h", "score", "responses", values, EDGES))
    page = Page(html)
    note = "before: 2 of 5 values not finite or outside. bad: 1 of 1 values not finite or outside."
    assert page.texts("p", class_="note") == [note]
    assert {"before", "after", "score", "responses", "0", "1", "2"} <= set(page.texts("text"))
    (x, before), (_, after) = (vertices(html, color).T for color in COLORS[:2])
    heights = (before - before.min()) / np.ptp(after) * 4  # the counts of after are 0, 0, 4
    at = -0.5 + (x - x.min()) / np.ptp(x) * 3
    corners = dict.fromkeys(zip(at.round(2), heights.round(2), strict=True))
    assert list(corners) == [(-0.5, 0), (-0.5, 1), (0.5, 1), (0.5, 2), (1.5, 2), (1.5, 0), (2.5, 0)]


@pytest.mark.parametrize(("kind", "more"), [("curve", set()), ("steps", {(1, 0), (1, 2)})])
def test_a_band_lies_around_its_curve(kind, more):
    band = Series(
        [0, 1, 2],
        [1.0, 2.0, 3.0],
        low=[0.0, 1.0, math.nan],
        high=[2.0, 4.0, 5.0],
        color=1,
        kind=kind,
    )
    html = drawn(Plot("p", "x", "y", {"a": band, "scale": Series([0, 2], [0.0, 4.0], color=2)}))
    zero, end = vertices(html, COLORS[2])
    place = re.search(
        rf'href="#([^"]*)" x="0" y="([^"]*)" style="fill: {COLORS[1]}; fill-opacity', html
    )
    assert place is not None
    path = re.search(rf'id="{place[1]}" d="([^"]*)"', html)
    assert path is not None
    corners = [
        (float(x), -float(y) - float(place[2])) for x, y in re.findall(r"[ML] (\S+) (\S+)", path[1])
    ]
    at = ((np.array(corners) - zero) / (end - zero) * (2, 4)).round(3)
    assert set(map(tuple, at.tolist())) == {(0, 0), (0, 2), (1, 1), (1, 4)} | more


def test_points_have_bars_in_place_of_a_band():
    points = Series([0, 1], [1.0, 2.0], low=[0.0, 1.5], high=[2.0, 4.0], color=1, kind="points")
    html = drawn(Plot("p", "x", "y", {"a": points, "scale": Series([0, 2], [0.0, 4.0], color=2)}))
    zero, end = vertices(html, COLORS[2])
    bars = re.findall(rf'<path d="([^"]*)" clip-path[^>]*stroke: {COLORS[1]}', html)
    ends = [
        [(float(x), -float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", bar)] for bar in bars
    ]
    at = ((np.array(ends) - zero) / (end - zero) * (2, 4)).round(3)
    assert at.tolist() == [[[0, 0], [0, 2]], [[1, 1.5], [1, 4]]]
    assert "fill-opacity" not in html


def test_a_long_curve_has_a_smoothed_one_and_short_ones_do_not():
    """Noise of 1 around a ramp: the means over the 25th part of the points lie near the ramp."""
    x = np.arange(1000)
    plot = Plot("p", "x", "y", {"a": (x, x / 1000 + (-1.0) ** x)})
    assert figures.notes(plot) == ["Thick: the mean over 40 points; pale: each point."]
    paths = re.findall(rf'<path d="([^"]*)" clip-path[^>]*stroke: {COLORS[0]}', drawn(plot))
    assert len(paths) == 2
    heights = [
        np.array([float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", path)]) for path in paths
    ]
    assert np.ptp(heights[1]) < 0.4 * np.ptp(heights[0])
    assert figures.notes(Plot("p", "x", "y", {"a": (x[:60], x[:60])})) == []
    along = Series(x, x, labels=[""] * 1000)  # a path, not a function of x
    assert figures.notes(Plot("p", "x", "y", {"a": along})) == []


def test_the_page_holds_the_values_under_the_pointer():
    """The script turns places into values by where the axes begin and end."""
    html = drawn(Plot("p", "step", "y", {"a": ([2, 3, 6], [0.5, math.nan, 0.25])}))
    [hover] = [json.loads(e["data-hover"]) for e in Page(html).all("svg")]
    assert (hover["x"], hover["series"]) == (
        "step",
        [["a", "curve", [["2", "0.5"], ["6", "0.25"]]]],
    )
    left, right, low, high = hover["ends"]
    places = vertices(html)[:, 0]
    values = low + (places - left) / (right - left) * (high - low)
    np.testing.assert_allclose(values, [2, 6], atol=1e-3)
    long = Plot("p", "step", "y", {"a": (range(5000), range(5000))})
    [hover] = [json.loads(e["data-hover"]) for e in Page(drawn(long)).all("svg")]
    assert 300 < len(hover["series"][0][2]) <= figures.MAX_HOVERED


def test_a_plot_has_words_for_those_who_do_not_see_it():
    plot = Plot("Loss", "step", "nats", {"training": ([0, 1, 2], [3.0, math.nan, 2.0])})
    [svg] = Page(drawn(plot)).all("svg", role="img")
    expected = "Loss: nats over step. training: first 3, last 2, lowest 2, highest 3."
    assert svg["aria-label"] == expected


def test_a_figure_alone_is_a_whole_file():
    plot = Plot("p", "x", "y", {"a": CURVE})
    assert ElementTree.fromstring(figures.svg(plot)).tag == "{http://www.w3.org/2000/svg}svg"
    assert not any(
        getattr(value, "__name__", "").startswith("matplotlib") for value in vars(figures).values()
    )  # slow


def test_a_page_has_a_main_part_and_links_to_its_sections():
    parts = [Facts("A & B", {"x": 1}), Facts("a b", {}), Facts("Ä", {})]
    html = render("T", parts)
    read = Page(html)
    assert len(read.all("main")) == 1
    assert [e["href"] for e in read.all("a")] == ["#a-b", "#a-b-2", "#section"]
    assert read.texts("a") == ["A & B", "a b", "Ä"]
    assert [e["id"] for e in read.all("h2")] == ["a-b", "a-b-2", "section"]
    assert html.index("<h1>") < html.index("<nav") < html.index("<h2")
    assert "<nav" not in render("T", [])
