"""Checkpoints of a run: Orbax writes the arrays, and checksums prove that they are what was saved.

    with Checkpoints(directory, keep_last=2) as checkpoints:
        checkpoints.save(step, state, {"epoch": 3})
        # The newest undamaged checkpoint, with the shardings of the given state:
        state, meta = checkpoints.restore(state)

A state is any pytree of arrays, typed PRNG keys included. Each array is stored under its path
("params/wte/embedding"). Orbax notices neither flipped bits nor a target of another dtype, so both
are checked here. A step's folder gets its number by one rename after everything is written, and is
renamed before it is deleted, so that a kill leaves the other steps undamaged.

Each of several processes writes, hashes and reads the shards on its own devices: no host holds a
whole sharded array. The first process merges Orbax's metadata of them, writes the record and
renames the folder, which must be on a shared disk. If an array was saved with another sharding,
each process reads all of it.

Of Orbax only the handler of trees is used. Its checkpointers wait ten minutes at a barrier for a
process that could not write; here the processes tell each other. Its CheckpointManager decides what
to delete before the new step is complete, forgets those steps when the save then fails, reads the
metric of "best" without a checksum (a truncated file stops it from opening), and treats NaN as a
number. Its experimental v1 is built on both, has another layout on the disk, and reads no array
whose sharding it is not told.
"""

import asyncio
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict, TypeVar

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rlhf_jax.errors import TrainingFault, UserError, read_file
from rlhf_jax.parallel import sharding
from rlhf_jax.runs import processes
from rlhf_jax.runs.folder import check_ordinary, steps
from rlhf_jax.runs.reading import Number, Row, parse_json
from rlhf_jax.runs.writing import write_together

T = TypeVar("T")
Digests = dict[str, str]  # {place of a part in its array: sha256}
Shards = dict[str, np.ndarray]  # {place: the part}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Array(TypedDict):
    dtype: str
    shape: list[int]


class _Leaf(_Array, total=False):
    sha256: str
    parts: Digests  # in place of sha256 if several processes wrote the array


class _File(TypedDict):
    bytes: int
    sha256: str


class _Settings(TypedDict, total=False):
    rl: Row


class _Meta(TypedDict, total=False):
    step: int
    metrics: dict[str, Number]
    config: _Settings


class _Record(TypedDict):
    meta: _Meta
    leaves: dict[str, _Leaf]
    files: dict[str, _File]


