"""Figures about scores, by hand: pairs and their weights, choices among several answers, answers with target scores."""

import math

import numpy as np
import pytest

from rlhf_jax import evaluation

CHOSEN, REJECTED = np.array([1.0, 0.0, 2.0]), np.array([0.0, 1.0, 2.0])
LENGTHS = np.array([[3, 2], [5, 5], [1, 4]])


def assert_close(report, expected):
    assert report.keys() == expected.keys()
    for name, value in expected.items():
        assert report[name] == pytest.approx(value, abs=1e-6), name


def test_pairs_by_hand():
    """Margins 1, -1, 0; the chosen answer is the longer one, as long, the shorter one."""
    expected = {
        "loss": 0.773224,
        "accuracy": 0.5,
        "margin": 0.0,
        "ece": 0.154039,  # two pairs in the bin of .731059, one of them right; the tie is half right at .5
        "length_accuracy": 0.5,
        "length_correlation": evaluation.spearman(np.array([1, 0, 2, 0, 1, 2]), np.array([3, 5, 1, 2, 5, 4])),
    }
    assert_close(evaluation.preference_report(CHOSEN, REJECTED, LENGTHS), expected)


def test_weighted_pairs_by_hand():
    weights = np.array([2.0, 1.0, 1.0])
    report = evaluation.preference_report(CHOSEN, REJECTED, LENGTHS, weights)
    unweighted = evaluation.preference_report(CHOSEN, REJECTED, LENGTHS)
    expected = {"loss": 0.658233, "accuracy": 0.625, "margin": 0.25, "ece": 0.048294, "length_accuracy": 0.625}
    assert_close(report, expected | {"length_correlation": unweighted["length_correlation"]})
    # A weight of 2 is the pair twice; weights are relative.
    twice = [0, 0, 1, 2]
    repeated = evaluation.preference_report(CHOSEN[twice], REJECTED[twice], LENGTHS[twice])
    assert_close({name: repeated[name] for name in expected}, {name: report[name] for name in expected})
    assert_close(evaluation.preference_report(CHOSEN, REJECTED, LENGTHS, 3 * weights), report)


def test_choice_among_three_by_hand():
    """The rival is the answer of the next highest score; the judge of lengths has all the others against it."""
    scores = np.array([[1.0, 1.0, 1.0], [0.0, 3.0, 2.0], [5.0, 1.0, np.nan]])
    best, lengths = np.array([2, 1, 1]), np.array([[2, 2, 3], [6, 4, 2], [4, 4, 0]])
    np.testing.assert_array_equal(evaluation.rival(scores, best, lengths), [0, 2, 0])
    report = evaluation.choice_report(scores, best, lengths)
    second = -math.log(math.exp(3) / (1 + math.exp(2) + math.exp(3)))
    third = math.log1p(math.exp(4))
    assert report["loss"] == pytest.approx((math.log(3) + second + third) / 3)
    assert report["accuracy"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert report["margin"] == pytest.approx((0 + 1 - 4) / 3)
    assert report["length_accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)


def test_a_choice_of_two_is_a_pair():
    scores, swapped = np.stack([CHOSEN, REJECTED], axis=1), [1, 0]
    pairs = evaluation.preference_report(CHOSEN, REJECTED, LENGTHS)
    assert_close(evaluation.choice_report(scores, np.zeros(3, int), LENGTHS), pairs)
    assert_close(evaluation.choice_report(scores[:, swapped], np.ones(3, int), LENGTHS[:, swapped]), pairs)


def test_targets_by_hand():
    """Pairs only inside a row and only of answers with other targets; the absent answer counts nowhere."""
    scores = np.array([[0.9, 0.2, 0.4], [0.5, 0.1, 9.0]])
    targets, lengths = np.array([[1.0, 0, 0], [1, 1, 0]]), np.array([[5, 3, 5], [2, 4, 0]])
    expected = {
        "loss": 0.254,
        "length_correlation": 2 / math.sqrt(95),
        "target_correlation": 2.5 / math.sqrt(75),
        "accuracy": 1.0,
        "margin": 0.6,
        "ece": 0.354676,
        "length_accuracy": 0.75,
    }
    assert_close(evaluation.target_report(scores, targets, lengths), expected)
    weighted = evaluation.target_report(scores, targets, lengths, np.array([2.0, 1.0]))
    assert_close(weighted, expected | {"loss": 0.185})


def test_targets_without_a_pair():
    column = np.array([[0.5], [1.0], [2.0]])
    report = evaluation.target_report(column, column + 1, np.array([[3], [2], [1]]))
    assert_close(report, {"loss": 1.0, "length_correlation": -1.0, "target_correlation": 1.0})


def test_win_rate():
    assert evaluation.win_rate(np.array([1, 0, 2, 3]), np.array([0, 1, 2, 1])) == 0.625
    assert evaluation.win_rate(np.array([1, 0]), np.array([0, 1]), np.array([3.0, 1.0])) == 0.75
