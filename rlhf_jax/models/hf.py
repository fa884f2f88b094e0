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

from rlhf_jax.errors import (
    UserError,
    is_hub_name,
    is_there,
    no_folder,
    read_file,
    refuse_links_out,
)
from rlhf_jax.models import families, names
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import HEADS
from rlhf_jax.models.model import Model, build
from rlhf_jax.types import Params

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"  # of a folder of PEFT
# The file beside the parameters of a policy that Python gave to a run (training.common.own).
OWN_NOTE = "policy.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
VALUE_HEAD = "value_head.safetensors"
PIECE_NUMBERS = 2**24  # of a leaf that are read at once
FILE_BYTES = 5 * 10**9  # the largest file of weights that is written, except for a single tensor

_DTYPES = ("F16", "BF16", "F32", "F64")  # safetensors' names of the dtypes that can be read
# Causal masks and frequencies that older versions of transformers stored with the weights; without
# prefix.
_BUFFERS = re.compile(
    r"h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    r"|layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
)
_WEIGHT_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|value_head\.safetensors"
)
# Keys of a loaded config.json that describe that folder's weights, not the model.
_FORMER = ("reward_shift", "score_position", "torch_dtype")
END_OF_TURN = "end_of_turn"
"""The ``score_position`` of our reward models: the score stands at the token that ends the answer.
In any other folder it stands at the end of all that the chat template writes."""
STEP_ENDS = "step_ends"  # of a process reward model: a score at the end of each step of the answer
LAST_TOKEN = "last_token"  # of one that was trained on answers without an end
_OUTPUT_TABLE = ("lm_head", "embedding")  # its path in params
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_heads",
    "kv_heads",
    "head_size",
    "intermediate_size",
    "num_experts",
    "expert_size",
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
    family = families.family_of(config)
    reader = Reader(folder, family.prefix)
    _check_sizes(config, reader, folder / CONFIG)
    architectures = str(config.other_keys.get("architectures"))
    is_classifier = families.SCORE in reader or family.classifier in architectures
    params = _read_body(reader, model, dtype, is_classifier, shardings)
    if is_classifier:
        shift = config.other_keys.get("reward_shift", 0.0)
        params["score"] = read_score(reader, config.hidden_size, shift, dtype)
    reader.check_all_read()
    if is_there(folder / VALUE_HEAD):
        reader = Reader(folder, single=VALUE_HEAD)
        params["value"] = {
            "kernel": reader.read("kernel", (config.hidden_size,), dtype),
            "bias": reader.read("bias", (), dtype),
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
    score_position: str | None = END_OF_TURN,
) -> None:
    """Writes a folder that transformers loads with every tensor bit-equal; the same parameters give
    the same bytes.

    The host's memory holds the tensors of one file at a time.

    Args:
        path: the folder; made if missing, its model files replaced.
        model: whose config is written, with the keys it was loaded with.
        params: the body, and optionally "score" (the folder becomes a ...ForSequenceClassification
            of one label: ``score.weight = gain * w``, and config.json gets ``reward_shift = gain *
            bias + shift``, to be added to transformers' logit, and ``score_position``; such a
            folder has no output table of its own) and "value" (value_head.safetensors).
        file_bytes: weights that take more are written as several files with an index.
        both_tables: a tied output table is also written under its own name.
        score_position: `END_OF_TURN`, `STEP_ENDS` or `LAST_TOKEN`, where a reward model's score
            stands; None: it was not trained here and reads the whole text of its chat template.

    Raises:
        ValueError: if ``params`` holds anything else, or lacks something; or the score has a shift
            and is said to be somebody else's.
    """
    tensors = _body_tensors(model, params)
    if both_tables:
        family = families.family_of(model.config)
        tensors.setdefault(family.output_table, tensors[_token_table(family)])
    if "score" in params:
        kernel, _ = folded_score(params["score"])
        tensors[families.SCORE] = _Tensor(kernel, kernel.shape)
    keys = _config_keys(model, params, tensors)
    if "score" in params:
        keys["score_position"] = score_position
    if score_position is None:
        keys.pop("score_position", None)
        if keys.pop("reward_shift", 0.0) != 0.0:
            raise ValueError("a score that is shifted is that of a model trained here")

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
        present = {file.name for file in written.iterdir()}
        for name in present:
            os.replace(written / name, folder / name)
    for file in folder.iterdir():
        if _WEIGHT_FILES.fullmatch(file.name) and file.name not in present:
            file.unlink()


