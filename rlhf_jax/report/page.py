"""What runs did, as one page: curves, reward against KL, samples before and after, settings, commands.

    report.write(["runs/ppo"], "report.html")
    report.write(["runs/ppo-seed0", "runs/ppo-seed1", "runs/grpo"], "comparison.html")

Runs of one kind (SFT, reward models, policies) are drawn over each other, those that differ only in their seeds as a
mean with a band; kinds follow one another. Nothing is read but the runs' folders: the same runs give the same bytes.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.report import figures, html, run_figures
from rlhf_jax.report import records as run_records
from rlhf_jax.report.figures import Histogram, Plot
from rlhf_jax.report.records import POLICIES, STAGES, Group, RunRecord

TITLES = {stage: stage.upper() for stage in STAGES} | {"reward_model": "Reward model"}
# {what the samples hold: (title, label of the x axis)}
HISTOGRAMS = {
    "margin": ("Margins", "score of the chosen - score of the rejected answer"),
    "score": ("Scores", "score"),
    "length": ("Response lengths", "tokens"),
}
MAX_SAMPLES, MAX_SAMPLES_OF_MANY = 8, 3


def write(runs: Sequence[str | Path], path: str | Path) -> None:
    """Writes the page of one run or several; a folder of runs, such as a pipeline's, stands for the runs in it.

    Raises:
        UserError: a folder that holds no run, a run given twice, a broken file in one, or no place for the page.
    """
    records = run_records.find(runs)
    names = ", ".join(record.name for record in records) if len(records) <= 4 else f"{len(records)} runs"
    try:
        html.write(path, f"{_stages(records)}: {names}", _parts(records))
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
    for part in _parts(run_records.find(runs)):
        if isinstance(part, html.Heading):
            chapter = part.title
        for figure in part.figures if isinstance(part, html.Figures) else ():
            name = re.sub(r"[^a-z0-9]+", "-", f"{chapter} {figure.title}".lower()).strip("-")
            same = sum(path.stem == name or path.stem.rpartition("--")[0] == name for path in paths)
            path = Path(folder) / f"{name}{f'--{same + 1}' if same else ''}.png"
            if image := figures.png(figure):
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(image)
                except OSError as error:
                    raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
                paths.append(path)
    return paths


def _parts(records: Sequence[RunRecord]) -> list[html.Part]:
    kinds: dict[str, list[RunRecord]] = {stage: [] for stage in STAGES}  # in this order, others behind
    for record in records:
        kinds.setdefault(POLICIES[0] if record.stage in POLICIES else record.stage, []).append(record)
    chapters = [together for together in kinds.values() if together]
    parts: list[html.Part] = []
    for together in chapters:
        if len(chapters) > 1:
            parts.append(html.Heading(_stages(together)))
        parts += _chapter(together)
    return parts


def default_path(runs: Sequence[str | Path]) -> Path:
    """Where the page of these runs belongs.

    In the run's folder; for a folder of runs ``stages.html`` in it, beside a quickstart's own ``report.html``; for
    several folders ``report.html`` in the working directory.
    """
    if len(runs) != 1:
        return Path("report.html")
    return Path(runs[0]) / ("report.html" if (Path(runs[0]) / "manifest.json").is_file() else "stages.html")


def _stages(records: Sequence[RunRecord]) -> str:
    return ", ".join(dict.fromkeys(TITLES.get(record.stage, record.stage) for record in records))


def _chapter(records: Sequence[RunRecord]) -> list[html.Part]:
    """The sections of runs of one kind."""
    groups = run_records.groups(records)
    names = run_figures.metric_names(records)
    last = {
        record.name: {name: value for name in names if (value := _last(record, name)) is not None} for record in records
    }
    plots, constant = run_figures.curves(groups)
    parts: list[html.Part] = [*_overview(groups), _commands(records)]
    if names:
        parts.append(_side_by_side("Last metrics", "metric", last))
    if raised := run_figures.alerts(records):
        parts.append(html.Table("Alerts", ("run", "step", "alert", "rule", "action", "found"), raised))
    if plots:
        several = len(groups) == 1 < len(records)
        parts.append(html.Figures(f"Curves{f', mean and range of {len(records)} runs' if several else ''}", plots))
    shown, missing = _distributions(groups)
    parts += shown
    parts += _samples(groups)
    parts += _evaluations(records)
    if constant:
        values = ", ".join(f"{name} {value:.4g}" for name, value in constant.items())
        missing.append(f"These metrics never changed and have no curve: {values}.")
    if not any(name.startswith("validation/") for name in names):
        missing.append("No validation: nothing was held out, or no validation has been reached.")
    for group in groups:
        if len(ends := sorted({record.steps for record in group.records})) > 1:
            missing.append(f"The runs of {group.name} end at steps {ends}; their curves show the steps that all have.")
    missing += [note for record in records for note in record.notes]
    if missing:
        parts.append(html.Text("Not on this page", missing))
    parts.append(html.Text("Settings", []))
    for group in groups:
        first = group.records[0]
        others = "" if len(group.records) == 1 else "; the others of its group have another seed"
        parts.append(html.Block(f"config.yaml of {first.name}{others}", first.config, folded=True))
    parts.append(_side_by_side("Manifest", "entry", {record.name: _manifest(record) for record in records}))
    return parts


def _last(record: RunRecord, name: str) -> Any:
    return next((row[name] for row in reversed(record.metrics) if name in row), None)


def _overview(groups: Sequence[Group]) -> list[html.Part]:
    records = [record for group in groups for record in group.records]
    if len(records) == 1:
        return [html.Facts("Run", _facts(records[0]))]
    facts = [(group, record, _facts(record)) for group in groups for record in group.records]
    columns = list(dict.fromkeys(label for *_, some in facts for label in some))
    rows = [[group.name, record.name, *map(some.get, columns)] for group, record, some in facts]
    note = ""
    if any(len(group.records) > 1 for group in groups):
        note = "Runs that differ only in the seed are a group: curves are their mean, bands go from the lowest to the "
        note += "highest of them."
    parts: list[html.Part] = [html.Table("Runs", ("group", "run", *columns), rows, note=note)]
    if differing := run_records.differences(groups):
        rows = [[key, *(_setting(value) for value in values)] for key, values in differing.items()]
        parts.append(html.Table("What differs", ("setting", *(group.name for group in groups)), rows))
    return parts


def _facts(record: RunRecord) -> dict[str, Any]:
    """What the run is, and its pace."""
    seconds = record.seconds_per_step
    return {
        "stage": TITLES.get(record.stage, record.stage),
        "seed": record.seed,
        "steps": record.steps,
        "s/step (median)": None if seconds is None else float(f"{seconds:.3g}"),
        "state": "finished" if record.finished else "not finished",
    }


def _setting(value: Any) -> str:
    """As config.yaml has it, but texts without quotation marks where they can do without."""
    if isinstance(value, str) and value == value.strip() != "":
        return value
    return json.dumps(value, ensure_ascii=False)


def _commands(records: Sequence[RunRecord]) -> html.Block:
    """The runs' commands, a line each."""
    title = "The command that reproduces it" if len(records) == 1 else "The commands that reproduce them"
    return html.Block(title, "\n".join(dict.fromkeys(str(record.manifest["command"]) for record in records)))


