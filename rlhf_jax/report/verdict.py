"""The result of a run in a sentence and a few figures, and the commands that may come next."""

import itertools
import math
import shlex
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rlhf_jax import metrics
from rlhf_jax.report import plots
from rlhf_jax.report.records import Group, RunRecord, series
from rlhf_jax.runs.log import duration

_LONGEST = 100  # characters of an answer or prompt beside the verdict
_MOST_REASONS = 3  # why rows were dropped
_ZERO = 1e-8  # norm of a gradient
_ANSWERS = 64  # at an end of a run, over which it is said how they are
_EXPLAINED = 0.8  # correlation: length explains .64 of the variance of the scores
# What manifest.json counts; a ranking has several pairs, a conversation several answers.
_EXAMPLES = {"sft": "answers", "reward_model": "pairs", "dpo": "pairs", "kto": "answers"}
# Of the tiles that the sentence has too.
_UNITS = {"KL": "nats", "Margin": "nats", "Moved": "nats an answer"}
_PER_TOKEN = ("simpo", "orpo")  # kinds of DPO whose log-ratios are divided by the length


class Tile(NamedTuple):
    """A figure of a run, with a few words below it."""

    label: str
    value: str
    note: str = ""
    number: str = ""  # on how many rows the figure rests, if the note does not say it


def sentence(group: Group) -> str:
    """The main metric of a run, how far it moved, its data and its alerts: "Validation score 0.12 →
    1.05 in 40 iterations, KL 1.8 of 2 nats, no alert." Of several runs it has the means. A judge
    stands before the score. If the last value is not of the last iteration, it says of which; of
    held-out accuracies and scores also on how many rows they rest and whether the change may be
    chance. If a run did not finish, the sentence before this one says how it ended.
    """
    steps = sorted({record.steps for record in group.records})
    unit = group.records[0].unit
    length = f"{' or '.join(map(str, steps))} {unit if steps == [1] else f'{unit}s'}"
    measured = _measured(group)
    num_main = 2 if measured and measured[0].label == "Judge" else 1
    main: list[str] = []
    for tile in measured[:num_main]:
        notes = ", ".join(filter(None, (tile.note, tile.number)))
        label = tile.label.lower() if main else tile.label
        main.append(f"{label} {tile.value}" + (f" ({notes})" if notes else ""))
    parts = [f"{', '.join(main)} in {length}" if main else length]
    if len(group.records) > 1:
        parts.append(f"mean of {len(group.records)} runs")
    for tile in measured[num_main:]:
        if tile.label in _UNITS:
            name = tile.label if tile.label == "KL" else tile.label.lower()
            parts.append(f"{name} {tile.value.rpartition('→ ')[2]} {tile.note}")
    parts += filter(None, [_changed(group), data(group.records[0])])
    alerts = _alerts(group)
    parts.append(f"{alerts.value}: {alerts.note}" if alerts.note else alerts.value)
    ends = [unfinished(record) for record in group.records]
    return " ".join([*filter(None, ends), f"{', '.join(parts)}."])


def cautions(group: Group) -> list[str]:
    """Sentences about runs that cannot have learned what their metrics may seem to say: the rate or
    the gradient was 0, responses were masked or cut, most rows of the data were dropped, length
    alone explains the score or the accuracy, or the score rose and the judge did not.
    """
    found: list[str] = []
    for record in group.records:
        rates = series(record.metrics, "lr")[1]
        gradients = series(record.metrics, "grad_norm")[1]
        num_zero = sum(norm < _ZERO for norm in gradients)
        batch = _batch_size(record)
        num_masked = sum(row.get("response/masked", 0) >= batch for row in record.metrics)
        rows = record.manifest.get("rows", {})
        steps = f"{record.unit}s"
        found += _gaming(record)
        ended = _ends_of(record, "response/eos_fraction")
        if rates and not any(rates):
            found.append(f"the learning rate was 0 in each {record.unit}: nothing is learned")
        if num_masked:
            found.append(
                f"in {num_masked} of {record.steps} {steps} rl.mask_truncated masked every "
                "response: nothing is learned from them; raise rl.max_new_tokens"
            )
        elif ended and 1 - ended[1] > 0.9:
            found.append(
                f"{1 - ended[1]:.0%} of the last answers did not end: the score is that of cut "
                "texts; raise rl.max_new_tokens, or set rl.missing_eos_score"
            )
        if num_zero > len(gradients) / 2 and not num_masked:
            found.append(f"the gradient was 0 in {num_zero} of {len(gradients)} {steps}")
        if sum(rows.get("dropped", {}).values()) > rows.get("read", 0) / 2:
            found.append(f"most of the data is not used: {data(record)}")
    return list(dict.fromkeys(found))


