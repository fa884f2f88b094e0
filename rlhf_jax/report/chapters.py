"""The chapter of a page about runs of one kind: verdict, figures, samples, settings, commands."""

import itertools
import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf_jax.report import plots, records, verdict
from rlhf_jax.report.parts import Facts, Table
from rlhf_jax.report.records import KINDS, STAGES, Group, Row, RunRecord

TITLES = {"reward_model": "Reward model", "sft": "Supervised fine-tuning"}  # others in capitals
MAX_SAMPLES = 8  # of one group of runs
# Columns of samples.jsonl for pairs, for answers with target scores, for prompts that the data
# answers too and for prompts: first those that are the same at each validation, then those that
# change. A row is of the first of these kinds whose last unchanging column it has, or else of the
# last kind.
PAIR = ("prompt", "chosen", "rejected")
SAMPLE_COLUMNS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (PAIR, ("margin",)),
    (("prompt", "response", "target"), ("score",)),
    (("prompt", "answer", "desirable"), ("response", "log_ratio")),
    (("prompt", "answer"), ("response", "log_ratio")),
    (("prompt",), ("response", "score", "judge")),
)
NUMBERS = ("score", "judge", "margin", "log_ratio", "reward/")  # begin columns of numbers


def of(run_records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """A chapter for each kind of run, in the order of KINDS."""
    by_kind = [[record for record in run_records if record.kind == kind] for kind in KINDS]
    return [_chapter(of_kind) for of_kind in by_kind if of_kind]


def _chapter(run_records: Sequence[RunRecord]) -> dict[str, Any]:
    """The values that ``templates/runs.html`` reads for runs of one kind."""
    groups = records.groups(run_records)
    is_one = len(run_records) == 1
    curves, constant = plots.curves(groups)
    differences = [
        [key, *(_plain(value) for value in values)]
        for key, values in records.differences(groups).items()
    ]
    firsts = [group.records[0] for group in groups]
    tables = [
        make(record, is_one)
        for make in (_samples, _wrong)
        for record in firsts
        if record.validations
    ]
    tables += [table for record in firsts for table in _training_samples(record, is_one)]
    metrics = []  # the last value in each run; of one run the first value too
    for name in itertools.chain(*plots.metric_groups(run_records).values()):
        values = [record.last.get(name) for record in run_records]
        if is_one:
            values.insert(0, records.series(run_records[0].metrics, name)[1][0])
        metrics.append([name, *values, plots.meaning(name)])
    columns = ["first", "last"] if is_one else [record.name for record in run_records]
    return {
        "title": _title(run_records, groups),
        "stages": _stages(run_records),
        "records": run_records,
        "groups": groups,
        "verdicts": {group.name: verdict.sentence(group) for group in groups},
        "cautions": {group.name: verdict.cautions(group) for group in groups},
        "rewarded": verdict.rewarded(groups[0]) if len(groups) == 1 else [],
        "tiles": verdict.tiles(groups[0]) if len(groups) == 1 else [],
        "samples": [table for table in tables if table.rows],
        "differences": differences,
        "curves": curves,
        "constant": constant,
        "distributions": plots.distributions(groups),
        "metrics": Table(
            "All metrics", ("metric", *columns, "what it is"), metrics, note=_numbers(groups)
        ),
        "facts": _facts(groups),
        "commands": [_command(record) for record in run_records],
    }


def _stages(run_records: Sequence[RunRecord]) -> str:
    names = [TITLES.get(record.stage, record.stage.upper()) for record in run_records]
    return ", ".join(dict.fromkeys(names))


def _numbers(groups: Sequence[Group]) -> str:
    """On how many rows the means in the table of all metrics rest."""
    kinds = {"Means of training": "", "Means of validation": "validation/"}
    found = {
        what: dict.fromkeys(verdict.number(group, of) for group in groups)
        for what, of in kinds.items()
    }
    return " ".join(f"{what}: {'; '.join(filter(None, n))}." for what, n in found.items() if any(n))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _title(run_records: Sequence[RunRecord], groups: Sequence[Group]) -> str:
    """What was trained on what: "PPO rewarded by reward_model, 3 runs of 3 seeds"."""
    record = run_records[0]
    title = _stages(run_records)
    if len(groups) > 1:
        return f"{title}: {len(run_records)} runs compared"
    how = "trained on"
    validation = record.settings.get(f"{record.stage}.validation_data") or []
    others = {"model", "tokenizer", "validation_data", *validation}
    sources = [name for name in record.manifest.get("data", {}) if name not in others]
    if record.kind == "policy" and record.settings.get("reward"):
        how = "rewarded by"
        sources = [source.replace("/model", "") for source in record.settings["reward"]]
    if sources:
        names = [re.sub(r"[^\s,:*]*/", "", source) for source in sources]
        title += f" {how} {' and '.join(names)}"
    if len(run_records) > 1:
        seeds = len({record.manifest.get("seed") for record in run_records})
        title += f", {len(run_records)} runs of {seeds} seed{'s' * (seeds > 1)}"
    return title


def _command(record: RunRecord) -> str:
    """The command that runs this stage again by itself, from its recorded settings."""
    if record.stage not in STAGES or record.manifest.get("given"):
        return str(record.manifest["command"])  # Python gave something that no setting holds
    files = ["--config", f"{record.folder}/config.yaml", "--output-dir", f"{record.folder}-again"]
    return shlex.join(["rlhf-jax", record.stage.replace("_", "-"), *files])


def _facts(groups: Sequence[Group]) -> Facts | Table:
    """Stage, seed, pace, state and environment of one run, or a table with a column for each."""
    columns: dict[str, dict[str, Any]] = {}
    for own, record in ((group, record) for group in groups for record in group.records):
        manifest = record.manifest
        facts = {
            **({"group": own.name} if own.name != record.name else {}),
            "stage": _stages([record]),
            "seed": manifest.get("seed"),
            "steps": record.steps,
            "s/step (median)": record.seconds_per_step,
            "state": "finished" if record.finished else "not finished",
        }
        known: dict[str, Any] = {"data": verdict.data(record)}
        git = manifest.get("git")
        if git:
            modified = " (modified)" if git["modified"] else ""
            known["git commit"] = f"{git['commit'][:12]}{modified}"
        known |= {"backend": manifest.get("backend"), **manifest.get("versions", {})}
        devices = manifest.get("devices")
        if devices:
            known["devices"] = f"{devices['count']} x {devices['kind']}"
        for name, digest in manifest.get("data", {}).items():
            known[f"{name}, sha256"] = f"{digest[:12]}…"
        if manifest.get("resumed"):
            known["resumed"] = f"{len(manifest['resumed'])} times"
        facts |= {name: value for name, value in known.items() if value is not None}
        columns[record.name] = facts
    if len(columns) == 1:
        return Facts("Run", facts)
    keys = dict.fromkeys(itertools.chain(*columns.values()))
    rows = [[key, *(facts.get(key) for facts in columns.values())] for key in keys]
    return Table("Runs", ("", *columns), rows)


def _samples(record: RunRecord, is_one: bool) -> Table:
    """The samples of the last validation; if ``is_one`` no title has to name the run."""
    return _before_and_after(record.validations, "Samples", "" if is_one else f": {record.name}")


def _training_samples(record: RunRecord, is_one: bool) -> list[Table]:
    """Answers or pairs trained on, before and after; in RL those of the first and the last step."""
    name = "" if is_one else f": {record.name}"
    note = "No validation: the run trains on these {}. "
    if record.kind != "policy":
        note = note.format("pairs" if record.kind == "reward_model" else "prompts")
        ends = [record.training_samples] if record.training_samples else []
        return [_before_and_after(rows, "Training samples", name, note) for rows in ends]
    temperature = record.settings.get("rl.temperature", 1.0)
    note = note.format("answers") + f"Sampled at temperature {temperature:g}, before the update. "
    return [
        _before_and_after([(step, rows)], f"Training samples of iteration {step}", name, note)
        for step, rows in record.training_samples
    ]


def _before_and_after(
    ends: Sequence[tuple[int, list[Row]]], title: str, name: str, note: str = ""
) -> Table:
    """The first rows of the last step. Each value that changes stands beside the value that the
    first step had in the same row. A column without a value is left out.
    """
    steps, validations = zip(*ends, strict=True)
    last = validations[-1]
    kinds = (columns for columns in SAMPLE_COLUMNS if columns[0][-1] in last[0])
    fixed, changing = next(kinds, SAMPLE_COLUMNS[-1])
    parts = dict.fromkeys(key for row in last for key in row if key.startswith("reward/"))
    changing = tuple(key for key in (*changing, *parts) if any(key in row for row in last))
    numbered: list[dict[Any, Row]] = []  # {(what stays the same, how often it came before): row}
    for validation in validations:
        count = Counter[str]()
        by_key = {}
        for row in validation:
            values = repr([row.get(name) for name in fixed])
            by_key[values, count[values]] = row
            count[values] += 1
        numbered.append(by_key)
    rows = []
    for key, row in list(numbered[-1].items())[:MAX_SAMPLES]:
        cells = [row.get(name) for name in fixed[1:]]
        cells += [by_key.get(key, {}).get(name) for by_key in numbered for name in changing]
        rows.append([_prompt(row), *map(_with_line_ends, cells)])
    columns = [*fixed, *(f"{name}, step {step}" for step in steps for name in changing)]
    title += f" before and after{name}" if len(steps) > 1 else name
    formats = {column: ".3g" for column in columns if column.startswith(NUMBERS)}
    note += f"Of {len(last)} in samples.jsonl. ↵ marks a line's end that the text holds."
    return Table(title, columns, rows, formats, note)


def _wrong(record: RunRecord, is_one: bool) -> Table:
    """The pairs of the last validation whose rejected answer scores higher, worst margin first."""
    step, last = record.validations[-1]
    pairs = [row for row in last if "margin" in row]
    wrong = sorted((row for row in pairs if row["margin"] < 0), key=lambda row: row["margin"])
    rows = [
        [_prompt(row), *(_with_line_ends(row.get(name)) for name in PAIR[1:]), row["margin"]]
        for row in wrong[:MAX_SAMPLES]
    ]
    title = f"Pairs that {'it' if is_one else record.name} gets wrong"
    note = f"{len(wrong)} of {len(pairs)} in samples.jsonl of step {step}; the worst margins first."
    return Table(title, [*PAIR, "margin"], rows, {"margin": ".3g"}, note)


def _prompt(row: Row) -> str:
    """Without the empty lines around it, which the template adds."""
    return str(row.get("prompt") or "").strip("\n")


def _with_line_ends(text: Any) -> Any:
    return text.replace("\n", "↵\n") if isinstance(text, str) else text
