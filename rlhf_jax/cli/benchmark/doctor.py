"""``rlhf-jax doctor``: what is installed, which devices there are, and one step of every phase on a
tiny model.
"""

import functools
import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.cli.benchmark import steps
from rlhf_jax.cli.console import show
from rlhf_jax.runs import devices, manifest
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.types import Metrics

STEPS: tuple[steps.Name, ...] = (
    "sft",
    "reward",
    "dpo",
    "vpg",
    "grpo",
    "iteration",
)  # the last is one of PPO


class Check(NamedTuple):
    """One line of the doctor's report."""

    name: str
    passed: bool
    detail: str


def machine() -> list[Check]:
    """Versions, devices with their memory, and an accelerator that JAX does not use (failed)."""
    names = (*manifest.PACKAGES, "datasets")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    checks = [
        Check("Python", True, platform.python_version()),
        Check("versions", True, ", ".join(versions)),
    ]
    for device in jax.devices():
        kind = f"{device.platform}: {device.device_kind}"
        memory = device.memory_stats()
        if memory:
            kind += f", {memory['bytes_limit'] / 2**30:.1f} GiB for JAX"
        checks.append(Check(f"device {device.id}", True, kind))
    idle = devices.idle_accelerator()
    if idle is not None:
        checks.append(Check("accelerator", False, idle))
    return checks


def self_test(
    work: Callable[[steps.Name], Any], began: Callable[[str], None] = lambda name: None
) -> Iterator[Check]:
    """Runs one step of every phase, whose metrics must be finite, and saves and restores a
    checkpoint.

    Args:
        work: that of ``benchmark.steps``.
        began: called with the name of each check before it runs.
    """

    def step(name: steps.Name) -> Metrics:
        made = work(name)
        _, metrics = jax.jit(made.step)(made.carry, made.data)
        return metrics

    def checkpoint() -> Metrics:
        saved = {"x": jnp.arange(3.0)}
        with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
            checkpoints.save(0, saved, {})
            restored, _ = checkpoints.restore(saved)
        np.testing.assert_array_equal(restored["x"], saved["x"])
        return {}

    for name in STEPS:
        began(name)
        yield timed(name, functools.partial(step, name))
    began("checkpoint")
    yield timed("checkpoint", checkpoint)


def timed(name: str, step: Callable[[], Metrics]) -> Check:
    """Runs a step and reports its time, the metrics that are not finite, or its error."""
    started = time.perf_counter()
    try:
        metrics = jax.device_get(step())
    except Exception as error:  # a broken installation may raise anything
        first_line, _, _ = str(error).strip().partition("\n")
        return Check(name, False, f"{type(error).__name__}: {first_line[:200]}")
    bad = [metric for metric, value in metrics.items() if not np.isfinite(value)]
    if bad:
        return Check(name, False, f"not finite: {', '.join(bad)}")
    seconds = time.perf_counter() - started
    return Check(name, True, f"{seconds:.1f} s, compiling included")


def examine() -> int:
    """Print versions and devices, and try one step of every phase. Exits with 1 if anything is
    wrong.
    """

    def began(name: str) -> None:
        show(f"{name:<12} ", end="", flush=True)  # a step compiles for seconds

    def ended(check: Check) -> bool:
        show(f"{'ok' if check.passed else 'FAIL':<5} {check.detail}", flush=True)
        return check.passed

    passed = []
    for check in machine():
        began(check.name)
        passed.append(ended(check))
    passed += map(ended, self_test(lambda name: steps.work(name, steps.TINY), began))
    return 0 if all(passed) else 1
