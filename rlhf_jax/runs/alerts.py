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

The condition of a rule is checked in each row that records all its metrics. The rule is true when
its condition has held in the last ROWS of these rows. It raises one alert each time it becomes
true. Everything is a function of the rows, so a resumed run, or a file that is read again, gives
the same alerts.
"""

import difflib
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf_jax.errors import UserError

Action = Literal["log", "stop"]

# What the names of metrics begin with, in one stage or another; validations differ by stage.
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
    "METRIC < NUMBER or METRIC > NUMBER, then, as you like, `for ROWS` and `: log` or `: stop`; "
    "METRIC may be `mean ROWS of METRIC` or `METRIC / METRIC`, NUMBER `0.5x first`. Or the name of "
    "a default rule: "
)


class Rule(NamedTuple):
    """A rule as a function of the rows so far."""

    name: str
    metrics: tuple[str, ...]
    holds: Callable[..., tuple[bool, str]]
    """Takes an array [N] per metric, its values in the rows so far; returns whether the condition
    holds in the last row, and the numbers that it compares."""
    rows: int = 1
    action: Action = "log"

    @property
    def text(self) -> str:
        """The rule as ``parse`` reads it."""
        return self.name if self.action == "log" else f"{self.name}: {self.action}"


class Alert(NamedTuple):
    """A rule that became true: a row of alerts.jsonl."""

    step: int
    name: str
    rule: str
    action: Action
    message: str  # the quantities and thresholds of that step


class Watch:
    """A rule and the rows it has seen."""

    def __init__(self, rule: Rule):
        """Before the first row."""
        self.rule = rule
        self._seen: list[list[float]] = []  # [N, M], the rule's metrics
        self._streak = 0  # in how many of the last rows its condition held

    @property
    def stops(self) -> bool:
        """Whether the rule is true and asks for the run's end."""
        return self._streak >= self.rule.rows and self.rule.action == "stop"

    def observe(self, row: Mapping[str, Any]) -> Alert | None:
        """Takes the next row; returns the alert if the rule becomes true in it."""
        rule = self.rule
        values = [float(row.get(name, math.nan)) for name in rule.metrics]
        if any(map(math.isnan, values)):
            return None
        self._seen.append(values)
        with np.errstate(all="ignore"):  # an infinite value gives NaN, which crosses no threshold
            holds, message = rule.holds(*np.array(self._seen).T)
        self._streak = self._streak + 1 if holds else 0
        if self._streak != rule.rows:
            return None
        return Alert(int(row["step"]), rule.name, rule.text, rule.action, message)


def parse(entries: Sequence[str], dtype: str = "float32") -> tuple[Rule, ...]:
    """The default rules, unless an entry is ``none``, and those of the entries.

    dtype: of the activations, ``compute.dtype``: it decides how far rounding may separate the
    sampler from the update.

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


def check(rules: Iterable[Rule], history: Iterable[Mapping[str, Any]]) -> list[Alert]:
    """The alerts that the rules raise in a history: rows of metrics.jsonl, with their ``step``."""
    watches = [Watch(rule) for rule in rules]
    alerts = [watch.observe(row) for row in history for watch in watches]
    return [alert for alert in alerts if alert is not None]


def check_metrics(rules: Iterable[Rule], names: Collection[str]) -> list[str]:
    """Compares the metrics of the user's rules with the names of those that the run records.

    Returns:
        A sentence for each rule that never becomes true here but may in another stage of a
        pipeline.

    Raises:
        UserError: no stage records such a metric; the error names the nearest one.
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
    """The rule of one entry; ``known``: those that have a name."""
    name = entry.strip()
    action = "log"
    before, _, after = (part.strip() for part in entry.rpartition(":"))
    if before and after.isidentifier():
        name = before
        action = after
    if action not in ("log", "stop"):
        raise UserError(
            f"alerts: {entry!r}: the action behind the colon is log or stop, got {action!r}"
        )
    if name in known:
        return known[name]._replace(action=action)  # type: ignore[arg-type]
    match = _RULE.fullmatch(name)
    if match is None:
        expected = f"{_FORM}{', '.join(DEFAULTS)}"
        raise UserError(f"alerts: {entry!r} is no rule: expected {expected}")
    metrics = tuple(match["metric"].split(" / "))
    rows = int(match["rows"] or 1)
    return Rule(name, metrics, _condition(match), rows, action)  # type: ignore[arg-type]


