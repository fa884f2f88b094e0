"""``rlhf-jax bench``: how long a step of each kind takes on this machine, as one line of JSON.

The work is ``steps.py``'s, on random tokens. A call is timed until its result is there
(``jax.block_until_ready``). ``startup`` times whole processes instead: from their start to the end
of the first iteration of ``rlhf-jax ppo --config tiny``.
"""

import dataclasses
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental.compilation_cache import compilation_cache

import rlhf_jax
from rlhf_jax import models
from rlhf_jax.cli.benchmark.steps import PRESETS, Name, Preset, Value, Work, work
from rlhf_jax.cli.console import show
from rlhf_jax.config import command_line
from rlhf_jax.errors import UserError
from rlhf_jax.runs import devices

MAX_OTHERS = 0.02  # share of the machine that other programs may use before a figure means little
SCRIPTS = Path(rlhf_jax.__file__).parents[1] / "benchmarks"  # of a checkout
OPPONENTS = {"hand": "torch_steps.py", "transformers": "torch_steps.py", "trl": "trl_steps.py"}
FIRST_ITERATION = "ppo --config tiny --rl.num-iterations 1 --rl.validation-fraction 0"
AS_TINY = Preset(
    models.GPT2Config(800, 80, 32, 2, 2), batch=32, prompt=26, response=12
)  # the shapes of that command


