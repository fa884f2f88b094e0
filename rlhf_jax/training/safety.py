"""The safety filter in an RL run: prompts are judged when the data is read, responses after they were sampled."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import generator, rewards
from rlhf_jax.config import RunConfig, Safety
from rlhf_jax.data.rows import Prompt
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import filter as safety
from rlhf_jax.runs import manifest
from rlhf_jax.training import reward_functions
from rlhf_jax.training.reward_functions import RunReward
from rlhf_jax.types import Metrics, Rollout

_MOST_LINES = 20  # of unsafe prompts whose places are printed


@dataclasses.dataclass(frozen=True)
class Guard:
    """The filter of a run; without words, patterns and classifier it leaves everything as it is."""

    settings: Safety
    filter: safety.Filter
    classifier: rewards.HostReward | None = None
    tokenizer: Tokenizer | None = None

    @classmethod
    def of(cls, settings: Safety) -> "Guard":
        """Reads the word lists.

        Raises:
            UserError: one of them cannot be read.
        """
        words = [word for path in settings.words for word in safety.read_words(path)]
        return cls(settings, safety.Filter.create(words, settings.patterns))

    @property
    def fingerprints(self) -> dict[str, str]:
        """sha256 of the word lists and of what the classifier reads, by what a manifest calls them."""
        files: dict[str, Any] = {path: path for path in self.settings.words}
        if self.settings.classifier is not None:
            files |= reward_functions.sources(self.settings.classifier)
        return {f"safety {name}": manifest.fingerprint(path) for name, path in files.items()}

    def prompts(self, rows: Sequence[Prompt], tokenizer: Tokenizer) -> list[Prompt]:
        """The rows after ``safety.prompts``: without those that words or patterns find unsafe, with ``replacement`` in
        their place, or all of them. Prints how many there were, and where.

        Raises:
            UserError: no row is left.
        """
        settings = self.settings
        if not settings.words and not settings.patterns:
            return list(rows)
        texts = [row.prompt if isinstance(row.prompt, str) else tokenizer.decode(row.prompt) for row in rows]
        unsafe = [bool(self.filter.found(text)) for text in texts]
        places = [row.source for row, bad in zip(rows, unsafe, strict=True) if bad]
        done = {"drop": "dropped", "replace": "replaced", "count": "unsafe, and kept"}[settings.prompts]
        shown = "; ".join(places[:_MOST_LINES])
        more = f"; and {len(places) - _MOST_LINES} more" if len(places) > _MOST_LINES else ""
        print(
            f"safety: {len(places)} of {len(rows)} prompts {done}" + (f": {shown}{more}" if places else ""), flush=True
        )
        if settings.prompts == "drop":
            kept = [row for row, bad in zip(rows, unsafe, strict=True) if not bad]
            if not kept:
                raise UserError(f"safety: all {len(rows)} prompts are unsafe, none is left: {shown}{more}")
            return kept
        if settings.prompts == "replace":
            assert settings.replacement is not None
            new = settings.replacement
            return [dataclasses.replace(row, prompt=new) if bad else row for row, bad in zip(rows, unsafe, strict=True)]
        return list(rows)

    def around(
        self, run_reward: RunReward, tokenizer: Tokenizer, config: RunConfig, columns: Collection[str]
    ) -> RunReward:
        """The reward with this filter after it, both on the host; the reward itself where there is no filter.

        Raises:
            UserError: ``safety.classifier`` does not exist or does not fit.
        """
        settings = self.settings
        if not settings.on:
            return run_reward
        classifier = None
        if settings.classifier is not None:
            try:
                built = reward_functions.build((settings.classifier,), tokenizer, config.compute, columns)
            except UserError as error:
                raise UserError(str(error).replace("--reward", "safety.classifier", 1)) from error
            classifier = reward_functions.as_host(built)
        guard = dataclasses.replace(self, classifier=classifier, tokenizer=tokenizer)
        return RunReward(host=reward_functions.as_host(run_reward), enforce=guard.enforce)

    def enforce(
        self, sampled: Rollout, scored: Rollout, columns: Mapping[str, Sequence[Any]]
    ) -> tuple[Rollout, Metrics, list[safety.Verdict]]:
        """The scored rollout after ``safety.responses``; how many rows were unsafe; and why each was.

        Rows that are absent from ``sampled`` are neither judged nor counted. Shares are of the others.

        Raises:
            FloatingPointError: naming the rows, if the classifier's score is not finite.
        """
        assert self.tokenizer is not None
        present = (np.asarray(sampled.response_mask) != 0).any(axis=1)
        verdicts = [
            self.filter.found(text) if here else {}
            for text, here in zip(generator.responses(sampled, self.tokenizer), present, strict=True)
        ]
        if self.classifier is not None:
            for verdict, wrong in zip(verdicts, self._classified(sampled, columns), strict=True):
                if wrong is not None:
                    verdict["classifier"] = wrong
        unsafe = np.array([bool(verdict) for verdict in verdicts])
        settings = self.settings
        rules = [name for name in ("words", "patterns", "classifier") if getattr(settings, name)]
        hits = {"unsafe": unsafe} | {rule: np.array([rule in verdict for verdict in verdicts]) for rule in rules}
        metrics = {f"safety/{name}": jnp.float32(hit.sum() / max(present.sum(), 1)) for name, hit in hits.items()}
        enforced = safety.enforce(scored, unsafe, settings.responses, penalty=settings.penalty, score=settings.score)
        return enforced, metrics, verdicts

    def _classified(self, sampled: Rollout, columns: Mapping[str, Sequence[Any]]) -> list[str | None]:
        """What is wrong with each row by its classifier score; nothing with those that are absent or have none."""
        assert self.classifier is not None
        try:
            judged = rewards.on_host(self.classifier, sampled, columns).rollout
        except FloatingPointError as error:
            raise FloatingPointError(f"safety.classifier: {error}") from error
        kept = (np.asarray(judged.response_mask) != 0).any(axis=1)
        scores = [
            float(score) if here else None for score, here in zip(jax.device_get(judged.scores), kept, strict=True)
        ]
        return safety.beyond(scores, self.settings.below, self.settings.above)


def told(verdict: safety.Verdict) -> str | None:
    """A verdict as samples.jsonl has it: ``words: foo; classifier: score 3 above 2``; None for a safe text."""
    return "; ".join(f"{rule}: {what}" for rule, what in verdict.items()) or None
