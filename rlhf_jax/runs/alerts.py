"""Alerts: rules about a run's metrics, and where in its history they come true.

    rules = alerts.parse(["objective/kl > 50 for 3: stop"])
    alerts.check(rules, run_records.read_rows("runs/ppo/metrics.jsonl"))

A rule is a line:

    RULE      = CONDITION ["and" CONDITION]... ["for" ROWS] [":" ACTION]        ACTION = log (unless said) or stop
    CONDITION = QUANTITY "<" THRESHOLD, QUANTITY ">" THRESHOLD or QUANTITY "is not finite"
    QUANTITY  = ["mean" ROWS "of"] METRIC ["/" METRIC]
    THRESHOLD = NUMBER or [NUMBER"x"] REFERENCE ["+" or "-" NUMBER ["gain" or "sd"]]
    REFERENCE = first, max or min of the quantity over the rows before this one, or "peak of" METRIC: what the quantity
                was when that metric was at its max

``gain`` is max - first; ``sd`` the noise of the metric from row to row, estimated from how far each row lies from the
line through its neighbours (Gasser, Sroka and Jennen-Steinmetz 1986), so that a trend does not count. A multiple of 0
is no threshold: nothing is beyond it.

A quantity exists in the rows that record its metrics, a mean as soon as there are enough of them; a rule is asked in
the rows that have all its quantities, and is true when its conditions have been so in so many of them in a row. It
raises one alert each time it becomes true.

Everything is a function of the rows, so a run that is resumed, or a file that is read again, gives the same alerts.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rlhf_jax.errors import UserError

Action = Literal["log", "stop"]

# {name: rule}. docs/alerts.md says which failure each one is for, and how often it was wrong.
DEFAULTS = {
    "non-finite update": "nonfinite > 0",
    "KL explosion": "objective/kl / response/length > 2 for 3",
    "entropy collapse": "objective/entropy / response/length < 0.05x first for 5",
    "reward collapse": "mean 5 of objective/score < max - 0.5 gain and mean 5 of objective/score < max - 4 sd",
    "value-loss explosion": "mean 5 of value/loss > 20x first",
    "degenerate text": "response/repetition > first + 0.3 for 3",
    "reward hacking": "validation/judge < max - 0.03 gain and validation/judge < max - 1 sd and "
    "validation/score > peak of validation/judge + 5 sd",
}

# What the metrics' names begin with, in one stage or another; validations differ by stage.
_KINDS = (
    *("sft", "reward_model", "dpo", "validation"),
    *("objective", "policy", "value", "response", "reward", "kl", "safety"),
)
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RULE = re.compile(r"(?P<conditions>.+?)(?:\s+for\s+(?P<rows>\d+))?(?:\s*:\s*(?P<action>\w+))?", re.DOTALL)
_CONDITION = re.compile(
    r"(?:mean\s+(?P<window>\d+)\s+of\s+)?(?P<metric>[^\s<>]+)(?:\s+/\s+(?P<divisor>[^\s<>]+))?\s*"
    r"(?:(?P<sign>[<>])\s*(?P<threshold>.+)|\bis\s+not\s+finite)"
)
_THRESHOLD = re.compile(
    rf"(?P<number>{_NUMBER})|(?:(?P<factor>{_NUMBER})x\s+)?(?P<reference>first|max|min|peak\s+of\s+(?P<of>[^\s<>]+))"
    rf"(?:\s*(?P<sign>[-+])\s*(?P<amount>{_NUMBER})(?:\s+(?P<unit>gain|sd))?)?"
)


class Threshold(NamedTuple):
    """``factor * reference + amount * unit``; without a reference the amount alone."""

    reference: Literal["first", "max", "min", "peak"] | None
    factor: float
    amount: float
    unit: Literal["gain", "sd"] | None
    of: str | None = None  # the metric whose peak it is


class Condition(NamedTuple):
    """A quantity and what is asked of it; no sign: that it is not finite."""

    text: str
    metrics: tuple[str, ...]  # one, or a dividend and its divisor
    window: int
    sign: Literal["<", ">"] | None
    threshold: Threshold


class Rule(NamedTuple):
    """A rule as it was written, and read."""

    name: str
    text: str
    conditions: tuple[Condition, ...]
    rows: int
    action: Action

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of all its conditions."""
        names = [name for condition in self.conditions for name in (*condition.metrics, condition.threshold.of)]
        return tuple(dict.fromkeys(name for name in names if name is not None))


