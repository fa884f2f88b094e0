"""A thread that samples for all requests to one model."""

import dataclasses
import threading
from collections.abc import Callable, Sequence

from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.slots import Batch, Sample, Token
from rlhf_jax.inference.serving.protocol import Refused

Event = tuple[int, Token, bool] | Exception
"""The number of a sample, its next token, and whether that is the last one; or why none comes."""


@dataclasses.dataclass(eq=False)
class Job:
    """Responses to a prompt.

    max_tokens: of each response, at least 1.
    ends: ids that end a response.
    put: called in the worker's thread with each event.
    first: the number of the first sample.
    ended: numbers of samples that get no further token; others may add to it.
    """

    ids: Sequence[int]
    samples: Sequence[Sample]
    max_tokens: int
    ends: frozenset[int]
    put: Callable[[Event], object]
    first: int
    ended: set[int]

    @property
    def is_over(self) -> bool:
        """Whether none of the samples gets a further token."""
        return self.ended.issuperset(range(self.first, self.first + len(self.samples)))


class Worker(threading.Thread):
    """Samples for all jobs that it gets: together, as far as ``most_columns`` of caches allow. At
    most ``most_waiting`` jobs wait.
    """

    def __init__(self, batch: Batch, *, most_columns: int, most_waiting: int):
        super().__init__(name="sampling", daemon=True)
        self._most_columns = most_columns
        self.batch = batch
        self._most_waiting = most_waiting
        self._waiting: list[Job] = []
        self._running: dict[Sample, tuple[Job, int]] = {}
        self._lengths: dict[Sample, int] = {}
        self._changed = threading.Condition()
        self._stopping = False

    @property
    def is_idle(self) -> bool:
        """Whether nobody is being answered."""
        return not (self._waiting or self._running)

    def check_number(self, num_prompts: int) -> None:
        """Raises UserError if so many prompts can never wait."""
        if num_prompts > self._most_waiting:
            raise UserError(f"{num_prompts} prompts: --waiting allows {self._most_waiting}")

    def check(self, job: Job) -> None:
        """Raises UserError if there will never be room."""
        columns = self.batch.columns(len(job.ids), job.max_tokens, len(job.samples))
        if columns > self._most_columns:
            raise UserError(
                f"{len(job.samples)} answers to {len(job.ids)} tokens, of {job.max_tokens} each, "
                f"need {columns} columns of caches, and --columns allows {self._most_columns}"
            )

    def ask(self, jobs: Sequence[Job]) -> None:
        """Begins jobs as soon as there is room. Raises Refused: too many are waiting."""
        with self._changed:
            self._waiting = [job for job in self._waiting if not job.is_over]  # who has left
            if len(self._waiting) + len(jobs) > self._most_waiting:
                raise Refused(429, f"{len(self._waiting)} prompts are waiting; try again later")
            self._waiting += jobs
            self._changed.notify()

    def stop(self) -> None:
        """Ends the thread behind the present token."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self.join()

    def run(self) -> None:
        """Samples until `stop`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self.is_idle or self._stopping)
                if self._stopping:
                    return
            try:
                self._begin()
                for sample, token in self.batch.step():
                    self._take(sample, token)
            except Exception as error:  # such as memory that is not there
                logger.warning(f"sampling: {type(error).__name__}: {error}")
                with self._changed:
                    jobs = {job for job, _ in self._running.values()} | set(self._waiting)
                    self._waiting.clear()
                self._running.clear()
                self._lengths.clear()
                self.batch.clear()
                for job in jobs:
                    job.put(error)

    def _begin(self) -> None:
        """Begins those that wait, in their order, while there is room."""
        while True:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting[0]
                room = self.batch.room(len(job.ids), job.max_tokens, len(job.samples))
                if self._running and room > self._most_columns:
                    return
                self._waiting.pop(0)
            if not job.is_over:
                numbered = enumerate(job.samples, job.first)
                self._running |= {sample: (job, number) for number, sample in numbered}
                self.batch.add(job.ids, job.samples, job.max_tokens)

    def _take(self, sample: Sample, token: Token) -> None:
        """Hands a token on, and frees the slot behind the last one."""
        job, number = self._running[sample]
        count = self._lengths[sample] = self._lengths.get(sample, 0) + 1
        is_last = token.id in job.ends or count == job.max_tokens
        if number not in job.ended:
            job.put((number, token, is_last))
        if is_last or number in job.ended:
            del self._running[sample], self._lengths[sample]
            self.batch.remove(sample)
