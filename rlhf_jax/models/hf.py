"""Hugging Face folders: config.json and safetensors weights, read and written tensor by tensor.

A folder has the files that transformers' ``save_pretrained`` writes for GPT2LMHeadModel or
LlamaForCausalLM, or for GPT2ForSequenceClassification or LlamaForSequenceClassification where there
is a score head. Transformers has no value heads: a value head is stored beside the weights in
value_head.safetensors. No file is ever unpickled.
"""

import dataclasses
import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlhf_jax.errors import UserError
from rlhf_jax.models import names
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import HEADS
from rlhf_jax.models.model import Model, build
from rlhf_jax.types import Params

CONFIG = "config.json"
# Beside the parameters of a policy that Python gave to a run (training.own), which have no CONFIG.
OWN_NOTE = "policy.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
VALUE_HEAD = "value_head.safetensors"
FILE_BYTES = 5 * 10**9  # the largest file of weights that is written, except for a single tensor
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

_DTYPES = ("F16", "BF16", "F32", "F64")  # safetensors' names of the dtypes that can be read
# Causal masks and frequencies that older versions of transformers stored with the weights; without
# prefix.
_BUFFERS = re.compile(
    r"h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)
_WEIGHT_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|value_head\.safetensors"
)
# Keys that describe the folder from which a model was loaded.
_FORMER = ("reward_shift", "torch_dtype")
_OUTPUT_TABLE = ("lm_head", "embedding")  # its path in params
_SIZES = (
    "num_layers",
    "vocab_size",
    "hidden_size",
    "num_heads",
    "kv_heads",
    "head_size",
    "intermediate_size",
)


def load(
    path_or_hf_name: str | os.PathLike[str],
    dtype: Any = None,
    *,
    shardings: Callable[[Any], Any] | None = None,
    **compute: Any,
) -> tuple[Model, Params]:
    """Loads a model from a folder, or from the Hugging Face hub (only its ``*.json`` and
    ``*.safetensors`` files).

    Args:
        path_or_hf_name: a folder, or a name such as "openai-community/gpt2".
        dtype: of the parameters; None keeps the file's.
        shardings: the sharding of each of the body's parameters, given a tree of their shapes, such
            as ``lambda shapes: sharding.by_path(shapes, models.SHARDING, mesh)``: each device then
            reads only its shards. None: all parameters are on one device.
        compute: compute_dtype, remat, scan_layers and attention, as in GPT2Config and LlamaConfig.

    Returns:
        The model and its parameters. A sequence classification folder with one label gives
        ``params["score"]`` (gain 1, bias 0, shift = ``reward_shift`` of config.json or 0), a
        value_head.safetensors gives ``params["value"]``; heads are float32 unless ``dtype`` says
        otherwise.

    Raises:
        UserError: names the file, key or tensor that is missing, unexpected or of the wrong shape.
    """
    folder = find_folder(path_or_hf_name)
    config = read_config(folder)
    model = build(dataclasses.replace(config, **compute))
    family = names.family_of(config)
    reader = Reader(folder, family.prefix)
    _check_sizes(config, reader, folder / CONFIG)
    architectures = str(config.other_keys.get("architectures"))
    is_classifier = names.SCORE in reader or family.classifier in architectures
    params = _read_body(reader, model, dtype, is_classifier, shardings)
    if is_classifier:
        shift = config.other_keys.get("reward_shift", 0.0)
        params["score"] = read_score(reader, config.hidden_size, shift, dtype)
    reader.check_all_read()
    if (folder / VALUE_HEAD).is_file():
        reader = Reader(folder, single=VALUE_HEAD)
        kept = dtype or jnp.float32
        params["value"] = {
            "kernel": reader.read("kernel", (config.hidden_size,), kept),
            "bias": reader.read("bias", (), kept),
        }
        reader.check_all_read()
    return model, params


