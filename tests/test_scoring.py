"""Held-out comparisons: their report, and the texts that a run shows with their scores."""

from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from rlhf_jax.data import encoding
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.training.supervised.scoring import (
    desirable_length_accuracy,
    evenly,
    num_rows,
    report,
    samples,
)

LETTERS = characters("abcde? ")


def test_held_out_pairs_weigh_what_their_ranking_gives_them():
    """A ranking of three, of which one pair is right, and a pair: validation counts both as one
    each. Top-1 asks if the ranking's first answer is above the two others."""
    rows = [
        Row("a?", ("b", "cc"), "one", weight=1 / 3),
        Row("a?", ("b", "d"), "one", weight=1 / 3),
        Row("a?", ("cc", "d"), "one", weight=1 / 3),
        Row("b?", ("c", "dde"), "two"),
    ]
    encoded = encoding.encode_texts(rows, LETTERS)
    scores = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    every = report(encoded, np.arange(4), scores)
    assert (every["accuracy"], every["pairwise_accuracy"]) == (
        (0 + 1) / 2,
        pytest.approx((1 / 3 + 1) / 2),
    )
    assert every["margin"] == pytest.approx((-1 / 3 + 1) / 2)
    lengths = every["length_accuracy"], every["pairwise_length_accuracy"]
    assert lengths == (0, pytest.approx((0 + 0.5 / 3 + 1 / 3) / 2))
    part = np.array([3, 0])
    assert report(encoded, part, scores[part])["accuracy"] == 1.0
    assert "pairwise_accuracy" not in report(encoded, part, scores[part])


def test_a_best_one_of_several_is_reported_as_top_1_and_by_its_pairs():
    rows = [Row("a?", ("b", "c", "d", "e"), "1", best=1), Row("a?", ("b", "c"), "2")]
    encoded = encoding.encode_texts(rows, LETTERS)
    scores = np.array(
        [[1.0, 2.0, 3.0, 0.0], [1.0, 0.0, 9.0, 9.0]]
    )  # the pair has no third and fourth answer
    found = report(encoded, np.arange(2), scores)
    assert (found["accuracy"], found["pairwise_accuracy"]) == (
        (0 + 1) / 2,
        pytest.approx((2 / 3 + 1) / 2),
    )


def test_a_judge_of_lengths_calls_what_is_longer_than_the_median_desirable():
    """Lengths with EOS 2, 3, 4, 3; the median of the first three is 3. Two are right, two tie."""
    labels = [("b", 0.0), ("cc", 1.0), ("ddd", 1.0), ("ee", 0.0)]
    rows = [Row("a?", (text,), "1", targets=(label,)) for text, label in labels]
    encoded = encoding.encode_texts(rows, LETTERS)
    every = np.arange(4)
    assert desirable_length_accuracy(encoded, every[:3], every) == (1 + 0.5 + 1 + 0.5) / 4


def test_samples_are_texts_without_special_tokens():
    rows = [
        Row("a?", ("b", "c d"), "f, line 1", weight=0.25),
        Row("b?", ("c", "de", "b"), "f, line 2", best=1),
    ]
    encoded = encoding.encode_texts(rows, LETTERS, template="a {prompt}")
    numbers = np.array([1, 0])
    scores = np.array([[0.5, 1.0, 2.0], [0.25, -1.0, 7.0]])
    names = (
        "prompt",
        "chosen",
        "rejected",
        "score_chosen",
        "score_rejected",
        "length_chosen",
        "length_rejected",
    )
    names += ("source", "weight")
    found = samples(encoded, numbers, scores, LETTERS)
    assert [tuple(row) for row in found] == [names, names]
    assert [tuple(row.values()) for row in found] == [
        ("a b?", "de", "b", 1.0, 2.0, 3, 2, "f, line 2", 1.0),
        ("a a?", "b", "c d", 0.25, -1.0, 2, 4, "f, line 1", 0.25),
    ]


def test_samples_are_spread_over_the_held_out_rows():
    assert_array_equal(evenly(5, 9), np.arange(5))
    assert_array_equal(evenly(7, 3), [0, 3, 6])
    for num in (257, 300, 511, 1000):
        found = evenly(num, 256)
        assert (found[0], found[-1], len(found)) == (0, num - 1, 256)
        assert set(np.diff(found)) <= {
            (num - 1) // 255,
            (num - 1) // 255 + 1,
        }  # no row twice


def test_samples_with_targets_hold_every_answer():
    rows = [
        Row("a?", ("b", "c d"), "1", targets=(1.0, 0.0)),
        Row("b?", ("c",), "2", targets=(0.5,)),
    ]
    encoded = encoding.encode_texts(rows, LETTERS)
    found = samples(encoded, np.array([1, 0]), np.array([[3.0, 9.0], [1.0, 2.0]]), LETTERS)
    first = {"source": "1", "weight": 1.0}
    second = {"source": "2", "weight": 1.0}
    assert found == [
        {"prompt": "b?", "response": "c", "score": 3.0, "target": 0.5, "length": 2} | second,
        {"prompt": "a?", "response": "b", "score": 1.0, "target": 1.0, "length": 2} | first,
        {"prompt": "a?", "response": "c d", "score": 2.0, "target": 0.0, "length": 4} | first,
    ]


def test_the_pairs_of_a_ranking_are_one_row():
    texts = SimpleNamespace(sources=["line 1", "line 2", "line 2", "line 3"])
    assert num_rows(texts, np.array([1, 2, 3])) == 2