def _condition(match: re.Match[str]) -> Callable[..., tuple[bool, str]]:
    """``Rule.holds`` of a rule that is a line."""
    window = int(match["window"] or 1)
    number = float(match["number"])
    is_relative = match["first"] is not None
    # The first mean has nothing to be compared with.
    least = window + 1 if is_relative else window
    label = match.string[: match.start("sign")].strip()

    def holds(*columns: np.ndarray) -> tuple[bool, str]:
        values = functools.reduce(np.divide, columns)
        if len(values) < least:
            return False, ""
        limit = number
        if is_relative:
            first = values[:window].mean()
            limit = number * first if first else math.nan
        return _is(label, values[-window:].mean(), match["sign"], limit)

    return holds


# --- The default rules: docs/alerts.md says which failure each one is for, docs/notes/alerts.md how
# often it was wrong.


def _is(label: str, value: float, sign: str, limit: float) -> tuple[bool, str]:
    """Whether a value is beyond its limit (never beyond NaN), and the sentence that says so."""
    is_beyond = value > limit if sign == ">" else value < limit
    return bool(is_beyond), f"{label} is {value:.4g} {sign} {limit:.4g}"


def _degenerate_text(share: np.ndarray) -> tuple[bool, str]:
    return _is("response/repetition", share[-1], ">", share[0] + 0.3)


def _nothing_to_learn(share: np.ndarray, norm: np.ndarray) -> tuple[bool, str]:
    if share[-1] == 1:
        return True, "reward/equal_share is 1: the rewards of every group are equal"
    return _is("grad_norm", norm[-1], "<", 1e-8)


def _reward_collapse(score: np.ndarray) -> tuple[bool, str]:
    if len(score) < 6:
        return False, ""
    means = np.lib.stride_tricks.sliding_window_view(score, 5).mean(axis=1)
    highest = means[:-1].max()
    gain = highest - means[0]
    fall = max(0.5 * gain, 4 * _noise(score[:-1]))
    return _is("mean 5 of objective/score", means[-1], "<", highest - fall)


def _reward_hacking(judge: np.ndarray, score: np.ndarray) -> tuple[bool, str]:
    if len(judge) < 4:  # the noise cannot be estimated
        return False, ""
    best = judge[:-1].argmax()
    gain = judge[best] - judge[0]
    fall = max(0.03 * gain, _noise(judge[:-1]))
    is_low, lost = _is("validation/judge", judge[-1], "<", judge[best] - fall)
    rise = 5 * _noise(score[:-1])
    is_high, gained = _is("validation/score", score[-1], ">", score[best] + rise)
    return is_low and is_high, f"{lost}, {gained}"


def _noise(values: np.ndarray) -> float:
    """The standard deviation from row to row, estimated from the distance of each row to the line
    through its neighbours (Gasser, Sroka and Jennen-Steinmetz 1986). A trend does not count.
    """
    return float(np.sqrt(np.mean(np.diff(values, 2) ** 2) / 6))


_TEXTS = {
    "non-finite update": "nonfinite > 0",
    "KL explosion": "objective/kl / response/length > 2 for 3",
    "entropy collapse": "objective/entropy / response/length < 0.05x first for 5",
    "value-loss explosion": "mean 5 of value/loss > 20x first",
    "sampler gap": "policy/sampler_gap > 0.02 for 3",
    "responses collapse": "response/most_common > 0.9 for 5",
}
_RULES = (
    *(_rule(text, {})._replace(name=name) for name, text in _TEXTS.items()),
    Rule("reward collapse", ("objective/score",), _reward_collapse),
    Rule("degenerate text", ("response/repetition",), _degenerate_text, rows=3),
    Rule("nothing to learn", ("reward/equal_share", "grad_norm"), _nothing_to_learn, rows=5),
    Rule("reward hacking", ("validation/judge", "validation/score"), _reward_hacking),
)
DEFAULTS = {rule.name: rule for rule in _RULES}
