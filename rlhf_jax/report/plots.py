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


def _labels(key: str, suffix: str = "") -> tuple[str, str, str]:
    """Title and labels of the axes of a plot that is no curve."""
    title, x_label, y_label = LABELS[key]
    return title + suffix, x_label, y_label


def metric_groups(records: Iterable[RunRecord]) -> dict[str, list[str]]:
    """All metrics that the runs have recorded, in the order of the page: ``{metric: [it, its
    validation]}``.
    """
    names = dict.fromkeys(
        name for record in records for row in record.metrics for name in row if name != "step"
    )
    members: dict[str, list[str]] = {name: [] for name in LABELS["curves"]}
    for name in sorted(names, key=lambda name: name.startswith("validation/")):
        kind, _, rest = name.partition("/")
        training = [
            prefix + rest for prefix in _TRAINING if kind == "validation" and prefix + rest in names
        ]
        members.setdefault(training[0] if training else name, []).append(name)
    return {base: together for base, together in members.items() if together}


def curve(group: Group, *names: str) -> tuple[np.ndarray, np.ndarray]:
    """Metrics at the steps at which all runs of the group that record them do so.

    Returns:
        Steps [N]; values [runs, N, names]. N is 0 without such steps.
    """
    runs = [[row for row in record.metrics if row.keys() >= set(names)] for record in group.records]
    recorded = [
        {row["step"]: [row[name] for name in names] for row in rows} for rows in runs if rows
    ]
    steps = sorted(set.intersection(*map(set, recorded))) if recorded else []
    return np.array(steps), np.array(
        [[run[step] for step in steps] for run in recorded], np.float64
    )


def curves(groups: Sequence[Group]) -> tuple[list[Plot], dict[str, float]]:
    """A plot of each metric, training and validation of the same thing together; and the metrics
    that never change.
    """
    records = [record for group in groups for record in group.records]
    plots = []
    constant: dict[str, float] = {}
    for base, members in metric_groups(records).items():
        values = {
            name: {v for record in records for v in series(record.metrics, name)[1]}
            for name in members
        }
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
            if steps.size:
                label = (
                    name if len(groups) == 1 else group.name + (", validation" if second else "")
                )
                color, style = (second, 0) if len(groups) == 1 else (place, second)
                y = values[..., 0]
                low, high = (
                    (y.min(axis=0), y.max(axis=0)) if len(group.records) > 1 else (None, None)
                )
                drawn[label] = Series(steps, y.mean(axis=0), low, high, color, style)
    if marks := [mark for record in records for mark in _alerts(record, members)]:
        at, y_marks = zip(*marks, strict=True)
        drawn["alert"] = Series(at, y_marks, kind="points", color=len(groups) + 1)
    targets = {record.settings.get("rl.kl_target") for record in records}
    if base == "objective/kl" and len(targets) == 1 and None not in targets:
        lines = [{"target": targets.pop()}]
    title = f"{title}: {members[0]}" if title else members[0]
    x_label = "iteration" if records[0].kind == "policy" else "step"
    return Plot(title, x_label, y_label, drawn, lines=lines[0] if lines else {})


def _alerts(record: RunRecord, members: Sequence[str]) -> list[tuple[int, float]]:
    """Where an alert of the run names one of these metrics in its rule or message: its step and
    their values there.
    """
    rows = {row["step"]: row for row in record.metrics}
    words = [
        (alert["step"], re.split(r"[\s<>:,]+", f"{alert['rule']} {alert['message']}"))
        for alert in record.alerts
    ]
    named = [(step, name) for step, of_alert in words for name in members if name in of_alert]
    return [(step, rows[step][name]) for step, name in named if name in rows.get(step, {})]


