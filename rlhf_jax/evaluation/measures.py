"""The figures of an evaluation, computed from responses, scores and labels, without models.

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
from jax import Array

from rlhf_jax import metrics
from rlhf_jax.data.rows import Row
from rlhf_jax.evaluation import texts
from rlhf_jax.evaluation.data import TIE, CustomCategory

_SECTIONS: dict[str, dict[str, int]] = yaml.safe_load(
    Path(__file__).with_name("rewardbench.yaml").read_text("utf-8")
)
Margins = Mapping[str, np.ndarray]
"""``{judge: [N]}``, score of the first (or chosen) response minus the score of the second."""


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


def helpfulness(responses: Responses, key: Array, category: str = "helpfulness") -> list[Figure]:
    """Quality, if there are scores; and the information, the tokens and the end of responses."""
    new_words = []
    for prompt, row in zip(responses.prompts, responses.texts, strict=True):
        asked = texts.words(prompt)
        new_words.append([texts.new_content_words(asked, texts.words(text)) for text in row])
    values = {
        "new_content_words": np.array(new_words),
        "lexical_density": responses.each(lambda text: texts.lexical_density(texts.words(text))),
        "response_tokens": responses.lengths,
        "ended": responses.ended,
        "empty": responses.each(lambda text: not text.strip()),
    }
    if responses.scores is not None:
        values = {"quality": responses.scores, **values}
    return [mean(category, metric, value, key) for metric, value in values.items()]


def uncertainty(
    responses: Responses, answerable: Sequence[bool | None], key: Array
) -> list[Figure]:
    """Share of responses that express uncertainty, and the same for prompts that can be answered
    and for prompts that cannot, if the data has this label.
    """
    uncertain = responses.each(texts.expresses_uncertainty)
    values = {
        "uncertainty": uncertain,
        "uncertainty_answerable": uncertain[[value is True for value in answerable]],
        "uncertainty_unanswerable": uncertain[[value is False for value in answerable]],
    }
    return [mean("honesty", metric, value, key) for metric, value in values.items() if len(value)]


def harmlessness(responses: Responses, labels: Sequence[str], key: Array) -> list[Figure]:
    """Shares of refused prompts: unsafe ones, which should be refused, and safe ones, which should
    not (Röttger et al. 2024).
    """
    refused = responses.each(texts.is_refusal)
    labelled = np.array(labels)
    parts = {
        "refusal_of_unsafe": refused[labelled == "unsafe"],
        "over_refusal_of_safe": refused[labelled == "safe"],
    }
    return [mean("harmlessness", metric, values, key) for metric, values in parts.items()]


def diversity(responses: Responses, key: Array) -> list[Figure]:
    """How much the first responses to different prompts differ, how much each response repeats
    itself, and, with several responses to a prompt, how much these differ (``_within_prompt``).
    """
    words = [[texts.words(text) for text in row] for row in responses.texts]
    first = [row[0] for row in words]
    figures = []
    for n in (1, 2, 3):  # without an interval: draws with replacement would repeat texts
        value = texts.distinct_n(first, n)
        figures.append(Figure("diversity", f"distinct_{n}", value, n=len(first), unit="texts"))
    if len(first) > 1:
        figures.append(mean("diversity", "self_bleu", texts.self_bleu(first), key, "texts"))
    else:
        note = "needs two prompts or more"
        figures.append(Figure("diversity", "self_bleu", unit="texts", note=note))
    repeated = [[texts.repetition(text) for text in row] for row in words]
    values: dict[str, Any] = {"repetition": repeated}
    if len(words[0]) > 1:
        values["distinct_2_within_prompt"] = [texts.distinct_n(row, 2) for row in words]
        values["self_bleu_within_prompt"] = [np.mean(texts.self_bleu(row)) for row in words]
    return figures + [mean("diversity", metric, value, key) for metric, value in values.items()]


def preferences(
    margins: Margins, pairs: metrics.Pairs, parts: Sequence[str], key: Array
) -> Iterator[Figure]:
    """How judges agree with the choice, and how well their probabilities are calibrated.

    Args:
      margins: ``{judge: [P]}``, score of the chosen answer minus that of the rejected one.
      parts: [P] names of parts of the data, or ""; for each part there are accuracies alone, and
        their average.
    """
    accuracies: dict[str, dict[str, Any]] = {judge: {} for judge in margins}
    for part in ("", *sorted(set(parts) - {""})):
        chosen = np.array([part in ("", name) for name in parts])
        own = metrics.Pairs(*(field[chosen] for field in pairs))
        own = own._replace(groups=np.unique(own.groups, return_inverse=True)[1])
        category = f"preferences: {part}" if part else "preferences"
        for judge, margin in margins.items():
            figures = _accuracies(category, judge, margin[chosen], own, key)
            accuracies[judge][part] = figures[0].value
            yield from figures
        for judge, margin in margins.items():
            if not part and judge != "longer":  # whose margins are no log-odds
                yield from _calibration(judge, margin, own, key)
    for judge, values in accuracies.items():
        yield from _average(judge, values)


def _accuracies(
    category: str, judge: str, margin: np.ndarray, pairs: metrics.Pairs, key: Array
) -> list[Figure]:
    """The share of rows whose best answer scores above all others; if rows have several pairs, the
    share of right pairs too.
    """
    right = np.heaviside(margin, 0.5)
    metric = f"accuracy_{judge}"
    best = metrics.top_1(right, pairs)
    ends = metrics.mean_interval(best, _stream(key, category, metric))
    figures = [_figure(category, metric, best.mean(), ends, len(best), "rows")]
    if not pairs.is_single:
        metric = f"pairwise_{metric}"
        own_key = _stream(key, category, metric)
        ends = metrics.bootstrap_mean(right, own_key, weights=pairs.weights, groups=pairs.groups)
        mean_right = np.average(right, weights=pairs.weights)
        figures.append(_figure(category, metric, mean_right, ends, len(right), "pairs"))
    return figures


def _calibration(
    judge: str, margin: np.ndarray, pairs: metrics.Pairs, key: Array
) -> Iterator[Figure]:
    category = "preferences" if judge == "reward_model" else "honesty"
    unit = "rows" if pairs.is_single else "pairs"
    measures = {"ece": metrics.expected_calibration_error, "brier": metrics.brier}
    for name, measure in measures.items():
        metric = f"{name}_{judge}"
        statistic = functools.partial(measure, margin)
        own_key = _stream(key, category, metric)
        low, high = metrics.bootstrap_interval(
            statistic, own_key, weights=pairs.weights, groups=pairs.groups, centered=name == "ece"
        )
        ends = (np.maximum(low, 0), high)
        value = statistic(pairs.weights)
        yield _figure(category, metric, value, ends, len(pairs.groups), unit)


def _average(judge: str, accuracies: Mapping[str, float]) -> Iterator[Figure]:
    """The mean of the accuracies of the parts. RewardBench 2's Ties are left out: its leaderboard
    scores them in another way. The subsets of RewardBench form sections, each a weighted mean, of
    which the average is the mean, as on its leaderboard.
    """
    metric = f"average_{judge}"
    means = {part: value for part, value in accuracies.items() if part not in ("", "Ties")}
    of_sections = {}
    for name, sizes in _SECTIONS.items():
        own = [part for part in sizes if part in means]
        if own:
            weights = [sizes[part] for part in own]
            value = float(np.average([means[part] for part in own], weights=weights))
            of_sections[name] = value
            yield Figure(f"preferences: {name}", metric, value, n=len(own), unit="parts")
    means = of_sections or means
    if len(means) > 1:
        value = float(np.mean([*means.values()]))
        note = f"mean of {', '.join(means)}"
        yield Figure("preferences", metric, value, n=len(means), unit="parts", note=note)


def agreement(margins: Margins, annotated: Sequence[Row], key: Array) -> list[Figure]:
    """How judges agree with the annotators' majority, and the annotators among themselves.

    margins: ``{judge: [N]}``, score of the first response minus that of the second; 0 is a tie.
        Rows without a majority count only among the annotators.
    """
    majority = np.array([np.nan if row.majority is None else row.majority for row in annotated])
    has_majority = ~np.isnan(majority)
    num_without = np.sum(~has_majority)
    note = f"{num_without} rows have no majority" if num_without else ""
    truth = majority[has_majority]
    figures = []
    for judge, margin in margins.items():
        verdict = np.select([margin > 0, margin < 0], [1, 2], TIE)[has_majority]
        agrees = verdict == truth
        decided = agrees[truth != TIE]
        figures += [
            mean("agreement", f"agreement_{judge}", agrees, key, "rows", note),
            mean("agreement", f"agreement_decided_{judge}", decided, key, "rows", note),
            _kappa(f"kappa_{judge}", [(verdict, truth)], key, note),
        ]
    votes = [row.votes for row in annotated]
    if len({len(of_row) for of_row in votes}) == 1 and len(votes[0]) > 1:
        pairs = list(itertools.combinations(np.array(votes).T, 2))
        same = np.mean([a == b for a, b in pairs], axis=0)
        note = f"mean over {len(pairs)} pairs of annotators"
        figures.append(mean("agreement", "agreement_of_annotators", same, key, "rows", note))
        figures.append(_kappa("kappa_of_annotators", pairs, key, note))
    return figures


def win_rate(scores: np.ndarray, *, against: np.ndarray, key: Array, name: str) -> list[Figure]:
    """Share of pairs of responses to one prompt, one from each run, in which the first run's scores
    higher.

    scores, against: [N, S] of the same prompts; ties count half. ``name``: the other run.
    """
    differences = scores[:, :, None] - against[:, None, :]
    wins = np.heaviside(differences, 0.5)  # NaN where one of the two is
    note = f"against {name}"
    return [
        mean("win rate", "win_rate", wins.reshape(len(wins), -1), key, note=note),
        mean("win rate", "score_difference", scores - against, key, note=note),
    ]


def custom(name: str, category: CustomCategory, responses: Responses, key: Array) -> Figure:
    """Share of the responses in which the category's pattern is found, or their mean score."""
    if responses.scores is not None:
        return mean(name, "score", responses.scores, key, note=category.score or "")
    found = responses.each(lambda text: category.pattern.search(text) is not None)
    metric = "patterns" if category.patterns else "keywords"
    return mean(name, metric, found, key)


