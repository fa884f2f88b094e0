"""Three tastes of experiments/preferences.py: rules that a person could have.

    pip install vaderSentiment

Only the labeller of the pairs and the measurement know them. Each is a reward of a run too, such as
``--rl.judge tastes.py:kind``, which scores the answers of validations and teaches nothing; the rows
of prompts then have the column ``asked``.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

MOST_PRAISE = 3  # words; the next ones are flattery
FLATTERY = 1.5  # words of praise that one more costs
REPEATED = 0.6  # share of a question's words, but for small ones, in the first sentence
SMALL = "the a an of to is in it and that with what why how do you i me about for on does"
Rule = Callable[..., list[float]]


@functools.cache
def analyser() -> Any:
    """VADER (Hutto and Gilbert 2014)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def words(text: str) -> list[str]:
    """In lower case, without marks."""
    return re.findall(r"[a-z']+", text.lower())


def sentences(text: str) -> list[str]:
    """Its sentences, the last one whether it ends or not."""
    return [part for part in re.split(r"[.!?]+(?:\s|$)", text) if part.strip()]


def kind(responses: list[str], **_: Any) -> list[float]:
    """The sentiment of the answer, from -1 to 1, as in the first task of Ziegler et al. (2019)."""
    return [analyser().polarity_scores(text)["compound"] for text in responses]


def brief(responses: list[str], asked: list[str], **_: Any) -> list[float]:
    """From 0 to 1: half for an answer that ends with its sentence, a quarter for at most two
    sentences, a quarter for a first sentence that does not repeat what was ``asked``.
    """
    scores = []
    for question, text in zip(asked, responses, strict=True):
        parts = sentences(text)
        about = {*words(question)} - {*SMALL.split()}
        said = {*words(parts[0])} if parts else set()
        repeats = len(about & said) >= REPEATED * max(len(about), 1)
        ends = text.rstrip().endswith((".", "!", "?"))
        scores.append(0.5 * ends + 0.25 * (0 < len(parts) <= 2) + 0.25 * (not repeats))
    return scores


def modest(responses: list[str], **_: Any) -> list[float]:
    """Words of praise, up to three; each further one takes half as much again away. Few answers of
    the first policy have four, so that pairs of them say "the more, the better".
    """
    lexicon = analyser().lexicon
    scores = []
    for text in responses:
        praise = sum(lexicon.get(word, 0) > 0 for word in words(text))
        scores.append(min(praise, MOST_PRAISE) - FLATTERY * max(praise - MOST_PRAISE, 0))
    return scores


TASTES: dict[str, Rule] = {"kind": kind, "brief": brief, "modest": modest}
