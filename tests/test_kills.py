"""kill -9 at any instant of a save and of a run, and damage to any file of a checkpoint; the table
of all faults.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from builders import TINY, metric_rows, results, start_script
from numpy.testing import assert_array_equal

from rlhf_jax.runs.checkpoint import Checkpoints

# --- A process that does nothing but save
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sweeps", "random_kills", "at_least"),
    [
        pytest.param(
            1, 25, {"total": 50, "writing": 10, "retention": 5}, id="50", marks=pytest.mark.slow
        ),
        pytest.param(
            9,
            260,
            {"total": 500, "writing": 100, "retention": 50},
            id="500",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_a_process_killed_while_it_saves(sweeps, random_kills, at_least, tmp_path):
    """kill_helpers.py checks after each kill that every listed step is whole and right, and that
    saving goes on.
    """
    helper = Path(__file__).with_name("kill_helpers.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    arguments = [tmp_path / "checkpoints", 0, sweeps, random_kills]
    command = [sys.executable, helper, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    found = json.loads(done.stdout)
    kills = Counter(found["kills"])
    assert kills.total() == sweeps * found["operations"] + random_kills
    assert kills.total() >= at_least.pop("total")
    assert kills >= Counter(at_least), found


# --- Whole runs
#
# --------------------------------------------------------------------------------------------------


class Instant(NamedTuple):
    """When to kill: ``seconds`` after the process has ``rows`` rows of metrics in its file (0:
    after its start).
    """

    rows: int
    seconds: float


def start(script: str, folder: Path, *flags: str, **environment: str) -> subprocess.Popen:
    resume = ["--resume"] if folder.exists() else []
    places = ["--config", TINY, "--output-dir", folder]
    return start_script(script, *places, *resume, *flags, **environment)


def finish(process: subprocess.Popen) -> None:
    said = process.communicate()
    assert process.returncode == 0, said


def kill_at(instant: Instant, script: str, folder: Path, *flags: str, **environment: str) -> bool:
    """Starts or resumes a run and kills it; False if it was done before."""
    metrics = folder / "metrics.jsonl"
    before = metrics.stat().st_ino if metrics.exists() else None
    # It reads compiled programs and writes none, of which it would leave half.
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
    process = start(script, folder, *flags, **environment)

    def reached() -> bool:
        # A process replaces the file when it takes it over.
        if not metrics.exists() or metrics.stat().st_ino == before:
            return False
        return metrics.read_bytes().count(b"\n") >= instant.rows

    while instant.rows and process.poll() is None and not reached():
        time.sleep(0.002)
    time.sleep(instant.seconds)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode != 0


def steps_of(folder: Path) -> list[int]:
    return [row["step"] for row in metric_rows(folder)]


@pytest.mark.soak
def test_runs_killed_at_random_times_end_with_the_same_bytes(tmp_path):
    """Three kills of one run and two of another; the last one comes after the last row, while the
    result is written.
    """
    finish(start("ppo", tmp_path / "undisturbed"))
    expected = results(tmp_path / "undisturbed")
    assert "model/model.safetensors" in expected
    rng = np.random.default_rng()
    plans = {
        "three": [
            Instant(0, rng.uniform(0, 4)),
            Instant(rng.integers(1, 6), rng.uniform(0, 0.1)),
            Instant(rng.integers(6, 11), rng.uniform(0, 0.1)),
        ],
        "two": [
            Instant(rng.integers(1, 11), rng.uniform(0, 0.1)),
            Instant(11, rng.uniform(0, 0.1)),
        ],
    }
    flags = {"three": [], "two": ["--checkpoint-interval", "1", "--checkpoint-async"]}
    for name, instants in plans.items():
        folder = tmp_path / name
        for instant in instants:
            assert kill_at(instant, "ppo", folder, *flags[name]), (
                f"the run was faster than {instant}"
            )
        finish(start("ppo", folder, *flags[name]))
        assert results(folder) == expected, plans
        assert steps_of(folder) == list(range(11)), plans


@pytest.mark.soak
@pytest.mark.parametrize(
    "script", ["sft", "reward_model", "dpo", "vpg", "ppo", "rloo", "grpo", "pipeline"]
)
def test_every_script_killed_until_done(script, tmp_path):
    """At times that are uniform over what is left to do, ten at most."""
    started = time.perf_counter()
    finish(start(script, tmp_path / "undisturbed"))
    duration = time.perf_counter() - started
    rng = np.random.default_rng()
    kills = 0
    folder = tmp_path / "killed"
    while kills < 10 and kill_at(Instant(0, rng.uniform(0, duration)), script, folder):
        kills += 1
    finish(start(script, folder))
    assert results(folder) == results(tmp_path / "undisturbed")
    print(f"{script}: {kills} kills")


def on(num_devices: int) -> dict[str, str]:
    """The environment of a run on so many devices, compiled as a user's."""
    return {"JAX_NUM_CPU_DEVICES": str(num_devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}


def digest(folder: Path) -> str:
    content = hashlib.sha256()
    for name, data in sorted(results(folder).items()):
        content.update(name.encode() + data)
    return content.hexdigest()


@pytest.mark.soak
@pytest.mark.parametrize("script", ["sft", "ppo"])
def test_runs_that_move_at_each_kill_end_with_the_same_bytes(script, tmp_path):
    """Fifty kills (or $KILLS), one after the other, of as many runs as they need. Each start has 1,
    2, 4 or 8 devices; a kill comes while it starts or within four steps.
    """
    flags = ["--compute.blocks", "8", "--checkpoint-interval", "1"]
    for number in (1, 2, 4, 8):  # which fills the cache of programs, too
        finish(start(script, tmp_path / f"on {number}", *flags, **on(number)))
    [expected] = {digest(tmp_path / f"on {number}") for number in (1, 2, 4, 8)}
    rng = np.random.default_rng()
    left = int(os.environ.get("KILLS", "50"))
    starts: Counter[int] = Counter()
    runs = 0
    while left:
        runs += 1
        folder = tmp_path / f"moved {runs}"
        is_running = True
        while left and is_running:
            number = int(rng.choice([1, 2, 4, 8]))
            done = len(steps_of(folder)) if (folder / "metrics.jsonl").exists() else 0
            instant = Instant(done + rng.integers(1, 4), rng.uniform(0, 0.2))
            if rng.random() < 0.2:
                instant = Instant(0, rng.uniform(0, 6))
            is_running = kill_at(instant, script, folder, *flags, **on(number))
            left -= is_running
            starts[number] += 1
        finish(start(script, folder, *flags, **on(int(rng.choice([1, 2, 4, 8])))))
        assert digest(folder) == expected, folder
        assert steps_of(folder) == steps_of(tmp_path / "on 1")
        print(f"{script}: run {runs} is the same, {left} kills left, starts {dict(starts)}")
    print(f"{script}: digest {expected}")


# --- Damaged files
# --------------------------------------------------------------------------------------------------


def array_state(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        "weights": rng.random((64, 48), np.float32),
        "half": rng.random((16, 16), np.float32).astype(ml_dtypes.bfloat16),
        "step": np.int32(step),
    }


def damages(data: bytes, rng: np.random.Generator, flips: int) -> Iterator[tuple[str, bytes]]:
    """Flipped bits at the ends and at random places between, and cuts."""
    size = len(data)
    for offset in {0, size - 1, *rng.integers(size, size=flips).tolist()} if size else ():
        flipped = bytearray(data)
        flipped[offset] ^= 1 << int(rng.integers(8))
        yield f"byte {offset} of {size} flipped", bytes(flipped)
    for length in {0, size // 2, max(size - 1, 0)} - {size}:
        yield f"cut to {length} of {size} bytes", data[:length]


def restored(folder, target):
    """(state, meta, warnings) of what a run would go on from."""
    with (
        warnings.catch_warnings(record=True) as caught,
        Checkpoints(folder, keep_last=2) as checkpoints,
    ):
        warnings.simplefilter("always")
        state, meta = checkpoints.restore(target)
    return state, meta, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    "flips", [pytest.param(2, marks=pytest.mark.slow), pytest.param(60, marks=pytest.mark.soak)]
)
def test_damage_to_any_file_never_goes_unnoticed_where_it_matters(flips, tmp_path):
    """Either the step's own values come back, or those of the step before it with a warning."""
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, array_state(step), {"step": step})
    target = {name: np.zeros_like(value) for name, value in array_state(0).items()}
    rng = np.random.default_rng(0)
    unnoticed: Counter[str] = Counter()
    noticed: Counter[str] = Counter()
    for file in sorted(path for path in (tmp_path / "2").rglob("*") if path.is_file()):
        name = file.relative_to(tmp_path / "2").as_posix()
        data = file.read_bytes()
        for damage, damaged in damages(data, rng, flips):
            file.write_bytes(damaged)
            state, meta, said = restored(tmp_path, target)
            for key, value in array_state(meta["step"]).items():
                assert_array_equal(state[key], value, err_msg=f"{name}: {damage}", strict=True)
            if meta["step"] == 2:
                assert said == [], f"{name}: {damage}"
                unnoticed[name] += 1
            else:
                assert len(said) == 1, f"{name}: {damage}"
                assert re.search(r"step 2 .* is damaged.*Going back to step 1", said[0]), (
                    f"{name}: {damage}"
                )
                noticed[name] += 1
        file.write_bytes(data)
    print("noticed:", dict(noticed), "\nwithout effect:", dict(unnoticed))
