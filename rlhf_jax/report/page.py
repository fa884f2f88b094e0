"""What runs did, as one page: curves, reward against KL, samples before and after, settings, commands.

    page.write(["runs/ppo"], "report.html")
    page.write(["runs/ppo-seed0", "runs/ppo-seed1", "runs/grpo"], "comparison.html")

Runs of one kind (SFT, reward models, policies) are drawn over each other, those that differ only in their seeds as a
mean with a band; kinds follow one another. Only the runs' folders are read: the same runs give the same bytes.
"""

import collections
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.report import figures, html, plots, records
from rlhf_jax.report.records import KINDS, Group, Row, RunRecord
from rlhf_jax.runs.folder import write_atomically

TITLES = {"reward_model": "Reward model"}  # other stages are written in capitals
MAX_SAMPLES, MAX_SAMPLES_OF_MANY = 8, 3
# Columns of samples.jsonl for pairs, for answers with target scores and for prompts: those that are the same at each
# validation, and those that change. The last column that stays the same is found in rows of this kind only.
SAMPLE_COLUMNS = (
    (("prompt", "chosen", "rejected"), ("margin",)),
    (("prompt", "response", "target"), ("score",)),
    (("prompt",), ("response", "score")),
)
ALERT = ("step", "name", "rule", "action", "message")  # columns of alerts.jsonl
EVALUATION = ("category", "metric", "value", "low", "high", "n", "unit", "note")  # columns of evaluation.json


