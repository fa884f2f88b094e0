"""LoRA adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors."""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax
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

# Keys under which PEFT computes something else than x W + scale (x A) B with one scale for all,
# unless empty or "none".
_OTHER_KINDS: tuple[str, ...] = (
    "use_dora",
    "use_qalora",
    "alpha_pattern",
    "layer_replication",
    "lora_bias",
    "bias",
)
_OTHER_KINDS += ("trainable_token_indices",)


def read_adapter(path: str | os.PathLike[str], params: Params) -> Params:
    """Adapters for ``params`` from PEFT's folder, or from one on the Hugging Face hub.

    Args:
        path: the folder, or a name on the hub.
        params: of the model that the adapters belong to.

    Returns:
        float32 adapters with ``lora_scale`` = alpha / r (rsLoRA: alpha / sqrt(r)), and the score
        head of a sequence classifier where the folder has one.

    Raises:
        UserError: names the file, key or tensor that is missing, unexpected or of the wrong shape.
    """
    folder = find_folder(path)
    config = _read_config(folder / CONFIG)
    leaves: dict[tuple[str, ...], jax.Array] = {}
    reader = Reader(folder, PREFIX, WEIGHTS)
    for kernel, leaf in flatten_dict(params).items():
        modules = _modules(params, kernel, leaf.shape)
        if not any(f"{module}.lora_A.weight" in reader for module in modules):
            continue
        first = 1 + (kernel[0] == "h")  # stacked layers: [L - 1] stands before the rest
        *layers, size_in = leaf.shape[:first]
        stored = reader.shape(f"{modules[0]}.lora_A.weight")
        if not (rank := (*stored, 0)[0]):
            raise UserError(
                f"{reader.source}: {modules[0]}.lora_A.weight has shape {list(stored)}, so no rank"
            )
        for letter, shape in (("A", (size_in, rank)), ("B", (rank, *leaf.shape[first:]))):
            stored = (math.prod(shape[1:]), shape[0])
            parts = [
                reader.read(f"{module}.lora_{letter}.weight", stored, jnp.float32).T
                for module in modules
            ]
            leaves[(*kernel[:-1], f"lora_{letter.lower()}")] = jnp.stack(parts).reshape(
                *layers, *shape
            )
        scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        leaves[(*kernel[:-1], "lora_scale")] = jnp.full(layers, scale, jnp.float32)
    adapters = unflatten_dict(leaves)
    if names.SCORE in reader:
        try:
            shift = float(reader.metadata.get("reward_shift", 0.0))
        except ValueError as error:
            raise UserError(
                f"{reader.source}: reward_shift in its metadata is no number: {error}"
            ) from error
        adapters["score"] = read_score(reader, len(params["ln_f"]["scale"]), shift)
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
    for key in _OTHER_KINDS:
        if (value := config.get(key)) and value != "none":
            raise UserError(f"{file}: {key} is {value!r}: such adapters are not supported")
    if not names.is_number(config.get("lora_alpha")):
        raise UserError(f"{file}: lora_alpha is {config.get('lora_alpha')!r}, expected a number")
    return config


def write_adapter(
    path: str | os.PathLike[str], params: Params, adapters: Params, *, base_model: str | None = None
) -> None:
    """Writes a folder that PEFT loads onto the base model's Hugging Face folder.

    Args:
        path: the folder; made if missing.
        params: of the base model; only their names are used.
        adapters: of ``lora.init``. A score head becomes PEFT's saved module "score" (weight = gain
            * w; config.json's ``reward_shift`` is in the weights' metadata, which PEFT ignores); a
              value head has no place there.
        base_model: folder or name of the base model, for PEFT's ``AutoPeftModel``.

    Raises:
        ValueError: the adapters hold something else, or are of several ranks or scales.
    """
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten_dict(adapters).items()}
    others = {
        "/".join(path) for path in leaves if path[0] != "score" and not path[-1].startswith("lora_")
    }
    if others:
        raise ValueError(f"cannot save {listed(others)} as adapters")
    tensors: dict[str, np.ndarray] = {}
    ranks_and_scales: set[tuple[int, float]] = set()
    full: list[str] = []  # the modules' names, such as transformer.h.0.attn.c_attn
    for (*place, name), leaf in leaves.items():
        if name not in ("lora_a", "lora_b"):
            continue
        modules = _modules(params, (*place, "kernel"), leaf.shape)
        for module, matrix in zip(modules, leaf if place[0] == "h" else [leaf], strict=True):
            stored = matrix.reshape(len(matrix), -1).T
            tensors[f"{PREFIX}{module}.lora_{name[-1].upper()}.weight"] = np.ascontiguousarray(
                stored
            )
        if name == "lora_a":
            full += modules
            ranks_and_scales |= {
                (leaf.shape[-1], float(x)) for x in leaves[(*place, "lora_scale")].reshape(-1)
            }
    if len(ranks_and_scales) != 1:
        kinds = sorted(ranks_and_scales)
        raise ValueError(
            f"PEFT's folder holds adapters of one rank and scale, got (rank, scale) {kinds}"
        )
    ((rank, scale),) = ranks_and_scales
    # The names within a layer where every adapted layer has them all, else the full name of each.
    layers, short = ({module.split(".", 3)[part] for module in full} for part in (2, 3))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": "wpe" in params,  # GPT-2's kernels alone are stored as [in, out]
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(short if len(full) == len(short) * len(layers) else full),
    }
    metadata = {"format": "pt"}
    if "score" in adapters:
        tensors[PREFIX + names.SCORE], shift = folded_score(adapters["score"])
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        metadata = {
            "reward_shift": repr(shift)
        }  # alone: safetensors writes several entries in a random order
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    (folder / CONFIG).write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def _modules(params: Params, path: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """transformers' names of a kernel's module in each layer that it holds; none for another leaf."""
    if path[-1] != "kernel" or not path[0].startswith("h"):
        return []
    family = (
        names.GPT2 if "wpe" in params else names.LLAMA
    )  # whose names of kernels the other families share
    return [name.removesuffix(".weight") for name in family.tensors(path, shape)]
