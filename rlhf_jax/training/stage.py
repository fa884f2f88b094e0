"""One stage of a run while it is open: its folder, its devices, its random streams."""

import contextlib
import dataclasses
import errno
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from rlhf_jax import models, sharding
from rlhf_jax.config import RunConfig, to_yaml
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import TrainingFault
from rlhf_jax.report import page
from rlhf_jax.runs import devices, manifest, processes, trackers
from rlhf_jax.runs import folder as runs
from rlhf_jax.training import reward_functions, setup
from rlhf_jax.training.adapters import Trainable
from rlhf_jax.types import Params, PolicyFn

Tree = TypeVar("Tree")

RL_STAGES = ("vpg", "ppo", "rloo", "grpo")
# What may differ between a run and its resumption without making it another run.
MAY_CHANGE = (
    *("resume", "overwrite", "allow_changed", "output_dir", "device", "processes", "track"),
    *("keep_last", "checkpoint_interval", "checkpoint_async"),
)
# What must not differ even with --allow-changed: the checkpoint would not fit, or its tokens mean something else.
FIXED = ("model", "network", "lora", "tokenizer", "reward_model.ensemble_size")


class RunResult(NamedTuple):
    """Where a finished run lies, and the last row of its metrics."""

    folder: Path
    model_folder: Path
    metrics: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Stage:
    """An open run folder with the devices and keys of its stage."""

    config: RunConfig
    name: str
    run: runs.Run
    mesh: jax.sharding.Mesh

    @property
    def num_devices(self) -> int:
        """Devices that share the rows of a batch."""
        return self.mesh.shape["data"]

    @property
    def row_sharding(self) -> jax.sharding.NamedSharding:
        """The sharding of batches and minibatches."""
        return sharding.rows(self.mesh)

    def key(self, name: setup.Stream) -> jax.Array:
        """The key of one of the stage's random streams."""
        return setup.stream(self.config.seed, self.name, name)

    def shard(self, batch: Tree) -> Tree:
        """A batch with its rows spread over the devices; each process has the whole batch and keeps its own rows."""
        return sharding.shard_rows(self.mesh, sharding.own_rows(batch))

    def replicate(self, tree: Tree) -> Tree:
        """A copy on every device: never the same buffers, since updates donate theirs."""
        if jax.process_count() == 1:  # with several, placing the arrays copies them
            tree = jax.tree.map(functools.partial(jnp.array, copy=True), tree)
        return sharding.replicate(self.mesh, tree)

    def trainable(self, chosen: Trainable) -> Trainable:
        """The two parts on every device; the frozen one, which no update donates, without a copy where it can be."""
        base = None if chosen.base is None else sharding.replicate(self.mesh, chosen.base)
        return Trainable(chosen.params, base)

    def reference(self, trainable: Trainable, policy_fn: PolicyFn) -> jax.tree_util.Partial:
        """The policy before training, with its parameters: LoRA's base itself, else a copy."""
        if trainable.base is not None:
            return jax.tree_util.Partial(policy_fn, trainable.base)
        return self.replicate(jax.tree_util.Partial(policy_fn, trainable.params))

    def jit_update(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """Jits ``update(state, ...) -> (state, metrics)``: the state is donated and comes back on every device."""
        return jax.jit(update, donate_argnums=0, out_shardings=sharding.replicated(self.mesh))

    def say_counts(self, counts: Mapping[str, int]) -> None:
        """Prints how many texts were cut or left out, before anything is compiled."""
        for what, count in counts.items():
            print(f"{count} texts: {what}", flush=True)

    def finish(
        self,
        model: models.Model,
        trainable: Trainable,
        trained: Params | list[Params],
        tokenizer: Tokenizer,
        metrics: dict[str, Any],
    ) -> RunResult:
        """Saves ``model/`` with its tokenizer, LoRA's adapters merged in and beside it in ``adapter/`` too; then draws
        ``report.html``. A list is an ensemble's: its parts go to ``member_0``, ``member_1``, ... in these folders.
        """
        if jax.process_count() > 1:  # the first process computes alone from here
            trainable, trained = processes.fetch((trainable, trained))
        processes.in_first(lambda: self._write(model, trainable, trained, tokenizer))
        return RunResult(self.run.path, self.run.model, metrics)

    def _write(
        self, model: models.Model, trainable: Trainable, trained: Params | list[Params], tokenizer: Tokenizer
    ) -> None:
        parts = {f"member_{i}": part for i, part in enumerate(trained)} if isinstance(trained, list) else {"": trained}
        for name, part in parts.items():
            models.save(self.run.model / name, model, jax.device_get(trainable.merged(part)))
            tokenizer.save(self.run.model / name)
        print(f"saved {self.run.model}", flush=True)
        if trainable.base is not None:
            for name, part in parts.items():
                part = jax.device_get(part)
                models.lora.save(self.run.adapter / name, trainable.base, part, base_model=self.config.model)
            print(f"saved {self.run.adapter}", flush=True)
        try:
            page.write([self.run.path], self.run.report)
            print(f"saved {self.run.report}", flush=True)
        except Exception as error:  # whatever it is: the run is done and its result saved
            print(f"{self.run.report} could not be drawn: {type(error).__name__}: {error}", flush=True)


def start(config: RunConfig) -> int:
    """Chooses the device and says which it is: the first thing that every run does. Returns the number of devices.

    Raises:
        UserError: there is no such device, an accelerator would lie idle, or the package of a tracker is missing.
    """
    trackers.check(config.track)
    devices.choose(config.device, config.processes)
    setup.enable_compilation_cache()
    print(setup.devices_line(config.compute), flush=True)
    return jax.device_count()


@contextlib.contextmanager
def _limits_said(path: str) -> Iterator[None]:
    """What the machine lacks, as a sentence; what the loop needs of memory it has said itself."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingFault(
            "out of memory outside of the steps, where models are put on the device: take a smaller --model, "
            "--lora.rank 8, which needs no second copy for the reference, or more devices. XLA said: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        raise TrainingFault(f"{path}: the disk is full{where}; make room, then go on with --resume") from error


@contextlib.contextmanager
def open_stage(config: RunConfig, name: str, fingerprints: Mapping[str, str]) -> Iterator[Stage]:
    """Takes the run folder and writes config and manifest into it (or compares them on resume).

    Raises:
        UserError: the folder is used or locked, or the run to resume is another one.
        TrainingFault: the disk or the device's memory is full, now or at any time while the stage is open.
    """
    path = config.output_dir or f"runs/{name}"
    with _limits_said(path), runs.open_run(path, resume=config.resume, overwrite=config.overwrite) as run:
        text = to_yaml(dataclasses.replace(config, resume=False, overwrite=False, allow_changed=(), processes=None))
        data = dict(fingerprints)
        if config.model is not None and Path(config.model).is_dir():
            data["model"] = manifest.fingerprint(config.model)
        if config.tokenizer.name is not None and Path(config.tokenizer.name).is_dir():
            data["tokenizer"] = manifest.fingerprint(config.tokenizer.name)
        if name in RL_STAGES:
            for entry in (*config.reward, *config.rl.judge):
                data |= {
                    f"reward {n}": manifest.fingerprint(path) for n, path in reward_functions.sources(entry).items()
                }
        trained_tokenizer = config.model is None and config.tokenizer.name is None

        def describe() -> None:
            changed = manifest.check_unchanged(
                run,
                config=text,
                data_fingerprints=data,
                may_change=MAY_CHANGE,
                allowed=config.allow_changed,
                fixed=(*FIXED, "data") if trained_tokenizer else FIXED,
            )
            if changed or not run.resumed:
                manifest.write_config(run, text)
            manifest.write_manifest(
                run, seed=config.seed, data_fingerprints=data, extra={"stage": name}, changed=changed
            )

        processes.in_first(describe)
        yield Stage(config, name, run, sharding.make_mesh())