def reward_against_kl(groups: Sequence[Group]) -> Plot | None:
    """``objective/score`` over ``objective/kl``; labels number some iterations. None if no run has
    measured both.
    """
    drawn, longest = {}, 1
    for group in groups:
        steps, values = curve(group, "objective/kl", "objective/score")
        if steps.size:
            stretch = math.ceil(len(steps) / MAX_DOTS)
            parts = np.array_split(
                np.c_[steps, values.mean(axis=0)], range(stretch, len(steps), stretch)
            )
            at, kl, score = np.array([part.mean(axis=0) for part in parts]).T
            every = -(-len(at) // 6)
            labels = [f"{step:.0f}" if i % every == 0 else "" for i, step in enumerate(at)]
            drawn[group.name] = Series(kl, score, labels=labels)
            longest = max(longest, stretch)
    if not drawn:
        return None
    note = "Numbers count iterations." + (
        f" Each point is the mean of up to {longest}." if longest > 1 else ""
    )
    return Plot(*_labels("reward_against_kl"), drawn, note=note)


# --- What samples.jsonl holds
# ---------------------------------------------------------------------------------------


def distributions(groups: Sequence[Group]) -> list[Plot]:
    """Reward against KL and histograms of the first and the last validation; of a reward model also
    its calibration, or scores over target scores."""
    kind = groups[0].records[0].kind
    plots = [reward_against_kl(groups)]
    for key in (
        ("margin", "score", "length") if kind == "policy" else ("margin", "score")
    ):  # others' lengths stay
        plots += _histograms(groups, key)
    for group in groups if kind == "reward_model" else ():
        suffix = f", {group.name}" if len(groups) > 1 else ""
        rows = [
            row for record in group.records for _, rows in record.validations[-1:] for row in rows
        ]
        if margins := [row["margin"] for row in rows if "margin" in row]:
            plots.append(_calibration(group, suffix, margins))
        if scored := [(row["target"], row["score"]) for row in rows if "target" in row]:
            targets, scores = zip(*scored, strict=True)
            points = Series(targets, scores, kind="points")
            plots.append(
                Plot(*_labels("targets", suffix), {"responses": points}, diagonal="score = target")
            )
    return [plot for plot in plots if plot is not None]


def _histograms(groups: Sequence[Group], key: str) -> list[Plot]:
    """A histogram for each group whose samples have the key, all over the same bins."""
    pooled: dict[str, dict[str, list[float]]] = {}
    for group in groups:
        for place, when in enumerate(("before", "after")):
            ends = [
                record.validations[place]
                for record in group.records
                if len(record.validations) > place
            ]
            values = [row[key] for _, rows in ends for row in rows if key in row]
            if values:
                pooled.setdefault(group.name, {})[
                    f"{when} (step {_steps(ends)}, n = {len(values)})"
                ] = values
    edges = bin_edges(
        [value for sets in pooled.values() for values in sets.values() for value in values]
    )
    suffixes = {name: f", {name}" if len(groups) > 1 else "" for name in pooled}
    return [histogram(*_labels(key, suffixes[name]), sets, edges) for name, sets in pooled.items()]


def _steps(validations: Iterable[tuple[int, list[Row]]]) -> str:
    return " and ".join(map(str, sorted({step for step, _ in validations})))


def _calibration(group: Group, suffix: str, margins: Sequence[float]) -> Plot:
    """The reliability of the last validation's margins, pooled over the group."""
    finite = np.array(margins, np.float64)[np.isfinite(margins)]
    counts, confidence, accuracy = metrics.reliability(finite)
    steps = _steps([end for record in group.records for end in record.validations[-1:]])
    eces = [
        values[-1]
        for record in group.records
        if (values := series(record.metrics, "validation/ece")[1])
    ]
    note = "Each point is a tenth of the range of confidence, its number the pairs in it: "
    note += f"{len(finite)} held-out rows, those that samples.jsonl holds of step {steps}."
    if eces:
        note += (
            " Expected calibration error over all held-out rows: "
            f"{', '.join(f'{ece:.3f}' for ece in eces)}."
        )
    points = Series(confidence, accuracy, labels=[f"{count:.0f}" for count in counts])
    return Plot(
        *_labels("calibration", suffix),
        {"pairs": points},
        diagonal="perfectly calibrated",
        note=note,
    )
