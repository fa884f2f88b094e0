"""Writes results, figures, programs and tables of settings into the pages that show them.

    python docs/write_pages.py

A block of a page begins with a comment, which readers do not see, and ends with ``<!-- end -->``:

    <!-- results NAME                      <!-- program programs/NAME.py
    columns: sampled before | greedy       part: 2
    -->                                    -->

What lies between the two comments is made from docs/results/NAME.json or from the program; with
``reference settings`` and ``reference names`` from the settings. Run the script again after a
change of these or of the block; a test compares. Options of results, of which ``|`` separates
several values:

- ``columns``: a table of these metrics, of the last step, with a line for each variant. Without it
  and the next three: a table of all metrics and seeds.
- ``curve``: a figure of this metric over the steps, for each variant and seed, or of their mean
  where the file has it; with ``numbers: yes`` its numbers too. ``x`` is a metric in place of the
  steps, ``names`` are those of the legend in the order of ``variants``; variants like ``dashed``
  have dashed lines.
- ``bars``: a figure of METRIC before and after, of the first of these metrics that a variant has.
- ``by-seed``: a metric of each seed, as bars and as a table.
- ``figure``: the name of the SVG file in docs/figures/; ``labels``: the words at its x and y axis.
- ``variants``: patterns of the variants to show, in their order.
- ``without``: a seed that means are taken without, such as the one that settings were tried on.
- ``together: yes``: the columns' intervals are Student's over the seeds, so wide that all of them
  in such blocks of the page hold together with 95% (Bonferroni).

A file of one seed shows that seed's numbers. A table without rows is refused.

A program is shown whole, or its ``part`` between the lines ``# --- N`` and the next ``# ---``.
"""

import fnmatch
import functools
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import reference

from rlhf_jax import metrics
from rlhf_jax.report import figures

DOCS = Path(__file__).parent
BLOCK = re.compile(
    r"<!-- (results|program|reference) (\S+)\s((?:(?!-->).)*)-->\n(?:(?!<!--).)*<!-- end -->",
    re.DOTALL,
)
OPTIONS = {
    *("columns", "curve", "numbers", "x", "names", "dashed", "bars", "by-seed", "figure"),
    *("labels", "variants", "without", "together", "part"),
}
FEW_SEEDS = 5
EDGES = ("", " low", " high")  # behind the name of a metric
LONG = 30  # lines of a table that is shown when the reader opens it
WIDTH = 600  # pixels of a figure
Row = dict[str, Any]


def outputs() -> dict[Path, str]:
    """{file: text} of all pages with blocks, their blocks filled, and of the figures they show."""
    files: dict[Path, str] = {}
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text("utf-8")
        if "_build" in page.parts or "<!--" not in text:
            continue
        if 2 * len(BLOCK.findall(text)) != text.count("<!--"):
            raise SystemExit(f"{page}: a comment is neither the begin nor the end of a block")
        num = sum(_num_together(block, page) for block in BLOCK.finditer(text))
        fill = functools.partial(_filled, page=page, files=files, num_together=num)
        files[page] = BLOCK.sub(fill, text)
    return files


def _options(block: re.Match[str], page: Path) -> tuple[dict[str, str], str]:
    """What the block says, and its place."""
    where = f"{page}:{block.string.count(chr(10), 0, block.start()) + 1}"
    options = {}
    for line in block[3].splitlines():
        key, _, value = line.partition(": ")
        if key not in OPTIONS:
            raise SystemExit(f"{where}: no option {line!r}; take {', '.join(sorted(OPTIONS))}")
        options[key] = value
    if "together" in options and "columns" not in options:
        raise SystemExit(f"{where}: together without columns, whose intervals it makes")
    return options, where


def _read(name: str, options: Mapping[str, str], where: str) -> dict[str, Any]:
    """The results with the rows of the block's variants."""
    results: dict[str, Any] = json.loads((DOCS / "results" / f"{name}.json").read_text("utf-8"))
    patterns = options.get("variants", "*").split(" | ")
    return results | {"rows": _of_variants(results["rows"], patterns, where)}


