"""Alerts: rules about a run's metrics, and the steps at which they come true.

    rules = alerts.parse(["objective/kl > 50 for 3: stop"])
    alerts.check(rules, records.read_rows("runs/ppo/metrics.jsonl"))

A rule of the user is a line:

    RULE      = ["mean" ROWS "of"] METRIC [" / " METRIC], "<" or ">", THRESHOLD ["for" ROWS]
                [":" ACTION]
    THRESHOLD = NUMBER or NUMBER"x first"
    ACTION    = log (the default) or stop

``first`` is the first value of the metric or ratio (or of its mean) in the run. The name of a
default rule stands for that rule: ``"reward hacking: stop"``. The default rules are below: such
lines, and functions.

The condition of a rule is checked in each row that records all metrics of the rule. The rule is
true when its condition has held in the last ROWS of these rows. It raises one alert each time it
becomes true. Alerts are a function of the rows alone, so a resumed run raises the same ones, and so
does a metrics file that is read again.
"""

import difflib
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np

from rlhf_jax.errors import UserError

Action = Literal["log", "stop"]
Row = Mapping[str, Any]
Condition = Callable[..., str]

# What the names of metrics begin with, in any stage.
_KINDS = ["sft", "reward_model", "dpo", "kto", "validation"]
_KINDS += ["objective", "policy", "value", "response", "reward", "kl", "safety"]
_RULE = re.compile(
    r"""
    (?:mean \s+ (?P<window>[1-9]\d*) \s+ of \s+)?
    (?P<metric>[^\s<>]+ (?:[ ]/[ ][^\s<>]+)?) \s*
    (?P<sign>[<>]) \s*
    (?P<number>[-+]? (?:\d+\.?\d*|\.\d+) (?:[eE][-+]?\d+)?)
    (?P<first>x \s+ first)?
    (?:\s+ for \s+ (?P<rows>[1-9]\d*))?
    """,
    re.VERBOSE,
)
_FORM = (
    "METRIC < NUMBER or METRIC > NUMBER, optionally followed by `for ROWS` and `: log` or `: stop`;"
    " METRIC may be `mean ROWS of METRIC` or `METRIC / METRIC`, NUMBER `0.5x first`. Or the name of"
    " a default rule: "
)


class Rule(NamedTuple):
    """A rule as a function of the rows so far."""

    name: str
    metrics: tuple[str, ...]
    condition: Condition
    """Takes an array [N] per metric, its values in the rows so far. If the condition holds in the
    last row, returns the numbers that it compares, as a text; else ""."""
    rows: int = 1
    action: Action = "log"

    @property
    def text(self) -> str:
        """The rule as the user writes it."""
        return self.name if self.action == "log" else f"{self.name}: {self.action}"


class Alert(NamedTuple):
    """A rule that became true; a row of alerts.jsonl."""

    step: int
    name: str
    rule: str
    action: Action
    message: str  # the values and thresholds of that step


class Watch:
    """A rule and the rows it has seen."""

    def __init__(self, rule: Rule):
        """Before the first row."""
        self.rule = rule
        self._seen: list[list[float]] = []  # [N, M]: M metrics in N rows
        self._streak = 0  # number of last rows in which the condition held

    @property
    def stops(self) -> bool:
        """Whether the rule is true and its action is stop."""
        return self._streak >= self.rule.rows and self.rule.action == "stop"

    def observe(self, row: Row) -> Alert | None:
        """Takes the next row. Returns an alert if the rule becomes true in this row."""
        rule = self.rule
        values = [_value(row, name) for name in rule.metrics]
        if any(map(math.isnan, values)):
            return None
        self._seen.append(values)
        with np.errstate(all="ignore"):  # an infinite value gives NaN, which crosses no threshold
            message = rule.condition(*np.array(self._seen).T)
        self._streak = self._streak + 1 if message else 0
        if self._streak != rule.rows:
            return None
        return Alert(int(row["step"]), rule.name, rule.text, rule.action, message)


def parse(entries: Sequence[str], dtype: str = "float32") -> tuple[Rule, ...]:
    """The rules of the entries, after the default rules unless an entry is ``none``.

    dtype: type of the activations, ``compute.dtype``. It decides how large a gap between the
    sampler and the update can come from rounding.

    Raises:
        UserError: an entry is no rule; the error quotes it and says what was expected.
    """
    nats = 0.02 if dtype == "float32" else 0.5
    gap = _rule(f"policy/sampler_gap > {nats} for 3", {})
    defaults = DEFAULTS | {"sampler gap": gap._replace(name="sampler gap")}
    own = [_rule(entry, defaults) for entry in entries if entry != "none"]
    if "none" in entries:
        return tuple(own)
    changed = [rule.name for rule in own]
    kept = [rule for name, rule in defaults.items() if name not in changed]
    return (*kept, *own)


