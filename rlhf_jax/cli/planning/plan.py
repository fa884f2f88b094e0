"""``rlhf-jax plan``: the memory that a stage would hold on each device, and need on top in each
phase. It allocates nothing.

The held memory is exact: shapes, dtypes and shardings are those of a run. The memory of a phase is
XLA's ``memory_analysis`` of the run's own programs, compiled for as many fake CPU devices with
shapes in place of arrays. They are compiled in float32, since a CPU has no bfloat16 products. For
another ``compute.dtype`` the memory of a phase is halved, except for the update's float32 arrays:
gradients, and as much again while the optimizer runs.

With ``--target`` the programs are compiled by the compiler of that accelerator, as for a run on
it, and nothing is estimated: see ``targets`` and ``hlo``.
"""

import contextlib
import dataclasses
import functools
import math
import re
import time
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import iteration, models, ops, training
from rlhf_jax.algorithms import distill, dpo, grpo, kto, ppo, reward_model, rloo, sft, vpg
from rlhf_jax.cli.console import show
from rlhf_jax.cli.planning import hlo, targets
from rlhf_jax.cli.stages import STAGES
from rlhf_jax.config import RLStage, RunConfig, command_line, parse
from rlhf_jax.data import batches
from rlhf_jax.data.encoding import encode_texts
from rlhf_jax.data.rows import Kind, texts
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders import spec
from rlhf_jax.models import hf
from rlhf_jax.parallel import sharding
from rlhf_jax.runs import devices
from rlhf_jax.sampling import SamplingConfig, decoding
from rlhf_jax.training.common import initial, layout, memory, references, shared_prompts
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.optimizer import make_optimizer
from rlhf_jax.training.common.stage import Stage
from rlhf_jax.training.rl import critic
from rlhf_jax.training.rl import teacher as teachers
from rlhf_jax.training.rl.method import completed, penalty_of
from rlhf_jax.training.rl.programs import rules
from rlhf_jax.training.rl.sharing import Answers, saved
from rlhf_jax.training.supervised import tasks
from rlhf_jax.types import (
    AlgorithmConfig,
    Comparisons,
    Demonstrations,
    Feedback,
    Metrics,
    Params,
    TrainState,
)

RL = {"ppo": completed(ppo), "vpg": completed(vpg), "rloo": completed(rloo)}
RL |= {"grpo": completed(grpo), "distill": completed(distill)}
PAIRS = ("reward_model", "dpo")  # two answers in each row
SUPERVISED: dict[str, Any] = {"sft": sft, "reward_model": reward_model, "dpo": dpo, "kto": kto}
# The advice if no flag lowers the peak.
OTHERWISE = "shorter texts, a smaller batch, or more devices with mesh.fsdp"
# Of the compiler: optimized code takes longer to compile and needs the same memory.
OPTIONS = {"xla_backend_optimization_level": 0}

# Bytes of a process beside its arrays: Python, JAX, the tokenizer, compiled programs. Measured in
# docs/notes/measurements.md.
PROCESS = 2**29

SAMPLING = "sample and score"  # the phase with the loop over tokens
ANSWERS = ("answer",)  # the column that ``--reward math`` asks the data for
Program = tuple[Any, ...]  # a function, its arguments


class Shapes(NamedTuple):
    """What a stage has on its devices, with shapes in place of arrays."""

    held: dict[str, Any]  # {name: tree}
    programs: dict[str, Program]  # by phase
    known: dict[str, Any]  # {name: tree} of arrays inside the programs


class Figures(NamedTuple):
    """What one phase's program does, by the compiler of its target."""

    work: hlo.Work  # on each device
    flops: float  # on each device
    seconds: float  # at least, by the target's products and bandwidth
    custom_calls: dict[str, int]  # {name: how many are in the program}


class Plan(NamedTuple):
    """Bytes on each device."""

    held: dict[str, int]  # all the time, by what it is
    phases: dict[str, int]  # on top while a phase runs: gradients, activations, the sampler's cache
    parts: dict[str, int]  # of the phases, what is known exactly: gradients, the cache
    figures: dict[str, Figures]  # of the phases, where a target's compiler made their programs

    @property
    def peak(self) -> int:
        """The most at any time."""
        return sum(self.held.values()) + max(self.phases.values())


