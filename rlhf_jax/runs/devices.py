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
MEMINFO = Path("/proc/meminfo")  # in KiB
CGROUP = Path("/sys/fs/cgroup")  # of this container
RESERVED = 1 / 32  # of what a CPU has available
# For sums in a fixed order, and kernels that no measurement has chosen.
DETERMINISTIC = {
    "gpu": {"xla_gpu_deterministic_ops": "true", "xla_gpu_autotune_level": "0"},
}
# Sets of instructions that XLA compiles for where a CPU has them.
INSTRUCTIONS = ("avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
FILES = {
    "gpu": ("/dev/nvidia[0-9]*", "/usr/lib/wsl/lib/libcuda.so.1"),
    "tpu": ("/dev/accel[0-9]*",),
}


def choose(
    device: str | None,
    place: str | None = None,
    *,
    deterministic: bool = False,
    threads: int | None = None,
) -> None:
    """Restricts JAX to one kind of device and joins the other processes; call it before anything
    else touches JAX.

    With None JAX chooses, but it is an error if it would take the CPU while a GPU or TPU is idle.

    Args:
        place: as in ``processes.join``; None: there is one process.
        deterministic: the same bits from run to run on a GPU too.
        threads: of XLA on a CPU, whose matrix products round by their number; at least as many as
            the devices of a process. None: as many as there are cores or devices. If JAX has
            started before, that number stays, and a line says so.

    Raises:
        UserError: JAX finds no such device here, or would leave an accelerator unused although
            nobody chose the CPU; ``deterministic`` comes too late.
    """
    if device == "mps":
        raise UserError(
            "--device mps: JAX has no maintained backend for Apple's GPUs; --device cpu runs all "
            "on a Mac"
        )
    if (
        not xla_bridge.backends_are_initialized()
    ):  # else nobody reads them, and a manifest must not list them
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
    chosen = device is not None or "cpu" in os.environ.get("JAX_PLATFORMS", "").split(",")
    if not chosen and jax.default_backend() == "cpu" and (idle := idle_accelerator()) is not None:
        raise UserError(f"{idle} To run on the CPU all the same, give --device cpu.")
    if deterministic and jax.default_backend() == "gpu" and not is_deterministic():
        raise UserError(
            "--deterministic: XLA did not get its flags, since JAX had started before, or "
            "XLA_FLAGS says otherwise"
        )
    is_late = threads is not None and os.environ.get("NPROC") != str(threads)
    if is_late and jax.default_backend() == "cpu":
        logger.info(
            "compute.blocks: JAX had started before, with as many threads as there are cores or "
            "devices; the bits depend on their number"
        )


def is_deterministic() -> bool:
    """Whether XLA's flags ask for the same bits from run to run on a GPU."""
    return "--xla_gpu_deterministic_ops=true" in os.environ.get("XLA_FLAGS", "").split()


def flags_for(device: str | None, *, deterministic: bool = False) -> dict[str, str]:
    """The FLAGS of a device; with None of what JAX_PLATFORMS names or, as JAX would choose, of what
    is here.
    """
    named = device or os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    here = [platform for platform, patterns in FILES.items() if has_file(*patterns)]
    platform = {"cuda": "gpu"}.get(named, named) or [*here, "cpu"][0]
    more = DETERMINISTIC.get(platform, {}) if deterministic else {}
    return {**FLAGS.get(platform, {}), **more}


def compiler_options(num_blocks: int) -> dict[str, bool]:
    """Options of ``jax.jit`` for a program with ``num_blocks`` blocks of a model.

    If FLAGS chose XLA's older CPU kernels, they choose the newer ones; otherwise they are empty.
    The newer kernels are faster but take longer to compile. Several blocks share them, so that the
    gain is larger than the cost from four blocks on.
    """
    name = "xla_cpu_use_fusion_emitters"
    is_off = f"--{name}=false" in os.environ.get("XLA_FLAGS", "").split()
    return {name: True} if is_off and num_blocks >= 4 else {}


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
    """A sentence that names an accelerator which JAX does not use, and how to install its plugin;
    None without one.
    """
    platforms = {device.platform for device in _all_devices()}
    sentence = (
        "This machine has {}, but JAX does not use it. Install its plugin: pip install "
        "'rlhf-jax[{}]'{}."
    )
    if "gpu" not in platforms and has_file(*FILES["gpu"]):
        return sentence.format(
            "an NVIDIA GPU", "cuda13", ", or with a driver before 580 'rlhf-jax[cuda12]'"
        )
    return (
        sentence.format("a TPU", "tpu", "")
        if "tpu" not in platforms and has_file(*FILES["tpu"])
        else None
    )


def memory_limit() -> int:
    """Bytes of memory of one device: an accelerator's own; of a CPU the machine's, or what its
    container may use, in equal parts for the devices. 0: nobody knows.
    """
    if jax.default_backend() != "cpu":
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    limits = [_line_of(MEMINFO, "MemTotal") * 1024, _cgroup("memory.max")]
    return min(filter(None, limits), default=0) // jax.local_device_count()


def free_memory() -> int:
    """Bytes of ``memory_limit`` that a program may take now; 0: it is not known. Of a CPU's a part
    stays for what a process needs beside its arrays, such as compiling.
    """
    if jax.default_backend() != "cpu":
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
    allocator.give_back()
    limits = [_line_of(MEMINFO, "MemAvailable") * 1024]
    allowed = _cgroup("memory.max")
    if allowed:
        # Pages of files count as used, and go as soon as somebody needs the memory.
        kept = [_line_of(CGROUP / "memory.stat", f"{what}active_file") for what in ("", "in")]
        limits.append(max(allowed - _cgroup("memory.current") + sum(kept), 1))
    free = min(filter(None, limits), default=0)
    return int(free * (1 - RESERVED)) // jax.local_device_count()


def cpu() -> str:
    """The kind of this CPU as far as bits depend on it: ``x86_64 avx avx2 fma``."""
    file = Path("/proc/cpuinfo")
    words = set(file.read_text().split()) if file.exists() else set()
    return " ".join([platform.machine(), *(name for name in INSTRUCTIONS if name in words)])


def _line_of(file: Path, key: str) -> int:
    """The number behind a key in a file of Linux's; 0 without one."""
    lines = file.read_text().splitlines() if file.exists() else []
    return sum(int(line.split()[1]) for line in lines if re.match(f"{key}:? ", line))


def _cgroup(name: str) -> int:
    """Bytes that this container's cgroup (version 2) names; 0 without a number."""
    file = CGROUP / name
    text = file.read_text().strip() if file.exists() else ""
    return int(text) if text.isdigit() else 0


def has_file(*patterns: str) -> bool:
    """Whether a file of one of these patterns is here."""
    return any(glob.glob(pattern) for pattern in patterns)


def _all_devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except (
        RuntimeError,
        AssertionError,
    ):  # the latter if the platform's plugin is not installed (jax 0.10)
        return []