class Alert(NamedTuple):
    """A rule that has come true: a row of alerts.jsonl."""

    step: int
    name: str
    rule: str
    action: Action
    message: str  # the quantities and thresholds of that step


class _Seen(NamedTuple):
    """What a condition remembers of the rows before."""

    recent: tuple[float, ...] = ()  # of the metric, as many as the window
    last: tuple[float, ...] = ()  # of the metric, the last two that are finite
    squares: float = 0.0  # sum of the squared second differences
    differences: int = 0
    first: float | None = None  # of the quantity
    max: float = -math.inf
    min: float = math.inf
    top: float = -math.inf  # of the metric whose peak the threshold refers to
    peak: float = math.nan  # the quantity there


class Watch(NamedTuple):
    """A rule and how far it has come: conditions, rows in which they held, whether it was true in the last one."""

    rule: Rule
    seen: tuple[_Seen, ...]
    streak: int = 0
    active: bool = False

    @property
    def stops(self) -> bool:
        """Whether it is true and asks for the run's end."""
        return self.active and self.rule.action == "stop"


def parse(entries: Sequence[str]) -> tuple[Rule, ...]:
    """The default rules, unless an entry is ``none``, and those that the entries say.

    Raises:
        UserError: an entry is no rule; it is quoted, with what was expected.
    """
    own = tuple(_rule(text, text) for text in entries if text != "none")
    return (() if "none" in entries else tuple(_rule(text, name) for name, text in DEFAULTS.items())) + own


def check(rules: Iterable[Rule], history: Iterable[Mapping[str, Any]]) -> list[Alert]:
    """The alerts that the rules raise in a history: rows of metrics.jsonl, each with its ``step``."""
    return replay(rules, history)[1]


def replay(rules: Iterable[Rule], history: Iterable[Mapping[str, Any]]) -> tuple[tuple[Watch, ...], list[Alert]]:
    """The rules after a history, to be shown its next row by ``observe``, and the alerts that they raise in it."""
    watches, found = tuple(Watch(rule, (_Seen(),) * len(rule.conditions)) for rule in rules), []
    for row in history:
        watches, raised = observe(watches, row)
        found += raised
    return watches, found


def observe(watches: Sequence[Watch], row: Mapping[str, Any]) -> tuple[tuple[Watch, ...], list[Alert]]:
    """The rules after another row, and the alerts that it raises."""
    results = [_observe(watch, row) for watch in watches]
    return tuple(watch for watch, _ in results), [alert for _, alert in results if alert is not None]


def check_metrics(rules: Iterable[Rule], names: Collection[str]) -> list[str]:
    """Compares the metrics of the rules with the names of those that the run records; default rules serve all stages
    and are passed over.

    Returns:
        A sentence for each rule that never comes true here but may in another stage of a pipeline.

    Raises:
        UserError: no stage records such a metric; the nearest one is named.
    """
    kinds = {name.partition("/")[0] for name in names if "/" in name}
    elsewhere = []
    for rule in rules:
        for metric in rule.metrics:
            if rule.name in DEFAULTS or metric in names:
                continue
            near = difflib.get_close_matches(metric, sorted(names), n=1, cutoff=0)
            sentence = f"alerts: {rule.text!r} never comes true: this stage does not record {metric}"
            kind = metric.partition("/")[0]
            if kind not in _KINDS or (kind in kinds and kind != "validation"):
                raise UserError(f"{sentence}; the nearest that it does is {', '.join(near)}")
            elsewhere.append(sentence)
    return elsewhere


def _rule(text: str, name: str) -> Rule:
    match = _RULE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"alerts: {text!r} is no rule: expected CONDITION [and CONDITION] [for ROWS] [: log or stop]")
    action = match["action"] or "log"
    if action not in ("log", "stop"):
        raise UserError(f"alerts: {text!r}: the action behind the colon is log or stop, got {action!r}")
    rows = int(match["rows"] or 1)
    if rows < 1:
        raise UserError(f"alerts: {text!r}: a rule holds for at least 1 row, got {rows}")
    conditions = tuple(_condition(part, text) for part in re.split(r"\s+and\s+", match["conditions"]))
    return Rule(name, text, conditions, rows, action)  # type: ignore[arg-type]