@dataclasses.dataclass(frozen=True)
class Case:
    """A stage that is planned, for a target or for this machine's CPU."""

    config: RunConfig
    name: str
    target: targets.Target | None

    @property
    def own(self) -> Any:
        """The section of the stage."""
        return getattr(self.config, self.name)

    @property
    def settings(self) -> Any:
        """The section with its data and its batch size."""
        return self.config.rl if self.name in RL else self.own

    @property
    def mesh(self) -> Mesh:
        """The mesh of the run, on the target's devices if there is one."""
        if self.target is None:
            return layout.mesh_of(self.config)
        return sharding.make_mesh(**self.config.mesh.axes, devices=self.target.devices)

    @property
    def num_answers(self) -> int:
        """The answers of a comparison that compute their prompt once; 0: none do."""
        return 2 * (self.name in PAIRS and self.config.compute.share_prompts is True)

    @property
    def texts_of_row(self) -> int:
        """The texts that one row of a batch's arrays holds."""
        return self.num_answers or 1

    def shared_by(self, prompt: int) -> int:
        """How many rows of an RL run compute their prompt of so many tokens once."""
        blocks = self.config.compute.blocks
        sharers = {"compute.blocks": blocks or sharding.num_parts(self.mesh)}
        answers = Answers(self.name, self.own, prompt, takes_groups=True, sharers=sharers)
        return answers.group_size(self.config)

    @property
    def stage(self) -> Stage:
        """The stage, without a folder."""
        return Stage(self.config, self.name, None, self.mesh)  # type: ignore[arg-type]

    def in_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Sets the mesh, by which networks know what platform they are for."""
        is_needed = self.target is not None or sharding.is_set(self.mesh)
        return jax.set_mesh(self.mesh) if is_needed else contextlib.nullcontext()

    def computed(self, tree: Any) -> Any:
        """The shapes as a program gets them: a CPU's with float32 in place of shorter floats."""
        return _widened(tree) if self.target is None else tree

    def spread(self, tree: Any) -> Any:
        """The shapes of a batch, its rows over the devices."""
        rows = sharding.rows(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), tree)

    def laid_out(self, tree: Any) -> Any:
        """The shapes of parameters, or of a state with them, on the devices as the mesh says."""
        arrays = jax.eval_shape(lambda tree: jax.tree.map(jnp.asarray, tree), tree)
        where = layout.shardings(self.mesh, arrays)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays, where
        )

    def policy(self) -> tuple[models.Model, Params]:
        """The model that is trained, its parameters as ``lora.base`` says."""
        model, params = self.model(self.config.model)
        base = functools.partial(initial.base_of, self.config.lora)
        return model, jax.eval_shape(base, params)

    def model(self, source: str | None) -> tuple[models.Model, Params]:
        """A model, and the shapes of its parameters in the dtype that config.json names.

        It computes as a run on the target does, or in float32 as a CPU can.
        """
        dtype = "float32"
        if source is None:
            network = dataclasses.asdict(self.config.network)
            del network["dropout"]
            config: Any = models.GPT2Config(self.config.tokenizer.vocab_size, **network)
        else:
            folder = hf.find_folder(hf.model_folder(source))
            config = hf.read_config(folder)
            keys = hf.read_json(folder / hf.CONFIG)
            dtype = keys.get("dtype") or keys.get("torch_dtype") or dtype
        compute = initial.by_depth(self.config.compute, config.num_layers)
        how: dict[str, Any] = {"attention": compute.attention, "compute_dtype": compute.dtype}
        if self.target is None:
            runs_here = compute.attention in ("auto", "xla")
            how = {"attention": compute.attention if runs_here else "blockwise"}
        how |= {"remat": compute.remat is True, "scan_layers": compute.scan_layers}
        model = models.build(dataclasses.replace(config, **how))
        params = jax.eval_shape(model.init, jax.random.key(0))
        return model, jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), params
        )


def plan(
    config: RunConfig,
    name: str,
    length: int | None = None,
    target: targets.Target | None = None,
) -> Plan:
    """The memory that the stage ``name`` of a run needs on each of JAX's devices, or of a target's.

    Args:
        length: tokens of a row, or of a prompt in RL; None: the most that the model reads, or
            ``rl.max_prompt_length``.

    Raises:
        UserError: no such stage, no length of prompts, an ensemble to be trained, a length that the
            model cannot read, a mesh or microbatches that do not fit; or as the run itself. With a
            target: a program does not fit its memory.
    """
    shapes, programs, known = shapes_of(config, name, length, target)
    sizes = {part: memory.on_device(tree) for part, tree in shapes.items()}
    held = {part: size for part, size in sizes.items() if size}
    is_halved = target is None and config.compute.dtype != "float32"
    scale = 0.5 if is_halved else 1.0
    parts = {"gradients": held["parameters"]}
    for part, tree in known.items():
        parts[part] = int(scale * memory.on_device(tree))
    used = {}
    figures = {}
    for phase, program in programs.items():
        compiled = compile_phase(config, name, phase, program, target)
        needed = memory.needed(compiled)
        if target is not None:
            turns = config.rl.max_new_tokens if phase == SAMPLING else None
            figures[phase] = _figures(turns, compiled, program, target)
        # Gradients, and as much again while the optimizer runs, are float32 in every run.
        exact = min(needed, 2 * parts["gradients"]) if phase == "learn" else 0
        used[phase] = int(exact + scale * (needed - exact))
    first = next(iter(used))
    if "reference" in config.compute.offload:
        used[first] += held.pop("reference", 0)
    if "reward" in config.compute.offload and "reward models" in held:
        used["reward"] += held.pop("reward models")
    return Plan(held, used, parts, figures)


