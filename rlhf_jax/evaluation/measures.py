"""The figures of an evaluation, one row each, made of responses, scores and labels. No models here.

Intervals are 95%: Wilson's for shares of 0s and 1s, for means the bootstrap over prompts or
comparisons.
"""

import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml

from rlhf_jax import metrics
from rlhf_jax.data.rows import Row
from rlhf_jax.evaluation import texts
from rlhf_jax.evaluation.data import TIE, CustomCategory

_SECTIONS: dict[str, dict[str, int]] = yaml.safe_load(
    Path(__file__).with_name("rewardbench.yaml").read_text("utf-8")
)
Margins = Mapping[str, np.ndarray]
"""``{judge: [N]}``, score of the first (or chosen) response minus that of the second."""


class Figure(NamedTuple):
    """One figure. A value of None has a note that says why."""

    category: str
    metric: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unit: str = ""
    """What n counts: prompts, rows of given answers (a ranking is one), pairs of them, texts."""
    note: str = ""


class Responses(NamedTuple):
    """S responses to each of N prompts."""

    prompts: Sequence[str]  # [N]
    texts: Sequence[Sequence[str]]  # [N][S]
    lengths: np.ndarray  # [N, S] tokens, EOS included
    ended: np.ndarray  # [N, S] whether with EOS
    scores: np.ndarray | None = None  # [N, S], NaN where there is none

    def each(self, function: Callable[[str], Any]) -> np.ndarray:
        """A function's value [N, S] of every text."""
        return np.array([[function(text) for text in row] for row in self.texts])


def helpfulness(
    responses: Responses, key: jax.Array, category: str = "helpfulness"
) -> list[Figure]:
    """Quality, if there are scores, and what responses hold: information, tokens, an end."""
    words = [
        (texts.words(prompt), row)
        for prompt, row in zip(responses.prompts, responses.texts, strict=True)
    ]
    new = [
        [texts.new_content_words(prompt, texts.words(text)) for text in row]
        for prompt, row in words
    ]
    values = {} if responses.scores is None else {"quality": responses.scores}
    density = responses.each(lambda text: texts.lexical_density(texts.words(text)))
    values |= {
        "new_content_words": np.array(new),
        "lexical_density": density,
        "response_tokens": responses.lengths,
    }
    values |= {"ended": responses.ended, "empty": responses.each(lambda text: not text.strip())}
    return [mean(category, metric, value, key) for metric, value in values.items()]


def uncertainty(
    responses: Responses, answerable: Sequence[bool | None], key: jax.Array
) -> list[Figure]:
    """Share of responses that express uncertainty; also of the prompts that can be answered and of
    those that cannot, if the data says which these are.
    """
    hedged = responses.each(texts.expresses_uncertainty)
    values = {"uncertainty": hedged}
    for name, wanted in (("answerable", True), ("unanswerable", False)):
        values[f"uncertainty_{name}"] = hedged[[value is wanted for value in answerable]]
    return [mean("honesty", metric, value, key) for metric, value in values.items() if len(value)]


def harmlessness(responses: Responses, labels: Sequence[str], key: jax.Array) -> list[Figure]:
    """Shares of refusals: of unsafe prompts they are wanted, of safe ones not (Röttger et al.
    2024).
    """
    refused, labelled = responses.each(texts.is_refusal), np.array(labels)
    parts = {
        "refusal_of_unsafe": refused[labelled == "unsafe"],
        "over_refusal_of_safe": refused[labelled == "safe"],
    }
    return [mean("harmlessness", metric, values, key) for metric, values in parts.items()]


def diversity(responses: Responses, key: jax.Array) -> list[Figure]:
    """How responses differ: the first one to each prompt from those to other prompts; with several
    to each prompt, also these among themselves (``_within_prompt``), and how each repeats itself.
    """
    words = [[texts.words(text) for text in row] for row in responses.texts]
    first = [row[0] for row in words]
    distinct = {f"distinct_{n}": texts.distinct_n(first, n) for n in (1, 2, 3)}
    # Without an interval: draws with replacement would repeat texts.
    figures = [
        Figure("diversity", name, value, n=len(first), unit="texts")
        for name, value in distinct.items()
    ]
    bleu, note = (
        (texts.self_bleu(first), "") if len(first) > 1 else ([], "needs two prompts or more")
    )
    figures.append(mean("diversity", "self_bleu", bleu, key, "texts", note))
    values = {"repetition": [[texts.repetition(text) for text in row] for row in words]}
    if len(words[0]) > 1:
        values["distinct_2_within_prompt"] = [[texts.distinct_n(row, 2)] for row in words]
        values["self_bleu_within_prompt"] = [
            [float(np.mean(texts.self_bleu(row)))] for row in words
        ]
    return figures + [mean("diversity", metric, value, key) for metric, value in values.items()]


