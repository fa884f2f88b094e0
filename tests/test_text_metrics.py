"""Figures about texts: by hand, against slow loops, and the word patterns on texts that a person has judged."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from rlhf_jax.evaluation import texts

TEXTS = [
    text.split() for text in ("the cat sat on the mat", "the cat sat down", "a dog ran", "the cat sat on the mat", "a")
]


def test_words_keep_their_apostrophes_and_marks_stand_alone():
    assert texts.words("It’s 9 o'clock, isn't it?") == ["it's", "9", "o'clock", ",", "isn't", "it", "?"]


def test_distinct_n_by_hand():
    """Words a b a b c: 3 of 5 are different; pairs ab ba ab bc: 3 of 4, and with another text's ab 3 of 5."""
    assert texts.distinct_n([list("ababc")], 1) == 3 / 5
    assert texts.distinct_n([list("ababc")], 2) == 3 / 4
    assert texts.distinct_n([list("ababc"), ["a", "b"]], 2) == 3 / 5
    assert texts.distinct_n([["a"], []], 2) == 0


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_without_each_text_is_that_of_the_others(n):
    expected = [texts.distinct_n(TEXTS[:i] + TEXTS[i + 1 :], n) for i in range(len(TEXTS))]
    assert texts.distinct_n_without_each(TEXTS, n) == expected


def slow_bleu(text, references, n):
    """Papineni et al. 2002 as written, with method 1 of Chen and Cherry and orders that the text is too short for left
    out.
    """
    logs = []
    for order in range(1, n + 1):
        count = lambda words, n=order: Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))  # noqa: E731
        own = count(text)
        clipped = {gram: min(c, max(count(reference)[gram] for reference in references)) for gram, c in own.items()}
        if own:
            logs.append(math.log((sum(clipped.values()) or 0.1) / sum(own.values())))
    closest = min((abs(len(reference) - len(text)), len(reference)) for reference in references)[1]
    return min(1.0, math.exp(1 - closest / len(text))) * math.exp(sum(logs) / len(logs))


@pytest.mark.parametrize("n", [2, 4])
def test_self_bleu_is_bleu_against_all_others(n):
    expected = [slow_bleu(text, TEXTS[:i] + TEXTS[i + 1 :], n) for i, text in enumerate(TEXTS)]
    assert texts.self_bleu(TEXTS, n) == pytest.approx(expected)


def test_self_bleu_by_hand():
    """a b c d against a b x y z: 2 of 4 words, 1 of 3 pairs, a reference that is one word longer."""
    two = [list("abcd"), list("abxyz")]
    assert texts.self_bleu(two, 2)[0] == pytest.approx(math.exp(1 - 5 / 4) * math.sqrt(1 / 2 * 1 / 3))
    assert texts.self_bleu([["a", "b"], ["a", "b"], []]) == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="at least two texts"):
        texts.self_bleu(TEXTS[:1])


def test_repetition_by_hand():
    assert texts.repetition(list("ababab"), 2) == 1 - 2 / 5
    assert texts.repetition(["a"], 2) == 0


def test_content_words_by_hand():
    asked, said = map(
        texts.words, ("How do I boil an egg?", "Don't boil it: it's the egg and the egg cooks, can't it?")
    )
    assert texts.lexical_density(said) == 4 / 12  # boil, egg, egg, cooks
    assert texts.new_content_words(asked, said) == 1  # cooks
    assert texts.lexical_density(texts.words("Then the sun won ten tons!")) == 4 / 6
    assert texts.lexical_density(["!"]) == 0


JUDGED = json.loads(Path(__file__).with_name("judged_texts.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("found", "positive", "negative", "development", "held_out"),
    [
        (texts.is_refusal, "refusals", "answers", 12, 17),  # held out: of 20, and of 20 answers none
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