def compile_phase(
    config: RunConfig,
    name: str,
    phase: str,
    program: tuple[Any, ...],
    target: targets.Target | None = None,
    options: dict[str, Any] | None = None,
) -> jax.stages.Compiled:
    """The program of a phase, compiled in float32 for this machine's CPU, or for a target with
    ``options`` of XLA.

    Raises:
        UserError: it does not fit the target's memory.
    """
    fn, *arguments = program
    case = Case(config, name, target)
    jitted: Any = case.stage.jit_update(fn, 1) if phase == "learn" else jax.jit(fn)
    if target is None:
        options = OPTIONS
    else:
        logger.info(f"compiling the phase {phase!r} for {target.name}")
    started = time.monotonic()
    try:
        with case.in_mesh():
            compiled: jax.stages.Compiled = jitted.lower(*case.computed(arguments)).compile(options)
    except jax.errors.JaxRuntimeError as error:
        if target is None or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).partition("\n")[0]
        raise UserError(
            f"{name} does not fit {target.name}: its compiler says of the phase {phase!r}: "
            f"{first}; what helps: more --{name.replace('_', '-')}.num-microbatches, "
            f"--compute.remat, --lora.rank 8, or {OTHERWISE}"
        ) from error
    if target is not None:
        logger.info(f"compiled in {time.monotonic() - started:.0f} s")
    return compiled


def _figures(
    turns: int | None,
    compiled: jax.stages.Compiled,
    program: tuple[Any, ...],
    target: targets.Target,
) -> Figures:
    """What a compiled program does, and the time that the target needs for it at least.

    Args:
        turns: as in ``hlo.work``.
    """
    text = compiled.as_text() or ""
    work = hlo.work(text, turns)
    fn, *arguments = program
    # Traced for no platform, so that attention is the plain formula's products.
    traced = jax.make_jaxpr(fn)(*jax.tree.map(_unplaced, arguments))
    operations = hlo.flops(traced.jaxpr, turns or 1) / len(target.devices)
    seconds = max(operations / target.flops, work.bytes / target.bandwidth)
    return Figures(work, operations, seconds, hlo.custom_calls(text))


