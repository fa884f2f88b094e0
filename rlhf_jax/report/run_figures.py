"""The figures of runs: curves of their metrics, reward against KL, histograms before and after, calibration.

Runs of a group are drawn as their mean with a band from the lowest to the highest of them.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.special

from rlhf_jax.report.figures import Histogram, Plot, Series, bin_edges
from rlhf_jax.report.records import Group, Row, RunRecord, read_rows, series
from rlhf_jax.runs.alerts import parse

MAX_POINTS = 1000  # a longer curve is drawn as means over equal stretches
NUM_BINS = 10  # of the calibration
# {metric: (title, label of the y axis)}, in the order of the page. Others follow under their own names.
METRICS = {
    "sft/loss": ("Loss", "nats per token"),
    "reward_model/loss": ("Loss", "loss"),
    "reward_model/accuracy": ("Accuracy", "share of comparisons"),
    "reward_model/margin": ("Margin", "chosen - rejected"),
    "dpo/loss": ("Loss", "nats per pair"),
    "dpo/accuracy": ("Accuracy", "share of pairs"),
    "dpo/margin": ("Margin", "implied reward, chosen - rejected"),
    "validation/ece": ("Calibration error", "expected calibration error"),
    "validation/length_correlation": ("Length bias", "Spearman, score and length"),
    "validation/length_accuracy": ("Accuracy of taking the longer answer", "share of comparisons"),
    "validation/uncertainty": ("Disagreement of the members", "standard deviation of the margin"),
    "objective/score": ("Score", "score"),
    "validation/judge": ("Held-out judge", "score"),
    "objective/reward": ("Reward: score minus penalties", "reward"),
    "objective/kl": ("KL from the reference", "nats per response"),
    "kl/coef": ("KL coefficient", "coefficient"),
    "objective/entropy": ("Entropy", "nats per response"),
    "response/length": ("Response length", "tokens"),
    "response/eos_fraction": ("Responses that end", "share"),
    "response/repetition": ("Repetition", "share of 3-grams said before"),
    "reward/length_correlation": ("Score and length", "correlation"),
    "policy/loss": ("Policy loss", "loss"),
    "policy/clip_fraction": ("Clipped tokens", "share"),
    "policy/approx_kl": ("KL of the update", "nats per token"),
    "policy/ratio_max": ("Largest ratio", "ratio"),
    "value/loss": ("Value loss", "loss"),
    "value/explained_variance": ("Explained variance of the returns", "share"),
}
TRAINING = ("objective/", "sft/", "reward_model/", "dpo/", "")  # where the training's part of validation/NAME may be
LINES = {
    "reward_model/accuracy": {"equal scores": 0.5},
    "dpo/loss": {"start": math.log(2)},
    "dpo/accuracy": {"equal log-ratios": 0.5},
    "validation/length_accuracy": {"coin": 0.5},
}


class Curve(NamedTuple):
    """A metric of a group of runs: steps [N], mean, lowest and highest value [N] over the runs."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def metric_names(records: Iterable[RunRecord]) -> list[str]:
    """All metrics that the runs have recorded, in the order of the page."""
    names = dict.fromkeys(name for record in records for row in record.metrics for name in row if name != "step")
    order = {name: place for place, name in enumerate(METRICS)}
    return sorted(names, key=lambda name: (order.get(_training(name, names), len(order)), _training(name, names), name))


def curve(group: Group, name: str) -> Curve | None:
    """The metric at the steps that all runs of the group have which record it; None if no run does."""
    found = [dict(zip(*series(record.metrics, name), strict=True)) for record in group.records]
    found = [values for values in found if values]
    if not found:
        return None
    steps = [step for step in found[0] if all(step in values for values in found)]
    every = np.array([[values[step] for step in steps] for values in found], np.float64)
    return Curve(np.array(steps, np.float64), every.mean(axis=0), every.min(axis=0), every.max(axis=0))


def curves(groups: Sequence[Group]) -> tuple[list[Plot], dict[str, float]]:
    """A plot of each metric, training and validation of the same thing together; and the metrics that never change."""
    records = [record for group in groups for record in group.records]
    x_label = "iteration" if any("objective/score" in row for record in records for row in record.metrics) else "step"
    names = metric_names(records)
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(_training(name, names), []).append(name)
    plots, constant = [], {}
    for base, members in together.items():
        members = sorted(members, key=lambda name: name.startswith("validation/"))
        drawn = {}
        for name in members:
            found = [values for record in records if (values := series(record.metrics, name)[1])]
            if all(value == found[0][0] for values in found for value in values):
                constant[name] = found[0][0]
            else:
                drawn[name] = found
        if drawn:
            constant = {name: value for name, value in constant.items() if name not in members}
            plots.append(_plot(groups, base, members, x_label))
    return plots, constant