class CheckpointError(TrainingFault):
    """A checkpoint is missing, unreadable or differs from what was saved. The message names the
    step and, if known, the array.
    """


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints in one folder, a numbered subfolder for each step. One process writes."""

    def __init__(
        self,
        directory: str | Path,
        keep_last: int = 2,
        *,
        keep_best: str | None = None,
        asynchronous: bool = False,
    ):
        """Makes the folder if it is missing.

        Args:
          directory: the folder.
          keep_last: how many of the newest steps are kept.
          keep_best: ``max:NAME`` or ``min:NAME``: also keep the step whose
            ``meta["metrics"][NAME]`` is the highest or lowest.
          asynchronous: ``save`` returns when the state is copied to the host; a thread hashes and
            writes the copy.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        how, _, self._best_metric = (keep_best or "max:").partition(":")
        if how not in ("max", "min") or (keep_best and not self._best_metric):
            raise ValueError(f"keep_best must be max:METRIC or min:METRIC, got {keep_best!r}")
        self._keep_last = keep_last
        self._best_sign = 1 if how == "max" else -1
        self._asynchronous = asynchronous
        self._directory = Path(directory).absolute()
        self._directory.mkdir(parents=True, exist_ok=True)
        _ignore_closed_loops()
        self._pending: list[Future[None]] = []
        self._damaged: set[int] = set()
        self._verbosity = absl.logging.get_verbosity()
        absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax logs the errors that it then raises
        # Arrays that could change are copied before they are saved.
        kinds = ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
            (jax.Array, ocp.type_handlers.ArrayHandler()),
        )
        self._handler = ocp.PyTreeCheckpointHandler(type_handler_registry=kinds)
        self._writer = ThreadPoolExecutor(1, "checkpoint")

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Waits for the last save and ends Orbax's threads."""
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            warnings.warn(str(failure), stacklevel=2)  # the error that is being raised comes first
        finally:
            self._writer.shutdown()
            self._handler.close()
            absl.logging.set_verbosity(self._verbosity)

    def steps(self) -> list[int]:
        """The complete steps on disk, oldest first."""
        return steps(self._directory)

    def latest(self) -> int | None:
        """The newest step on disk; None without one."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step on disk with the best metric of ``keep_best``, the earlier of equals; None
        without one.

        A metric that is missing or not finite, or whose record is damaged, is never the best.
        """
        scores = {}
        for step in self.steps() if self._best_metric else ():
            with contextlib.suppress(CheckpointError):
                metrics = self.record(step)["meta"].get("metrics", {})
                metric = metrics.get(self._best_metric, math.nan)
                if math.isfinite(metric):
                    scores[step] = self._best_sign * metric
        return max(scores, key=scores.__getitem__, default=None)

    def save(
        self, step: int, state: Any, meta: Row, files: Mapping[str, bytes] = MappingProxyType({})
    ) -> None:
        """Writes one checkpoint, then deletes those that are no longer to be kept.

        Returns when it is complete; if ``asynchronous``, when the one before it is complete, see
        :meth:`wait`.

        Args:
          step: higher than every step on disk, except those that ``restore`` found damaged: these
            are set aside first, as ``damaged-STEP``.
          state: pytree of jax or NumPy arrays, in any layout. With several processes each writes
            its own parts. The caller may donate or overwrite them as soon as this returns.
          meta: JSON values; comes back from ``restore`` (tuples as lists).
          files: {name: content}, kept beside the arrays; see :meth:`file`. Those of the first
            process count.

        Raises:
          CheckpointError: it could not be written, for example because the disk is full. The
            earlier ones are intact.
        """
        self.wait()
        latest = max(set(self.steps()) - self._damaged, default=-1)
        if step <= latest:
            raise ValueError(
                f"cannot save step {step} in {self._directory}: step {latest} is there already"
            )
        leaves = _leaves(state)
        about = {
            name: {"bytes": len(content), "sha256": digest_of(content)}
            for name, content in files.items()
        }
        record = {"meta": meta, "leaves": _kinds(leaves), "files": about}
        record = json.loads(json.dumps(record))
        arrays = {name: _stored(leaf) for name, leaf in leaves.items()}
        parts = {name: _parts(array, leaves[name].shape) for name, array in arrays.items()}
        folder = self._directory / f"{step}.orbax-checkpoint-tmp"

        def make_room() -> None:
            self._delete()
            for damaged in self._damaged:
                aside = self._directory / f"damaged-{damaged}"
                shutil.rmtree(aside, ignore_errors=True)
                (self._directory / str(damaged)).rename(aside)
            (folder / "state").mkdir(parents=True)

        with self._writing(step):
            processes.in_first(make_room)
            filled = {name: array for name, array in arrays.items() if array.size}
            args = ocp.args.PyTreeSave(filled)
            copied = self._handler.async_save(folder / "state", args=args)
            written = processes.agree(lambda: self._writer.submit(asyncio.run, copied).result())
        self._damaged.clear()
        self._pending.append(
            self._writer.submit(self._write, step, folder, record, files, parts, written)
        )
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is complete and old steps are deleted.

        Raises:
          CheckpointError: it could not be written.
        """
        while self._pending:
            self._pending.pop().result()

    def _write(
        self,
        step: int,
        folder: Path,
        record: Row,
        files: Mapping[str, bytes],
        parts: dict[str, Shards],
        written: Iterable[Any],
    ) -> None:
        """The rest of a save, in a thread of each process; ``written`` are Orbax's writes."""

        def publish() -> None:
            for name, leaf in record["leaves"].items():
                of_all: Digests = {}
                for of_process in digests:
                    of_all |= of_process[name]
                leaf |= {"parts": of_all} if len(of_all) > 1 else {"sha256": of_all.popitem()[1]}
            self._handler.finalize(folder / "state")
            text = json.dumps(record)
            item = {"record": text, "sha256": digest_of(text.encode())}
            (folder / "record").mkdir()
            contents: dict[str, str | bytes] = {**files, "metadata": json.dumps(item)}
            write_together({folder / "record" / name: text for name, text in contents.items()})
            folder.rename(self._directory / str(step))

        with self._writing(step):
            # Before anything is deleted.
            processes.agree(lambda: [future.result() for future in written])
            digests = processes.gather(lambda: _digests(record["leaves"], parts))
            processes.in_first(publish)
        old = set(self.steps()[: -self._keep_last])
        processes.in_first(lambda: self._delete(old - {self.best()}))

    def _delete(self, old: Iterable[int] = ()) -> None:
        """Deletes steps, and the leftovers of a killed or failed save or of a killed deletion."""
        trash = self._directory / "trash"  # a step is renamed to here before it is deleted
        for step in sorted(old):
            trash.mkdir(exist_ok=True)
            (self._directory / str(step)).rename(trash / str(step))
        for leftover in [*self._directory.glob("*.orbax-checkpoint-tmp*"), trash]:
            shutil.rmtree(leftover, ignore_errors=True)

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """Raises a CheckpointError for any error in the block, and removes the unfinished step."""
        try:
            yield
        except Exception as error:
            if processes.is_first():
                self._delete()  # the unfinished step may be what fills the disk
            latest = self.latest()
            # TensorStore's messages are long and end with one of these.
            full = [text for text in map(os.strerror, _FULL) if text in str(error)]
            why = full[0] if full else _first_line(error)
            last = "there is no earlier checkpoint"
            if latest is not None:
                last = f"the last good checkpoint is step {latest}"
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self._directory} ({why}); "
                f"{last}. Make room if the disk is full, then go on with --resume"
            ) from error

    def restore(self, target: T, step: int | None = None) -> tuple[T, Row]:
        """Reads a checkpoint back, bit for bit, and verifies every array.

        Args:
          target: a state of the same structure: arrays or ``jax.ShapeDtypeStruct``. The result has
            its tree, shapes, dtypes and shardings, and NumPy arrays where ``target`` has them.
          step: which one. By default the newest; if that is damaged, the one before it, with a
            warning.

        Returns:
          The state and the ``meta`` that was saved with it.

        Raises:
          CheckpointError: the step is missing or damaged; without ``step``: no undamaged one is
            left.
          UserError: the checkpoint holds other arrays, shapes or dtypes than ``target``.
        """
        self.wait()
        steps = self.steps()[::-1] if step is None else [step]
        errors: list[str] = []
        for candidate in steps:
            try:
                result = processes.agree(functools.partial(self._restore, target, candidate))
            except TrainingFault as error:  # of this process or of another one
                if step is not None:
                    raise
                errors.append(str(error))
                continue
            if errors:
                self._damaged = {later for later in steps if later > candidate}
                warnings.warn(
                    f"{'; '.join(errors)}. Going back to step {candidate}: what was done from "
                    f"there to step {steps[0]} is lost and will be done again",
                    stacklevel=2,
                )
            return result
        if not errors:
            raise CheckpointError(f"no checkpoint in {self._directory}")
        raise CheckpointError(
            f"there is no undamaged checkpoint in {self._directory}: {'; '.join(errors)}. Start "
            "again with --overwrite"
        )

    def _restore(self, target: T, step: int) -> tuple[T, Row]:
        where = self._name(step)
        if step not in self.steps():
            raise CheckpointError(f"{where} does not exist; there are {self.steps()}")
        record = self.record(step)
        leaves = _leaves(target)
        saved = record["leaves"]
        _compare(saved, leaves, where)
        try:
            digests = {
                name: kind.get("parts") or {_place_of(kind["shape"]): kind.get("sha256", "")}
                for name, kind in saved.items()
            }
            arrays = self._read(step, leaves, digests)
            parts = {
                name: _parts(arrays[name], leaf.shape, digests[name])
                for name, leaf in leaves.items()
            }
        except MemoryError:  # too little memory is no damage
            raise
        except Exception as error:
            raise CheckpointError(
                f"{where} is damaged: its arrays cannot be read ({_first_line(error)})"
            ) from error
        for name, of_parts in _digests(saved, parts).items():
            if not of_parts.items() <= digests[name].items():
                raise CheckpointError(
                    f"{where} is damaged: the array {name} does not match its checksum"
                )
        values = [_moved(arrays.pop(name), leaf) for name, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(target), values), record["meta"]

    def _read(self, step: int, leaves: Row, digests: dict[str, Digests]) -> dict[str, Any]:
        """A step's arrays: jax arrays where leaf and checkpoint have equal shards, else NumPy."""
        empty = {}
        how = {}
        folder = self._directory / str(step) / "state"
        about = self._handler.metadata(folder).tree
        for name, leaf in leaves.items():
            if not leaf.size:  # Orbax stores none
                empty[name] = np.zeros(leaf.shape, leaf.dtype)
                continue
            array = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
            # Read before it is known, it could take all memory.
            if (about[name].shape, about[name].dtype) != (array.shape, array.dtype):
                raise ValueError(f"{name} is stored as {about[name].dtype}{about[name].shape}")
            cuts: Iterable[Any] = ()
            if _is_shared(leaf):
                cuts = leaf.sharding.devices_indices_map(leaf.shape).values()
            if {_place_of(leaf.shape, cut) for cut in cuts} == digests[name].keys():
                how[name] = ocp.ArrayRestoreArgs(sharding=leaf.sharding)
            else:
                how[name] = ocp.RestoreArgs(restore_type=np.ndarray)
        args = ocp.args.PyTreeRestore(how, restore_args=how)
        return empty | self._handler.restore(folder, args=args)

    def _name(self, step: int) -> str:
        return f"checkpoint step {step} in {self._directory}"

    def record(self, step: int) -> Row:
        """What was saved beside the arrays: their checksums and ``meta``.

        Raises:
          CheckpointError: it is damaged.
        """
        record = f"{self._name(step)} is damaged: its record"
        path = self._directory / str(step)
        try:
            check_ordinary(path)  # Orbax would wait for the writer of a pipe
            item = json.loads(read_file(path / "record" / "metadata", most=None))
            is_whole = digest_of(item["record"].encode()) == item["sha256"]
        except Exception as error:
            raise CheckpointError(f"{record} cannot be read ({_first_line(error)})") from error
        if not is_whole:
            raise CheckpointError(f"{record} does not match its checksum")
        try:
            content: Row = parse_json(item["record"], _Record, "it")
            if content["meta"].get("step", step) != step:
                raise UserError(f"it is of step {content['meta']['step']}")
        except UserError as error:
            raise CheckpointError(f"{record} holds something else ({error})") from None
        return content

    def file(self, step: int, name: str) -> bytes:
        """One of the files that were saved with a step.

        Raises:
          CheckpointError: it is missing or damaged.
        """
        digest = self.record(step)["files"][name]["sha256"]
        content = b""
        with contextlib.suppress(UserError):
            content = read_file(self._directory / str(step) / "record" / name, most=None)
        if digest_of(content) != digest:
            raise CheckpointError(
                f"{name} of the run and its copy in {self._name(step)} are both damaged. Delete "
                "this checkpoint to go on from an earlier one, or start again with --overwrite"
            )
        return content

    def arrays(self, step: int) -> Shards:
        """The arrays of a step by their paths, each verified, whatever the structure of the state.

        Raises:
          CheckpointError: the step is missing or damaged.
        """
        try:
            target = {
                name: np.broadcast_to(np.zeros((), kind["dtype"]), kind["shape"])
                for name, kind in self.record(step)["leaves"].items()
            }
        except (TypeError, ValueError, MemoryError) as error:
            raise CheckpointError(f"{self._name(step)} holds something else ({error})") from error
        return self._restore(target, step)[0]


