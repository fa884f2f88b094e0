"""The page: what a model writes stays text, nothing comes from outside, and the same input gives the same bytes."""

import math
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from rlhf_jax.report import figures
from rlhf_jax.report import html as page
from rlhf_jax.report.figures import Histogram, Plot, Series
from rlhf_jax.report.html import Block, Facts, Figures, Gates, Heading, Table, Text

HOSTILE = '</td></svg><script src="http://x.org/a.js">alert("1")</script> & $x$ <b>'
CURVE = ([0, 1, 2], [0.5, 0.25, 0.125])


class Page(HTMLParser):
    """Elements with their attributes and texts; fails on an end without its beginning, and on an id given twice."""

    VOID = ("meta",)

    def __init__(self, html: str):
        super().__init__()
        self.open: list[dict] = []
        self.elements: list[dict] = []
        self.feed(html)
        self.close()
        assert self.open == []
        ids = [element["id"] for element in self.elements if "id" in element]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", **dict(attrs)})
        if tag not in self.VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", **dict(attrs)})

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag: str, **attributes) -> list[dict]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [e for e in self.elements if e["tag"] == tag and wanted.items() <= e.items()]

    def texts(self, tag: str, **attributes) -> list[str]:
        return [element["text"] for element in self.all(tag, **attributes)]


def drawn(*plots) -> str:
    return page.render("t", [Figures("Curves", plots)])


def full_page(text: str = "text", y=CURVE[1]) -> str:
    curves = [
        Plot(f"plot {text}", f"x {text}", f"y {text}", {f"a {text}": (CURVE[0], y), "b": CURVE, "none": ([], [])}),
        Plot("band", "step", "nats", {"kl": CURVE}, band=(0.2, 0.4, f"band {text}"), lines={f"line {text}": 0.3}),
        Plot("points", "kl", "score", {"a": CURVE, "b": (CURVE[1], CURVE[0])}, order=f"order {text}"),
        Plot("seeds", "x", "y", {"a": Series(*CURVE, low=[0.4, 0.2, 0.1], high=[0.6, 0.3, 0.2], labels=[text] * 3)}),
        Plot("line", "x", "y", {"a": Series(*CURVE, points=True)}, diagonal=f"diagonal {text}", note=f"note {text}"),
        Histogram("bins", f"x {text}", "y", {f"before {text}": [0, 1, 1], "after": [1, 2]}, [-0.5, 0.5, 1.5, 2.5]),
    ]
    return page.render(
        f"title {text}",
        [
            Heading(f"chapter {text}"),
            Gates({f"gate {text}": (True, f"detail {text}"), "other": (False, "0.4, at least 0.5")}),
            Facts(f"facts {text}", {f"label {text}": text, "seed": 0}),
            Table(f"table {text}", (f"column {text}", "response", "score"), [(text, text, 0.5)], note=f"rows {text}"),
            Figures(f"figures {text}", curves),
            Block(f"block {text}", f"lines {text}"),
            Block(f"folded {text}", text, folded=True),
            Text(f"section {text}", [f"paragraph {text}"]),
        ],
        summary=f"summary {text}",
    )


def test_texts_are_escaped_wherever_they_stand():
    html = full_page(HOSTILE)
    read = Page(html)
    assert read.all("script") == read.all("b") == []
    for tag, expected in {
        "title": f"title {HOSTILE}",
        "h1": f"title {HOSTILE}",
        "dt": f"label {HOSTILE}",
        "dd": HOSTILE,
        "th": f"column {HOSTILE}",
        "h2": f"chapter {HOSTILE}",
        "h3": f"section {HOSTILE}",
        "h4": f"plot {HOSTILE}",
        "td": f"gate {HOSTILE}",
        "p": f"summary {HOSTILE}",
        "pre": f"\nlines {HOSTILE}",
        "summary": f"folded {HOSTILE}",
    }.items():
        assert expected in read.texts(tag)
    assert {f"rows {HOSTILE}", f"paragraph {HOSTILE}", f"note {HOSTILE}"} <= set(read.texts("p"))
    assert read.all("td", data_label="") == []
    labels = {"a", "x", "y", "band", "line", "order", "diagonal", "before"}
    assert {HOSTILE, *(f"{label} {HOSTILE}" for label in labels)} <= set(
        read.texts("text")
    )  # not taken for mathematics either


