"""LoRA adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors."""

import json
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from rlhf_jax.errors import UserError
from rlhf_jax.models import names
from rlhf_jax.models.hf import Reader, find_folder, folded_score, listed, read_json, read_score
from rlhf_jax.types import Params

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Keys under which PEFT computes something else than x W + scale (x A) B with one scale for all, unless empty.
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
    config = _read_config(folder / CONFIG)
    leaves: dict[tuple[str, ...], Any] = {}
    with ExitStack() as stack:
        reader = Reader(folder, stack, PREFIX, WEIGHTS)
        for kernel, leaf in flatten_dict(params).items():
            modules = _modules(params, kernel, leaf.shape)
            if not any(f"{module}.lora_A.weight" in reader for module in modules):
                continue
            size_in, size_out = leaf.shape[-2:]
            rank = (*reader.shape(f"{modules[0]}.lora_A.weight"), 0)[0]
            if not rank:
                raise UserError(f"{reader.source}: {modules[0]}.lora_A.weight has no rows, so no rank")
            scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
            a = [reader.read(f"{module}.lora_A.weight", (rank, size_in), jnp.float32).T for module in modules]
            b = [reader.read(f"{module}.lora_B.weight", (size_out, rank), jnp.float32).T for module in modules]
            for name, parts in {"lora_a": a, "lora_b": b, "lora_scale": [jnp.float32(scale)] * len(modules)}.items():
                leaves[(*kernel[:-1], name)] = jnp.stack(parts) if kernel[0] == "h" else parts[0]
        adapters = unflatten_dict(leaves)
        if names.SCORE in reader:
            try:
                shift = float(reader.metadata.get("reward_shift", 0.0))
            except ValueError as error:
                raise UserError(f"{reader.source}: reward_shift in its metadata is no number: {error}") from error
            adapters["score"] = read_score(reader, params["ln_f"]["scale"].shape[0], shift)
        reader.check_all_read()
    if not adapters:
        raise UserError(f"{folder / WEIGHTS}: no adapter of a kernel of this model")
    return adapters


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file}: no such file; an adapter folder holds {CONFIG} and {WEIGHTS}")
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {config.get('peft_type')!r}, and only LORA is read")
    refused = [key for key in _OTHER_KINDS if config.get(key)]
    refused += ["bias"] if config.get("bias", "none") != "none" else []
    for key in refused:
        raise UserError(f"{file}: {key} is {config[key]!r}: such adapters are not supported")
    if not names.is_number(config.get("lora_alpha")):
        raise UserError(f"{file}: lora_alpha is {config.get('lora_alpha')!r}, expected a number")
    return config


def save(path: str | os.PathLike[str], params: Params, adapters: Params, *, base_model: str | None = None) -> None:
    """Writes a folder that PEFT loads onto the base model's Hugging Face folder.

    Args:
        path: the folder; made if missing.
        params: of the base model; only their names are used.
        adapters: of ``lora.init``. A score head becomes PEFT's saved module "score" (weight = gain * w; config.json's
            ``reward_shift`` is in the weights' metadata, which PEFT ignores); a value head has no place there.
        base_model: folder or name of the base model, for PEFT's ``AutoPeftModel``.

    Raises:
        ValueError: the adapters hold something else, or are of several ranks or scales.
    """
    leaves = flatten_dict(adapters)
    others = {"/".join(path) for path in leaves if path[0] != "score" and not path[-1].startswith("lora_")}
    if others:
        raise ValueError(f"cannot save {listed(others)} as adapters")
    tensors: dict[str, np.ndarray] = {}
    ranks_and_scales: set[tuple[int, float]] = set()
    targets: dict[str, list[str]] = {}  # module within a layer -> its full names
    for leaf_path in leaves:
        if leaf_path[-1] != "lora_a":
            continue
        place = leaf_path[:-1]
        a, b, scale = (np.asarray(leaves[(*place, f"lora_{name}")], np.float32) for name in ("a", "b", "scale"))
        ranks_and_scales |= {(a.shape[-1], float(value)) for value in scale.reshape(-1)}
        modules = _modules(params, (*place, "kernel"), a.shape)
        targets.setdefault("/".join(place[1:]), []).extend(modules)
        for module, *pair in zip(modules, *((a, b) if place[0] == "h" else ([a], [b])), strict=True):
            for letter, matrix in zip("AB", pair, strict=True):
                tensors[f"{PREFIX}{module}.lora_{letter}.weight"] = np.ascontiguousarray(matrix.T)
    if len(ranks_and_scales) != 1:
        kinds = sorted(ranks_and_scales)
        raise ValueError(f"PEFT's folder holds adapters of one rank and scale, got (rank, scale) {kinds}")
    ((rank, factor),) = ranks_and_scales
    family = _family(params)
    # The names within a layer where every adapted layer has them all, else the full name of each.
    full = sorted(module for modules in targets.values() for module in modules)
    layers = {module.removeprefix(family.prefix).split(".")[1] for module in full}
    is_same_everywhere = len(full) == len(targets) * len(layers)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": factor * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not family.transposed,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(family.block[module] for module in targets) if is_same_everywhere else full,
    }
    metadata = {"format": "pt"}
    if "score" in adapters:
        tensors[PREFIX + names.SCORE], shift = folded_score(adapters["score"])
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        metadata["reward_shift"] = repr(shift)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _family(params: Params) -> names.Family:
    return names.GPT2 if "wpe" in params else names.LLAMA


def _modules(params: Params, path: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """transformers' names of a kernel's module in each layer that it holds; none for another leaf."""
    if path[-1] != "kernel" or not path[0].startswith("h"):
        return []
    return [name.removesuffix(".weight") for name in _family(params).tensors(path, shape)]