@functools.cache
def _ignore_closed_loops() -> None:
    """Hides the errors that TensorStore's threads report, after a failed save, to a closed loop."""
    report = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            report(unraisable)

    sys.unraisablehook = hook


def _leaves(state: Any) -> dict[str, Any]:
    leaves = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "state"
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic):
            raise ValueError(f"{name}: expected an array, got {type(leaf).__name__}")
        if name in leaves:
            raise ValueError(f"two leaves have the path {name}")
        leaves[name] = leaf
    return leaves


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored(leaf: Any) -> Any:
    """The array that is written: a NumPy copy, or the array itself if processes share it."""
    if isinstance(leaf, np.ndarray | np.generic):
        return np.array(leaf)
    numbers = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    return numbers if _is_shared(leaf) else np.asarray(numbers)


def _is_shared(leaf: Any) -> bool:
    """Whether the leaf is sharded over several processes."""
    return not getattr(getattr(leaf, "sharding", None), "is_fully_addressable", True)


def _place_of(shape: Sequence[int], index: Sequence[slice] | None = None) -> str:
    """[start, end] of each axis of a shard, as JSON; without ``index`` of the whole array."""
    cuts = [slice(None)] * len(shape) if index is None else index
    # The data of a key have one axis more than the key.
    return json.dumps([cut.indices(size)[:2] for cut, size in zip(cuts, shape, strict=False)])


