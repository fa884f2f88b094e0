"""What counts as unsafe in a text, and what becomes of the row that says it: pure functions of texts and scores.

A word list finds what is spelt as listed and nothing else; docs/safety.md says what it cannot do.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.types import Rollout

_LETTER = r"[^\W_]"  # or a digit
Action = Literal["penalise", "replace", "mask", "count"]

Verdict = dict[str, str]
"""{rule: what it found}, with the rules ``words``, ``patterns`` and ``classifier``; empty: safe."""


@dataclasses.dataclass(frozen=True)
class Filter:
    """Words and regular expressions that a safe text does not hold."""

    words: re.Pattern[str] | None = None
    patterns: tuple[re.Pattern[str], ...] = ()

    @classmethod
    def create(cls, words: Iterable[str] = (), patterns: Iterable[str] = ()) -> "Filter":
        """Words and phrases are found as whole words in the text as ``normalized`` leaves it; patterns, in Python's
        syntax, anywhere in the text as it is.

        Raises:
            re.error: a pattern is no regular expression.
            UserError: a word holds nothing that a text could show.
        """
        # The longest first, so that a phrase is found before the word that it begins with.
        forms = sorted({_word_pattern(word) for word in words}, key=lambda form: (-len(form), form))
        return cls(re.compile("|".join(forms)) if forms else None, tuple(map(re.compile, patterns)))

    def found(self, text: str) -> Verdict:
        """The first word and the first pattern that the text holds; a pattern is named by itself."""
        verdict = {}
        if self.words is not None and (match := self.words.search(normalized(text))):
            verdict["words"] = match[0]
        if pattern := next((pattern for pattern in self.patterns if pattern.search(text)), None):
            verdict["patterns"] = pattern.pattern
        return verdict


def normalized(text: str) -> str:
    """The text in Unicode's form for caseless matching (NFKC, case folded, NFKC), without invisible characters.

    So full-width and styled letters, ligatures and capitals equal the plain ones, and neither a soft hyphen nor a
    zero-width space parts a word. Accents stay, and so do letters of other alphabets that look alike.
    """
    visible = "".join(character for character in text if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold())


def _word_pattern(word: str) -> str:
    parts = normalized(word).split()
    if not parts:
        raise UserError(f"the word {word!r} holds nothing that a text could show")
    text = r"\s+".join(map(re.escape, parts))
    # A boundary stands beside letters and digits alone: an emoji of the list is found between letters too, and a word
    # between Markdown's underscores.
    before = f"(?<!{_LETTER})" if re.match(_LETTER, parts[0]) else ""
    after = f"(?!{_LETTER})" if re.match(_LETTER, parts[-1][-1]) else ""
    return f"{before}{text}{after}"


def read_words(path: str | Path) -> list[str]:
    """The words and phrases of a UTF-8 file, one a line; empty lines are passed over.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or holds no word.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte 0x{error.object[error.start]:02x} is not UTF-8, which is expected") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    words = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not normalized(line).strip():
            raise UserError(f"{path}, line {number}: holds invisible characters alone; remove the line")
        words += [line] if line.strip() else []
    if not words:
        raise UserError(f"{path}: holds no word; one word or phrase a line is expected")
    return words


def beyond(scores: Sequence[float | None], below: float | None, above: float | None) -> list[str | None]:
    """What is wrong with each score, if anything: ``score 0.1 below 0.5``; a score of None could not be given: nothing
    is."""
    return [
        None
        if score is None
        else f"score {score:.4g} below {below:g}"
        if below is not None and score < below
        else f"score {score:.4g} above {above:g}"
        if above is not None and score > above
        else None
        for score in scores
    ]


def enforce(rollout: Rollout, unsafe: np.ndarray, action: Action, *, penalty: float, score: float | None) -> Rollout:
    """A scored rollout of NumPy arrays after the action on its unsafe rows ([B] bool).

    ``penalise`` subtracts ``penalty`` from their score, ``replace`` puts ``score`` in its place, ``mask`` empties their
    ``response_mask``, so that they are absent from every statistic and loss, ``count`` leaves them as they are.

    Raises:
        ValueError: the rollout has no scores, or ``replace`` no ``score``.
    """
    if rollout.scores is None:
        raise ValueError("a filter of responses needs one score per response")
    if action == "penalise":
        changes: dict[str, Any] = {"scores": np.where(unsafe, rollout.scores - np.float32(penalty), rollout.scores)}
    elif action == "replace":
        if score is None:
            raise ValueError("the action replace needs a score")
        changes = {"scores": np.where(unsafe, np.float32(score), rollout.scores)}
    elif action == "mask":
        changes = {"response_mask": np.where(unsafe[:, None], 0, rollout.response_mask)}
    else:
        changes = {}
    return dataclasses.replace(rollout, **changes)
