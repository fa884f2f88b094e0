"""Measures of scores: how well they agree with preferences, which shortcuts they reward, and the
intervals of these measures.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

Array = np.ndarray
Interval = tuple[float, float]
Groups = np.ndarray | None
Weights = np.ndarray | None  # [N] of rows; None weights all equally
DRAWS = 1000  # of a bootstrap
FEW = 20  # rows, below which an interval that is not of shares may cover too little
_Z = statistics.NormalDist().inv_cdf(0.975)  # of an interval of 95%


class Pairs(NamedTuple):
    """P pairs of a preferred and a rejected answer. A ranking, or a best answer among several, is
    one row with several pairs.
    """

    groups: Array  # [P] row number of each pair, from 0
    chosen: Array  # [P] label of the preferred answer; each answer of a row has its own label
    rejected: Array  # [P] label of the other answer
    weights: Array  # [P] float64; the weights of a row's pairs add up to 1

    @property
    def is_single(self) -> bool:
        """Whether each row is one pair."""
        return bool(self.groups.max(initial=-1) + 1 == len(self.groups))


def top_1(right: Array, pairs: Pairs) -> Array:
    """[G] whether a best answer of each row scores above all others: MC1 of TruthfulQA (Lin et al.
    2022).

    right: [P] 1 where the pair's chosen answer scores higher, 0.5 for a tie. An answer is a best
    one if no pair of its row rejects it. Of several best answers the one with the best result
    counts.
    """
    num_labels = 1 + max(pairs.chosen.max(initial=0), pairs.rejected.max(initial=0))
    first_label = pairs.groups * num_labels
    answers, answer_of_pair = np.unique(first_label + pairs.chosen, return_inverse=True)
    is_best = ~np.isin(answers, first_label + pairs.rejected)
    worst_result = np.ones(len(answers))
    np.minimum.at(worst_result, answer_of_pair, right)
    row_of_answer = answers // num_labels
    result = np.zeros(pairs.groups.max(initial=-1) + 1)
    np.maximum.at(result, row_of_answer[is_best], worst_result[is_best])
    return result


def preference_report(
    scores: Array,
    best: Array,
    *,
    lengths: Array,
    weights: Weights = None,
) -> dict[str, float]:
    """How the scores of K answers agree with the choice of the best one (ALGORITHMS 2).

    scores, lengths: [N, K]; length is the number of response tokens, 0 for a missing answer.
    best: [N] index of the best answer. weights: [N] weight of each row; None weights all equally.

    Returns loss (``-log_softmax(scores)[best]`` in nats; Bradley-Terry for two answers) and, for
    the best answer against the highest-scored other one, accuracy (ties count half), margin (mean),
    ece (expected calibration error over the confidence max(p, 1 - p), p = sigmoid(margin)) and
    length_correlation (Spearman, score against length over both, unweighted); length_accuracy is
    the accuracy of a judge who always takes the longest answer.
    """
    row = np.arange(len(scores))
    rivals = rival(scores, best, lengths=lengths)
    scores = np.asarray(scores, np.float64)
    chosen = scores[row, best]
    others = scores[row, rivals]
    margin = chosen - others
    above_chosen = np.where(lengths > 0, scores - chosen[:, None], -np.inf)
    losses = np.logaddexp.reduce(above_chosen, axis=1)

    chosen_lengths = lengths[row, best]
    other_lengths = np.array(lengths)
    other_lengths[row, best] = 0
    both_scores = np.concatenate([chosen, others])
    both_lengths = np.concatenate([chosen_lengths, lengths[row, rivals]])
    return {
        "loss": _mean(losses, weights),
        "accuracy": win_rate(chosen, against=others, weights=weights),
        "margin": _mean(margin, weights),
        "ece": expected_calibration_error(margin, weights),
        "length_accuracy": win_rate(
            chosen_lengths, against=other_lengths.max(axis=1), weights=weights
        ),
        "length_correlation": spearman(both_scores, both_lengths),
    }


def rival(
    scores: Array,
    best: Array,
    *,
    lengths: Array,
) -> Array:
    """[N] index of the highest-scored answer other than the best one; arguments as in
    ``preference_report``.
    """
    others = np.where(lengths > 0, scores, -np.inf)
    others[np.arange(len(scores)), best] = -np.inf
    return others.argmax(axis=1)


def target_report(
    scores: Array,
    targets: Array,
    *,
    lengths: Array,
    weights: Weights = None,
) -> dict[str, float]:
    """How scores [N, K] of K answers to each of N prompts agree with target scores [N, K].

    lengths: [N, K] response tokens, 0 for a missing answer.
    weights: [N] weight of each prompt's answers and pairs; None weights all equally.

    Returns loss (mean squared error over the answers), length_correlation and target_correlation
    (Spearman, score against length and against target, unweighted). Where two answers to one prompt
    differ in their targets, also accuracy, margin, ece and length_accuracy of
    ``preference_report``, over all such pairs.
    """
    present = lengths > 0
    if weights is None:
        weights = np.ones(len(scores))
    errors = np.asarray(scores, np.float64) - targets
    answer_weights = np.broadcast_to(weights[:, None], scores.shape)
    report = {
        "loss": _mean(errors[present] ** 2, answer_weights[present]),
        "length_correlation": spearman(scores[present], lengths[present]),
        "target_correlation": spearman(scores[present], targets[present]),
    }
    both_present = present[:, :, None] & present[:, None, :]
    is_better = targets[:, :, None] > targets[:, None, :]
    row, better, worse = np.nonzero(is_better & both_present)
    if len(row) == 0:
        return report

    rows = row[:, None]
    columns = np.stack([better, worse], axis=1)
    of_pairs = preference_report(
        scores[rows, columns],
        np.zeros(len(row), int),
        lengths=lengths[rows, columns],
        weights=weights[row],
    )
    return of_pairs | report


def reliability(
    margin: Array,
    weights: Weights = None,
) -> tuple[Array, Array, Array]:
    """Weight, mean confidence and accuracy of the pairs in each of ten equal bins of the confidence
    in [.5, 1] (Guo et al. 2017), [bins] each, without empty bins.

    margin: [N] score of the chosen answer minus that of the rejected one; the confidence is max(p,
    1 - p) with p = sigmoid(margin), and a prediction is right if the margin is positive (half right
    at 0). weights: [N] weight of each pair; None weights all equally.
    """
    confidence = _sigmoid(np.abs(margin))
    right = np.heaviside(margin, 0.5)
    if weights is None:
        weights = np.ones(len(margin))
    twentieths = (confidence - 0.5) * 20
    bins = np.minimum(twentieths.astype(int), 9)
    total = np.bincount(bins, weights)
    used = total > 0
    total = total[used]
    mean_confidence = np.bincount(bins, weights * confidence)[used] / total
    accuracy = np.bincount(bins, weights * right)[used] / total
    return total, mean_confidence, accuracy


def expected_calibration_error(margin: Array, weights: Weights = None) -> float:
    """Mean ``|accuracy - confidence|`` over the bins of ``reliability``, weighted by bin weight."""
    counts, confidence, accuracy = reliability(margin, weights)
    return _mean(np.abs(accuracy - confidence), counts)


def spearman(x: Array, y: Array) -> float:
    """Rank correlation of two [N] arrays; 0 if either is constant."""
    import scipy.stats  # a quarter of the import time of the command line

    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(x, y).statistic)


def win_rate(
    scores: Array,
    *,
    against: Array,
    weights: Weights = None,
) -> float:
    """Share of rows [N] where ``scores`` is higher than ``against``; ties count half. ``weights``:
    [N], or None for equal weights.
    """
    scores = np.asarray(scores)
    against = np.asarray(against)
    return _mean((scores > against) + 0.5 * (scores == against), weights)


def best_at_k(scores: Array, k: int, mask: Array | None = None) -> Array:
    """[N] the mean over all choices of k of the n answers to a prompt of the best score: of scores
    0 and 1 the unbiased estimate of pass@k, ``1 - C(n - c, k) / C(n, k)`` of c right answers (Chen
    et al. 2021, arXiv 2107.03374, eq. 1). NaN for a prompt with fewer than k scored answers.

    scores: [N, n]; mask: [N, n], non-zero where the answer has a score; None: all have.
    """
    present = np.ones(np.shape(scores), bool) if mask is None else np.asarray(mask) != 0
    count = present.sum(axis=1, keepdims=True)
    ordered = np.sort(np.where(present, scores, -np.inf), axis=1)  # scored answers last
    before = np.arange(ordered.shape[1]) - ordered.shape[1] + count
    # C(before, k - 1) / C(count, k), from the highest score down: binomials of 1,030 overflow.
    ratio = np.maximum(before - k + 2, 0) / np.maximum(before + 1, 1)
    ratio[:, -1:] = k / np.maximum(count, 1)
    share = np.cumprod(ratio[:, ::-1], axis=1)[:, ::-1]
    best = np.sum(share * np.where(before >= 0, ordered, 0.0), axis=1)
    return np.where(count[:, 0] >= k, best, np.nan)


def majority_at_k(answers: Array, correct: Array, k: int) -> float:
    """The mean over all choices of k of the n answers to one prompt, without sampling any, of how
    correct the most common answer is; those that tie share (self-consistency, Wang et al. 2023,
    arXiv 2203.11171). NaN if fewer than k answers count.

    answers: [n]; equal ones are one. correct: [n] in [0, 1], the mean of equal answers counts; NaN:
    not known, and the answer does not count.
    """
    from scipy.stats import binom  # which plain runs do not import

    known = ~np.isnan(correct)
    if known.sum() < k:
        return float("nan")
    _, number, counts = np.unique(answers[known], return_inverse=True, return_counts=True)
    right = np.bincount(number, correct[known]) / counts
    # If each answer is chosen with probability k / n, and k are chosen in all, all choices of k are
    # equally likely: numbers of votes have binomial chances, of which none overflows.
    num_votes = partial(binom.pmf, p=k / counts.sum())
    chances = [num_votes(np.arange(count + 1), count) for count in counts]
    total = 0.0
    for winner in np.flatnonzero(right):
        others = chances[:winner] + chances[winner + 1 :]
        for votes in range(1, min(int(counts[winner]), k) + 1):
            # chance[c, t] of c votes for the others, t of which have as many as the winner
            chance = np.zeros((k - votes + 1, k // votes + 1))
            chance[0, 0] = chances[winner][votes]
            for of_other in others:
                before, chance = chance, np.zeros_like(chance)
                for given in range(min(len(of_other) - 1, votes, k - votes) + 1):
                    ties = int(given == votes)
                    kept = before[: len(chance) - given, : chance.shape[1] - ties]
                    chance[given:, ties:] += of_other[given] * kept
            total += right[winner] * np.sum(chance[-1] / np.arange(1, chance.shape[1] + 1))
    return float(total / num_votes(k, counts.sum()))


def brier(margin: Array, weights: Weights = None) -> float:
    """Mean ``(1 - p)^2`` of the probability p = sigmoid(margin) given to the chosen answer (Brier
    1950, for two outcomes): 0 is perfect, and p = 1/2 always gives 0.25.

    margin: [N] score of the chosen answer minus that of the rejected one; weights: [N] or None.
    """
    return _mean(_sigmoid(-np.asarray(margin)) ** 2, weights)


def cohen_kappa(
    labels: Array,
    others: Array,
    *,
    weights: Weights = None,
) -> float:
    """Agreement of two judges' labels [N] beyond chance, ``(observed - expected) / (1 - expected)``
    (Cohen 1960).

    1 is full agreement. 0 is the agreement of judges who draw their labels at random, each with
    their own frequencies. NaN if both judges give one and the same label to every row, since chance
    alone then agrees in every row.
    """
    labels = np.asarray(labels)
    others = np.asarray(others)
    share = partial(_mean, weights=weights)
    observed = share(labels == others)
    expected = sum(share(labels == x) * share(others == x) for x in np.unique(labels))
    if expected == 1.0:
        return float("nan")
    return (observed - expected) / (1 - expected)


def wilson(share: float, *, num: float) -> Interval:
    """95% interval of a share of ``num`` independent rows (Wilson 1927)."""
    extra = _Z**2 / num
    centre = share + extra / 2
    spread = _Z * ((share * (1 - share) + extra / 4) / num) ** 0.5
    low = 0.0 if share == 0 else (centre - spread) / (1 + extra)
    high = 1.0 if share == 1 else (centre + spread) / (1 + extra)
    return float(low), float(high)


def are_shares(values: Array) -> bool:
    """Whether all values that are not NaN are 0, .5 or 1."""
    values = np.asarray(values, np.float64)
    return bool(np.isin(values[~np.isnan(values)], (0, 0.5, 1)).all())


def share_interval(values: Array) -> Interval:
    """95% interval of the mean of rows [N] in [0, 1], such as wins with ties as a half: ``wilson``
    of the number of 0s and 1s whose mean varies as much (the effective size of Korn and Graubard
    1998). How much it varies is estimated with two rows more, a 0 and a 1 (as Agresti and Caffo
    2000), so that equal rows are not taken for certain. Of 0s and 1s it is ``wilson`` itself.
    """
    values = np.asarray(values, np.float64)
    mean = (values.sum() + 1) / (len(values) + 2)
    variance = ((values**2).sum() + 1) / (len(values) + 2) - mean**2
    return wilson(values.mean(), num=len(values) * mean * (1 - mean) / variance)


def student(values: Array, *, level: float = 0.95) -> Interval:
    """Student's interval of the mean of values [N], such as one of each seed; (NaN, NaN) of one."""
    import scipy.special  # which plain runs do not import

    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float("nan"), float("nan")
    error = values.std(ddof=1) / len(values) ** 0.5
    far = scipy.special.stdtrit(len(values) - 1, (1 + level) / 2) * error
    return float(values.mean() - far), float(values.mean() + far)


