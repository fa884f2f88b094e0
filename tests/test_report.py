"""The page: what a model writes stays text, nothing comes from outside, and the same input gives the same bytes."""

import math
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from rlhf_jax import report
from rlhf_jax.errors import UserError
from rlhf_jax.report import Plot, Table
from rlhf_jax.tracking import RowWriter

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


def full_page(text: str = "text", y=CURVE[1]) -> str:
    return report.render(
        f"title {text}",
        summary=f"summary {text}",
        facts={f"label {text}": text, "seed": 0},
        gates={f"gate {text}": (True, f"detail {text}"), "other": (False, "0.4, at least 0.5")},
        tables=[Table(f"table {text}", (f"column {text}", "response", "score"), [(text, text, 0.5)])],
        plots=[
            Plot(f"plot {text}", f"x {text}", f"y {text}", {f"a {text}": (CURVE[0], y), "b": CURVE, "none": ([], [])}),
            Plot("band", "step", "nats", {"kl": CURVE}, band=(0.2, 0.4, f"band {text}"), lines={f"line {text}": 0.3}),
            Plot("points", "kl", "score", {"a": CURVE, "b": (CURVE[1], CURVE[0])}, order=f"order {text}"),
        ],
    )


def test_texts_are_escaped_wherever_they_stand():
    html = full_page(HOSTILE)
    page = Page(html)
    assert page.all("script") == page.all("b") == []
    for tag, expected in {
        "title": f"title {HOSTILE}",
        "h1": f"title {HOSTILE}",
        "dt": f"label {HOSTILE}",
        "dd": HOSTILE,
        "th": f"column {HOSTILE}",
        "h3": f"plot {HOSTILE}",
        "td": f"gate {HOSTILE}",
        "p": f"summary {HOSTILE}",
    }.items():
        assert expected in page.texts(tag)
    assert page.all("td", data_label="") == []
    labels = {"a", "x", "y", "band", "line", "order"}
    assert {f"{label} {HOSTILE}" for label in labels} <= set(page.texts("text"))  # not taken for mathematics either


def test_nothing_from_outside_and_no_scripts():
    html = full_page()
    assert "http" not in html
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []
    page = Page(html)
    assert {element["tag"] for element in page.elements}.isdisjoint(
        {"script", "link", "img", "image", "iframe", "object"}
    )
    references = [value for e in page.elements for name, value in e.items() if name in ("src", "href", "xlink:href")]
    assert references
    ids = {f"#{element['id']}" for element in page.elements if "id" in element}
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
    assert report.render("t", plots=unsalted) == report.render("t", plots=unsalted)


def points_of(html: str) -> list[tuple[float, float]]:
    """Vertices of the path of the first curve, in the page's coordinates (y grows downwards)."""
    path = re.search(rf'<path d="([^"]*)"[^>]*stroke: {report.COLORS[0]}', html)
    assert path is not None
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path[1])]


def test_a_curve_is_drawn_where_its_values_are():
    x, y = np.arange(40), np.where(np.arange(40) % 2 == 0, 0.0, np.arange(40))  # zigzag: nothing to simplify
    points = np.array(points_of(report.render("t", plots=[Plot("p", "x", "y", {"a": (x, y)})])))
    assert len(points) == 40
    for drawn, given in ((points[:, 0], x), (-points[:, 1], y)):
        scaled = (drawn - drawn.min()) / np.ptp(drawn)
        np.testing.assert_allclose(scaled, given / 39, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_leave_a_gap_and_are_counted(bad):
    values = [float(i % 3) for i in range(40)]
    values[20] = bad
    html = report.render("t", plots=[Plot("p", "step", "y", {"loss": (range(40), values)})])
    assert Page(html).texts("p", class_="note") == ["loss: 1 of 40 values not finite, not drawn."]
    assert len(points_of(html)) == 39
    assert re.search(rf'd="M [^"]*M [^"]*"[^>]*stroke: {report.COLORS[0]}', html)  # two pieces
    assert "nan" not in html[html.index("<svg") : html.index("</svg>")].lower()
    points = Plot("p", "x", "y", {"loss": (values, values)}, order="step")
    assert len(re.findall("<use [^>]*stroke: #[0-9a-f]{6}", report.render("t", plots=[points]))) >= 39


def test_series_without_values_are_left_out_with_a_note():
    series = {"validation": ([], []), "train": CURVE, "broken": ([0, 1], [math.nan, math.inf])}
    page = Page(report.render("t", plots=[Plot("p", "x", "y", series)]))
    assert page.texts("p", class_="note") == [
        "validation: left out, as it has no values.",
        "broken: left out, as it has no finite values.",
    ]
    assert not {"validation", "train", "broken"} & set(page.texts("text"))  # one series: no legend
    page = Page(report.render("t", plots=[Plot("p", "x", "y", {"validation": ([], [])}, band=(0.0, 1.0, "band"))]))
    assert page.all("svg") == []
    assert len(page.texts("p", class_="note")) == 1


def test_legend_names_series_band_and_lines():
    plot = Plot("p", "x", "y", {"_train": CURVE, "validation": CURVE}, band=(0.0, 1.0, "target"), lines={"chance": 0.5})
    assert {"_train", "validation", "target", "chance"} <= set(Page(report.render("t", plots=[plot])).texts("text"))


@pytest.mark.parametrize("order", ["", "iteration"])
def test_odd_sizes_are_drawn(order):
    for xs, ys in (([3], [1.0]), ([1, 2], [5.0, 5.0]), ([1, 2], [3e38, -3e38]), ([1, 1], [0.0, 1e-30])):
        html = report.render("t", plots=[Plot("p", "x", "y", {"a": (xs, ys)}, order=order)])
        assert len(Page(html).all("svg")) == 1


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"plot p, a: expected xs \[N\] and ys \[N\], got \(2,\) and \(3,\)"):
        report.render("t", plots=[Plot("p", "x", "y", {"a": ([1, 2], [1, 2, 3])})])
    with pytest.raises(ValueError, match="table t: expected 2 cells in each row, got"):
        report.render("t", tables=[Table("t", ("a", "b"), [(1, 2), (1,)])])


