"""The result of a run in a sentence and a few figures, and the commands that may come next."""

import math
import shlex
from typing import NamedTuple

import numpy as np

from rlhf_jax import metrics
from rlhf_jax.report import plots
from rlhf_jax.report.records import Group, RunRecord, series
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
    steps = sorted({record.steps for record in group.records})
    length = f"{' or '.join(map(str, steps))} {group.records[0].unit}s"
    measured = _measured(group)
    parts = [length]
    if measured:
        main = measured[0]
        note = f" ({main.note})" if main.note else ""
        parts = [f"{main.label} {main.value}{note} in {length}"]
    if len(group.records) > 1:
        parts.append(f"mean of {len(group.records)} runs")
    for tile in measured[1:]:
        if tile.label == "KL":
            parts.append(f"KL {tile.value.rpartition('→ ')[2]} {tile.note}")
    alerts = _alerts(group)
    parts.append(f"{alerts.value}: {alerts.note}" if alerts.note else alerts.value)
    ends = [unfinished(record) for record in group.records]
    return " ".join([*filter(None, ends), f"{', '.join(parts)}."])


def rewarded(group: Group, count: int = 3) -> list[str]:
    """Answers of the last validation with the highest scores, ``3 + 4 = (score 1, to: What ...)``:
    whether they are what was meant, no number says. Empty if none scored more than the others.
    """
    rows = []
    for _, samples in group.records[0].validations[-1:]:
        rows = [row for row in samples if "response" in row and isinstance(row.get("score"), float)]
    scores = [row["score"] for row in rows]
    lowest = min(scores, default=0.0)
    if lowest == max(scores, default=0.0):
        lowest = 0.0  # all are right, or none is
    shown: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["score"], reverse=True):
        answer = _ends(row["response"])
        if row["score"] > lowest:
            question = _ends(row.get("prompt", ""))
            shown.setdefault(answer, f"{answer!r} (score {row['score']:.3g}, to {question!r})")
    return list(shown.values())[:count]


def _ends(text: object) -> str:
    """A text, or the last characters of a long one."""
    line = " ".join(str(text).split())
    return line if len(line) <= _LONGEST else f"... {line[-_LONGEST:]}"


def next_commands(kind: str, folder: object) -> list[str]:
    """The commands that go on with a finished run of this kind."""
    return [line.format(run=shlex.quote(str(folder))) for line in plots.LABELS["next"][kind]]


def tiles(group: Group) -> list[Tile]:
    """The metrics that a run of this kind is judged by, the time and the alerts."""
    record = group.records[0]
    times = [value for row in record.timing for name, value in row.items() if name != "step"]
    pace = record.seconds_per_step
    note = f"{pace:.3g} s per {record.unit}" if pace else ""
    return [*_measured(group), Tile("Time", duration(sum(times)), note), _alerts(group)]


def unfinished(record: RunRecord) -> str:
    """A sentence about how a run without a model ended; empty if it has a model."""
    if record.finished:
        return ""
    where = f"{record.unit} {record.steps}"
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
    found = []
    for choices in plots.LABELS["tiles"][record.kind]:
        for label, name in choices.items():
            means = plots.mean(group, name)
            if not means.size:
                continue
            first, last = (f"{means[end]:.3g}" for end in (0, -1))
            notes = []
            if label == "KL":
                notes.append(f"of {target:g} nats" if target else "nats")
            measured_at = plots.curve(group, name)[0][-1]
            if measured_at < min(record.steps for record in group.records):
                notes.append(f"of {record.unit} {measured_at}")
            if len(group.records) == 1:
                notes += _change(record, name)
            value = last if first == last else f"{first} → {last}"
            found.append(Tile(label, value, ", ".join(notes)))
            break
    return found


def _change(record: RunRecord, name: str) -> list[str]:
    """How much a held-out accuracy or score changed, on how many rows or prompts, and whether that
    may be chance; empty of other metrics, and if the run does not say on how many rows it was
    measured, or has one validation alone.
    """
    _, values = series(record.metrics, name)
    num = record.last.get("validation/rows", 0)
    if len(values) > 1 and name == "validation/accuracy" and num:
        unit = "rows"
        low, high = metrics.share_change(values[0], after=values[-1], num=num)
    elif len(values) > 1 and name == "validation/score" and len(record.validations) > 1:
        by_prompt: list[dict[str, list[float]]] = [{}, {}]
        for scores, (_, rows) in zip(by_prompt, record.validations, strict=True):
            for row in rows:
                score = row.get("score")
                if isinstance(score, float) and math.isfinite(score):
                    scores.setdefault(str(row.get("prompt")), []).append(score)
        unit = "prompts"
        both = sorted(by_prompt[0].keys() & by_prompt[1].keys())
        num = len(both)
        if num < 2:
            return []
        means = np.array([[np.mean(scores[prompt]) for prompt in both] for scores in by_prompt])
        low, high = metrics.paired_change(*means)
        if low == high:
            return [f"{num} held-out prompts, each changed by {low:.2g}"]
        if num < metrics.FEW and not metrics.are_shares(means):
            unit = "prompts (few)"
    else:
        return []
    noise = ": within noise" if low <= 0 <= high else ""
    return [f"{num} held-out {unit}, change {low:.2g} to {high:.2g} at 95%{noise}"]


def _alerts(group: Group) -> Tile:
    alerts = [alert for record in group.records for alert in record.alerts]
    names = dict.fromkeys(str(alert.get("name")) for alert in alerts)
    count = {0: "no alert", 1: "1 alert"}.get(len(alerts), f"{len(alerts)} alerts")
    return Tile("Alerts", count, ", ".join(names))