def _unplaced(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf


def shapes_of(
    config: RunConfig,
    name: str,
    length: int | None = None,
    target: targets.Target | None = None,
) -> Shapes:
    """The arrays on the devices and the programs of a stage; see ``plan``."""
    stages = (*SUPERVISED, *RL)
    if name not in stages:
        raise UserError(f"rlhf-jax plan: no stage {name!r}; there are {', '.join(stages)}")
    if name == "reward_model" and config.reward_model.ensemble_size > 1:
        raise UserError(
            "rlhf-jax plan: reward_model.ensemble_size must be 1; members take as much each, save "
            "the base"
        )
    if config.compute.blocks or config.mesh.sampling:
        raise UserError(
            "rlhf-jax plan: compute.blocks and mesh.sampling are not planned; leave them out"
        )
    case = Case(config, name, target)
    layout.check(config, case.mesh)
    cuts = ("num_minibatches", "num_microbatches")
    section = "rl" if name in RL else name
    layout.check_divides(
        f"{section}.batch_size",
        case.settings.batch_size,
        {"devices": sharding.num_parts(case.mesh)},
        {f"{name}.{key}": getattr(case.own, key, 1) for key in cuts},
    )
    return _reinforcement(case, length) if name in RL else _supervised(case, length)


def _fitting(model: models.Model, length: int | None, texts: int = 1) -> int:
    """The length of a row of so many texts, by default the most that the model reads."""
    most = texts * model.config.max_length
    if (length or most) > most:
        raise UserError(
            f"rlhf-jax plan: rows of {length} tokens are longer than the {most} that the model "
            "reads"
        )
    return length or most


def longest(config: RunConfig, name: str) -> int | None:
    """Columns of the widest batch of a run's data, or in RL of its longest prompt, as the run's
    tokenizer reads it: that of ``config.model`` or ``config.tokenizer.name``, or one that is
    trained on the data as the run does.

    None without data, for a text that is cut into pieces as long as the model reads, and where
    ``rl.max_prompt_length`` is given.
    """
    return with_data(config, name)[1]


def with_data(config: RunConfig, name: str) -> tuple[RunConfig, int | None]:
    """The settings with ``compute.share_prompts`` as a run on its data chooses it for comparisons,
    and ``longest``.
    """
    bounded = name in RL and config.rl.max_prompt_length is not None
    if bounded or name not in (*SUPERVISED, *RL):
        return config, None
    if config.model is not None:
        config = dataclasses.replace(config, model=hf.model_folder(config.model))
    case = Case(config, name, None)
    settings = case.settings
    if not (settings.data or config.data):
        return config, None
    kind: Kind = "prompts" if name in RL else getattr(training, name).SPEC.kind
    read = initial.stage_rows(config, kind, settings.data).rows
    if read[0].is_plain_text:
        return config, None
    model, _ = case.model(config.model)
    if config.model is not None:
        tokenizer = load_tokenizer(config.model)
    else:
        held_out = []
        if settings.validation_data:
            held_out = initial.stage_rows(config, kind, settings.validation_data).rows
        tokenizer = initial.new_tokenizer(config, texts([*read, *held_out]))
    if name in RL:
        language_model = LanguageModel(model, {}, tokenizer)
        return config, int(initial.prompts_for(config, language_model, read).tokens.shape[1])
    most = tasks.longest_text(config, model.config.max_length)
    encoded = encode_texts(
        read,
        tokenizer,
        template=config.text.template,
        max_length=most,
        too_long=config.text.too_long,
    )
    made = tasks.batched(
        config,
        getattr(training, name).SPEC,
        encoded,
        np.arange(len(encoded)),
        jax.random.key(0),
        model.config.num_layers,
    )
    if encoded.num_answers > 1:
        config = shared_prompts.recorded(config, made.encoded.shares_prompts)
    columns = batches.width_of(made.encoded, np.arange(len(encoded)), made.multiple)
    return config, columns


def _of_length(name: str, given: int | None, found: int | None) -> str:
    """Which length a plan is for, and who says so; "" in RL where a setting does."""
    what = "longest prompt" if name in RL else "row"
    if given is not None:
        return f"{what}: {given} tokens (--length)"
    if found is not None:
        return f"{what}: {found} tokens, of the data"
    if name in RL:
        return ""
    return f"{what}: as many tokens as the model reads; --data or --length say how many there are"


def with_remat(
    config: RunConfig,
    name: str,
    length: int | None,
    limit: float,
    target: targets.Target | None = None,
) -> RunConfig:
    """The settings with ``compute.remat`` as a run chooses it where it is auto.

    Args:
        length: as in ``plan``.
        limit: bytes of a device; 0: nobody knows.
    """
    if config.compute.remat != "auto" or name not in (*SUPERVISED, *RL):
        return config
    case = Case(config, name, target)
    model, params = case.model(config.model)
    network = dataclasses.replace(model.config, compute_dtype=config.compute.dtype)
    columns = length or config.rl.max_prompt_length
    if name not in RL:
        columns = _fitting(model, length, case.texts_of_row)
    if columns is None:
        return config
    if name in RL:
        columns += config.rl.max_new_tokens
        rows = config.rl.batch_size // case.own.num_minibatches
        prompt = columns - config.rl.max_new_tokens
        share = saved(prompt, config.rl.max_new_tokens, case.shared_by(prompt))
        rows = math.ceil(rows * (1 - share))
    else:
        rows = (1 + (name in PAIRS and not case.num_answers)) * case.own.batch_size
    rows_at_once = rows // case.own.num_microbatches
    device_rows = -(-rows_at_once // sharding.num_parts(case.mesh))
    stored = memory.stored(network, device_rows, columns)
    is_deep = network.num_layers >= initial.DEEP
    params = case.laid_out(params)
    trained = case.laid_out(initial.trained_shapes(config.lora, params))
    networks = 1 + (name in RL and case.own.value == "separate")
    to_come = networks * memory.COPIES * memory.on_device(trained)
    free = max(limit - memory.on_device(params), 1) if limit else 0
    remat = is_deep and memory.wants_remat(memory.Room(free, to_come), stored, lambda: stored)
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat=remat))


def _widened(tree: Any) -> Any:
    """The shapes with float32 in place of shorter floats."""

    def widened(x: Any) -> Any:
        if not (hasattr(x, "dtype") and x.dtype in (jnp.bfloat16, jnp.float16)):
            return x
        return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)

    return jax.tree.map(widened, tree)