def main(argv: Sequence[str]) -> int:
    """Prints the line of ``run``, whose arguments are the flags; 1 if other programs used more than
    MAX_OTHERS.
    """
    line = command_line.bound(run, argv, "rlhf-jax bench")()
    show(json.dumps(line))
    others = line["others_cpu"] or 0.0
    if others <= MAX_OTHERS:
        return 0
    show(
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
    calls: int = 5,
    against: Literal["hand", "transformers", "trl"] | None = None,
) -> dict[str, Any]:
    """Time a kind of step on random tokens and print one line of JSON.

    Exits with 1 where other programs used more than 2% of the machine: the figure then means
    little.

    Args:
        name: what is timed; startup: processes, from their start to the end of the first PPO
            iteration.
        preset: char-nano, char-small, char-wide, gpt2 or llama-1b.
        value: in an iteration: a value head on the policy, or a value model of its own.
        calls: timed calls, after one that warms up; at least five.
        against: PyTorch's version of the same work, in turn with ours, after a check that both
            compute the same; needs a checkout and torch, trl for the last. The line gets its median
            and the ratio.

    Raises:
        UserError: there is no such preset, fewer than five calls are asked for, or the two programs
            differ.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: there is none; choose from {', '.join(PRESETS)}")
    if calls < 5:
        raise UserError(f"--calls {calls}: a median needs at least 5")
    if name == "startup":
        return {"bench": name} | startup(calls, against) | machine()
    devices.choose(None)  # programs as a run's are compiled
    sizes = PRESETS[preset]
    opponent = None
    if against is not None:
        opponent = Opponent(against, name, sizes, value)
        opponent.agree()
        opponent.ask("step")
    timed = work(name, sizes, value)
    flops = matmul_flops(
        jax.make_jaxpr(timed.step)(timed.carry, timed.data).jaxpr, trips=sizes.response
    )
    compiled, cold, warm = compile_seconds(timed)
    carry, _ = jax.block_until_ready(compiled(timed.carry, timed.data))
    rows = []
    for _ in range(calls):
        if opponent is not None:
            opponent.turn()
        carry, row = measured(compiled, carry, timed.data)
        rows.append(row)
    median = statistics.median(row["seconds"] for row in rows)
    peak_flops, peak_bytes = peaks(sizes)
    stats = jax.devices()[0].memory_stats() or {}
    peak_memory = stats.get(
        "peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    line: dict[str, Any] = {"bench": name, "preset": preset, "value": value} | spread(
        [row["seconds"] for row in rows]
    )
    line |= {"tokens_per_s": timed.tokens / median, "compile_cold_s": cold, "compile_warm_s": warm}
    line |= {"peak_memory_mb": peak_memory / 2**20, "flops_share": flops / median / peak_flops}
    line |= {
        "page_faults": statistics.median(row["faults"] for row in rows),
        "others_cpu": middle(rows, "others"),
    }
    if name == "rollout":
        read = sizes.response * (_bytes(timed.data[0]) + _cache_bytes(sizes))
        line["bandwidth_share"] = read / median / peak_bytes
    if opponent is not None:
        other = statistics.median(opponent.seconds)
        line |= {"against": against, "against_median_s": other, "ratio": other / median}
        opponent.close()
    return line | machine()


# --- One call
#
# ------------------------------------------------------------------------------------------


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


# --- Compilation and peaks
# ------------------------------------------------------------------------------------------


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


def matmul_flops(jaxpr: Any, trips: int = 1) -> float:
    """Floating-point operations of a jaxpr's matrix products; ``trips``: how often the body of a
    ``while`` runs.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        params = equation.params
        if name == "dot_general":
            contracted = params["dimension_numbers"][0][0]
            inner = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
            total += 2.0 * float(inner) * equation.outvars[0].aval.size
        times = params["length"] if name == "scan" else trips if name == "while" else 1
        for part in jax.tree.leaves(
            list(params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                total += times * matmul_flops(part, trips)
    return total


def peaks(preset: Preset) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s of a large copy) that this process reaches, the
    best of six.
    """
    size = 8192 if jax.default_backend() != "cpu" else 1536
    square = jnp.ones((size, size), preset.model.compute_dtype)
    block = jnp.ones(2**26, jnp.float32)

    def best(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
        call = jax.jit(function)
        seconds = []
        for _ in range(6):
            started = time.perf_counter()
            jax.block_until_ready(call(x))
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    return 2.0 * size**3 / best(lambda x: x @ x, square), 2.0 * block.nbytes / best(
        lambda x: x + 1, block
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _cache_bytes(preset: Preset) -> float:
    """Keys and values that a token reads, of a cache that is half full on the mean over the
    response.
    """
    config = preset.model
    length = preset.prompt + preset.response / 2
    itemsize = jnp.dtype(config.compute_dtype).itemsize
    return (
        2.0
        * preset.batch
        * config.num_layers
        * config.kv_heads
        * config.head_size
        * length
        * itemsize
    )


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
# --------------------------------------------------------------------------------------


def startup(calls: int, against: str | None = None) -> dict[str, Any]:
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
            opponent = Opponent(against, "iteration", AS_TINY, "separate")
            opponent.ask("step")
            seconds.append(time.perf_counter() - opponent.started)
            opponent.close()
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
        raise UserError(
            "bench startup: the run ended before its first iteration; see its message above"
        )
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime} | others(busy, own, seconds)


# --- Another program
# ------------------------------------------------------------------------------------------


class Opponent:
    """One of OPPONENTS as a process that does the same work when it is asked to.

    Raises:
        UserError: the script is not there, as without a checkout, or the process ended.
    """

    def __init__(self, kind: str, name: Name, preset: Preset, value: Value) -> None:
        script = SCRIPTS / OPPONENTS[kind]
        if not script.is_file():
            raise UserError(
                "--against: benchmarks/ is part of a checkout, not of the installed package"
            )
        self.name = name
        self.preset = preset
        self.value = value
        self.folder = tempfile.TemporaryDirectory()
        self.seconds = list[float]()
        model = models.build(preset.model)
        keys = jax.random.split(jax.random.key(0), 4)
        params = models.add_head(keys[3], model.init(keys[0]), "score")
        leaves = jax.tree_util.tree_flatten_with_path(params)[0]
        arrays = {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}
        arrays = {
            path: leaf for path, leaf in arrays.items() if path not in ("score/gain", "score/shift")
        }
        shape = (preset.batch, preset.prompt + preset.response)
        tokens = np.asarray(
            jax.random.randint(keys[1], shape, 2, preset.model.vocab_size, jnp.int32)
        )
        shared = Path(self.folder.name, "shared.npz")
        config = json.dumps(dataclasses.asdict(preset.model), default=str)
        np.savez(shared, config=config, prompt=preset.prompt, tokens=tokens, **arrays)  # type: ignore[arg-type]
        command = [
            sys.executable,
            str(script),
            str(shared),
            "--bench",
            name,
            "--kind",
            kind,
            "--value",
            value,
        ]
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, what: Literal["check", "step"]) -> dict[str, Any]:
        """One turn: its result (loss and gradient norm, or tokens) and its seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"result"'):  # libraries print lines of their own
                return json.loads(line)
        raise UserError("--against: the other program ended; see its message above")

    def agree(self) -> None:
        """Checks that both programs compute the same: loss and gradient norm, or the greedy tokens
        of a rollout.

        An opponent that does not tell one of the two answers null for it.

        Raises:
            UserError: they do not.
        """
        ours = work(self.name, self.preset, self.value, temperature=0.0)
        _, metrics = jax.jit(ours.step)(ours.carry, ours.data)
        theirs = np.asarray(self.ask("check")["result"], np.float64)  # null becomes NaN
        mine = (
            metrics["tokens"]
            if self.name == "rollout"
            else jnp.stack([metrics["loss"], metrics["grad_norm"]])
        )
        mine = np.where(np.isnan(theirs), theirs, np.asarray(mine))
        if np.isnan(theirs).all() or not np.allclose(
            mine, theirs, rtol=1e-4, atol=1e-4, equal_nan=True
        ):
            raise UserError(
                f"--against: the two programs do not compute the same: {mine} here, {theirs} there"
            )

    def turn(self) -> None:
        """A timed step."""
        self.seconds.append(self.ask("step")["seconds"])

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()
        self.folder.cleanup()
