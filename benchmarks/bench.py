"""How long a step of each kind takes on this machine, as one line of JSON.

    python benchmarks/bench.py sft
    python benchmarks/bench.py rollout --preset char-small --against hand

The work is ``steps.py``'s, on random tokens. A call is timed until its result is there
(``jax.block_until_ready``). ``startup`` times whole processes instead: from their start to the end
of the first iteration of ``rlhf-jax ppo --config tiny``.
"""

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import figures
import jax
import opponent
import tyro
from jax.experimental.compilation_cache import compilation_cache
from steps import GROUP, PRESETS, Preset, Work, work

from rlhf_jax import cli, models
from rlhf_jax.errors import UserError
from rlhf_jax.runs import devices

MAX_OTHERS = 0.02  # share of the machine that other programs may use before a figure means little
FIRST_ITERATION = "ppo --config tiny --rl.num-iterations 1 --rl.validation-fraction 0"
AS_TINY = Preset(
    models.GPT2Config(800, 80, 32, 2, 2), batch=32, prompt=26, response=12
)  # the shapes of that command


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the line of ``run``, whose arguments are the flags; 1 if other programs used more than
    MAX_OTHERS.
    """
    line = tyro.cli(run, args=argv)
    print(json.dumps(line))
    others = line["others_cpu"] or 0.0
    if others <= MAX_OTHERS:
        return 0
    print(
        f"exit code 1: other programs used {others:.0%} of the machine while it was measured, more "
        f"than {MAX_OTHERS:.0%}; end them and measure again, or take the times as upper bounds",
        file=sys.stderr,
    )
    return 1


def run(
    name: tyro.conf.Positional[
        Literal["rollout", "iteration", "reward", "sft", "dpo", "grpo", "vpg", "startup"]
    ],
    preset: str = "char-small",
    value: Literal["shared", "separate"] = "shared",
    dtype: Literal["float32", "bfloat16"] = "float32",
    rows: int | None = None,
    prompt: int | None = None,
    response: int | None = None,
    microbatches: int = 1,
    calls: int = 5,
    against: opponent.Kind | None = None,
    check: bool = True,
) -> dict[str, Any]:
    """Time a kind of step on random tokens and print one line of JSON.

    Exits with 1 where other programs used more than 2% of the machine: the figure then means
    little.

    Args:
        name: what is timed; startup: processes, from their start to the end of the first PPO
            iteration.
        preset: char-nano, char-small, char-wide, gpt2, qwen2.5-0.5b or llama-1b with random
            weights; the last three also with -tiny, for a trial.
        value: in an iteration: a value head on the policy, or a value model of its own.
        dtype: of matrix products and activations; a rollout's weights have it too, the others' have
            float32.
        rows: of a batch, in place of the preset's; pairs count as two.
        prompt: columns of the prompts, in place of the preset's.
        response: columns of the responses, in place of the preset's.
        microbatches: of sft and grpo.
        calls: timed calls, after one that warms up; at least five.
        against: PyTorch's version of the same work on the same device, in turn with ours, after a
            check that both compute the same; needs torch, trl for the last. The line gets its
            median and the ratio.
        check: compare what both compute before they are timed.

    Raises:
        UserError: there is no such preset, fewer than five calls are asked for, the sizes do not
            fit, or the two programs differ.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: there is none; choose from {', '.join(PRESETS)}")
    if calls < 5:
        raise UserError(f"--calls {calls}: a median needs at least 5")
    if name == "startup":
        return {"bench": name} | startup(calls, against) | machine()
    if against is not None:  # the other program's memory is on the same card
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    devices.choose(None)  # programs as a run's are compiled
    given = {"batch": rows, "prompt": prompt, "response": response}
    sizes = sized(name, PRESETS[preset], dtype, given, microbatches)
    other = None if against is None else opponent.opposed(against, name, sizes, value, check)
    timed = work(name, sizes, value)
    flops = figures.matmul_flops(
        jax.make_jaxpr(timed.step)(timed.carry, timed.data).jaxpr, trips=sizes.response
    )
    compiled, cold, warm = compile_seconds(timed)
    carry, _ = jax.block_until_ready(compiled(timed.carry, timed.data))
    columns = []
    for _ in range(calls):
        if other is not None:
            other.turn()
        carry, row = measured(compiled, carry, timed.data)
        columns.append(row)
    line: dict[str, Any] = {"bench": name, "preset": preset, "value": value, "dtype": dtype}
    line |= {"rows": sizes.batch, "prompt": sizes.prompt, "response": sizes.response}
    line |= _figures(name, sizes, timed, compiled, columns, flops)
    line |= {"compile_cold_s": cold, "compile_warm_s": warm}
    if other is not None:
        theirs = statistics.median(other.seconds)
        line |= {"against": against, "against_median_s": theirs}
        line |= {"ratio": theirs / line["median_s"], "against_peak_memory_mb": other.memory_mb}
        other.close()
    return line | machine()