def _kinds(leaves: Row) -> dict[str, Row]:
    """The dtype and shape of each leaf, as the record has them."""
    return {
        name: {"dtype": str(leaf.dtype), "shape": list(leaf.shape)} for name, leaf in leaves.items()
    }


def _parts(array: Any, shape: Sequence[int], places: Iterable[str] = ()) -> Shards:
    """The parts of an array that this process holds, of a NumPy array those at ``places``. Without
    ``places``, the parts that this process writes.
    """
    if isinstance(array, jax.Array):
        shards = [shard for shard in array.addressable_shards if places or shard.replica_id == 0]
        return {_place_of(shape, shard.index): np.asarray(shard.data) for shard in shards}
    own = [_place_of(shape)] * processes.is_first()
    return {
        place: array[tuple(slice(*ends) for ends in json.loads(place))] for place in places or own
    }


def _digests(leaves: Row, parts: dict[str, Shards]) -> dict[str, Digests]:
    """The checksum of each part, on all cores: ``hashlib`` releases Python's lock."""

    def of_leaf(name: str) -> Digests:
        kind = json.dumps({"dtype": leaves[name]["dtype"], "shape": leaves[name]["shape"]})
        digests = {}
        for place, part in parts[name].items():
            digest = hashlib.sha256(kind.encode())
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
            digests[place] = digest.hexdigest()
        return digests

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(parts, pool.map(of_leaf, parts), strict=True))


