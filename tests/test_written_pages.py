"""What docs/write_pages.py puts into the pages, and that a code host shows it."""

import json
import re
import sys
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest
import results
from builders import ROOT

from rlhf_jax import metrics

sys.path.append(str(ROOT / "docs"))
import write_pages

PAGES = [page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts]
FIGURES = sorted((ROOT / "docs" / "figures").glob("*.svg"))
# Another version draws other bytes.
IS_MATPLOTLIB_OF_CI = f"\nmatplotlib=={mpl.__version__}\n" in (
    ROOT / "constraints-py311.txt"
).read_text("utf-8")


def test_the_pages_and_figures_are_what_the_script_makes():
    made = write_pages.outputs()
    drawn = [path for path in made if path.suffix == ".svg"]
    assert len(drawn) > 10
    for path, text in made.items():
        found = path.read_text("utf-8") if path.exists() else ""
        is_compared = path not in drawn or IS_MATPLOTLIB_OF_CI
        assert found == text if is_compared else found, f"{path}: run python docs/write_pages.py"


def test_the_pages_have_no_fence_that_a_code_host_does_not_show():
    for page in [ROOT / "README.md", *PAGES]:
        fences = set(re.findall(r"^ *[`:]{3,}\{([\w-]+)\}", page.read_text("utf-8"), re.MULTILINE))
        assert fences <= ({"eval-rst"} if page.parent.name == "api" else set()), page


def test_each_figure_is_on_a_page():
    text = "".join(page.read_text("utf-8") for page in PAGES)
    assert {path.name for path in FIGURES} == set(re.findall(r"figures/(\w+\.svg)\)", text))


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_a_figure_can_be_read_on_light_and_dark_pages(path):
    figure = ET.parse(path).getroot()
    paper = figure[0]
    assert paper.tag.endswith("}rect")
    assert {key: paper.get(key) for key in ("width", "height", "fill")} == {
        "width": "100%",
        "height": "100%",
        "fill": "#ffffff",
    }
    scale = int(figure.get("width")) / float(figure.get("viewBox").split()[2])
    sizes = re.findall(r"font(?:-size)?: (?:\d+ )?([\d.]+)px", path.read_text("utf-8"))
    assert sizes
    assert min(map(float, sizes)) * scale >= 11


@pytest.fixture
def fill(tmp_path, monkeypatch):
    """A function that gives the content of a block on a page, for results with these rows."""
    monkeypatch.setattr(write_pages, "DOCS", tmp_path)

    def fill(block, rows=()):
        head = {"command": "python a.py", "date": "2026-11-01", "revision": "abc"}
        head |= {"machine": "2 cores", "seconds": 3, "rows": rows}
        (tmp_path / "results").mkdir(exist_ok=True)
        (tmp_path / "results" / "a.json").write_text(json.dumps(head))
        page = tmp_path / "inner" / "page.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(f"# Page\n\n<!-- {block}-->\nold\n<!-- end -->\n")
        made = write_pages.outputs()[page]
        assert made.startswith(f"# Page\n\n<!-- {block}-->\n\n")
        assert made.endswith("\n\n<!-- end -->\n")
        return made.split("-->\n\n")[1].split("\n\n<!-- end")[0].split("\n\n")

    return fill


def row(variant, seed, step, value, low=None, high=None, metric="m"):
    numbers = {"": value, " low": low, " high": high}
    return [
        results.row(variant, seed, step, f"{metric}{edge}", number)
        for edge, number in numbers.items()
        if number is not None
    ]


def test_columns_are_of_the_last_step_in_the_order_of_the_variants(fill):
    rows = [
        *row("x: one", "all", 9, 0.25, 0.125, 0.5),
        *row("x: one", "all", 3, 7),
        *row("x: two", "all", 2, 0.12345),
        *row("x: two", 0, 5, 8),
        *row("x: other", "all", 2, 1, metric="n"),
        *row("x: neither", "all", 2, 1, metric="k"),
        *row("y", "all", 2, 1),
    ]
    table, origin = fill("results a\ncolumns: m | n\nvariants: x: t* | x: *\n", rows)
    assert table.splitlines() == [
        "| variant | m | n |",
        "| --- | --- | --- |",
        "| two | 0.123 |  |",
        "| one | 0.25 (0.125 to 0.5) |  |",
        "| other |  | 1 |",
    ]
    assert origin == (
        "One seed; `python a.py`; 2026-11-01, revision abc, 2 cores, 3 seconds; "
        "[docs/results/a.json](../results/a.json)"
    )