def sized(
    name: str, preset: Preset, dtype: str, given: dict[str, int | None], microbatches: int
) -> Preset:
    """The preset in this dtype, with the sizes that were given.

    Raises:
        UserError: a size is below 1, or the rows do not divide.
    """
    sizes: dict[str, Any] = {}
    for key, number in given.items():
        if number is not None:
            sizes[key] = number
    wrong = [key for key, number in sizes.items() if number < 1]
    if wrong or microbatches < 1:
        raise UserError(f"{', '.join(wrong) or 'microbatches'}: must be at least 1")
    if microbatches > 1 and name not in ("sft", "grpo"):
        raise UserError(f"--microbatches: {name} has none here; sft and grpo have")
    preset = preset._replace(num_microbatches=microbatches, **sizes)
    part = {"reward": 2, "dpo": 2, "grpo": GROUP}.get(name, 1) * microbatches
    if preset.batch % part:
        raise UserError(f"--rows {preset.batch}: {name} needs a multiple of {part}")
    length = max(preset.model.max_length, preset.prompt + preset.response)
    model = replace(preset.model, compute_dtype=dtype, max_length=length)
    return preset._replace(model=model)


def _figures(
    name: Any, sizes: Preset, timed: Work, compiled: Any, rows: list[dict[str, float]], flops: float
) -> dict[str, Any]:
    """Of the timed calls ``rows``; ``flops``: of the products that the program computes."""
    line: dict[str, Any] = spread([row["seconds"] for row in rows])
    median = line["median_s"]
    stats = jax.devices()[0].memory_stats() or {}
    of_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line |= {"tokens_per_s": timed.tokens / median}
    line |= {"peak_memory_mb": stats.get("peak_bytes_in_use", of_process) / 2**20}
    line |= {"planned_memory_mb": figures.planned_bytes(compiled) / 2**20}
    policy = timed.data[0] if name == "rollout" else None
    line |= figures.of_step(name, sizes, policy, median)
    line |= {"flops_share": flops / median / line["peak_tflops"] / 1e12}
    page_faults = statistics.median(row["faults"] for row in rows)
    return line | {"page_faults": page_faults, "others_cpu": middle(rows, "others")}


# --- One call


def measured(compiled: Any, carry: Any, data: Any) -> tuple[Any, dict[str, float]]:
    """One timed call: the new carry, its seconds, page faults and the share of the machine that
    others used.
    """
    fault = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    busy = _busy()
    own = _own()
    started = time.perf_counter()
    carry, _ = jax.block_until_ready(compiled(carry, data))
    seconds = time.perf_counter() - started
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - fault
    return carry, {"seconds": seconds, "faults": float(faults)} | others(busy, own, seconds)


def others(busy: float | None, own: float, seconds: float) -> dict[str, float]:
    """The share of the machine that other programs used since ``_busy()`` and ``_own()`` were
    these.
    """
    if busy is None:
        return {}
    used = (_busy() or 0.0) - busy - (_own() - own)
    return {"others": max(used, 0.0) / seconds / (os.cpu_count() or 1)}


