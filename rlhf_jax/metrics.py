"""Figures about scores that a person reads: how well they agree with preferences, and what they may
be exploited by; and the intervals of such figures.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

Array = np.ndarray
Interval = tuple[float, float]
Groups = np.ndarray | None
DRAWS = 1000  # of a bootstrap


class Pairs(NamedTuple):
    """P pairs of answers, the first one preferred. Those of a ranking, or of a best one of several,
    are one row.
    """

    groups: Array  # [P] number of the row, from 0
    chosen: Array  # [P] a label of the preferred answer, which tells the answers of a row apart
    rejected: Array  # [P]
    weights: Array  # [P] float64; those of a row add up to 1

    @property
    def is_single(self) -> bool:
        """Whether each row is one pair."""
        return bool(self.groups.max(initial=-1) + 1 == len(self.groups))


def top_1(right: Array, pairs: Pairs) -> Array:
    """[G] whether a best answer of each row scores above all others: MC1 of TruthfulQA (Lin et al.
    2022).

    right: [P] 1 where the pair's chosen answer scores higher, 0.5 for a tie. A best answer is one
    that its row rejects in no pair; of several the one that fares best counts.
    """
    span = max(pairs.chosen.max(initial=0), pairs.rejected.max(initial=0)) + 1
    answers, place = np.unique(pairs.groups * span + pairs.chosen, return_inverse=True)
    least, values = np.ones(len(answers)), np.zeros(pairs.groups.max(initial=-1) + 1)
    np.minimum.at(least, place, right)
    best = ~np.isin(answers, pairs.groups * span + pairs.rejected)
    np.maximum.at(values, answers[best] // span, least[best])
    return values


def preference_report(
    scores: Array, best: Array, lengths: Array, weights: Array | None = None
) -> dict[str, float]:
    """How the scores of K answers agree with the choice of the best one (ALGORITHMS 2).

    scores, lengths: [N, K], length the response tokens, 0 where an answer is absent; best: [N] its
    number. weights: [N] what each row counts for; None: all the same.

    Returns loss (``-log_softmax(scores)[best]`` in nats; of two answers Bradley-Terry) and, of the
    best answer against the highest-scored other one, accuracy (ties count half), margin (mean), ece
    (expected calibration error over the confidence max(p, 1 - p), p = sigmoid(margin)) and
    length_correlation (Spearman, score against length over both, unweighted); length_accuracy is
    that of a judge who takes the longest answer.
    """
    row, rivals = np.arange(len(scores)), rival(scores, best, lengths)
    scores = np.asarray(scores, np.float64)
    chosen, others = scores[row, best], scores[row, rivals]
    losses = np.logaddexp.reduce(np.where(lengths > 0, scores - chosen[:, None], -np.inf), axis=1)
    is_best = np.arange(scores.shape[1])[None, :] == best[:, None]
    both = np.concatenate([lengths[row, best], lengths[row, rivals]])
    return {
        "loss": float(np.average(losses, weights=weights)),
        "accuracy": win_rate(chosen, others, weights),
        "margin": float(np.average(chosen - others, weights=weights)),
        "ece": expected_calibration_error(chosen - others, weights=weights),
        "length_accuracy": win_rate(
            lengths[row, best], np.where(is_best, 0, lengths).max(axis=1), weights
        ),
        "length_correlation": spearman(np.concatenate([chosen, others]), both),
    }


def rival(scores: Array, best: Array, lengths: Array) -> Array:
    """[N] number of the highest-scored answer beside the best one; arguments as in
    ``preference_report``.
    """
    others = np.where(lengths > 0, scores, -np.inf)
    others[np.arange(len(scores)), best] = -np.inf
    return others.argmax(axis=1)


def target_report(
    scores: Array, targets: Array, lengths: Array, weights: Array | None = None
) -> dict[str, float]:
    """How scores [N, K] of K answers to each of N prompts agree with target scores [N, K].

    lengths: [N, K] response tokens, 0 where an answer is absent.
    weights: [N] what each prompt's answers and pairs count for; None: all the same.

    Returns loss (mean squared error over the answers), length_correlation and target_correlation
    (Spearman, score against length and against target, unweighted). Where two answers to one prompt
    differ in their targets, also accuracy, margin, ece and length_accuracy of
    ``preference_report``, over all such pairs.
    """
    present = lengths > 0
    weights = np.ones(len(scores)) if weights is None else weights
    errors = (np.asarray(scores, np.float64) - targets)[present] ** 2
    report = {
        "loss": float(
            np.average(errors, weights=np.broadcast_to(weights[:, None], scores.shape)[present])
        ),
        "length_correlation": spearman(scores[present], lengths[present]),
        "target_correlation": spearman(scores[present], targets[present]),
    }
    differ = (targets[:, :, None] > targets[:, None, :]) & present[:, :, None] & present[:, None, :]
    row, better, worse = np.nonzero(differ)
    if not len(row):
        return report
    pairs = (
        np.stack([values[row, better], values[row, worse]], axis=1) for values in (scores, lengths)
    )
    return (
        preference_report(next(pairs), np.zeros(len(row), np.int64), next(pairs), weights[row])
        | report
    )


def reliability(margin: Array, weights: Array | None = None) -> tuple[Array, Array, Array]:
    """Weight, mean confidence and accuracy of the pairs in each of ten equal bins of the confidence
    in [.5, 1] (Guo et al. 2017), [bins] each, without empty bins.

    margin: [N] score of the chosen answer minus that of the rejected one; the confidence is max(p,
    1 - p) with p = sigmoid(margin), and a prediction is right if the margin is positive (half right
    at 0). weights: [N] of the pairs; None: all the same.
    """
    confidence, right = _sigmoid(np.abs(margin)), np.heaviside(margin, 0.5)
    weights = np.ones(len(margin)) if weights is None else weights
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    counts, *sums = (np.bincount(bins, weights * values) for values in (1.0, confidence, right))
    used = counts > 0
    return counts[used], sums[0][used] / counts[used], sums[1][used] / counts[used]


def expected_calibration_error(margin: Array, weights: Array | None = None) -> float:
    """Mean ``|accuracy - confidence|`` over the bins of ``reliability``, by their weight."""
    counts, confidence, accuracy = reliability(margin, weights)
    return float(np.average(np.abs(accuracy - confidence), weights=counts))


def spearman(x: Array, y: Array) -> float:
    """Rank correlation of two [N] arrays; 0 if either is constant, since nothing then varies
    together.
    """
    import scipy.stats  # a quarter of the import time of the command line

    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(x, y).statistic)


def win_rate(scores: Array, against: Array, weights: Array | None = None) -> float:
    """Share of rows [N], weighted by ``weights`` [N] if given, where ``scores`` is higher; ties
    count half.
    """
    scores, against = np.asarray(scores), np.asarray(against)
    return float(np.average((scores > against) + 0.5 * (scores == against), weights=weights))


def brier(margin: Array, weights: Array | None = None) -> float:
    """Mean ``(1 - p)^2`` of the probability p = sigmoid(margin) given to the chosen answer (Brier
    1950, of one of two outcomes): 0 is perfect, 0.25 what p = 1/2 gets.

    margin: [N] score of the chosen answer minus that of the rejected one; weights: [N] or None.
    """
    return float(np.average(_sigmoid(-np.asarray(margin)) ** 2, weights=weights))


def cohen_kappa(labels: Array, others: Array, weights: Array | None = None) -> float:
    """Agreement of two judges' labels [N] beyond chance, ``(observed - expected) / (1 - expected)``
    (Cohen 1960).

    1 is full agreement, 0 that of judges who draw from their own shares of the labels. NaN where
    both give one and the same label to every row, so that chance alone agrees in all of them.
    """
    labels, others = np.asarray(labels), np.asarray(others)
    share = functools.partial(np.average, weights=weights)
    observed = share(labels == others)
    expected = sum(share(labels == label) * share(others == label) for label in np.unique(labels))
    return float("nan") if expected == 1.0 else float((observed - expected) / (1 - expected))


def mean_interval(values: Array, key: jax.Array) -> Interval:
    """95% interval of the mean of values [N] in [0, 1]: Wilson's (1927) if all are 0 or 1, else
    ``bootstrap_mean``.
    """
    if np.isin(values, (0, 1)).all():
        import scipy.stats

        ends = scipy.stats.binomtest(int(np.sum(values)), len(values)).proportion_ci(
            method="wilson"
        )
        return float(ends.low), float(ends.high)
    return bootstrap_mean(values, key)


def bootstrap_mean(
    values: Array, key: jax.Array, weights: Array | None = None, groups: Groups = None
) -> Interval:
    """``bootstrap_interval`` of the mean of values [N]; weights None: all the same."""
    weights = np.ones(len(values)) if weights is None else weights
    return bootstrap_interval(
        lambda drawn: float(np.average(values, weights=drawn)), weights, key, groups
    )


def bootstrap_interval(
    statistic: Callable[[Array], float],
    weights: Array,
    key: jax.Array,
    groups: Groups = None,
    centered: bool = False,
) -> Interval:
    """Percentile bootstrap (Efron 1979): the 2.5th and 97.5th percentile of a statistic over draws
    with replacement.

    Args:
      statistic: of weights [N] of the N rows, 0 for those that a draw leaves out. Draws for which
        it is NaN are left out.
      weights: [N] what each row counts for.
      key: the same key draws the same.
      groups: [N] numbers from 0; rows of one number, such as the pairs of one ranking, are drawn
        together. None: each row for itself.
      centered: moves the draws so that their mean is the statistic of the rows themselves, for one
        that draws with replacement inflate, such as a calibration error.

    Returns:
      (NaN, NaN) for fewer than two groups, which say nothing of how they vary.
    """
    groups = np.arange(len(weights)) if groups is None else groups
    num_groups = int(groups.max(initial=-1)) + 1
    if num_groups < 2:
        return float("nan"), float("nan")
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    rows = (generator.integers(num_groups, size=num_groups) for _ in range(DRAWS))
    draws = [statistic(weights * np.bincount(row, minlength=num_groups)[groups]) for row in rows]
    low, high = np.nanpercentile(draws, [2.5, 97.5]) - (
        np.nanmean(draws) - statistic(weights) if centered else 0.0
    )
    return float(low), float(high)


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -np.asarray(x, np.float64)))
