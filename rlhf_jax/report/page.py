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

A page holds all that it needs; its script, which shows values under the pointer, is the same on
each page. The same input gives the same bytes: a page holds no time, no path and no random
identifier of its own.
"""

import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from rlhf_jax.errors import file_errors
from rlhf_jax.report import figures, plots, records, verdict
from rlhf_jax.report.records import KINDS, STAGES, Group, Row, RunRecord
from rlhf_jax.runs.folder import write_atomically

# Other stages are written in capitals.
TITLES = {"reward_model": "Reward model", "sft": "Supervised fine-tuning"}
MAX_SAMPLES = 8  # of one group of runs
MAX_SHOWN = 3  # at once; the others are folded
MAX_CURVES = 4  # likewise
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
    """The page as HTML, without anything from outside. All texts are escaped.

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
    title = chapters[0]["title"]
    if len(chapters) > 1:
        stages = ", ".join(chapter["stages"] for chapter in chapters)
        title = f"{stages}: {len(run_records)} runs"
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
            title = f"{chapter['stages']} {figure.title}" if len(chapters) > 1 else figure.title
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
    names = [TITLES.get(record.stage, record.stage.upper()) for record in run_records]
    return ", ".join(dict.fromkeys(names))


def _title(run_records: Sequence[RunRecord], groups: Sequence[Group]) -> str:
    """What was trained on what: "PPO rewarded by reward_model, 3 seeds"."""
    record = run_records[0]
    stages = _stages(run_records)
    if len(groups) > 1:
        return f"{stages}: {len(run_records)} runs compared"
    how = "trained on"
    sources = _data(record)
    if record.kind == "policy" and record.settings.get("reward"):
        how = "rewarded by"
        sources = [source.replace("/model", "") for source in record.settings["reward"]]
    names = [re.sub(r"[^\s,:*]*/", "", source) for source in sources]
    seeds = f", {len(run_records)} seeds" if len(run_records) > 1 else ""
    return f"{stages} {how} {' and '.join(names)}{seeds}" if names else f"{stages}{seeds}"


def _data(record: RunRecord) -> list[str]:
    """The files that the run has trained on."""
    validation = record.settings.get(f"{record.stage}.validation_data") or []
    files = record.manifest.get("data", {})
    return [name for name in files if name not in ("model", "tokenizer", *validation)]


def _chapters(run_records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """A chapter for each kind of run, in the order of KINDS."""
    by_kind = [[record for record in run_records if record.kind == kind] for kind in KINDS]
    return [_chapter(together) for together in by_kind if together]


def _chapter(run_records: Sequence[RunRecord]) -> dict[str, Any]:
    """What the page shows of runs of one kind."""
    groups = records.groups(run_records)
    is_one = len(run_records) == 1
    differences = [
        [key, *map(_plain, values)] for key, values in records.differences(groups).items()
    ]
    curves, constant = plots.curves(groups)
    facts = {record.name: _facts(record, group) for group in groups for record in group.records}
    samples = [_samples(group.records[0], is_one) for group in groups if group.records[0].samples]
    limit = MAX_SHOWN if len(groups) == 1 else 1
    return {
        "title": _title(run_records, groups),
        "stages": _stages(run_records),
        "records": run_records,
        "groups": groups,
        "verdicts": {group.name: verdict.sentence(group) for group in groups},
        "tiles": verdict.tiles(groups[0]) if len(groups) == 1 else [],
        "samples": [table._replace(rows=table.rows[:limit]) for table in samples],
        "more_samples": [
            table._replace(rows=table.rows[limit:]) for table in samples if table.rows[limit:]
        ],
        "differences": differences,
        "curves": curves,
        "num_shown": MAX_CURVES,
        "constant": constant,
        "distributions": plots.distributions(groups),
        "metrics": _metrics(run_records),
        "facts": _side_by_side("Run" if is_one else "Runs", "", facts),
        "validated": any(name.startswith("validation/") for name in _names(run_records)),
        "commands": [_command(record) for record in run_records],
    }


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _names(run_records: Sequence[RunRecord]) -> list[str]:
    """All metrics of the runs, in the page's order."""
    return [name for group in plots.metric_groups(run_records).values() for name in group]


def _metrics(run_records: Sequence[RunRecord]) -> Table:
    """The last value of each metric in each run; of one run the first value too."""
    rows = []
    for name in _names(run_records):
        values = [record.last.get(name) for record in run_records]
        if len(run_records) == 1:
            values = [records.series(run_records[0].metrics, name)[1][0], *values]
        rows.append([name, *values, plots.meaning(name)])
    columns = [record.name for record in run_records]
    if len(run_records) == 1:
        columns = ["first", "last"]
    return Table("All metrics", ("metric", *columns, "what it is"), rows)


def _command(record: RunRecord) -> str:
    """What runs this stage again by itself, from its recorded settings."""
    if record.stage not in STAGES or record.manifest.get("given"):
        return str(record.manifest["command"])  # Python gave something that no setting holds
    folder = record.folder
    stage = record.stage.replace("_", "-")
    words = [
        "rlhf-jax",
        stage,
        "--config",
        f"{folder}/config.yaml",
        "--output-dir",
        f"{folder}-again",
    ]
    return shlex.join(words)


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
    """What the run is, its pace, and what made it."""
    facts: dict[str, Any] = {"group": group.name} if group.name != record.name else {}
    return facts | {
        "stage": _stages([record]),
        "seed": record.manifest.get("seed"),
        "steps": record.steps,
        "s/step (median)": record.seconds_per_step,
        "state": "finished" if record.finished else "not finished",
        **_manifest(record.manifest),
    }


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


def _samples(record: RunRecord, is_one: bool) -> Table:
    """The first rows of the last validation; what changes stands beside what the first one had for
    the same row.
    """
    steps, validations = zip(*record.validations, strict=True)
    last = validations[-1]
    kinds = [kind for kind in SAMPLE_COLUMNS if kind[0][-1] in last[0]]
    fixed, changing = [*kinds, SAMPLE_COLUMNS[-1]][0]
    numbered = [_numbered(rows, fixed) for rows in validations]
    cells = []
    for key, row in list(numbered[-1].items())[:MAX_SAMPLES]:
        # Empty lines around a prompt are the template's.
        prompt = str(row.get("prompt") or "").strip("\n")
        at_steps = [by_key.get(key, {}).get(name) for by_key in numbered for name in changing]
        texts = [*map(row.get, fixed[1:]), *at_steps]
        cells.append([prompt, *map(_with_line_ends, texts)])
    columns = [*fixed, *(f"{name}, step {step}" for step in steps for name in changing)]
    title = "Samples before and after" if len(steps) > 1 else "Samples"
    if not is_one:
        title += f": {record.name}"
    formats = {name: ".3g" for name in columns if name.startswith(("score", "margin"))}
    note = f"Of {len(last)} in samples.jsonl. ↵ marks a line's end that the text holds."
    return Table(title, columns, cells, formats, note)


def _with_line_ends(text: Any) -> Any:
    return text.replace("\n", "↵\n") if isinstance(text, str) else text


def _numbered(rows: Sequence[Row], fixed: Sequence[str]) -> dict[tuple[str, int], Row]:
    """Rows by what stays the same in them, with a number, as the same may come again."""
    keys = [repr([row.get(name) for name in fixed]) for row in rows]
    return {
        (key, keys[:i].count(key)): row for i, (key, row) in enumerate(zip(keys, rows, strict=True))
    }