def _gaming(record: RunRecord) -> Iterator[str]:
    """What else than what is wanted may explain a score or an accuracy."""
    score, judge = (_interval(record, f"validation/{name}") for name in ("score", "judge"))
    if score and judge and score[0] > 0 >= judge[0]:
        how = "fell" if judge[1] < 0 else "did not rise beyond noise"
        yield f"the score rose and the judge {how}: the policy may be gaming the reward"
    # A policy that has found the best length has no others left at its end.
    r = max(_ends_of(record, "reward/length_correlation"), key=abs, default=0.0)
    if abs(r) > _EXPLAINED:
        which = "longer" if r > 0 else "shorter"
        yield f"length alone explains the score: {which} answers score higher (correlation {r:.2f})"
    # The best answer of a ranking may be neither the longest nor the shortest.
    kind = "pairwise_" if "validation/pairwise_accuracy" in record.last else ""
    names = (f"{kind}accuracy", f"{kind}length_accuracy", "rows")
    accuracy, longer, num = (record.last.get(f"validation/{name}", math.nan) for name in names)
    rule = max(longer, 1 - longer)
    is_above = metrics.share_change(rule, after=accuracy, num=num)[0] > 0
    if metrics.wilson(rule, num=num)[0] > 0.5 and not is_above:
        which = "longer" if longer > 0.5 else "shorter"
        yield (
            f"always taking the {which} answer is right in {rule:.0%} of the {num:.0f} held-out "
            f"rows, the model in {accuracy:.0%}: length alone may explain its accuracy"
        )


def _ends_of(record: RunRecord, name: str) -> list[float]:
    """The means over the first and the last ``_ANSWERS`` responses; empty if there are fewer."""
    values = [value for value in series(record.metrics, name)[1] if math.isfinite(value)]
    num = max(1, math.ceil(_ANSWERS / _batch_size(record)))
    return [float(np.mean(end)) for end in (values[:num], values[-num:]) if len(end) == num]


def data(record: RunRecord) -> str | None:
    """How many examples of the data were dropped and texts cut, and why: "3 of 5 pairs dropped (2
    too long, 1 empty prompt)"; None if none were.
    """
    rows = record.manifest.get("rows", {})
    parts = []
    dropped = rows.get("dropped", {})
    if dropped:
        by_number = sorted(dropped.items(), key=lambda item: -item[1])
        reasons = [f"{number} {reason}" for reason, number in by_number[:_MOST_REASONS]]
        others = sum(number for _, number in by_number[_MOST_REASONS:])
        reasons += [f"{others} for other reasons"] if others else []
        total = sum(dropped.values())
        unit = _EXAMPLES.get(record.kind, "prompts")
        parts.append(f"{total} of {rows['read']} {unit} dropped ({', '.join(reasons)})")
    for how, number in rows.get("cut", {}).items():
        parts.append(f"{number} text{'s' * (number != 1)}: {how}")
    return ", ".join(parts) or None


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
    if record.planned_steps:
        where += f" of {record.planned_steps}"
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
            if label == "KL" and target:
                notes.append(f"of {target:g} nats")
            elif label in _UNITS:
                notes.append(_unit(record, label))
            measured_at = plots.curve(group, name)[0][-1]
            if measured_at < min(record.steps for record in group.records):
                notes.append(f"of {record.unit} {measured_at}")
            change = _change(record, name) if len(group.records) == 1 else []
            notes += change
            by_length = plots.mean(group, "validation/length_accuracy")
            if name == "validation/accuracy" and by_length.size:
                notes.append(f"{by_length[-1]:.3g} by the longer answer")
            value = last if first == last and not change else f"{first} → {last}"
            rows = "" if change else number(group, name)
            found.append(Tile(label, value, ", ".join(notes), rows))
            break
    return found


