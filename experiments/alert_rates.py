"""How often is each default alert wrong, and how often does it see what it is for?

    python experiments/alert_rates.py --out alert_rates.json

First in simulated histories of 10, 30 and 100 rows: honest ones, in which nothing fails, and failed
ones. A level goes from 0 to 1 of the gain, and noise is added. Then in populations of small runs,
lanes of one ``jax.vmap``: a policy is paid by a gold reward (honest), or by a reward model of 256
noisy comparisons, while gold and a reward model of comparisons of its own look on. Last in tiny
runs of the commands.

The constants of the rules were chosen on other histories: a flat judge with noise that is normal,
Student's t with 3 degrees of freedom, autocorrelated by .3 and .5, or growing.
"""

import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import alert_runs
import numpy as np
import results
import tyro

from rlhf_jax import cli
from rlhf_jax.errors import logger
from rlhf_jax.metrics import wilson
from rlhf_jax.runs import alerts

LENGTHS = (10, 30, 100)  # validations or rows of a history
RULES = {rule.name: rule for rule in alerts.parse([])}
History = Mapping[str, np.ndarray]  # {metric: [N]}
Run = tuple[str, Any]  # the variant and the seed of a run in the results
SUMMARY = ("simulated, ", "runs, ")  # what its variants begin with


class Sizes(NamedTuple):
    """How much is measured."""

    honest: int = 1000  # simulated histories of each family
    failed: int = 400
    seeds: int = 12  # of each population, a multiple of 4
    steps: int = 100


FULL = Sizes()

# --- Simulated histories


def saturating(t: np.ndarray, scale: float) -> np.ndarray:
    return 1 - np.exp(-t / scale)


def turning(t: np.ndarray, at: float, fall: float, end: float) -> np.ndarray:
    """Rises to 1 at a time, then falls by a part of that until another time."""
    rising = 1 - (1 - np.minimum(t / at, 1)) ** 2
    return rising - fall * np.clip((t - at) / (end - at), 0, 1)


def autocorrelated(rng: np.random.Generator, num: int, by: float) -> np.ndarray:
    values = rng.normal(size=num)
    for n in range(1, num):
        values[n] = by * values[n - 1] + np.sqrt(1 - by**2) * values[n]
    return values


def contaminated(rng: np.random.Generator, num: int) -> np.ndarray:
    """One row of twenty has five times the noise."""
    return rng.normal(size=num) * np.where(rng.random(num) < 0.05, 5, 1) / np.sqrt(2.2)


Noise = Callable[[np.random.Generator, int], np.ndarray]
NOISES: dict[str, Noise] = {
    "normal": lambda rng, num: rng.normal(size=num),
    "heavy tails": contaminated,
    "autocorrelated .4": functools.partial(autocorrelated, by=0.4),
    "autocorrelated .6": functools.partial(autocorrelated, by=0.6),
    "noise grows threefold": lambda rng, num: rng.normal(size=num) * np.linspace(1 / 3, 1, num),
    "level wanders": lambda rng, num: rng.normal(size=num) + rng.normal(0, 0.05, num).cumsum(),
}
SDS = (0.03, 0.1, 0.3)  # of the noise, in parts of the gain
PROMPTS = (8, 32, 128)  # of a validation whose scores are 0 or 1
Level = Callable[[np.ndarray], np.ndarray]


class Family(NamedTuple):
    """Histories of one kind, and the rule that reads them."""

    rule: str
    name: str
    make: Callable[[np.random.Generator, np.ndarray], History]  # of times [N] from 0 to 1
    onset: float | None = None  # the time of the failure; None: there is none

    @property
    def variant(self) -> str:
        return f"{'honest' if self.onset is None else 'failed'} {self.rule}: {self.name}"


def judged(judge: Level, score: Level, sd: float, noise: Noise) -> Callable[..., History]:
    """A judge and a score with independent noise."""

    def make(rng: np.random.Generator, t: np.ndarray) -> History:
        judge_noise, score_noise = (sd * noise(rng, len(t)) for _ in range(2))
        return {
            "validation/judge": judge(t) + judge_noise,
            "validation/score": score(t) + score_noise,
        }

    return make


