"""Figures about texts, from their words only: variety, repetition, refusals, uncertainty,
information. English only.

Word patterns know no meaning: they miss a paraphrase that has none of the words, and they count a
quotation. The patterns are in ``texts.yaml``; ``docs/evaluation.md`` says how often they
are right.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml

Tokens = Sequence[str]
Ngram = tuple[str, ...]

_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
_CONTRACTED = re.compile("(n't|'.*)$")

_LISTS = yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text("utf-8"))
FUNCTION_WORDS = frozenset(_LISTS["function_words"].split())


def _any_of(name: str) -> re.Pattern[str]:
    either = "|".join(_LISTS[name])
    for part, expression in _LISTS["parts"].items():
        either = either.replace(f"<{part}>", expression)
    return re.compile(either)


_REFUSAL = _any_of("refusal")
_UNCERTAINTY = _any_of("uncertainty")


def words(text: str) -> list[str]:
    """Words and punctuation marks in lower case; an apostrophe inside a word is part of it."""
    return [word.replace("’", "'") for word in _WORD.findall(text.lower())]


def distinct_n(texts: Sequence[Tokens], n: int) -> float:
    """Different n-grams of all texts together, divided by all their n-grams (Li et al. 2016); 0
    without any.

    It falls with the amount of text: compare equal numbers of texts of like length.
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / max(len(grams), 1)


def self_bleu(texts: Sequence[Tokens], n: int = 4) -> list[float]:
    """BLEU-n of each text with all others as its references (Zhu et al. 2018): 1 for copies, low
    where texts differ.

    BLEU is that of Papineni et al. 2002 with equal weights of the orders 1 to n, the reference of
    the closest length (the shorter of two), and a count of 0.1 in place of 0 matches (method 1 of
    Chen and Cherry 2014). An order of which a text has no n-gram is left out; an empty text scores
    0. There are at least two texts.
    """
    logs: list[list[float]] = [[] for _ in texts]
    for order in range(1, n + 1):
        counted = [Counter(_ngrams(text, order)) for text in texts]
        two_highest: dict[Ngram, list[int]] = {}
        for own in counted:
            for gram, count in own.items():
                two_highest[gram] = sorted([*two_highest.get(gram, [0, 0]), count])[1:]
        for own, known in zip(counted, logs, strict=True):
            matches = 0
            for gram, count in own.items():
                second, first = two_highest[gram]
                # The highest count in another text clips this text's count.
                matches += second if first == count else count
            if own:
                known.append(math.log((matches or 0.1) / own.total()))
    lengths = Counter(map(len, texts))
    scores = []
    for text, known in zip(texts, logs, strict=True):
        length = len(text)
        others = lengths - Counter([length])
        # Of two that are equally close the shorter one, which comes first.
        closest = min(sorted(others), key=lambda other: abs(other - length))
        brevity = min(0.0, 1 - closest / length) if known else 0.0
        scores.append(math.exp(brevity + sum(known) / len(known)) if known else 0.0)
    return scores


def repetition(text: Tokens, n: int = 3) -> float:
    """Share of a text's n-grams that occurred in it before, ``1 - different / all`` (seq-rep-n,
    Welleck et al. 2020); 0 for a text shorter than n.
    """
    if len(text) < n:
        return 0.0
    return 1 - distinct_n([text], n)


def is_refusal(text: str) -> bool:
    """Whether the text refuses the request, by patterns of words.

    Zou et al. 2023 and the string match of XSTest (Röttger et al. 2024) match phrases too; these
    patterns are our own. An apology alone is no refusal. Only the first 60 words count: later ones
    are rarely about the request itself.
    """
    return bool(_REFUSAL.search(_plain(text, 60)))


def expresses_uncertainty(text: str) -> bool:
    """Whether the text expresses uncertainty, by patterns of words: the epistemic markers of Hyland
    2005 and Zhou et al. 2023 without those that often mean something else, such as "may" and
    "about".
    """
    return bool(_UNCERTAINTY.search(_plain(text)))


def lexical_density(text: Tokens) -> float:
    """Share of the words that are not function words (Ure 1971). Punctuation marks are not words. A
    text without words has 0.
    """
    spoken = [word for word in text if word[0].isalnum()]
    return sum(map(_is_content, spoken)) / max(len(spoken), 1)


def new_content_words(prompt: Tokens, response: Tokens) -> int:
    """The number of different content words of the response that are not in the prompt.

    Content words are those of ``lexical_density``. Word forms are not reduced: "cat" and "cats" are
    two words.
    """
    return len(set(filter(_is_content, response)) - set(prompt))


def _is_content(word: str) -> bool:
    # "don't" is judged as "do", "it's" as "it", "can't" and "won't" as what is left of them.
    if not word[0].isalnum():
        return False
    stem = _CONTRACTED.sub("", word)
    return stem not in FUNCTION_WORDS


def _plain(text: str, most: int | None = None) -> str:
    """Lower case, one kind of apostrophe, single spaces; the first ``most`` words."""
    lower = text.lower().replace("’", "'")
    return " ".join(lower.split()[:most])


def _ngrams(text: Tokens, n: int) -> list[Ngram]:
    return list(zip(*(text[k:] for k in range(n)), strict=False))