def preferences(
    margins: Margins, pairs: metrics.Pairs, parts: Sequence[str], key: jax.Array
) -> Iterator[Figure]:
    """How judges agree with the choice, and how well their probabilities are calibrated.

    Args:
      margins: ``{judge: [P]}``, score of the chosen answer minus that of the rejected one.
      parts: [P] names of parts of the data, or ""; for each part there are accuracies alone, and
        their average.
    """
    accuracies: dict[str, dict[str, float]] = {judge: {} for judge in margins}
    for part in ("", *sorted(set(parts) - {""})):
        chosen = np.array([part in ("", name) for name in parts])
        own = metrics.Pairs(*(field[chosen] for field in pairs))
        own = own._replace(groups=np.unique(own.groups, return_inverse=True)[1])
        num_pairs, unit = len(own.groups), "rows" if own.is_single else "pairs"
        category = f"preferences: {part}" if part else "preferences"
        for judge, margin in margins.items():
            right = np.heaviside(margin[chosen], 0.5)
            best = metrics.top_1(right, own)
            ends = metrics.mean_interval(best, _stream(key, category, f"accuracy_{judge}"))
            yield _figure(category, f"accuracy_{judge}", best.mean(), ends, len(best), "rows")
            accuracies[judge] |= {part: best.mean()} if part else {}
            if not own.is_single:
                metric = f"pairwise_accuracy_{judge}"
                ends = metrics.bootstrap_mean(
                    right, _stream(key, category, metric), own.weights, own.groups
                )
                yield _figure(
                    category, metric, np.average(right, weights=own.weights), ends, num_pairs, unit
                )
        calibrated = (
            {}
            if part
            else {judge: margin for judge, margin in margins.items() if judge != "longer"}
        )
        for judge, margin in calibrated.items():  # the margins of "longer" are no log-odds
            place = "preferences" if judge == "reward_model" else "honesty"
            for name, measure in (
                ("ece", metrics.expected_calibration_error),
                ("brier", metrics.brier),
            ):
                metric, statistic = f"{name}_{judge}", functools.partial(measure, margin)
                draws = (own.weights, _stream(key, place, metric), own.groups)
                low, high = metrics.bootstrap_interval(statistic, *draws, centered=name == "ece")
                yield _figure(
                    place,
                    metric,
                    statistic(own.weights),
                    (np.maximum(low, 0), high),
                    num_pairs,
                    unit,
                )
    for judge, values in accuracies.items():
        yield from _average(judge, values)


def _average(judge: str, accuracies: Mapping[str, float]) -> Iterator[Figure]:
    """The mean of accuracies of parts, without RewardBench 2's Ties, whose score there is another
    one; of the subsets of RewardBench the mean of its sections, each a weighted mean of its
    subsets, as on the leaderboard.
    """
    means = {part: value for part, value in accuracies.items() if part != "Ties"}
    sections = {
        name: {part: n for part, n in own.items() if part in means}
        for name, own in _SECTIONS.items()
    }
    if sections := {name: own for name, own in sections.items() if own}:
        weighted = {
            name: ([means[part] for part in own], [*own.values()]) for name, own in sections.items()
        }
        means = {
            name: float(np.average(values, weights=weights))
            for name, (values, weights) in weighted.items()
        }
        for name, value in means.items():
            yield Figure(
                f"preferences: {name}",
                f"average_{judge}",
                value,
                n=len(sections[name]),
                unit="parts",
            )
    if len(means) > 1:
        value, note = float(np.mean([*means.values()])), f"mean of {', '.join(means)}"
        yield Figure(
            "preferences", f"average_{judge}", value, n=len(means), unit="parts", note=note
        )


