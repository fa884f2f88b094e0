"""Rollouts that are sampled one iteration ahead (``rl.rollouts_ahead``; Noukhovitch et al. 2024,
"Asynchronous RLHF", arXiv 2410.18252).

The rollout of step k is sampled with the policy before the update of step k - 1, so that an engine
can sample it during that update. The state holds this policy (``LoopState.behind``): a rollout
depends on the state and the step alone, not on when it is sampled, and a resumed run samples the
one that it lost once more.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace

import jax
from jax import Array

from rlhf_jax import iteration
from rlhf_jax.iteration import LoopState, Prompts
from rlhf_jax.training.rl.schedule import Batch, Schedule
from rlhf_jax.training.rl.steps import Advance, Respond, Responder, Sampler
from rlhf_jax.types import Metrics, Params, Rollout, TrainState

Copy = Callable[[Params], Params]
"""The same numbers in arrays of their own."""


def sampling_state(state: LoopState) -> LoopState:
    """The state with the policy that samples its next rollout in place of the trained one."""
    assert state.behind is not None
    return replace(state, train=state.behind, behind=None)


def one_at_a_time(*responders: Responder) -> list[Responder]:
    """The responders behind one lock: the thread of the next rollout and a validation must not
    sample at the same time.
    """
    lock = threading.Lock()

    def locked(responder: Responder) -> Responder:
        def at(state: LoopState) -> Respond:
            respond = responder(state)

            def respond_alone(prompts: Prompts, key: Array) -> Rollout:
                with lock:
                    return respond(prompts, key)

            return respond_alone

        return at

    return [locked(responder) for responder in responders]


class Ahead:
    """The sampler of a run whose rollouts are one iteration ahead.

    Args:
        sample: of the policy of a state.
        thread: samples the next rollout there; None: each rollout is sampled in its own step.
    """

    def __init__(self, sample: Sampler, thread: Executor | None):
        self._sample = sample
        self._thread = thread
        # What to sample as soon as this step has its own rollout.
        self._next: tuple[LoopState, Batch] | None = None
        self._sampled: Future[tuple[Rollout, Metrics]] | None = None

    def sample(self, state: LoopState, batch: Batch) -> tuple[Rollout, Metrics]:
        """The rollout of a step (a ``Sampler``). The thread then starts with the next one."""
        if self._sampled is None:
            rollout, metrics = self._sample(sampling_state(state), batch)
        else:
            rollout, metrics = self._sampled.result()
        if self._thread is not None and self._next is not None:
            self._sampled = self._thread.submit(self._sample, *self._next)
        return rollout, metrics

    def advancing(
        self, advance: Advance, schedule: Schedule, num_steps: int, copy: Copy
    ) -> Advance:
        """``advance``, whose ``sample`` is this one. The policy before each update samples the next
        rollout.
        """

        def advance_ahead(state: LoopState, step: int) -> tuple[LoopState, Metrics]:
            current = TrainState(copy(state.train.step), copy(iteration.policy(state)), ())
            self._next = None
            if self._thread is not None and step + 1 < num_steps:
                # On the host: two threads that start programs on the same devices would block each
                # other where devices wait for one another.
                on_host = jax.device_get(current)
                first, *_ = schedule.batches(step + 1)
                self._next = (replace(state, train=on_host, behind=None), first)
            state, metrics = advance(state, step)
            return replace(state, behind=current), metrics

        return advance_ahead
