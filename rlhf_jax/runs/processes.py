"""Several processes that share one run: each computes its part of every batch, the first one writes
and prints.

    rlhf-jax ppo ... --processes 10.0.0.1:9876,2,0      # the first of two
    rlhf-jax ppo ... --processes 10.0.0.1:9876,2,1

All read the same files and see the same run folder. An error in one of them ends all of them,
because the others would wait for it for ever; so does the loss of one, within ``HEARTBEAT_SECONDS``
and some. With a single process every function here does its work without communication.
"""

import atexit
import itertools
import json
import os
import re
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax._src import distributed  # its key-value store, which Orbax uses too, has no public name
from jax.experimental import multihost_utils

from rlhf_jax.errors import TrainingFault, UserError

T = TypeVar("T")

HEARTBEAT_SECONDS = (
    20  # without a sign of life, after which a process counts as lost and the others end
)
_DAY = 24 * 3600 * 1000  # milliseconds
_calls: defaultdict[str, Iterator[int]] = defaultdict(
    itertools.count
)  # of ``gather``, by the thread
_steps = itertools.count(1)  # of all loops of this process, for the preemption service


def join(place: str) -> None:
    """Connects to the other processes; call it before anything else touches a device. All but the
    first fall silent.

    place: ``HOST:PORT,COUNT,NUMBER``, the address at which the first process listens, how many
      there are, and which one this is, from 0; or ``auto`` under SLURM, Open MPI, Kubernetes or on
      a TPU pod, which say so themselves.

    Raises:
      UserError: ``place`` is none of these, or the processes did not meet.
    """
    if jax.distributed.is_initialized():
        return
    match = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", place)
    if place != "auto" and (match is None or int(match[3]) >= int(match[2])):
        raise UserError(
            f"--processes {place}: expected HOST:PORT,COUNT,NUMBER, NUMBER from 0 to COUNT - 1; or "
            "auto"
        )
    try:
        address, count, number = (
            (match[1], int(match[2]), int(match[3])) if match else (None, None, None)
        )
        jax.distributed.initialize(
            address, count, number, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--processes {place}: the processes did not meet: {error}") from error
    # For those that still wait for it: JAX's own end, which comes next, waits for them.
    atexit.register(_tell, {"error": "it has ended; its last lines say why", "users": False})
    if not is_first():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def is_lost(error: Exception) -> bool:
    """Whether this is what a collective raises where another process has gone."""
    return (
        jax.process_count() > 1
        and re.search("Gloo|NCCL|UNAVAILABLE|closed by peer", str(error)) is not None
    )


def fetch(tree: T) -> T:
    """``jax.device_get`` of all rows, those on the other processes' devices too; every process
    calls it.
    """

    def whole(leaf: jax.Array) -> np.ndarray:
        return np.asarray(
            leaf
            if leaf.is_fully_replicated
            else multihost_utils.process_allgather(leaf, tiled=True)
        )

    return jax.device_get(tree) if jax.process_count() == 1 else jax.tree.map(whole, tree)


def own_rows(batch: T) -> T:
    """This process's part of a batch [B, ...] of which each has all rows: equal parts in the
    processes' order.
    """
    return jax.tree.map(lambda x: np.split(x, jax.process_count())[jax.process_index()], batch)


def gather_rows(tree: T) -> T:
    """[B, ...] NumPy rows of all processes, from the ``own_rows`` of each."""
    return tree if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def agree(work: Callable[[], T]) -> T:
    """``work()`` in every process. If it fails in one, it fails in all, as in ``gather``."""
    results: list[T] = []
    gather(lambda: results.append(work()))
    return results[0]


def gather(work: Callable[[], T]) -> list[T]:
    """``work()`` in every process; each gets the results of all, JSON values. Needs no device:
    threads may call it too, those of one name in the same order in each process.

    Raises:
      UserError, TrainingFault: what another process has raised, with its number.
    """
    if jax.process_count() == 1:
        return [work()]
    failure, report = None, dict[str, Any]()
    try:
        report = {"result": work()}
    except Exception as error:
        failure, report = (
            error,
            {"error": str(error) or type(error).__name__, "users": isinstance(error, UserError)},
        )
    place, client = _tell(report), cast(Any, distributed.global_state.client)
    keys = [f"{place}/{number}" for number in range(jax.process_count())]
    reports = [
        json.loads(client.blocking_key_value_get(key, _DAY)) for key in keys
    ]  # the loss of a process ends it
    for number, report in enumerate(reports):
        if "error" in report:
            raise failure or (UserError if report["users"] else TrainingFault)(
                f"process {number}: {report['error']}"
            )
    return [report["result"] for report in reports]


def _tell(report: Mapping[str, Any]) -> str:
    """Leaves a report for all processes at the next place of this thread, and returns the place."""
    thread = threading.current_thread().name
    place = f"rlhf_jax {thread} {next(_calls[thread]):09}"
    cast(Any, distributed.global_state.client).key_value_set(
        f"{place}/{jax.process_index()}", json.dumps(report)
    )
    return place


def in_first(work: Callable[[], T]) -> T:
    """``work()`` in the first process only; all get its result, a JSON value. Errors as in
    ``agree``.
    """
    return gather(lambda: work() if is_first() else cast(T, None))[0]


def stop_signal(received: Sequence[int]) -> int:
    """The signal for which all processes stop after this step, 0: none; every process calls it
    after every step.

    With several processes JAX's preemption service, which SIGTERM to one of them wakes, spreads the
    notice and chooses a step that none has reached yet. Before that step no process waits for
    another.

    Args:
        received: the signals that Python has caught in this process.
    """
    own = max(received, default=0)
    if jax.process_count() == 1:
        return own
    if not multihost_utils.reached_preemption_sync_point(next(_steps)):
        return 0
    return int(np.max(multihost_utils.process_allgather(np.int32(own)))) or signal.SIGTERM
