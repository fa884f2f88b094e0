"""Figures about texts: by hand, against slow loops, and the word patterns on texts that a person
has judged.
"""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from rlhf_jax.evaluation import texts

TEXTS = [
    text.split()
    for text in (
        "the cat sat on the mat",
        "the cat sat down",
        "a dog ran",
        "the cat sat on the mat",
        "a",
    )
]


def test_words_keep_their_apostrophes_and_marks_stand_alone():
    assert texts.words("It’s 9 o'clock, isn't it?") == [
        "it's",
        "9",
        "o'clock",
        ",",
        "isn't",
        "it",
        "?",
    ]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (texts.distinct_n([list("ababc")], 1), 3 / 5),
        (texts.distinct_n(["ababc"], 2), 3 / 4),  # ab ba ab bc
        (texts.distinct_n(["ababc", "ab"], 2), 3 / 5),
        (texts.distinct_n([["a"], []], 2), 0),
        (texts.self_bleu(["ab", "ab", ""]), [1.0, 1.0, 0.0]),
        (texts.self_bleu(["ab", "a", "aba"])[0], 1.0),  # of two as close lengths the shorter
        (texts.repetition("ababab", 2), 1 - 2 / 5),
        (texts.repetition(["a"], 2), 0),
        (texts.lexical_density(texts.words("Then the sun won ten tons!")), 4 / 6),
        (texts.lexical_density(["!"]), 0),
    ],
)
def test_figures_by_hand(found, expected):
    assert found == expected


def slow_bleu(text, references, n):
    """Papineni et al. 2002 as written, with method 1 of Chen and Cherry and orders that the text is
    too short for left out.
    """
    logs = []
    for order in range(1, n + 1):

        def count(words, n=order):
            return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

        own = count(text)
        clipped = {
            gram: min(c, max(count(reference)[gram] for reference in references))
            for gram, c in own.items()
        }
        if own:
            logs.append(math.log((sum(clipped.values()) or 0.1) / sum(own.values())))
    closest = min((abs(len(reference) - len(text)), len(reference)) for reference in references)[1]
    return min(1.0, math.exp(1 - closest / len(text))) * math.exp(sum(logs) / len(logs))


@pytest.mark.parametrize("n", [2, 4])
def test_self_bleu_is_bleu_against_all_others(n):
    expected = [slow_bleu(text, TEXTS[:i] + TEXTS[i + 1 :], n) for i, text in enumerate(TEXTS)]
    assert texts.self_bleu(TEXTS, n) == pytest.approx(expected)


def test_content_words_by_hand():
    asked = texts.words("How do I boil an egg?")
    said = texts.words("Don't boil it: it's the egg and the egg cooks, can't it?")
    assert texts.lexical_density(said) == 4 / 12  # boil, egg, egg, cooks
    assert texts.new_content_words(asked, said) == 1  # cooks


JUDGED = json.loads(Path(__file__).with_name("judged_texts.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("found", "positive", "negative", "development", "held_out"),
    [
        (
            texts.is_refusal,
            "refusals",
            "answers",
            12,
            17,
        ),  # held out: of 20, and of 20 answers none
        (texts.expresses_uncertainty, "uncertain", "certain", 8, 12),  # of 12, and of 12
    ],
)
def test_word_patterns_find_as_many_as_documented(found, positive, negative, development, held_out):
    for part, hits in (("development", development), ("held_out", held_out)):
        assert sum(map(found, JUDGED[f"{positive}_{part}"])) == hits
        assert sum(map(found, JUDGED[f"{negative}_{part}"])) == 0


def test_a_refusal_is_looked_for_in_the_first_60_words():
    assert not texts.is_refusal("word " * 60 + "I cannot help with that.")
    assert texts.is_refusal("I CAN’T   help\nwith that.")