def _training(name: str, names: Iterable[str]) -> str:
    """The training metric that a validation metric belongs to; other names stand for themselves."""
    if name.startswith("validation/"):
        for prefix in TRAINING:
            if (partner := prefix + name.removeprefix("validation/")) in names:
                return partner
    return name


def _plot(groups: Sequence[Group], base: str, members: Sequence[str], x_label: str) -> Plot:
    title, y_label = METRICS.get(base, ("", base))
    drawn: dict[str, Series] = {}
    stretches = set()
    for color, group in enumerate(groups):
        for name in members:
            found = curve(group, name)
            if found is not None:
                stretch = max(1, math.ceil(len(found.steps) / MAX_POINTS))
                stretches.add(stretch)
                x, y, low, high = (_means(values, stretch) for values in found)
                label = name if len(groups) == 1 else group.name + (", validation" if name != members[0] else "")
                line = Series(x, y, color=color, style=int(name != members[0]))
                if len(groups) == 1:  # one group: the colour tells training from validation
                    line = line._replace(color=int(name != members[0]), style=0)
                drawn[label] = line._replace(low=low, high=high) if len(group.records) > 1 else line
    if marks := [mark for group in groups for record in group.records for mark in _marks(record, members)]:
        at, values = zip(*marks, strict=True)
        drawn["alert"] = Series(at, values, points=True, color=len(groups) + 1)
    lines = dict(LINES.get(base, {}))
    targets = {record.settings.get("rl.kl_target") for group in groups for record in group.records}
    if base == "objective/kl" and len(targets) == 1 and (target := targets.pop()) is not None:
        lines["target"] = target
    note = f"Each point is the mean of up to {max(stretches)} steps." if stretches and max(stretches) > 1 else ""
    full = f"{title}: {members[0]}" if title else members[0]
    return Plot(full, x_label, y_label, drawn, lines=lines, note=note)


def alerts(records: Iterable[RunRecord]) -> list[list[Any]]:
    """What alerts.jsonl of the runs holds, in rows: run, step, name, rule, action, message."""
    return [
        [record.name, *(row[key] for key in ("step", "name", "rule", "action", "message"))]
        for record in records
        for row in _alert_rows(record)
    ]


def _alert_rows(record: RunRecord) -> list[Row]:
    file = record.path / "alerts.jsonl"
    return read_rows(file) if file.exists() else []


def _marks(record: RunRecord, members: Sequence[str]) -> list[tuple[int, float]]:
    """Where an alert of the run concerns one of these metrics: its step and their values there."""
    rows = {row["step"]: row for row in record.metrics}
    return [
        (alert["step"], rows[alert["step"]][name])
        for alert in _alert_rows(record)
        for name in members
        if name in parse(["none", alert["rule"]])[0].metrics and name in rows.get(alert["step"], {})
    ]


def _means(values: np.ndarray, stretch: int) -> np.ndarray:
    starts = np.arange(0, len(values), stretch)
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values))) if stretch > 1 else values


def reward_against_kl(groups: Sequence[Group]) -> Plot | None:
    """``objective/score`` over ``objective/kl``, a point for each iteration; None where no run has measured both."""
    drawn, last, stretch = {}, 0.0, 1
    for group in groups:
        kl, score = curve(group, "objective/kl"), curve(group, "objective/score")
        if kl is not None and score is not None:
            both = np.isin(kl.steps, score.steps), np.isin(score.steps, kl.steps)
            stretch = max(1, math.ceil(both[0].sum() / MAX_POINTS * 4))  # a point takes more room than a curve's
            drawn[group.name] = Series(_means(kl.mean[both[0]], stretch), _means(score.mean[both[1]], stretch))
            last = max(last, kl.steps[-1])
    if not drawn:
        return None
    note = f"Each point is the mean of up to {stretch} iterations." if stretch > 1 else ""
    labels = ("objective/kl (nats)", "objective/score")
    return Plot("Reward against KL", *labels, drawn, order="iteration", last=last, note=note)