def _config_keys(model: Model, params: Params, tensors: Mapping[str, "_Tensor"]) -> dict[str, Any]:
    """The keys of config.json."""
    family = families.family_of(model.config)
    keys = names.to_json(model.config)
    for former in _FORMER:
        keys.pop(former, None)
    keys["architectures"] = [family.causal_lm]
    if "score" in params:
        labels = keys.get("id2label")
        if not (isinstance(labels, dict) and len(labels) == 1):
            keys |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        keys["architectures"] = [family.classifier]
        keys["num_labels"] = 1
        # transformers refuses the problem_type "single_label_classification" with one label.
        keys["problem_type"] = "regression"
        _, keys["reward_shift"] = folded_score(params["score"])
    # transformers gives all tensors the dtype named here: the widest one keeps every bit.
    dtypes = [tensor.leaf.dtype for tensor in tensors.values()]
    keys["dtype"] = str(jnp.result_type(*dtypes))
    return keys


def _write_weights(folder: Path, tensors: dict[str, "_Tensor"], file_bytes: int) -> None:
    """One file, or several with an index."""
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=_Tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=file_bytes,
    )
    for file, part in split.filename_to_tensors.items():
        arrays = {name: tensors[name].array() for name in part}
        write_tensors(folder / file, arrays, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


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
    kernel = reader.read(families.SCORE, (1, width), dtype)[0]
    scalars = {"bias": 0.0, "gain": 1.0, "shift": shift}
    return {"kernel": kernel} | jax.tree.map(lambda x: jnp.asarray(x, kernel.dtype), scalars)


def folded_score(head: Params) -> tuple[np.ndarray, float]:
    """A score head as transformers computes it: ``score.weight`` [1, D] = gain * w, and gain * bias
    + shift.
    """
    head = {name: np.asarray(leaf, np.float32) for name, leaf in head.items()}
    gain = head["gain"]
    return gain * head["kernel"][None], float(gain * head["bias"] + head["shift"])


def model_folder(path_or_hf_name: str) -> str:
    """``model/`` of a run's folder; any other folder or name is itself."""
    inner = Path(path_or_hf_name) / "model"
    return str(inner) if inner.is_dir() else path_or_hf_name


def find_folder(
    path_or_hf_name: str | os.PathLike[str],
    patterns: Iterable[str] = ("*.json", "*.safetensors"),
    nested: Iterable[str] = (),
) -> Path:
    """A local folder of that name, or the files of these patterns from the Hugging Face hub: of the
    folder itself, and ``nested`` ones of folders in it.

    Raises:
        UserError: there is none, or a link in the local folder leads out of it.
    """
    path = Path(path_or_hf_name)
    name = os.fspath(path_or_hf_name)
    if os.path.isdir(path):  # of pathlib's form, a name that is too long for a file raises
        if is_there(path / "manifest.json") and not is_there(path / CONFIG):
            raise UserError(
                f"{path}: a run that has no model yet: go on with it by --resume, or give another"
            )
        refuse_links_out(path)
        return path
    if os.path.exists(path):
        raise UserError(f"{path}: not a folder; a model folder holds {CONFIG} and {WEIGHTS}")
    if not is_hub_name(name):
        raise no_folder(name)
    # Imported here: slow, and not needed for local folders.
    from huggingface_hub import errors, snapshot_download

    try:
        if nested:
            snapshot_download(name, allow_patterns=[*nested], ignore_patterns=[])
        return Path(snapshot_download(name, allow_patterns=[*patterns], ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:  # its HTTP errors and bad names are kinds of these
        reason = str(error).partition("\n")[0]
        if isinstance(error, errors.LocalEntryNotFoundError):
            reason = (
                "it was not reached, and no copy of that name lies in its cache on this machine"
            )
        elif isinstance(error, errors.GatedRepoError):
            reason = "it gives this model to those who accepted its terms there; HF_TOKEN says who"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = "it has no public model of that name; HF_TOKEN opens private ones"
        raise UserError(
            f"{name}: no such folder here, and the Hugging Face hub did not give it: {reason}"
        ) from error


def refuse_adapter(folder: Path) -> None:
    """Raises UserError for a folder of PEFT, which holds no whole model."""
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder}: a PEFT adapter, no whole model; `rlhf-jax export {folder} FOLDER` writes "
            "the base model that it names with the adapter merged, a model for every command"
        )


def read_config(folder: Path) -> ModelConfig:
    """The configuration of the model in a folder."""
    file = folder / CONFIG
    if is_there(folder / OWN_NOTE):
        raise UserError(
            f"{folder}: these are the parameters of a policy that Python gave to a run, no Hugging "
            "Face model; read them by rlhf_jax.training.common.own.load"
        )
    refuse_adapter(folder)
    if not is_there(file):
        raise UserError(f"{file}: no such file; a model folder holds {CONFIG} and {WEIGHTS}")
    config = names.from_json(read_json(file), str(file))
    shift = config.other_keys.get("reward_shift", 0.0)
    if not names.is_number(shift):
        raise UserError(f"{file}: reward_shift is {shift!r}, expected a number")
    position = config.other_keys.get("score_position", END_OF_TURN)
    known = (END_OF_TURN, STEP_ENDS, LAST_TOKEN)
    if position not in known:
        raise UserError(f"{file}: score_position is {position!r}, expected one of {known} or none")
    return config


def scores_turns(config: ModelConfig) -> bool:
    """Whether a reward model's score, or that of the last step, stands at the end of a turn
    (`END_OF_TURN`). Folders that have a ``reward_shift`` alone are ours too.
    """
    return "score_position" in config.other_keys or "reward_shift" in config.other_keys


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError if there is none."""
    try:
        content = json.loads(read_file(file).decode("utf-8-sig"))
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
        whole = folder / single
        paths = [whole] if is_there(whole) else _shards(folder, single)
        self.source = paths[0] if len(paths) == 1 else folder / INDEX
        self.prefix = prefix
        # {name without prefix: (open file, name in it)}
        self.where: dict[str, tuple[Any, str]] = {}
        self.metadata: dict[str, str] = {}
        for file in paths:
            if not file.is_file():
                raise UserError(f"{file}: is no file")
            try:
                opened = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: cannot be read as safetensors: {error}") from error
            self.metadata |= opened.metadata() or {}
            for name in opened.keys():  # noqa: SIM118
                if name in self:
                    _, first = self.find(name)
                    raise UserError(f"{file}: {name} is given twice, also as {first}")
                self.where[name.removeprefix(prefix)] = (opened, name)
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
        tensor = opened.get_slice(stored)
        actual = tensor.get_shape()
        if actual != list(shape):
            raise UserError(f"{self.source}: {stored} has shape {actual}, expected {list(shape)}")
        kind = tensor.get_dtype()
        if kind not in _DTYPES:
            raise UserError(
                f"{self.source}: {stored} holds {kind}, expected floating point numbers "
                f"({', '.join(_DTYPES)})"
            )
        self.unread.discard(name.removeprefix(self.prefix))
        return tensor

    def read(self, name: str, shape: tuple[int, ...], dtype: Any = None) -> Array:
        """A tensor of that shape, whole, by default in float32."""
        return jnp.asarray(self.slices(name, shape)[...], dtype or jnp.float32)

    def check_all_read(self) -> None:
        """Raises UserError if the files hold a tensor that has not been read."""
        if self.unread:
            raise UserError(f"{self.source}: unexpected tensors: {listed(self.unread)}")


def _shards(folder: Path, single: str) -> list[Path]:
    index = folder / INDEX
    if not is_there(index):
        pickles = [
            f"; {file.name} is a pickle, which is never read" for file in folder.glob("*.bin")
        ]
        hint = min(pickles, default="")
        raise UserError(f"{folder / single}: no such file, nor {INDEX}{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is missing or is not an object of file names")
    present = [file.name for file in folder.iterdir() if is_there(file)]
    for shard in weight_map.values():
        if shard not in present:
            raise UserError(f"{index}: {shard!r} is not the name of a file in this folder")
    return [folder / shard for shard in sorted(set(weight_map.values()))]


def _check_sizes(config: ModelConfig, reader: Reader, where: Path) -> None:
    """Refuses sizes that the weights cannot have, before anything of such a size is allocated."""
    number = len(reader.where)
    most = {"num_layers": number}
    most |= dict.fromkeys(_SIZES, sum(math.prod(reader.shape(name)) for name in reader.where))
    if families.family_of(config).experts_apart:
        most["num_experts"] = number // max(sum(getattr(config, "sparse_layers", ())), 1)
    for name, limit in most.items():
        size = getattr(config, name, None) or 0
        if size > limit:
            raise UserError(
                f"{where}: {name} is {size}, but {reader.source} has tensors for {limit} at most"
            )


def _read_body(
    reader: Reader,
    model: Model,
    dtype: Any,
    is_classifier: bool,
    shardings: Callable[[Any], Any] | None,
) -> Params:
    family = families.family_of(model.config)
    shapes = _shapes(model)
    if family.output_table not in reader:
        if is_classifier:  # it does not use its output table, and transformers stores none
            shapes.pop(_OUTPUT_TABLE, None)
    elif _OUTPUT_TABLE not in shapes:
        read_tied_tables(reader, family, shapes["wte", "embedding"])
    tensors = {path: family.tensors(path, shape) for path, shape in shapes.items()}
    missing = {name for of_leaf in tensors.values() for name in of_leaf if name not in reader}
    if missing:
        raise UserError(f"{reader.source}: missing tensors: {listed(missing)}")
    # The shapes of all tensors are checked before the first one is read.
    stored = {}
    for path, shape in shapes.items():
        stored_shape = family.stored(path, shape)
        stored[path] = [reader.slices(name, stored_shape) for name in tensors[path]]
    structs = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    places = {} if shardings is None else flatten_dict(shardings(unflatten_dict(structs)))
    leaves: dict[families.LeafPath, Array] = {}
    for path, shape in shapes.items():
        separate = family.separate(path, shape)
        is_transposed = family.is_transposed(path)
        part = functools.partial(_part, stored[path], path, separate, is_transposed, dtype)
        # Other axes of a matrix lie apart in the file, or are views of whole rows.
        is_matrix = is_transposed or families.FUSED in path
        axes = len(separate) if is_matrix else len(shape)
        leaves[path] = _on_devices(part, shape, axes, places.get(path))
    return unflatten_dict(leaves)


def _on_devices(
    part: Callable[[tuple[slice, ...]], np.ndarray],
    shape: families.Shape,
    axes: int,
    sharding: jax.sharding.Sharding | None,
) -> Array:
    """A leaf on its devices, read piece by piece, so that the host never holds a leaf of many
    layers or experts whole.

    Args:
        part: the part of the leaf at an index.
        axes: that many leading axes may be cut.
        sharding: None: the leaf is on the default device.
    """
    if sharding is None:
        whole = [(0, size) for size in shape]
        return _on_device(part, whole, axes, None)
    shards: dict[tuple[tuple[int, int], ...], Array] = {}
    arrays = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = [entry.indices(size)[:2] for entry, size in zip(index or (), shape, strict=True)]
        key = tuple(bounds)
        if key in shards:  # what another device has been given is not read again
            arrays.append(jax.device_put(shards[key], device))
            continue
        shards[key] = _on_device(part, bounds, axes, device)
        arrays.append(shards[key])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _on_device(
    part: Callable[[tuple[slice, ...]], np.ndarray],
    bounds: list[tuple[int, int]],
    axes: int,
    device: jax.Device | None,
) -> Array:
    """The part of a leaf between the ``bounds`` of its axes, in an array of one device."""
    sizes = tuple(stop - start for start, stop in bounds)
    array: Array | None = None
    for places in _pieces(sizes, axes):
        starts = [0] * len(sizes)
        index = [slice(*pair) for pair in bounds]
        for axis, (start, stop) in enumerate(places):
            starts[axis] = start
            first = bounds[axis][0]
            index[axis] = slice(first + start, first + stop)
        piece = jax.device_put(part(tuple(index)), device)
        if piece.shape == sizes:
            return piece
        if array is None:
            array = jnp.zeros(sizes, piece.dtype, device=device)
        array = _written(array, piece, starts)
        array.block_until_ready()  # or else pieces that are not yet written would pile up
    return jnp.zeros(sizes, device=device) if array is None else array


@functools.partial(jax.jit, donate_argnums=0)
def _written(array: Array, piece: Array, starts: list[Array]) -> Array:
    # As integers: a CPU would make float32 of the whole array to write a piece of bfloat16.
    number = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(array, number)
    own = jax.lax.bitcast_convert_type(piece, number)
    changed = jax.lax.dynamic_update_slice(bits, own, starts)
    return jax.lax.bitcast_convert_type(changed, array.dtype)


def _pieces(sizes: families.Shape, axes: int) -> list[tuple[tuple[int, int], ...]]:
    """Bounds of the first axes, which cut an array of these sizes into pieces of at most
    ``PIECE_NUMBERS``, or of one entry of the last of the ``axes`` that may be cut.
    """
    if math.prod(sizes) <= PIECE_NUMBERS or axes == 0:
        return [()]
    entry = math.prod(sizes[1:])
    if entry > PIECE_NUMBERS and axes > 1:
        inner = _pieces(sizes[1:], axes - 1)
        return [((i, i + 1), *rest) for i in range(sizes[0]) for rest in inner]
    step = max(1, PIECE_NUMBERS // entry)
    return [((i, min(i + step, sizes[0])),) for i in range(0, sizes[0], step)]


def read_leaf(
    reader: Reader,
    family: families.Family,
    path: families.LeafPath,
    shape: families.Shape,
) -> Array:
    """A leaf of the body, whole, in float32."""
    stored = family.stored(path, shape)
    tensors = [reader.slices(name, stored) for name in family.tensors(path, shape)]
    separate = family.separate(path, shape)
    whole = (slice(None),) * len(shape)
    is_transposed = family.is_transposed(path)
    return jnp.asarray(_part(tensors, path, separate, is_transposed, jnp.float32, whole))


def _part(
    tensors: list[Any],
    path: families.LeafPath,
    separate: families.Shape,
    is_transposed: bool,
    dtype: Any,
    index: tuple[slice, ...],
) -> np.ndarray:
    """A part of a leaf. The entries of its ``separate`` axes are in several tensors, and a kernel
    may be stored transposed.
    """
    is_fused = families.FUSED in path  # [..., 3, D] is a view of whole rows [..., 3 D]
    inner = index[len(separate) :]
    if is_fused:
        inner = (*inner[:-2], slice(None))
    elif is_transposed:
        inner = inner[::-1]
    numbers = np.arange(len(tensors)).reshape(separate)[index[: len(separate)]]
    parts = [tensors[number][inner] for number in numbers.ravel()]
    part = parts[0]
    if separate:
        part = np.stack(parts).reshape(*numbers.shape, *part.shape)
    if is_fused:
        part = part.reshape(*part.shape[:-1], 3, -1)[..., index[-1]]
    elif is_transposed:
        part = np.swapaxes(part, -1, -2)
    return np.asarray(part, jax.dtypes.canonicalize_dtype(dtype or part.dtype))


def _token_table(family: families.Family) -> str:
    [name] = family.tensors(("wte", "embedding"), ())
    return name


def read_tied_tables(reader: Reader, family: families.Family, shape: families.Shape) -> None:
    """Reads a table stored under two names once. Two different tables would be another model."""
    token_table = _token_table(family)
    _, stored = output_table = reader.find(family.output_table)
    outputs = reader.slices(family.output_table, shape)
    if token_table not in reader:
        reader.where[token_table.removeprefix(reader.prefix)] = output_table
    elif (reader.slices(token_table, shape)[:] != outputs[:]).any():
        raise UserError(
            f"{reader.source}: {stored} differs from {token_table}, but config.json says that they "
            "are tied"
        )


def _shapes(model: Model) -> dict[families.LeafPath, families.Shape]:
    """Shapes of the body's leaves by path."""
    leaves = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in leaves.items()}


