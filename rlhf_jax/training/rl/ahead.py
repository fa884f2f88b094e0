"""Rollouts that are sampled one iteration ahead (``rl.rollouts_ahead``; Noukhovitch et al. 2024,
"Asynchronous RLHF", arXiv 2410.18252).

The rollout of step k is sampled with the policy before the update of step k - 1, so that an engine
can sample it during that update. The state holds this policy (``LoopState.behind``): a rollout
depends on the state and the step alone, not on when it is sampled, and a resumed run samples the
one that it lost once more.
"""

import threading
from concurrent.futures import Executor, Future
from dataclasses import replace
from typing import TYPE_CHECKING

import jax
from jax import Array

from rlhf_jax import iteration
from rlhf_jax.iteration import LoopState, Prompts
from rlhf_jax.training.rl.sample import Respond, sample
from rlhf_jax.training.rl.schedule import Batch
from rlhf_jax.types import Metrics, Rollout, TrainState

if TYPE_CHECKING:
    from rlhf_jax.training.rl.job import Job


class Ahead:
    """The sampler of a run whose rollouts are one iteration ahead.

    Args:
        thread: samples the next rollout there; None: each rollout is sampled in its own step.
    """

    def __init__(self, thread: Executor | None):
        self._thread = thread
        self._lock = threading.Lock()
        # What to sample as soon as this step has its own rollout.
        self._next: tuple[LoopState, Batch] | None = None
        self._sampled: Future[tuple[Rollout, Metrics]] | None = None

    def start(self, job: "Job", state: LoopState, step: int) -> TrainState:
        """A copy of the policy before the update of a step: ``behind`` of the state after it, which
        samples the next rollout.
        """
        layout = job.run.layout
        current = TrainState(
            layout.copy(state.train.step), layout.copy(iteration.policy(state)), ()
        )
        self._next = None
        if self._thread is not None and step < job.method.settings.num_iterations:
            # On the host: two threads that start programs on the same devices would block each
            # other where devices wait for one another.
            on_host = jax.device_get(current)
            following, *_ = job.schedule.batches(step)
            self._next = (replace(state, train=on_host, behind=None), following)
        return current

    def sample(self, job: "Job", state: LoopState, batch: Batch) -> tuple[Rollout, Metrics]:
        """The rollout of a step, as ``sample.sample``. The thread then starts with the next one."""
        if self._sampled is None:
            assert state.behind is not None
            rollout, metrics = sample(job, replace(state, train=state.behind, behind=None), batch)
        else:
            rollout, metrics = self._sampled.result()
        if self._thread is not None and self._next is not None:
            self._sampled = self._thread.submit(sample, job, *self._next)
        return rollout, metrics

    def alone(self, respond: Respond) -> Respond:
        """``respond``, which two threads do not call at the same time."""

        def respond_alone(prompts: Prompts, key: Array) -> Rollout:
            with self._lock:
                return respond(prompts, key)

        return respond_alone
