"""The chapter of a page about runs of one kind: verdict, figures, samples, settings, commands."""

import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.report import plots, records, samples, verdict
from rlhf_jax.report.parts import Facts, Table
from rlhf_jax.report.records import KINDS, STAGES, Group, RunRecord

TITLES = {"reward_model": "Reward model", "sft": "Supervised fine-tuning"}  # others in capitals


def of(run_records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """A chapter for each kind of run, in the order of KINDS."""
    chapters = []
    for kind in KINDS:
        of_kind = [record for record in run_records if record.kind == kind]
        if of_kind:
            chapters.append(_chapter(of_kind))
    return chapters


def _chapter(run_records: Sequence[RunRecord]) -> dict[str, Any]:
    """The values that ``templates/runs.html`` reads for runs of one kind."""
    groups = records.groups(run_records)
    firsts = [group.records[0] for group in groups]
    is_one = len(run_records) == 1
    curves, constant = plots.curves(groups)
    differences = []
    for key, values in records.differences(groups).items():
        texts = map(_plain, values)
        differences.append([key, *texts])
    return {
        "title": _title(run_records, groups),
        "stages": _stages(run_records),
        "records": run_records,
        "groups": groups,
        "verdicts": {group.name: verdict.sentence(group) for group in groups},
        "rewarded": verdict.rewarded(groups[0]) if len(groups) == 1 else [],
        "tiles": verdict.tiles(groups[0]) if len(groups) == 1 else [],
        "samples": samples.tables(firsts, is_one),
        "differences": differences,
        "curves": curves,
        "constant": constant,
        "distributions": plots.distributions(groups),
        "metrics": _metrics(run_records),
        "facts": _facts(groups),
        "commands": [_command(record) for record in run_records],
    }


def _stages(run_records: Sequence[RunRecord]) -> str:
    names = [TITLES.get(record.stage, record.stage.upper()) for record in run_records]
    return ", ".join(dict.fromkeys(names))


def _title(run_records: Sequence[RunRecord], groups: Sequence[Group]) -> str:
    """What was trained on what: "PPO rewarded by reward_model, 3 seeds"."""
    record = run_records[0]
    title = _stages(run_records)
    if len(groups) > 1:
        return f"{title}: {len(run_records)} runs compared"
    how = "trained on"
    validation = record.settings.get(f"{record.stage}.validation_data") or []
    others = {"model", "tokenizer", *validation}
    sources = [name for name in record.manifest.get("data", {}) if name not in others]
    if record.kind == "policy" and record.settings.get("reward"):
        how = "rewarded by"
        sources = [source.replace("/model", "") for source in record.settings["reward"]]
    if sources:
        names = [re.sub(r"[^\s,:*]*/", "", source) for source in sources]
        title += f" {how} {' and '.join(names)}"
    if len(run_records) > 1:
        title += f", {len(run_records)} seeds"
    return title


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _metrics(run_records: Sequence[RunRecord]) -> Table:
    """The last value of each metric in each run, in the page's order; of one run the first value
    too.
    """
    is_one = len(run_records) == 1
    rows = []
    for name in itertools.chain(*plots.metric_groups(run_records).values()):
        values = [record.last.get(name) for record in run_records]
        if is_one:
            _, recorded = records.series(run_records[0].metrics, name)
            values.insert(0, recorded[0])
        rows.append([name, *values, plots.meaning(name)])
    columns = ["first", "last"] if is_one else [record.name for record in run_records]
    return Table("All metrics", ("metric", *columns, "what it is"), rows)


def _command(record: RunRecord) -> str:
    """The command that runs this stage again by itself, from its recorded settings."""
    if record.stage not in STAGES or record.manifest.get("given"):
        return str(record.manifest["command"])  # Python gave something that no setting holds
    stage = record.stage.replace("_", "-")
    config = f"{record.folder}/config.yaml"
    again = f"{record.folder}-again"
    return shlex.join(["rlhf-jax", stage, "--config", config, "--output-dir", again])


def _facts(groups: Sequence[Group]) -> Facts | Table:
    """Stage, seed, pace, state and environment: the facts of one run, or a table with a column for
    each run.
    """
    columns = {}
    for group in groups:
        for record in group.records:
            columns[record.name] = _of_run(record, group)
    if len(columns) == 1:
        [facts] = columns.values()
        return Facts("Run", facts)
    keys = dict.fromkeys(itertools.chain(*columns.values()))
    rows = []
    for key in keys:
        cells = [facts.get(key) for facts in columns.values()]
        rows.append([key, *cells])
    return Table("Runs", ("", *columns), rows)


def _of_run(record: RunRecord, group: Group) -> dict[str, Any]:
    facts = {"group": group.name} if group.name != record.name else {}
    return facts | {
        "stage": _stages([record]),
        "seed": record.manifest.get("seed"),
        "steps": record.steps,
        "s/step (median)": record.seconds_per_step,
        "state": "finished" if record.finished else "not finished",
        **_manifest(record.manifest),
    }


def _manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of the manifest: code, versions, devices and data."""
    facts: dict[str, Any] = {}
    git = manifest.get("git")
    if git:
        modified = " (modified)" if git["modified"] else ""
        facts["git commit"] = f"{git['commit'][:12]}{modified}"
    facts["backend"] = manifest.get("backend")
    facts |= manifest.get("versions", {})
    devices = manifest.get("devices")
    if devices:
        facts["devices"] = f"{devices['count']} x {devices['kind']}"
    for name, digest in manifest.get("data", {}).items():
        facts[f"{name}, sha256"] = f"{digest[:12]}…"
    resumed = manifest.get("resumed")
    if resumed:
        facts["resumed"] = f"{len(resumed)} times"
    return {name: value for name, value in facts.items() if value is not None}
