"""One stage of a run while it is open: its folder, its devices, its random streams."""

import contextlib
import dataclasses
import errno
import functools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import yaml
from jax import Array
from jax.sharding import Mesh
from jax.tree_util import Partial

from rlhf_jax import models
from rlhf_jax.config import RunConfig, to_yaml
from rlhf_jax.errors import TrainingFault, UserError, disk_fault, logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.models import hf
from rlhf_jax.parallel import blocks, sharding
from rlhf_jax.report import page, records, verdict
from rlhf_jax.runs import (
    allocator,
    devices,
    folder,
    keeping,
    manifest,
    objects,
    processes,
    trackers,
    writing,
)
from rlhf_jax.training.common import initial, layout, memory
from rlhf_jax.training.common.initial import Trainable, sampling_config
from rlhf_jax.types import Params, PolicyFn, TrainState

Tree = TypeVar("Tree")
State = TypeVar("State", bound=TrainState)
Stream = Literal["init", "data", "rollout", "update", "eval"]

# A resumed run may change these settings and stays the same run.
MAY_CHANGE = (
    "resume",
    "overwrite",
    "allow_changed",
    "output_dir",
    "device",
    "processes",
    "mesh",
    "compute.offload",
    "track",
    "keep_last",
    "checkpoint_interval",
    "checkpoint_async",
    "engine",
)
# --allow-changed cannot change these: the checkpoint would not fit, or its token ids would mean
# other texts.
FIXED = (
    "model",
    "network",
    "lora",
    "tokenizer",
    "reward_model.ensemble_size",
    "ppo.value",
    "ppo.value_from",
    *(f"{name}.optimizer.frozen" for name in ("sft", "reward_model", "dpo", "kto", "rl")),
)


class RunResult(NamedTuple):
    """The folders of a finished run, and its metrics."""

    folder: Path
    model_folder: Path
    metrics: dict[str, Any]  # of the last step, or of the best one with ``keep_best``
    rows: list[dict[str, Any]]  # of metrics.jsonl: each step's, with its "step" and validation


