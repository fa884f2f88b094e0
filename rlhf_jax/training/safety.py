"""``rewards.filter`` around the reward of a run, until the stages call it themselves."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from rlhf_jax.config import RunConfig, Safety
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.rewards import filter
from rlhf_jax.rewards.filter import sentence as told
from rlhf_jax.runs import manifest
from rlhf_jax.training import reward_functions
from rlhf_jax.training.reward_functions import RunReward

__all__ = ["Guard", "told"]


@dataclasses.dataclass(frozen=True)
class Guard:
    """As ``filter.Guard``."""

    settings: Safety
    guard: filter.Guard

    @classmethod
    def of(cls, settings: Safety) -> "Guard":
        """The filter of a run."""
        return cls(settings, filter.Guard.create(settings))

    @property
    def fingerprints(self) -> dict[str, str]:
        """sha256 of what the filter reads."""
        return {name: manifest.fingerprint(path) for name, path in filter.rule_files(self.settings).items()}

    def prompts(self, rows: Sequence[Any], tokenizer: Tokenizer) -> list[Any]:
        """As ``filter.Guard.prompts``."""
        return self.guard.prompts(rows, tokenizer)

    def around(
        self, run_reward: RunReward, tokenizer: Tokenizer, config: RunConfig, columns: Collection[str]
    ) -> RunReward:
        """The reward with the filter after it."""
        if not self.settings.on:
            return run_reward
        guard = self.guard.for_responses(
            tokenizer=tokenizer, load=lambda path: reward_functions.load(path, config.compute), columns=columns
        )
        return RunReward(host=reward_functions.as_host(run_reward), enforce=guard.enforce)
