"""Several processes that share one run: each computes its part of every batch, the first one writes
and prints.

    rlhf-jax ppo ... --processes 10.0.0.1:9876,2,0      # the first of two
    rlhf-jax ppo ... --processes 10.0.0.1:9876,2,1

All read the same files and see the same run folder. An error in one of them ends all of them,
because the others would wait for it for ever. If one is lost, the others end a little later than
``HEARTBEAT_SECONDS``. With a single process every function here works without communication.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax._src import distributed  # its key-value store, which Orbax uses too, has no public name
from jax.experimental import multihost_utils

from rlhf_jax.errors import ServiceError, TrainingFault, UserError
from rlhf_jax.runs.reading import Row

T = TypeVar("T")

HEARTBEAT_SECONDS = 20
"""A process without a sign of life for so long counts as lost, and the others end."""
LOST = "another process has gone; start all of them again, --resume"
# The classes that an error keeps in the other processes; subclasses come first.
_KINDS = {kind.__name__: kind for kind in (ServiceError, UserError, TrainingFault)}
_DAY = 24 * 3600 * 1000  # milliseconds
# The numbers of the calls of ``gather``, by thread.
_calls: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
_steps = itertools.count(1)  # of all loops of this process, for the preemption service


def join(place: str) -> None:
    """Connects to the other processes. Call it before anything touches a device. Only the first
    process prints from then on.

    place: ``HOST:PORT,COUNT,NUMBER``: the address at which the first process listens, the number of
      processes, and the number of this one, from 0; or ``auto`` under SLURM, Open MPI, Kubernetes
      or on a TPU pod, whose settings have these.

    Raises:
      UserError: ``place`` is none of these, or the processes did not meet.
    """
    if jax.distributed.is_initialized():
        return
    match = re.fullmatch(r"([^,]+:(\d+)),(\d+),(\d+)", place)
    is_place = match is not None and int(match[4]) < int(match[3]) and 0 < int(match[2]) < 1 << 16
    if place != "auto" and not is_place:
        raise UserError(
            f"--processes {place}: expected HOST:PORT,COUNT,NUMBER, PORT below 65536 and NUMBER "
            "from 0 to COUNT - 1; or auto"
        )
    settings: Row = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    if match is not None:
        settings["coordinator_address"] = match[1]
        settings["num_processes"] = int(match[3])
        settings["process_id"] = int(match[4])
    try:
        jax.distributed.initialize(**settings)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--processes {place}: the processes did not meet: {error}") from error
    # For processes that still wait for this one; JAX's own shutdown, which comes next, waits for
    # them.
    farewell = {"error": "it has ended; its last lines say why", "kind": "TrainingFault"}
    atexit.register(_tell, farewell)
    if not is_first():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def is_lost(error: Exception) -> bool:
    """Whether a collective raised this error because another process is gone."""
    is_collective = re.search("Gloo|NCCL|UNAVAILABLE|closed by peer", str(error)) is not None
    return is_collective and jax.process_count() > 1


def fetch(tree: T) -> T:
    """``jax.device_get`` of all rows, including those on other processes' devices; every process
    calls it. NumPy arrays have all rows.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(leaf: jax.Array | np.ndarray) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def own_rows(batch: T) -> T:
    """This process's part of a batch [B, ...] that every process has: equal parts in the order of
    the processes.
    """
    return jax.tree.map(lambda x: np.split(x, jax.process_count())[jax.process_index()], batch)


def gather_rows(tree: T) -> T:
    """The NumPy rows [B, ...] of all processes, from the ``own_rows`` of each."""
    return tree if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def agree(work: Callable[[], T]) -> T:
    """``work()`` in every process. If it fails in one, it fails in all, as in ``gather``."""
    results: list[T] = []
    gather(lambda: results.append(work()))
    return results[0]


def gather(work: Callable[[], T]) -> list[T]:
    """``work()`` in every process; each gets the results of all, JSON values. No device is used:
    threads may call it too, if the threads of one name do so in the same order in each process.

    Raises:
      UserError (or ServiceError), TrainingFault: what another process has raised, with its number.
    """
    if jax.process_count() == 1:
        return [work()]
    failure = None
    report: Row = {}
    try:
        report["result"] = work()
    except Exception as error:
        failure = error
        report["error"] = str(error) or type(error).__name__
        kinds = [name for name, kind in _KINDS.items() if isinstance(error, kind)]
        report["kind"] = [*kinds, "TrainingFault"][0]
    try:
        place = _tell(report)
        reports = [
            json.loads(_store().blocking_key_value_get(f"{place}/{number}", _DAY))
            for number in range(jax.process_count())
        ]
    except jax.errors.JaxRuntimeError as error:  # mostly JAX ends this process instead
        raise TrainingFault(LOST) from error
    for number, report in enumerate(reports):
        if "error" in report:
            raise failure or _KINDS[report["kind"]](f"process {number}: {report['error']}")
    return [report["result"] for report in reports]


def _tell(report: Row) -> str:
    """Leaves a report for all processes at the next place of this thread, and returns the place."""
    thread = threading.current_thread().name
    place = f"rlhf_jax {thread} {next(_calls[thread]):09}"
    _store().key_value_set(f"{place}/{jax.process_index()}", json.dumps(report))
    return place


def _store() -> Any:
    """The key-value store that the processes share."""
    return distributed.global_state.client


def in_first(work: Callable[[], T]) -> T:
    """``work()`` in the first process only; all get its result, a JSON value. Errors as in
    ``agree``.
    """
    return gather(lambda: work() if is_first() else cast(T, None))[0]


def stop_signal(received: Sequence[int]) -> int:
    """The signal for which all processes stop after this step, or 0. Every process calls it after
    every step.

    With several processes JAX's preemption service tells the others when one of them gets SIGTERM,
    and chooses a step that none has reached yet. Before that step no process waits for another.

    Args:
        received: the signals that Python has caught in this process.
    """
    own = max(received, default=0)
    if jax.process_count() == 1:
        return own
    if not multihost_utils.reached_preemption_sync_point(next(_steps)):
        return 0
    of_all = multihost_utils.process_allgather(np.int32(own))
    return int(np.max(of_all)) or signal.SIGTERM
