"""A process that saves checkpoints as fast as it can and is killed, again and again;
tests/test_kills.py starts it.

    python kill_helpers.py FOLDER SEED SWEEPS RANDOM_KILLS

A sweep kills one process right before each file operation of a save, retention included: the
process sends itself SIGKILL from an audit hook. Random kills come from outside, after a random
time; there, retention also keeps the best step, and every other process saves asynchronously. The
process that follows a kill reads back every checkpoint on disk, compares it with what that step
saved, and goes on from the newest. A JSON object of counts is printed at the end; anything wrong
ends with a traceback and a code other than 0.

Imports take longer than all else, so one process imports and forks a child for each kill. It calls
neither JAX nor Orbax, which start threads; so does OpenBLAS, unless OPENBLAS_NUM_THREADS is 1.
"""

import itertools
import json
import mmap
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.testing import assert_array_equal

from rlhf_jax.runs import checkpoint
from rlhf_jax.runs.checkpoint import Checkpoints

SHAPES = {
    "wte": (512, 256),
    "kernel": (2, 256, 256),
    "mu": (512, 256),
    "nu": (512, 256),
    "step": (),
}
KEEP_LAST = 2
KEEP_BEST = "max:score"
# What a child is doing, as its file operations tell.
WAITING, CLEANING, WRITING, PUBLISHING, RETENTION = range(5)
PHASES = ("waiting", "cleaning", "writing", "publishing", "retention")
OPERATIONS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open")
# Places in the memory that a child shares with its parent, and that outlives it.
PHASE, STEP, COMPLETE, ARMED, COUNT, NANOSECONDS = range(6)


def state_of(step: int) -> dict[str, np.ndarray]:
    """2 MiB of float32 that do not compress, a function of the step."""
    rng = np.random.default_rng(step)
    return {name: rng.random(shape, np.float32) for name, shape in SHAPES.items()}


def meta_of(step: int) -> dict[str, Any]:
    """Every fifth step is better than all before it."""
    return {
        "step": step,
        "metrics": {"score": step if step % 5 == 0 else -1},
    }


def verify(checkpoints: Checkpoints) -> None:
    """Every listed step holds what was saved under its number, and none is passed over."""
    target = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    steps = checkpoints.steps()
    for step in steps:
        state, meta = checkpoints.restore(target, step)
        assert meta == meta_of(step), (step, meta)
        for name, value in state_of(step).items():
            assert_array_equal(state[name], value, err_msg=f"step {step}, {name}", strict=True)
    if steps:
        assert checkpoints.latest() == steps[-1]
        assert checkpoints.restore(target)[1] == meta_of(steps[-1])


def writes(event: str, arguments: tuple) -> bool:
    """Whether a file operation changes anything; all do but to open a file for reading."""
    flags = arguments[2] if event == "open" else os.O_RDWR
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def announce(folder: Path, shared: memoryview, kill_at: int) -> None:
    """Keeps ``shared`` informed of phase and step, and kills this process before operation
    ``kill_at`` (0: never).

    What is written to is ``STEP.*``; it is published by a rename to ``STEP``, and removed after a
    rename from there.
    """

    def below(path: object) -> str:
        """The name in the folder that a path leads to; empty for a path elsewhere."""
        inside = isinstance(path, (str, os.PathLike)) and folder in Path(path).parents
        return Path(path).relative_to(folder).parts[0] if inside else ""

    def hook(event: str, arguments: tuple) -> None:
        if not shared[ARMED] or event not in OPERATIONS or not writes(event, arguments):
            return
        name = below(arguments[0])
        phase = shared[PHASE]
        removal = event in ("os.remove", "os.rmdir")
        # Inside shutil.rmtree names are relative to an open folder.
        if not name and (not removal or os.path.isabs(arguments[0])):
            return
        if event == "os.rename" and below(arguments[1]).isdecimal():
            shared[PHASE] = PUBLISHING
            shared[STEP] = int(below(arguments[1]))
        elif event == "os.rename" and name.isdecimal():
            shared[PHASE] = RETENTION
            shared[COMPLETE] = shared[STEP]
        elif removal and phase in (WAITING, CLEANING):
            shared[PHASE] = CLEANING
        elif removal and phase == RETENTION and name and event == "os.rmdir":
            shared[PHASE] = WAITING  # the folder of what was removed, after all that was in it
        elif not removal and (step := name.partition(".")[0]).isdecimal():
            shared[PHASE] = WRITING
            shared[STEP] = int(step)
            shared[COMPLETE] = int(step) - 1
        shared[COUNT] += 1
        if shared[COUNT] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


