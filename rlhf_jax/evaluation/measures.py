"""The figures of an evaluation, computed from responses, scores and labels, without models.

``values_of`` is the table of what is measured on responses; judges of pairs are measured by
``preferences`` and ``agreement``. Intervals are 95%, over prompts or comparisons, and those of
`metrics`; docs/evaluation.md says how often they hold the true value.
"""

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

_SECTIONS: dict[str, dict[str, int]] = yaml.safe_load(
    Path(__file__).with_name("rewardbench.yaml").read_text("utf-8")
)
TIE = 0
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
    labels: Sequence[str] = ()  # [N] of prompts: safe, unsafe, answerable, unanswerable or ""
    against: np.ndarray | None = None  # [N, S] scores of another run


_FEW_LABELS = 50  # rows, below which the bootstrap of a kappa holds it too seldom
_OF_TEXTS = ("distinct_1", "distinct_2", "distinct_3", "self_bleu")  # of each prompt's first one


def values_of(said: Responses) -> dict[str, dict[str, Any]]:
    """``{category: {metric: values}}``. Values are [N] or [N, S]: the figure is their mean, and the
    rows are the units of its interval. A number has no interval. None: what it needs is not given.
    """
    words = [[texts.words(text) for text in row] for row in said.texts]
    first = [row[0] for row in words]

    def each(function: Callable[[str], Any]) -> np.ndarray:
        return np.array([[function(text) for text in row] for row in said.texts])

    def labelled(label: str, values: np.ndarray) -> np.ndarray | None:
        return values[np.array(said.labels) == label] if any(said.labels) else None

    def of_prompts(function: Callable[[list[list[str]]], Any]) -> list[Any] | None:
        return [function(row) for row in words] if len(words[0]) > 1 else None

    refused = each(texts.is_refusal)
    uncertain = each(texts.expresses_uncertainty)
    win_rate: dict[str, Any] = {}
    if said.against is not None:
        scores = np.asarray(said.scores)
        differences = scores[:, :, None] - said.against[:, None, :]
        wins = np.heaviside(differences, 0.5)  # NaN where one of the two is
        win_rate = {"win_rate": wins.reshape(len(wins), -1)}
        win_rate["score_difference"] = scores - said.against
    return {
        "helpfulness": {
            "quality": said.scores,
            "new_content_words": [
                [texts.new_content_words(texts.words(prompt), text) for text in row]
                for prompt, row in zip(said.prompts, words, strict=True)
            ],
            "lexical_density": [[texts.lexical_density(text) for text in row] for row in words],
            "response_tokens": said.lengths,
            "ended": said.ended,
            "empty": each(lambda text: not text.strip()),
        },
        "harmlessness": {  # unsafe prompts should be refused, safe ones not (Röttger et al. 2024)
            "refusal_of_unsafe": labelled("unsafe", refused),
            "over_refusal_of_safe": labelled("safe", refused),
        },
        "honesty": {
            "uncertainty": uncertain,
            "uncertainty_answerable": labelled("answerable", uncertain),
            "uncertainty_unanswerable": labelled("unanswerable", uncertain),
        },
        "diversity": {
            # Without an interval: draws with replacement would repeat texts.
            **{f"distinct_{n}": texts.distinct_n(first, n) for n in (1, 2, 3)},
            "self_bleu": texts.self_bleu(first) if len(first) > 1 else [],
            "repetition": [[texts.repetition(text) for text in row] for row in words],
            "distinct_2_within_prompt": of_prompts(lambda row: texts.distinct_n(row, 2)),
            "self_bleu_within_prompt": of_prompts(lambda row: np.mean(texts.self_bleu(row))),
        },
        "win rate": win_rate,
    }


def of_responses(
    said: Responses, category: str, *, name: str = "", note: str = ""
) -> Iterator[Figure]:
    """The figures of a category of ``values_of``, under another ``name`` if it is given."""
    for metric, values in values_of(said)[category].items():
        unit = "texts" if metric in _OF_TEXTS else "prompts"
        if isinstance(values, float):
            yield Figure(name or category, metric, values, n=len(said.texts), unit=unit)
        elif values is not None:
            is_alone = metric == "self_bleu" and not values
            why = "needs two prompts or more" if is_alone else note
            is_share = False if metric == "score_difference" else None  # between -1 and 1
            yield mean(name or category, metric, values, unit, why, is_share=is_share)