def _reward(case: Case, rows: int | None) -> Any:
    """The part of a run's reward that runs on the devices, with the models' parameters as shapes;
    None if there is no such part.
    """
    entries = [entry for entry in case.config.reward if ".py:" not in entry]
    if not entries:
        return None

    def with_score(params: Params) -> Params:
        return models.add_head(jax.random.key(0), params, "score")

    def load(source: str) -> spec.RewardModel:
        model, params = case.model(source)
        score_fn = ops.by_rows(models.score_fn(model), rows)
        in_groups = functools.partial(initial.scorer_of_groups, model, rows)
        shapes = jax.eval_shape(with_score, params)
        return spec.RewardModel(score_fn, shapes, "", in_groups=in_groups)

    tokenizer: Any = types.SimpleNamespace(fingerprint="", encode=lambda text: [0], decode_raw=repr)
    return spec.build_reward(entries, tokenizer=tokenizer, load=load, columns=ANSWERS).fn


def _teacher(case: Case) -> LanguageModel | None:
    """The teacher of a distillation with its parameters as shapes; None if there is none, or if it
    is on a server.
    """
    if not case.own.needs_teacher or case.own.teacher_server is not None:
        return None
    if case.own.teacher is None:
        raise UserError("rlhf-jax plan: no teacher; give --distill.teacher")
    model, params = case.model(case.own.teacher)
    tokenizer: Any = None  # log-probabilities need none
    return LanguageModel(model, case.laid_out(params), tokenizer)


def _supervised(case: Case, length: int | None) -> Shapes:
    config = case.config
    settings = case.own
    algorithm = SUPERVISED[case.name]
    is_scorer = case.name == "reward_model"
    model, params = case.policy()
    optimizer = make_optimizer(settings.optimizer, 1)

    def first(params: Params) -> tuple[initial.Trainable, TrainState]:
        if is_scorer:
            params = models.add_head(jax.random.key(1), params, "score")
        start = initial.trainable(config.lora, params, jax.random.key(2))
        return start, references.state(settings).create(start.params, optimizer)

    start, state = case.laid_out(jax.eval_shape(first, params))
    make: Any = models.score_fn if is_scorer else models.policy_fn
    model_fn = make(model, num_answers=case.num_answers)
    scored_rows = settings.batch_size * (1 if case.num_answers else 2)
    scored_fn = ops.by_rows(model_fn, memory.score_rows(config.compute, scored_rows, settings))
    moves = references.moves(settings)
    reference = None
    ref_fn = None
    if moves:
        reference = state.reference
        ref_fn = start.bind(scored_fn)
    elif getattr(settings, "needs_reference", False):
        reference = start.loaded
        ref_fn = jax.tree_util.Partial(scored_fn, start.base or start.loaded)

    def learn(
        state: Any, batch: Any, key: jax.Array, bound: Any, ref_fn: Any
    ) -> tuple[Any, Metrics]:
        if moves:
            ref_fn = jax.tree_util.Partial(ref_fn, state.reference)
        if ref_fn is not None:
            batch = algorithm.with_reference(batch, ref_fn)
        return algorithm.update(
            state,
            batch,
            key,
            optimizer=optimizer,
            config=settings,
            minibatch_sharding=sharding.rows(case.mesh),
            **bound,
        )

    batch = case.spread(_batch(case, _fitting(model, length, case.texts_of_row)))
    key = jax.eval_shape(jax.random.key, 0)
    held = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "frozen weights": start.base,
        "reference": reference,
    }
    functions = {"score_fn" if is_scorer else "policy_fn": start.bind(model_fn)}
    if is_scorer and settings.sft_coef:
        functions["policy_fn"] = start.bind(models.policy_fn(model, num_answers=case.num_answers))
    program = (learn, state, batch, key, functions, ref_fn)
    return Shapes(held, {"learn": program}, {})