class Plan(NamedTuple):
    """What a child does: the options of its checkpoints, and when it ends."""

    options: dict[str, Any]
    kill_at: int = 0
    armed_at: int = 0  # the save from which on operations are counted and phases announced
    stop_after: int | None = None


def save_until_killed(folder: Path, shared: memoryview, plan: Plan) -> None:
    warnings.simplefilter("error")  # such as that of a fallback to an earlier step
    announce(folder, shared, plan.kill_at)
    with Checkpoints(folder, KEEP_LAST, **plan.options) as checkpoints:
        verify(checkpoints)
        first = checkpoints.latest() + 1 if checkpoints.steps() else 0
        for step in itertools.count(first):
            if step - first == plan.stop_after:
                return
            state = state_of(step)
            if step - first == plan.armed_at:
                shared[STEP] = step
                shared[COMPLETE] = step - 1
                shared[ARMED] = True
            started = time.perf_counter_ns()
            checkpoints.save(step, state, meta_of(step))
            if not plan.options.get("asynchronous"):
                shared[COMPLETE] = step
                shared[PHASE] = WAITING
            shared[NANOSECONDS] = time.perf_counter_ns() - started


def fork(folder: Path, shared: memoryview, plan: Plan) -> int:
    for place in (PHASE, ARMED, COUNT):
        shared[place] = 0
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        save_until_killed(folder, shared, plan)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_listed(
    folder: Path, shared: memoryview, options: dict[str, Any], before: list[int]
) -> str:
    """Whether the steps on disk are those that this phase of a save leaves, where the process found
    the steps ``before``; returns the phase.
    """
    phase = shared[PHASE]
    step = shared[STEP]
    present = checkpoint.steps(folder)
    newest = {
        WRITING: [step - 1],
        RETENTION: [step],
    }.get(
        phase,
        range(shared[COMPLETE], step + 2),
    )
    context = (PHASES[phase], step, shared[COMPLETE], present)
    assert present[-1] in newest, context
    best = {present[-1] // 5 * 5} if "keep_best" in options else set()
    kept = {
        *range(
            max(present[-1] - KEEP_LAST + 1, 0),
            present[-1] + 1,
        ),
        *best,
    }
    assert kept <= set(present), context
    # One more before retention, or two where the best has just been beaten; what an earlier kill at
    # this point left stands until the first retention.
    assert len(present) <= max(len(kept) + 2, len(before) + 1), (*context, before)
    return PHASES[phase]


def kill_at_random(
    folder: Path, shared: memoryview, delays: np.ndarray, kills: Counter[str]
) -> None:
    """Kills a process after each of these seconds, and counts the kills by phase."""
    options: dict[str, Any] = {"keep_best": KEEP_BEST}
    assert end_of(fork(folder, shared, Plan(options, stop_after=2))) == 0
    for number, delay in enumerate(delays):
        options["asynchronous"] = bool(number % 2)
        before = checkpoint.steps(folder)
        child = fork(folder, shared, Plan(options))
        while not shared[ARMED]:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child ended before its first save"
            time.sleep(0.0005)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        assert end_of(child) == -signal.SIGKILL
        kills[check_listed(folder, shared, options, before)] += 1
    assert end_of(fork(folder, shared, Plan(options, stop_after=3))) == 0


def main(folder: Path, seed: int, sweeps: int, random_kills: int) -> None:
    shared = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not survive the fork"
    kills: Counter[str] = Counter()

    swept = folder / "swept"
    assert end_of(fork(swept, shared, Plan({}, armed_at=3, stop_after=4))) == 0
    operations = shared[COUNT]
    seconds = shared[NANOSECONDS] / 1e9
    for kill_at in list(range(1, operations + 1)) * sweeps:
        # The first save of a child removes what the kill before it left; the second one is like
        # every other.
        before = checkpoint.steps(swept)
        assert end_of(fork(swept, shared, Plan({}, kill_at=kill_at, armed_at=1))) == -signal.SIGKILL
        kills[check_listed(swept, shared, {}, before)] += 1
    assert end_of(fork(swept, shared, Plan({}, stop_after=3))) == 0

    delays = np.random.default_rng(seed).uniform(0, 3 * seconds, random_kills)
    kill_at_random(folder / "at_random", shared, delays, kills)
    print(json.dumps({"operations": operations, "kills": dict(kills), "seconds_per_save": seconds}))


if __name__ == "__main__":
    main(
        Path(sys.argv[1]).absolute(),
        *map(int, sys.argv[2:]),
    )
