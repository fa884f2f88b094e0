"""Sphinx builds the documentation without network: ``sphinx-build -W --keep-going -b html docs
docs/_build/html``.
"""

import fnmatch
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from docutils import nodes
from docutils.parsers.rst import Directive, directives
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

# The package is imported for its docstrings alone; an accelerator must not be taken for that.
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent))

import reference

from rlhf_jax import metrics
from rlhf_jax.report import figures

project = "rlhf_jax"
author = "the rlhf_jax authors"
release = version = importlib.metadata.version("rlhf-jax")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"rlhf_jax {release}"
html_search_scorer = __file__.removesuffix("conf.py") + "search_scorer.js"
html_show_sphinx = False
html_show_copyright = False
html_math_renderer = "mathml"
smartquotes = False  # else a flag reads –model

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
highlight_language = "text"
default_role = "code"

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True


def google(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Translates docstrings: their examples, and ``Args:``, ``Returns:`` and ``Raises:``.

    Napoleon as an extension would also take the text before a colon below a config field for the
    field's type.
    """
    if what == "module":  # an indented paragraph there is code
        starts = [
            i for i in range(1, len(lines)) if lines[i].startswith("    ") and not lines[i - 1]
        ]
        for i in reversed(starts):
            lines[i:i] = ["::", ""]
    elif what != "attribute":
        config = Config(napoleon_use_ivar=True, napoleon_use_rtype=False)
        lines[:] = GoogleDocstring(lines, config, app, what, name, obj, options).lines()


def mathml(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """Equations as MathML, which browsers draw without a script from the network."""
    equation = latex2mathml.tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block))
    # Room above and below; the theme's scroll bars are left out.
    translator.body.append(
        equation.replace(
            'display="block"', 'display="block" style="overflow: visible; margin: 1em"'
        )
    )
    raise nodes.SkipNode


# What a screen reader needs and the theme leaves out: the level of the sidebar's headings, and code
# and tables that scroll by the keyboard.
ATTRIBUTES = {
    '<p class="caption" role="heading">': '<p class="caption" role="heading" aria-level="2">',
    "<pre>": '<pre tabindex="0">',
    '<div class="table-wrapper ': '<div tabindex="0" class="table-wrapper ',
}


def accessible(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Adds the attributes to a page and to its sidebar, which the theme has made by now."""
    for part in ("body", "furo_navigation_tree"):
        for tag, complete in ATTRIBUTES.items():
            context[part] = context.get(part, "").replace(tag, complete)


class Settings(Directive):
    """All settings of a run: a heading and a table for each section."""

    def run(self) -> list[nodes.Node]:
        parts = []
        for table in reference.tables():
            name = table.name or "outside the sections"
            part = nodes.section(ids=[nodes.make_id(f"settings {name}")], names=[name])
            part += nodes.title("", "", nodes.literal("", name) if table.name else nodes.Text(name))
            if table.text:
                part += nodes.paragraph("", table.text)
            part += _table(["key", "default", ""], [list(row) for row in table.rows], literal=2)
            parts.append(part)
        return parts


class Names(Directive):
    """A table of the names of other libraries, from what errors know."""

    def run(self) -> list[nodes.Node]:
        lines = [list(row) for row in reference.other_names()]
        return [_table(["theirs", "here"], lines, literal=1)]


FEW_SEEDS = 5
EDGES = ("", " low", " high")  # behind the name of a metric


class Results(Directive):
    """Figures and tables of a file in docs/results/: a page has no number of its own.

    ``{results} NAME`` with the option ``metric``: its curve over the steps for each variant and
    seed, or of their mean where the file has it, in a band where the file has ``METRIC low`` and
    ``METRIC high``, and the same numbers; with ``only-figure`` without them. The option ``x`` names
    a metric that takes the place of the steps. With ``columns``, metrics with ``|`` between them: a
    table with a line for each variant, of its last step. With ``by-seed``: a metric of each seed,
    as points and as a table. Without all three: a table of all metrics.

    ``without`` is a seed that means are taken without, such as the one that settings were tried on.

    ``variants`` are patterns of the names to show, with ``|`` between them; those like ``dashed``
    have dashed lines in the colours of the others.
    """

    required_arguments = 1
    option_spec = {  # noqa: RUF012 (docutils' own form)
        "metric": directives.unchanged_required,
        "x": directives.unchanged_required,
        "columns": directives.unchanged_required,
        "by-seed": directives.unchanged_required,
        "without": directives.unchanged_required,
        "variants": directives.unchanged_required,
        "dashed": directives.unchanged_required,
        "only-figure": directives.flag,
    }

    def run(self) -> list[nodes.Node]:
        path = Path(__file__).parent / "results" / f"{self.arguments[0]}.json"
        self.state.document.settings.record_dependencies.add(str(path))
        results = json.loads(path.read_text("utf-8"))
        rows = self.shown(results["rows"])
        left_out = self.options.get("without", "")
        how = f"{_seeds(rows, left_out)}{results['command']}; {results['date']}, revision "
        how += results["revision"].replace("-dirty", " with changes that were not committed")
        how += f", {results['machine']}, {results['seconds']} seconds; docs/results/{path.name}"
        metric = self.options.get("metric")
        if metric is not None:
            parts = self.curve(path, rows, metric)
        elif columns := self.options.get("columns"):
            parts = [_by_variant(rows, columns.split(" | "), left_out)]
        elif by_seed := self.options.get("by-seed"):
            parts = _by_seed(rows, by_seed, left_out)
        else:
            parts = _numbers(rows)
        if "only-figure" in self.options:
            return parts[:1]
        return [*parts, nodes.paragraph("", how)]

    def shown(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of the variants that the option names, in its order; all without it."""
        patterns = self.options.get("variants", "*").split(" | ")
        found = [
            row
            for pattern in patterns
            for row in rows
            if fnmatch.fnmatchcase(row["variant"], pattern)
        ]
        if not found:
            raise self.error(f"results: no variant is like {' or '.join(patterns)}")
        return found

    def curve(self, path: Path, rows: list[dict[str, Any]], metric: str) -> list[nodes.Node]:
        """The curve of a metric, and its numbers."""
        x = self.options.get("x")
        means = [row for row in rows if row["seed"] == "all"]
        values = {}
        for row in means or rows:
            of_seed = "" if means else f", seed {row['seed']}"
            name = f"{row['variant']}{of_seed}"
            values[name, row["step"], row["metric"]] = row["value"]
        names = dict.fromkeys(name for name, _, of in values if of == metric)
        series = {}
        lines = []
        for name in names if "variants" in self.options else sorted(names):
            steps = sorted(step for of, step, found in values if (of, found) == (name, metric))
            found = [
                [values.get((name, step, f"{metric}{edge}")) for step in steps] for edge in EDGES
            ]
            has_band = None not in found[1] + found[2]
            places = steps if x is None else [values[name, step, x] for step in steps]
            is_dashed = fnmatch.fnmatchcase(name, self.options.get("dashed", ""))
            color = sum(one.style == is_dashed for one in series.values())
            series[_short(name, names)] = figures.Series(
                places,
                *(found if has_band else found[:1]),
                color=color,
                style=int(is_dashed),
            )
            for place, value, low, high in zip(places, *found, strict=True):
                band = f"{low:.3g} to {high:.3g}" if has_band else ""
                lines.append([name, f"{place:.4g}", f"{value:.3g}", band])
        plot = figures.Plot(metric, x or "step", metric, series)
        picture = figures.element(plot, salt=f"{path.stem} {self.lineno}")
        return [
            nodes.raw("", picture, format="html"),
            _table(["run", x or "step", metric, "95%"], lines),
        ]


def _seeds(rows: list[dict[str, Any]], left_out: str) -> str:
    """How many seeds the numbers are of, if the file has more than their means."""
    num = len({str(row["seed"]) for row in rows} - {"all", left_out})
    few = " (few for an interval)" if num < FEW_SEEDS else ""
    but = f" without seed {left_out}" if left_out else ""
    return {0: "", 1: f"one seed{but}; "}.get(num, f"{num} seeds{but}{few}; ")


def _by_seed(rows: list[dict[str, Any]], metric: str, left_out: str) -> list[nodes.Node]:
    """A metric of each variant: points and a column for each seed with the interval of its own
    rows, and the mean without the seed that is left out, with Student's interval.
    """
    values = {
        (row["variant"], row["seed"], row["metric"]): row["value"]
        for row in rows
        if row["seed"] != "all"
    }
    names = dict.fromkeys(name for name, _, found in values if found == metric)
    seeds = sorted({seed for _, seed, found in values if found == metric})
    heads = [f"seed {seed}" + " (tried on)" * (str(seed) == left_out) for seed in seeds]
    found = {
        (name, seed): [values.get((name, seed, metric + edge), np.nan) for edge in EDGES]
        for name in names
        for seed in seeds
    }
    lines = []
    for name in names:
        others = [found[name, seed][0] for seed in seeds if str(seed) != left_out]
        kept = [value for value in others if not np.isnan(value)]
        mean = sum(kept) / len(kept) if kept else np.nan
        of_seeds = [*(found[name, seed] for seed in seeds), [mean, *metrics.student(kept)]]
        lines.append([name, *(_with_band(*numbers) for numbers in of_seeds)])
    series = {}
    for place, (seed, head) in enumerate(zip(seeds, heads, strict=True)):
        own = np.array([found[name, seed] for name in names])
        x = np.arange(len(names)) + 1 + 0.15 * (place - (len(seeds) - 1) / 2)
        series[head] = figures.Series(x, *own.T, kind="points")
    places = ", ".join(f"{i} {name.partition(',')[0]}" for i, name in enumerate(names, start=1))
    picture = figures.element(figures.Plot(metric, places, metric, series), salt=metric)
    last = f"mean without seed {left_out}" if left_out else "mean"
    return [nodes.raw("", picture, format="html"), _table(["", *heads, last], lines)]


def _with_band(value: float, low: float, high: float) -> str:
    """A number with its interval, as far as they are known."""
    band = "" if np.isnan(low) else f" ({low:.2g} to {high:.2g})"
    return "" if np.isnan(value) else f"{value:.3g}{band}"


def _short(name: str, names: Iterable[str]) -> str:
    """The name without what all begin with, up to a colon."""
    start, colon, rest = name.partition(": ")
    are_alike = all(other.startswith(start + colon) for other in names)
    return rest if colon and are_alike else name


def _by_variant(rows: list[dict[str, Any]], columns: list[str], left_out: str) -> nodes.table:
    """A table with a line for each variant that has one of the metrics: means of the last step, or
    new ones, without intervals, if a seed is left out.
    """
    if left_out:
        rows = _means(rows, left_out)
    values: dict[str, dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        of_variant = values.setdefault(row["variant"], {})
        if row["seed"] == "all":
            of_variant[row["metric"]] = row["value"]
    lines = []
    for name, found in values.items():
        texts = []
        for column in columns:
            low = found.get(f"{column} low")
            band = "" if low is None else f" ({low:.3g} to {found[f'{column} high']:.3g})"
            texts.append(f"{found[column]:.3g}{band}" if column in found else "")
        if any(texts):
            lines.append([_short(name, values), *texts])
    return _table(["", *columns], lines)


def _means(rows: list[dict[str, Any]], left_out: str) -> list[dict[str, Any]]:
    """The means of all metrics over the other seeds."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        is_edge = row["metric"].endswith((" low", " high"))
        if str(row["seed"]) not in ("all", left_out) and not is_edge:
            found.setdefault((row["variant"], row["metric"]), []).append(row)
    return [
        of[-1] | {"seed": "all", "value": sum(row["value"] for row in of) / len(of)}
        for of in found.values()
    ]


def _numbers(rows: list[dict[str, Any]]) -> list[nodes.Node]:
    """A table with a line for each metric of each seed."""
    values = {(row["seed"], row["metric"]): row["value"] for row in rows}
    lines = []
    for (seed, metric), value in values.items():
        if metric.endswith((" low", " high")):
            continue
        low = values.get((seed, f"{metric} low"))
        high = values.get((seed, f"{metric} high"))
        band = "" if low is None or high is None else f"{low:.3g} to {high:.3g}"
        lines.append([metric, str(seed), f"{value:.3g}", band])
    return [_table(["metric", "seed", "value", "95%"], lines)]


def _table(head: list[str], lines: list[list[str]], literal: int = 0) -> nodes.table:
    """A table of texts, of which those of the first ``literal`` columns are code."""
    group = nodes.tgroup("", cols=len(head))
    group += [nodes.colspec(colwidth=1) for _ in head]

    def entry(text: str, is_code: bool) -> nodes.entry:
        part = nodes.literal("", text) if is_code else nodes.Text(text)
        return nodes.entry("", nodes.paragraph("", "", part))

    def row(texts: list[str], literal: int) -> nodes.row:
        return nodes.row("", *(entry(text, i < literal) for i, text in enumerate(texts)))

    group += nodes.thead("", row(head, 0))
    group += nodes.tbody("", *(row(line, literal) for line in lines))
    return nodes.table("", group)


def setup(app: Sphinx) -> None:
    app.add_directive("results", Results)
    app.add_directive("settings", Settings)
    app.add_directive("names", Names)
    app.connect("html-page-context", accessible, priority=900)
    app.add_html_math_renderer(
        "mathml", inline_renderers=(mathml, None), block_renderers=(mathml, None)
    )
    app.connect("autodoc-process-docstring", google)
