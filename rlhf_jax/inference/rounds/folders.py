"""Where the parts of a round are."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Round:
    """The files and runs of a round, which begins with 1; of round 0 there is only the evaluation
    of the first policy.
    """

    number: int
    job: Path  # the folder of all rounds

    @property
    def folder(self) -> Path:
        """Of all files and runs of the round."""
        return self.job / f"round-{self.number}"

    @property
    def pairs(self) -> Path:
        """What is compared, rows with a prompt, responses, chosen_by and row."""
        return self.folder / "pairs.jsonl"

    @property
    def labels(self) -> Path:
        """Judgements of people so far; the page's store is beside it."""
        return self.folder / "labels.jsonl"

    @property
    def prefs(self) -> Path:
        """The round's rows of preferences, complete."""
        return self.folder / "prefs.jsonl"

    @property
    def reward_model(self) -> Path:
        """The run of the reward model."""
        return self.folder / "reward_model"

    @property
    def rl(self) -> Path:
        """The run of the policy."""
        return self.folder / "rl"

    @property
    def evaluation(self) -> Path:
        """The folder of the evaluation."""
        return self.folder / "evaluation"
