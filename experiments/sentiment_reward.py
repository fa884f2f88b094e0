"""How positive a text is, by the words of the VADER lexicon (Hutto and Gilbert 2014).

    score = sentiment_reward.reward("vader_lexicon.txt")
    score(prompts, responses)      # a number in (-1, 1) for each response

The valences of a response's words, from -4 to 4, are summed, and the sum s becomes s / sqrt(s^2 + 15), which is VADER's
own normalisation. VADER's rules (negation, intensifiers, punctuation, capitals, emoticons) are left out: the reward is
to be exact and plain, not to be a good judge.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from rlhf_jax.errors import UserError

ALPHA = 15.0
WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*")


def read(path: str | Path) -> dict[str, float]:
    """``{word: mean valence}`` of a file whose lines are a word, a tab, a number, and columns that are not read.

    Raises:
        UserError: the file cannot be read, or a line of it is not like that.
    """
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the lexicon cannot be read: {getattr(error, 'strerror', None) or error}") from None
    lexicon = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        word, *others = line.split("\t")
        try:
            lexicon[word] = float(others[0])
        except (IndexError, ValueError):
            raise UserError(f"{path}, line {number}: expected a word, a tab and a number, found {line!r}") from None
    if not lexicon:
        raise UserError(f"{path}: the lexicon is empty")
    return lexicon


def score(lexicon: Mapping[str, float], text: str) -> float:
    """s / sqrt(s^2 + 15) for the sum s of the valences of the text's words; unknown words count 0."""
    total = sum(lexicon.get(word, 0.0) for word in WORD.findall(text.lower()))
    return total / math.sqrt(total * total + ALPHA)


def reward(path: str | Path) -> Callable[[list[str], list[str]], list[float]]:
    """``fn(prompts, responses) -> scores`` with the lexicon of a file; the prompts do not count."""
    return functools.partial(_scores, read(path))


def _scores(lexicon: Mapping[str, float], prompts: list[str], responses: list[str]) -> list[float]:
    return [score(lexicon, response) for response in responses]