def middle(rows: list[dict[str, float]], key: str) -> float | None:
    """The median of a column; None where it was not measured."""
    return statistics.median(row[key] for row in rows) if key in rows[0] else None


def spread(seconds: list[float], name: str = "") -> dict[str, float]:
    """Median, minimum and maximum, under these names."""
    values = {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
    return {name + key: value for key, value in values.items()}


def _busy() -> float | None:
    """CPU seconds that all programs of this machine have used; None where /proc/stat is not."""
    path = Path("/proc/stat")
    if not path.is_file():
        return None
    user, nice, system, _, _, irq, soft = (
        int(x) for x in path.read_text().split("\n", 1)[0].split()[1:8]
    )
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    return sum(os.times()[:4])


# --- Compilation and the machine


def compile_seconds(work: Work) -> tuple[Any, float, float]:
    """The compiled step, and the seconds to trace and compile it: without a cache, then with JAX's
    cache on disk.
    """
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        compilation_cache.reset_cache()  # it keeps the folder that it was started with
        for name, setting in zip(names, (folder, 0), strict=True):
            jax.config.update(name, setting)
        for _ in range(2):
            jax.clear_caches()
            started = time.perf_counter()
            compiled = work.compile()
            seconds.append(time.perf_counter() - started)
    compilation_cache.reset_cache()
    for name, setting in before.items():
        jax.config.update(name, setting)
    return compiled, seconds[0], seconds[1]


def machine() -> dict[str, Any]:
    """Versions and the machine, for the line."""
    versions = {
        package: importlib.metadata.version(package) for package in ("rlhf-jax", "jax", "jaxlib")
    }
    device = jax.devices()[0]
    host = {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    return {
        "versions": versions,
        "device": device.device_kind,
        "devices": jax.device_count(),
    } | host


# --- From the start of a process


def startup(calls: int, against: opponent.Kind | None = None) -> dict[str, Any]:
    """Wall and CPU seconds from a process's start to its first iteration, without and with JAX's
    cache on disk.

    One process without a cache, then ``calls`` with the cache that it left. ``against`` trl: as
    many processes of its PPOTrainer, with models of the same shapes, a value model of its own, and
    weights from a file.
    """
    with tempfile.TemporaryDirectory() as folder:
        cold, *rows = [first_iteration(Path(folder), str(number)) for number in range(1 + calls)]
    line: dict[str, Any] = spread([row["seconds"] for row in rows])
    line["cpu_s"] = middle(rows, "cpu")
    line |= {"cold_s": cold["seconds"], "cold_cpu_s": cold["cpu"]}
    if against is not None:
        seconds = []
        for _ in range(calls):
            other = opponent.Opponent(against, "iteration", AS_TINY, "separate")
            other.ask("step")
            seconds.append(time.perf_counter() - other.started)
            other.close()
        line |= spread(seconds, "against_") | {
            "ratio": statistics.median(seconds) / line["median_s"]
        }
        line |= {"against": against, "cold_ratio": statistics.median(seconds) / line["cold_s"]}
    return line | {"others_cpu": middle([cold, *rows], "others")}


def first_iteration(folder: Path, name: str) -> dict[str, float]:
    """Seconds of one process, which is ended as soon as it reports its first iteration.

    Raises:
        UserError: it ended before.
    """
    command = [
        "env",  # adds these variables to those of this process
        f"JAX_COMPILATION_CACHE_DIR={folder / 'cache'}",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0",
        sys.executable,
        "-m",
        "rlhf_jax",
        *FIRST_ITERATION.split(),
        "--output-dir",
        str(folder / name),
    ]
    busy = _busy()
    own = _own()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    reached = any(line.startswith("ppo 1/1 ") for line in process.stdout)
    seconds = time.perf_counter() - started
    process.kill()
    process.stdout.close()
    _, _, usage = os.wait4(process.pid, 0)
    if not reached:
        raise UserError("startup: the run ended before its first iteration; see its message above")
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime} | others(busy, own, seconds)


if __name__ == "__main__":
    cli.run_script(main)