def test_a_long_table_is_folded(fill):
    rows = [one for i in range(31) for one in row(f"v{i}", "all", 1, i)]
    start, table, end, _ = fill("results a\ncolumns: m\n", rows)
    assert start.startswith("<details>\n<summary>")
    assert (table.count("\n"), end) == (32, "</details>")
    assert fill("results a\ncolumns: m\n", rows[:30])[0].startswith("| ")


def test_a_seed_is_left_out_of_means_and_the_others_have_students_interval(fill):
    seeds = {0: 9.0, 1: 1.0, 2: 3.0}
    rows = [
        *row("a", "all", 1, 4, 3, 5),
        *(one for seed, value in seeds.items() for one in row("a", seed, 1, value, value - 1, 10)),
    ]
    assert fill("results a\ncolumns: m\nwithout: 0\n", rows)[0].endswith("\n| a | 2 |")
    low, high = metrics.student([1.0, 3.0])
    figure, table, origin = fill(
        "results a\nby-seed: m\nwithout: 0\nfigure: f\nlabels: change\n", rows
    )
    assert figure == ("![change: a seed 0 (tried on) 9, seed 1 1, seed 2 3](../figures/f.svg)")
    head, _, line = table.splitlines()
    assert head == "| variant | seed 0 (tried on) | seed 1 | seed 2 | mean without seed 0 |"
    assert line == f"| a | 9 (8 to 10) | 1 (0 to 10) | 3 (2 to 10) | 2 ({low:.2g} to {high:.2g}) |"
    assert origin.startswith("2 seeds without seed 0 (few for an interval); ")


def test_all_metrics_have_a_column_for_each_seed(fill):
    rows = [*row("a", 0, 1, 1), *row("a", 0, 1, 2, 1, 3, metric="n"), *row("a", "all", 1, 5)]
    assert fill("results a ", rows)[0].splitlines()[2:] == [
        "| m | 1 | 5 |",
        "| n | 2 (1 to 3) |  |",
    ]


def test_a_table_of_one_seed_has_its_numbers(fill):
    rows = [*row("a", 1, 20, 0.25), *row("b", 1, 20, 0.5)]
    assert fill("results a\ncolumns: m\n", rows)[0].endswith("\n| a | 0.25 |\n| b | 0.5 |")


def test_intervals_hold_together_over_the_blocks_of_a_page(fill):
    """Three intervals in two blocks, one of them twice: each has the level of one of four."""
    seeds = {"a": (1.0, 3.0, 8.0), "b": (0.0, 2.0, 7.0)}
    rows = [
        *(one for name in seeds for one in row(name, "all", 1, 4, 3, 5)),
        *(one for name in seeds for one in row(name, "all", 1, 9, 8, 10, metric="alone")),
        *(
            one
            for name, of in seeds.items()
            for i, x in enumerate(of)
            for one in row(name, i, 1, x)
        ),
        *(one for i, x in enumerate(seeds["a"]) for one in row("a", i, 1, 2 * x, metric="n")),
        *row("a", "all", 1, 8, 7, 9, metric="n"),
    ]
    fill("results a ", rows)
    page = write_pages.DOCS / "inner" / "page.md"
    both = "<!-- results a\ncolumns: m | n | alone\ntogether: yes\n-->\n<!-- end -->\n"
    one = "<!-- results a\ncolumns: m\nvariants: a\ntogether: yes\n-->\n<!-- end -->\n"
    without = "<!-- results a\ncolumns: m\n-->\n<!-- end -->\n"
    page.write_text(f"# Page\n\n{both}\n{one}\n{without}")
    made = write_pages.outputs()[page]
    intervals = [metrics.student(np.array(of), level=1 - 0.05 / 4) for of in seeds.values()]
    a, b = (f"{low:.3g} to {high:.3g}" for low, high in intervals)
    n = " to ".join(f"{2 * edge:.3g}" for edge in intervals[0])
    lines = [line for line in made.splitlines() if line.startswith(("| a", "| b"))]
    assert lines == [
        f"| a | 4 ({a}) | 8 ({n}) | 9 |",
        f"| b | 4 ({b}) |  | 9 |",
        f"| a | 4 ({a}) |",
        "| a | 4 (3 to 5) |",
        "| b | 4 (3 to 5) |",
    ]


def test_a_curve_is_of_means_if_there_are_some_and_names_follow_the_variants(fill):
    rows = [
        *row("b", "all", 2, 0.5, 0.25, 0.75),
        *row("b", "all", 1, 0.125, 0, 0.25),
        *row("a", "all", 1, 4),
        *row("a", 0, 1, 6),
    ]
    block = "results a\ncurve: m\nnumbers: yes\nfigure: f\nlabels: step | share\n"
    figure, table, _ = fill(f"{block}variants: b | a\nnames: B | A\n", rows)
    assert figure == "![share over step: B from 0.125 to 0.5; A from 4 to 4](../figures/f.svg)"
    assert table.splitlines()[2:] == [
        "| b | 1 | 0.125 | 0 to 0.25 |",
        "| b | 2 | 0.5 | 0.25 to 0.75 |",
        "| a | 1 | 4 |  |",
    ]
    each = [one for one in rows if one["seed"] != "all"]
    assert fill(block, each)[1].splitlines()[2:] == ["| a, seed 0 | 1 | 6 |  |"]