def test_nothing_from_outside_and_no_scripts():
    html = full_page()
    assert "http" not in html
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []
    read = Page(html)
    assert {element["tag"] for element in read.elements}.isdisjoint(
        {"script", "link", "img", "image", "iframe", "object"}
    )
    references = [value for e in read.elements for name, value in e.items() if name in ("src", "href", "xlink:href")]
    assert references
    ids = {f"#{element['id']}" for element in read.elements if "id" in element}
    assert set(references) <= ids
    assert set(re.findall(r"url\((#[^)]*)\)", html)) <= ids


def test_same_input_same_bytes_whatever_the_user_has_set():
    first = full_page()
    with matplotlib.rc_context(
        {"lines.linewidth": 9, "font.size": 30, "svg.hashsalt": "other", "axes.facecolor": "red"}
    ):
        before = dict(dict.items(matplotlib.rcParams))  # as stored: reading the backend would choose one
        assert full_page() == first
        assert dict(dict.items(matplotlib.rcParams)) == before
    assert full_page(y=[0.5, 0.25, 0.126]) != first
    unsalted = [Plot("None", "x", "y", {"a": CURVE}, lines={"b": 0.3})]  # matplotlib reads this salt as absent
    assert drawn(*unsalted) == drawn(*unsalted)


def points_of(html: str) -> list[tuple[float, float]]:
    """Vertices of the path of the first curve, in the page's coordinates (y grows downwards)."""
    path = re.search(rf'<path d="([^"]*)"[^>]*stroke: {figures.COLORS[0]}', html)
    assert path is not None
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path[1])]


def test_a_curve_is_drawn_where_its_values_are():
    x, y = np.arange(40), np.where(np.arange(40) % 2 == 0, 0.0, np.arange(40))  # zigzag: nothing to simplify
    points = np.array(points_of(drawn(Plot("p", "x", "y", {"a": (x, y)}))))
    assert len(points) == 40
    for found, given in ((points[:, 0], x), (-points[:, 1], y)):
        scaled = (found - found.min()) / np.ptp(found)
        np.testing.assert_allclose(scaled, given / 39, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_leave_a_gap_and_are_counted(bad):
    values = [float(i % 3) for i in range(40)]
    values[20] = bad
    html = drawn(Plot("p", "step", "y", {"loss": (range(40), values)}))
    assert Page(html).texts("p", class_="note") == ["loss: 1 of 40 values not finite, not drawn."]
    assert len(points_of(html)) == 39
    assert re.search(rf'd="M [^"]*M [^"]*"[^>]*stroke: {figures.COLORS[0]}', html)  # two pieces
    assert "nan" not in html[html.index("<svg") : html.index("</svg>")].lower()
    points = Plot("p", "x", "y", {"loss": (values, values)}, order="step")
    assert len(re.findall("<use [^>]*stroke: #[0-9a-f]{6}", drawn(points))) >= 39


def test_series_without_values_are_left_out_with_a_note():
    series = {"validation": ([], []), "train": CURVE, "broken": ([0, 1], [math.nan, math.inf])}
    read = Page(drawn(Plot("p", "x", "y", series)))
    assert read.texts("p", class_="note") == [
        "validation: left out, as it has no values.",
        "broken: left out, as it has no finite values.",
    ]
    assert not {"validation", "train", "broken"} & set(read.texts("text"))  # one series: no legend
    read = Page(drawn(Plot("p", "x", "y", {"validation": ([], [])}, band=(0.0, 1.0, "band"))))
    assert read.all("svg") == []
    assert len(read.texts("p", class_="note")) == 1


def test_legend_names_series_band_and_lines():
    plot = Plot("p", "x", "y", {"_train": CURVE, "validation": CURVE}, band=(0.0, 1.0, "target"), lines={"chance": 0.5})
    assert {"_train", "validation", "target", "chance"} <= set(Page(drawn(plot)).texts("text"))


@pytest.mark.parametrize("order", ["", "iteration"])
def test_odd_sizes_are_drawn(order):
    for xs, ys in (([3], [1.0]), ([1, 2], [5.0, 5.0]), ([1, 2], [3e38, -3e38]), ([1, 1], [0.0, 1e-30])):
        html = drawn(Plot("p", "x", "y", {"a": (xs, ys)}, order=order))
        assert len(Page(html).all("svg")) == 1


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"plot p, a: expected xs \[N\] and ys \[N\], got \(2,\) and \(3,\)"):
        drawn(Plot("p", "x", "y", {"a": ([1, 2], [1, 2, 3])}))
    with pytest.raises(ValueError, match="table t: expected 2 cells in each row, got"):
        page.render("t", [Table("t", ("a", "b"), [(1, 2), (1,)])])