def test_columns_of_numbers_are_aligned_right():
    rows = [("12", 3, np.float32(0.5), None, True), ("ab\n c", 10, math.nan, 0.123456, False)]
    table = Table("t", ("text", "count", "score", "maybe", "flag"), rows, formats={"score": ".2f"})
    page = Page(report.render("t", tables=[table]))
    assert page.texts("th", class_="number") == ["count", "score", "maybe"]
    cells = ["12", "3", "0.50", "–", "yes", "ab\n c", "10", "nan", "0.1235", "no"]
    assert page.texts("td") == cells
    assert page.texts("td", class_="number") == ["3", "0.50", "–", "10", "nan", "0.1235"]
    assert [cell["data-label"] for cell in page.all("td")] == list(table.columns) * 2


def test_numbers_of_facts():
    facts = {"a": 12345.6, "b": 123456, "c": 1e-5, "d": [1.0, 2.5], "e": "1e-5", "f": 2e12, "g": -0.33333}
    page = Page(report.render("t", facts=facts))
    assert page.texts("dt") == list(facts)
    assert page.texts("dd") == ["12346", "123456", "1e-05", "1, 2.5", "1e-5", "2e+12", "-0.3333"]


def test_gates():
    passed, failed = (True, "0.9, at least 0.85"), (False, "0.5, at least 0.75")
    page = Page(report.render("t", gates={"accuracy": passed, "wins": failed}))
    assert page.texts("strong") == ["Failed: 1 of 2 gates."]
    assert page.texts("td") == ["✓ pass", "accuracy", "0.9, at least 0.85", "✗ FAIL", "wins", "0.5, at least 0.75"]
    assert Page(report.render("t", gates={"accuracy": passed})).texts("strong") == ["Passed: 1 of 1 gates."]


def test_write(tmp_path):
    report.write(tmp_path / "report.html", "half a pair: \ud83d, whole: 😀", facts={"a": 1})
    assert (tmp_path / "report.html").read_text("utf-8") == report.render("half a pair: ?, whole: 😀", facts={"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_rows_and_series_of_a_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = RowWriter(path)
    writer.write(0, {"validation/score": 0.5})
    writer.write(1, {"loss": math.nan, "note": "a\u2028b"})
    writer.write(2, {"loss": -math.inf, "validation/score": 0.75})
    writer.close()
    rows = report.read_rows(path)
    assert report.series(rows, "validation/score") == ([0, 2], [0.5, 0.75])
    assert report.series(rows, "absent") == ([], [])
    steps, losses = report.series(rows, "loss")
    assert steps == [1, 2]
    assert math.isnan(losses[0])
    assert losses[1] == -math.inf
    assert rows[1]["note"] == "a\u2028b"
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert len(report.read_rows(path)) == 3  # cut by a kill


@pytest.mark.parametrize("line", ["[1]", "{}", "step", '{"step": null}', ""])
def test_lines_that_are_no_rows(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: expected a JSON object with the key step"):
        report.read_rows(path)


def test_no_rows_file(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        report.read_rows(tmp_path / "metrics.jsonl")
