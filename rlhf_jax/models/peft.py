"""LoRA adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors."""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from rlhf_jax.errors import UserError, is_there
from rlhf_jax.models import families, names
from rlhf_jax.models.families import LeafPath, Shape
from rlhf_jax.models.heads import HEADS
from rlhf_jax.models.hf import (
    ADAPTER_CONFIG,
    Reader,
    find_folder,
    folded_score,
    listed,
    read_json,
    read_leaf,
    read_score,
    read_tied_tables,
    write_tensors,
)
from rlhf_jax.models.model import Model, resize_vocabulary
from rlhf_jax.types import Params

CONFIG = ADAPTER_CONFIG
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Keys of adapter_config.json that are read, or that leave what an adapter computes as it is. Every
# other key asks for something else, now or in a later PEFT, unless it is empty or "none".
_KEYS = {
    *("peft_type", "lora_alpha", "use_rslora", "init_lora_weights"),
    *("r", "rank_pattern"),  # alpha is divided by the rank of each module's tensors
    # The tensors say which modules have adapters or are saved whole.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "ensure_weight_tying"),
    *("lora_dropout", "fan_in_fan_out"),  # of training, and of the base's kernels
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    # Read only beside init_lora_weights of their names, megatron_config or use_qalora.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "peft_version"),
}
_MERGE = (
    "let PEFT merge the adapter, model.merge_and_unload().save_pretrained(FOLDER), and give FOLDER"
)
# Starts of A and B that leave the base model's weights as they are. For the others (PiSSA, OLoRA,
# EVA, CorDA, LoftQ, ...) PEFT changes these weights each time it loads the adapter.
_STARTS = (None, True, False, "gaussian")


def read_adapter(
    path: str | os.PathLike[str], params: Params, model: Model | None = None
) -> Params:
    """Adapters for ``params`` from PEFT's folder, or from one on the Hugging Face hub.

    Args:
        path: the folder, or a name on the hub.
        params: of the model that the adapters belong to.
        model: of these parameters; needed for a folder that holds whole modules beside the
            adapters (``modules_to_save``), except a score head.

    Returns:
        float32 adapters with ``lora_scale`` = alpha / r (rsLoRA: alpha / sqrt(r)), the score head
        of a sequence classifier where the folder has one, and the leaves of whole modules, which
        replace those of ``params`` in ``attach`` and ``merge``.

    Raises:
        UserError: names the file, key or tensor that is missing, unexpected or of the wrong shape.
    """
    folder = find_folder(path)
    config = _read_config(folder / CONFIG)
    leaves: dict[LeafPath, Array] = {}
    reader = Reader(folder, PREFIX, WEIGHTS)
    for kernel, leaf in flatten_dict(params).items():
        modules = _modules(params, kernel, leaf.shape)
        if any(f"{module}.lora_A.weight" in reader for module in modules):
            leaves |= _read_pair(reader, config, modules, kernel, leaf.shape)
    adapters = unflatten_dict(leaves)
    if families.SCORE in reader:
        adapters["score"] = read_score(reader, len(params["ln_f"]["scale"]), _read_shift(reader))
    if reader.unread and model is not None:
        whole = _read_whole_modules(reader, model, params)
        adapters = unflatten_dict(flatten_dict(adapters) | whole)
    if reader.unread:
        raise UserError(f"{reader.source}: unexpected tensors: {listed(reader.unread)}; {_MERGE}")
    if not adapters:
        raise UserError(f"{folder / WEIGHTS}: no adapter of a kernel of this model")
    return adapters


def _read_whole_modules(reader: Reader, model: Model, params: Params) -> dict[LeafPath, Array]:
    """The leaves of ``params`` that the folder holds whole."""
    family = families.family_of(model.config)
    leaves = {}
    for path, leaf in flatten_dict(params).items():
        tensors = family.tensors(path, leaf.shape) if path[0] not in HEADS else []
        if not any(name in reader for name in tensors):
            continue
        if path[-1] == "embedding":
            [table] = tensors
            rows = reader.shape(table)[0]
            if rows > len(leaf):
                raise UserError(
                    f"{reader.source}: {table} has {rows} rows, and the model {len(leaf)}: the "
                    "adapter was trained after tokens were added. First, model, params = "
                    f"models.resize_vocabulary(model, params, {rows}); `rlhf-jax export` does so"
                )
            if model.config.tie_embeddings:
                if family.output_table not in reader:
                    raise UserError(
                        f"{reader.source}: {table} is saved whole and {family.output_table} is "
                        f"not, but the model's input and output tables are one; {_MERGE}"
                    )
                read_tied_tables(reader, family, leaf.shape)
        leaves[path] = read_leaf(reader, family, path, leaf.shape)
    return leaves


def with_tokens_of(
    path: str | os.PathLike[str], model: Model, params: Params
) -> tuple[Model, Params]:
    """The model with as many tokens as the token table of an adapter's folder, if it has one: PEFT
    stores it whole where tokens were added.
    """
    reader = Reader(find_folder(path), PREFIX, WEIGHTS)
    [table] = families.family_of(model.config).tensors(("wte", "embedding"), ())
    rows = reader.shape(table)[0] if table in reader else 0
    if rows <= model.config.vocab_size:
        return model, params
    return resize_vocabulary(model, params, rows)


def split_shape(path: LeafPath, shape: Shape) -> tuple[Shape, int, Shape]:
    """A kernel's shape as (layers [L - 1], experts [E], both or none of them, size of the input,
    sizes of the output).
    """
    leading = shape[: (path[0] == "h") + ("experts" in path)]
    size_in, *out = shape[len(leading) :]
    return leading, size_in, tuple(out)