def _side_by_side(title: str, label: str, columns: Mapping[str, Mapping[str, Any]]) -> html.Part:
    """Facts of one run; of several, a table with runs as columns, or one column where all say the same."""
    found = list(columns.values())
    if len(found) == 1:
        return html.Facts(title, found[0])
    if all(some == found[0] for some in found):
        return html.Table(title, (label, "all runs"), list(found[0].items()))
    keys = dict.fromkeys(key for some in found for key in some)
    return html.Table(title, (label, *columns), [[key, *(some.get(key) for some in found)] for key in keys])


def _manifest(record: RunRecord) -> dict[str, Any]:
    """What made the run what it is, beside its settings."""
    manifest = record.manifest
    facts = {"backend": manifest.get("backend"), **(manifest.get("versions") or {})}
    if git := manifest.get("git"):
        facts = {"git commit": f"{git['commit'][:12]}{' (modified)' if git['modified'] else ''}"} | facts
    if devices := manifest.get("devices"):
        facts["devices"] = f"{devices['count']} x {devices['kind']}"
    facts |= {f"{name}, sha256": f"{str(digest)[:12]}…" for name, digest in (manifest.get("data") or {}).items()}
    if resumed := manifest.get("resumed"):
        facts["resumed"] = f"{len(resumed)} times"
    return facts


