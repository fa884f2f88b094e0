"""Figures about texts, from their words alone: variety, repetition, refusals, uncertainty,
information. English only.

What is found by word patterns is found by its surface: a paraphrase that has none of the words is
missed, and a quotation counts. The patterns are in ``texts.yaml``; ``docs/evaluation.md`` says how
often they are right.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml

Tokens = Sequence[str]

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
    counts = Counter(gram for text in texts for gram in _ngrams(text, n))
    return len(counts) / max(counts.total(), 1)


def self_bleu(texts: Sequence[Tokens], n: int = 4) -> list[float]:
    """BLEU-n of each text with all others as its references (Zhu et al. 2018): 1 for copies, low
    where texts differ.

    BLEU is that of Papineni et al. 2002 with equal weights of the orders 1 to n, the reference of
    the closest length (the shorter of two), and a count of 0.1 in place of 0 matches (method 1 of
    Chen and Cherry 2014). An order of which a text has no n-gram is left out; an empty text scores
    0. There are at least two texts.
    """
    by_order = [_log_precisions(texts, order) for order in range(1, n + 1)]
    lengths = Counter(map(len, texts))
    scores = []
    for text, *logs in zip(texts, *by_order, strict=True):
        present = [log for log in logs if log is not None]
        if not present:
            scores.append(0.0)
            continue
        others = lengths - Counter([len(text)])
        closest = min(others, key=lambda length: (abs(length - len(text)), length))
        brevity = min(0.0, 1 - closest / len(text))
        scores.append(math.exp(brevity + sum(present) / len(present)))
    return scores


def _log_precisions(texts: Sequence[Tokens], order: int) -> list[float | None]:
    """Of each text, the log of the share of its n-grams that another text has; None: it has no
    n-gram.
    """
    own = [Counter(_ngrams(text, order)) for text in texts]
    highest: dict[tuple[str, ...], list[int]] = {}  # the two highest counts in any text
    for grams in own:
        for gram, count in grams.items():
            counts = [*highest.get(gram, [0, 0]), count]
            highest[gram] = sorted(counts)[-2:]
    logs: list[float | None] = []
    for grams in own:
        matches = 0
        for gram, count in grams.items():
            second, first = highest[gram]
            # Another text has the n-gram at most as often as the highest count that is not this
            # text's own.
            matches += second if first == count else count
        logs.append(math.log((matches or 0.1) / grams.total()) if grams else None)
    return logs


def repetition(text: Tokens, n: int = 3) -> float:
    """Share of a text's n-grams that it has said before, ``1 - different / all`` (seq-rep-n,
    Welleck et al. 2020); 0 for a text shorter than n.
    """
    return 1 - distinct_n([text], n) if len(text) >= n else 0.0


def is_refusal(text: str) -> bool:
    """Whether the text says that its writer will not do what was asked, by patterns of words.

    Matching of phrases is what Zou et al. 2023 and the string match of XSTest (Röttger et al. 2024)
    do; these patterns are our own. An apology alone is no refusal. Only the first 60 words are
    read: later ones are rarely about the request itself.
    """
    return bool(_REFUSAL.search(_plain(text, 60)))


def expresses_uncertainty(text: str) -> bool:
    """Whether the text hedges anywhere, by patterns of words: a subset of the epistemic markers in
    the lists of Hyland 2005 and Zhou et al. 2023, without those that often mean something else,
    such as "may" and "about".
    """
    return bool(_UNCERTAINTY.search(_plain(text)))


def lexical_density(text: Tokens) -> float:
    """Share of the words that are no function words (Ure 1971); punctuation is no word, and 0
    without any word.
    """
    spoken = [word for word in text if word[0].isalnum()]
    return sum(_is_content(word) for word in spoken) / max(len(spoken), 1)


def new_content_words(prompt: Tokens, response: Tokens) -> int:
    """Different content words of the response that the prompt does not hold: what it adds to the
    question.

    Content words are those of ``lexical_density``. Word forms are not reduced: "cat" and "cats" are
    two.
    """
    return len({word for word in response if _is_content(word)} - set(prompt))


def _is_content(word: str) -> bool:
    # "don't" is judged as "do", "it's" as "it", "can't" and "won't" as what is left of them.
    return word[0].isalnum() and _CONTRACTED.sub("", word) not in FUNCTION_WORDS


def _plain(text: str, most: int | None = None) -> str:
    """Lower case, one kind of apostrophe, single spaces; at most so many words."""
    return " ".join(text.lower().replace("’", "'").split()[:most])


def _ngrams(text: Tokens, n: int) -> list[tuple[str, ...]]:
    return list(zip(*(text[k:] for k in range(n)), strict=False))
