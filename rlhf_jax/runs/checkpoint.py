"""Checkpoints of a run: Orbax writes the arrays, a checksum per array proves that they are what was saved.

    with Checkpoints(directory, keep_last=2) as checkpoints:
        checkpoints.save(step, state, {"epoch": 3})
        state, meta = checkpoints.restore(state)      # the newest good one, on the shardings of the given state

A state is any pytree of arrays, typed PRNG keys included. Each array is stored under its path ("params/wte/embedding").
Orbax notices neither flipped bits nor a target of another dtype, so both are checked here. A step's folder appears
under its number by one rename after all was written, and leaves by one before it is deleted: a kill leaves the other
steps as they were. Orbax's own retention is not used: it can drop the newest step for a better one, and lets NaN be
the best.
"""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from rlhf_jax import sharding
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.runs import processes

T = TypeVar("T")


class CheckpointError(TrainingFault):
    """A checkpoint that is missing, unreadable or not what was saved; names the step and, where known, the array."""


def steps(directory: str | Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, oldest first; touches neither JAX nor the folder."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal() and entry.is_dir())


class Checkpoints:
    """The checkpoints in one folder, a numbered subfolder per step; one process writes at a time."""

    def __init__(
        self, directory: str | Path, keep_last: int = 2, *, keep_best: str | None = None, asynchronous: bool = False
    ):
        """Makes the folder where needed.

        Args:
          directory: the folder.
          keep_last: how many of the newest steps retention leaves.
          keep_best: ``max:NAME`` or ``min:NAME``: retention also leaves the step whose ``meta["metrics"][NAME]`` is the
            highest or lowest.
          asynchronous: ``save`` returns once the state is copied to the host and its checksums are known; a thread
            writes it.

        Raises:
          ValueError: ``keep_last`` below 1; ``keep_best`` of another form.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        self._keep_last = keep_last
        how, _, self._best_metric = (keep_best or "max:").partition(":")
        if how not in ("max", "min") or (keep_best and not self._best_metric):
            raise ValueError(f"keep_best must be max:METRIC or min:METRIC, got {keep_best!r}")
        self._best_sign = 1 if how == "max" else -1
        self._directory = Path(directory).absolute()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._asynchronous = asynchronous
        self._pending: int | None = None
        self._damaged: set[int] = set()
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_quiet())
        number = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=number, active_processes={number})
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone)),
            multiprocessing_options=alone,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            warnings.warn(str(failure), stacklevel=2)  # what is being raised already says more

    def close(self) -> None:
        """Waits as ``wait`` does and frees Orbax's threads. The checkpoints stay."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()
            self._quiet.close()

    def steps(self) -> list[int]:
        """The steps on disk, oldest first. A killed save is not among them, nor one that is still being written."""
        return steps(self._directory)

    def latest(self) -> int | None:
        """The newest step on disk, if any."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step on disk with the best metric of ``keep_best``, the earlier of equals; None without one.

        A metric that is not finite is never the best.
        """
        if not self._best_metric:
            return None
        values = {}
        for step in self.steps():
            with contextlib.suppress(CheckpointError):
                value = self._record(step)["meta"].get("metrics", {}).get(self._best_metric, math.nan)
                if math.isfinite(value):
                    values[step] = self._best_sign * value
        return max(values, key=lambda step: (values[step], -step), default=None)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Writes one checkpoint, then deletes those that are to be kept no longer.

        Returns when it is complete; of ``asynchronous`` checkpoints only the one before is, see :meth:`wait`.

        Args:
          step: higher than every step on disk, save those that ``restore`` found damaged: these are put aside, renamed
            to ``damaged-STEP``.
          state: pytree of jax or NumPy arrays; of several processes each has them whole, and the first writes. The
            caller may donate or overwrite them as soon as this returns.
          meta: JSON values; comes back from ``restore`` (tuples as lists).

        Raises:
          ValueError: ``step`` is not higher than the newest one; a leaf is no array; two leaves have the same path.
          TypeError: ``meta`` is no JSON.
          CheckpointError: it could not be written, for example to a full disk. The earlier ones are as they were.
        """
        self.wait()
        processes.agree(lambda: self._begin(step, state, meta) if processes.is_first() else None)
        self._damaged.clear()
        self._pending = step
        if not self._asynchronous:
            self.wait()

    def _begin(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        for damaged in sorted(self._damaged):
            aside = self._directory / f"damaged-{damaged}"
            shutil.rmtree(aside, ignore_errors=True)
            (self._directory / str(damaged)).rename(aside)
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f"cannot save step {step} in {self._directory}: step {latest} is there already")
        leaves = {path: _local(path, leaf) for path, leaf in _leaves(state).items()}
        record = json.dumps({"meta": meta, "leaves": {path: _fingerprint(leaf) for path, leaf in leaves.items()}})
        arrays = {path: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf for path, leaf in leaves.items()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave({path: array for path, array in arrays.items() if array.size}),
            record=ocp.args.JsonSave({"record": record, "sha256": hashlib.sha256(record.encode()).hexdigest()}),
        )
        self._clean()
        try:
            self._checkpointer.save(self._directory / str(step), args=items)
        except Exception as error:
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Returns when the save that is under way, if any, is complete and those to be kept no longer are deleted.

        Raises:
          CheckpointError: it could not be written.
        """
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        processes.agree(lambda: self._complete(step) if processes.is_first() else None)

    def _complete(self, step: int) -> None:
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:
            raise self._failed(step, error) from error
        present = self.steps()
        trash = self._directory / _TRASH
        for old in set(present[: -self._keep_last]) - {self.best()}:
            trash.mkdir(exist_ok=True)
            (self._directory / str(old)).rename(trash / str(old))
        shutil.rmtree(trash, ignore_errors=True)

    def _clean(self) -> None:
        """Removes what a killed or failed save, or a killed deletion, has left."""
        for leftover in [*self._directory.glob("*.orbax-checkpoint-tmp*"), self._directory / _TRASH]:
            shutil.rmtree(leftover, ignore_errors=True)

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        self._clean()  # may be what fills the disk
        latest = self.latest()
        full = os.strerror(errno.ENOSPC)  # which TensorStore says at the end of a long message
        why = full if full in str(error) else _first_line(error)
        last = "there is no earlier checkpoint" if latest is None else f"the last good checkpoint is step {latest}"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._directory} ({why}); {last}. "
            "Make room if the disk is full, then go on with --resume"
        )

    def restore(self, target: T, step: int | None = None) -> tuple[T, dict[str, Any]]:
        """Reads a checkpoint back, bit for bit, and verifies every array.

        Args:
          target: a state of the same structure: arrays or ``jax.ShapeDtypeStruct``. The result has its tree, shapes,
            dtypes and shardings; NumPy where it has NumPy.
          step: which one. By default the newest; where that is damaged the one before it, with a warning.

        Returns:
          The state and the ``meta`` that was saved with it.

        Raises:
          CheckpointError: no such step, or it is damaged; without ``step``: no good one is left.
          UserError: the checkpoint holds other arrays, shapes or dtypes than ``target``.
        """
        self.wait()
        if step is not None:
            return processes.agree(lambda: self._restore(target, step))
        present = self.steps()
        if not present:
            raise CheckpointError(f"no checkpoint in {self._directory}")
        errors: list[str] = []
        for candidate in reversed(present):
            try:
                result = processes.agree(functools.partial(self._restore, target, candidate))
            except TrainingFault as error:  # of this process or of another one
                errors.append(str(error))
                continue
            if errors:
                self._damaged = {later for later in present if later > candidate}
                warnings.warn(
                    f"{'; '.join(errors)}. Going back to step {candidate}: what was done from there to step "
                    f"{present[-1]} is lost and will be done again",
                    stacklevel=2,
                )
            return result
        raise CheckpointError(
            f"no good checkpoint is left in {self._directory}: {'; '.join(errors)}. Start again with --overwrite"
        )

    def _restore(self, target: T, step: int) -> tuple[T, dict[str, Any]]:
        where = self._where(step)
        if step not in self.steps():
            raise CheckpointError(f"{where} does not exist; there are {self.steps()}")
        record = self._record(step)
        leaves = _leaves(target)
        _compare(record["leaves"], leaves, where)
        specs = {path: _spec(leaf) for path, leaf in leaves.items() if record["leaves"][path]["sha256"] != _EMPTY}
        try:
            arrays = self._checkpointer.restore(
                self._directory / str(step), args=ocp.args.Composite(state=ocp.args.StandardRestore(specs))
            )
        except (MemoryError, jax.errors.JaxRuntimeError):  # too little memory is no damage
            raise
        except Exception as error:
            raise CheckpointError(f"{where} is damaged: its arrays cannot be read ({_first_line(error)})") from error
        values = []
        for path, leaf in leaves.items():
            value = arrays.state[path] if path in specs else np.zeros(leaf.shape, leaf.dtype)
            if _fingerprint(value) != record["leaves"][path]:
                raise CheckpointError(f"{where} is damaged: the array {path} does not match its checksum")
            values.append(_place(value, leaf))
        return jax.tree.unflatten(jax.tree.structure(target), values), record["meta"]

    def _where(self, step: int) -> str:
        return f"checkpoint step {step} in {self._directory}"

    def _record(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays: their checksums and ``meta``."""
        try:
            item = json.loads((self._directory / str(step) / "record" / "metadata").read_text("utf-8"))
            text = item["record"]
            intact = hashlib.sha256(text.encode()).hexdigest() == item["sha256"]
        except Exception as error:
            message = f"{self._where(step)} is damaged: its record cannot be read ({_first_line(error)})"
            raise CheckpointError(message) from error
        if not intact:
            raise CheckpointError(f"{self._where(step)} is damaged: its record does not match its checksum")
        return json.loads(text)


_TRASH = "trash"  # where a step is renamed to before it is deleted
_EMPTY = "empty"  # in place of a checksum: Orbax cannot store arrays without elements


def _leaves(state: Any) -> dict[str, Any]:
    leaves = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "state"
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)):
            raise ValueError(f"{name}: expected an array, got {type(leaf).__name__}")
        if name in leaves:
            raise ValueError(f"two leaves have the path {name}")
        leaves[name] = leaf
    return leaves


def _fingerprint(leaf: Any) -> dict[str, Any]:
    description = {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    if not leaf.size:
        return description | {"sha256": _EMPTY}
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    data = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    digest = hashlib.sha256(json.dumps(description).encode())
    digest.update(data.data)
    return description | {"sha256": digest.hexdigest()}


def _local(path: str, leaf: Any) -> Any:
    """The leaf as the first of several processes can write it alone: Orbax then takes NumPy arrays only."""
    if jax.process_count() == 1 or not isinstance(leaf, jax.Array):
        return leaf
    if not leaf.is_fully_replicated or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(f"{path}: several processes can save what each of them has whole, and typed keys as key_data")
    return np.asarray(leaf)


def _compare(saved: dict[str, Any], target: dict[str, Any], where: str) -> None:
    problems = [f"{path} is not in the checkpoint" for path in target if path not in saved]
    problems += [f"{path} is in the checkpoint alone" for path in saved if path not in target]
    for path in (path for path in target if path in saved):
        stored, expected = saved[path], target[path]
        if stored["shape"] != list(expected.shape) or stored["dtype"] != str(expected.dtype):
            problems.append(
                f"{path} is {stored['dtype']}{stored['shape']} in the checkpoint, "
                f"expected {expected.dtype}{list(expected.shape)}"
            )
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise UserError(f"{where} is of another model or optimizer: {'; '.join(problems[:5])}{more}")


def _spec(leaf: Any) -> Any:
    if isinstance(leaf, (np.ndarray, np.generic)) or jax.process_count() > 1:
        return np.zeros(leaf.shape, leaf.dtype)
    where = leaf.sharding
    if where is None:  # else Orbax would take the saved one, whose devices need not be here
        where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _place(value: Any, target: Any) -> Any:
    """An array that was free to move (uncommitted) must be so again, or jit will not mix it with sharded ones."""
    if jax.process_count() > 1 and isinstance(target.sharding, jax.sharding.NamedSharding):
        return sharding.place(value, target.sharding)
    if isinstance(target, jax.Array) and not target.committed:
        if jax.dtypes.issubdtype(target.dtype, jax.dtypes.prng_key):
            data = jnp.array(np.asarray(jax.random.key_data(value)))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(target))
        return jnp.array(np.asarray(value))
    return value


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs what it is about to raise, and what concerns its developers."""
    before = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.FATAL)
    try:
        yield
    finally:
        absl.logging.set_verbosity(before)