def paired_change(before: Array, after: Array) -> Interval:
    """95% interval of the mean change of the same rows [N]: ``student``, but if all values are 0,
    .5 or 1 ``share_interval``, of which a change is a win, a tie or a loss.
    """
    change = np.asarray(after, np.float64) - before
    if not (are_shares(before) and are_shares(after)):
        return student(change)
    low, high = share_interval((1 + change) / 2)
    return 2 * low - 1, 2 * high - 1


def share_change(before: float, *, after: float, num: float) -> Interval:
    """95% interval of the change between two shares of ``num`` rows each, of which no more is known
    (Newcombe 1998, method 10, of ``wilson``). It takes them for independent; where they are the
    same rows it is too wide, and ``paired_change`` has what they say.
    """
    low, high = wilson(before, num=num)
    low_after, high_after = wilson(after, num=num)
    gain = after - before
    return (
        gain - float(np.hypot(after - low_after, high - before)),
        gain + float(np.hypot(high_after - after, before - low)),
    )


def bootstrap_interval(
    statistic: Callable[[Array], float],
    key: jax.Array,
    *,
    weights: Array,
    groups: Groups = None,
) -> Interval:
    """Percentile bootstrap (Efron 1979) of a statistic that has no formula: its 2.5th and 97.5th
    percentile over draws with replacement.

    Args:
      statistic: a function of weights [N] of the N rows. A row that was not drawn has weight 0.
        Draws that give NaN are left out.
      key: the same key gives the same draws.
      weights: [N] weight of each row.
      groups: [N] group numbers from 0; the rows of a group, such as the pairs of one ranking, are
        drawn together. None makes each row its own group.

    Returns:
      The interval; (NaN, NaN) for fewer than ``FEW`` groups, whose draws do not show how far the
      statistic varies.
    """
    if groups is None:
        groups = np.arange(len(weights))
    num_groups = int(groups.max(initial=-1)) + 1
    if num_groups < FEW:
        return float("nan"), float("nan")
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    draws = []
    for _ in range(DRAWS):
        drawn = generator.integers(num_groups, size=num_groups)
        times = np.bincount(drawn, minlength=num_groups)
        draws.append(statistic(weights * times[groups]))
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return float(low), float(high)


def _mean(values: Array, weights: Weights) -> float:
    return float(np.average(values, weights=weights))


def _sigmoid(x: Array) -> Array:
    x = np.asarray(x, np.float64)
    return np.exp(-np.logaddexp(0.0, -x))