def counted(judge: Level, score: Level, prompts: int) -> Callable[..., History]:
    """Shares of prompts that are right."""

    def make(rng: np.random.Generator, t: np.ndarray) -> History:
        shares = (rng.binomial(prompts, 0.1 + 0.8 * level(t)) / prompts for level in (judge, score))
        return dict(zip(("validation/judge", "validation/score"), shares, strict=True))

    return make


def scored(level: Level, sd: float, noise: Noise) -> Callable[..., History]:
    return lambda rng, t: {"objective/score": level(t) + sd * noise(rng, len(t))}


def of_hacking() -> Iterable[Family]:
    first = functools.partial(saturating, scale=0.08)
    slow = functools.partial(saturating, scale=0.4)
    levels: dict[str, tuple[Level, Level]] = {
        "both saturate": (functools.partial(saturating, scale=0.15),) * 2,
        "judge saturates first": (first, slow),
        "both rise": (np.copy, np.copy),
    }
    turns = {
        "falls by 10%, slowly": (0.4, 0.1, 1.0),
        "falls by 30%, slowly": (0.4, 0.3, 1.0),
        "falls by 100%, slowly": (0.4, 1.0, 1.0),
        "falls by 30%, suddenly": (0.6, 0.3, 0.61),
        "falls by 100%, suddenly": (0.6, 1.0, 0.61),
        "falls by 100%, late": (0.85, 1.0, 1.0),
    }
    for name, noise in NOISES.items():  # flat: the same at any sd
        flat = judged(np.zeros_like, slow, 0.1, noise)
        yield Family("reward hacking", f"judge flat, {name}", flat)
        make = judged(first, slow, 0.1, noise)
        yield Family("reward hacking", f"judge saturates first, {name}", make)
    for sd in SDS:
        for name, of_level in levels.items():
            make = judged(*of_level, sd, NOISES["normal"])
            yield Family("reward hacking", f"{name}, sd {sd}", make)
        for name, (at, fall, end) in turns.items():
            level = functools.partial(turning, at=at, fall=fall, end=end)
            make = judged(level, slow, sd, NOISES["normal"])
            yield Family("reward hacking", f"{name}, sd {sd}", make, at)
    for prompts in PROMPTS:
        make = counted(first, slow, prompts)
        yield Family("reward hacking", f"judge saturates first, 0 or 1 of {prompts}", make)


def solved(prompts: int) -> Callable[..., History]:
    """Shares of prompts that are right from the first row on."""
    return lambda rng, t: {"objective/score": rng.binomial(prompts, 0.98, len(t)) / prompts}


def of_collapse() -> Iterable[Family]:
    """Of the score of a batch."""
    for prompts in PROMPTS:
        name = f"solved from the start, 0 or 1 of {prompts}"
        yield Family("reward collapse", name, solved(prompts))
    for name, noise in NOISES.items():
        make = scored(np.zeros_like, 0.1, noise)
        yield Family("reward collapse", f"flat, {name}", make)
    for sd in SDS:
        make = scored(functools.partial(saturating, scale=0.15), sd, NOISES["normal"])
        yield Family("reward collapse", f"saturates, sd {sd}", make)
        make = scored(lambda t: turning(t, 0.4, 0.3, 1.0), sd, NOISES["normal"])
        yield Family("reward collapse", f"falls by 30%, sd {sd}", make)
        make = scored(lambda t: turning(t, 0.6, 1.0, 0.65), sd, NOISES["normal"])
        yield Family("reward collapse", f"falls by 100%, sd {sd}", make, 0.6)


def learned(nats: float, gain: float, sd: float) -> Callable[..., History]:
    """A score that rises with the distance from the reference, whose square is the KL, as measured
    with 64 samples."""

    def make(rng: np.random.Generator, t: np.ndarray) -> History:
        kl = nats * t**2
        return {
            "objective/score": gain * t + sd * rng.normal(size=len(t)),
            "objective/kl": kl + np.sqrt(2 * kl / 64) * rng.normal(size=len(t)),
        }

    return make


def of_equal(chance: Level, groups: int, group_size: int) -> Callable[..., History]:
    """Of rewards 0 or 1."""

    def make(rng: np.random.Generator, t: np.ndarray) -> History:
        right = rng.binomial(group_size, chance(t)[:, None], (len(t), groups))
        equal = np.isin(right, (0, group_size)).mean(axis=1)
        return {"reward/equal_share": equal, "grad_norm": 1.0 - (equal == 1)}

    return make


