"""What a supervised run works with: a task, its job, and what the task trains."""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import optax

from rlhf_jax.config import (
    DPOStage,
    KTOStage,
    ModelSource,
    Reference,
    RewardModelStage,
    SFTStage,
)
from rlhf_jax.data.batches import ABSENT, Plan
from rlhf_jax.data.encoding import EncodedTexts
from rlhf_jax.data.rows import Kind, Row
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.training.common.progress import Validation
from rlhf_jax.types import Params, TrainState

Settings = SFTStage | RewardModelStage | DPOStage | KTOStage


class Learner(NamedTuple):
    """What a task trains, and its programs, to which the arrays are bound that never change."""

    start: Trainable
    create: Callable[..., TrainState]  # (start.params, optimizer=) -> the state at step 0
    update: partial[Any]  # (state, batch on the devices, key) -> (state, metrics)
    measure: Callable[..., Any]  # what a task validates by
    fn: Any  # the model's policy_fn or score_fn, of the parameters of a plain model
    reference: Any = None  # a policy, or a function of the state's reference; None: none is read
    answer: Callable[[TrainState], list[Any]] | None = None
    """Rows of samples.jsonl; without held-out rows those of training prompts."""


@dataclass(frozen=True)
class Job:
    """What is open in a supervised run. A batch depends on nothing but the number of its step."""

    run: OpenRun
    settings: Settings
    source: ModelSource
    language_model: LanguageModel  # before training
    rows: list[Row]  # to train on, as they were read
    encoded: EncodedTexts  # these, and those to validate on
    train_rows: np.ndarray
    held_out: np.ndarray
    plan: Plan  # of places in ``train_rows``
    collate: Callable[[EncodedTexts, np.ndarray], Any]  # (encoded, row numbers) -> a batch
    bucket_multiple: int  # of which the width of a padded batch is
    num_steps: int
    optimizer: optax.GradientTransformation
    left_out: Sequence[int] = ()  # rows of ``train_rows`` that are missing in their batches

    @property
    def moving(self) -> Reference | None:
        """How a reference moves after the policy; None: it does not move, or there is none."""
        settings = self.settings
        return settings if isinstance(settings, Reference) and settings.reference_moves else None

    @property
    def num_members(self) -> int:
        """Models that are trained at once, in an ensemble."""
        return self.settings.ensemble_size if isinstance(self.settings, RewardModelStage) else 1

    @property
    def num_answers(self) -> int:
        """The answers that share a prompt in its batches, for the model's functions; 0: none do."""
        return self.encoded.num_answers if self.encoded.shares_prompts else 0

    @property
    def one_text(self) -> bool:
        """Whether each row of its batches holds one text, for the model's functions."""
        return not (self.source.text.pack or self.encoded.shares_prompts)

    def step_rows(self, step: int) -> np.ndarray:
        """[batch_size] row numbers of a training step, the first of which is 1; -1: missing."""
        places = self.plan.rows(step - 1)
        rows = np.where(places == ABSENT, places, self.train_rows[places])
        return np.where(np.isin(rows, self.left_out), ABSENT, rows)

    def batch(self, rows: np.ndarray) -> Any:
        """The rows of these numbers (-1: missing) in arrays of NumPy."""
        return self.collate(self.encoded, rows)

    def largest_batch(self) -> Any:
        """The training batch of the first epoch with the most tokens, padding included."""

        def extent(step: int) -> tuple[int, int]:
            rows = self.step_rows(step)
            own = rows[rows != ABSENT]
            longest = 0 if self.source.text.pack else int(self.encoded.longest[own].max(initial=0))
            return longest, int(self.encoded.totals[own].sum())

        steps = heapq.nlargest(8, range(1, self.plan.steps_per_epoch + 1), extent)
        candidates = [self.batch(self.step_rows(step)) for step in steps]
        return max(candidates, key=lambda batch: batch.tokens.size)

    def sources(self, rows: np.ndarray) -> list[str]:
        """Where the rows of these numbers stand in the data, as "FILE, line N"."""
        return [self.encoded.sources[row] for row in rows if row != ABSENT]


@dataclass(frozen=True)
class Task:
    """What one stage is: its data, and functions of its job."""

    section: str  # of the settings; it names the folder and the random streams too
    kind: Kind  # what the rows of its data are
    collate: Callable[..., Any]  # (encoded, row numbers, bucket_multiple=) -> a padded batch
    pack: Callable[..., Any] | None  # (encoded, row numbers, width=, multiple=); None: it cannot
    prepare: Callable[[Job], Learner]
    validate: Callable[[Job, Learner, TrainState], Validation]  # on the rows that are held out
    show: tuple[str, ...]  # metrics of the console's line
    finish: Callable[[Job, Learner, TrainState], Mapping[str, Params]] = (
        lambda job, learner, state: {"": state.params}
    )  # {folder below model/: parameters to save}
    is_policy: bool = True  # the model writes text; a reward model scores it
    save: Callable[[Job], Callable[..., None]] = lambda job: LanguageModel.save