def number(group: Group, name: str) -> str:
    """On how many rows each value of a metric rests: "n = 54 held-out rows"; "" if the run does not
    say it.
    """
    record = group.records[0]
    each = " a run" if len(group.records) > 1 else ""
    if not name.startswith("validation/"):
        section, unit = ("rl", "responses") if record.kind == "policy" else (record.kind, "rows")
        size = record.settings.get(f"{section}.batch_size")
        return f"n = {size} {unit} each {record.unit}{each}" if size else ""
    if record.kind != "policy":
        rows = record.last.get("validation/rows")
        return f"n = {rows:.0f} held-out rows{each}" if rows else ""
    rows = itertools.chain(*(rows for _, rows in record.validations[-1:]))
    prompts = {str(row.get("prompt")) for row in rows if isinstance(row.get("score"), float)}
    return f"n = {len(prompts)} held-out prompts{each}" if prompts else ""


def _change(record: RunRecord, name: str) -> list[str]:
    """How much a metric changed and whether that may be chance; empty if nobody knows."""
    low, high, rows = _interval(record, name) or (math.nan, math.nan, "")
    if low == high:
        return [f"{rows}, each changed by {low:.2g}"]
    noise = ": within noise" if low <= 0 <= high else ""
    return [f"{rows}, change {low:.2g} to {high:.2g} at 95%{noise}"] if rows else []


def _interval(record: RunRecord, name: str) -> tuple[float, float, str] | None:
    """The 95% interval of the change of a held-out accuracy, score or judge, and its rows or
    prompts; None of other metrics, of one validation, and where their number is not known.
    """
    _, values = series(record.metrics, name)
    num = record.last.get("validation/rows", 0)
    if len(values) > 1 and name == "validation/accuracy" and num:
        low, high = metrics.share_change(values[0], after=values[-1], num=num)
        return low, high, f"{num} held-out rows"
    key = name.removeprefix("validation/")
    if len(values) < 2 or key not in ("score", "judge") or len(record.validations) < 2:
        return None
    by_prompt: list[dict[str, list[float]]] = [{}, {}]
    for scores, (_, rows) in zip(by_prompt, record.validations, strict=True):
        for row in rows:
            score = row.get(key)
            if isinstance(score, float) and math.isfinite(score):
                scores.setdefault(str(row.get("prompt")), []).append(score)
    both = sorted(by_prompt[0].keys() & by_prompt[1].keys())
    if len(both) < 2:
        return None
    means = np.array([[np.mean(scores[prompt]) for prompt in both] for scores in by_prompt])
    low, high = metrics.paired_change(*means)
    is_few = low < high and len(both) < metrics.FEW and not metrics.are_shares(means)
    return low, high, f"{len(both)} held-out prompts{' (few)' if is_few else ''}"


def _unit(record: RunRecord, label: str) -> str:
    """The unit of a tile."""
    settings = record.settings
    by_token = settings.get("dpo.length_normalised") or settings.get("dpo.kind") in _PER_TOKEN
    if record.kind == "dpo" and label == "Margin" and by_token:
        return "nats a token"
    return "in score" if record.kind == "reward_model" else _UNITS[label]


def _changed(group: Group) -> str | None:
    """How many greedy answers differ from those of the first validation; None without two."""
    num_changed = num_asked = 0
    for record in group.records:
        if record.kind in ("policy", "reward_model") or len(record.validations) < 2:
            continue
        before, after = (
            {row.get("prompt"): row["response"] for row in rows if "response" in row}
            for _, rows in record.validations
        )
        both = before.keys() & after.keys()
        num_asked += len(both)
        num_changed += sum(before[prompt] != after[prompt] for prompt in both)
    return f"samples: {num_changed} of {num_asked} changed" if num_asked else None


def _batch_size(record: RunRecord) -> float:
    """The responses of an iteration."""
    return record.settings.get("rl.batch_size") or math.inf


def _alerts(group: Group) -> Tile:
    alerts = [alert for record in group.records for alert in record.alerts]
    names = dict.fromkeys(str(alert.get("name")) for alert in alerts)
    count = {0: "no alert", 1: "1 alert"}.get(len(alerts), f"{len(alerts)} alerts")
    return Tile("Alerts", count, ", ".join(names))
