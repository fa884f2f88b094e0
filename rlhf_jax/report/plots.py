"""Which plots show runs: curves of their metrics, reward against KL, histograms before and after,
calibration.

Runs of a group are drawn as their mean with a band from the lowest to the highest of them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from rlhf_jax import metrics
from rlhf_jax.report.figures import Plot, Series, bin_edges, histogram
from rlhf_jax.report.records import Group, RunRecord, series

MAX_DOTS = 60  # of reward against KL; a longer run is drawn as means over equal stretches
MAX_NUMBERED = 6  # of these dots
LABELS = yaml.safe_load(Path(__file__).with_name("plots.yaml").read_text("utf-8"))
Groups = Sequence[Group]
# The training metric of validation/NAME has one of these prefixes.
_TRAINING = ("objective/", "sft/", "reward_model/", "dpo/", "kto/", "")


def meaning(name: str) -> str:
    """A sentence about what a metric is; empty if plots.yaml has none."""
    meanings: Mapping[str, str] = LABELS["meanings"]
    rest = name.removeprefix("validation/")
    of_training = [prefix + rest for prefix in _TRAINING]
    kinds = ["/".join(rest.split("/")[:number]) for number in (2, 1)] + [rest.partition("@")[0]]
    for key in (name, *of_training, *kinds):
        if key in meanings:
            return meanings[key]
    return ""


def metric_groups(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """All metrics that the runs have recorded, in the order of the page: ``{metric: [it, its
    validation]}``.
    """
    names = dict.fromkeys(name for record in records for name in record.last if name != "step")
    members: dict[str, list[str]] = {name: [] for name in LABELS["curves"]}
    for name in sorted(names, key=lambda name: name.startswith("validation/")):
        base = name
        if name.startswith("validation/"):
            rest = name.removeprefix("validation/")
            known = [prefix + rest for prefix in _TRAINING if prefix + rest in names]
            base = known[0] if known else name
        members.setdefault(base, []).append(name)
    return {base: together for base, together in members.items() if together}


def curve(group: Group, *names: str) -> tuple[np.ndarray, np.ndarray]:
    """Metrics at the steps that all runs of the group have, without the runs that never record
    them.

    Returns:
        Steps [N]; values [runs, N, names]. N is 0 without such steps.
    """
    by_step = []
    for record in group.records:
        rows = [row for row in record.metrics if row.keys() >= set(names)]
        if rows:
            by_step.append({row["step"]: [row[name] for name in names] for row in rows})
    if not by_step:
        return np.empty(0), np.empty((1, 0, len(names)))
    steps = sorted(set.intersection(*map(set, by_step)))
    values = [[run[step] for step in steps] for run in by_step]
    return np.array(steps), np.array(values, np.float64)


def mean(group: Group, name: str) -> np.ndarray:
    """[N] finite values of a metric, means over the runs of the group."""
    _, values = curve(group, name)
    means = values[..., 0].mean(axis=0)
    return means[np.isfinite(means)]


def curves(groups: Groups) -> tuple[list[Plot], dict[str, float]]:
    """A plot of each metric, training and validation of the same thing together; and the metrics
    that never change, without the judge, of which this is a result.
    """
    records = [record for group in groups for record in group.records]
    plots = []
    constant: dict[str, float] = {}
    for base, members in metric_groups(records).items():
        values = {
            name: {value for record in records for value in series(record.metrics, name)[1]}
            for name in members
        }
        has_changed = any(len(different) > 1 for different in values.values())
        if has_changed or base == "validation/judge":
            plots.append(_metric_plot(groups, base, members))
        else:
            constant |= {name: different.pop() for name, different in values.items()}
    return plots, constant


def _metric_plot(groups: Groups, base: str, members: Sequence[str]) -> Plot:
    """The curves of a metric and its validation, with its alerts and its horizontal line. The
    colour tells groups apart, the line style validation from training; with one group the colour
    tells validation from training.
    """
    records = [record for group in groups for record in group.records]
    drawn: dict[str, Series] = {}
    for number, group in enumerate(groups):
        for second, name in enumerate(members):
            steps, values = curve(group, name)
            if not steps.size:
                continue
            y = values[..., 0]
            line = Series(steps, y.mean(axis=0), color=second)
            label = name
            if len(groups) > 1:
                line = line._replace(color=number, style=second)
                label = f"{group.name}, validation" if second else group.name
            if len(group.records) > 1:
                line = line._replace(low=y.min(axis=0), high=y.max(axis=0))
            drawn[label] = line
    marks = []  # of the alerts that name one of these metrics in their rule or message
    for record in records:
        rows = {row["step"]: row for row in record.metrics}
        for alert in record.alerts:
            row = rows.get(alert["step"], {})
            words = re.split(r"[\s<>:,]+", f"{alert['rule']} {alert['message']}")
            marks += [
                (alert["step"], row[name]) for name in members if name in words and name in row
            ]
    if marks:
        at, measured = zip(*marks, strict=True)
        drawn["alert"] = Series(at, measured, kind="points", color=len(groups) + 1)
    title, y_label, lines = LABELS["curves"].get(base, ("", base.rpartition("/")[2], {}))
    title = f"{title}: {members[0]}" if title else members[0]
    first, *others = {record.settings.get("rl.kl_target") for record in records}
    if base == "objective/kl" and first is not None and not others:
        lines = {"target": first}
    return Plot(title, records[0].unit, y_label, drawn, lines=lines, note=meaning(members[0]))


def reward_against_kl(groups: Groups) -> Plot | None:
    """``objective/score`` over ``objective/kl``; labels number some iterations. None if no run has
    measured both.
    """
    drawn = {}
    longest = 1
    for group in groups:
        steps, values = curve(group, "objective/kl", "objective/score")
        if not steps.size:
            continue
        rows = np.c_[steps, values.mean(axis=0)]
        stretch = math.ceil(len(rows) / MAX_DOTS)
        longest = max(longest, stretch)
        parts = np.array_split(rows, range(stretch, len(rows), stretch))
        means = [part.mean(axis=0) for part in parts]
        step, kl, score = np.transpose(means)
        labels = [""] * len(step)
        every = math.ceil(len(step) / MAX_NUMBERED)
        labels[::every] = [f"{number:.0f}" for number in step[::every]]
        drawn[group.name] = Series(kl, score, labels=labels)
    if not drawn:
        return None
    note = "Numbers count iterations."
    if longest > 1:
        note += f" Each point is the mean of up to {longest}."
    return Plot(*_axes("reward_against_kl", ""), drawn, note=note)


def distributions(groups: Groups) -> list[Plot]:
    """Reward against KL and histograms of the first and the last validation; of a reward model also
    its calibration, or scores over target scores."""
    kind = groups[0].records[0].kind
    frontier = reward_against_kl(groups)
    plots = [frontier] if frontier else []
    # Other runs' answers keep their lengths.
    for key in ("margin", "score", "length") if kind == "policy" else ("margin", "score"):
        drawn: dict[str, dict[str, list[float]]] = {}
        for group in groups:
            for when, (steps, rows) in zip(("before", "after"), group.validations, strict=False):
                values = [row[key] for row in rows if key in row]
                if values:
                    label = f"{when} (step {steps}, n = {len(values)})"
                    drawn.setdefault(group.name, {})[label] = values
        pooled = [value for sets in drawn.values() for values in sets.values() for value in values]
        for name, sets in drawn.items():
            axes = _axes(key, name if len(groups) > 1 else "")
            plots.append(histogram(*axes, sets, bin_edges(pooled)))
    for group in groups if kind == "reward_model" else ():
        name = group.name if len(groups) > 1 else ""
        for steps, rows in group.validations[-1:]:
            margins = [row["margin"] for row in rows if "margin" in row]
            if margins:
                plots.append(_calibration(group, name, steps, margins))
            scored = [(row["target"], row["score"]) for row in rows if "target" in row]
            if scored:
                targets, scores = zip(*scored, strict=True)
                points = {"responses": Series(targets, scores, kind="points")}
                plots.append(Plot(*_axes("targets", name), points, diagonal="score = target"))
    return plots


def _axes(key: str, name: str) -> tuple[str, str, str]:
    """Title and labels of the axes of a plot of the group ``name``; "" if there is only one."""
    title, x_label, y_label = LABELS[key]
    return f"{title}, {name}" if name else title, x_label, y_label


def _calibration(group: Group, name: str, steps: str, margins: Sequence[float]) -> Plot:
    """The reliability of the last validation's margins, pooled over the group."""
    finite = np.array(margins, np.float64)[np.isfinite(margins)]
    counts, confidence, accuracy = metrics.reliability(finite)
    note = (
        "Each point is a tenth of the range of confidence, its number the pairs in it: "
        f"{len(finite)} held-out rows, those that samples.jsonl holds of step {steps}."
    )
    eces = [record.last.get("validation/ece") for record in group.records]
    known = [f"{ece:.3f}" for ece in eces if ece is not None]
    if known:
        note += f" Expected calibration error over all held-out rows: {', '.join(known)}."
    labels = [f"{count:.0f}" for count in counts]
    points = {"pairs": Series(confidence, accuracy, labels=labels)}
    axes = _axes("calibration", name)
    return Plot(*axes, points, diagonal="perfectly calibrated", note=note)