def check(rules: Iterable[Rule], history: Iterable[Row]) -> list[Alert]:
    """The alerts that the rules raise in a history, the rows of metrics.jsonl."""
    watches = [Watch(rule) for rule in rules]
    alerts = [watch.observe(row) for row in history for watch in watches]
    return [alert for alert in alerts if alert is not None]


def check_metrics(rules: Iterable[Rule], names: Collection[str]) -> list[str]:
    """Compares the metrics of the user's rules with the metrics that the run records.

    Returns:
        A sentence for each rule that never becomes true in this stage but may in another stage of a
        pipeline.

    Raises:
        UserError: no stage records such a metric. The message names the most similar one.
    """
    kinds = {name.partition("/")[0] for name in names if "/" in name}
    elsewhere = []
    for rule in rules:
        if rule.text in DEFAULTS:
            continue
        for metric in rule.metrics:
            if metric in names:
                continue
            never = f"alerts: {rule.text!r} never comes true: this stage does not record {metric}"
            elsewhere.append(never)
            kind = metric.partition("/")[0]
            if kind not in _KINDS or (kind in kinds and kind != "validation"):
                [near] = difflib.get_close_matches(metric, sorted(names), n=1, cutoff=0)
                raise UserError(f"{never}; the nearest that it does is {near}")
    return elsewhere


def _rule(entry: str, known: Mapping[str, Rule]) -> Rule:
    """The rule of one entry, which can name those of ``known``."""
    name, _, action = map(str.strip, entry.rpartition(":"))
    if not name or not action.isidentifier():  # the name of a metric may hold a colon
        name = entry.strip()
        action = "log"
    if action not in get_args(Action):
        raise UserError(
            f"alerts: {entry!r}: the action after the colon is log or stop, got {action!r}"
        )
    action = cast(Action, action)
    if name in known:
        return known[name]._replace(action=action)
    match = _RULE.fullmatch(name)
    if match is None:
        raise UserError(f"alerts: {entry!r} is no rule: expected {_FORM}{', '.join(DEFAULTS)}")
    metrics = tuple(match["metric"].split(" / "))
    return Rule(name, metrics, _condition(match), int(match["rows"] or 1), action)


def _value(row: Row, metric: str) -> float:
    """The value in a row, NaN without one; of ``reward/PART`` the largest ``reward/NAME/PART``."""
    if metric in row:
        return float(row[metric])
    kind, _, part = metric.partition("/")
    if kind != "reward":
        return math.nan
    values = [
        float(value)
        for name, value in row.items()
        if name.startswith("reward/") and name.endswith(f"/{part}")
    ]
    return max(values, default=math.nan)


def _condition(match: re.Match[str]) -> Condition:
    """The condition of a rule that is a line of text."""
    window = int(match["window"] or 1)
    number = float(match["number"])
    is_relative = match["first"] is not None
    # The first mean cannot be compared with itself.
    least = window + 1 if is_relative else window
    label = match.string[: match.start("sign")].strip()

    def condition(*columns: np.ndarray) -> str:
        values = functools.reduce(np.divide, columns)
        if len(values) < least:
            return ""
        limit = number
        if is_relative:
            first = values[:window].mean()
            limit = number * first if first else math.nan
        return _beyond(label, values[-window:].mean(), match["sign"], limit)

    return condition


# --- The default rules. docs/alerts.md says which failure each one detects,
# and how often it was wrong.


def _beyond(label: str, value: float, sign: str, limit: float) -> str:
    """The sentence that a value is beyond its limit; "" if it is not, or if the limit is NaN."""
    is_beyond = value > limit if sign == ">" else value < limit
    return f"{label} is {value:.4g} {sign} {limit:.4g}" if is_beyond else ""


def _degenerate_text(share: np.ndarray) -> str:
    return _beyond("response/repetition", share[-1], ">", share[0] + 0.3)


def _nothing_learned(score: np.ndarray, kl: np.ndarray) -> str:
    if len(score) < 20:
        return ""
    # At a constant pace the KL grows with the square of the rows: 0.05 nats by row 100.
    limit = 0.05 * min(1.0, len(kl) / 100) ** 2
    is_near = _beyond("mean 5 of objective/kl", abs(kl[-5:].mean()), "<", limit)
    ends = (score[:10], score[-10:])
    before, after = (float(end.mean()) for end in ends)
    error = math.sqrt(sum(end.var(ddof=1) for end in ends) / 10)
    if not is_near or abs(after - before) > 2 * error:
        return ""
    stays = f"objective/score was {before:.4g} in the first 10 rows and is {after:.4g} in the last"
    return f"{is_near}, {stays}: raise rl.optimizer.learning_rate"