def test_columns_of_numbers_are_aligned_right():
    rows = [("12", 3, np.float32(0.5), None, True), ("ab\n c", 10, math.nan, 0.123456, False)]
    table = Table("t", ("text", "count", "score", "maybe", "flag"), rows, formats={"score": ".2f"})
    read = Page(page.render("t", [table]))
    assert read.texts("th", class_="number") == ["count", "score", "maybe"]
    cells = ["12", "3", "0.50", "–", "yes", "ab\n c", "10", "nan", "0.1235", "no"]
    assert read.texts("td") == cells
    assert read.texts("td", class_="number") == ["3", "0.50", "–", "10", "nan", "0.1235"]
    assert [cell["data-label"] for cell in read.all("td")] == list(table.columns) * 2


def test_numbers_of_facts():
    facts = {"a": 12345.6, "b": 123456, "c": 1e-5, "d": [1.0, 2.5], "e": "1e-5", "f": 2e12, "g": -0.33333}
    read = Page(page.render("t", [Facts("Figures", facts)]))
    assert read.texts("dt") == list(facts)
    assert read.texts("dd") == ["12346", "123456", "1e-05", "1, 2.5", "1e-5", "2e+12", "-0.3333"]


def test_gates():
    passed, failed = (True, "0.9, at least 0.85"), (False, "0.5, at least 0.75")
    read = Page(page.render("t", [Gates({"accuracy": passed, "wins": failed})]))
    assert read.texts("strong") == ["Failed: 1 of 2 gates."]
    assert read.texts("td") == ["✓ pass", "accuracy", "0.9, at least 0.85", "✗ FAIL", "wins", "0.5, at least 0.75"]
    assert Page(page.render("t", [Gates({"accuracy": passed})])).texts("strong") == ["Passed: 1 of 1 gates."]


def test_write(tmp_path):
    page.write(tmp_path / "report.html", "half a pair: \ud83d, whole: 😀", [Facts("f", {"a": 1})])
    expected = page.render("half a pair: ?, whole: 😀", [Facts("f", {"a": 1})])
    assert (tmp_path / "report.html").read_text("utf-8") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_control_characters_are_shown_not_obeyed():
    read = Page(page.render("t", [Table("t", ("a",), [("\x00a\x1b[2J\r\x7f\tb\nc\u202ed",)])]))
    assert read.texts("td") == ["␀a␛[2J␍␡\tb\nc⟨U+202E⟩d"]


def test_chapters_put_their_sections_one_level_deeper():
    assert Page(page.render("t", [Text("a", ["b"])])).texts("h2") == ["a"]
    read = Page(page.render("t", [Heading("chapter"), Text("a", ["b"])]))
    assert (read.texts("h2"), read.texts("h3")) == (["chapter"], ["a"])


