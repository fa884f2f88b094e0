"""What runs did, as one page: curves, reward against KL, samples before and after, settings,
commands.

    page.write(["runs/ppo"], "report.html")
    page.write(["runs/ppo-seed0", "runs/ppo-seed1", "runs/grpo"], "comparison.html")

Runs of one kind (SFT, reward models, policies) are drawn over each other, those that differ only in
their seeds as a mean with a band; kinds follow one another. Only the runs' folders are read. A job
draws a page of its own parts:

    loss = figures.Plot("Loss", "step", "nats per token", {"training": (steps, losses)})
    text = page.render("My run", [page.Facts("Settings", {"seed": 0}), page.Figures("Curves",
    [loss])])

A page is static and holds all that it needs. The same input gives the same bytes: it holds no time,
no path and no random identifier of its own.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from rlhf_jax.errors import file_errors
from rlhf_jax.report import figures, plots, records
from rlhf_jax.report.records import KINDS, Group, Row, RunRecord
from rlhf_jax.runs.folder import write_atomically

TITLES = {"reward_model": "Reward model"}  # other stages are written in capitals
MAX_SAMPLES, MAX_SAMPLES_OF_MANY = 8, 3
# Columns of samples.jsonl for pairs, for answers with target scores and for prompts: those that are
# the same at each validation, and those that change. The last column that stays the same is found
# in rows of this kind only.
SAMPLE_COLUMNS = (
    (("prompt", "chosen", "rejected"), ("margin",)),
    (("prompt", "response", "target"), ("score",)),
    (("prompt",), ("response", "score")),
)
# Control characters, which a browser would drop or obey, become the pictures that Unicode has of
# them; those that turn the direction of the text become their numbers.
PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {0x7F: "␡"}
PICTURES |= {
    code: f"⟨U+{code:04X}⟩"
    for code in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


class Gates(NamedTuple):
    """What a run had to reach: ``{name: (passed, numbers and thresholds)}``."""

    results: Mapping[str, tuple[bool, str]]


class Facts(NamedTuple):
    """``{label: value}``: numbers and settings; lists are joined with commas."""

    title: str
    values: Mapping[str, Any]


class Table(NamedTuple):
    """Rows of texts and numbers. Columns of numbers are aligned right; text keeps its line breaks
    and is wrapped.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    formats: Mapping[str, str] = {}
    """``{column: format specification}`` of numbers, such as ``.2f``; by default four significant
    digits.
    """
    note: str = ""
    """A sentence above the rows."""


class Figures(NamedTuple):
    """Figures side by side where there is room."""

    title: str
    figures: Sequence[figures.Plot]


def render(title: str, parts: Sequence[Gates | Facts | Table | Figures], summary: str = "") -> str:
    """The page as HTML, without scripts or anything from outside. All texts are escaped.

    Args:
      title: heading of the page.
      parts: what stands below it, in this order.
      summary: a sentence or two below the title.
    """
    return fill("report.html", title=title, summary=summary, level=2, parts=parts)


def write(runs: Sequence[str | Path], path: str | Path) -> None:
    """Writes the page of one run or several; a folder of runs, such as a pipeline's, stands for the
    runs in it.

    Raises:
        UserError: a folder that holds no run, a run given twice, a broken file in one, or no place
            for the page.
    """
    run_records = records.find(runs)
    chapters = _chapters(run_records)
    names = [record.name for record in run_records]
    title = (
        f"{_stages(run_records)}: {', '.join(names) if len(names) <= 4 else f'{len(names)} runs'}"
    )
    level = 3 if len(chapters) > 1 else 2
    text = fill("runs.html", title=title, summary="", level=level, chapters=chapters)
    with file_errors(path, "written"):
        write_atomically(Path(path), text)