def _num_together(block: re.Match[str], page: Path) -> int:
    """How many intervals the block shows that hold together with others."""
    options, where = _options(block, page)
    if "together" not in options:
        return 0
    rows = _read(block[2], options, where)["rows"]
    return len(_of_seeds(rows, options["columns"].split(" | ")))


def _filled(block: re.Match[str], page: Path, files: dict[Path, str], num_together: int) -> str:
    """The block with its content; its figure is added to the files."""
    kind, name, _ = block.groups()
    options, where = _options(block, page)
    up = "../" * (len(page.relative_to(DOCS).parts) - 1)
    if kind == "program":
        parts = _program(DOCS / name, up + name, options.get("part"))
    elif kind == "reference":
        parts = {"settings": _settings, "names": _names}[name]()
    else:
        results = _read(name, options, where)
        parts = _results(results, options, where, num_together)
        if "figure" in options:
            svg, seen, *parts = parts
            files[DOCS / "figures" / f"{options['figure']}.svg"] = card(svg)
            parts = [f"![{seen}]({up}figures/{options['figure']}.svg)", *parts]
        section = re.split("^#", block.string[block.end() :], maxsplit=1, flags=re.MULTILINE)[0]
        if f"<!-- results {name}\n" not in section:  # else a later block of the section says it
            link = f"{up}results/{name}.json"
            parts.append(_origin(results, options.get("without", ""), link))
    if any(part.endswith("| --- |") for part in parts):
        raise SystemExit(f"{where}: the table has no rows")
    head = block[0].partition("-->")[0]
    return "\n\n".join([f"{head}-->", *parts, "<!-- end -->"])


def _results(
    results: Mapping[str, Any], options: Mapping[str, str], where: str, num_together: int
) -> list[str]:
    """The figure of the results as SVG and in words, if the block has one, and their table."""
    rows = results["rows"]
    without = options.get("without", "")
    ends = {"columns": "", "curve": "", "x": "", "by-seed": "", "bars": " after"}
    named = [
        one + ends[key] for key in ends.keys() & options.keys() for one in options[key].split(" | ")
    ]
    if unknown := set(named) - {row["metric"] for row in rows}:
        raise SystemExit(f"{where}: no variant has {', '.join(sorted(unknown))}")
    if curve := options.get("curve"):
        if "names" in options and "variants" not in options:
            raise SystemExit(f"{where}: names without variants, whose order they have")
        plot, table = _curve(rows, curve, options)
        parts = [figures.svg(plot, options["figure"]), _seen(plot)]
        return [*parts, table] if "numbers" in options else parts
    if bars := options.get("bars"):
        num = results.get("sizes", {}).get("held_out")
        names, series = _before_and_after(rows, bars.split(" | "), without, num)
        return _bars(names, series, options["labels"])
    if by_seed := options.get("by-seed"):
        names, series, table = _by_seed(rows, by_seed, without)
        return [*_bars(names, series, options["labels"]), table]
    if columns := options.get("columns"):
        names = columns.split(" | ")
        if "together" in options:
            rows = _holding_together(rows, names, num_together)
        return [_by_variant(rows, names, without)]
    return [_by_metric(rows)]


def _program(path: Path, link: str, part: str | None) -> list[str]:
    text = path.read_text("utf-8")
    if part is not None:
        text = text.partition(f"# --- {part}")[2].partition("\n")[2].partition("# ---")[0]
    code = f"```py\n{text.strip()}\n```"  # py: a python block of a page runs by itself
    return [code] if part else [f"[{path.relative_to(DOCS.parent).as_posix()}]({link}):", code]


def _settings() -> list[str]:
    """All settings of a run: a heading and a table for each section."""
    parts = []
    for table in reference.tables():
        parts.append(f"## `{table.name}`" if table.name else "## Outside the sections")
        parts += [_plain(table.text)] * bool(table.text)
        rows = [[f"`{row.key}`", f"`{row.default}`", row.text] for row in table.rows]
        parts.append(_table(["key", "default", "meaning"], rows))
    return parts


def _names() -> list[str]:
    """The names of other libraries, from what errors know."""
    rows = [[f"`{theirs}`", here] for theirs, here in reference.other_names()]
    return [_table(["theirs", "here"], rows)]