@dataclasses.dataclass(frozen=True)
class Stage:
    """An open run folder with the devices and keys of its stage."""

    config: RunConfig
    name: str
    run: folder.Run
    mesh: Mesh
    held: dict[str, Any] = dataclasses.field(default_factory=dict)
    """{name: pytree of shapes} of the arrays on the devices, for the message when memory runs out;
    see ``hold``.
    """

    @property
    def num_parts(self) -> int:
        """The number of parts of a batch's rows: blocks, or devices."""
        return self.config.compute.blocks or sharding.num_parts(self.mesh)

    def key(self, name: Stream) -> Array:
        """The key of one of the stage's random streams."""
        return stream(self.config.seed, self.name, name)

    @property
    def row_mesh(self) -> Mesh | None:
        """The mesh over which programs shard rows; None with ``compute.blocks``, see ``jit``."""
        return None if self.config.compute.blocks else self.mesh

    @property
    def rows(self) -> jax.sharding.NamedSharding | None:
        """The sharding of rows inside programs, over ``row_mesh``."""
        return None if self.row_mesh is None else sharding.rows(self.row_mesh)

    def shard(self, batch: Tree) -> Tree:
        """The batch with its rows sharded over the devices; with ``compute.blocks``, replicated."""
        if self.config.compute.blocks:
            return sharding.replicate(self.mesh, batch)
        return sharding.shard_rows(self.mesh, batch)

    def jit(self, program: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """``jax.jit(program)``; with ``compute.blocks`` each device runs it on whole arrays, and
        the passes of networks in it block by block (``blocks.replicated``).
        """
        count = self.config.compute.blocks
        if count:
            program = blocks.replicated(program, self.mesh, count)
        return jax.jit(program, **options)

    def copy(self, tree: Tree) -> Tree:
        """A copy, sharded over the mesh. It never shares buffers, since updates donate theirs."""
        return self.lay_out(jax.tree.map(functools.partial(jnp.array, copy=True), tree))

    def lay_out(self, tree: Tree) -> Tree:
        """Parameters, or a state with them, sharded over the mesh."""
        return jax.tree.map(sharding.place, tree, layout.shardings(self.mesh, tree))

    def take(self, create: Callable[[Params], State], params: Params) -> State:
        """``create(params)`` in new arrays, sharded over the mesh. The arrays of ``params`` are
        freed.

        It is one program, which compiles faster than a program for each operation.
        """
        placed = self.lay_out(params)
        state = jax.jit(
            create, out_shardings=layout.shardings(self.mesh, jax.eval_shape(create, placed))
        )(placed)
        memory.free((params, placed))
        parts = state.params if "policy" in state.params else {"parameters": state.params}
        trained = {f"trained {part}": tree for part, tree in parts.items()}
        self.hold(trained | {"optimizer state": state.opt_state, "gradients": state.params})
        return state

    def choose_remat(
        self, language_model: LanguageModel, rows: int, length: int, networks: int = 1
    ) -> tuple["Stage", LanguageModel]:
        """The stage and the model with ``compute.remat`` true or false where it was auto; depth and
        memory decide, and the choice is printed and recorded.

        Args:
            rows: of a microbatch, over all devices.
            length: the most columns of a row.
            networks: of this size that are trained.
        """
        compute = self.config.compute
        model = language_model.model
        if compute.remat != "auto":
            return self, language_model
        remat = False
        # A user's own network has no remat. With blocks the bits must not depend on the memory.
        is_open = hasattr(model.config, "remat") and not compute.blocks
        if is_open and model.config.num_layers >= initial.DEEP:
            own_rows = -(-rows // self.num_parts)
            params = self.shapes(language_model.params)
            trained = initial.trained_shapes(self.config.lora, params)
            to_come = networks * memory.COPIES * memory.on_device(self.shapes(trained))
            room = memory.Room(devices.free_memory(), to_come)
            stored = memory.stored(model.config, own_rows, length)
            shape = (own_rows * self.num_parts, length)
            compiled = functools.partial(
                memory.temporaries, model, params, *shape, sharding.rows(self.mesh)
            )
            remat = memory.wants_remat(room, stored, compiled)
            line = f"compute: scan_layers {compute.scan_layers}, remat {remat}".lower()
            logger.info(f"{line} ({memory.reason(room, stored, own_rows, remat)})")
        compute = dataclasses.replace(compute, remat=remat)
        stage = self.recorded(dataclasses.replace(self.config, compute=compute))
        if remat:
            model = models.build(dataclasses.replace(model.config, remat=True))
        return stage, language_model._replace(model=model)

    def shapes(self, params: Params) -> Params:
        """The shapes of parameters, laid out over the mesh."""
        arrays = jax.eval_shape(lambda tree: tree, params)
        where = layout.shardings(self.mesh, arrays)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays, where
        )

    def recorded(self, config: RunConfig) -> "Stage":
        """The stage with settings that were decided, which it writes to config.yaml."""
        text = _settings(config)
        processes.in_first(lambda: _write_settings(self.run, text))
        return dataclasses.replace(self, config=config)

    def hold(self, trees: Mapping[str, Any]) -> None:
        """Records the shapes of arrays on the devices, by name."""
        self.held.update({name: memory.shapes(tree) for name, tree in trees.items()})

    def jit_update(self, update: Callable[..., Any], num_blocks: int) -> Callable[..., Any]:
        """Jits ``update(state, ...) -> (state, metrics)``: the state is donated, and the new one
        has its sharding.

        num_blocks: as in ``devices.compiler_options``.
        """

        def update_in_place(state: Any, *args: Any, **options: Any) -> Any:
            state, metrics = update(state, *args, **options)
            if self.config.compute.blocks:
                return state, metrics
            state = jax.lax.with_sharding_constraint(state, layout.shardings(self.mesh, state))
            return state, jax.lax.with_sharding_constraint(metrics, sharding.replicated(self.mesh))

        return self.jit(
            update_in_place, donate_argnums=0, compiler_options=devices.compiler_options(num_blocks)
        )

    def place(self, start: Trainable) -> Trainable:
        """``start`` with its frozen part on the devices, not copied: no update donates it."""
        return start if start.base is None else start._replace(base=self.lay_out(start.base))

    def reference(self, start: Trainable, policy_fn: PolicyFn, moves: bool = False) -> Partial:
        """The policy before training, with its parameters as they were loaded, in their file's
        dtype: no copy. If it ``moves``, a function of the trained part, which is in the state.
        """
        if moves:
            memory.free(start.loaded)
            return start.bind(policy_fn)
        if start.base is None:
            return self.frozen("reference", Partial(policy_fn, start.loaded))
        if "reference" in self.config.compute.offload:
            raise UserError(
                "compute.offload: under LoRA the reference is the frozen weights, which stay; "
                "leave it out"
            )
        return Partial(policy_fn, start.base)

    def frozen(self, name: str, fn: Any) -> Any:
        """The arrays of a model that is not trained, on the devices. If ``compute.offload`` names
        the model, they stay in the host's memory while it is not called.
        """
        placed = self.lay_out(fn)
        if name not in self.config.compute.offload:
            return placed
        on_host = memory.offloaded(placed)
        memory.free((fn, placed))
        return on_host

    def finish(
        self,
        begun: LanguageModel,
        start: Trainable,
        trained: Mapping[str, Params],
        metrics: dict[str, Any],
        save: Callable[..., None] = LanguageModel.save,
        samples: bool = False,
    ) -> RunResult:
        """Saves ``model/`` with its tokenizer, LoRA's adapters merged in and in ``adapter/`` too;
        draws ``report.html``.

        Args:
            trained: {folder below ``model/`` and ``adapter/``: trained parameters}; "" is these
                folders themselves.
            save: ``save(language_model, folder, template=, config=)``.
            samples: whether the stage samples by ``config.rl``, as the folder then tells others to.
                Any other stage leaves them what the author of its model wrote, if anything.
        """
        allocator.give_back()  # of the last step, before saving makes copies
        if jax.process_count() > 1:  # only the first process computes from here on
            base, trained = processes.fetch((start.base, trained))
            start = start._replace(base=base)
        run = self.run
        template = self.config.text.template
        is_author_heard = not samples and begun.tokenizer.generation
        how = None if is_author_heard else sampling_config(self.config.rl, begun.tokenizer)

        def write() -> None:
            saved = [run.model]
            with writing.replacing(run.model) as new:
                for name, part in trained.items():
                    done = begun._replace(params=start.merged(part))
                    save(done, new / name, template=template, config=how)
            if start.base is not None:
                saved.append(run.adapter)
                self._save_adapters(begun, start.base, trained)
            logger.info(f"saved {', '.join(map(str, saved))}")
            _draw_page(run)

        processes.in_first(write)
        return RunResult(run.path, run.model, metrics, records.read_rows(run.metrics))

    def _save_adapters(
        self, begun: LanguageModel, base: Params, trained: Mapping[str, Params]
    ) -> None:
        source = str(self.config.model)
        pad = begun.model.config.pad_token_id
        named = hf.read_config(hf.find_folder(source)).pad_token_id
        with writing.replacing(self.run.adapter) as new:
            for name, part in trained.items():
                adapters = jax.device_get(part)
                is_misread = "score" in adapters and pad != named
                place = f"pads_with_{pad}" if is_misread else ""
                base_model = None if is_misread else self.config.model
                models.lora.save(new / name / place, base, adapters, base_model=base_model)
                begun.save_tokenizer(new / name, self.config.text.template)
                if is_misread:
                    text = _MISREAD.format(base=source, pad=pad, place=place)
                    (new / name / "README.md").write_text(text, encoding="utf-8")


_MISREAD = """# Adapters of a reward model

transformers takes a reward model's score at the last token that is no pad. The padding token of
the base model, `{base}`, also ends an answer, or it has none: loaded as it is, the base would give
scores of another token. So the adapters lie in `{place}`, where PEFT finds them only if it is told,
and name no base model. Load both with another padding token:

```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained(
    "{base}", num_labels=1, pad_token_id={pad}
)
model = PeftModel.from_pretrained(base, "adapter", subfolder="{place}")
```

The folder `model/` beside this one has the adapters merged and needs none of this.
"""


def _draw_page(run: folder.Run) -> None:
    """Draws ``report.html`` and prints a sentence about the result, or why it cannot."""
    try:
        page.write([run.path], run.report)
        logger.info(f"saved {run.report}")
        [group] = records.groups(records.find([run.path]))
        answers = verdict.rewarded(group)
        titled = ["Rewarded, for example:", *answers] if answers else []
        logger.info("\n    ".join([verdict.sentence(group), *titled]))
    except Exception as error:  # whatever it is: the run is done and its result saved
        logger.info(f"{run.report} could not be drawn: {type(error).__name__}: {error}")


def stream(seed: int, stage: str, name: Stream) -> Array:
    """The key of a named stream: the run's root key, folded with the names of stage and stream."""
    root = jax.jit(jax.random.key, static_argnums=0)(seed)
    of_stage = jax.random.fold_in(root, zlib.crc32(stage.encode()))
    return jax.random.fold_in(of_stage, zlib.crc32(name.encode()))


def set_up(
    config: RunConfig, folders: Iterable[Path] = (), threads: int | None = None
) -> RunConfig:
    """Chooses the device and prints which it is: the first thing that every run does.

    Returns the settings with ``model/`` in place of a run's folder in ``config.model``.

    Args:
        folders, threads: as in ``choose_devices``.

    Raises:
        UserError: there is no such device, an accelerator would lie idle, the mesh fits neither the
            devices nor the model, or the package of a tracker is missing.
    """
    trackers.check(config.track)
    choose_devices(config, folders, threads)
    enable_compilation_cache()
    dtype = config.compute.dtype
    used = "bfloat16 in place of float16, whose range overflows in training without loss scaling"
    parts = [f"{jax.default_backend()}: {jax.device_count()} x {jax.devices()[0].device_kind}"]
    if config.model:
        config = dataclasses.replace(config, model=hf.model_folder(config.model))
    mesh = layout.mesh_of(config)
    if sharding.is_cut(mesh):
        parts.append(" x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))
    parts.append(used if dtype == "float16" else dtype)
    _say_once(", ".join(parts))
    if jax.default_backend() == "gpu" and not config.deterministic:
        _say_once(
            "the bits may differ from run to run on a GPU; --deterministic keeps them the same"
        )
    layout.check(config, mesh)
    return config


_say_once = functools.cache(logger.info)


def run_folder(config: RunConfig, name: str) -> Path:
    """The folder of a stage's run."""
    return Path(config.output_dir or f"runs/{name}")


def choose_devices(config: RunConfig, folders: Iterable[Path], threads: int | None = None) -> None:
    """``devices.choose`` by the settings. A run that is resumed gets as many threads as it had, on
    any number of cores, since its bits depend on them; with ``compute.blocks`` there are as many as
    blocks.

    Args:
        folders: of the run, or of a pipeline's stages, of which the first that was begun decides.
        threads: of the run that is repeated; None: of the one that is resumed.
    """
    if config.resume and threads is None:
        recorded = map(manifest.threads_of, folders)
        threads = next(filter(None, recorded), None)
    devices.choose(
        config.device,
        config.processes,
        deterministic=config.deterministic,
        threads=config.compute.blocks or threads,
    )


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, in ``JAX_COMPILATION_CACHE_DIR`` or the user's cache
    folder.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "rlhf_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def open_stage(
    config: RunConfig,
    name: str,
    fingerprints: Mapping[str, str],
    sizes: Mapping[str, int] = {},
    files: Mapping[str, Path] = {},
    given: Mapping[str, Any] = {},
) -> Iterator[Stage]:
    """Takes the run folder and writes config and manifest into it (or compares them on resume).

    Args:
        fingerprints: of the data.
        sizes: {dotted setting: value} of the settings that help when memory runs out, such as
            {"sft.batch_size": 32}.
        files: {name: path} of the other files that the stage reads, beside ``config.model`` and the
            tokenizer.
        given: {name: function, object or module} that Python gives to the stage, such as "reward"
            and "optimizer", or None. See ``runs.objects``.

    Raises:
        UserError: the folder is used or locked, or the run to resume is another one.
        TrainingFault: the disk or the device's memory is full, now or at any time while the stage
            is open.
    """
    path = run_folder(config, name)
    with folder.open_run(path, resume=config.resume, overwrite=config.overwrite) as run:
        if run.resumed:
            processes.in_first(lambda: keeping.restore_start(run))
        config = _decided(config, run)
        stage = Stage(config, name, run, layout.mesh_of(config))
        with _explained(stage, sizes):
            processes.in_first(lambda: _describe(stage, fingerprints, files, given))
        is_set = sharding.is_set(stage.mesh)
        mesh = jax.set_mesh(stage.mesh) if is_set else contextlib.nullcontext()
        precision = config.compute.matmul_precision
        precise = jax.default_matmul_precision(precision) if precision else contextlib.nullcontext()
        with _explained(stage, sizes), mesh, precise:
            yield stage


@contextlib.contextmanager
def _explained(stage: Stage, sizes: Mapping[str, int]) -> Iterator[None]:
    """Turns errors of a full disk, of full memory and of a lost process into TrainingFaults."""
    try:
        yield
    except OSError as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = (
            "the disk is full; make room" if is_full else "the disk cannot be used; repair this"
        )
        raise TrainingFault(
            f"{stage.run.path}: {advice}, then go on with --resume ({fault})"
        ) from error
    except (jax.errors.JaxRuntimeError, ValueError, MemoryError, memory.TooLarge) as error:
        if processes.is_lost(error):
            raise TrainingFault(
                f"{stage.name}: another process has gone; start all of them again, --resume"
            ) from error
        # XLA raises a ValueError if memory runs out while arrays are placed on a GPU.
        is_full = isinstance(error, MemoryError | memory.TooLarge)
        is_full = is_full or "RESOURCE_EXHAUSTED" in str(error)
        if not is_full:
            raise
        switches = {
            "lora.rank": stage.config.lora.rank,
            "compute.remat": int(stage.config.compute.remat is True),
        }
        off = {setting: value for setting, value in switches.items() if not value}
        raise memory.fault(stage.name, stage.held, {**sizes, **off}, error) from error


def _decided(config: RunConfig, run: folder.Run) -> RunConfig:
    """The settings without auto. A resumed run gets the recorded values, so that it continues in
    the same way on any machine; a new run gets ``compute.scan_layers`` by depth. The matrix
    products of a deterministic run are in full precision unless ``compute.matmul_precision`` is
    set.
    """
    compute = config.compute
    if run.resumed:
        try:
            recorded = yaml.safe_load(run.config.read_bytes())["compute"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            recorded = {}  # check_unchanged reports what is wrong
        for key in ("scan_layers", "remat", "share_prompts"):
            value = recorded.get(key) if isinstance(recorded, dict) else None
            if getattr(compute, key) == "auto" and isinstance(value, bool):
                changes: dict[str, Any] = {key: value}
                compute = dataclasses.replace(compute, **changes)
    if compute.scan_layers == "auto":
        compute = initial.by_depth(compute, initial.num_layers(config))
    if config.deterministic and compute.matmul_precision is None:
        compute = dataclasses.replace(compute, matmul_precision="highest")
    return dataclasses.replace(config, compute=compute)


def _settings(config: RunConfig) -> str:
    """The text of config.yaml."""
    own = dataclasses.replace(
        config, resume=False, overwrite=False, allow_changed=(), processes=None
    )
    return to_yaml(own)


def _write_settings(run: folder.Run, text: str) -> None:
    writing.write_atomically(run.config, text)
    keeping.keep_start(run)


def fingerprints_of(config: RunConfig, files: Mapping[str, Path]) -> dict[str, str]:
    """The sha256 of the model, the tokenizer and other ``files`` that a stage reads, by name."""
    models_read = {"model": config.model, "tokenizer": config.tokenizer.name}
    folders = {
        key: Path(source) for key, source in models_read.items() if source and Path(source).is_dir()
    }
    sources = {**files, **folders}
    return {key: manifest.fingerprint(path) for key, path in sources.items()}


def _describe(
    stage: Stage,
    fingerprints: Mapping[str, str],
    files: Mapping[str, Path],
    given: Mapping[str, Any],
) -> None:
    """Writes the run's settings, files and given objects, or compares them with those of the run to
    resume.
    """
    config = stage.config
    run = stage.run
    text = _settings(config)
    data = {**fingerprints, **fingerprints_of(config, files)}
    python = {key: objects.describe(value) for key, value in given.items() if value is not None}
    _report_unknown(python)
    # If the run trained its tokenizer on the data, other data would give another tokenizer.
    fixed = (*FIXED, "data") if config.model is None and config.tokenizer.name is None else FIXED
    changed = manifest.check_unchanged(
        run,
        config=text,
        data=data,
        given=python,
        may_change=MAY_CHANGE,
        allowed=config.allow_changed,
        fixed=fixed,
    )
    facts = {"seed": config.seed, "data": data, "stage": stage.name}
    if config.compute.blocks:
        facts["moves"] = manifest.EXACT
    if python:
        facts["given"] = python
    manifest.write_manifest(run, facts, changed=changed, mesh=dict(stage.mesh.shape))
    if changed or not run.resumed:
        writing.write_atomically(run.config, text)
    keeping.keep_start(run)


def _report_unknown(python: dict[str, Any]) -> None:
    """Names the given objects that cannot be fingerprinted."""
    for name, description in python.items():
        parts = manifest.dotted({name: description})
        unknown = [
            f"{key} ({value.removeprefix(objects.UNKNOWN).removeprefix(': ')})"
            for key, value in parts.items()
            if isinstance(value, str) and value.startswith(objects.UNKNOWN)
        ]
        if unknown:
            logger.info(
                f"manifest.json: {', '.join(unknown)} cannot be fingerprinted; --resume does not "
                "notice if it changes"
            )
