"""The thread that samples for all requests: who begins when, who gets which token, and what is left
after a fault. The batch counts instead of sampling.
"""

import contextlib
import queue
import threading

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.generation.slots import Token
from rlhf_jax.inference.serving.protocol import Refused
from rlhf_jax.inference.serving.worker import Job, Worker

WAIT = 20  # seconds, after which something hangs


class Batch:
    """Every response is 1, 2, 3 and so on, and costs as many columns as its prompt has tokens."""

    def __init__(self):
        self.begun = []  # prompts, in order
        self.most = 0  # columns at once
        self.fails = False
        self.go = threading.Event()
        self.go.set()
        self.stepped = threading.Event()
        self._counts = {}
        self._columns = {}

    def columns(self, num_prompt, max_tokens, n):
        return num_prompt * n

    def room(self, num_prompt, max_tokens, n):
        return sum(self._columns.values()) + num_prompt * n

    def add(self, ids, samples, max_tokens):
        self.begun.append(ids)
        self._counts |= dict.fromkeys(samples, 0)
        self._columns |= dict.fromkeys(samples, len(ids))
        self.most = max(self.most, sum(self._columns.values()))

    def remove(self, sample):
        del self._counts[sample], self._columns[sample]

    def clear(self):
        self._counts.clear()
        self._columns.clear()

    def step(self):
        self.stepped.set()
        self.go.wait(WAIT)
        if self.fails:
            raise MemoryError
        for sample in list(self._counts):
            self._counts[sample] += 1
            yield sample, Token(self._counts[sample], 0.0, [])


def job(columns=1, max_tokens=3, n=1, ends=(), first=0):
    """A job, and what it was told."""
    told = queue.SimpleQueue()
    samples = [object() for _ in range(n)]
    ids = [0] * columns
    return Job(ids, samples, max_tokens, frozenset(ends), told.put, first, set()), told


def events(told, number):
    """The next events: the number of a sample, the id, whether it is the last; or an error."""
    return [
        event if isinstance(event, Exception) else (event[0], event[1].id, event[2])
        for event in (told.get(timeout=WAIT) for _ in range(number))
    ]


def ends(worker):
    """Whether the thread ends when it is stopped."""
    stopper = threading.Thread(target=worker.stop, daemon=True)
    stopper.start()
    stopper.join(WAIT)
    return not (stopper.is_alive() or worker.is_alive())


@contextlib.contextmanager
def working(jobs, most_columns=10, most_waiting=9):
    """A worker that began with these jobs."""
    worker = Worker(Batch(), most_columns=most_columns, most_waiting=most_waiting)
    worker.ask(jobs)
    worker.start()
    try:
        yield worker
    finally:
        worker.batch.go.set()
        assert ends(worker)


def test_the_last_token_is_the_last_of_all_or_an_end():
    several, told = job(max_tokens=3, n=2, first=5)
    ended, told_ended = job(max_tokens=9, ends={2, 4})
    with working([several, ended]) as worker:
        assert sorted(events(told, 6)) == [
            *((5, 1, False), (5, 2, False), (5, 3, True)),
            *((6, 1, False), (6, 2, False), (6, 3, True)),
        ]
        assert events(told_ended, 2) == [(0, 1, False), (0, 2, True)]
    assert worker.is_idle
    assert worker.batch.room(0, 0, 0) == 0
    assert told.empty()
    assert told_ended.empty()


def test_they_begin_in_order_as_far_as_the_columns_allow():
    """Nobody passes somebody larger who came before."""
    jobs = [job(columns, max_tokens=2) for columns in (6, 4, 8, 1, 2)]
    with working([one for one, _ in jobs]) as worker:
        for _, told in jobs:
            assert events(told, 2) == [(0, 1, False), (0, 2, True)]
        assert [len(ids) for ids in worker.batch.begun] == [6, 4, 8, 1, 2]
        assert worker.batch.most == 10


