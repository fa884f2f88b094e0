"""What came of a run, before any details: a sentence and a few figures; and what to do next."""

import shlex
from typing import NamedTuple

from rlhf_jax.report import plots
from rlhf_jax.report.records import Group, RunRecord
from rlhf_jax.runs.log import duration


class Tile(NamedTuple):
    """A figure of a run, with a few words below it."""

    label: str
    value: str
    note: str = ""


def sentence(group: Group) -> str:
    """How a run ended that did not finish; its main metric, KL and alerts: "Validation score 0.12
    → 1.05 in 40 iterations, KL 1.8 of 2 nats, no alert." Of several seeds the means.
    """
    record = group.records[0]
    steps = " or ".join(map(str, sorted({record.steps for record in group.records})))
    parts = [f"{steps} {plots.unit(record)}s"]
    measured = _measured(group)
    if measured:
        parts = [f"{measured[0].label} {measured[0].value} in {parts[0]}"]
    if len(group.records) > 1:
        parts.append(f"mean of {len(group.records)} runs")
    for tile in measured[1:]:
        if tile.label == "KL":
            parts.append(f"KL {tile.value.rpartition(' ')[2]} {tile.note}")
    alerts = _alerts(group)
    parts.append(": ".join(filter(None, [alerts.value, alerts.note])))
    ends = [end for record in group.records if (end := unfinished(record))]
    return " ".join([*ends, f"{', '.join(parts)}."])


def next_commands(kind: str, folder: object) -> list[str]:
    """The commands that go on with a finished run of this kind."""
    place = shlex.quote(str(folder))
    return [line.format(run=place) for line in plots.LABELS["next"][kind]]


def tiles(group: Group) -> list[Tile]:
    """The metrics that a run of this kind is judged by, the time and the alerts."""
    record = group.records[0]
    seconds = [row[name] for row in record.timing for name in row if name != "step"]
    pace = record.seconds_per_step
    note = f"{pace:.3g} s per {plots.unit(record)}" if pace else ""
    return [*_measured(group), Tile("Time", duration(sum(seconds)), note), _alerts(group)]


def unfinished(record: RunRecord) -> str:
    """How a run ended that has no model; empty if it has one."""
    if record.finished:
        return ""
    planned = record.settings.get("rl.num_iterations") if record.kind == "policy" else None
    where = f"{plots.unit(record)} {record.steps}{f' of {planned}' if planned else ''}"
    if record.last.get("nonfinite", 0) > 0:
        return f"Failed in {where}: the loss or the gradient was not finite."
    for alert in record.alerts[-1:]:
        if alert.get("action") == "stop" and alert["step"] == record.steps:
            return f"Stopped after {where} by the alert {alert.get('name')!r}."
    return f"Not finished: the last record is of {where}."


def _measured(group: Group) -> list[Tile]:
    """The metrics that plots.yaml names for this kind of run, before and after."""
    record = group.records[0]
    target = record.settings.get("rl.kl_target")
    nats = f"of {target:g} nats" if target else "nats"
    found = []
    for metrics in plots.LABELS["tiles"][record.kind]:
        for label, name in metrics.items():
            y = plots.mean(group, name)
            if not y.size:
                continue
            ends = dict.fromkeys(f"{value:.3g}" for value in (y[0], y[-1]))
            note = nats if label == "KL" else ""
            found.append(Tile(label, " → ".join(ends), note))
            break
    return found


def _alerts(group: Group) -> Tile:
    names = [str(row.get("name")) for record in group.records for row in record.alerts]
    count = {0: "no alert", 1: "1 alert"}.get(len(names), f"{len(names)} alerts")
    return Tile("Alerts", count, ", ".join(dict.fromkeys(names)))
