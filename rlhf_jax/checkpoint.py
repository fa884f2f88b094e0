"""Checkpoints of a run: Orbax writes the arrays, a checksum per array proves that they are what was saved.

    with Checkpoints(directory, keep_last=2) as checkpoints:
        checkpoints.save(step, state, {"epoch": 3})
        state, meta = checkpoints.restore(state)      # the newest good one, on the shardings of the given state

A state is any pytree of arrays, typed PRNG keys included. Each array is stored under its path ("params/wte/embedding").
Orbax notices neither flipped bits nor a target of another dtype, so both are checked here. A step's folder appears
under its number by one rename after all was written: a killed save leaves the earlier steps as they were.
"""

import contextlib
import hashlib
import json
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

from rlhf_jax.errors import TrainingFault, UserError

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

    def __init__(self, directory: str | Path, keep_last: int = 2):
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        self._directory = Path(directory).absolute()
        self._damaged: set[int] = set()
        # A kill inside Orbax's own deletion leaves a step listed but broken; renaming it to the trash first does not.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, todelete_subdir="trash", enable_async_checkpointing=False
        )
        with _quiet():
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees Orbax's threads. The checkpoints stay."""
        with _quiet():
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps on disk, oldest first. A killed save is not among them."""
        return steps(self._directory)

    def latest(self) -> int | None:
        """The newest step on disk, if any."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Writes one checkpoint, returns when it is complete, then deletes those beyond ``keep_last``.

        Args:
          step: higher than every step on disk, save those that ``restore`` found damaged: these are put aside, renamed
            to ``damaged-STEP``.
          state: pytree of jax or NumPy arrays, every one of which this process can read whole.
          meta: JSON values; comes back from ``restore`` (tuples as lists).

        Raises:
          ValueError: ``step`` is not higher than the newest one; a leaf is no array; two leaves have the same path.
          TypeError: ``meta`` is no JSON.
        """
        for damaged in sorted(self._damaged):
            self._put_aside(damaged)
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f"cannot save step {step} in {self._directory}: step {latest} is there already")
        leaves = _leaves(state)
        record = json.dumps({"meta": meta, "leaves": {path: _fingerprint(leaf) for path, leaf in leaves.items()}})
        arrays = {path: np.asarray(leaf) if isinstance(leaf, np.generic) else leaf for path, leaf in leaves.items()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave({path: array for path, array in arrays.items() if array.size}),
            record=ocp.args.JsonSave({"record": record, "sha256": hashlib.sha256(record.encode()).hexdigest()}),
        )
        for leftover in self._directory.glob("*.orbax-checkpoint-tmp*"):  # of a killed save
            shutil.rmtree(leftover)
        with _quiet():
            saved = self._manager.save(step, args=items)
        if not saved:
            raise CheckpointError(f"step {step} was not saved in {self._directory}")
        shutil.rmtree(self._directory / "trash", ignore_errors=True)  # Orbax never empties it

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
        if step is not None:
            return self._restore(target, step)
        present = self.steps()
        if not present:
            raise CheckpointError(f"no checkpoint in {self._directory}")
        errors: list[str] = []
        for candidate in reversed(present):
            try:
                result = self._restore(target, candidate)
            except CheckpointError as error:
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
        raise CheckpointError(f"no good checkpoint is left in {self._directory}: {'; '.join(errors)}")

    def _restore(self, target: T, step: int) -> tuple[T, dict[str, Any]]:
        where = f"checkpoint step {step} in {self._directory}"
        if step not in self.steps():
            raise CheckpointError(f"{where} does not exist; there are {self.steps()}")
        try:
            with _quiet():
                item = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
            text = item["record"]
            intact = hashlib.sha256(text.encode()).hexdigest() == item["sha256"]
        except Exception as error:
            raise CheckpointError(f"{where} is damaged: its record cannot be read ({_first_line(error)})") from error
        if not intact:
            raise CheckpointError(f"{where} is damaged: its record does not match its checksum")
        record = json.loads(text)
        leaves = _leaves(target)
        _compare(record["leaves"], leaves, where)
        specs = {path: _spec(leaf) for path, leaf in leaves.items() if record["leaves"][path]["sha256"] != _EMPTY}
        try:
            with _quiet():
                arrays = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(specs)))
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

    def _put_aside(self, step: int) -> None:
        aside = self._directory / f"damaged-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        (self._directory / str(step)).rename(aside)
        with _quiet():
            self._manager.reload()
        self._damaged.discard(step)


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
    if isinstance(leaf, (np.ndarray, np.generic)):
        return np.zeros(leaf.shape, leaf.dtype)
    sharding = leaf.sharding
    if sharding is None:  # else Orbax would take the saved one, whose devices need not be here
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _place(value: Any, target: Any) -> Any:
    """An array that was free to move (uncommitted) must be so again, or jit will not mix it with sharded ones."""
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