class _Tensor(NamedTuple):
    """A tensor that is to be written: a leaf of params, or one of its layers or experts."""

    leaf: Any
    shape: tuple[int, ...]  # in the file
    entry: tuple[int, ...] = ()
    is_transposed: bool = False

    def num_bytes(self) -> int:
        """The size in the file."""
        return math.prod(self.shape) * self.leaf.dtype.itemsize

    def array(self) -> np.ndarray:
        """The tensor on the host."""
        part = np.asarray(self.leaf[self.entry] if self.entry else self.leaf)
        if self.is_transposed:
            part = part.T
        return np.ascontiguousarray(part).reshape(self.shape)


def _body_tensors(model: Model, params: Params) -> dict[str, _Tensor]:
    family = families.family_of(model.config)
    expected = _shapes(model)
    leaves = flatten_dict({name: leaf for name, leaf in params.items() if name not in HEADS})
    if "score" in params:  # a classifier has no output table, see load
        leaves.pop(_OUTPUT_TABLE, None)
        expected.pop(_OUTPUT_TABLE, None)
    actual = {path: leaf.shape for path, leaf in leaves.items()}
    differing = sorted(actual.items() ^ expected.items())
    if differing:
        path, _ = differing[0]
        raise ValueError(
            f"cannot save params: {'/'.join(path)} is {actual.get(path, 'nothing')}, and the "
            f"model's config expects {expected.get(path, 'nothing')}"
        )
    tensors = {}
    for path, leaf in leaves.items():
        stored = family.stored(path, leaf.shape)
        is_transposed = family.is_transposed(path)
        entries = np.ndindex(*family.separate(path, leaf.shape))
        for index, name in zip(entries, family.tensors(path, leaf.shape), strict=True):
            tensors[name] = _Tensor(leaf, stored, index, is_transposed)
    return tensors


def listed(items: Iterable[str]) -> str:
    """The first eight of the items in order, and how many more there are."""
    ordered = sorted(items)
    more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
    return ", ".join(ordered[:8]) + more