def _origin(results: Mapping[str, Any], without: str, link: str) -> str:
    """Where the numbers come from, and of how many seeds they are."""
    num = len({str(row["seed"]) for row in results["rows"]} - {"all", without})
    few = " (few for an interval)" if num < FEW_SEEDS else ""
    but = f" without seed {without}" if without else ""
    seeds = {0: "", 1: f"One seed{but}; "}.get(num, f"{num} seeds{but}{few}; ")
    return (
        f"{seeds}`{results['command']}`; {results['date']}, revision {results['revision']}, "
        f"{results['machine']}, {results['seconds']} seconds; "
        f"[docs/results/{link.rpartition('/')[2]}]({link})"
    )


def _of_variants(rows: Sequence[Row], patterns: Sequence[str], where: str) -> list[Row]:
    """The rows of the variants like the patterns, in the order of these."""
    found = [
        [row for row in rows if fnmatch.fnmatchcase(row["variant"], pattern)]
        for pattern in patterns
    ]
    for pattern, rows_of_it in zip(patterns, found, strict=True):
        if not rows_of_it:
            raise SystemExit(f"{where}: no variant is like {pattern!r}")
    return [row for rows_of_it in found for row in rows_of_it]


def _curve(
    rows: Sequence[Row], metric: str, options: Mapping[str, str]
) -> tuple[figures.Plot, str]:
    """The curve of a metric, in a band where the file has one, and the table of its numbers."""
    x = options.get("x")
    means = [row for row in rows if row["seed"] == "all"]
    values = {}
    for row in means or rows:
        of_seed = "" if means else f", seed {row['seed']}"
        values[f"{row['variant']}{of_seed}", row["step"], row["metric"]] = row["value"]
    names = list(dict.fromkeys(name for name, _, of in values if of == metric))
    if "variants" not in options:
        names.sort()
    shown = options["names"].split(" | ") if "names" in options else _short(names)
    series: dict[str, figures.Series | figures.Pair] = {}
    lines = []
    num_of_style = {False: 0, True: 0}
    for name, label in zip(names, shown, strict=True):
        steps = sorted(step for of, step, found in values if (of, found) == (name, metric))
        found = [[values.get((name, step, f"{metric}{edge}")) for step in steps] for edge in EDGES]
        has_band = None not in found[1] + found[2]
        places = steps if x is None else [values[name, step, x] for step in steps]
        is_dashed = fnmatch.fnmatchcase(name, options.get("dashed", ""))
        series[label] = figures.Series(
            places,
            *(found if has_band else found[:1]),
            color=num_of_style[is_dashed],
            style=int(is_dashed),
        )
        num_of_style[is_dashed] += 1
        for place, value, low, high in zip(places, *found, strict=True):
            band = f"{low:.3g} to {high:.3g}" if has_band else ""
            lines.append([name, f"{place:.4g}", f"{value:.3g}", band])
    x_label, y_label = options["labels"].split(" | ")
    table = _table(["run", x or "step", metric, "95%"], lines)
    return figures.Plot(metric, x_label, y_label, series), table


def _seen(plot: figures.Plot) -> str:
    """What a curve shows, in words."""
    ends = [
        f"{name} from {series.y[0]:.3g} to {series.y[-1]:.3g}"
        for name, series in plot.shown.items()
    ]
    return f"{plot.y_label} over {plot.x_label}: {'; '.join(ends)}"


Bars = dict[str, list[tuple[float, float, float]]]  # {series: (value, low, high) of each name}


def _before_and_after(
    rows: Sequence[Row], wanted: Sequence[str], without: str, num: int | None
) -> tuple[list[str], Bars]:
    """Shares before and after; Wilson's interval of ``num`` rows where the file has none."""
    values = _last(rows, without)
    names = []
    series: Bars = {"before": [], "after": []}
    for name, found in values.items():
        metric = next(one for one in wanted if f"{one} after" in found)
        names.append(name if metric == wanted[0] else f"{name}: {metric}")
        for when, of_series in series.items():
            share = found[f"{metric} {when}"]
            low, high = (found.get(f"{metric} {when}{edge}", np.nan) for edge in EDGES[1:])
            if np.isnan(low) and num:
                low, high = metrics.wilson(share, num=num)
            of_series.append((share, low, high))
    return names, series


