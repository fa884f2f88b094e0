"""Which accelerators this machine has, whether JAX uses them, and how to install what is missing."""

import glob
import mmap
import os
from pathlib import Path

import jax
import jaxlib

from rlhf_jax.errors import UserError
from rlhf_jax.runs import processes

# Collectives and copies overlap with work; loops, such as that over the tokens of a response, become CUDA graphs.
GPU_FLAGS = {"xla_gpu_enable_latency_hiding_scheduler": "true", "xla_gpu_enable_command_buffer": "+WHILE,+CONDITIONAL"}


def choose(device: str | None, place: str | None = None) -> None:
    """Restricts JAX to one kind of device and joins the other processes; call it before anything else touches JAX.

    With None JAX chooses, but does not silently take the CPU while a GPU or TPU is idle.

    place: as in ``processes.join``; None: there is one process.

    Raises:
        UserError: JAX finds no such device here, or would leave an accelerator unused although nobody chose the CPU.
    """
    if device == "mps":
        raise UserError("--device mps: JAX has no maintained backend for Apple's GPUs; --device cpu runs all on a Mac")
    if device in ("gpu", "cuda"):  # read when the backend starts
        os.environ["XLA_FLAGS"] = gpu_flags(os.environ.get("XLA_FLAGS", ""))
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


def gpu_flags(given: str) -> str:
    """XLA's flags with those of GPU_FLAGS that they do not set and that this jaxlib knows; XLA aborts at others."""
    library = Path(jaxlib.__file__).with_name("libjax_common.so")
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        known = {name for name in GPU_FLAGS if name not in given and content.find(name.encode()) >= 0}
    return " ".join([f"--{name}={value}" for name, value in GPU_FLAGS.items() if name in known] + given.split())


def idle_accelerator() -> str | None:
    """A sentence that names an accelerator which JAX does not use, and how to install its plugin; None without one."""
    platforms = {device.platform for device in _all_devices()}
    sentence = "This machine has {}, but JAX does not use it. Install its plugin: pip install -e '.[{}]'{}."
    if "gpu" not in platforms and has_file("/dev/nvidia[0-9]*", "/usr/lib/wsl/lib/libcuda.so.1"):
        return sentence.format("an NVIDIA GPU", "cuda13", ", or with a driver before 580 '.[cuda12]'")
    return sentence.format("a TPU", "tpu", "") if "tpu" not in platforms and has_file("/dev/accel[0-9]*") else None


def has_file(*patterns: str) -> bool:
    """Whether a file of one of these patterns is here."""
    return any(glob.glob(pattern) for pattern in patterns)


def _all_devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError):  # the latter if the platform's plugin is not installed (jax 0.10)
        return []