# --- What samples.jsonl holds ---------------------------------------------------------------------------------------


def validations(record: RunRecord) -> list[tuple[int, list[Row]]]:
    """The samples of the first and of the last validation, each with its step; one if there was but one."""
    steps = sorted({row["step"] for row in record.samples})
    return [
        (step, [row for row in record.samples if row["step"] == step]) for step in dict.fromkeys(steps[:1] + steps[-1:])
    ]


def _values(rows: Iterable[Row], quantity: str) -> list[float]:
    if quantity == "margin":
        return [row["score_chosen"] - row["score_rejected"] for row in rows if "score_chosen" in row]
    return [row[quantity] for row in rows if quantity in row]


def histograms(groups: Sequence[Group], quantity: str, title: str, x_label: str) -> list[Histogram]:
    """A histogram for each group whose samples have the quantity (a column of samples.jsonl, or ``margin``)."""
    found: dict[str, dict[str, list[float]]] = {}
    for group in groups:
        pooled: dict[int, dict[int, list[float]]] = {0: {}, 1: {}}
        for record in group.records:
            for place, (step, rows) in enumerate(validations(record)):
                pooled[place].setdefault(step, []).extend(_values(rows, quantity))
        values = {}
        for place, of_steps in pooled.items():
            every = [value for some in of_steps.values() for value in some]
            if every:
                steps = " and ".join(map(str, sorted(of_steps)))
                values[f"{('before', 'after')[place]} (step {steps}, n = {len(every)})"] = every
        if values:
            found[group.name] = values
    edges = bin_edges(every for values in found.values() for every in values.values())
    y_label = "pairs" if quantity == "margin" else "responses"
    return [
        Histogram(f"{title}, {name}" if len(groups) > 1 else title, x_label, y_label, values, edges)
        for name, values in found.items()
    ]


class Reliability(NamedTuple):
    """Bins of pairs [num_bins]: how many, their mean confidence and accuracy (NaN in empty bins)."""

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability(margin: np.ndarray, num_bins: int = NUM_BINS) -> Reliability:
    """Pairs in equal bins of the confidence max(p, 1 - p) in [.5, 1], p = sigmoid(margin) (Guo et al. 2017).

    margin: [N] score of the chosen answer minus that of the rejected one. The bins are those of
    ``evaluation.expected_calibration_error``; ties are half right.
    """
    probability = scipy.special.expit(np.asarray(margin, np.float64))
    confidence = np.maximum(probability, 1 - probability)
    correct = np.where(np.equal(margin, 0), 0.5, np.greater(margin, 0))
    bins = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(bins, weights, num_bins) / counts for weights in (confidence, correct)]
    return Reliability(counts, *means)


def calibration(group: Group, title: str) -> Plot | None:
    """The reliability of the last validation's margins, pooled over the group; None without pairs in the samples."""
    last = [validations(record)[-1] for record in group.records if record.samples]
    margins = np.array([value for _, rows in last for value in _values(rows, "margin")])
    margins = margins[np.isfinite(margins)]
    if not margins.size:
        return None
    bins = reliability(margins)
    used = bins.counts > 0
    eces = [values[-1] for record in group.records if (values := series(record.metrics, "validation/ece")[1])]
    note = (
        f"Each point is a tenth of the range of confidence, its number the pairs in it: {len(margins)} held-out rows, "
        f"those that samples.jsonl holds of step {' and '.join(map(str, sorted({step for step, _ in last})))}."
    )
    if eces:
        note += f" Expected calibration error over all held-out rows: {', '.join(f'{ece:.3f}' for ece in eces)}."
    points = Series(bins.confidence[used], bins.accuracy[used], labels=[str(count) for count in bins.counts[used]])
    return Plot(
        title,
        "confidence, max(p, 1 - p) of p = sigmoid(margin)",
        "accuracy",
        {"reward model": points},
        diagonal="perfectly calibrated",
        note=note,
    )


def against_targets(group: Group, title: str) -> Plot | None:
    """Scores over target scores at the last validation; None where the samples have no targets."""
    rows = [row for record in group.records if record.samples for row in validations(record)[-1][1] if "target" in row]
    if not rows:
        return None
    points = Series([row["target"] for row in rows], [row["score"] for row in rows], points=True)
    return Plot(title, "target", "score", {"responses": points}, diagonal="score = target")