def save(
    path: str | os.PathLike[str],
    model: Model,
    params: Params,
    *,
    file_bytes: int = FILE_BYTES,
    both_tables: bool = False,
) -> None:
    """Writes a folder that transformers loads with every tensor bit-equal; the same parameters give
    the same bytes.

    The host holds the tensors of one file at a time, wherever the parameters lie.

    Args:
        path: the folder; made if missing, its model files replaced.
        model: whose config is written, with the keys it was loaded with.
        params: the body, and optionally "score" (the folder becomes a ...ForSequenceClassification
            of one label: ``score.weight = gain * w``, and config.json gets ``reward_shift = gain *
            bias + shift``, to be added to transformers' logit; such a folder has no output table of
            its own) and "value" (value_head.safetensors).
        file_bytes: weights that take more are written as several files with an index.
        both_tables: a tied output table is also written under its own name.

    Raises:
        ValueError: if ``params`` holds anything else, or lacks something.
    """
    family = names.family_of(model.config)
    tensors = _body_tensors(model, params)
    if both_tables:
        (token_table,) = family.tensors(("wte", "embedding"), params["wte"]["embedding"].shape)
        tensors.setdefault(names.OUTPUT_TABLE, tensors[token_table])
    if "score" in params:
        kernel, _ = folded_score(params["score"])
        tensors[names.SCORE] = _Tensor(kernel, kernel.shape)
    keys = _config_keys(model, params, tensors)

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # All is written before anything is replaced, so that an interrupted save leaves the former
    # model.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        written = Path(temporary)
        _write_weights(written, tensors, file_bytes)
        if "value" in params:
            value_head = {name: np.asarray(params["value"][name]) for name in ("kernel", "bias")}
            write_tensors(written / VALUE_HEAD, value_head, {"format": "pt"})
        text = json.dumps(keys, indent=2, sort_keys=True)
        (written / CONFIG).write_text(f"{text}\n", encoding="utf-8")
        _replace_model(folder, written)


def _config_keys(model: Model, params: Params, tensors: Mapping[str, "_Tensor"]) -> dict[str, Any]:
    """The keys of config.json."""
    family = names.family_of(model.config)
    keys = names.to_json(model.config)
    for former in _FORMER:
        keys.pop(former, None)
    keys["architectures"] = [family.causal_lm]
    if "score" in params:
        labels = keys.get("id2label")
        if not (isinstance(labels, dict) and len(labels) == 1):
            keys |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        # transformers refuses the problem_type "single_label_classification" with one label.
        keys |= {
            "architectures": [family.classifier],
            "num_labels": 1,
            "problem_type": "regression",
        }
        _, keys["reward_shift"] = folded_score(params["score"])
    # transformers gives all tensors the dtype named here: the widest one keeps every bit.
    dtypes = [tensor.leaf.dtype for tensor in tensors.values()]
    keys["dtype"] = str(jnp.result_type(*dtypes))
    return keys


def _write_weights(folder: Path, tensors: dict[str, "_Tensor"], file_bytes: int) -> None:
    """One file, or several with an index."""
    files = _files(tensors, file_bytes)
    for name, part in files.items():
        arrays = {tensor: tensors[tensor].array() for tensor in part}
        write_tensors(folder / name, arrays, {"format": "pt"})
    if (folder / WEIGHTS).is_file():
        return
    file_of = {tensor: name for name, part in files.items() for tensor in part}
    size = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    index = {"metadata": size, "weight_map": file_of}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _replace_model(folder: Path, written: Path) -> None:
    """Moves the files that were ``written`` into the folder, and deletes its other weights."""
    present = {file.name for file in written.iterdir()}
    for name in present:
        os.replace(written / name, folder / name)
    for file in folder.iterdir():
        if _WEIGHT_FILES.fullmatch(file.name) and file.name not in present:
            file.unlink()


def write_tensors(
    file: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a safetensors file with the mode that the umask gives; safetensors itself gives it
    mode 0600.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    file.touch()
    mode = file.stat().st_mode
    try:
        save_file(dict(tensors), file, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), file.name) from error
    file.chmod(mode)


def read_score(
    reader: "Reader",
    width: int,
    shift: float,
    dtype: Any = None,
) -> Params:
    """The score head of a classifier of one label: gain 1, bias 0 and the given shift."""
    kernel = reader.read(names.SCORE, (1, width), dtype or jnp.float32)[0]
    scalars = {"bias": 0.0, "gain": 1.0, "shift": shift}
    head = {name: jnp.asarray(value, kernel.dtype) for name, value in scalars.items()}
    return {"kernel": kernel, **head}


