"""Accelerators that programs can be compiled for on a machine that has none: XLA's own compilers
for GPUs and TPUs, which need a package and no device.

The figures of each accelerator, and where they come from, are in targets.json.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from rlhf_jax.errors import UserError

FIGURES: dict[str, Any] = json.loads(Path(__file__).with_name("targets.json").read_text("utf-8"))
EXAMPLES = "h200x8, h100x8, a100-80x8, v5e-16, v5p-8 or v6e-8"
# What XLA:GPU reads of a card, beside the figures of the card.
CARD = """gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {capability} }}
  {figures}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{device_kind}"
"""


class Target(NamedTuple):
    """An accelerator, or several of one kind."""

    name: str
    backend: str  # gpu or tpu
    devices: Sequence[jax.Device]
    memory: int  # bytes of a device
    flops: float  # bfloat16 products of a device, a second
    bandwidth: float  # bytes of a device, a second


def find(name: str) -> Target:
    """The target of a name such as h200x8 (cards) or v5e-16 (a slice of TPUs).

    Raises:
        UserError: no target has this name, or the package with its compiler is missing.
    """
    gpu = re.fullmatch(r"([\w-]+)x(\d+)", name)
    tpu = re.fullmatch(r"(v\w+)-(\d+)", name)
    if gpu and gpu[1] in FIGURES["gpus"]:
        figures = FIGURES["gpus"][gpu[1]]
        devices = _gpus(figures, int(gpu[2]))
        backend = "gpu"
    elif tpu and tpu[2] in FIGURES["tpus"].get(tpu[1], {}).get("topologies", {}):
        figures = FIGURES["tpus"][tpu[1]]
        # A single chip is one of the smallest slice that XLA describes.
        devices = _tpus(figures["topologies"][tpu[2]])[: int(tpu[2])]
        backend = "tpu"
    else:
        raise UserError(f"--target {name}: not known; there are {EXAMPLES}")
    memory = figures["device_memory_size"]
    bandwidth = figures["memory_bandwidth"]
    return Target(name, backend, devices, memory, figures["flops"], bandwidth)


def _gpus(figures: dict[str, Any], count: int) -> Sequence[jax.Device]:
    own = {
        key: figures[key] for key in figures if key not in ("device_kind", "flops", "capability")
    }
    lines = "\n  ".join(f"{key}: {value}" for key, value in own.items())
    card = CARD.format(
        figures=lines, **{key: figures[key] for key in ("capability", "device_kind")}
    )
    shape = f"1x{count}x1"
    try:
        topology: Any = topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=shape, target_config=card
        )
    except (RuntimeError, NotImplementedError) as error:
        raise _missing("a GPU", "cuda12", error) from error
    return topology.devices


def _tpus(name: str) -> Sequence[jax.Device]:
    # libtpu asks the machine for its TPU otherwise, and locks it.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        topology: Any = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except (RuntimeError, NotImplementedError) as error:
        raise _missing("a TPU", "tpu", error) from error
    return topology.devices


def _missing(what: str, extra: str, error: Exception) -> UserError:
    return UserError(
        f"--target: the compiler for {what} is not here; pip install 'rlhf-jax[{extra}]' brings "
        f"it, no device is needed (JAX said: {str(error).splitlines()[0]})"
    )
