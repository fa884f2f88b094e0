"""The prompts and the key of each step of an RL run."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from rlhf_jax.data import batches
from rlhf_jax.data.encoding import EncodedPrompts


class Batch(NamedTuple):
    """The prompts and the key of one sampling."""

    prompts: EncodedPrompts
    rows: np.ndarray  # [B] row numbers in ``prompts``; -1 is a missing row
    key: Array
    shared_by: int = 1  # adjacent rows that compute their prompt once
    group_size: int = 1  # adjacent rows that answer the same prompt


@dataclass(frozen=True)
class Schedule:
    """The prompts of each step. They depend only on the keys and the number of the step, so that a
    resumed run draws the same.
    """

    prompts: EncodedPrompts
    train_rows: np.ndarray
    num_prompts: int  # distinct prompts of one sampling
    group_size: int  # responses to each prompt
    samplings: int  # the most samplings of a step, 1 without ``rl.dynamic_sampling``
    order_key: Array
    rollout_key: Array
    multiple: int  # the width of a batch is a multiple of it
    shared_by: int = 1  # adjacent rows that compute their prompt once

    def rows(self, step: int) -> np.ndarray:
        """The prompts' rows, [samplings, num_prompts].

        Those after the first are the prompts of other steps, spread over the epoch.
        """
        n = len(self.train_rows)
        apart = max(n // self.num_prompts // self.samplings, 1)
        steps = step + apart * np.arange(self.samplings)
        drawn = [
            batches.prompt_rows(n, batch_size=self.num_prompts, key=self.order_key, step=int(i))
            for i in steps
        ]
        return self.train_rows[np.stack(drawn)]

    def batches(self, step: int, rows: np.ndarray | None = None) -> list[Batch]:
        """The batches of a step, all as wide as the longest prompt of the step.

        Args:
            rows: as ``rows`` draws them; None: these.
        """
        rows = self.rows(step) if rows is None else rows
        prompts = batches.narrowed(self.prompts, rows.ravel(), self.multiple)
        first = step * self.samplings
        return [self._batch(prompts, own, first + i) for i, own in enumerate(rows)]

    def widest(self) -> Batch:
        """The first batch, as wide as the longest of all prompts."""
        prompts = batches.narrowed(self.prompts, self.train_rows, self.multiple)
        return self._batch(prompts, self.rows(0)[0], 0)

    def sources(self, rows: np.ndarray) -> list[str]:
        """The places of a step's prompts, as "FILE, line N"."""
        return [self.prompts.rows[row].source for row in rows.ravel()]

    def _batch(
        self,
        prompts: EncodedPrompts,
        rows: np.ndarray,
        number: int,
    ) -> Batch:
        key = jax.random.fold_in(self.rollout_key, number)
        each = np.repeat(rows, self.group_size)
        return Batch(prompts, each, key, self.shared_by, self.group_size)