def _nothing_moved(moved: np.ndarray, step: np.ndarray, planned: np.ndarray) -> str:
    if step[-1] < planned[-1] / 2:
        return ""
    is_near = _beyond("validation/moved", moved[-1], "<", 0.05)
    when = f"nats after {step[-1]:.0f} of {planned[-1]:.0f} steps"
    remedy = "raise optimizer.learning_rate of the stage, or shorten its warm-up"
    return is_near and f"{is_near} {when}: {remedy}"


def _value_loss_explosion(loss: np.ndarray, variance: np.ndarray) -> str:
    if len(loss) < 6:
        return ""
    # The loss of a value function that predicts one number is half the variance of the returns,
    # which grows if a reward was rare at first.
    limit = 10 * max(loss[:5].mean(), variance.max() / 2)
    return _beyond("mean 5 of value/loss", loss[-5:].mean(), ">", limit)


def _reward_collapse(score: np.ndarray) -> str:
    if len(score) < 15:
        return ""
    mean, limit, _ = fall(score, size=5, part=0.5)
    return _beyond("mean 5 of objective/score", float(mean), "<", float(limit))


def _reward_hacking(judge: np.ndarray, score: np.ndarray) -> str:
    if len(judge) < 9:
        return ""
    size = max(3, len(judge) // 10)
    mean, limit, best = fall(judge, size=size, part=0.05)
    lost = _beyond(f"mean {size} of validation/judge", float(mean), "<", float(limit))
    scores = _means(score, size)
    gained = _beyond(f"mean {size} of validation/score", scores[-1], ">", scores[best])
    return f"{lost}, {gained}" if lost and gained else ""


def fall(values: np.ndarray, *, size: int, part: float) -> tuple[np.ndarray, ...]:
    """Whether values [..., N] have fallen, N at least 3 ``size``.

    Returns:
        The mean of the last ``size`` rows; the limit below which it has lost a part of the gain,
        and more than noise explains; and the place of the highest mean before them.
    """
    means = _means(values, size)
    earlier = means[..., :-size]
    best = earlier.argmax(axis=-1)
    highest = earlier.max(axis=-1)
    # By how many standard errors noise alone parts the last mean from the highest of all earlier
    # ones in some row of a run: from simulated runs (docs/alerts.md). In the first rows the
    # standard error itself is of few.
    errors = 5 + 30 / values.shape[-1]
    error = _noise(values[..., :-size]) / math.sqrt(size)
    if earlier.shape[-1] >= 5 * size:  # of fewer all touch the rise at a run's start
        # It is larger if errors of neighbours are alike.
        error = np.maximum(error, _noise(earlier, size))
    # Of a task that was solved from the start all rows are equal until one answer is wrong, which
    # is no fall.
    is_new = np.ptp(values[..., :-size], axis=-1) == 0
    error = np.where(is_new, _noise(values[..., -size - 2 :]) / math.sqrt(size), error)
    noise = errors * math.sqrt(2) * error
    return means[..., -1], highest - np.maximum(part * (highest - means[..., 0]), noise), best


def _means(values: np.ndarray, size: int) -> np.ndarray:
    """[..., N + 1 - size] moving means."""
    return np.lib.stride_tricks.sliding_window_view(values, size, axis=-1).mean(axis=-1)


def _noise(values: np.ndarray, apart: int = 1) -> np.ndarray:
    """The standard deviation of the noise, estimated from the distance of each value to the line
    through those ``apart`` before and behind (Gasser, Sroka and Jennen-Steinmetz 1986), which no
    trend increases.
    """
    middle = values[..., apart:-apart]
    distance = values[..., : -2 * apart] - 2 * middle + values[..., 2 * apart :]
    noise: np.ndarray = np.sqrt(np.mean(distance**2, axis=-1) / 6)
    return noise


_TEXTS = {
    "non-finite update": "nonfinite > 0",
    "KL explosion": "objective/kl / response/length > 2 for 3",
    "entropy collapse": "objective/entropy / response/length < 0.05x first for 5",
    "sampler gap": "policy/sampler_gap > 0.02 for 3",
    "nothing to learn": "grad_norm < 1e-8 for 5",
    "responses collapse": "response/most_common > 0.9 for 5",
    "prompt repeated": "reward/repeats_prompt > 0.5 for 3",
    "one answer": "reward/one_answer > 0.9 for 5",
}
_RULES = (
    *(_rule(text, {})._replace(name=name) for name, text in _TEXTS.items()),
    Rule("value-loss explosion", ("value/loss", "value/return_variance"), _value_loss_explosion),
    Rule("reward collapse", ("objective/score",), _reward_collapse),
    Rule("degenerate text", ("response/repetition",), _degenerate_text, rows=3),
    Rule("nothing learned", ("objective/score", "objective/kl"), _nothing_learned),
    Rule("nothing moved", ("validation/moved", "step", "validation/planned_steps"), _nothing_moved),
    Rule("reward hacking", ("validation/judge", "validation/score"), _reward_hacking),
)
DEFAULTS = {rule.name: rule for rule in _RULES}