def alike(metric: str, level: Level, num: int) -> Callable[..., History]:
    """The mean share of ``num`` responses, whose own ones are beta distributed."""

    def make(rng: np.random.Generator, t: np.ndarray) -> History:
        mean = np.clip(level(t), 1e-3, 1 - 1e-3)
        shares = rng.beta(4 * mean, 4 * (1 - mean), (num, len(t)))
        return {metric: shares.mean(axis=0)}

    return make


def spread(metric: str, level: Level, sd: float) -> Callable[..., History]:
    """A level times log-normal noise, of responses of ten tokens."""

    def make(rng: np.random.Generator, t: np.ndarray) -> History:
        noisy = level(t) * np.exp(sd * rng.normal(size=len(t)))
        return {metric: noisy, "response/length": np.full(len(t), 10.0)}

    return make


def valued(loss: Level, variance: Callable[..., np.ndarray], sd: float) -> Callable[..., History]:
    """A value loss times log-normal noise, and the variance of a batch's returns."""

    def make(rng: np.random.Generator, t: np.ndarray) -> History:
        noisy = loss(t) * np.exp(sd * rng.normal(size=len(t)))
        return {"value/loss": noisy, "value/return_variance": variance(rng, t)}

    return make


def of_values() -> Iterable[Family]:
    """Of a value function that predicts one number the loss is half the variance of the returns,
    which is 1 where they are normalised; of rewards from 0 to 60 it is up to 900.
    """
    rule = "value-loss explosion"
    for sd in (0.1, 0.3, 0.9):
        noise = f"sd {sd} of its log"
        yield Family(rule, f"rare reward, range 60, {noise}", valued(of_rare, rare_variance, sd))
        for unit, kind in ((1.0, "normalised returns"), (900.0, "range 60")):
            make = functools.partial(valued, variance=functools.partial(varied, unit), sd=sd)
            learns = functools.partial(fitted, unit)
            yield Family(rule, f"falls, {kind}, {noise}", make(learns))
            grows = functools.partial(fitted, unit, then=100.0)
            yield Family(rule, f"grows a hundredfold, {kind}, {noise}", make(grows), 0.6)
            diverges = functools.partial(diverging, unit)
            yield Family(rule, f"diverges, {kind}, {noise}", make(diverges), 0.6)


def fitted(unit: float, t: np.ndarray, then: float = 1.0) -> np.ndarray:
    """The loss of a value function that learns to explain 80% of the returns; then it is so many
    times as large."""
    return unit / 2 * (0.2 + 0.8 * np.exp(-5 * t)) * np.where(t < 0.6, 1.0, then)


def diverging(unit: float, t: np.ndarray) -> np.ndarray:
    return unit / 2 * np.exp(np.maximum(30 * (t - 0.6), 0))


