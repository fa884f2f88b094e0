"""Which accelerators this machine has, whether JAX uses them, and how to install support."""

import glob
import mmap
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jaxlib
from jax._src import xla_bridge  # whether a backend has started has no public name

from rlhf_jax.errors import UserError, logger
from rlhf_jax.runs import allocator, processes

# Given to XLA before its backend starts. GPU: collectives and copies overlap with work; loops, such
# as that over the tokens of a response, become CUDA graphs. CPU: programs compile in half the time.
FLAGS = {
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": "true",
        "xla_gpu_enable_command_buffer": "+WHILE,+CONDITIONAL",
    },
    "cpu": {
        "xla_cpu_use_fusion_emitters": "false",
        "xla_backend_optimization_level": "1",
        "xla_backend_extra_options": "xla_cpu_disable_loop_unrolling=true",
        "xla_cpu_parallel_codegen_split_count": "8",
    },
}
# Of several CPU devices: see ``compiler_options``.
SAVING_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
MEMINFO = Path("/proc/meminfo")  # in KiB
CGROUP = Path("/sys/fs/cgroup")  # of this container
MOST_THREADS = 4096
RESERVED = 1 / 32  # share of a CPU's available memory
# On a GPU: sums in a fixed order, and kernels that are not chosen by timing.
DETERMINISTIC = {"xla_gpu_deterministic_ops": "true", "xla_gpu_autotune_level": "0"}
# Sets of instructions that XLA uses if the CPU has them.
INSTRUCTIONS = ("avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
FILES = {
    "gpu": ("/dev/nvidia[0-9]*", "/usr/lib/wsl/lib/libcuda.so.1"),
    "tpu": ("/dev/accel[0-9]*",),
}
PLUGINS = {
    "gpu": (
        "an NVIDIA GPU",
        "'rlhf-jax[cuda13]', or with a driver before 580 'rlhf-jax[cuda12]'",
    ),
    "tpu": ("a TPU", "'rlhf-jax[tpu]'"),
}


def choose(
    device: str | None,
    place: str | None = None,
    *,
    deterministic: bool = False,
    threads: int | None = None,
) -> None:
    """Restricts JAX to one kind of device and joins the other processes. Call it before anything
    else touches JAX.

    Args:
        device: with None JAX chooses, but it is an error if it takes the CPU while a GPU or TPU is
            idle.
        place: as in ``processes.join``; None: there is one process.
        deterministic: the same bits from run to run on a GPU too.
        threads: of XLA on a CPU, at least as many as the devices of a process; their number
            changes how matrix products round. They may be more than the cores. None: as many as
            there are cores or devices. If JAX has started before, the number stays as it is, and a
            line says so.

    Raises:
        UserError: JAX finds no such device here, or would leave an accelerator unused although
            nobody chose the CPU; ``deterministic`` comes too late.
    """
    if device == "mps":
        raise UserError(
            "--device mps: JAX has no maintained backend for Apple's GPUs; --device cpu runs all "
            "on a Mac"
        )
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UserError(
            f"{threads} threads, of manifest.json or compute.blocks: a run has 1 to {MOST_THREADS}"
        )
    # A backend that has started reads no flags, and a manifest must not list them.
    if not xla_bridge.backends_are_initialized():
        flags = flags_for(device, deterministic=deterministic)
        os.environ["XLA_FLAGS"] = xla_flags(flags, os.environ.get("XLA_FLAGS", ""))
        if threads is not None:
            os.environ["NPROC"] = str(threads)  # of XLA on a CPU
    if device is not None:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(device, device))
    if place is not None:
        processes.join(place)
    if device is not None and not _all_devices():
        hint = idle_accelerator() or "Use --device cpu, or leave the flag out."
        raise UserError(f"--device {device}: JAX finds no such device here. {hint}")
    is_chosen = device is not None or "cpu" in os.environ.get("JAX_PLATFORMS", "").split(",")
    if not is_chosen and jax.default_backend() == "cpu":
        idle = idle_accelerator()
        if idle is not None:
            raise UserError(f"{idle} To run on the CPU all the same, give --device cpu.")
    has_flags = "--xla_gpu_deterministic_ops=true" in os.environ.get("XLA_FLAGS", "").split()
    if deterministic and jax.default_backend() == "gpu" and not has_flags:
        raise UserError(
            "--deterministic: XLA did not get its flags, since JAX had started before, or "
            "XLA_FLAGS says otherwise"
        )
    if threads is not None and jax.default_backend() == "cpu" and num_threads() != threads:
        logger.info(
            f"JAX had started before, with {num_threads()} threads, and this run needs {threads}: "
            "its bits depend on their number. Start it in a process of its own"
        )


