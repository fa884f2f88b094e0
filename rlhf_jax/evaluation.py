"""Figures about scores that a person reads: how well they agree with preferences, and what they may be exploited by."""

import numpy as np
import scipy.special
import scipy.stats


def preference_report(chosen: np.ndarray, rejected: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """How scores [N] of chosen and rejected answers agree with the choice (ALGORITHMS 2).

    lengths: [N, 2] response tokens of the chosen and the rejected answer. Returns loss (Bradley-Terry, nats), accuracy
    (ties count half), margin (mean), ece (expected calibration error over the confidence max(p, 1 - p),
    p = sigmoid(margin)), and length_correlation (Spearman, score against length over both answers).
    """
    margin = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    scores = np.concatenate([chosen, rejected])
    return {
        "loss": float(np.mean(np.logaddexp(0.0, -margin))),
        "accuracy": float(np.mean((margin > 0) + 0.5 * (margin == 0))),
        "margin": float(np.mean(margin)),
        "ece": expected_calibration_error(margin),
        "length_correlation": spearman(scores, np.concatenate([lengths[:, 0], lengths[:, 1]])),
    }


def expected_calibration_error(margin: np.ndarray, num_bins: int = 10) -> float:
    """Mean |accuracy - confidence| over equal bins of the confidence in [.5, 1], weighted by count (Guo et al. 2017).

    margin: [N] score of the chosen answer minus that of the rejected one; the confidence is max(p, 1 - p) with
    p = sigmoid(margin), and a prediction is right where the margin is positive (half right at 0).
    """
    probability = scipy.special.expit(margin)
    confidence = np.maximum(probability, 1 - probability)
    correct = (margin > 0) + 0.5 * (margin == 0)
    bins = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    gaps = [abs(np.sum(correct[bins == b]) - np.sum(confidence[bins == b])) for b in range(num_bins)]
    return float(sum(gaps) / len(margin))


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation of two [N] arrays; 0 where either is constant, since nothing then varies together."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(x, y).statistic)


def win_rate(scores: np.ndarray, against: np.ndarray) -> float:
    """Share of rows [N] where ``scores`` is higher; ties count half."""
    scores, against = np.asarray(scores), np.asarray(against)
    return float(np.mean((scores > against) + 0.5 * (scores == against)))
