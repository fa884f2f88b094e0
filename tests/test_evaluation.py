"""Figures about scores, by hand: pairs and their weights, choices among several answers, answers
with target scores.
"""

import functools
import math

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from rlhf_jax import metrics

KEY = jax.random.key(0)

SCORES = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
LENGTHS = np.array([[3, 2], [5, 5], [1, 4]])


def assert_close(report, expected):
    assert report.keys() == expected.keys()
    for name, value in expected.items():
        assert report[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize(
    ("weights", "loss", "accuracy", "margin", "ece"),
    [
        (
            None,
            0.773224,
            0.5,
            0.0,
            0.154039,
        ),  # two pairs in the bin of .731059, one right; the tie half right at .5
        (np.array([2.0, 1.0, 1.0]), 0.658233, 0.625, 0.25, 0.048294),
        (np.array([6.0, 3.0, 3.0]), 0.658233, 0.625, 0.25, 0.048294),
    ],
)
def test_pairs_by_hand(weights, loss, accuracy, margin, ece):
    """Margins 1, -1, 0; the chosen answer is the longer one, as long, the shorter one."""
    expected = {
        "loss": loss,
        "accuracy": accuracy,
        "margin": margin,
        "ece": ece,
        "length_accuracy": accuracy,
    }
    correlation = metrics.spearman(
        np.array([1, 0, 2, 0, 1, 2]), np.array([3, 5, 1, 2, 5, 4])
    )  # without weights
    report = metrics.preference_report(SCORES, np.zeros(3, int), lengths=LENGTHS, weights=weights)
    assert_close(report, expected | {"length_correlation": correlation})


def test_choice_among_three_by_hand():
    """The rival is the answer of the next highest score; the judge of lengths has all the others
    against it.
    """
    scores = np.array(
        [
            [1.0, 1.0, 1.0],
            [0.0, 3.0, 2.0],
            [5.0, 1.0, np.nan],
        ]
    )
    best = np.array([2, 1, 1])
    lengths = np.array([[2, 2, 3], [6, 4, 2], [4, 4, 0]])
    assert_array_equal(metrics.rival(scores, best, lengths=lengths), [0, 2, 0])
    report = metrics.preference_report(scores, best, lengths=lengths)
    second = -math.log(math.exp(3) / (1 + math.exp(2) + math.exp(3)))
    third = math.log1p(math.exp(4))
    assert report["loss"] == pytest.approx((math.log(3) + second + third) / 3)
    assert report["accuracy"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert report["margin"] == pytest.approx((0 + 1 - 4) / 3)
    assert report["length_accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)


def test_the_order_of_answers_and_absent_ones_count_nowhere():
    pairs = metrics.preference_report(SCORES, np.zeros(3, int), lengths=LENGTHS)
    assert_close(
        metrics.preference_report(SCORES[:, ::-1], np.ones(3, int), lengths=LENGTHS[:, ::-1]), pairs
    )
    padded = (
        np.pad(x, ((0, 0), (0, 1))) for x in (SCORES, LENGTHS)
    )  # an absent third answer counts nowhere
    assert_close(
        metrics.preference_report(next(padded), np.zeros(3, int), lengths=next(padded)),
        pairs,
    )


def test_targets_by_hand():
    """Pairs only inside a row and only of answers with other targets; the absent answer counts
    nowhere.
    """
    scores = np.array([[0.9, 0.2, 0.4], [0.5, 0.1, 9.0]])
    targets = np.array([[1.0, 0, 0], [1, 1, 0]])
    lengths = np.array([[5, 3, 5], [2, 4, 0]])
    expected = {
        "loss": 0.254,
        "length_correlation": 2 / math.sqrt(95),
        "target_correlation": 2.5 / math.sqrt(75),
        "accuracy": 1.0,
        "margin": 0.6,
        "ece": 0.354676,
        "length_accuracy": 0.75,
    }
    assert_close(metrics.target_report(scores, targets, lengths=lengths), expected)
    weighted = metrics.target_report(scores, targets, lengths=lengths, weights=np.array([2.0, 1.0]))
    assert_close(weighted, expected | {"loss": 0.185})
    column = np.array([[0.5], [1.0], [2.0]])  # no pair: no accuracy
    alone = metrics.target_report(
        column,
        column + 1,
        lengths=np.array([[3], [2], [1]]),
    )
    assert_close(alone, {"loss": 1.0, "length_correlation": -1.0, "target_correlation": 1.0})


def test_win_rate_and_brier_by_hand():
    assert metrics.win_rate(np.array([1, 0, 2, 3]), against=np.array([0, 1, 2, 1])) == 0.625
    margins = np.array([0.0, math.log(3), -math.log(3)])  # p of the chosen: 1/2, 3/4, 1/4
    assert metrics.brier(margins) == pytest.approx((1 / 4 + 1 / 16 + 9 / 16) / 3)
    assert metrics.brier(margins, np.array([0.0, 3.0, 1.0])) == pytest.approx((3 / 16 + 9 / 16) / 4)


@pytest.mark.filterwarnings("error")
def test_cohen_kappa_by_hand():
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: .7 agree, .5 would by chance."""
    table = {
        (1, 1): 20,
        (1, 0): 5,
        (0, 1): 10,
        (0, 0): 15,
    }
    cells = np.array(list(table))
    weights = np.array(list(table.values()))
    labels = np.repeat(cells, weights, axis=0)
    assert metrics.cohen_kappa(labels[:, 0], labels[:, 1]) == pytest.approx(0.4)
    assert metrics.cohen_kappa(cells[:, 0], cells[:, 1], weights=weights) == pytest.approx(0.4)
    assert metrics.cohen_kappa([0, 1, 2], [0, 1, 2]) == 1
    assert math.isnan(metrics.cohen_kappa([1, 1], [1, 1]))


@pytest.mark.parametrize(("wins", "expected"), [(0, (0.0, 0.161125)), (7, (0.181192, 0.567145))])
def test_shares_have_wilsons_interval(wins, expected):
    assert metrics.share_interval(np.arange(20) < wins) == pytest.approx(expected, abs=1e-6)


def test_wins_with_ties_have_wilsons_interval_of_more_rows():
    """Three wins and a tie: with a win and a loss more the mean is .75 and the variance 4.25 / 6 -
    .75^2 = .1458, so that they vary as 4 * .1875 / .1458 = 5.143 zeros and ones.
    """
    found = metrics.share_interval(np.array([1.0, 1.0, 1.0, 0.5]))
    assert found == pytest.approx(metrics.wilson(0.875, num=36 / 7))
    turned = metrics.share_interval(np.array([0.0, 0.0, 0.0, 0.5]))
    assert turned == (pytest.approx(1 - found[1]), pytest.approx(1 - found[0]))
    low, high = metrics.share_interval(np.full(20, 0.5))  # ties alone: narrow, but not certain
    assert 0.35 < low < 0.45 < 0.55 < high < 0.65
    assert metrics.share_interval(np.full(20, 1.0)) == pytest.approx(metrics.wilson(1.0, num=20))


def test_students_interval_by_hand():
    """Of 1 and 3 the mean is 2 and its error 1; t of one degree is 12.7062, of 90% 6.3138."""
    assert metrics.student(np.array([1.0, 3.0])) == pytest.approx((-10.7062, 14.7062), abs=1e-4)
    narrow = metrics.student(np.array([1.0, 3.0]), level=0.9)
    assert narrow == pytest.approx((-4.3138, 8.3138), abs=1e-4)
    assert all(map(math.isnan, metrics.student(np.array([1.0]))))


def correlation(values, weights):
    """Of the two columns of values [N, 2] with weights."""
    return np.corrcoef(np.repeat(values, weights.astype(int), axis=0).T)[0, 1]


def test_a_bootstrap_is_as_wide_as_the_standard_error():
    values = np.random.default_rng(0).normal(size=(400, 2))

    def of(key, num=400):
        statistic = functools.partial(correlation, values[:num])
        return metrics.bootstrap_interval(statistic, key, weights=np.ones(num))

    low, high = of(KEY)
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)  # of a correlation of 0
    assert low < correlation(values, np.ones(400)) < high
    assert of(KEY) == (low, high)
    assert of(jax.random.key(1)) != (low, high)
    assert all(map(math.isnan, of(KEY, num=19)))  # too few to draw from
    assert not any(map(math.isnan, of(KEY, num=20)))


def test_a_bootstrap_draws_groups_whole():
    """Each row four times over says no more than once."""
    values = np.random.default_rng(0).normal(size=100)
    groups = np.repeat(np.arange(100), 4)

    def of(rows, groups=None):
        def mean(weights):
            return np.average(rows, weights=weights)

        return np.ptp(
            metrics.bootstrap_interval(mean, KEY, weights=np.ones(len(rows)), groups=groups)
        )

    once = of(values)
    assert of(np.repeat(values, 4), groups) == pytest.approx(once)
    assert of(np.repeat(values, 4)) == pytest.approx(once / 2, rel=0.15)


def test_changes_of_shares_and_of_pairs_by_hand():
    """Wilson's of 2 of 4 is .15 to .85, of 4 of 4 .51 to 1 (Newcombe 1998). Of differences 1, 2, 0
    the mean is 1, the deviation 1, and 4.303 / sqrt(3) is 2.484.
    """
    low, high = metrics.share_change(0.5, after=1.0, num=4)
    assert (low, high) == (pytest.approx(-0.1, abs=5e-3), pytest.approx(0.85, abs=5e-3))
    back = metrics.share_change(1.0, after=0.5, num=4)
    assert back == (pytest.approx(-high), pytest.approx(-low))
    pairs = metrics.paired_change(np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 2.0]))
    assert pairs == (pytest.approx(-1.484, abs=1e-3), pytest.approx(3.484, abs=1e-3))
    # Of 0s and 1s a change is a win, a tie or a loss: two of four changed, both upwards.
    before = np.array([0.0, 0.0, 1.0, 0.0])
    after = np.array([1.0, 1.0, 1.0, 0.0])
    low, high = metrics.share_interval(np.array([1.0, 1.0, 0.5, 0.5]))
    assert metrics.paired_change(before, after) == (2 * low - 1, 2 * high - 1)
    assert metrics.paired_change(after, before) == pytest.approx((1 - 2 * high, 1 - 2 * low))
    low, high = metrics.paired_change(np.zeros(4), np.zeros(4))
    assert low < -0.2 < 0.2 < high  # four rows that did not change show little
    assert metrics.paired_change(np.full(4, 2.0), np.full(4, 2.0)) == (0, 0)  # no shares
    assert metrics.wilson(0.0, num=3)[0] == 0.0
    assert metrics.wilson(1.0, num=3)[1] == 1.0
    assert 0 < metrics.wilson(0.5 / 3, num=3)[0] < metrics.wilson(0.5 / 3, num=3)[1] < 1  # a tie