def write(runs: Sequence[str | Path], path: str | Path) -> None:
    """Writes the page of one run or several; a folder of runs, such as a pipeline's, stands for the runs in it.

    Raises:
        UserError: a folder that holds no run, a run given twice, a broken file in one, or no place for the page.
    """
    run_records = records.find(runs)
    names = [record.name for record in run_records]
    title = f"{_stages(run_records)}: {', '.join(names) if len(names) <= 4 else f'{len(names)} runs'}"
    text = html.render(title, _parts(run_records))
    try:
        write_atomically(Path(path), text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_png(runs: Sequence[str | Path], folder: str | Path) -> list[Path]:
    """Writes each figure of the page that ``write`` makes as a PNG, called by its title: ``score-objective-score.png``.
    Where the page has chapters, their stages come first: ``ppo-score-objective-score.png``.

    Returns:
        The files, in the page's order; a figure without anything to draw has none.

    Raises:
        UserError: as ``write`` does, or no place for the files.
    """
    chapter = ""
    paths: list[Path] = []
    used: collections.Counter[str] = collections.Counter()
    for part in _parts(records.find(runs)):
        chapter = part.title if isinstance(part, html.Heading) else chapter
        for figure in part.figures if isinstance(part, html.Figures) else ():
            image = figures.png(figure)
            if not image:
                continue
            name = re.sub(r"[^a-z0-9]+", "-", f"{chapter} {figure.title}".lower()).strip("-")
            used[name] += 1
            paths.append(Path(folder) / (f"{name}--{used[name]}.png" if used[name] > 1 else f"{name}.png"))
            try:
                paths[-1].parent.mkdir(parents=True, exist_ok=True)
                paths[-1].write_bytes(image)
            except OSError as error:
                raise UserError(f"{paths[-1]}: cannot be written: {error.strerror or error}") from None
    return paths


def default_path(runs: Sequence[str | Path]) -> Path:
    """Where the page of these runs belongs.

    In the run's folder; for a folder of runs ``stages.html`` in it, beside a quickstart's own ``report.html``; for
    several folders ``report.html`` in the working directory.
    """
    if len(runs) != 1:
        return Path("report.html")
    return Path(runs[0]) / ("report.html" if (Path(runs[0]) / "manifest.json").is_file() else "stages.html")


def _stages(run_records: Sequence[RunRecord]) -> str:
    return ", ".join(dict.fromkeys(TITLES.get(record.stage, record.stage.upper()) for record in run_records))


def _parts(run_records: Sequence[RunRecord]) -> list[html.Part]:
    """A chapter for each kind of run, in the order of KINDS."""
    chapters = [together for kind in KINDS if (together := [record for record in run_records if record.kind == kind])]
    if len(chapters) == 1:
        return list(_chapter(run_records))
    return [part for together in chapters for part in (html.Heading(_stages(together)), *_chapter(together))]


def _chapter(run_records: Sequence[RunRecord]) -> Iterator[html.Part]:
    """The sections of runs of one kind."""
    groups = records.groups(run_records)
    names = [name for together in plots.metric_groups(run_records).values() for name in together]
    is_one = len(run_records) == 1
    overview = {record.name: _facts(record, group) for group in groups for record in group.records}
    yield _side_by_side("Run" if is_one else "Runs", "", overview)
    if differing := records.differences(groups):
        rows = [[key, *map(_setting, values)] for key, values in differing.items()]
        yield html.Table("What differs", ("setting", *(group.name for group in groups)), rows)
    commands = dict.fromkeys(record.manifest["command"] for record in run_records)
    title = "The command that reproduces it" if is_one else "The commands that reproduce them"
    yield html.Block(title, "\n".join(commands))
    if names:
        yield _side_by_side("Last metrics", "metric", {record.name: _last(record, names) for record in run_records})
    if alerts := [[record.name, *map(row.get, ALERT)] for record in run_records for row in record.alerts]:
        yield html.Table("Alerts", ("run", *ALERT), alerts)
    curves, constant = plots.curves(groups)
    if curves:
        seeds = ", mean and range over seeds" if any(len(group.records) > 1 for group in groups) else ""
        yield html.Figures(f"Curves{seeds}", curves)
    if distributions := plots.distributions(groups):
        yield html.Figures("Before and after", distributions)
    limit = MAX_SAMPLES if len(groups) == 1 else MAX_SAMPLES_OF_MANY
    for record in (group.records[0] for group in groups):
        if record.samples:
            yield _samples(record, "" if is_one else f": {record.name}", limit)
    for record in run_records:
        if record.evaluation:
            yield _evaluation(record, "" if is_one else f": {record.name}")
    if missing := list(_missing(groups, names, constant)):
        yield html.Text("Not on this page", missing)
    yield html.Text("Settings", [])
    for group in groups:
        others = "" if len(group.records) == 1 else "; the others of its group have another seed"
        yield html.Block(f"config.yaml of {group.records[0].name}{others}", group.records[0].config, folded=True)
    yield _side_by_side("Manifest", "entry", {record.name: _manifest(record) for record in run_records})


def _side_by_side(title: str, label: str, columns: Mapping[str, Mapping[str, Any]]) -> html.Part:
    """Facts of one run; of several, a table with runs as columns, or one column if all are equal."""
    facts = list(columns.values())
    if len(facts) == 1:
        return html.Facts(title, facts[0])
    if all(other == facts[0] for other in facts):
        return html.Table(title, (label, "all runs"), list(facts[0].items()))
    keys = dict.fromkeys(key for column in facts for key in column)
    return html.Table(title, (label, *columns), [[key, *(column.get(key) for column in facts)] for key in keys])


def _facts(record: RunRecord, group: Group) -> dict[str, Any]:
    """What the run is, and its pace."""
    seconds = record.seconds_per_step
    of_group = {"group": group.name} if group.name != record.name else {}
    return of_group | {
        "stage": _stages([record]),
        "seed": record.manifest.get("seed"),
        "steps": record.steps,
        "s/step (median)": None if seconds is None else float(f"{seconds:.3g}"),
        "state": "finished" if record.finished else "not finished",
    }


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _last(record: RunRecord, names: Sequence[str]) -> dict[str, Any]:
    """The last value of each metric that the run has recorded."""
    last: Row = {}
    for row in record.metrics:
        last |= row
    return {name: last[name] for name in names if name in last}


def _manifest(record: RunRecord) -> dict[str, Any]:
    """What made the run what it is, beside its settings."""
    manifest = record.manifest
    git, devices = manifest.get("git"), manifest.get("devices")
    facts = {
        "git commit": git and f"{git['commit'][:12]}{' (modified)' if git['modified'] else ''}",
        "backend": manifest.get("backend"),
        **(manifest.get("versions") or {}),
        "devices": devices and f"{devices['count']} x {devices['kind']}",
        **{f"{name}, sha256": f"{str(digest)[:12]}…" for name, digest in (manifest.get("data") or {}).items()},
        "resumed": f"{len(manifest['resumed'])} times" if manifest.get("resumed") else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _samples(record: RunRecord, suffix: str, limit: int) -> html.Table:
    """The first rows of the last validation; what changes stands beside what the first one had for the same row."""
    steps, validations = zip(*record.validations, strict=True)
    fixed, changing = next((c for c in SAMPLE_COLUMNS if c[0][-1] in validations[-1][0]), SAMPLE_COLUMNS[-1])
    numbered = [dict(_numbered(rows, fixed)) for rows in validations]
    cells = []
    for key, row in list(numbered[-1].items())[:limit]:
        prompt = str(row.get("prompt") or "").strip("\n")  # empty lines around it are the template's
        at_steps = [by_key.get(key, {}).get(name) for by_key in numbered for name in changing]
        cells.append([prompt, *map(_visible, [*map(row.get, fixed[1:]), *at_steps])])
    columns = [*fixed, *(f"{name}, step {step}" for step in steps for name in changing)]
    formats = {name: ".3g" for name in columns if name.startswith(("score", "margin"))}
    note = (
        f"The first {len(cells)} of {len(validations[-1])} in samples.jsonl. ↵ marks a line's end that the text holds."
    )
    title = f"Samples before and after{suffix}" if len(steps) > 1 else f"Samples{suffix}"
    return html.Table(title, columns, cells, formats, note=note)


def _numbered(rows: Sequence[Row], fixed: Sequence[str]) -> Iterator[tuple[tuple[str, int], Row]]:
    """Rows by what stays the same in them, with a number, as the same may come again."""
    seen: collections.Counter[str] = collections.Counter()
    for row in rows:
        key = repr([row.get(name) for name in fixed])
        seen[key] += 1
        yield (key, seen[key]), row


def _visible(text: Any) -> Any:
    return text.replace("\n", "↵\n") if isinstance(text, str) else text


def _evaluation(record: RunRecord, suffix: str) -> html.Table:
    rows = [[row.get(name) for name in EVALUATION] for row in record.evaluation]
    note = "From low to high is a 95% interval, n what it rests on; every response stands in evaluation_samples.jsonl."
    formats = dict.fromkeys(("value", "low", "high"), ".3f")
    return html.Table(f"Evaluation{suffix}", EVALUATION, rows, formats, note=note)


def _missing(groups: Sequence[Group], names: Sequence[str], constant: Mapping[str, float]) -> Iterator[str]:
    """What a reader might look for on the page, and why it is not there."""
    run_records = [record for group in groups for record in group.records]
    kind = run_records[0].kind
    if kind == "policy" and "objective/kl" not in names:
        yield "Reward against KL: no run has measured a KL (rl.kl_coef is 0) or finished an iteration."
    if kind in ("policy", "reward_model") and not any(record.samples for record in run_records):
        yield "Histograms and samples before and after: no validation has written texts."
    if constant:
        values = ", ".join(f"{name} {value:.4g}" for name, value in constant.items())
        yield f"These metrics never changed and have no curve: {values}."
    if not any(name.startswith("validation/") for name in names):
        yield "No validation: nothing was held out, or no validation has been reached."
    for group in groups:
        if len(ends := sorted({record.steps for record in group.records})) > 1:
            yield f"The runs of {group.name} end at steps {ends}; their curves show the steps that all have."
    for record in run_records:
        for file in record.cut:
            yield f"{record.name}: the last line of {file} is cut and has been passed over."
        if not record.finished:
            yield f"{record.name}: not finished, as there is no model yet; last recorded step: {record.steps}."