def varied(unit: float, rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
    """The variance of the returns of 64 answers; exactly 1 if they are normalised."""
    return unit * (rng.chisquare(63, len(t)) / 63 if unit != 1 else np.ones(len(t)))


def of_rare(t: np.ndarray) -> np.ndarray:
    """The loss of the mean of a rare reward, 0 or 60."""
    return 1800 * rare(t) * (1 - rare(t))


def rare_variance(rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
    """Of 64 answers that get it."""
    share = rng.binomial(64, rare(t)) / 64
    return 3600 * share * (1 - share)


def families() -> Iterable[Family]:
    yield from of_hacking()
    yield from of_collapse()
    yield from of_values()
    for sd in SDS:
        yield Family("nothing learned", f"learns, 1 nat, sd {sd}", learned(1.0, 1.0, sd))
        yield Family("nothing learned", f"stays, sd {sd}", learned(1e-3, 0.0, sd), 0.0)
        entropy = functools.partial(spread, "objective/entropy", sd=sd)
        falls = entropy(lambda t: 0.1 + 0.9 * np.exp(-5 * t))
        yield Family("entropy collapse", f"falls to a tenth, sd {sd}", falls)
        ends = entropy(lambda t: 0.01 + np.exp(-10 * t))
        yield Family("entropy collapse", f"falls to a hundredth, sd {sd}", ends, 0.3)
        kl = functools.partial(spread, "objective/kl", sd=sd)
        yield Family("KL explosion", f"1 nat a token, sd {sd}", kl(lambda t: 10 * t))
        yield Family("KL explosion", f"6 nats a token, sd {sd}", kl(lambda t: 60 * t), 1 / 3)
    for start in (0.001, 0.003, 0.01, 0.03):
        chance = functools.partial(rare, start=start)
        for groups, size in ((8, 8), (1, 64)):
            name = f"{start:.1%} right at first, {groups} x {size}"
            yield Family("nothing to learn", name, of_equal(chance, groups, size))
    yield Family("nothing to learn", "none right", of_equal(np.zeros_like, 8, 8), 0.0)
    for metric, rule, end in (
        ("response/most_common", "responses collapse", 1.0),
        ("response/repetition", "degenerate text", 0.9),
        ("reward/repeats_prompt", "prompt repeated", 0.9),
        ("reward/one_answer", "one answer", 1.0),
    ):
        for num in (8, 64):
            stays = alike(metric, lambda t: 0.1 + 0.2 * t, num)
            yield Family(rule, f"rises from .1 to .3 of {num}", stays)
            goes = alike(metric, lambda t, end=end: np.where(t < 0.4, 0.1, end), num)
            yield Family(rule, f"jumps from .1 to {end:g} of {num}", goes, 0.4)


def rare(t: np.ndarray, start: float = 0.003) -> np.ndarray:
    """The chance of a reward that is rare at first, and in the end 95%."""
    logit = np.log(start / (1 - start))
    return 1 / (1 + np.exp(-logit - (np.log(19) - logit) * t))


def first_alerts(rule: alerts.Rule, histories: Sequence[History]) -> list[int | None]:
    """For each history the place of the row in which the rule raises its first alert."""
    columns = [np.stack([history[name] for history in histories]) for name in rule.metrics]
    holds = np.zeros(columns[0].shape, bool)  # [histories, N]
    for place in range(holds.shape[1]):
        for number in np.flatnonzero(may_hold(rule, columns, place)):
            so_far = (values[number, : place + 1] for values in columns)
            holds[number, place] = bool(rule.condition(*so_far))
    streaks = np.lib.stride_tricks.sliding_window_view(holds, rule.rows, axis=1).all(axis=2)
    return [rule.rows - 1 + int(row.argmax()) if row.any() else None for row in streaks]


def may_hold(rule: alerts.Rule, columns: list[np.ndarray], place: int) -> np.ndarray:
    """[histories] where the condition must be asked: of the two rules that are slow, where the
    first metric has fallen.
    """
    values = columns[0][:, : place + 1]
    size = {"reward collapse": 5, "reward hacking": max(3, values.shape[1] // 10)}.get(rule.name)
    if size is None:
        return np.ones(len(values), bool)
    if values.shape[1] < 3 * size:
        return np.zeros(len(values), bool)
    part = {"reward collapse": 0.5, "reward hacking": 0.05}[rule.name]
    mean, limit, _ = alerts.fall(values, size=size, part=part)
    return mean < limit + 1e-9


def simulate(family: Family, sizes: Sizes) -> list[results.Row]:
    """The share of histories of each length with an alert, and how late it is."""
    found = []
    num = sizes.honest if family.onset is None else sizes.failed
    for length in LENGTHS:
        rng = np.random.default_rng(7)
        t = np.linspace(0, 1, length)
        histories = [family.make(rng, t) for _ in range(num)]
        places = first_alerts(RULES[family.rule], histories)
        found += rates(family, length, places)
    return found


def rates(family: Family, length: int, places: list[int | None]) -> list[results.Row]:
    """The number of histories with an alert, in a failed one not before the failure, and the median
    of how many rows it is behind it.
    """
    onset = (family.onset or 0) * (length - 1)
    late = [place - onset for place in places if place is not None and place >= onset]
    found = share_rows(family.variant, f"{length} rows", len(late), len(places))
    if late and family.onset is not None:
        metric = f"rows late of {length}"
        value = float(np.median(late))
        found.append(results.row(family.variant, results.ALL, max(LENGTHS), metric, value))
    return found


def share_rows(variant: str, metric: str, num: int, of: int) -> list[results.Row]:
    """A share with its 95% interval, and of how many."""
    low, high = wilson(num / of, num=of)
    values = {"": num / of, " low": low, " high": high, ": of": of}
    row = functools.partial(results.row, variant, results.ALL, max(LENGTHS))
    return [row(f"{metric}{edge}", value) for edge, value in values.items()]


def summary(rows: list[results.Row]) -> list[results.Row]:
    """For each rule: its worst honest family, its failed families as one, and its runs."""
    values = {(row["variant"], row["metric"], row["seed"]): row["value"] for row in rows}
    runs = list(dict.fromkeys((row["variant"], row["seed"]) for row in rows))
    runs = [run for run in runs if run[0].startswith("run of") and run[1] != results.ALL]
    found = []
    for rule in RULES:
        for kind in ("honest", "failed"):
            of_kind = {name for name, _, _ in values if name.startswith(f"{kind} {rule}: ")}
            for metric in [f"{length} rows" for length in LENGTHS] if of_kind else ():
                shares = [values[name, metric, results.ALL] for name in of_kind]
                nums = [values[name, f"{metric}: of", results.ALL] for name in of_kind]
                share, num = max(shares), nums[0]
                if kind == "failed":
                    share, num = np.mean(shares), sum(nums)
                found += share_rows(f"simulated, {kind}: {rule}", metric, share * num, num)
    for rule in (*RULES, alert_runs.BY_GOLD):
        read = rule.removesuffix(alert_runs.LOOKS_ON)
        reading = [run for run in runs if (run[0], f"reads {read}", results.ALL) in values]
        honest = [run for run in reading if not alert_runs.failed_rules(run[0])]
        if rule != read:  # in these gold is the score itself
            honest = []
        failed = [run for run in reading if read in alert_runs.failed_rules(run[0])]
        if read == "reward hacking":
            failed = [run for run in failed if values[run[0], "gold lost", run[1]] > 1]
        for kind, chosen in (("honest", honest), ("failed", failed)):
            for length in LENGTHS if chosen else ():
                steps = [values.get((run[0], f"first {rule}", run[1])) for run in chosen]
                num = sum(step is not None and step <= length for step in steps)
                found += share_rows(f"runs, {kind}: {rule}", f"{length} rows", num, len(chosen))
    return found


def main(
    out: Path,
    parts: tuple[str, ...] = ("simulated", *alert_runs.METHODS, *alert_runs.COMMANDS),
    sizes: tyro.conf.OmitArgPrefixes[Sizes] = FULL,
) -> None:
    """Measures the default rules.

    Args:
        out: the file of the results, a table; it grows with each part, and what it has is passed
            over.
        parts: simulated histories, populations of a method, or tiny runs of a command.
        sizes: of the experiment.
    """
    rows: list[results.Row] = []
    seconds = 0.0
    if out.exists():
        content = json.loads(out.read_text("utf-8"))
        rows = [row for row in content["rows"] if not row["variant"].startswith(SUMMARY)]
        seconds = content["seconds"]
    started = time.monotonic() - seconds
    done = {(row["variant"], row["seed"]) for row in rows}
    parts_of = itertools.chain.from_iterable(measure(part, sizes, done) for part in parts)
    for found in itertools.chain(parts_of, [[]]):  # the last one writes if all was done before
        rows += found
        logger.info(f"{len(rows)} rows")
        command = "python experiments/alert_rates.py --out alert_rates.json"
        seconds = time.monotonic() - started
        results.write(out, command, seconds, [*summary(rows), *rows], sizes=sizes._asdict())


def measure(part: str, sizes: Sizes, done: set[Any]) -> Iterable[list[results.Row]]:
    """The rows of a part that are not done."""
    if part in alert_runs.METHODS:
        for seed in range(0, sizes.seeds, 4):
            if (alert_runs.variant(part, "gold"), seed) not in done:
                yield alert_runs.population(part, seed, sizes.steps)
    elif part in alert_runs.COMMANDS:
        for seed in range(3):
            if (alert_runs.variant(part, "tiny"), seed) not in done:
                yield alert_runs.tiny(part, seed)
    else:
        for family in families():
            if (family.variant, results.ALL) not in done:
                yield simulate(family, sizes)


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