def folded_score(head: Params) -> tuple[np.ndarray, float]:
    """A score head as transformers computes it: ``score.weight`` [1, D] = gain * w, and gain * bias
    + shift.
    """
    kernel, bias, gain, shift = (
        np.asarray(head[name], np.float32) for name in ("kernel", "bias", "gain", "shift")
    )
    return (gain * kernel)[None, :], float(gain * bias + shift)


def model_folder(path_or_hf_name: str) -> str:
    """``model/`` of a run's folder; any other folder or name is itself."""
    inner = Path(path_or_hf_name) / "model"
    return str(inner) if inner.is_dir() else path_or_hf_name


def find_folder(
    path_or_hf_name: str | os.PathLike[str], patterns: Iterable[str] = ("*.json", "*.safetensors")
) -> Path:
    """A local folder of that name, or the files of these patterns from the Hugging Face hub."""
    path = Path(path_or_hf_name)
    name = os.fspath(path_or_hf_name)
    if os.path.isdir(path):  # of pathlib's form, a name that is too long for a file raises
        return path
    if os.path.exists(path):
        raise UserError(f"{path}: not a folder; a model folder holds {CONFIG} and {WEIGHTS}")
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{path}: no such folder, nor a name on the Hugging Face hub")
    # Imported here: slow, and not needed for local folders.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*patterns], ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:  # its HTTP errors and bad names are kinds of these
        raise UserError(
            f"{name}: no such folder here, and the Hugging Face hub did not give it: {error}"
        ) from error


def read_config(folder: Path) -> ModelConfig:
    """The configuration of the model in a folder."""
    file = folder / CONFIG
    if (folder / OWN_NOTE).is_file():
        raise UserError(
            f"{folder}: these are the parameters of a policy that Python gave to a run, no Hugging "
            "Face model; read them by rlhf_jax.training.own.load"
        )
    if not file.is_file():
        raise UserError(f"{file}: no such file; a model folder holds {CONFIG} and {WEIGHTS}")
    config = names.from_json(read_json(file), str(file))
    shift = config.other_keys.get("reward_shift", 0.0)
    if not names.is_number(shift):
        raise UserError(f"{file}: reward_shift is {shift!r}, expected a number")
    return config


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        # Fails for half of a surrogate pair, which no file can hold.
        json.dumps(content, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not valid JSON: {error.msg}") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{file}: a string holds half of a surrogate pair, {half!a}") from error
    # ValueError: not UTF-8, or a number of thousands of digits. RecursionError: so many brackets.
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


