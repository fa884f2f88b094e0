"""Hugging Face folders: config.json and safetensors weights, read and written tensor by tensor.

A folder is what transformers' ``save_pretrained`` writes for GPT2LMHeadModel or LlamaForCausalLM, or for
GPT2ForSequenceClassification or LlamaForSequenceClassification where there is a score head. A value head, which
transformers has no place for, lies beside the weights in value_head.safetensors. Nothing is ever unpickled.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_jax.errors import UserError
from rlhf_jax.models import names
from rlhf_jax.models.config import GPT2Config, ModelConfig
from rlhf_jax.models.config_json import from_json, is_number, to_json
from rlhf_jax.models.model import Model, build
from rlhf_jax.types import Params

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
VALUE_HEAD = "value_head.safetensors"

_DTYPES = ("F16", "BF16", "F32", "F64")  # safetensors' names of what is read
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load(
    path_or_hf_name: str | os.PathLike[str],
    dtype: Any = None,
    *,
    compute_dtype: str = "float32",
    remat: bool = False,
    scan_layers: bool = False,
) -> tuple[Model, Params]:
    """Loads a model from a folder, or from the Hugging Face hub (its ``*.json`` and ``*.safetensors`` files alone).

    Args:
        path_or_hf_name: a folder, or a name such as "openai-community/gpt2".
        dtype: of the parameters; None keeps the file's.
        compute_dtype, remat, scan_layers: as in GPT2Config and LlamaConfig.

    Returns:
        The model and its parameters. A sequence classification folder with one label gives ``params["score"]`` (gain 1,
        bias 0, shift = ``reward_shift`` of config.json or 0), a value_head.safetensors gives ``params["value"]``; heads
        are float32 unless ``dtype`` says otherwise.

    Raises:
        UserError: names the file, key or tensor that is missing, unexpected or of the wrong shape.
    """
    folder = find_folder(path_or_hf_name)
    config_file = folder / CONFIG
    if not config_file.is_file():
        raise UserError(f"{config_file}: no such file; a model folder holds {CONFIG} and {WEIGHTS}")
    keys = read_json(config_file)
    reward_shift = keys.pop("reward_shift", 0.0)
    if not is_number(reward_shift):
        raise UserError(f"{config_file}: reward_shift is {reward_shift!r}, expected a number")
    config = from_json(keys, str(config_file))
    config = dataclasses.replace(config, compute_dtype=compute_dtype, remat=remat, scan_layers=scan_layers)
    model = build(config)
    with ExitStack() as stack:
        family = names.family(config)
        reader = Reader(folder, stack, family.prefix)
        _check_sizes(config, reader, str(config_file))
        architectures = keys.get("architectures")
        named = isinstance(architectures, list) and family.classifier in architectures
        is_classifier = named or names.SCORE in reader.where
        params = _read_body(reader, model, dtype, is_classifier)
        if is_classifier:
            weight = reader.read(names.SCORE, (1, config.hidden_size), dtype or jnp.float32)
            scalars = {"bias": 0.0, "gain": 1.0, "shift": reward_shift}
            params["score"] = {"kernel": weight[0]} | {k: jnp.asarray(v, weight.dtype) for k, v in scalars.items()}
        reader.check_all_read()
    if (folder / VALUE_HEAD).is_file():
        with ExitStack() as stack:
            reader = Reader(folder, stack, "", VALUE_HEAD)
            shapes = {"kernel": (config.hidden_size,), "bias": ()}
            params["value"] = {k: reader.read(k, shape, dtype or jnp.float32) for k, shape in shapes.items()}
            reader.check_all_read()
    return model, params


def save(path: str | os.PathLike[str], model: Model, params: Params) -> None:
    """Writes a folder that transformers loads with every tensor bit-equal; the same parameters give the same bytes.

    Args:
        path: the folder; made where missing, its model files replaced.
        model: whose config is written, with the keys it was loaded with.
        params: the body, and optionally "score" (the folder becomes a ...ForSequenceClassification of one label:
            ``score.weight = gain * w``, and config.json gets ``reward_shift = gain * bias + shift``, to be added to
            transformers' logit; such a folder has no output table of its own) and "value" (value_head.safetensors).

    Raises:
        ValueError: if ``params`` holds anything else, or lacks something.
    """
    tensors = _body_tensors(model, params)
    keys = to_json(model.config)
    family = names.family(model.config)
    keys["architectures"] = [family.causal_lm]
    if "score" in params:
        head = {name: np.asarray(leaf, np.float32) for name, leaf in params["score"].items()}
        tensors[names.SCORE] = (head["gain"] * head["kernel"])[None, :]
        labels = keys.get("id2label")
        if not (isinstance(labels, Mapping) and len(labels) == 1):
            keys["id2label"], keys["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}
        keys |= {
            "architectures": [family.classifier],
            "num_labels": 1,
            "problem_type": "regression",  # transformers refuses "single_label_classification" with one label
            "reward_shift": float(head["gain"] * head["bias"] + head["shift"]),
        }
    # transformers gives all tensors the dtype named here: the widest loses nothing.
    keys.pop("torch_dtype", None)
    keys["dtype"] = str(jnp.result_type(*(tensor.dtype for tensor in tensors.values())))

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # All is written before anything is replaced, so that an interrupted save leaves the former model.
    written = {name: folder / f".{name}.{os.getpid()}.tmp" for name in (WEIGHTS, CONFIG, VALUE_HEAD)}
    try:
        save_file(tensors, written[WEIGHTS], metadata={"format": "pt"})
        written[CONFIG].write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if "value" in params:
            value_head = {name: np.asarray(params["value"][name]) for name in ("kernel", "bias")}
            save_file(value_head, written[VALUE_HEAD], metadata={"format": "pt"})
        else:
            del written[VALUE_HEAD]
            (folder / VALUE_HEAD).unlink(missing_ok=True)
        for name, file in written.items():
            os.replace(file, folder / name)
    finally:
        for file in written.values():
            file.unlink(missing_ok=True)


def find_folder(path_or_hf_name: str | os.PathLike[str]) -> Path:
    """The folder of that name, or what the Hugging Face hub holds under it."""
    path = Path(path_or_hf_name)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: not a folder; a model folder holds {CONFIG} and {WEIGHTS}")
    name = os.fspath(path_or_hf_name)
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{path}: no such folder, nor a name on the Hugging Face hub")
    # Imported here: slow, and not needed for local folders.
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:  # its HTTP errors and bad names are kinds of these
        raise UserError(f"{name}: no such folder here, and the Hugging Face hub did not give it: {error}") from error
    return Path(found)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError if there is none."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = json.loads(text)
        if "\\ud" in text.lower():  # Python reads half of a surrogate pair, which no tokenizer and no file takes
            json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8, which is expected: {error}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{file}: a string holds half of a surrogate pair, {error.object[error.start]!a}") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise UserError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


class Reader:
    """The tensors of a folder, in one file or in the shards that an index lists; names have no prefix."""

    def __init__(self, folder: Path, stack: ExitStack, prefix: str, single: str = WEIGHTS) -> None:
        files = [folder / single] if (folder / single).is_file() else _shards(folder)
        self.source = files[0] if len(files) == 1 else folder / INDEX
        self.where: dict[str, tuple[Any, str]] = {}  # name without prefix -> (open file, name in it)
        self.unread: set[str] = set()
        self.metadata: dict[str, str] = {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: cannot be read as safetensors: {error}") from error
            self.metadata |= handle.metadata() or {}
            for stored in handle.keys():  # noqa: SIM118 (not a mapping)
                name = stored.removeprefix(prefix)
                if name in self.where:
                    raise UserError(f"{file}: {stored} is given twice, also as {self.where[name][1]}")
                self.where[name] = (handle, stored)
        self.unread = {name for name in self.where if not names.is_buffer(name)}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is there."""
        if name not in self.where:
            raise UserError(f"{self.source}: missing tensors: {name}")
        handle, stored = self.where[name]
        return tuple(handle.get_slice(stored).get_shape())

    def read(self, name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """A tensor of that shape as floating point numbers, None keeping the file's dtype."""
        found = self.shape(name)
        stored = self.where[name][1]
        if found != shape:
            raise UserError(f"{self.source}: {stored} has shape {list(found)}, expected {list(shape)}")
        self.unread.discard(name)
        return jnp.asarray(self.values(name), dtype)

    def values(self, name: str) -> np.ndarray:
        """The numbers of a tensor that is there."""
        handle, stored = self.where[name]
        kind = handle.get_slice(stored).get_dtype()
        if kind not in _DTYPES:
            raise UserError(
                f"{self.source}: {stored} holds {kind}, expected floating point numbers ({', '.join(_DTYPES)})"
            )
        return handle.get_tensor(stored)

    def check_all_read(self) -> None:
        """Raises UserError if the files hold a tensor that nobody asked for."""
        if self.unread:
            raise UserError(f"{self.source}: unexpected tensors: {listed(self.unread)}")


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        others = sorted(file.name for file in folder.glob("*.bin"))
        hint = f"; {others[0]} is a pickle, which is never read: save it as safetensors first" if others else ""
        raise UserError(f"{folder / WEIGHTS}: no such file, nor {INDEX}{hint}")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(f"{index}: weight_map is missing or is not an object of file names")
    files = []
    held = os.listdir(folder)
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or "\\" in shard or shard == "..":
            raise UserError(f"{index}: {shard!r} is not the name of a file in this folder")
        if shard not in held or not (folder / shard).is_file():
            raise UserError(f"{folder / shard}: no such file; {INDEX} lists it")
        files.append(folder / shard)
    if not files:
        raise UserError(f"{index}: weight_map is empty")
    return files


def _check_sizes(config: ModelConfig, reader: Reader, where: str) -> None:
    """Refuses sizes that the weights cannot have, before anything of such a size is made."""
    numbers = sum(math.prod(reader.shape(name)) for name in reader.where)
    for name in ("num_layers", "vocab_size", "hidden_size", "num_heads", "kv_heads", "head_size", "intermediate_size"):
        size = getattr(config, name, None) or 0
        held, what = (len(reader.where), "tensors") if name == "num_layers" else (numbers, "numbers")
        if size > held:
            raise UserError(f"{where}: {name} is {size}, but {reader.source} holds {held} {what} only")


def _read_body(reader: Reader, model: Model, dtype: Any, is_classifier: bool) -> dict[str, Any]:
    config, where = model.config, reader.where
    tied = isinstance(config, GPT2Config) or config.tie_embeddings
    if tied and names.OUTPUT_TABLE in where:
        # One table under two names. Two different tables would be another model.
        table = names.family(config).token_table
        if table not in where:
            where[table] = where.pop(names.OUTPUT_TABLE)
        else:
            if not np.array_equal(reader.values(table), reader.values(names.OUTPUT_TABLE)):
                token_name, output_name = where[table][1], where[names.OUTPUT_TABLE][1]
                raise UserError(
                    f"{reader.source}: {output_name} differs from {token_name}, but config.json says that they are tied"
                )
        reader.unread.discard(names.OUTPUT_TABLE)
    expected = names.tensors(config)
    # A classifier does not use its output table, and transformers stores none.
    if not tied and not (is_classifier and names.OUTPUT_TABLE not in where):
        expected.append(names.Tensor(names.OUTPUT_TABLE, ("lm_head", "embedding"), None, False))
    missing = [tensor.name for tensor in expected if tensor.name not in where]
    if missing:
        raise UserError(f"{reader.source}: missing tensors: {listed(missing)}")
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    leaves: dict[tuple[str, ...], Any] = {}
    for tensor in expected:
        shape = shapes[tensor.path].shape
        inner = shape if tensor.layer is None else shape[1:]
        value = reader.read(tensor.name, inner[::-1] if tensor.transposed else inner, dtype)
        value = value.T if tensor.transposed else value
        if tensor.layer is None:
            leaves[tensor.path] = value
        else:
            leaves.setdefault(tensor.path, []).append(value)
            if len(leaves[tensor.path]) == shape[0]:
                leaves[tensor.path] = jnp.stack(leaves[tensor.path])
    return unflatten_dict(leaves)


def _body_tensors(model: Model, params: Params) -> dict[str, np.ndarray]:
    leaves = flatten_dict({name: leaf for name, leaf in params.items() if name not in ("value", "score")})
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    output_table = ("lm_head", "embedding")
    if "score" in params:  # a classifier has none, see load
        leaves.pop(output_table, None)
        shapes.pop(output_table, None)
    for path in sorted(leaves.keys() | shapes.keys()):
        found = leaves[path].shape if path in leaves else "nothing"
        expected = shapes[path].shape if path in shapes else "nothing"
        if found != expected:
            raise ValueError(
                f"cannot save params: {'/'.join(path)} is {found}, and the model's config expects {expected}"
            )
    prefix = names.family(model.config).prefix
    tensors = {}
    for tensor in names.tensors(model.config):
        leaf = leaves[tensor.path] if tensor.layer is None else leaves[tensor.path][tensor.layer]
        leaf = leaf.T if tensor.transposed else leaf
        tensors[prefix + tensor.name] = np.ascontiguousarray(leaf)
    if output_table in shapes:
        tensors[names.OUTPUT_TABLE] = np.ascontiguousarray(leaves[output_table])
    return tensors


def listed(items: Iterable[str], most: int = 8) -> str:
    """The first of the items in order, and how many more there are."""
    ordered = sorted(items)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