def flags_for(device: str | None, *, deterministic: bool = False) -> dict[str, str]:
    """The FLAGS of a device; with None of the one that JAX_PLATFORMS names, or that JAX would
    choose on this machine.
    """
    named = device or os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    here = [kind for kind, patterns in FILES.items() if any(map(glob.glob, patterns))]
    platform = {"cuda": "gpu"}.get(named, named) or [*here, "cpu"][0]
    flags = FLAGS.get(platform, {})
    return flags | DETERMINISTIC if deterministic and platform == "gpu" else flags


def compiler_options(num_blocks: int) -> dict[str, bool | str]:
    """Options of ``jax.jit`` for a program with ``num_blocks`` blocks of a model: where FLAGS chose
    XLA's older CPU kernels, the newer ones for four blocks and more; several CPU devices run a
    program's operations in an order that frees memory early.

    The newer kernels are faster but take longer to compile. Blocks share them, so that from four
    blocks on the gain is larger than the cost.

    The order that XLA prefers runs as much as it can at once. With several devices each may begin
    with another one of the collectives that are ready, each of which waits in a thread for the
    other devices: when all threads wait, XLA ends the process. On one device it is the faster one.
    """
    options: dict[str, bool | str] = {}
    name = "xla_cpu_use_fusion_emitters"
    if num_blocks >= 4 and f"--{name}=false" in os.environ.get("XLA_FLAGS", "").split():
        options[name] = True
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        options |= SAVING_MEMORY
    return options


def xla_flags(ours: Mapping[str, str], given: str) -> str:
    """XLA's flags: the ``given`` ones, and those of ``ours`` that they do not set and that this
    jaxlib knows, since XLA aborts at unknown flags. The library holds the name of each of its flags
    as a separate string.
    """
    library = Path(jaxlib.__file__).with_name("libjax_common.so")
    with (
        library.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        flags = [
            f"--{name}={value}"
            for name, value in ours.items()
            if name not in given and content.find(f"{name}\0".encode()) >= 0
        ]
    return " ".join([*flags, *given.split()])


def idle_accelerator() -> str | None:
    """A sentence that names an accelerator which JAX does not use, and what installs its plugin;
    None without one.
    """
    used = {device.platform for device in _all_devices()}
    for kind, (name, plugin) in PLUGINS.items():
        if kind not in used and any(map(glob.glob, FILES[kind])):
            return (
                f"This machine has {name}, but JAX does not use it. Install its plugin: pip "
                f"install {plugin}."
            )
    return None


def memory_limit() -> int:
    """Bytes of memory of one device: of an accelerator its own, of a CPU an equal part of what the
    machine has or the container may use. 0: unknown.
    """
    if jax.default_backend() != "cpu":
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    limits = [_line_of(MEMINFO, "MemTotal") * 1024, _cgroup("memory.max")]
    return min(filter(None, limits), default=0) // jax.local_device_count()


def free_memory() -> int:
    """Bytes of ``memory_limit`` that a program may take now; 0: unknown. On a CPU a part is left
    for what a process needs beside its arrays, such as compiling.
    """
    if jax.default_backend() != "cpu":
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    allocator.give_back()
    limits = [_line_of(MEMINFO, "MemAvailable") * 1024]
    allowed = _cgroup("memory.max")
    if allowed:
        # Pages of files count as used, but the kernel drops them when memory is needed.
        kept = [_line_of(CGROUP / "memory.stat", f"{what}active_file") for what in ("", "in")]
        limits.append(max(allowed - _cgroup("memory.current") + sum(kept), 1))
    free = min(filter(None, limits), default=0)
    return int(free * (1 - RESERVED)) // jax.local_device_count()


def num_threads() -> int | None:
    """XLA's threads on a CPU, on which the bits of matrix products depend; None on another device.

    XLA reads ``NPROC`` when it starts. Without it, it has a thread for each core that the process
    may use, and in any case one for each device.
    """
    if jax.default_backend() != "cpu":
        return None
    given = os.environ.get("NPROC", "")
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    cores = len(usable) or os.cpu_count() or 1
    return max(int(given) if given.isdecimal() else cores, jax.local_device_count())


def cpu() -> str:
    """The kind of this CPU as far as bits depend on it: ``x86_64 avx avx2 fma``."""
    file = Path("/proc/cpuinfo")
    words = set(file.read_text().split()) if file.exists() else set()
    return " ".join([platform.machine(), *(name for name in INSTRUCTIONS if name in words)])


def _line_of(file: Path, key: str) -> int:
    """The number after a key in a file of Linux; 0 without one."""
    lines = file.read_text().splitlines() if file.exists() else []
    return sum(int(line.split()[1]) for line in lines if re.match(f"{key}:? ", line))


def _cgroup(name: str) -> int:
    """The bytes in a file of this container's cgroup (version 2); 0 without a number."""
    file = CGROUP / name
    text = file.read_text().strip() if file.exists() else ""
    return int(text) if text.isdigit() else 0


def _all_devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError):  # the latter without the plugin, in jax 0.10
        return []