class Reader:
    """The tensors of a folder, in one file or in the shards that an index lists.

    The files may name a tensor with or without ``prefix``: a bare body's names have none.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str = "",
        single: str = WEIGHTS,
    ) -> None:
        files = [folder / single] if (folder / single).is_file() else _shards(folder, single)
        self.source = files[0] if len(files) == 1 else folder / INDEX
        self.prefix = prefix
        # {name without prefix: (open file, name in it)}
        self.where: dict[str, tuple[Any, str]] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: cannot be read as safetensors: {error}") from error
            self.metadata |= opened.metadata() or {}
            for stored in opened.keys():  # noqa: SIM118
                if stored in self:
                    raise UserError(
                        f"{file}: {stored} is given twice, also as {self.find(stored)[1]}"
                    )
                self.where[stored.removeprefix(prefix)] = (opened, stored)
        self.unread = {name for name in self.where if not _BUFFERS.fullmatch(name)}

    def __contains__(self, name: str) -> bool:
        return name.removeprefix(self.prefix) in self.where

    def find(self, name: str) -> tuple[Any, str]:
        """The open file that holds a tensor, and the tensor's name in it."""
        if name not in self:
            raise UserError(f"{self.source}: missing tensors: {name}")
        return self.where[name.removeprefix(self.prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        opened, stored = self.find(name)
        return tuple(opened.get_slice(stored).get_shape())

    def slices(self, name: str, shape: tuple[int, ...]) -> Any:
        """A tensor of that shape. Indexing reads only the indexed part, as a NumPy array."""
        opened, stored = self.find(name)
        actual = self.shape(name)
        if actual != shape:
            raise UserError(
                f"{self.source}: {stored} has shape {list(actual)}, expected {list(shape)}"
            )
        tensor = opened.get_slice(stored)
        kind = tensor.get_dtype()
        if kind not in _DTYPES:
            expected = f"expected floating point numbers ({', '.join(_DTYPES)})"
            raise UserError(f"{self.source}: {stored} holds {kind}, {expected}")
        self.unread.discard(name.removeprefix(self.prefix))
        return tensor

    def read(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """A tensor of that shape, whole; ``dtype`` None keeps the file's."""
        self.slices(name, shape)
        opened, stored = self.find(name)
        return jnp.asarray(opened.get_tensor(stored), dtype)

    def check_all_read(self) -> None:
        """Raises UserError if the files hold a tensor that has not been read."""
        if self.unread:
            raise UserError(f"{self.source}: unexpected tensors: {listed(self.unread)}")


def _shards(folder: Path, single: str) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        hint = ""
        for pickle in sorted(file.name for file in folder.glob("*.bin"))[:1]:
            hint = f"; {pickle} is a pickle, which is never read: save it as safetensors first"
        raise UserError(f"{folder / single}: no such file, nor {INDEX}{hint}")
    weight_map: Any = read_json(index).get("weight_map")
    is_map = isinstance(weight_map, dict) and weight_map
    if not is_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index}: weight_map is missing or is not an object of file names")
    files = {file.name for file in folder.iterdir() if file.is_file()}
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or shard == "..":
            raise UserError(f"{index}: {shard!r} is not the name of a file in this folder")
        if shard not in files:
            raise UserError(f"{folder / shard}: no such file; {INDEX} lists it")
    return [folder / shard for shard in shards]


def _check_sizes(config: ModelConfig, reader: Reader, where: Path) -> None:
    """Refuses sizes that the weights cannot have, before anything of such a size is allocated."""
    numbers = sum(math.prod(reader.shape(name)) for name in reader.where)
    for name in _SIZES:
        size = getattr(config, name) or 0
        held = numbers
        what = "numbers"
        if name == "num_layers":
            held = len(reader.where)
            what = "tensors"
        if size > held:
            raise UserError(
                f"{where}: {name} is {size}, but {reader.source} holds {held} {what} only"
            )


def _read_body(
    reader: Reader,
    model: Model,
    dtype: Any,
    is_classifier: bool,
    shardings: Callable[[Any], Any] | None,
) -> Params:
    family = names.family_of(model.config)
    shapes = _shapes(model)
    if _OUTPUT_TABLE not in shapes and names.OUTPUT_TABLE in reader:
        [token_table] = family.tensors(("wte", "embedding"), ())
        _read_tied_tables(reader, token_table, shapes["wte", "embedding"])
    # A classifier does not use its output table, and transformers stores none.
    if is_classifier and names.OUTPUT_TABLE not in reader:
        shapes.pop(_OUTPUT_TABLE, None)
    tensors = {path: family.tensors(path, shape) for path, shape in shapes.items()}
    missing = [name for of_leaf in tensors.values() for name in of_leaf if name not in reader]
    if missing:
        raise UserError(f"{reader.source}: missing tensors: {listed(missing)}")
    structs = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    places = {} if shardings is None else flatten_dict(shardings(unflatten_dict(structs)))
    leaves: dict[tuple[str, ...], Array] = {}
    for path, shape in shapes.items():
        stored_shape = family.stored(path, shape)
        stored = [reader.slices(name, stored_shape) for name in tensors[path]]
        is_transposed = family.transposed and path[-1] == "kernel"
        part = functools.partial(_part, stored, path, is_transposed, dtype)
        if shardings is None:
            leaves[path] = jnp.asarray(part((slice(None),) * len(shape)))
        else:
            leaves[path] = jax.make_array_from_callback(shape, places[path], part)
    return unflatten_dict(leaves)


def _part(
    stored: list[Any],
    path: Any,
    is_transposed: bool,
    dtype: Any,
    index: tuple[slice, ...],
) -> np.ndarray:
    """A part of a leaf. The layers of a stacked leaf are in several tensors, and a kernel may be
    stored transposed.
    """
    is_stacked = path[0] == "h"
    is_fused = names.FUSED in path  # [..., 3, D] is a view of whole rows [..., 3 D]
    tensors = stored
    inner = index
    if is_stacked:
        tensors = stored[index[0]]
        inner = index[1:]
    if is_fused:
        inner = (*inner[:-2], slice(None))
    elif is_transposed:
        inner = inner[::-1]
    parts = [tensor[inner] for tensor in tensors]
    part = np.stack(parts) if is_stacked else parts[0]
    if is_fused:
        apart = part.reshape(*part.shape[:-1], 3, -1)
        part = apart[..., index[-1]]
    kept = jax.dtypes.canonicalize_dtype(dtype or part.dtype)
    if is_transposed:
        part = np.swapaxes(part, -1, -2)
    return np.asarray(part, kept)


def _read_tied_tables(reader: Reader, token_table: str, shape: tuple[int, ...]) -> None:
    """Reads a table stored under two names once. Two different tables would be another model."""
    output_table = reader.where[names.OUTPUT_TABLE]
    if token_table not in reader:
        reader.where[token_table.removeprefix(reader.prefix)] = output_table
    else:
        tokens = reader.slices(token_table, shape)[:]
        outputs = reader.slices(names.OUTPUT_TABLE, shape)[:]
        if (tokens != outputs).any():
            both = f"{output_table[1]} differs from {reader.find(token_table)[1]}"
            raise UserError(f"{reader.source}: {both}, but config.json says that they are tied")
    reader.unread.discard(names.OUTPUT_TABLE)


def _shapes(model: Model) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shapes of the body's leaves by path."""
    leaves = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in leaves.items()}


class _Tensor(NamedTuple):
    """A tensor that is to be written: a leaf of params, or one of its layers."""

    leaf: Any
    shape: tuple[int, ...]  # in the file
    layer: int | None = None
    is_transposed: bool = False

    @property
    def nbytes(self) -> int:
        num_layers = 1 if self.layer is None else len(self.leaf)
        return self.leaf.nbytes // num_layers

    def array(self) -> np.ndarray:
        """The tensor on the host."""
        part = np.asarray(self.leaf if self.layer is None else self.leaf[self.layer])
        if self.is_transposed:
            part = part.T
        return np.ascontiguousarray(part).reshape(self.shape)


def _files(tensors: dict[str, _Tensor], file_bytes: int) -> dict[str, list[str]]:
    """{file: names of its tensors}. A file has at most ``file_bytes``, or a single tensor."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if parts[-1] and size > file_bytes:
            parts.append([])
            size = tensor.nbytes
        parts[-1].append(name)
    count = len(parts)
    if count == 1:
        return {WEIGHTS: parts[0]}
    return {f"model-{i:05}-of-{count:05}.safetensors": part for i, part in enumerate(parts, 1)}


def _body_tensors(model: Model, params: Params) -> dict[str, _Tensor]:
    family = names.family_of(model.config)
    expected = _shapes(model)
    leaves = flatten_dict({name: leaf for name, leaf in params.items() if name not in HEADS})
    if "score" in params:  # a classifier has no output table, see load
        leaves.pop(_OUTPUT_TABLE, None)
        expected.pop(_OUTPUT_TABLE, None)
    actual = {path: leaf.shape for path, leaf in leaves.items()}
    for path in sorted(actual.keys() | expected.keys()):
        shape = actual.get(path, "nothing")
        wanted = expected.get(path, "nothing")
        if shape != wanted:
            shapes = f"{shape}, and the model's config expects {wanted}"
            raise ValueError(f"cannot save params: {'/'.join(path)} is {shapes}")
    tensors = {}
    for path, leaf in leaves.items():
        is_transposed = family.transposed and path[-1] == "kernel"
        stored = family.stored(path, leaf.shape)
        for number, name in enumerate(family.tensors(path, leaf.shape)):
            layer = number if path[0] == "h" else None
            tensors[name] = _Tensor(leaf, stored, layer, is_transposed)
    return tensors


def listed(items: Iterable[str], most: int = 8) -> str:
    """The first of the items in order, and how many more there are."""
    ordered = sorted(items)
    text = ", ".join(ordered[:most])
    if len(ordered) > most:
        text += f" and {len(ordered) - most} more"
    return text
