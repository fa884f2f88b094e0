"""Sphinx builds the documentation without network: ``sphinx-build -W --keep-going -b html docs
docs/_build/html``.
"""

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive, directives
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

# The package is imported for its docstrings alone; an accelerator must not be taken for that.
os.environ["JAX_PLATFORMS"] = "cpu"

from rlhf_jax.report import figures

project = "rlhf_jax"
author = "the rlhf_jax authors"
release = version = importlib.metadata.version("rlhf-jax")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"rlhf_jax {release}"
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


class Results(Directive):
    """The figure and the table of a file in docs/results/: a page has no number of its own.

    ``{results} NAME`` with the option ``metric``: its curve over the steps for each variant and
    seed, or of their mean where the file has it, in a band where the file has ``METRIC low`` and
    ``METRIC high``, and the same numbers. With the option ``changes``: for each variant and metric
    the means before and after, and the interval of the change. Without either: a table of all
    metrics.
    """

    required_arguments = 1
    option_spec = {  # noqa: RUF012 (docutils' own form)
        "metric": directives.unchanged_required,
        "changes": directives.flag,
    }

    def run(self) -> list[nodes.Node]:
        path = Path(__file__).parent / "results" / f"{self.arguments[0]}.json"
        self.state.document.settings.record_dependencies.add(str(path))
        results = json.loads(path.read_text("utf-8"))
        how = f"{results['command']}; revision {results['revision']}, {results['machine']}, "
        how += f"{results['seconds']} seconds; docs/results/{path.name}"
        metric = self.options.get("metric")
        if "changes" in self.options:
            parts = _changes(results["rows"])
        elif metric is None:
            parts = _numbers(results["rows"])
        else:
            parts = self.curve(path, results, metric)
        return [*parts, nodes.paragraph("", how)]

    def curve(self, path: Path, results: dict[str, Any], metric: str) -> list[nodes.Node]:
        """The curve of a metric, and its numbers."""
        rows = results["rows"]
        means = [row for row in rows if row["seed"] == "all"]
        values = {}
        for row in means or rows:
            of_seed = "" if means else f", seed {row['seed']}"
            name = f"{row['variant']}{of_seed}"
            values[name, row["step"], row["metric"]] = row["value"]
        series = {}
        lines = []
        for name in sorted({name for name, _, _ in values}):
            steps = sorted(step for of, step, found in values if (of, found) == (name, metric))
            found = [
                [values.get((name, step, f"{metric}{edge}")) for step in steps]
                for edge in ("", " low", " high")
            ]
            has_band = None not in found[1] + found[2]
            series[name] = figures.Series(steps, *(found if has_band else found[:1]))
            for step, value, low, high in zip(steps, *found, strict=True):
                band = f"{low:.3g} to {high:.3g}" if has_band else ""
                lines.append([name, str(step), f"{value:.3g}", band])
        plot = figures.Plot(metric, "step", metric, series)
        picture = figures.element(plot, salt=path.stem)
        return [
            nodes.raw("", picture, format="html"),
            _table(["run", "step", metric, "95%"], lines),
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


def _changes(rows: list[dict[str, Any]]) -> list[nodes.Node]:
    """What each variant changed, from means over seeds: ``METRIC`` and ``METRIC, change``."""
    means = [row for row in rows if row["seed"] == "all"]
    values = {(row["variant"], row["step"], row["metric"]): row["value"] for row in means}
    lines = []
    for (variant, step, metric), change in values.items():
        name = metric.removesuffix(", change")
        if name == metric:
            continue
        ends = [values[variant, at, name] for at in (0, step)]
        edges = [values.get((variant, step, f"{metric} {edge}")) for edge in ("low", "high")]
        band = "" if None in edges else "{:+.3f} to {:+.3f}".format(*edges)
        numbers = [f"{value:.3f}" for value in ends]
        lines.append([variant, name, str(step), *numbers, f"{change:+.3f}", band])
    return [_table(["stage", "metric", "steps", "before", "after", "change", "95%"], lines)]


def _table(head: list[str], lines: list[list[str]]) -> nodes.table:
    """A table of texts."""
    group = nodes.tgroup("", cols=len(head))
    group += [nodes.colspec(colwidth=1) for _ in head]

    def row(texts: list[str]) -> nodes.row:
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", text)) for text in texts))

    group += nodes.thead("", row(head))
    group += nodes.tbody("", *map(row, lines))
    return nodes.table("", group)


def setup(app: Sphinx) -> None:
    app.add_directive("results", Results)
    app.connect("html-page-context", accessible, priority=900)
    app.add_html_math_renderer(
        "mathml", inline_renderers=(mathml, None), block_renderers=(mathml, None)
    )
    app.connect("autodoc-process-docstring", google)