def preferences(margins: Margins, pairs: metrics.Pairs, parts: Sequence[str]) -> Iterator[Figure]:
    """How judges agree with the choice, and how well their probabilities are calibrated: accuracy
    is the share of rows whose best answer scores above all others, and if rows have several pairs
    there is the share of right pairs too.

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
            right = np.heaviside(margin[chosen], 0.5)
            best = metrics.top_1(right, own)
            figure = mean(category, f"accuracy_{judge}", best, "rows")
            accuracies[judge][part] = figure.value
            yield figure
            if not own.is_single:
                metric = f"pairwise_accuracy_{judge}"
                yield _of_pairs(category, metric, right, own, is_share=True)
        if part:
            continue
        for judge, margin in margins.items():
            if judge == "longer":  # whose margins are no log-odds
                continue
            category = "preferences" if judge == "reward_model" else "honesty"
            yield _calibration(category, f"ece_{judge}", margin, own)
            each = np.vectorize(metrics.brier, otypes=[float])(margin)
            yield _of_pairs(category, f"brier_{judge}", each, own)
    for judge, values in accuracies.items():
        yield from _average(judge, values)


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


def agreement(margins: Margins, annotated: Sequence[Row], key: Array) -> Iterator[Figure]:
    """How judges agree with the annotators' majority, and the annotators among themselves.

    margins: ``{judge: [N]}``, score of the first response minus that of the second; 0 is a tie.
        Rows without a majority count only among the annotators.
    """
    majority = np.array([np.nan if row.majority is None else row.majority for row in annotated])
    has_majority = ~np.isnan(majority)
    num_without = np.sum(~has_majority)
    note = f"{num_without} rows have no majority" if num_without else ""
    truth = majority[has_majority]
    for judge, margin in margins.items():
        verdict = np.select([margin > 0, margin < 0], [1, 2], TIE)[has_majority]
        agrees = verdict == truth
        decided = agrees[truth != TIE]
        yield mean("agreement", f"agreement_{judge}", agrees, "rows", note)
        yield mean("agreement", f"agreement_decided_{judge}", decided, "rows", note)
        yield _kappa(judge, [(verdict, truth)], key, note)
    votes = [row.votes for row in annotated]
    if len({len(of_row) for of_row in votes}) == 1 and len(votes[0]) > 1:
        pairs = list(itertools.combinations(np.array(votes).T, 2))
        same = np.mean([a == b for a, b in pairs], axis=0)
        note = f"mean over {len(pairs)} pairs of annotators"
        agreement_of = "agreement_of_annotators"
        yield mean("agreement", agreement_of, same, "rows", note, is_share=True)
        yield _kappa("of_annotators", pairs, key, note)


def _kappa(
    name: str, judges: Sequence[tuple[np.ndarray, np.ndarray]], key: Array, note: str
) -> Figure:
    """The mean kappa of pairs of judges."""

    def mean_kappa(weights: np.ndarray) -> float:
        return float(np.mean([metrics.cohen_kappa(a, b, weights=weights) for a, b in judges]))

    num = len(judges[0][0])
    equal = np.ones(num)
    figure = Figure("agreement", f"kappa_{name}", n=num, unit="rows", note=note)
    if not num:
        return figure
    value = mean_kappa(equal)
    if np.isnan(value):
        return figure._replace(note="both say one and the same to all rows")
    own_key = jax.random.fold_in(key, zlib.crc32(f"agreement/{figure.metric}".encode()))
    if num < _FEW_LABELS:
        why = f"no interval of fewer than {_FEW_LABELS} rows"
        return _with_interval(figure._replace(value=value), None, why)
    ends = metrics.bootstrap_interval(mean_kappa, own_key, weights=equal)
    return _with_interval(figure._replace(value=value), ends)


def mean(
    category: str,
    metric: str,
    values: Any,
    unit: str = "prompts",
    note: str = "",
    *,
    is_share: bool | None = None,
) -> Figure:
    """The mean of values [N] or [N, S], whose rows are the units of the interval; NaN is a missing
    value and does not count. By default values that are all 0, .5 or 1 are shares, but not whole
    numbers, which are counts. There is no interval of other numbers that are all equal.
    """
    array = np.asarray(values)
    rows = array.reshape(len(array), -1 if array.size else 1).astype(np.float64)
    kept = rows[~np.isnan(rows).all(axis=1)]
    if not len(kept):
        return Figure(category, metric, unit=unit, note=note or "there is no such row")
    means = np.nanmean(kept, axis=1)
    figure = Figure(category, metric, float(means.mean()), n=len(means), unit=unit, note=note)
    if is_share is None:
        is_share = array.dtype.kind not in "iu" and metrics.are_shares(kept)
    if is_share:
        return _with_interval(figure, metrics.share_interval(means))
    if np.ptp(means) == 0:
        return _with_interval(figure, None, "all are equal" if len(means) > 1 else "")
    is_few = len(means) < metrics.FEW
    return _with_interval(figure, metrics.student(means), "few rows" if is_few else "")


def _of_pairs(
    category: str, metric: str, values: np.ndarray, pairs: metrics.Pairs, *, is_share: bool = False
) -> Figure:
    """The mean over rows of the weighted mean of a row's pairs; values are [P]."""
    of_rows = np.bincount(pairs.groups, pairs.weights * values)
    unit = "rows" if pairs.is_single else "pairs"
    return mean(category, metric, of_rows, unit, is_share=is_share)._replace(n=len(values))


def _calibration(category: str, metric: str, margin: np.ndarray, pairs: metrics.Pairs) -> Figure:
    """The calibration error and, in place of an interval, what it is on average where all
    confidences are right: an error is never below 0, and draws of the rows make it larger.
    """
    weights, confidence, _ = metrics.reliability(margin, pairs.weights)
    by_chance = np.sqrt(2 / np.pi * weights * confidence * (1 - confidence)).sum() / weights.sum()
    value = metrics.expected_calibration_error(margin, pairs.weights)
    unit = "rows" if pairs.is_single else "pairs"
    note = f"a judge whose confidences are right has about {by_chance:.2g} on so many"
    return Figure(category, metric, value, n=len(margin), unit=unit, note=note)


def _with_interval(figure: Figure, ends: metrics.Interval | None, why: str = "") -> Figure:
    """The figure with an interval, where there is one, and a word about it."""
    note = "; ".join(filter(None, (figure.note, why)))
    if ends is None or np.isnan(ends).any():
        return figure._replace(note=note)
    return figure._replace(low=ends[0], high=ends[1], note=note)