def _read_pair(
    reader: Reader, config: dict[str, Any], modules: list[str], kernel: LeafPath, shape: Shape
) -> dict[LeafPath, Array]:
    """The leaves of one kernel's adapter, which PEFT stores in one module for each layer."""
    layers, size_in, out = split_shape(kernel, shape)
    first = f"{modules[0]}.lora_A.weight"
    stored = reader.shape(first)
    rank = stored[0] if stored else 0
    if not rank:
        raise UserError(f"{reader.source}: {first} has shape {list(stored)}, so no rank")
    if rank != config.get("r", rank) and not config.get("rank_pattern"):
        raise UserError(
            f"{reader.source}: {first} is of rank {rank}, but r of {CONFIG} is {config['r']!r}"
        )

    def read(letter: str, shape: Shape) -> Array:
        transposed = (math.prod(shape[1:]), shape[0])
        tensors = [f"{module}.lora_{letter}.weight" for module in modules]
        parts = [reader.read(tensor, transposed).T for tensor in tensors]
        return jnp.stack(parts).reshape(*layers, *shape)

    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    module = kernel[:-1]
    return {
        (*module, "lora_a"): read("A", (size_in, rank)),
        (*module, "lora_b"): read("B", (rank, *out)),
        (*module, "lora_scale"): jnp.full(layers, scale, jnp.float32),
    }


def scores_turns(path: str | os.PathLike[str]) -> bool:
    """Whether the adapters of a reward model were trained here, so that its score stands at the end
    of a turn (`hf.scores_turns`).
    """
    return "reward_shift" in Reader(find_folder(path), single=WEIGHTS).metadata


def _read_shift(reader: Reader) -> float:
    try:
        return float(reader.metadata.get("reward_shift", 0.0))
    except ValueError as error:
        raise UserError(
            f"{reader.source}: reward_shift in its metadata is no number: {error}"
        ) from error


def _read_config(file: Path) -> dict[str, Any]:
    if not is_there(file):
        raise UserError(f"{file}: no such file; an adapter folder holds {CONFIG} and {WEIGHTS}")
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {config.get('peft_type')!r}, and only LORA is read")
    for key in sorted(config.keys() - _KEYS):
        value = config[key]
        if value and value != "none":
            raise UserError(
                f"{file}: {key} is {value!r:.100}: only plain LoRA is read; where PEFT can, "
                f"{_MERGE}"
            )
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        raise UserError(
            f"{file}: init_lora_weights is {start!r}: PEFT changes the base model's weights for "
            "such adapters; merge them there (merge_and_unload), or save them there with "
            "path_initial_model_for_weight_conversion"
        )
    alpha = config.get("lora_alpha")
    if not (names.is_number(alpha) and abs(alpha) < 1e38):  # of float32
        raise UserError(f"{file}: lora_alpha is {alpha!r}, expected a number below 1e38")
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
    leaves = {
        path: np.asarray(leaf, np.float32)
        for path, leaf in flatten_dict(adapters).items()
        if path[0] != "score"
    }
    others = ["/".join(path) for path in leaves if not path[-1].startswith("lora_")]
    if others:
        raise ValueError(f"cannot save {listed(others)} as adapters")
    kinds = set()
    for (*module, name), leaf in leaves.items():
        if name == "lora_a":
            scales = leaves[(*module, "lora_scale")].ravel()
            kinds |= {(leaf.shape[-1], float(scale)) for scale in scales}
    if len(kinds) != 1:
        raise ValueError(
            f"PEFT's folder holds adapters of one rank and scale, got (rank, scale) {sorted(kinds)}"
        )
    [(rank, scale)] = kinds
    tensors, modules = _stored(params, leaves)
    layers = {module.split(".", 3)[2] for module in modules}
    short = {module.split(".", 3)[3] for module in modules}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": "wpe" in params,  # only GPT-2's kernels are stored as [in, out]
        "inference_mode": True,
        "modules_to_save": None,
        # The names within a layer if every adapted layer has them all, else the full names.
        "target_modules": sorted(short if len(modules) == len(short) * len(layers) else modules),
    }
    metadata = {"format": "pt"}
    if "score" in adapters:
        tensors[PREFIX + families.SCORE], shift = folded_score(adapters["score"])
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        # The only entry: safetensors writes several in a random order.
        metadata = {"reward_shift": repr(shift)}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors, metadata)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def _stored(
    params: Params, leaves: dict[LeafPath, np.ndarray]
) -> tuple[dict[str, np.ndarray], set[str]]:
    """PEFT's tensors by name, and their modules' names such as transformer.h.0.attn.c_attn."""
    tensors: dict[str, np.ndarray] = {}
    adapted: set[str] = set()
    for (*place, name), leaf in leaves.items():
        if name == "lora_scale":
            continue
        path = (*place, "kernel")
        leading, *_ = split_shape(path, leaf.shape)
        modules = _modules(params, path, leaf.shape)
        matrices = leaf.reshape(-1, *leaf.shape[len(leading) :])
        for module, matrix in zip(modules, matrices, strict=True):
            transposed = matrix.reshape(len(matrix), -1).T
            tensor = f"{PREFIX}{module}.lora_{name[-1].upper()}.weight"
            tensors[tensor] = np.ascontiguousarray(transposed)
        adapted.update(modules)
    return tensors, adapted


def _modules(params: Params, path: LeafPath, shape: Shape) -> list[str]:
    """transformers' name of a kernel's module in each layer; none for another leaf."""
    if path[-1] != "kernel" or not path[0].startswith("h") or not families.takes_adapters(path):
        return []
    names = families.family_with(params).tensors(path, shape)
    return [name.removesuffix(".weight") for name in names]