def test_who_comes_later_joins():
    early, told = job(max_tokens=10**9)
    late, told_late = job(max_tokens=2)
    with working([early]) as worker:
        events(told, 2)
        worker.ask([late])
        assert events(told_late, 2) == [(0, 1, False), (0, 2, True)]
        assert not worker.is_idle


def test_who_has_left_gets_no_token():
    left, told_left = job(columns=7)
    left.ended.add(0)
    half, told_half = job(n=2)
    half.ended.add(1)
    leaving, told_leaving = job(max_tokens=10**9)

    def leaves(event):
        told_leaving.put(event)
        if event[1].id == 2:
            leaving.ended.add(0)

    leaving.put = leaves
    last, told_last = job(columns=10)  # for which there is room when all have gone
    with working([left, half, leaving, last]) as worker:
        assert events(told_half, 3) == [(0, 1, False), (0, 2, False), (0, 3, True)]
        assert events(told_leaving, 2) == [(0, 1, False), (0, 2, False)]
        events(told_last, 3)
        assert [len(ids) for ids in worker.batch.begun] == [1, 1, 10]
    for told in (told_left, told_half, told_leaving):
        assert told.empty()


def test_a_fault_is_told_to_all_and_forgets_them():
    running, told_running = job(columns=4, n=2, max_tokens=10**9)
    waiting, told_waiting = job(columns=9)
    with working([running, waiting]) as worker:
        events(told_running, 4)
        worker.batch.fails = True
        error = told_waiting.get(timeout=WAIT)
        assert isinstance(error, MemoryError)
        while not isinstance(told := told_running.get(timeout=WAIT), Exception):
            pass
        assert told is error
        worker.batch.fails = False
        later, told_later = job(columns=10)
        worker.ask([later])
        assert events(told_later, 3) == [(0, 1, False), (0, 2, False), (0, 3, True)]
        assert worker.batch.most == 10
    assert worker.is_idle
    for told in (told_running, told_waiting, told_later):  # a fault is told once
        assert told.empty()


def test_a_full_queue_refuses_all_of_a_request():
    worker = Worker(Batch(), most_columns=10, most_waiting=2)
    (first, _), (second, told_second), (third, told_third) = map(job, (1, 2, 3))
    worker.ask([first])
    for jobs in ([second, third], [second, second, third]):
        with pytest.raises(Refused) as refused:
            worker.ask(jobs)
        assert refused.value.status == 429
    worker.ask([second])
    first.ended.add(0)  # who has left does not count
    worker.ask([third])
    with pytest.raises(Refused):
        worker.ask([job()[0]])
    worker.start()
    assert len(events(told_second, 3)) == len(events(told_third, 3)) == 3
    assert ends(worker)
    assert [len(ids) for ids in worker.batch.begun] == [2, 3]


def test_what_can_never_be_is_refused():
    worker = Worker(Batch(), most_columns=10, most_waiting=2)
    worker.check(job(columns=5, n=2)[0])
    worker.check_number(2)
    with pytest.raises(UserError, match="--columns allows 10"):
        worker.check(job(columns=4, n=3)[0])
    with pytest.raises(UserError, match="--waiting allows 2"):
        worker.check_number(3)


def test_it_stops_behind_the_present_token():
    idle = Worker(Batch(), most_columns=10, most_waiting=2)
    idle.start()
    assert ends(idle)
    worker = Worker(Batch(), most_columns=10, most_waiting=2)
    worker.batch.go.clear()
    worker.ask([job(max_tokens=10**9)[0]])
    worker.start()
    assert worker.batch.stepped.wait(WAIT)
    stopper = threading.Thread(target=worker.stop, daemon=True)
    stopper.start()
    stopper.join(0.05)
    assert stopper.is_alive()  # it waits for the token
    worker.batch.go.set()
    stopper.join(WAIT)
    assert not stopper.is_alive()
    assert not worker.is_alive()
