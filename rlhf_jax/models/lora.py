"""LoRA (Hu et al. 2021): a low-rank term ``scale * (x @ A) @ B`` beside frozen kernels, in pure
functions.

Adapters are a part of a parameter tree: ``{"h_0": {"attn": {"c_attn": {"lora_a" [in, r], "lora_b"
[r, out], "lora_scale" []}}}, ...}``, with a leading [L - 1] axis for stacked layers and [E] for
experts, and the heads that are trained with them; "out" of GPT-2's c_attn is [3, D], as in its
kernel. The scale, alpha /
r, gets no gradient. Train only the adapters, not the base: ``bind`` makes a function of the
adapters.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from rlhf_jax import policies
from rlhf_jax.models.families import LeafPath, takes_adapters
from rlhf_jax.models.heads import HEADS
from rlhf_jax.models.kernels import quantization
from rlhf_jax.models.kernels.quantization import Form
from rlhf_jax.models.peft import read_adapter as load
from rlhf_jax.models.peft import split_shape
from rlhf_jax.models.peft import write_adapter as save
from rlhf_jax.types import Params

__all__ = ["HEADS", "attach", "bind", "init", "load", "merge", "quantized", "save"]


def init(
    key: Array,
    params: Params,
    rank: int,
    match: str = "attn|mlp",
    *,
    alpha: float | None = None,
) -> Params:
    """Adapters that change nothing yet: A is uniform within 1 / sqrt(in) of 0, and B is 0, as in
    PEFT.

    Args:
        params: of a model; not changed.
        rank: r, at least 1.
        match: regular expression, searched in the paths of the kernels, such as "h_0/attn/c_attn".
            Experts get adapters, each its own, only if the expression names them: "attn|experts".
            Their routers get none.
        alpha: the scale is alpha / rank; None: rank, so a scale of 1.

    Returns:
        float32 adapters of the kernels that match.

    Raises:
        ValueError: no kernel matches, or ``rank`` is below 1, or the expression names experts whose
            adapters could not be written.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    kernels = {
        path[:-1]: leaf.shape
        for path, leaf in sorted(flatten_dict(params).items())
        if path[-1] == "kernel" and path[0] not in HEADS and takes_adapters(path)
    }
    if "experts" not in match:
        kernels = {path: shape for path, shape in kernels.items() if "experts" not in path}
    elif any({"experts", "gate_up_proj"} <= set(path) for path in kernels):
        raise ValueError(
            "the experts of this model are one tensor in its files, for which PEFT has no "
            "adapters: leave them out of the expression"
        )
    chosen = [module for module in kernels if re.search(match, "/".join(module))]
    if not chosen:
        places = ", ".join(sorted({"/".join(module[1:]) for module in kernels}))
        raise ValueError(f"no kernel's path matches {match!r}; the layers hold {places}")
    scale = 1.0 if alpha is None else alpha / rank
    leaves: dict[LeafPath, Array] = {}
    for number, module in enumerate(chosen):
        layers, size_in, out = split_shape(module, kernels[module])
        bound = 1.0 / math.sqrt(size_in)
        shape = (*layers, size_in, rank)
        own_key = jax.random.fold_in(key, number)
        leaves |= {
            (*module, "lora_a"): jax.random.uniform(own_key, shape, minval=-bound, maxval=bound),
            (*module, "lora_b"): jnp.zeros((*layers, rank, *out)),
            (*module, "lora_scale"): jnp.full(layers, scale, jnp.float32),
        }
    return unflatten_dict(leaves)


def quantized(params: Params, form: Form = "int8") -> Params:
    """A frozen base whose kernels of all layers have few bits, with their scales beside them
    (``kernels.quantization``).

    Tables, norms, biases, routers and heads stay as they are. The models' functions, ``attach`` and
    ``merge`` take the result; it cannot be trained or saved.
    """
    leaves = flatten_dict(params)
    found = dict(leaves)
    for path, kernel in leaves.items():
        if path[-1] != "kernel" or path[0] in HEADS or not takes_adapters(path):
            continue
        axis = len(split_shape(path, kernel.shape)[0])
        for name, leaf in quantization.quantized(kernel, axis, form).items():
            found[(*path[:-1], name)] = leaf
    return unflatten_dict(found)


def _dequantized(leaves: dict[LeafPath, Array]) -> dict[LeafPath, Array]:
    """The leaves of a base with float32 kernels in place of those of few bits."""
    scales = (quantization.COLUMNS, quantization.BLOCKS)
    found = {path: leaf for path, leaf in leaves.items() if path[-1] not in scales}
    for (*module, name), scale in leaves.items():
        if name in scales:
            path = (*module, "kernel")
            axis = len(split_shape(path, leaves[path].shape)[0])
            held = {"kernel": leaves[path], name: scale}
            found[path] = quantization.dequantized(held, axis)
    return found


def attach(params: Params, adapters: Params) -> Params:
    """The parameters with the adapters beside their kernels, and with the adapters' heads and whole
    modules, for a model's functions.

    Nothing is copied: the kernels do not change, and the product of A and B is never computed.

    Raises:
        ValueError: an adapter belongs to no kernel of ``params``, or to one that has an adapter.
    """
    leaves = flatten_dict(params)
    added = flatten_dict(adapters)
    for path in added:
        if path[0] in HEADS:
            continue
        is_adapter = path[-1].startswith("lora_")
        owner = (*path[:-1], "kernel") if is_adapter else path
        if owner not in leaves:
            raise ValueError(
                f"the adapter {'/'.join(path)} belongs to no kernel of these parameters"
            )
        if is_adapter and path in leaves:
            raise ValueError(
                f"{'/'.join(path[:-1])} has an adapter already, which a second one would replace: "
                "merge the first one into its kernel, params = lora.merge(params, adapters), and "
                "attach the second to the result"
            )
    return unflatten_dict(leaves | added)


def merge(params: Params, adapters: Params) -> Params:
    """The parameters of an equal model without adapters: kernels + scale * A @ B, and the adapters'
    heads and whole modules.

    A changed kernel becomes float32: in bfloat16 a small change would be lost in rounding. So does
    one of few bits (``quantized``): the adapters were trained beside what it holds.

    Raises:
        ValueError: as ``attach``.
    """
    leaves = _dequantized(flatten_dict(attach(params, adapters)))
    merged = {path: leaf for path, leaf in leaves.items() if not path[-1].startswith("lora_")}
    for (*module, name), a in leaves.items():
        if name != "lora_a":
            continue
        b = leaves[(*module, "lora_b")]
        b = b.reshape(*b.shape[: a.ndim - 1], -1)  # c_attn's [r, 3, D] too
        scale = leaves[(*module, "lora_scale")]
        change = scale[..., None, None] * jnp.matmul(a, b, precision="highest")
        kernel = leaves[(*module, "kernel")].astype(jnp.float32)
        merged[(*module, "kernel")] = kernel + change.reshape(kernel.shape)
    return unflatten_dict(merged)


def bind(fn: Any, params: Params) -> Any:
    """``fn(params, ...)``, a PolicyFn or ScoreFn, as a function of adapters: ``bind(fn,
    base)(adapters, ...)``; a policy stays one.

    The result carries the base's arrays and travels through ``jit`` as an argument; closed over,
    they would become constants of the program.
    """
    return policies.wrap(_with_adapters, fn, params)


def _with_adapters(fn: Any, params: Params, adapters: Params, *args: Any, **more: Any) -> Any:
    return fn(attach(params, adapters), *args, **more)
