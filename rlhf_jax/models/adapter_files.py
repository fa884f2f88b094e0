"""LoRA adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors."""

import json
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from rlhf_jax.errors import UserError
from rlhf_jax.models import names
from rlhf_jax.models.config_json import is_number
from rlhf_jax.models.files import Reader, find_folder, listed, read_json
from rlhf_jax.types import Params

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Keys under which PEFT computes something else than x W + scale (x A) B with one scale for all.
_OTHER_KINDS = ("use_dora", "use_qalora", "alpha_pattern", "layer_replication", "lora_bias", "trainable_token_indices")


def load(path: str | os.PathLike[str], params: Params) -> Params:
    """Adapters for ``params`` from PEFT's folder, or from one on the Hugging Face hub.

    Args:
        path: the folder, or a name on the hub.
        params: of the model that the adapters belong to.

    Returns:
        float32 adapters with ``lora_scale`` = alpha / r (rsLoRA: alpha / sqrt(r)), and the score head of a sequence
        classifier where the folder has one.

    Raises:
        UserError: names the file, key or tensor that is missing, unexpected or of the wrong shape.
    """
    folder = find_folder(path)
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(f"{file}: no such file; an adapter folder holds {CONFIG} and {WEIGHTS}")
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {config.get('peft_type')!r}, and only LORA is read")
    for key in _OTHER_KINDS:
        if config.get(key):
            raise UserError(f"{file}: {key} is {config[key]!r}: such adapters are not supported")
    if config.get("bias", "none") != "none":
        raise UserError(f"{file}: bias is {config['bias']!r}: adapters with biases of their own are not supported")
    alpha = config.get("lora_alpha")
    if not is_number(alpha):
        raise UserError(f"{file}: lora_alpha is {alpha!r}, expected a number")

    family, shapes = _family(params), {path: leaf.shape for path, leaf in flatten_dict(params).items()}
    leaves: dict[tuple[str, ...], Any] = {}
    with ExitStack() as stack:
        reader = Reader(folder, stack, PREFIX, WEIGHTS)
        for kernel, shape in shapes.items():
            stored = _names(family, kernel, shape)
            if not any(f"{name}.lora_A.weight" in reader.where for name in stored):
                continue
            size_in, size_out = shape[-2:]
            found = reader.shape(f"{stored[0]}.lora_A.weight")
            rank = found[0] if found else 0
            if not rank:
                raise UserError(f"{reader.source}: {stored[0]}.lora_A.weight has shape {list(found)}, so no rank")
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            a = [reader.read(f"{name}.lora_A.weight", (rank, size_in), jnp.float32).T for name in stored]
            b = [reader.read(f"{name}.lora_B.weight", (size_out, rank), jnp.float32).T for name in stored]
            scales = [jnp.float32(scale)] * len(stored)
            for name, parts in (("lora_a", a), ("lora_b", b), ("lora_scale", scales)):
                leaves[(*kernel[:-1], name)] = jnp.stack(parts) if kernel[0] == "h" else parts[0]
        if names.SCORE in reader.where:
            width = shapes[("ln_f", "scale")][0]
            try:
                shift = float(reader.metadata.get("reward_shift", 0.0))
            except ValueError as error:
                raise UserError(f"{reader.source}: reward_shift in its metadata is no number: {error}") from error
            head = {"bias": 0.0, "gain": 1.0, "shift": shift}
            leaves |= {("score", name): jnp.float32(value) for name, value in head.items()}
            leaves[("score", "kernel")] = reader.read(names.SCORE, (1, width), jnp.float32)[0]
        reader.check_all_read()
        if not leaves:
            raise UserError(f"{folder / WEIGHTS}: no adapter of a kernel of this model")
    return unflatten_dict(leaves)


def save(path: str | os.PathLike[str], params: Params, adapters: Params, *, base_model: str | None = None) -> None:
    """Writes a folder that PEFT loads onto the base model's Hugging Face folder.

    Args:
        path: the folder; made where missing.
        params: of the base model; only their names are used.
        adapters: of ``lora.init``. A score head becomes PEFT's saved module "score" (weight = gain * w; config.json's
            ``reward_shift`` is in the weights' metadata, which PEFT ignores); a value head has no place there.
        base_model: folder or name of the base model, for PEFT's ``AutoPeftModel``.

    Raises:
        ValueError: the adapters hold something else, or are of several ranks or scales.
    """
    family, leaves = _family(params), flatten_dict(adapters)
    others = sorted({"/".join(path) for path in leaves if path[0] != "score" and not path[-1].startswith("lora_")})
    if others:
        raise ValueError(f"cannot save {listed(others)} as adapters")
    tensors: dict[str, np.ndarray] = {}
    kinds = set()
    modules: set[str] = set()
    for leaf_path, leaf in leaves.items():
        if leaf_path[-1] != "lora_a":
            continue
        kernel = (*leaf_path[:-1], "kernel")
        a, b, scales = (np.asarray(leaves[(*kernel[:-1], f"lora_{name}")], np.float32) for name in ("a", "b", "scale"))
        kinds |= {(a.shape[-1], float(value)) for value in scales.reshape(-1)}
        stored = _names(family, kernel, leaf.shape)
        modules.add(_module(family, kernel))
        for layer, name in enumerate(stored):
            one = (a, b) if kernel[0] != "h" else (a[layer], b[layer])
            for letter, matrix in zip("AB", one, strict=True):
                tensors[f"{PREFIX}{name}.lora_{letter}.weight"] = np.ascontiguousarray(matrix.T)
    if len(kinds) != 1:
        raise ValueError(f"PEFT's folder holds adapters of one rank and scale, got (rank, scale) {sorted(kinds)}")
    ((rank, scale),) = kinds
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not family.transposed,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": _targets(family, modules, tensors),
    }
    metadata = {"format": "pt"}
    if "score" in adapters:
        head = {name: np.asarray(leaf, np.float32) for name, leaf in adapters["score"].items()}
        tensors[PREFIX + names.SCORE] = (head["gain"] * head["kernel"])[None, :]
        shift = float(head["gain"] * head["bias"] + head["shift"])
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        metadata["reward_shift"] = repr(shift)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _family(params: Params) -> names.Family:
    return names.GPT2 if "wpe" in params else names.LLAMA


def _module(family: names.Family, kernel: tuple[str, ...]) -> str:
    """The module of a kernel within its block, such as "attn.c_attn"; empty for a kernel of no block."""
    inner = "/".join(kernel[1:])
    return next((name.removesuffix(".weight") for name, path in family.block.items() if path == inner), "")


def _names(family: names.Family, kernel: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """transformers' names of a kernel's modules: one, or one per layer under ``scan_layers``; none for other leaves."""
    module = _module(family, kernel) if kernel[-1] == "kernel" else ""
    if not module:
        return []
    layers = range(shape[0]) if kernel[0] == "h" else [int(kernel[0].removeprefix("h_"))]
    return [family.prefix + family.layer.format(layer=layer) + module for layer in layers]


def _targets(family: names.Family, modules: set[str], tensors: Mapping[str, np.ndarray]) -> list[str]:
    """PEFT's target_modules: the modules' names where every layer has them, else the full name of each."""
    adapted = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors})
    layers = {name.removeprefix(family.prefix).split(".")[1] for name in adapted}
    return sorted(modules) if len(adapted) == len(modules) * len(layers) else adapted