def _by_seed(rows: Sequence[Row], metric: str, without: str) -> tuple[list[str], Bars, str]:
    """A metric of each variant: a series and a column for each seed with the interval of its own
    rows, and the mean without the seed that is left out, with Student's interval.
    """
    values = {
        (row["variant"], row["seed"], row["metric"]): row["value"]
        for row in rows
        if row["seed"] != "all"
    }
    names = list(dict.fromkeys(name for name, _, found in values if found == metric))
    seeds = sorted({seed for _, seed, found in values if found == metric})
    heads = [f"seed {seed}" + " (tried on)" * (str(seed) == without) for seed in seeds]
    series: Bars = {
        head: [
            tuple(values.get((name, seed, metric + edge), np.nan) for edge in EDGES)
            for name in names
        ]
        for head, seed in zip(heads, seeds, strict=True)
    }
    lines = []
    for i, name in enumerate(names):
        others = [values.get((name, seed, metric)) for seed in seeds if str(seed) != without]
        kept = [value for value in others if value is not None]
        mean = sum(kept) / len(kept) if kept else np.nan
        of_seeds = [*(of_series[i] for of_series in series.values())]
        numbers = [*of_seeds, (mean, *metrics.student(np.array(kept)))]
        lines.append([name, *(_with_band(*of, ".2g") for of in numbers)])
    last = f"mean without seed {without}" if without else "mean"
    return names, series, _table(["variant", *heads, last], lines)


def _by_variant(rows: Sequence[Row], columns: Sequence[str], without: str) -> str:
    """A table with a line for each variant that has one of the metrics."""
    values = _last(rows, without)
    lines = []
    for name, found in zip(_short(list(values)), values.values(), strict=True):
        texts = [
            _with_band(*(found.get(column + edge, np.nan) for edge in EDGES)) for column in columns
        ]
        if any(texts):
            lines.append([name, *texts])
    table = _table(["variant", *columns], lines)
    if len(lines) <= LONG:
        return table
    summary = f"<summary>The table: {len(lines)} lines</summary>"
    return f"<details>\n{summary}\n\n{table}\n\n</details>"