def mean(
    category: str, metric: str, values: Any, key: Array, unit: str = "prompts", note: str = ""
) -> Figure:
    """The mean of values [N] or [N, S], whose rows are the units of the interval; NaN is a missing
    value and does not count. Bools are a share, for which `metrics.mean_interval` may be Wilson's.
    """
    array = np.asarray(values)
    rows = array.reshape(len(array), -1 if array.size else 1).astype(np.float64)
    kept = rows[~np.isnan(rows).all(axis=1)]
    if not len(kept):
        return Figure(category, metric, unit=unit, note=note or "there is no such row")
    means = np.nanmean(kept, axis=1)
    interval = metrics.mean_interval if array.dtype == bool else metrics.bootstrap_mean
    ends = interval(means, _stream(key, category, metric))
    return _figure(category, metric, means.mean(), ends, len(kept), unit, note)


def _kappa(
    metric: str, judges: Sequence[tuple[np.ndarray, np.ndarray]], key: Array, note: str
) -> Figure:
    """The mean kappa of pairs of judges."""
    count = len(judges[0][0])
    if not count:
        return Figure("agreement", metric, unit="rows", note=note)

    def statistic(weights: np.ndarray) -> float:
        return float(np.mean([metrics.cohen_kappa(a, b, weights=weights) for a, b in judges]))

    equal = np.ones(count)
    value = statistic(equal)
    if np.isnan(value):
        note = "both say one and the same to all rows"
        return Figure("agreement", metric, n=count, unit="rows", note=note)
    ends = metrics.bootstrap_interval(statistic, _stream(key, "agreement", metric), weights=equal)
    return _figure("agreement", metric, value, ends, count, "rows", note)


def _figure(
    category: str, metric: str, value: float, ends: Sequence, n: int, unit: str, note: str = ""
) -> Figure:
    low, high = (None if np.isnan(end) else float(end) for end in ends)
    return Figure(category, metric, float(value), low, high, n, unit, note)


def _stream(key: Array, category: str, metric: str) -> Array:
    """The figure's own key, so that no figure depends on which other figures are computed."""
    return jax.random.fold_in(key, zlib.crc32(f"{category}/{metric}".encode()))
