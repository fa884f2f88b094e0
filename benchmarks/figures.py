"""What a step could cost at least: operations and bytes that its shapes need, and the peaks of the
device.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import targets
from jax.stages import Compiled
from steps import Name, Preset

from rlhf_jax import models
from rlhf_jax.training.common import memory

# Forward passes of one network in a step, a gradient's two among them; of dpo also the reference's.
PASSES: dict[Name, int] = {"sft": 3, "reward": 3, "dpo": 4, "grpo": 3, "vpg": 3}


class Peaks(NamedTuple):
    """What a device can do in a second."""

    flops: float  # of matrix products
    bandwidth: float  # bytes, read and written


def model_flops(name: Name, preset: Preset) -> float | None:
    """Floating-point operations that the networks of a step need: 6 for each parameter in a matrix
    product and each token, and those of attention, of which a causal one needs half the pairs.

    None: the step is not passes of one network alone.
    """
    if name not in PASSES:
        return None
    model = preset.model
    length = preset.prompt + preset.response
    columns = length  # that the output layer computes
    if name == "reward":
        columns = 0
    elif name in ("grpo", "vpg"):
        columns = preset.response
    params = jax.eval_shape(models.build(model).init, jax.random.key(0))
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    blocks = 0
    for path, leaf in leaves:
        if path[-1].key == "kernel":
            blocks += leaf.size
    of_blocks = length * blocks
    of_output = columns * model.vocab_size * model.hidden_size
    width = model.num_heads * model.head_size
    of_attention = model.num_layers * width * length**2
    row = 2 * (of_blocks + of_output + of_attention)
    return float(PASSES[name] * preset.batch * row)


def decode_bytes(policy: Any, preset: Preset) -> float:
    """Bytes that the tokens of a rollout read: weights, and keys and values of a cache that is half
    full on the mean over the response. A token table that is no output layer is a lookup.
    """
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(policy))
    if "lm_head" in policy:
        weights -= policy["wte"]["embedding"].nbytes
    model = preset.model
    length = preset.prompt + preset.response / 2
    width = model.kv_heads * model.head_size
    numbers = 2 * model.num_layers * preset.batch * length * width
    cache = numbers * jnp.dtype(model.compute_dtype).itemsize
    return preset.response * (weights + cache)


def published(device_kind: str, dtype: str) -> tuple[Peaks | None, str]:
    """The peaks of a data sheet (targets.json), or None and the reason."""
    if dtype != "bfloat16":
        return None, "the published peaks are those of --dtype bfloat16"
    known = targets.FIGURES["gpus"] | targets.FIGURES["tpus"]
    del known["source"]
    for figures in known.values():
        if figures["device_kind"] == device_kind:
            peaks = Peaks(figures["flops"], figures["memory_bandwidth"])
            return peaks, ""
    return None, f"no published peaks of {device_kind} are known"


def measured_peaks(dtype: str) -> Peaks:
    """Of a large matrix product and a large copy in this process, the best of six."""
    is_cpu = jax.default_backend() == "cpu"
    size = 8192
    if is_cpu:  # most have no bfloat16 products
        size = 1536 if dtype == "float32" else 512
    # Zeros or ones would need less power, and a card would be faster than it is.
    square = jax.random.normal(jax.random.key(0), (size, size))
    square = square.astype(dtype)
    numbers = 2**26 if is_cpu else 2**28
    block = jnp.ones(numbers, jnp.float32)

    def best(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
        call = jax.jit(function)
        seconds = []
        for _ in range(7):  # the first one compiles
            started = time.perf_counter()
            jax.block_until_ready(call(x))
            seconds.append(time.perf_counter() - started)
        return min(seconds[1:])

    of_product = best(lambda x: x @ x, square)
    of_copy = best(lambda x: x + 1, block)
    return Peaks(2.0 * size**3 / of_product, 2.0 * block.nbytes / of_copy)


def planned_bytes(program: Compiled) -> int:
    """What ``plan`` counts of a program: its arguments, and what XLA needs beside them."""
    analysis: Any = program.memory_analysis()
    return memory.needed(program) + (analysis.argument_size_in_bytes if analysis else 0)


def of_step(name: Name, preset: Preset, policy: Any, seconds: float) -> dict[str, Any]:
    """MFU, or a decoded token's time and share of the bandwidth, against the published and the
    measured peaks; ``left_out`` says why a figure is missing.

    Args:
        policy: the weights that sample.
        seconds: of a step.
    """
    dtype = preset.model.compute_dtype
    peaks = measured_peaks(dtype)
    paper, reason = published(jax.devices()[0].device_kind, dtype)
    line: dict[str, Any] = {}
    line["peak_tflops"] = peaks.flops / 1e12
    line["peak_gb_s"] = peaks.bandwidth / 1e9
    left_out = {}
    if name == "rollout":
        rate = decode_bytes(policy, preset) / seconds
        line["ms_per_token"] = 1e3 * seconds / preset.response
        line["bandwidth_share"] = rate / peaks.bandwidth
        if paper is None:
            left_out["bandwidth_share_published"] = reason
        else:
            line["bandwidth_share_published"] = rate / paper.bandwidth
    needed = model_flops(name, preset)
    if needed is None:
        left_out["mfu"] = f"a step of {name} is not passes of one network"
    else:
        line["mfu_measured"] = needed / seconds / peaks.flops
        if paper is None:
            left_out["mfu"] = reason
        else:
            line["mfu"] = needed / seconds / paper.flops
    if left_out:
        line["left_out"] = left_out
    return line


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
