"""What runs did, as one page: curves, reward against KL, samples before and after, settings,
commands.

    page.write(["runs/ppo"], "report.html")
    page.write(["runs/ppo-seed0", "runs/ppo-seed1", "runs/grpo"], "comparison.html")

Runs of one kind (SFT, reward models, policies) share their figures. Runs that differ only in their
seeds are drawn as a mean with a band. Each kind has a chapter. Only the runs' folders are read. A
job can draw a page of its own parts:

    loss = figures.Plot("Loss", "step", "nats per token", {"training": (steps, losses)})
    parts = [page.Facts("Settings", {"seed": 0}), page.Figures("Curves", [loss])]
    text = page.render("My run", parts)

A page loads nothing. Its script, which shows values under the pointer, is the same on each page.
The same input gives the same bytes: a page holds no time, no path and no random identifier of its
own. ``follow`` writes pages that say when, and load themselves again.
"""

import html
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from rlhf_jax.errors import file_errors
from rlhf_jax.report import chapters, figures, records
from rlhf_jax.report.parts import Facts, Figures, Gates, Part, Table
from rlhf_jax.runs.writing import write_atomically

__all__ = ["Facts", "Figures", "Gates", "Table", "default_path", "fill", "render", "write"]
__all__ += ["write_png"]

NAVIGATION = "<!-- links to the sections -->"
# A part that is folded, or a heading.
_HEADING = re.compile(
    r'<details>.*?</details>|<(h\d) class="(chapter|section)">(.*?)</h\d>', re.DOTALL
)
# A browser would drop or obey control characters. Unicode has pictures of the ASCII ones; others,
# and those that turn the direction of the text, become their numbers.
PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
PICTURES |= {
    code: f"⟨U+{code:04X}⟩"
    for code in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
PICTURES[0x7F] = "␡"


def render(title: str, parts: Sequence[Part], summary: str = "") -> str:
    """The page as HTML, without anything from outside. All texts are escaped.

    Args:
      title: heading of the page.
      parts: what stands below it, in this order.
      summary: a sentence or two below the title.
    """
    return fill("report.html", title=title, summary=summary, level=2, parts=parts)


def write(
    runs: Sequence[str | Path],
    path: str | Path,
    parts: Sequence[Part] = (),
    following: str = "",
) -> None:
    """Writes the page of one run or several. A folder of runs, such as a pipeline's, stands for the
    runs in it.

    Args:
        parts: what stands behind the runs.
        following: how far runs that still train are; the open page loads itself again.

    Raises:
        UserError: a folder that holds no run, a run given twice, a broken file in one, or no place
            for the page.
    """
    run_records = records.find(runs)
    drawn = chapters.of(run_records)
    title = drawn[0]["title"]
    level = 2
    if len(drawn) > 1:
        stages = ", ".join(chapter["stages"] for chapter in drawn)
        title = f"{stages}: {len(run_records)} runs"
        level = 3
    values = {"chapters": drawn, "parts": parts, "following": following}
    text = fill("runs.html", title=title, summary="", level=level, **values)
    with file_errors(path, "written"):
        write_atomically(Path(path), text)


def write_png(runs: Sequence[str | Path], folder: str | Path) -> list[Path]:
    """Writes each figure of the page that ``write`` makes as a PNG, called by its title:
    ``score-objective-score.png``. Where the page has chapters, their stages come first:
    ``ppo-score-objective-score.png``.

    Returns:
        The files, in the page's order. A figure with nothing to draw has none.

    Raises:
        UserError: as ``write`` does, or no place for the files.
    """
    drawn = chapters.of(records.find(runs))
    images: dict[Path, bytes] = {}
    count = Counter[str]()
    for chapter in drawn:
        for figure in chapter["curves"] + chapter["distributions"]:
            image = figures.png(figure)
            if not image:
                continue
            name = _slug(f"{chapter['stages']} {figure.title}" if len(drawn) > 1 else figure.title)
            count[name] += 1
            numbered = f"{name}--{count[name]}" if count[name] > 1 else name
            images[Path(folder, f"{numbered}.png")] = image
    with file_errors(folder, "written"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path, image in images.items():
            write_atomically(path, image)
    return list(images)


def default_path(runs: Sequence[str | Path]) -> Path:
    """The default path of the page of these runs.

    In the run's folder; for a folder of runs ``stages.html`` in it, beside a quickstart's own
    ``report.html``; for several folders ``report.html`` in the working directory.
    """
    if len(runs) != 1:
        return Path("report.html")
    folder = Path(runs[0])
    is_run = (folder / "manifest.json").is_file()
    return folder / ("report.html" if is_run else "stages.html")


def fill(template: str, **context: Any) -> str:
    """Fills a template of ``templates/`` with values; in HTML all texts are escaped."""
    salts = itertools.count()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlhf_jax.report"),
        autoescape=jinja2.select_autoescape(),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["text"] = _text
    environment.filters["notes"] = figures.notes
    environment.filters["cells"] = lambda row, columns: [row.get(column) for column in columns]
    environment.filters["svg"] = lambda plot: figures.element(plot, str(next(salts)))
    text = environment.get_template(template).render(context | {"navigation": NAVIGATION})
    text = text.translate(PICTURES)
    text = _with_links(text) if NAVIGATION in text else text
    # A model may write half a surrogate pair, which no file can hold.
    return text.encode("utf-8", "replace").decode("utf-8")


def _with_links(page: str) -> str:
    """The page with ids for its open sections, and links to these or its chapters at the top."""
    count = Counter[str]()
    links = []

    def named(heading: re.Match[str]) -> str:
        tag, kind, title = heading.groups()
        if tag is None:
            return heading[0]
        name = _slug(html.unescape(title)) or "section"
        count[name] += 1
        if count[name] > 1:
            name += f"-{count[name]}"
        if tag == "h2":
            links.append(f'<li><a href="#{name}">{title}</a></li>\n')
        return f'<{tag} id="{name}" class="{kind}">{title}</{tag}>'

    page = _HEADING.sub(named, page)
    items = "".join(links)
    shown = f'<nav aria-label="Sections">\n<ul>\n{items}</ul>\n</nav>' if links else ""
    return page.replace(NAVIGATION, shown, 1)


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _text(value: Any, format_spec: str = "") -> str:
    if value is None:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, float | np.floating):
        has_many_digits = 1e4 <= abs(float(value)) < 1e9
        return format(value, format_spec or (".0f" if has_many_digits else ".4g"))
    return format(value, format_spec) if isinstance(value, int | np.integer) else str(value)