def agreement(margins: Margins, annotated: Sequence[Row], key: jax.Array) -> list[Figure]:
    """How judges agree with the annotators' majority, and the annotators among themselves.

    margins: ``{judge: [N]}``, score of the first response minus that of the second; 0 is a tie.
        Rows without a majority count only among the annotators.
    """
    majority = np.array([-1 if row.majority is None else row.majority for row in annotated])
    judged = majority >= 0
    note = "" if judged.all() else f"{int((~judged).sum())} rows have no majority"
    truth, figures = majority[judged], []
    for judge, margin in margins.items():
        verdict = np.where(margin > 0, 1, np.where(margin < 0, 2, TIE))[judged]
        figures.append(mean("agreement", f"agreement_{judge}", verdict == truth, key, "rows", note))
        decided = (verdict == truth)[truth != TIE]
        figures.append(mean("agreement", f"agreement_decided_{judge}", decided, key, "rows", note))
        figures.append(_kappa(f"kappa_{judge}", [(verdict, truth)], key, note))
    if len({len(row.votes) for row in annotated}) == 1 and len(annotated[0].votes) > 1:
        pairs = list(itertools.combinations(np.array([row.votes for row in annotated]).T, 2))
        same = np.mean([a == b for a, b in pairs], axis=0)
        note = f"mean over {len(pairs)} pairs of annotators"
        figures.append(mean("agreement", "agreement_of_annotators", same, key, "rows", note))
        figures.append(_kappa("kappa_of_annotators", pairs, key, note))
    return figures


def win_rate(scores: np.ndarray, against: np.ndarray, key: jax.Array, name: str) -> list[Figure]:
    """Share of pairs of responses to one prompt, one from each run, in which the first run's scores
    higher.

    scores, against: [N, S] of the same prompts; ties count half. ``name``: the other run.
    """
    wins = np.heaviside(
        scores[:, :, None] - against[:, None, :], 0.5
    )  # NaN where one of the two is
    values = {"win_rate": wins.reshape(len(wins), -1), "score_difference": scores - against}
    return [
        mean("win rate", metric, value, key, note=f"against {name}")
        for metric, value in values.items()
    ]


def custom(name: str, category: CustomCategory, responses: Responses, key: jax.Array) -> Figure:
    """Share of the responses in which the category's pattern is found, or their mean score."""
    if responses.scores is not None:
        return mean(name, "score", responses.scores, key, note=category.score or "")
    found = responses.each(lambda text: category.pattern.search(text) is not None)
    return mean(name, "patterns" if category.patterns else "keywords", found, key)


def mean(
    category: str, metric: str, values: Any, key: jax.Array, unit: str = "prompts", note: str = ""
) -> Figure:
    """The mean of values [N] or [N, S], whose rows are the units of the interval; a NaN is no value
    and not counted. Bools are a share, for which `metrics.mean_interval` may be Wilson's.
    """
    array = np.asarray(values, np.float64)
    array = array.reshape(len(array), -1) if array.size else np.zeros((0, 1))
    kept = array[~np.isnan(array).all(axis=1)]
    if not len(kept):
        return Figure(category, metric, unit=unit, note=note or "there is no such row")
    means = np.nanmean(kept, axis=1)
    interval = metrics.mean_interval if np.asarray(values).dtype == bool else metrics.bootstrap_mean
    ends = interval(means, _stream(key, category, metric))
    return _figure(category, metric, means.mean(), ends, len(kept), unit, note)


def _kappa(
    metric: str, judges: Sequence[tuple[np.ndarray, np.ndarray]], key: jax.Array, note: str
) -> Figure:
    """The mean kappa of pairs of judges."""

    def statistic(weights: np.ndarray) -> float:
        return float(np.mean([metrics.cohen_kappa(a, b, weights) for a, b in judges]))

    count = len(judges[0][0])
    value = statistic(np.ones(count)) if count else float("nan")
    if np.isnan(value):
        note = "both say one and the same to all rows" if count else note
        return Figure("agreement", metric, n=count, unit="rows", note=note)
    ends = metrics.bootstrap_interval(statistic, np.ones(count), _stream(key, "agreement", metric))
    return _figure("agreement", metric, value, ends, count, "rows", note)


def _figure(
    category: str, metric: str, value: float, ends: Sequence, n: int, unit: str, note: str = ""
) -> Figure:
    low, high = (None if np.isnan(end) else float(end) for end in ends)
    return Figure(category, metric, float(value), low, high, n, unit, note)


def _stream(key: jax.Array, category: str, metric: str) -> jax.Array:
    """The figure's own key, so that no figure depends on which others are made."""
    return jax.random.fold_in(key, zlib.crc32(f"{category}/{metric}".encode()))
