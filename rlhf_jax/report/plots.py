"""Which plots show runs: curves of their metrics, reward against KL, histograms before and after,
calibration.

Runs of a group are drawn as their mean with a band from the lowest to the highest of them.
"""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import yaml

from rlhf_jax import metrics
from rlhf_jax.report.figures import Plot, Series, bin_edges, histogram
from rlhf_jax.report.records import Group, Row, RunRecord, series

MAX_DOTS = 60  # of reward against KL; of a longer run the means over equal stretches
LABELS = yaml.safe_load(Path(__file__).with_name("plots.yaml").read_text("utf-8"))
# Where the training's part of validation/NAME may be.
_TRAINING = ("objective/", "sft/", "reward_model/", "dpo/", "kto/", "")


def unit(record: RunRecord) -> str:
    """What the run counts."""
    return "iteration" if record.kind == "policy" else "step"


def meaning(name: str) -> str:
    """A sentence about what a metric is; empty if plots.yaml has none."""
    rest = name.removeprefix("validation/")
    keys = (name, *(prefix + rest for prefix in _TRAINING), rest.partition("/")[0])
    return next((LABELS["meanings"][key] for key in keys if key in LABELS["meanings"]), "")


def _labels(key: str, suffix: str = "") -> tuple[str, str, str]:
    """Title and labels of the axes of a plot that is no curve."""
    title, x_label, y_label = LABELS[key]
    return title + suffix, x_label, y_label


def metric_groups(records: Iterable[RunRecord]) -> dict[str, list[str]]:
    """All metrics that the runs have recorded, in the order of the page: ``{metric: [it, its
    validation]}``.
    """
    names: dict[str, None] = {}
    for record in records:
        for row in record.metrics:
            names |= dict.fromkeys(name for name in row if name != "step")
    members: dict[str, list[str]] = {name: [] for name in LABELS["curves"]}
    for name in sorted(names, key=lambda name: name.startswith("validation/")):
        kind, _, rest = name.partition("/")
        training = [prefix + rest for prefix in _TRAINING if prefix + rest in names]
        base = training[0] if training and kind == "validation" else name
        members.setdefault(base, []).append(name)
    return {base: together for base, together in members.items() if together}


def curve(group: Group, *names: str) -> tuple[np.ndarray, np.ndarray]:
    """Metrics at the steps at which all runs of the group that record them do so.

    Returns:
        Steps [N]; values [runs, N, names]. N is 0 without such steps.
    """
    recorded = []
    for record in group.records:
        rows = [row for row in record.metrics if row.keys() >= set(names)]
        if rows:
            recorded.append({row["step"]: [row[name] for name in names] for row in rows})
    steps = sorted(set.intersection(*map(set, recorded))) if recorded else []
    values = [[run[step] for step in steps] for run in recorded]
    return np.array(steps), np.array(values, np.float64)


def mean(group: Group, name: str) -> np.ndarray:
    """[N] finite values of a metric, means over the runs of the group."""
    _, values = curve(group, name)
    means = values[..., 0].mean(axis=0) if values.size else np.empty(0)
    return means[np.isfinite(means)]


def curves(groups: Sequence[Group]) -> tuple[list[Plot], dict[str, float]]:
    """A plot of each metric, training and validation of the same thing together; and the metrics
    that never change.
    """
    records = [record for group in groups for record in group.records]
    plots = []
    constant: dict[str, float] = {}
    for base, members in metric_groups(records).items():
        values: dict[str, set[float]] = {}
        for name in members:
            values[name] = {v for record in records for v in series(record.metrics, name)[1]}
        if any(len(different) > 1 for different in values.values()):
            plots.append(_metric_plot(groups, base, members))
        else:
            constant |= {name: different.pop() for name, different in values.items()}
    return plots, constant


def _metric_plot(groups: Sequence[Group], base: str, members: Sequence[str]) -> Plot:
    """The colour tells groups apart, the line style validation from training; with one group the
    colour does that.

    members: the training metric and that of the validation, or one of them.
    """
    title, y_label, *lines = LABELS["curves"].get(base, ("", base.rpartition("/")[2]))
    records = [record for group in groups for record in group.records]
    drawn: dict[str, Series] = {}
    for place, group in enumerate(groups):
        for second, name in enumerate(members):
            steps, values = curve(group, name)
            if not steps.size:
                continue
            label, color, style = name, second, 0
            if len(groups) > 1:
                label, color, style = group.name, place, second
                label += ", validation" if second else ""
            y = values[..., 0]
            line = Series(steps, y.mean(axis=0), color=color, style=style)
            if len(group.records) > 1:
                line = line._replace(low=y.min(axis=0), high=y.max(axis=0))
            drawn[label] = line
    if alerts := [mark for record in records for mark in _alerts(record, members)]:
        at, y_marks = zip(*alerts, strict=True)
        drawn["alert"] = Series(at, y_marks, kind="points", color=len(groups) + 1)
    targets = {record.settings.get("rl.kl_target") for record in records}
    if base == "objective/kl" and len(targets) == 1 and None not in targets:
        lines = [{"target": targets.pop()}]
    title = f"{title}: {members[0]}" if title else members[0]
    marks = lines[0] if lines else {}
    note = meaning(members[0])
    return Plot(title, unit(records[0]), y_label, drawn, lines=marks, note=note)