def _distributions(groups: Sequence[Group]) -> tuple[list[html.Part], list[str]]:
    """Reward against KL, histograms, calibration; and what of these the runs do not allow, in sentences."""
    records = [record for group in groups for record in group.records]
    rows = [row for record in records for row in record.samples]
    policy, reward_model = records[0].stage in POLICIES, records[0].stage == "reward_model"
    figures: list[Plot | Histogram] = []
    missing = []
    if policy:
        frontier = run_figures.reward_against_kl(groups)
        if frontier is not None:
            figures.append(frontier)
        else:
            missing.append("Reward against KL: no run has measured a KL (rl.kl_coef is 0) or finished an iteration.")
    for quantity, labels in HISTOGRAMS.items():
        if quantity != "length" or policy:  # a reward model's answers are given: their lengths do not change
            found = run_figures.histograms(groups, quantity, *labels)
            figures += found
            if quantity == "length" and rows and not found:
                missing.append("Histogram of lengths: samples.jsonl has no lengths.")
    if reward_model:
        for group in groups:
            suffix = f", {group.name}" if len(groups) > 1 else ""
            plots = (
                run_figures.calibration(group, f"Calibration{suffix}"),
                run_figures.against_targets(group, f"Score against target{suffix}"),
            )
            figures += [plot for plot in plots if plot is not None]
        if rows and not any("score_chosen" in row for row in rows):
            missing.append("Calibration: the samples are scored answers, not pairs.")
    if not rows and (policy or reward_model):
        missing.append("Histograms and samples before and after: no validation has written texts.")
    heading = "Reward against KL, before and after" if policy else "Before and after, calibration"
    return [html.Figures(heading, figures)] if figures else [], missing


def _evaluations(records: Sequence[RunRecord]) -> list[html.Part]:
    """A table of figures for each run that has been evaluated."""
    columns = ("category", "metric", "value", "low", "high", "n", "unit", "note")
    tables: list[html.Part] = []
    for record in records:
        if rows := [[row.get(name) for name in columns] for row in run_records.evaluation(record)]:
            note = "From low to high is a 95% interval, n what it rests on; every response stands in "
            note += "evaluation_samples.jsonl."
            title = "Evaluation" if len(records) == 1 else f"Evaluation: {record.name}"
            tables.append(html.Table(title, columns, rows, {"value": ".3f", "low": ".3f", "high": ".3f"}, note=note))
    return tables


# --- Samples --------------------------------------------------------------------------------------------------------


def _samples(groups: Sequence[Group]) -> list[html.Part]:
    """A table for the first run of each group that has samples."""
    limit = MAX_SAMPLES if len(groups) == 1 else MAX_SAMPLES_OF_MANY
    tables: list[html.Part] = []
    for first in (group.records[0] for group in groups):
        if found := run_figures.validations(first):
            title = "Samples before and after" if len(found) > 1 else "Samples"
            name = "" if len(groups) == len(groups[0].records) == 1 else f": {first.name}"
            tables.append(_sample_table(title + name, found, limit))
    return tables


def _sample_table(title: str, found: Sequence[tuple[int, list[run_records.Row]]], limit: int) -> html.Table:
    """The first rows of the last validation, with what the first one said to the same prompt."""
    (first, before), (last, after) = found[0], found[-1]
    pairs = "score_chosen" in after[0]
    earlier = dict(_numbered(before)) if len(found) > 1 else {}
    rows = []
    for key, row in list(_numbered(after))[:limit]:
        old = earlier.get(key, {})
        prompt = (row.get("prompt") or "").strip("\n")  # a frame's empty lines would push the text down
        if pairs:
            margins = [_margin(old), _margin(row)][-len(found) :]
            rows.append([prompt, _visible(row["chosen"]), _visible(row["rejected"]), *margins])
        elif "target" in row:
            scores = [old.get("score"), row["score"]][-len(found) :]
            rows.append([prompt, _visible(row["response"]), row["target"], *scores])
        else:
            answers = [[_visible(some.get("response")), some.get("score")] for some in (old, row)][-len(found) :]
            rows.append([prompt, *(cell for answer in answers for cell in answer)])
    steps = [f"step {step}" for step in (first, last)][-len(found) :]
    if pairs:
        columns = ["prompt", "chosen", "rejected", *(f"margin, {step}" for step in steps)]
    elif "target" in after[0]:
        columns = ["prompt", "response", "target", *(f"score, {step}" for step in steps)]
    else:
        columns = ["prompt", *(name for step in steps for name in (f"response, {step}", f"score, {step}"))]
    formats = {name: ".3g" for name in columns if name.startswith(("score", "margin"))}
    note = f"The first {len(rows)} of {len(after)} in samples.jsonl. ↵ marks a line's end that the text holds."
    return html.Table(title, columns, rows, formats, note=note)


def _numbered(rows: Iterable[run_records.Row]) -> Iterable[tuple[Any, run_records.Row]]:
    """Rows under their prompt, and the answer where that was given; with a number, as a prompt may come again."""
    seen: dict[str, int] = {}
    for row in rows:
        text = repr((row.get("prompt"), row.get("chosen"), row.get("response") if "target" in row else None))
        seen[text] = seen.get(text, 0) + 1
        yield (text, seen[text]), row


def _margin(row: Mapping[str, Any]) -> float | None:
    return row["score_chosen"] - row["score_rejected"] if "score_chosen" in row else None


def _visible(text: Any) -> Any:
    return text.replace("\n", "↵\n") if isinstance(text, str) else text