def digest_of(content: bytes) -> str:
    """The checksum of a file."""
    return hashlib.sha256(content).hexdigest()


def _compare(saved: Row, target: Row, where: str) -> None:
    """Raises UserError unless the target has the arrays of the checkpoint."""
    kind_of = "{dtype}{shape}".format_map
    held = {path: kind_of(leaf) for path, leaf in saved.items()}
    wanted = {path: kind_of(leaf) for path, leaf in _kinds(target).items()}
    problems = [
        f"{path} is {held.get(path, 'missing')} in the checkpoint and "
        f"{wanted.get(path, 'missing')} in the state"
        for path in wanted | held
        if held.get(path) != wanted.get(path)
    ]
    if problems:
        raise UserError(
            f"{where} is of another model or optimizer, {len(problems)} arrays differ: "
            f"{'; '.join(problems[:5])}"
        )


def _moved(array: Any, target: Any) -> Any:
    """The array where the target is: on the host, on its devices, or free to move (uncommitted)."""
    if isinstance(target, np.ndarray | np.generic):
        return array
    if _is_key(target):
        impl = jax.random.key_impl(jnp.empty((), target.dtype))
        array = jax.random.wrap_key_data(jnp.asarray(array), impl=impl)
    is_free = target.sharding is None or (isinstance(target, jax.Array) and not target.committed)
    return jnp.array(array) if is_free else sharding.place(array, target.sharding)


def _first_line(error: Exception) -> str:
    line, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {line[:200]}"