def _alerts(record: RunRecord, members: Sequence[str]) -> list[tuple[int, float]]:
    """Where an alert of the run names one of these metrics in its rule or message: its step and
    their values there.
    """
    rows = {row["step"]: row for row in record.metrics}
    marks = []
    for alert in record.alerts:
        step = alert["step"]
        row = rows.get(step, {})
        words = re.split(r"[\s<>:,]+", f"{alert['rule']} {alert['message']}")
        for name in members:
            if name in words and name in row:
                marks.append((step, row[name]))
    return marks


def reward_against_kl(groups: Sequence[Group]) -> Plot | None:
    """``objective/score`` over ``objective/kl``; labels number some iterations. None if no run has
    measured both.
    """
    drawn = {}
    longest = 1
    for group in groups:
        steps, values = curve(group, "objective/kl", "objective/score")
        if not steps.size:
            continue
        stretch = math.ceil(len(steps) / MAX_DOTS)
        rows = np.c_[steps, values.mean(axis=0)]
        parts = np.array_split(rows, range(stretch, len(steps), stretch))
        at, kl, score = np.array([part.mean(axis=0) for part in parts]).T
        every = -(-len(at) // 6)
        labels = [f"{step:.0f}" if i % every == 0 else "" for i, step in enumerate(at)]
        drawn[group.name] = Series(kl, score, labels=labels)
        longest = max(longest, stretch)
    if not drawn:
        return None
    note = "Numbers count iterations."
    if longest > 1:
        note += f" Each point is the mean of up to {longest}."
    return Plot(*_labels("reward_against_kl"), drawn, note=note)


# --- What samples.jsonl holds
# ---------------------------------------------------------------------------------------


def distributions(groups: Sequence[Group]) -> list[Plot]:
    """Reward against KL and histograms of the first and the last validation; of a reward model also
    its calibration, or scores over target scores."""
    kind = groups[0].records[0].kind
    frontier = reward_against_kl(groups)
    plots = [frontier] if frontier else []
    keys = ["margin", "score"]
    if kind == "policy":  # other runs' answers keep their lengths
        keys.append("length")
    for key in keys:
        plots += _histograms(groups, key)
    if kind == "reward_model":
        for group in groups:
            suffix = f", {group.name}" if len(groups) > 1 else ""
            plots += _of_reward_model(group, suffix)
    return plots


def _of_reward_model(group: Group, suffix: str) -> list[Plot]:
    """Calibration if the samples are pairs, scores over targets if they have targets."""
    rows: list[Row] = []
    for record in group.records:
        for _, last in record.validations[-1:]:
            rows += last
    plots = []
    margins = [row["margin"] for row in rows if "margin" in row]
    if margins:
        plots.append(_calibration(group, suffix, margins))
    scored = [row for row in rows if "target" in row]
    if scored:
        targets = [row["target"] for row in scored]
        scores = [row["score"] for row in scored]
        points = {"responses": Series(targets, scores, kind="points")}
        plots.append(Plot(*_labels("targets", suffix), points, diagonal="score = target"))
    return plots


def _histograms(groups: Sequence[Group], key: str) -> list[Plot]:
    """A histogram for each group whose samples have the key, all over the same bins."""
    pooled: dict[str, dict[str, list[float]]] = {}
    every: list[float] = []
    for group in groups:
        for place, when in enumerate(("before", "after")):
            ends = [r.validations[place] for r in group.records if len(r.validations) > place]
            values = [row[key] for _, rows in ends for row in rows if key in row]
            if values:
                name = f"{when} (step {_steps(ends)}, n = {len(values)})"
                pooled.setdefault(group.name, {})[name] = values
                every += values
    edges = bin_edges(every)
    plots = []
    for name, sets in pooled.items():
        suffix = f", {name}" if len(groups) > 1 else ""
        plots.append(histogram(*_labels(key, suffix), sets, edges))
    return plots


def _steps(validations: Iterable[tuple[int, list[Row]]]) -> str:
    return " and ".join(map(str, sorted({step for step, _ in validations})))


def _calibration(group: Group, suffix: str, margins: Sequence[float]) -> Plot:
    """The reliability of the last validation's margins, pooled over the group."""
    finite = np.array(margins, np.float64)[np.isfinite(margins)]
    counts, confidence, accuracy = metrics.reliability(finite)
    steps = _steps([end for record in group.records for end in record.validations[-1:]])
    note = "Each point is a tenth of the range of confidence, its number the pairs in it: "
    note += f"{len(finite)} held-out rows, those that samples.jsonl holds of step {steps}."
    recorded = [series(record.metrics, "validation/ece")[1] for record in group.records]
    eces = [f"{values[-1]:.3f}" for values in recorded if values]
    if eces:
        note += f" Expected calibration error over all held-out rows: {', '.join(eces)}."
    labels = [f"{count:.0f}" for count in counts]
    points = {"pairs": Series(confidence, accuracy, labels=labels)}
    perfect = "perfectly calibrated"
    return Plot(*_labels("calibration", suffix), points, diagonal=perfect, note=note)