def _condition(part: str, text: str) -> Condition:
    match = _CONDITION.fullmatch(part)
    if match is None:
        raise UserError(
            f"alerts: {text!r}: {part!r} is no condition: expected METRIC < NUMBER, METRIC > NUMBER or METRIC is not "
            "finite; METRIC may be `mean ROWS of METRIC` or `METRIC / METRIC`"
        )
    window = int(match["window"] or 1)
    if window < 1:
        raise UserError(f"alerts: {text!r}: a mean is of at least 1 row, got {window}")
    metrics = tuple(name for name in (match["metric"], match["divisor"]) if name)
    threshold = _threshold(match["threshold"], text) if match["sign"] else Threshold(None, 0.0, 0.0, None)
    label = part[: match.start("sign")].strip() if match["sign"] else metrics[0]
    return Condition(label, metrics, window, match["sign"], threshold)  # type: ignore[arg-type]


def _threshold(written: str, text: str) -> Threshold:
    match = _THRESHOLD.fullmatch(written)
    if match is None:
        raise UserError(
            f"alerts: {text!r}: {written!r} is no threshold: expected a number such as 50, 0.1x first, max - 0.5 gain, "
            "max - 3 sd or min + 2"
        )
    if match["number"]:
        return Threshold(None, 0.0, float(match["number"]), None)
    amount = float(match["amount"] or 0) * (-1 if match["sign"] == "-" else 1)
    reference = match["reference"].split()[0]
    return Threshold(reference, float(match["factor"] or 1), amount, match["unit"], match["of"])  # type: ignore[arg-type]


def _observe(watch: Watch, row: Mapping[str, Any]) -> tuple[Watch, Alert | None]:
    rule = watch.rule
    results = [_update(condition, seen, row) for condition, seen in zip(rule.conditions, watch.seen, strict=True)]
    watch = watch._replace(seen=tuple(seen for seen, *_ in results))
    if any(value is None for _, value, _ in results):
        return watch, None
    held, parts = True, []
    for condition, (_, value, limit) in zip(rule.conditions, results, strict=True):
        if condition.sign is None:
            held &= not math.isfinite(value)
            parts.append(f"{condition.text} is {value:.4g}")
        else:
            held &= limit is not None and (value < limit if condition.sign == "<" else value > limit)
            parts.append(f"{condition.text} is {value:.4g} {condition.sign} {limit or 0:.4g}")
    streak = watch.streak + 1 if held else 0
    active = streak >= rule.rows
    alert = None
    if active and not watch.active:
        alert = Alert(int(row["step"]), rule.name, rule.text, rule.action, ", ".join(dict.fromkeys(parts)))
    return watch._replace(streak=streak, active=active), alert


def _update(condition: Condition, seen: _Seen, row: Mapping[str, Any]) -> tuple[_Seen, Any, float | None]:
    """What the condition remembers with this row, its quantity in it (None: there is none) and the threshold."""
    if any(name not in row for name in condition.metrics):
        return seen, None, None
    now = float(row[condition.metrics[0]])
    if len(condition.metrics) == 2:
        divisor = float(row[condition.metrics[1]])
        now = now / divisor if divisor else math.nan
    recent = (*seen.recent, now)[-condition.window :]
    value = sum(recent) / len(recent) if len(recent) == condition.window else None
    limit = None if value is None else _limit(condition.threshold, seen)
    if math.isfinite(now):
        if len(seen.last) == 2:
            square = (now - 2 * seen.last[1] + seen.last[0]) ** 2
            seen = seen._replace(squares=seen.squares + square, differences=seen.differences + 1)
        seen = seen._replace(last=(*seen.last, now)[-2:])
    if value is not None and math.isfinite(value):
        first = value if seen.first is None else seen.first
        seen = seen._replace(first=first, max=max(seen.max, value), min=min(seen.min, value))
        of = condition.threshold.of
        if of is not None and of in row and float(row[of]) > seen.top:
            seen = seen._replace(top=float(row[of]), peak=value)
    return seen._replace(recent=recent), value, limit


def _limit(threshold: Threshold, seen: _Seen) -> float | None:
    """None where there are no rows yet to refer to, or a multiple of 0 says nothing."""
    if threshold.reference is None:
        return threshold.amount
    if seen.first is None or (threshold.unit == "sd" and not seen.differences):
        return None
    noise = math.sqrt(seen.squares / (6 * max(1, seen.differences)))
    unit = {None: 1.0, "gain": seen.max - seen.first, "sd": noise}[threshold.unit]
    reference = getattr(seen, threshold.reference)
    if reference == 0 and threshold.factor != 1:
        return None
    return threshold.factor * reference + threshold.amount * unit
