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
    """The main metric of a run, its KL and its alerts: "Validation score 0.12 → 1.05 in 40
    iterations, KL 1.8 of 2 nats, no alert." Of several seeds it has the means. If a run did not
    finish, the sentence before this one says how it ended.
    """
    record = group.records[0]
    steps = sorted({record.steps for record in group.records})
    length = f"{' or '.join(map(str, steps))} {plots.unit(record)}s"
    measured = _measured(group)
    parts = [f"{main.label} {main.value} in {length}" for main in measured[:1]] or [length]
    if len(group.records) > 1:
        parts.append(f"mean of {len(group.records)} runs")
    for tile in measured[1:]:
        if tile.label == "KL":
            last = tile.value.split()[-1]
            parts.append(f"KL {last} {tile.note}")
    alerts = _alerts(group)
    parts.append(": ".join(filter(None, [alerts.value, alerts.note])))
    ends = [unfinished(record) for record in group.records]
    return " ".join([*filter(None, ends), f"{', '.join(parts)}."])


def next_commands(kind: str, folder: object) -> list[str]:
    """The commands that go on with a finished run of this kind."""
    run = shlex.quote(str(folder))
    return [line.format(run=run) for line in plots.LABELS["next"][kind]]


def tiles(group: Group) -> list[Tile]:
    """The metrics that a run of this kind is judged by, the time and the alerts."""
    record = group.records[0]
    seconds = sum(row[name] for row in record.timing for name in row if name != "step")
    pace = record.seconds_per_step
    note = f"{pace:.3g} s per {plots.unit(record)}" if pace else ""
    time = Tile("Time", duration(seconds), note)
    return [*_measured(group), time, _alerts(group)]


def unfinished(record: RunRecord) -> str:
    """A sentence about how a run without a model ended; empty if it has a model."""
    if record.finished:
        return ""
    where = f"{plots.unit(record)} {record.steps}"
    planned = record.settings.get("rl.num_iterations")
    if record.kind == "policy" and planned:
        where += f" of {planned}"
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
            means = plots.mean(group, name)
            if means.size:
                first, last = (f"{value:.3g}" for value in means[[0, -1]])
                value = last if first == last else f"{first} → {last}"
                found.append(Tile(label, value, nats if label == "KL" else ""))
                break
    return found


def _alerts(group: Group) -> Tile:
    names = [str(row.get("name")) for record in group.records for row in record.alerts]
    count = {0: "no alert", 1: "1 alert"}.get(len(names), f"{len(names)} alerts")
    return Tile("Alerts", count, ", ".join(dict.fromkeys(names)))