def write_png(runs: Sequence[str | Path], folder: str | Path) -> list[Path]:
    """Writes each figure of the page that ``write`` makes as a PNG, called by its title:
    ``score-objective-score.png``. Where the page has chapters, their stages come first:
    ``ppo-score-objective-score.png``.

    Returns:
        The files, in the page's order; a figure without anything to draw has none.

    Raises:
        UserError: as ``write`` does, or no place for the files.
    """
    chapters = _chapters(records.find(runs))
    images: dict[Path, bytes] = {}
    for chapter in chapters:
        for figure in chapter["curves"] + chapter["distributions"]:
            title = f"{chapter['title']} {figure.title}" if len(chapters) > 1 else figure.title
            name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
            if image := figures.png(figure):
                same = sum(path.stem.partition("--")[0] == name for path in images)
                images[Path(folder) / (f"{name}--{same + 1}.png" if same else f"{name}.png")] = (
                    image
                )
    with file_errors(folder, "written"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path, image in images.items():
            write_atomically(path, image)
    return list(images)


def default_path(runs: Sequence[str | Path]) -> Path:
    """Where the page of these runs belongs.

    In the run's folder; for a folder of runs ``stages.html`` in it, beside a quickstart's own
    ``report.html``; for several folders ``report.html`` in the working directory.
    """
    if len(runs) != 1:
        return Path("report.html")
    return Path(runs[0]) / (
        "report.html" if (Path(runs[0]) / "manifest.json").is_file() else "stages.html"
    )


def fill(template: str, **context: Any) -> str:
    """A file of ``templates/`` with these values; in HTML all texts are escaped."""
    salts = itertools.count()
    how: Any = {"autoescape": jinja2.select_autoescape(), "undefined": jinja2.StrictUndefined}
    how |= {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(loader=jinja2.PackageLoader("rlhf_jax.report"), **how)
    environment.filters |= {"text": _text, "notes": figures.notes}
    environment.filters["cells"] = lambda row, columns: [row.get(column) for column in columns]
    environment.filters["svg"] = lambda plot: figures.element(plot, str(next(salts)))
    text = environment.get_template(template).render(context).translate(PICTURES)
    # A model may write half a surrogate pair, which no file can hold.
    return text.encode("utf-8", "replace").decode("utf-8")


def _text(value: Any, format_spec: str = "") -> str:
    if value is None:
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    if isinstance(value, float | np.floating) or (
        format_spec and isinstance(value, int | np.integer)
    ):
        return format(value, format_spec or (".0f" if 1e4 <= abs(float(value)) < 1e9 else ".4g"))
    return str(value)


# --- What templates/runs.html draws
# ---------------------------------------------------------------------------------


def _stages(run_records: Sequence[RunRecord]) -> str:
    return ", ".join(
        dict.fromkeys(TITLES.get(record.stage, record.stage.upper()) for record in run_records)
    )


def _chapters(run_records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """A chapter for each kind of run, in the order of KINDS."""
    by_kind = [[record for record in run_records if record.kind == kind] for kind in KINDS]
    return [_chapter(together) for together in by_kind if together]


def _chapter(run_records: Sequence[RunRecord]) -> dict[str, Any]:
    """What the page shows of runs of one kind."""
    groups = records.groups(run_records)
    is_one = len(run_records) == 1
    text = lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)  # noqa: E731
    differences = [[key, *map(text, values)] for key, values in records.differences(groups).items()]
    curves, constant = plots.curves(groups)
    names = [name for together in plots.metric_groups(run_records).values() for name in together]
    limit = MAX_SAMPLES if len(groups) == 1 else MAX_SAMPLES_OF_MANY
    facts = {record.name: _facts(record, group) for group in groups for record in group.records}
    last = {r.name: {name: r.last[name] for name in names if name in r.last} for r in run_records}
    manifests = {record.name: _manifest(record.manifest) for record in run_records}
    samples = [
        _samples(group.records[0], limit, is_one) for group in groups if group.records[0].samples
    ]
    chapter: dict[str, Any] = {
        "title": _stages(run_records),
        "records": run_records,
        "groups": groups,
    }
    chapter |= {
        "overview": _side_by_side("Run" if is_one else "Runs", "", facts),
        "differences": differences,
    }
    chapter |= {
        "metrics": names,
        "validated": any(name.startswith("validation/") for name in names),
    }
    chapter |= {
        "last": _side_by_side("Last metrics", "metric", last),
        "curves": curves,
        "constant": constant,
    }
    chapter |= {"distributions": plots.distributions(groups), "samples": samples}
    return chapter | {"manifests": _side_by_side("Manifest", "entry", manifests)}


def _side_by_side(
    title: str, label: str, columns: Mapping[str, Mapping[str, Any]]
) -> Facts | Table:
    """Facts of one run; of several, a table with runs as columns, or one column if all are equal."""
    facts = list(columns.values())
    if len(facts) == 1:
        return Facts(title, facts[0])
    if all(other == facts[0] for other in facts):
        return Table(title, (label, "all runs"), list(facts[0].items()))
    keys = dict.fromkeys(key for column in facts for key in column)
    return Table(
        title, (label, *columns), [[key, *(column.get(key) for column in facts)] for key in keys]
    )


def _facts(record: RunRecord, group: Group) -> dict[str, Any]:
    """What the run is, and its pace."""
    facts: dict[str, Any] = {"group": group.name} if group.name != record.name else {}
    facts |= {
        "stage": _stages([record]),
        "seed": record.manifest.get("seed"),
        "steps": record.steps,
    }
    state = "finished" if record.finished else "not finished"
    return facts | {"s/step (median)": record.seconds_per_step, "state": state}


def _manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What made the run what it is, beside its settings."""
    git, devices = manifest.get("git"), manifest.get("devices")
    facts = {
        "git commit": git and f"{git['commit'][:12]}{' (modified)' if git['modified'] else ''}",
        "backend": manifest.get("backend"),
        **manifest.get("versions", {}),
        "devices": devices and f"{devices['count']} x {devices['kind']}",
        **{
            f"{name}, sha256": f"{digest[:12]}…"
            for name, digest in manifest.get("data", {}).items()
        },
        "resumed": f"{len(manifest['resumed'])} times" if manifest.get("resumed") else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _samples(record: RunRecord, limit: int, is_one: bool) -> Table:
    """The first rows of the last validation; what changes stands beside what the first one had for
    the same row.
    """
    steps, validations = zip(*record.validations, strict=True)
    fixed, changing = next(
        (c for c in SAMPLE_COLUMNS if c[0][-1] in validations[-1][0]), SAMPLE_COLUMNS[-1]
    )
    numbered = [_numbered(rows, fixed) for rows in validations]
    cells = []
    for key, row in list(numbered[-1].items())[:limit]:
        prompt = str(row.get("prompt") or "").strip(
            "\n"
        )  # empty lines around it are the template's
        at_steps = [by_key.get(key, {}).get(name) for by_key in numbered for name in changing]
        texts = [*map(row.get, fixed[1:]), *at_steps]
        cells.append(
            [
                prompt,
                *(text.replace("\n", "↵\n") if isinstance(text, str) else text for text in texts),
            ]
        )
    columns = [*fixed, *(f"{name}, step {step}" for step in steps for name in changing)]
    title = ("Samples before and after" if len(steps) > 1 else "Samples") + (
        "" if is_one else f": {record.name}"
    )
    formats = {name: ".3g" for name in columns if name.startswith(("score", "margin"))}
    shown = f"The first {len(cells)} of {len(validations[-1])} in samples.jsonl."
    return Table(
        title, columns, cells, formats, f"{shown} ↵ marks a line's end that the text holds."
    )


def _numbered(rows: Sequence[Row], fixed: Sequence[str]) -> dict[tuple[str, int], Row]:
    """Rows by what stays the same in them, with a number, as the same may come again."""
    keys = [repr([row.get(name) for name in fixed]) for row in rows]
    return {
        (key, keys[:i].count(key)): row for i, (key, row) in enumerate(zip(keys, rows, strict=True))
    }
