"""The result of a run in a sentence and a few figures, and the commands that may come next."""

import shlex
from typing import NamedTuple

from rlhf_jax.report import noise, plots
from rlhf_jax.report.records import Group, RunRecord
from rlhf_jax.runs.log import duration

_LONGEST = 100  # characters of an answer or prompt beside the verdict


class Tile(NamedTuple):
    """A figure of a run, with a few words below it."""

    label: str
    value: str
    note: str = ""


def sentence(group: Group) -> str:
    """The main metric of a run, its KL and its alerts: "Validation score 0.12 → 1.05 in 40
    iterations, KL 1.8 of 2 nats, no alert." Of several seeds it has the means. If the last value is
    not of the last iteration, it says of which; of held-out accuracies and scores also on how many
    rows they rest and whether the change may be chance. If a run did not finish, the sentence
    before this one says how it ended.
    """
    record = group.records[0]
    steps = sorted({record.steps for record in group.records})
    counts = " or ".join(map(str, steps))
    length = f"{counts} {plots.unit(record)}s"
    measured = _measured(group)
    parts = [length]
    if measured:
        main = measured[0]
        value = main.value
        if main.note:
            value += f" ({main.note})"
        parts = [f"{main.label} {value} in {length}"]
    if len(group.records) > 1:
        parts.append(f"mean of {len(group.records)} runs")
    for tile in measured[1:]:
        if tile.label == "KL":
            last = tile.value.rpartition("→ ")[2]
            parts.append(f"KL {last} {tile.note}")
    alerts = _alerts(group)
    parts.append(alerts.value)
    if alerts.note:
        parts[-1] += f": {alerts.note}"
    ends = [unfinished(record) for record in group.records]
    result = ", ".join(parts)
    return " ".join([*filter(None, ends), f"{result}."])


def rewarded(group: Group, count: int = 3) -> list[str]:
    """Answers of the last validation with the highest scores, ``3 + 4 = (score 1, to: What ...)``:
    whether they are what was meant, no number says. Empty if none scored more than the others.
    """
    validations = group.records[0].validations
    if not validations:
        return []
    _, samples = validations[-1]
    rows = []
    for row in samples:
        if "response" in row and isinstance(row.get("score"), float):
            rows.append(row)
    scores = [row["score"] for row in rows]
    lowest = min(scores, default=0.0)
    highest = max(scores, default=0.0)
    if lowest == highest:
        lowest = 0.0  # all are right, or none is
    shown: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["score"], reverse=True):
        answer = _ends(row["response"])
        question = _ends(row.get("prompt", ""))
        score = row["score"]
        if score > lowest:
            shown.setdefault(answer, f"{answer!r} (score {score:.3g}, to {question!r})")
    return list(shown.values())[:count]


def _ends(text: object) -> str:
    """A text, or the last characters of a long one."""
    line = " ".join(str(text).split())
    return line if len(line) <= _LONGEST else f"... {line[-_LONGEST:]}"


def next_commands(kind: str, folder: object) -> list[str]:
    """The commands that go on with a finished run of this kind."""
    run = shlex.quote(str(folder))
    lines = plots.LABELS["next"][kind]
    return [line.format(run=run) for line in lines]


def tiles(group: Group) -> list[Tile]:
    """The metrics that a run of this kind is judged by, the time and the alerts."""
    record = group.records[0]
    seconds = 0.0
    for row in record.timing:
        for name, value in row.items():
            if name != "step":
                seconds += value
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
    if planned and record.kind == "policy":
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
    for choices in plots.LABELS["tiles"][record.kind]:
        for label, name in choices.items():
            means = plots.mean(group, name)
            if not means.size:
                continue
            first = f"{means[0]:.3g}"
            last = f"{means[-1]:.3g}"
            value = last if first == last else f"{first} → {last}"
            notes = []
            if label == "KL":
                notes.append(nats)
            measured_at = _of_earlier_step(group, name)
            if measured_at:
                notes.append(measured_at)
            changed = noise.change(record, name) if len(group.records) == 1 else None
            if changed is not None:
                notes.append(changed.text)
            note = ", ".join(notes)
            found.append(Tile(label, value, note))
            break
    return found


def _of_earlier_step(group: Group, name: str) -> str:
    """The step of a metric's last value in words; "" if it is the last step of the runs."""
    steps, _ = plots.curve(group, name)
    measured_at = steps[-1]
    record = group.records[0]
    last_step = min(record.steps for record in group.records)
    if measured_at >= last_step:
        return ""
    unit = plots.unit(record)
    return f"of {unit} {measured_at}"


def _alerts(group: Group) -> Tile:
    alerts = [alert for record in group.records for alert in record.alerts]
    names = dict.fromkeys(str(alert.get("name")) for alert in alerts)
    count = {0: "no alert", 1: "1 alert"}.get(len(alerts), f"{len(alerts)} alerts")
    return Tile("Alerts", count, ", ".join(names))