def test_blocks_keep_their_lines_and_fold():
    read = Page(page.render("t", [Block("b", "\n one\n  two\n"), Block("config", "a: 1\n", folded=True)]))
    assert read.texts("pre") == ["\n\n one\n  two\n", "\na: 1\n"]  # a browser drops the first line's end
    assert read.texts("details") == ["\nconfig\n\na: 1\n\n"]


def test_bins_of_integers_hold_equally_many_of_them():
    np.testing.assert_array_equal(figures.bin_edges([[0, 3], [1]]), [-0.5, 0.5, 1.5, 2.5, 3.5])
    np.testing.assert_array_equal(figures.bin_edges([[0, 24]], max_bins=10), np.arange(-0.5, 27, 3))
    np.testing.assert_array_equal(figures.bin_edges([[0.5, 1.5], [math.nan]], max_bins=4), [0.5, 0.75, 1.0, 1.25, 1.5])
    np.testing.assert_array_equal(figures.bin_edges([[0.25, 0.25]]), [-0.25, 0.75])
    np.testing.assert_array_equal(figures.bin_edges([[], [math.inf]]), [0.0, 1.0])


def outline(svg: str, color: str) -> np.ndarray:
    """[N, 2] vertices of a histogram's outline, y growing upwards."""
    path = re.search(rf'<path d="([^"]*)"[^>]*style="fill: none[^"]* stroke: {color}', svg)
    assert path is not None
    return np.array([(float(x), -float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path[1])])


def test_a_histogram_is_as_high_as_its_counts():
    values = {"before": [0, 1, 1, math.nan, 9], "after": [2, 2, 2, 2]}
    html = drawn(Histogram("h", "score", "responses", values, [-0.5, 0.5, 1.5, 2.5]))
    read = Page(html)
    assert read.texts("p", class_="note") == ["before: 2 of 5 values not finite or outside."]
    assert {"before", "after", "score", "responses"} <= set(read.texts("text"))
    before, after = (outline(html, color) for color in figures.COLORS[:2])
    unit = (after[:, 1].max() - after[:, 1].min()) / 4  # of the counts 0, 0, 4
    heights = (before[:, 1] - before[:, 1].min()) / unit
    np.testing.assert_allclose(heights[:6], [0, 1, 1, 2, 2, 0], atol=1e-3)
    read = Page(drawn(Histogram("h", "x", "y", {"none": [], "bad": [math.inf]}, [0, 1])))
    assert read.all("svg") == []
    assert read.texts("p", class_="note") == [
        "none: left out, as it has no values.",
        "bad: left out, as it has no finite values.",
    ]


def test_a_band_lies_around_its_curve():
    curve = Series([0, 1, 2], [1.0, 2.0, 3.0], low=[0.0, 1.0, math.nan], high=[2.0, 4.0, 5.0], color=1)
    html = drawn(Plot("p", "x", "y", {"a": curve, "scale": Series([0, 2], [0.0, 4.0], color=2)}))
    scale = re.search(rf'd="M \S+ (\S+)\s+L \S+ (\S+)\s+" clip[^>]*stroke: {figures.COLORS[2]}', html)
    place = re.search(rf'href="#([^"]*)" x="0" y="([^"]*)" style="fill: {figures.COLORS[1]}; fill-opacity', html)
    assert scale is not None
    assert place is not None
    band = re.search(rf'id="{place[1]}" d="([^"]*)"', html)
    assert band is not None
    zero, four = map(float, scale.groups())
    drawn_at = [float(y) + float(place[2]) for _, y in re.findall(r"[ML] (\S+) (\S+)", band[1])]
    assert {round((y - zero) / (four - zero) * 4, 3) for y in drawn_at} == {0.0, 1.0, 2.0, 4.0}


def test_figures_of_one_title_do_not_share_ids():
    Page(drawn(*[Plot("same", "x", "y", {"a": CURVE})] * 2))  # reads each id once