def _batch(case: Case, length: int) -> Any:
    """A batch of texts, as shapes."""
    shape: tuple[int, ...] = (case.own.batch_size, length)
    if case.name in PAIRS and not case.num_answers:
        shape = (case.own.batch_size, 2, length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    if case.num_answers:
        numbers: Any = jax.ShapeDtypeStruct((shape[0], 1, case.num_answers), jnp.int32)
        return Comparisons(tokens, tokens, tokens, documents=numbers)  # type: ignore[arg-type]
    if case.name in PAIRS:
        return Comparisons(tokens, tokens, tokens)  # type: ignore[arg-type]
    if case.name == "sft":
        return Demonstrations(tokens, tokens, tokens)  # type: ignore[arg-type]
    flags: Any = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    return Feedback(tokens, tokens, tokens, flags)  # type: ignore[arg-type]


def _reinforcement(case: Case, length: int | None) -> Shapes:
    settings = case.config.rl
    own = case.own
    algorithm = RL[case.name]
    model, params = case.policy()
    prompt = _prompt_columns(settings, length)
    _fitting(model, prompt + settings.max_new_tokens)  # or an error
    rows = memory.score_rows(case.config.compute, settings.batch_size, own)
    value = own.value if algorithm.needs_values else None
    start, trained, value_model = _starts(case, params, own, value)
    optimizer = critic.make_optimizer(settings, own, 1, trained.params)

    def first(params: Params, reference: Params | None) -> iteration.LoopState:
        train = algorithm.State.create(params, optimizer)
        return iteration.LoopState.create(train, 0.0, reference)

    moving = start.params if settings.reference_moves else None
    state = case.laid_out(jax.eval_shape(first, trained.params, moving))
    penalty = penalty_of(case.config, algorithm, own)
    has_reference = penalty is not iteration.NO_PENALTY and not settings.reference_moves
    reference = (start.base or start.loaded) if has_reference else moving
    teacher = _teacher(case)
    shared_by = case.shared_by(prompt)
    networks = (model, value_model)
    functions = _functions(case, networks, start, trained, teacher, reference, (prompt, shared_by))
    samples = initial.recorded(initial.drawn(settings, 0, 1), model.config.vocab_size)
    how: Any = {"model": model, "config": samples, "mesh": case.mesh, "score_rows": rows}
    collect = functools.partial(_collected, shared_by=shared_by, **how)
    shape, masked = rules(settings, samples)
    learn = functools.partial(
        iteration.learn,
        algorithm=algorithm,
        config=own,
        optimizer=optimizer,
        shape=shape,
        penalty=penalty,
        masked=masked,
        mesh=case.mesh,
    )
    prompts = case.spread(_prompts(settings.batch_size, prompt))
    key = jax.eval_shape(jax.random.key, 0)
    with case.in_mesh():
        collected, _ = jax.eval_shape(collect, *case.computed((state, prompts, key, functions)))
    rollout = case.spread(collected)
    asks_teacher = own.needs_teacher and teacher is None
    scored = dataclasses.replace(
        rollout,
        scores=case.spread(_numbers(settings.batch_size)),
        teacher_log_probs=rollout.log_probs if asks_teacher else None,
    )
    programs: dict[str, Program] = {SAMPLING: (collect, state, prompts, key, functions)}
    if functions.reward_fn is not None:
        programs["reward"] = (iteration.reward, rollout, functions)
    programs["learn"] = (learn, state, scored, key, functions)
    frozen = start.base if value_model is None else trained.base
    held = _held(state, start, frozen, reference, functions)
    held["reward models"] = functions.reward_fn if case.config.reward else None
    held["policy that samples"] = iteration.policy(state) if settings.rollouts_ahead else None
    sizes = (settings.batch_size, prompt, settings.max_new_tokens, shared_by)
    cache = jax.eval_shape(lambda: decoding.cache_of(model, *sizes))
    return Shapes(held, programs, {"cache": case.spread(cache)})


def _starts(
    case: Case, params: Params, own: AlgorithmConfig, value: str | None
) -> tuple[Trainable, Trainable, models.Model | None]:
    """The shapes of what a run starts from, as ``critic.start`` gives it, and the network of a
    value model that does not start as the policy.
    """
    source = critic.source_of(case.config, own) if value == "separate" else None
    network = None
    of_source = None
    if source is not None:
        network, of_source = case.model(source)

    def starts(params: Params, of_source: Params | None) -> tuple[Trainable, Trainable]:
        return critic.start(case.stage, params, value, source=of_source)

    start, trained = case.laid_out(jax.eval_shape(starts, params, of_source))
    return start, trained, network


def _held(
    state: iteration.LoopState,
    start: Trainable,
    frozen: Params | None,
    reference: Params | None,
    functions: iteration.Functions,
) -> dict[str, Any]:
    """What the models and the optimizer hold."""
    return {
        "parameters": state.train.params,
        "optimizer": state.train.opt_state,
        "frozen weights": frozen,
        "reference": None if reference is start.base else reference,
        "teacher": functions.teacher,
    }


def _numbers(rows: int) -> Any:
    """A number for each row, as a shape."""
    return jax.ShapeDtypeStruct((rows,), jnp.float32)


def _prompts(rows: int, columns: int) -> iteration.Prompts:
    """Prompts, as shapes."""
    tokens: Any = jax.ShapeDtypeStruct((rows, columns), jnp.int32)
    numbers: Any = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return iteration.Prompts(tokens, tokens, numbers)


def _prompt_columns(settings: RLStage, length: int | None) -> int:
    prompt = length or settings.max_prompt_length
    if prompt is None:
        raise UserError(
            "rlhf-jax plan: nobody knows the longest prompt; give --data FILE, --length or "
            "--rl.max-prompt-length"
        )
    return prompt


def _collected(
    state: iteration.LoopState,
    prompts: iteration.Prompts,
    key: Array,
    functions: iteration.Functions,
    *,
    model: models.Model,
    config: SamplingConfig,
    mesh: Mesh,
    score_rows: int | None,
    shared_by: int,
) -> Any:
    """Responses with the log-probs of the update's own forward pass and of the reference."""
    policy = iteration.sampler(state, functions.base)
    how: Any = {"model": model, "config": config, "mesh": mesh, "group_size": shared_by}
    sampled = iteration.respond(policy, prompts, key, **how)
    sampled = dataclasses.replace(sampled, group_size=shared_by)
    return iteration.rescored(
        state, sampled, functions, eos_ids=config.eos_ids, score_rows=score_rows
    )


def _functions(
    case: Case,
    networks: tuple[models.Model, models.Model | None],
    start: initial.Trainable,
    trained: initial.Trainable,
    teacher: LanguageModel | None,
    reference: Params | None,
    shared: tuple[int, int],
) -> iteration.Functions:
    """What the programs of RL call; ``networks``: of the policy, and of a value model that does not
    start as the policy; ``shared``: columns of a prompt, and rows that compute it once.
    """
    model, others = networks
    value_model = (others or model) if "policy" in trained.params else None
    settings = case.config.rl
    rows = memory.score_rows(case.config.compute, settings.batch_size, case.own)
    prompt, size = shared
    temperature = settings.temperature
    policy_fn = functools.partial(models.policy_fn, model, temperature, prompt, group_size=size)
    scored_fn = ops.by_rows(policy_fn(), rows, size)
    ref_fn = None
    if settings.reference_moves:
        ref_fn = start.bind(scored_fn)
    elif reference is not None:
        ref_fn = jax.tree_util.Partial(scored_fn, reference)
    reward = _reward(case, rows)
    taught_by = None
    teacher_params = None
    if teacher is not None:
        taught_by = models.Teacher(teacher.model, case.own.measure)
        teacher_params = teacher.params
        if not case.config.reward:
            reward = teachers.log_ratio(teacher, settings, rows)
    trained_fn = trained.bind(policy_fn(value_model, taught_by))
    reward_fn = case.laid_out(reward)
    return iteration.Functions(trained_fn, reward_fn, ref_fn, start.base, teacher_params)


def report(
    config: RunConfig,
    name: str,
    length: int | None = None,
    limit: float | None = None,
    target: targets.Target | None = None,
) -> list[str]:
    """The plan as lines. With a ``limit`` in bytes of a device, by default a target's memory:
    whether it fits, and if not which setting helps most.
    """
    made = plan(config, name, length, target)
    rows = dict(made.held)
    rows |= {f"more in the phase {phase!r}": size for phase, size in made.phases.items()}
    rows |= {f"of it {part}": size for part, size in made.parts.items()}
    rows["at the peak"] = made.peak
    whole = jax.device_count() * made.peak + PROCESS
    if target is None:
        rows["of the whole process, where a CPU is the device"] = whole
    lines = [_title(name, target)]
    lines += [f"{memory.amount(size):>14}  {what}" for what, size in rows.items()]
    for phase, figures in made.figures.items():
        lines += _figure_lines(phase, figures)
    if limit is None and target is not None:
        limit = target.memory
    if limit is None:
        return lines
    of_process = whole / jax.device_count() if target is None else made.peak
    verdict, fits = _verdict(made.peak, of_process, limit)
    if fits:
        return [*lines, verdict]
    helps = OTHERWISE
    least = made.peak
    for flag, other in options(Case(config, name, target)).items():
        peak = plan(other, name, length, target).peak
        if peak < least:
            least = peak
            helps = f"{flag}, a peak of {memory.amount(peak)}"
    return [*lines, f"{verdict}; what helps most: {helps}"]


def _verdict(peak: float, of_process: float, limit: float) -> tuple[str, bool]:
    """Whether a stage fits, in words, and as a CPU's process too.

    Args:
        peak: bytes of the arrays on a device.
        of_process: a device's part of the whole process, where a CPU is the device.
    """
    room = memory.amount(limit)
    if peak > limit:
        return f"does not fit in {room}", False
    spare = f"fits in {room}, with {memory.amount(limit - peak)} to spare"
    if of_process > limit:
        needs = memory.amount(of_process)
        cpu = f"{room} where a CPU is the device, whose process needs {needs} for each"
        return f"does not fit in {cpu}; on an accelerator it {spare}", False
    if of_process > peak:
        spare += f"; where a CPU is the device, with {memory.amount(limit - of_process)}"
    return spare, True


def _title(name: str, target: targets.Target | None) -> str:
    if target is not None:
        return f"{name} on {target.name}, on each device: compiled by its compiler, not run"
    count = jax.device_count()
    return f"{name} on {count} device{'s' * (count > 1)}, on each: computed, not run"


def _figure_lines(phase: str, figures: Figures) -> list[str]:
    """What the program of a phase does, on each device."""
    work = figures.work
    per_token = f", {work.in_loop:.0f} of them for each token" if work.in_loop else ""
    collectives = ", ".join(f"{n} {what}" for what, n in sorted(work.collectives.items()))
    calls = ", ".join(f"{n} {what}" for what, n in sorted(figures.custom_calls.items()))
    lines = [
        f"phase {phase!r}: {work.kernels:,.0f} kernels{per_token}; "
        f"{figures.flops / 1e12:.3f} TFLOP of products, {work.bytes / 1e9:.1f} GB read and "
        f"written; at least {figures.seconds:.3g} s",
        f"  collectives: {collectives or 'none'}",
        f"  custom calls in the program: {calls or 'none'}",
    ]
    if work.unknown:
        loops = "1 loop" if work.unknown == 1 else f"each of {work.unknown} loops"
        lines.append(f"  these are lower bounds: {loops} of unknown length is counted as one turn")
    return lines


def options(case: Case) -> dict[str, RunConfig]:
    """{flag: the settings with it} for the settings that save memory."""
    config = case.config
    device_rows = case.settings.batch_size // sharding.num_parts(case.mesh)
    # Each device has one row in each microbatch.
    most = device_rows // getattr(case.own, "num_minibatches", 1)
    most = max(most, case.own.num_microbatches)
    cut = dataclasses.replace(case.own, num_microbatches=most)
    changes: dict[str, dict[str, Any]] = {
        f"--{case.name.replace('_', '-')}.num-microbatches {most}": {case.name: cut},
        "--compute.remat": {"compute": dataclasses.replace(config.compute, remat=True)},
        "--compute.dtype bfloat16": {
            "compute": dataclasses.replace(config.compute, dtype="bfloat16")
        },
    }
    if config.model is not None:
        lora = dataclasses.replace(config.lora, rank=config.lora.rank or 8)
        changes["--lora.rank 8"] = {"lora": lora}
    made = {flag: dataclasses.replace(config, **change) for flag, change in changes.items()}
    return {flag: other for flag, other in made.items() if other != config}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan of a command line."""
    parser = command_line.Parser(
        "rlhf-jax plan", description="What a stage would take.", allow_abbrev=False
    )
    parser.add_argument(
        "stage",
        help="sft, reward-model, dpo, kto, ppo, vpg, rloo or grpo; its settings follow as flags",
    )
    parser.add_argument("--devices", type=int, default=1, help="how many there are")
    parser.add_argument(
        "--memory", help="of one, such as 80GB (10^9 bytes) or 75GiB: whether the stage fits"
    )
    parser.add_argument(
        "--length",
        type=int,
        help="tokens of the longest row, or of the longest prompt in RL; default: of the --data",
    )
    parser.add_argument(
        "--target", help=f"compile for it, in place of --devices: {targets.EXAMPLES}"
    )
    given, flags = parser.parse_known_args(argv)
    size = re.fullmatch(r"(\d+\.?\d*) ?(GB|GiB)", given.memory or "0GB")
    if size is None:
        raise UserError(f"--memory {given.memory}: expected a number with GB or GiB, such as 80GB")
    if given.target is None:
        jax.config.update("jax_num_cpu_devices", given.devices)
        devices.choose("cpu")  # with the compiler's flags of a run
    jax.config.update("jax_platforms", "cpu")  # nothing is run
    limit = float(size[1]) * (1e9 if size[2] == "GB" else 2**30)
    target = targets.find(given.target) if given.target else None
    stage = given.stage.replace("-", "_")
    command = STAGES.get(given.stage.replace("_", "-"))
    sections = (*command.reads, stage) if command else ()  # else `plan` names the stages
    settings = parse(RunConfig, flags, prog="rlhf-jax plan", sections=sections)
    length = given.length
    if length is None:
        settings, length = with_data(settings, stage)
    about = _of_length(stage, given.length, length)
    available = limit or (target.memory if target else devices.memory_limit())
    settings = with_remat(settings, stage, length, available, target)
    lines = report(settings, stage, length, limit or None, target)
    show("\n".join(filter(None, [lines[0], about, *lines[1:]])))
    return 0
