"""Sphinx builds the documentation without network: ``sphinx-build -W --keep-going -b html docs
docs/_build/html``.
"""

import importlib.metadata
import os
import re
from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

# The package is imported for its docstrings alone; an accelerator must not be taken for that.
os.environ["JAX_PLATFORMS"] = "cpu"

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


# What a screen reader needs and the theme leaves out: the level of the sidebar's headings, and
# code, equations and tables that scroll by the keyboard.
ATTRIBUTES = {
    '<p class="caption" role="heading">': '<p class="caption" role="heading" aria-level="2">',
    "<pre>": '<pre tabindex="0">',
    '<div class="table-wrapper ': '<div tabindex="0" class="table-wrapper ',
    '<div class="math-wrapper ': '<div tabindex="0" class="math-wrapper ',
}


def accessible(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Adds the attributes to a page and to its sidebar, which the theme has made by now."""
    for part in ("body", "furo_navigation_tree"):
        for tag, complete in ATTRIBUTES.items():
            context[part] = context.get(part, "").replace(tag, complete)


def contents(app: Sphinx, page: str, source: list[str]) -> None:
    """The sidebar is the lists of links of the first page, below their headings."""
    if page != "index":
        return
    for caption, links in re.findall(r"^## (.*)\n\n((?:- .*\n)+)", source[0], re.MULTILINE):
        pages = "\n".join(re.findall(r"^- \[.*?\]\((\S+)\.md\)", links, re.MULTILINE))
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"


def setup(app: Sphinx) -> None:
    app.connect("source-read", contents)
    app.connect("html-page-context", accessible, priority=900)
    app.add_html_math_renderer(
        "mathml", inline_renderers=(mathml, None), block_renderers=(mathml, None)
    )
    app.connect("autodoc-process-docstring", google)