def _of_seeds(rows: Sequence[Row], columns: Sequence[str]) -> dict[tuple[str, str], list[Row]]:
    """{(variant, metric): its rows of several seeds} of the columns that have such rows."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["seed"] != "all" and row["metric"] in columns:
            found.setdefault((row["variant"], row["metric"]), []).append(row)
    return {name: of for name, of in found.items() if len(of) > 1}


def _holding_together(rows: Sequence[Row], columns: Sequence[str], num: int) -> list[Row]:
    """The rows with other intervals: of the columns alone, at the level of one of ``num``."""
    changed = [row for row in rows if not row["metric"].endswith(EDGES[1:])]
    for (_, metric), of_seeds in _of_seeds(rows, columns).items():
        values = np.array([row["value"] for row in of_seeds])
        interval = metrics.student(values, level=1 - 0.05 / num)
        for edge, value in zip(EDGES[1:], interval, strict=True):
            own = {"seed": "all", "metric": metric + edge, "value": round(value, 4)}
            changed.append(of_seeds[-1] | own)
    return changed


def _last(rows: Sequence[Row], without: str) -> dict[str, dict[str, float]]:
    """{variant: {metric: its mean of the last step}}; without a seed the mean of the others, which
    has no interval. Rows of a single seed are those of the mean.
    """
    if without:
        found: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            is_edge = row["metric"].endswith(EDGES[1:])
            if str(row["seed"]) not in ("all", without) and not is_edge:
                found.setdefault((row["variant"], row["metric"]), []).append(row)
        rows = [
            of[-1] | {"seed": "all", "value": sum(row["value"] for row in of) / len(of)}
            for of in found.values()
        ]
    seeds = {row["seed"] for row in rows}
    shown = seeds.pop() if len(seeds) == 1 else "all"
    values: dict[str, dict[str, float]] = {row["variant"]: {} for row in rows}
    for row in sorted(rows, key=lambda row: row["step"]):
        if row["seed"] == shown:
            values[row["variant"]][row["metric"]] = row["value"]
    return values


def _by_metric(rows: Sequence[Row]) -> str:
    """A table with a line for each metric and a column for each seed."""
    values = {(row["metric"], row["seed"]): row["value"] for row in rows}
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    lines = [
        [metric]
        + [
            _with_band(*(values.get((metric + edge, seed), np.nan) for edge in EDGES))
            for seed in seeds
        ]
        for metric in dict.fromkeys(row["metric"] for row in rows)
        if not metric.endswith(EDGES[1:])
    ]
    return _table(
        ["metric", *("mean" if seed == "all" else f"seed {seed}" for seed in seeds)], lines
    )


def _with_band(value: float, low: float, high: float, digits: str = ".3g") -> str:
    """A number with its interval, as far as they are known."""
    band = "" if np.isnan(low) else f" ({low:{digits}} to {high:{digits}})"
    return "" if np.isnan(value) else f"{value:.3g}{band}"


def _short(names: Sequence[str]) -> list[str]:
    """The names without what all begin with, up to a colon."""
    start, colon, _ = names[0].partition(": ")
    are_alike = colon and all(name.startswith(start + colon) for name in names)
    return [name.removeprefix(start + colon) if are_alike else name for name in names]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *([_plain(text) for text in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(text: str) -> str:
    """The text as Markdown that shows it; in code a bar alone has a meaning."""
    text = text.replace("|", r"\|")
    return text if re.fullmatch("`[^`]*`", text) else re.sub("([*<])", r"\\\1", text)


def _bars(names: Sequence[str], series: Bars, label: str) -> list[str]:
    """Bars with their intervals, a group for each name, as SVG and in words."""
    import matplotlib.style
    from matplotlib.figure import Figure

    labels = [re.sub("([:,]) ", r"\1\n", name) for name in names]
    thickness = 0.8 / len(series)
    height = 0.75 + len(names) * (0.2 * len(series) + 0.15)
    own = {"svg.hashsalt": label, "savefig.transparent": True}
    with matplotlib.style.context([figures.STYLE, own], after_reset=True):
        figure = Figure(figsize=(figures.SIZE[0], height))
        axes = figure.add_subplot()
        for i, (name, numbers) in enumerate(series.items()):
            value, low, high = np.array(numbers, np.float64).T
            y = np.arange(len(names)) + (i - (len(series) - 1) / 2) * thickness
            color = figures.COLORS[i]
            axes.barh(y, value, 0.85 * thickness, color=color, alpha=0.55, label=name, zorder=2)
            axes.hlines(y, low, high, color="#333333", linewidth=1.2, zorder=3)
        axes.axvline(0, color="#888888", linewidth=0.8)
        axes.set_yticks(range(len(names)), labels)
        axes.set(xlabel=label, ylim=(len(names) - 0.5, -0.5))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        figure.legend(loc="upper right", ncols=len(series))
        top, bottom = 1 - 0.3 / height, 0.5 / height
        letters = max(map(len, "\n".join(labels).split("\n")))
        left = (0.15 + 0.085 * letters) / figures.SIZE[0]
        figure.subplots_adjust(left=left, right=0.96, bottom=bottom, top=top)
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=metadata)
    seen = [
        f"{name} {', '.join(f'{head} {of[i][0]:.3g}' for head, of in series.items())}"
        for i, name in enumerate(names)
    ]
    return [file.getvalue(), f"{label}: {'; '.join(seen)}"]


def card(svg: str) -> str:
    """The figure on white paper, which is read on a dark page too, with the width of all figures.

    A picture does not know the colours of the page around it.
    """
    tag = re.search(r'<svg [^>]*viewBox="0 0 (\S+) (\S+)"[^>]*>', svg)
    assert tag is not None
    width, height = float(tag[1]), float(tag[2])
    size = f'width="{WIDTH}" height="{WIDTH * height / width:.0f}" viewBox="0 0 {tag[1]} {tag[2]}"'
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    paper = '<rect width="100%" height="100%" rx="6" fill="#ffffff"/>'
    lines = "\n".join(line.rstrip() for line in svg[tag.end() :].strip().splitlines())
    return f"<svg {spaces} {size}>{paper}\n{lines}\n"


def main() -> None:
    for path, text in outputs().items():
        if not path.exists() or path.read_text("utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
            print(path)


if __name__ == "__main__":
    main()
