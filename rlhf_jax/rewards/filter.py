"""The safety filter of a run: what is unsafe in prompts and responses, and what becomes of the
rows.

A word list finds only what is spelled as listed; docs/safety.md says what it cannot do.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError, file_errors, logger
from rlhf_jax.rewards import spec
from rlhf_jax.rewards.host import Columns, Decoder, HostReward, on_host
from rlhf_jax.types import Metrics, Rollout

_LETTER = r"[^\W_]"  # or a digit
_MOST_PLACES = 20  # of unsafe prompts that are printed

Verdict = dict[str, str]
"""{rule: what it found}, with the rules ``words``, ``patterns`` and ``classifier``; empty if the
text is safe.
"""


@dataclasses.dataclass(frozen=True)
class Filter:
    """Words and regular expressions that a safe text does not contain."""

    words: re.Pattern[str] | None = None
    patterns: tuple[re.Pattern[str], ...] = ()

    @classmethod
    def create(cls, words: Iterable[str] = (), patterns: Iterable[str] = ()) -> "Filter":
        """Words and phrases are found as whole words in the ``normalized`` text; patterns (Python's
        syntax) anywhere in the text as it is."""
        # The longest first, so that a phrase is found before the word that it begins with.
        forms = sorted({_word_pattern(word) for word in words}, key=lambda form: (-len(form), form))
        return cls(re.compile("|".join(forms)) if forms else None, tuple(map(re.compile, patterns)))

    def found(self, text: str) -> Verdict:
        """The first word in the text, and the first pattern that it matches."""
        verdict = {}
        if self.words is not None and (match := self.words.search(normalized(text))):
            verdict["words"] = match[0]
        if pattern := next((pattern for pattern in self.patterns if pattern.search(text)), None):
            verdict["patterns"] = pattern.pattern
        return verdict


def normalized(text: str) -> str:
    """The text in Unicode's form for caseless matching (NFKC, case folded, NFKC), without invisible
    characters.

    So full-width and styled letters, ligatures and capitals equal the plain ones, and a soft hyphen
    or a zero-width space does not split a word. Accents stay, and so do letters of other alphabets
    that look alike.
    """
    visible = "".join(character for character in text if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold())


def _word_pattern(word: str) -> str:
    parts = normalized(word).split()
    # Only letters and digits have a boundary: a listed emoji is found between letters too, and a
    # word between the underscores of Markdown.
    before = f"(?<!{_LETTER})" if re.match(_LETTER, parts[0]) else ""
    after = f"(?!{_LETTER})" if re.match(_LETTER, parts[-1][-1]) else ""
    return before + r"\s+".join(map(re.escape, parts)) + after


def read_words(path: str | Path) -> list[str]:
    """The words and phrases of a UTF-8 file with one on each line; empty lines are skipped."""
    with file_errors(path):
        lines = Path(path).read_text("utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip() and not normalized(line).strip():
            raise UserError(
                f"{path}, line {number}: has only invisible characters; remove the line"
            )
    words = [line for line in lines if line.strip()]
    if not words:
        raise UserError(f"{path}: has no words; write one word or phrase on each line")
    return words


@dataclasses.dataclass(frozen=True)
class Guard:
    """The filter of a run, by the section ``safety`` of its settings. Without rules it leaves
    everything as it is.

    In a run: ``create``, then ``prompts`` when the data is read, ``for_responses`` when its columns
    are known, and ``enforce`` on each rollout after ``on_host`` has scored it.
    """

    settings: Any  # rlhf_jax.config.Safety
    filter: Filter
    tokenizer: spec.PolicyTokenizer | None = None
    classifier: HostReward | None = None

    @classmethod
    def create(cls, settings: Any) -> "Guard":
        """Reads the word lists."""
        words = [word for path in settings.words for word in read_words(path)]
        return cls(settings, Filter.create(words, settings.patterns))

    def for_responses(
        self, *, tokenizer: spec.PolicyTokenizer, load: spec.Load, columns: Collection[str]
    ) -> "Guard":
        """The guard with the classifier of its settings, if there is one; arguments as of
        ``spec.build_reward``.
        """
        classifier = None
        if self.settings.classifier is not None:
            how: Any = {
                "tokenizer": tokenizer,
                "load": load,
                "columns": columns,
                "flag": "safety.classifier",
            }
            classifier = spec.as_host(spec.build_reward((self.settings.classifier,), **how))
        return dataclasses.replace(self, tokenizer=tokenizer, classifier=classifier)

    def prompts(self, rows: Sequence[Any], tokenizer: Decoder) -> list[Any]:
        """The rows, with ``prompt`` (text or token ids) and ``source``, after the action
        ``settings.prompts``.

        Unsafe by words or patterns are dropped, get ``settings.replacement`` as prompt, or stay.
        Prints their number and places; UserError if no row is left.
        """
        if self.filter == Filter():
            return list(rows)
        texts = [
            row.prompt if isinstance(row.prompt, str) else tokenizer.decode(row.prompt)
            for row in rows
        ]
        judged = [
            (row, bool(self.filter.found(text))) for row, text in zip(rows, texts, strict=True)
        ]
        places = [row.source for row, is_unsafe in judged if is_unsafe]
        more = [f"and {len(places) - _MOST_PLACES} more"] if len(places) > _MOST_PLACES else []
        shown, action = "; ".join(places[:_MOST_PLACES] + more), self.settings.prompts
        done = {"drop": "dropped", "replace": "replaced", "count": "unsafe, and kept"}[action]
        logger.info(
            f"safety: {len(places)} of {len(rows)} prompts {done}" + (f": {shown}" if shown else "")
        )
        if action == "drop" and len(places) == len(rows) > 0:
            raise UserError(f"safety: all {len(rows)} prompts are unsafe, none is left: {shown}")
        if action == "replace":
            return [
                dataclasses.replace(row, prompt=self.settings.replacement) if bad else row
                for row, bad in judged
            ]
        return [row for row, is_unsafe in judged if not is_unsafe or action == "count"]

    def enforce(
        self, sampled: Rollout, scored: Rollout, columns: Columns
    ) -> tuple[Rollout, Metrics, list[Verdict]]:
        """The scored rollout after the action ``settings.responses``, shares of unsafe rows, and
        each row's verdict.

        ``penalise`` subtracts ``penalty`` from the score of an unsafe row, ``replace`` puts
        ``score`` in its place, ``mask`` empties its ``response_mask``, so that no statistic and no
        loss reads it, ``count`` changes nothing.

        Args:
          sampled: the rollout before the reward; rows that are absent here are not judged, and not
            counted.
          scored: NumPy arrays, with ``scores`` [B].

        Raises:
          FloatingPointError: the classifier's score is not finite; it names the rows.
        """
        assert self.tokenizer is not None, "call for_responses first"
        in_response = np.asarray(sampled.response_mask) != 0
        present = in_response.any(axis=1)
        verdicts: list[Verdict] = [
            self.filter.found(self.tokenizer.decode(tokens[mask].tolist())) if mask.any() else {}
            for tokens, mask in zip(np.asarray(sampled.tokens), in_response, strict=True)
        ]
        self._classify(sampled, columns, verdicts)
        unsafe, settings = np.array([bool(verdict) for verdict in verdicts]), self.settings
        rules = [rule for rule in ("words", "patterns", "classifier") if getattr(settings, rule)]
        hits = {"unsafe": unsafe} | {
            rule: np.array([rule in verdict for verdict in verdicts]) for rule in rules
        }
        metrics = {
            f"safety/{name}": jnp.float32(hit.sum() / max(present.sum(), 1))
            for name, hit in hits.items()
        }
        host: Any = scored  # whose fields are declared as JAX arrays
        if settings.responses == "penalise":
            host = host.replace(
                scores=np.where(unsafe, host.scores - np.float32(settings.penalty), host.scores)
            )
        elif settings.responses == "replace":
            host = host.replace(scores=np.where(unsafe, np.float32(settings.score), host.scores))
        elif settings.responses == "mask":
            host = host.replace(response_mask=np.where(unsafe[:, None], 0, host.response_mask))
        return host, metrics, verdicts

    def _classify(self, sampled: Rollout, columns: Columns, verdicts: Sequence[Verdict]) -> None:
        """Adds ``classifier`` to the verdicts of rows whose score is beyond the limits; None is
        not.
        """
        if self.classifier is None:
            return
        try:
            judged: Any = on_host(self.classifier, sampled, columns, "the score")[0]
        except FloatingPointError as error:
            raise FloatingPointError(f"safety.classifier: {error}") from error
        below, above = self.settings.below, self.settings.above
        scored = (judged.response_mask != 0).any(axis=1)
        for verdict, score, has_score in zip(verdicts, judged.scores.tolist(), scored, strict=True):
            if has_score and below is not None and score < below:
                verdict["classifier"] = f"score {score:.4g} below {below:g}"
            elif has_score and above is not None and score > above:
                verdict["classifier"] = f"score {score:.4g} above {above:g}"


def rule_files(settings: Any) -> dict[str, Path]:
    """The word lists and what the classifier reads, by the names that a manifest gives them."""
    files = {path: Path(path) for path in settings.words}
    if settings.classifier is not None:
        files |= spec.sources(settings.classifier)
    return {f"safety {name}": path for name, path in files.items()}


def sentence(verdict: Verdict) -> str | None:
    """A verdict as samples.jsonl has it: ``words: foo; classifier: score 3 above 2``; None for a
    safe text.
    """
    return "; ".join(f"{rule}: {what}" for rule, what in verdict.items()) or None