def test_a_curve_over_another_metric(fill):
    rows = [
        *row("a", "all", 1, 4),
        *row("a", "all", 1, 0.5, metric="KL"),
        *row("a", "all", 2, 5),
        *row("a", "all", 2, 0.75, metric="KL"),
    ]
    block = "results a\ncurve: m\nx: KL\nnumbers: yes\nfigure: f\nlabels: KL, nats | m\n"
    lines = fill(block, rows)[1].splitlines()
    assert lines[2:] == ["| a | 0.5 | 4 |  |", "| a | 0.75 | 5 |  |"]


def test_bars_before_and_after_have_the_intervals_of_the_file_or_wilsons():
    rows = [
        *row("a", "all", 1, 0.25, 0.125, 0.5, metric="m before"),
        *row("a", "all", 1, 0.75, metric="m after"),
        *row("b", "all", 1, 0.5, metric="n before"),
        *row("b", "all", 1, 1, metric="n after"),
    ]
    names, series = write_pages._before_and_after(rows, ["m", "n"], "", 128)
    assert names == ["a", "b: n"]
    assert series["before"][0] == (0.25, 0.125, 0.5)
    assert series["after"][0] == (0.75, *metrics.wilson(0.75, num=128))


@pytest.mark.parametrize(("between", "num"), [("text\n", 0), ("## Next\n", 1)])
def test_the_last_block_of_a_section_says_where_the_numbers_come_from(between, num, fill):
    fill("results a ", row("a", 0, 1, 1))
    page = write_pages.DOCS / "inner" / "page.md"
    block = "<!-- results a\ncolumns: m\n-->\n<!-- end -->\n"
    page.write_text(f"{block}\n{between}\n{block}")
    first, last = write_pages.outputs()[page].split("<!-- end -->\n")[:2]
    assert (first.count("; 2026-11-01, "), last.count("; 2026-11-01, ")) == (num, 1)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("results a\ncolumn: m\n", r"page\.md:3: no option 'column: m'"),
        ("results a\ncolumns: m\nvariants: a | z*\n", r"page\.md:3: no variant is like 'z\*'"),
        ("results a\ncolumns: m | n\n", r"page\.md:3: no variant has n"),
        ("results a\nbars: m\nlabels: x\n", r"page\.md:3: no variant has m after"),
        ("results a\ncurve: m\nnames: A\nlabels: x | y\n", r"page\.md:3: names without variants"),
        ("results a\ncurve: m\nlabels: x | y\ntogether: yes\n", r"page\.md:3: together without"),
    ],
)
def test_a_wrong_block_is_told_with_its_place(block, message, fill):
    with pytest.raises(SystemExit, match=message):
        fill(block, row("a", 0, 1, 1))


def test_no_table_is_written_without_rows(fill):
    """Of two seeds without a mean."""
    rows = [*row("a", 0, 1, 1), *row("a", 1, 1, 2)]
    with pytest.raises(SystemExit, match=r"page\.md:3: the table has no rows"):
        fill("results a\ncolumns: m\n", rows)


@pytest.mark.parametrize("text", ["<!-- result a -->\n<!-- end -->\n", "<!-- results a -->\n"])
def test_a_block_that_would_not_be_filled_is_told(text, fill):
    (write_pages.DOCS / "page.md").write_text(text + "<!-- program a.py -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match=r"page\.md: a comment is neither"):
        write_pages.outputs()


def test_a_program_stands_whole_with_its_name_or_in_part(fill, tmp_path):
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "p.py").write_text('"""P."""\n\n# --- 1\na = 1\n\n# --- 2\nb = 2\n')
    assert fill("program programs/p.py\npart: 1\n") == ["```py\na = 1\n```"]
    name, *code = fill("program programs/p.py ")
    assert name.endswith("/programs/p.py](../programs/p.py):")
    assert "\n\n".join(code) == '```py\n"""P."""\n\n# --- 1\na = 1\n\n# --- 2\nb = 2\n```'


def test_what_markdown_would_read_is_escaped():
    table = write_pages._table(["a"], [["x|y * <z>"], ["`a|*`"]])
    assert table.splitlines()[2:] == [r"| x\|y \* \<z> |", r"| `a\|*` |"]
