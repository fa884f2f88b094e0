"""The safety filter of a run: finds unsafe prompts and responses, and drops, changes or counts
their rows.

A word list finds only words that are spelled as in the list; docs/safety.md explains its limits.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.errors import UserError, file_errors, logger, read_file
from rlhf_jax.graders import spec
from rlhf_jax.graders.service import Services
from rlhf_jax.rewards.host import Columns, HostReward, on_host
from rlhf_jax.rewards.texts import Decoder
from rlhf_jax.runs import processes
from rlhf_jax.types import Metrics, Rollout

_LETTER = r"[^\W_]"  # or a digit
_MOST_PLACES = 20  # of unsafe prompts that are printed
RULES = ("words", "patterns", "classifier")

Verdict = dict[str, str]
"""{rule of ``RULES``: what it found}; empty if the text is safe."""


@dataclasses.dataclass(frozen=True)
class Filter:
    """Words and regular expressions that a safe text does not contain."""

    words: re.Pattern[str] | None = None
    patterns: tuple[re.Pattern[str], ...] = ()

    @classmethod
    def create(cls, words: Iterable[str] = (), *, patterns: Iterable[str] = ()) -> "Filter":
        """Words and phrases are found as whole words in the ``normalized`` text; patterns (Python's
        syntax) anywhere in the text as it is."""
        forms = sorted({_word_pattern(word) for word in words})
        # The longest first, so that a phrase is found before the word that it begins with.
        either = "|".join(sorted(forms, key=len, reverse=True))
        return cls(re.compile(either) if forms else None, tuple(map(re.compile, patterns)))

    def found(self, text: str) -> Verdict:
        """The first word in the text, and the first pattern that it matches."""
        verdict = {}
        word = self.words and self.words.search(normalized(text))
        if word:
            verdict["words"] = word[0]
        matching = [pattern for pattern in self.patterns if pattern.search(text)]
        if matching:
            verdict["patterns"] = matching[0].pattern
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
    """The words and phrases of a UTF-8 file with one on each line. Empty lines are skipped."""
    with file_errors(path):
        text = read_file(Path(path)).decode("utf-8-sig")
    lines = text.replace("\r\n", "\n").split("\n")
    words = [line for line in lines if line.strip()]
    for number, line in enumerate(lines, 1):
        if line.strip() and not normalized(line).strip():
            raise UserError(
                f"{path}, line {number}: has only invisible characters; remove the line"
            )
    if not words:
        raise UserError(f"{path}: has no words; write one word or phrase on each line")
    return words


@dataclasses.dataclass(frozen=True)
class Guard:
    """The filter of a run, by the section ``safety`` of its settings. Without rules it changes
    nothing.

    In a run: ``create``, then ``prompts`` when the data is read, ``for_responses`` when its columns
    are known, and ``enforce`` on each rollout after ``on_host`` has scored it.
    """

    settings: Any  # rlhf_jax.config.Safety
    filter: Filter
    tokenizer: spec.PolicyTokenizer | None = None
    classifier: HostReward | None = None
    reads: frozenset[str] = frozenset()  # columns, by its classifier

    @classmethod
    def create(cls, settings: Any) -> "Guard":
        """Reads the word lists."""
        words = [word for path in settings.words for word in read_words(path)]
        return cls(settings, Filter.create(words, patterns=settings.patterns))

    def for_responses(
        self,
        *,
        tokenizer: spec.PolicyTokenizer,
        load: spec.Load,
        columns: Collection[str],
        services: Services | None = None,
    ) -> "Guard":
        """The guard with the classifier of its settings, if there is one; arguments as of
        ``spec.build_reward``.
        """
        guard = dataclasses.replace(self, tokenizer=tokenizer)
        if self.settings.classifier is None:
            return guard
        reward = spec.build_reward(
            (self.settings.classifier,),
            tokenizer=tokenizer,
            load=load,
            columns=columns,
            flag="safety.classifier",
            services=services,
        )
        return dataclasses.replace(guard, classifier=spec.as_host(reward), reads=reward.reads)

    def prompts(self, rows: Sequence[Any], tokenizer: Decoder) -> list[Any]:
        """The rows, with ``prompt`` (text or token ids) and ``source``, after the action
        ``settings.prompts``.

        Rows that are unsafe by words or patterns are dropped, get ``settings.replacement`` as
        prompt, or stay. Their number and places are printed.

        Raises UserError if no row is left.
        """
        if self.filter == Filter():
            return list(rows)
        action = self.settings.prompts
        safe = []
        places = []
        for row in rows:
            text = row.prompt if isinstance(row.prompt, str) else tokenizer.decode(row.prompt)
            if not self.filter.found(text):
                safe.append(row)
                continue
            places.append(row.source)
            if action == "replace":
                text = self.settings.replacement
                safe.append(dataclasses.replace(row, prompt=text, messages=(), tools=None))
            elif action == "count":
                safe.append(row)
        done = {"drop": "dropped", "replace": "replaced", "count": "unsafe, and kept"}[action]
        num_more = len(places) - _MOST_PLACES
        more = [f"and {num_more} more"] if num_more > 0 else []
        shown = "; ".join([*places[:_MOST_PLACES], *more])
        logger.info(f"safety: {len(places)} of {len(rows)} prompts {done}: {shown or 'none'}")
        if rows and not safe:
            raise UserError(f"safety: all {len(rows)} prompts are unsafe, so no prompt is left")
        return safe

    def enforce(
        self, sampled: Rollout, *, scored: Rollout, columns: Columns
    ) -> tuple[Rollout, Metrics, list[Verdict]]:
        """The scored rollout after the action ``settings.responses``, shares of unsafe rows, and
        each row's verdict.

        ``penalise`` subtracts ``penalty`` from the score of an unsafe row, ``replace`` puts
        ``score`` in its place, ``mask`` empties its ``response_mask``, which makes it a missing
        row, ``count`` changes nothing.

        Args:
          sampled: the rollout before the reward. Its missing rows are neither judged nor counted.
          scored: NumPy arrays, with ``scores`` [B]; ``columns`` are of this process's rows.

        Raises:
          FloatingPointError: the classifier's score is not finite; it names the row.
        """
        of_all = processes.gather(lambda: self._verdicts(processes.own_rows(sampled), columns))
        verdicts = [verdict for of_process in of_all for verdict in of_process]
        unsafe = np.array([bool(verdict) for verdict in verdicts])
        num_present = max(int(sampled.present.sum()), 1)
        metrics = {"safety/unsafe": jnp.float32(unsafe.sum() / num_present)}
        for rule in RULES:
            if vars(self.settings)[rule]:
                hits = sum(rule in verdict for verdict in verdicts)
                metrics[f"safety/{rule}"] = jnp.float32(hits / num_present)
        return self._punished(scored, unsafe), metrics, verdicts

    def _verdicts(self, sampled: Rollout, columns: Columns) -> list[Verdict]:
        assert self.tokenizer is not None, "call for_responses first"
        verdicts: list[Verdict] = []
        for tokens, mask in zip(sampled.tokens, sampled.mask, strict=True):
            response = self.tokenizer.decode(tokens[mask].tolist())
            verdicts.append(self.filter.found(response) if mask.any() else {})
        if self.classifier is not None:
            judged: Any = on_host(self.classifier, sampled, columns, "safety.classifier")[0]
            for row in np.flatnonzero(judged.present):
                score = float(np.sum(judged.scores[row]))
                below = self.settings.below
                above = self.settings.above
                if below is not None and score < below:
                    verdicts[row]["classifier"] = f"score {score:.4g} below {below:g}"
                elif above is not None and score > above:
                    verdicts[row]["classifier"] = f"score {score:.4g} above {above:g}"
        return verdicts

    def _punished(self, scored: Rollout, unsafe: np.ndarray) -> Rollout:
        """The scored rollout after the action on unsafe rows [B]; if dense, at the last token."""
        settings = self.settings
        scores: Any = scored.scores
        mask: Any = scored.response_mask
        is_last: Any = True
        if scores.ndim == 2:
            remaining = np.cumsum(mask[:, ::-1] != 0, axis=1)[:, ::-1]
            is_last = (remaining == 1) & (mask != 0)
            unsafe = unsafe[:, None]
        if settings.responses == "penalise":
            penalty = np.where(is_last, np.float32(settings.penalty), np.float32(0))
            scores = np.where(unsafe, scores - penalty, scores)
        elif settings.responses == "replace":
            other = np.where(is_last, np.float32(settings.score), np.float32(0))
            scores = np.where(unsafe, other, scores)
        elif settings.responses == "mask":
            mask = np.where(unsafe.reshape(-1, 1), 0, mask)
        return dataclasses.replace(scored, scores=scores, response_mask=mask)


def rule_files(settings: Any) -> dict[str, Path]:
    """The word lists and the files of the classifier, by their names in a manifest."""
    files = {path: Path(path) for path in settings.words}
    if settings.classifier is not None:
        files |= spec.sources(settings.classifier)
    return {f"safety {name}": path for name, path in files.items()}


def sentence(verdict: Verdict) -> str | None:
    """A verdict as samples.jsonl has it: ``words: foo; classifier: score 3 above 2``; None for a
    safe text.
    """
    return "; ".join(f"{rule}: {what}" for rule, what in verdict.items()) or None
