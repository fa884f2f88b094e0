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

import argparse
import contextlib
import dataclasses
import re
import time
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hlo
import jax
import jax.numpy as jnp
import targets

from rlhf_jax import cli, models, ops, sharding, training
from rlhf_jax.algorithms import distill, dpo, grpo, kto, ppo, reward_model, rloo, sft, vpg
from rlhf_jax.config import RunConfig, parse
from rlhf_jax.data.encoding import encode_texts
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generator import LanguageModel
from rlhf_jax.models import hf
from rlhf_jax.rewards import spec
from rlhf_jax.runs import devices
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.training import critic, initial, layout, memory, phases, references
from rlhf_jax.training import teacher as teachers
from rlhf_jax.training.method import penalty_of
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.programs import rules
from rlhf_jax.training.stage import Stage
from rlhf_jax.types import (
    Algorithm,
    Comparisons,
    Demonstrations,
    Feedback,
    Metrics,
    Params,
    TrainState,
)

RL: dict[str, Algorithm] = {"ppo": ppo, "vpg": vpg, "rloo": rloo, "grpo": grpo}
RL["distill"] = distill
SUPERVISED: dict[str, Any] = {"sft": sft, "reward_model": reward_model, "dpo": dpo, "kto": kto}
# The advice if no flag lowers the peak.
OTHERWISE = "shorter texts, a smaller batch, or more devices with mesh.fsdp"
# Of the compiler: optimized code takes longer to compile and needs the same memory.
OPTIONS = {"xla_backend_optimization_level": 0}

# Bytes of a process beside its arrays: Python, JAX, the tokenizer, compiled programs. Measured in
# docs/notes/memory.md.
PROCESS = 2**29

SAMPLING = "sample and score"  # the phase with the loop over tokens
ANSWERS = ("answer",)  # the column that ``--reward math`` asks the data for
# {phase: (function, its arguments)}
Programs = dict[str, tuple[Callable[..., Any], *tuple[Any, ...]]]


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
    held = {part: size for part, tree in shapes.items() if (size := memory.on_device(tree))}
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
    mesh = _mesh(config, target)
    jitted: Any = jax.jit(fn)
    if phase == "learn":
        jitted = Stage(config, name, None, mesh).jit_update(fn, 1)  # type: ignore[arg-type]
    if target is None:
        with jax.set_mesh(mesh) if sharding.is_set(mesh) else contextlib.nullcontext():
            compiled: jax.stages.Compiled = jitted.lower(*_widened(arguments)).compile(OPTIONS)
        return compiled
    logger.info(f"compiling the phase {phase!r} for {target.name}")
    started = time.monotonic()
    try:
        # The networks ask the mesh which platform they are for.
        with jax.set_mesh(mesh):
            compiled = jitted.lower(*arguments).compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).partition("\n")[0]
        raise UserError(
            f"{name} does not fit {target.name}: its compiler says of the phase {phase!r}: "
            f"{first}; what helps: more --{name.replace('_', '-')}.num-microbatches, "
            f"--compute.remat, --lora.rank 8, or {OTHERWISE}"
        ) from error
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


def _mesh(config: RunConfig, target: targets.Target | None) -> jax.sharding.Mesh:
    """The mesh of a run, on the target's devices if there is one."""
    if target is None:
        return layout.mesh_of(config)
    return sharding.make_mesh(**config.mesh.axes, devices=target.devices)


def shapes_of(
    config: RunConfig,
    name: str,
    length: int | None = None,
    target: targets.Target | None = None,
) -> tuple[dict[str, Any], Programs, dict[str, Any]]:
    """The arrays on the devices as trees of shapes, by name; the stage's programs; and the arrays
    of these whose size is known.
    """
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
    mesh = _mesh(config, target)
    layout.check(config, mesh)
    section = getattr(config, name)
    part = "rl" if name in RL else name
    cuts = ("num_minibatches", "num_microbatches")
    batch_size = getattr(config, part).batch_size
    num_devices = {"devices": sharding.num_parts(mesh)}
    layout.check_divides(
        f"{part}.batch_size",
        batch_size,
        num_devices,
        {f"{name}.{key}": getattr(section, key, 1) for key in cuts},
    )
    make = _supervised if name in SUPERVISED else _reinforcement
    return make(config, name, mesh, length, is_there=target is not None)


def _model(config: RunConfig, source: str | None, is_there: bool) -> tuple[models.Model, Params]:
    """A model, and the shapes of its parameters in the dtype that config.json names.

    It computes as a run on the target does (``is_there``), else in float32 as a CPU can.
    """
    dtype = "float32"
    if source is None:
        network = dataclasses.asdict(config.network)
        del network["dropout"]
        model_config: Any = models.GPT2Config(config.tokenizer.vocab_size, **network)
    else:
        folder = hf.find_folder(hf.model_folder(source))
        model_config = hf.read_config(folder)
        keys = hf.read_json(folder / hf.CONFIG)
        dtype = keys.get("dtype") or keys.get("torch_dtype") or dtype
    compute = initial.by_depth(config.compute, model_config.num_layers)
    model_config = dataclasses.replace(
        model_config,
        remat=compute.remat is True,
        scan_layers=compute.scan_layers,
    )
    if is_there:
        own = {"attention": compute.attention, "compute_dtype": compute.dtype}
    else:
        runs_here = compute.attention in ("auto", "xla")
        own = {"attention": compute.attention if runs_here else "blockwise"}
    model_config = dataclasses.replace(model_config, **own)
    model = models.build(model_config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return model, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), params)


def _fitting(model: models.Model, length: int | None) -> int:
    """The length of a row, by default the most that the model reads."""
    most = model.config.max_length
    if (length or most) > most:
        raise UserError(
            f"rlhf-jax plan: rows of {length} tokens are longer than the {most} that the model "
            "reads"
        )
    return length or most


def longest(config: RunConfig, name: str) -> int | None:
    """Columns of the widest batch of a run's data, or in RL of its longest prompt.

    None without data, without a tokenizer to read it by (of ``config.model`` or
    ``config.tokenizer.name``), for a text that is cut into pieces as long as the model reads, and
    where ``rl.max_prompt_length`` is given.
    """
    source = config.model or config.tokenizer.name
    bounded = name in RL and config.rl.max_prompt_length is not None
    if source is None or bounded or name not in (*SUPERVISED, *RL):
        return None
    if config.model is not None:
        config = dataclasses.replace(config, model=hf.model_folder(config.model))
    own = config.rl if name in RL else getattr(config, name)
    if not (own.data or config.data):
        return None
    kind = "prompts" if name in RL else getattr(training, name).SPEC.kind
    rows = initial.stage_rows(config, kind, own.data).rows
    if rows[0].is_plain_text:
        return None
    model, _ = _model(config, config.model, is_there=False)
    tokenizer = load_tokenizer(config.model or source)
    if name in RL:
        language_model = LanguageModel(model, {}, tokenizer)
        return int(initial.prompts_for(config, language_model, rows).tokens.shape[1])
    encoded = encode_texts(
        rows,
        tokenizer,
        template=config.text.template,
        max_length=model.config.max_length,
        too_long=config.text.too_long,
    )
    columns = int(encoded.lengths.max())
    steps = -(-len(encoded) // own.batch_size)
    multiple = initial.bucket_multiple(config, model.config.num_layers, columns, steps)
    num_multiples = -(-columns // multiple)
    width = num_multiples * multiple
    return min(width, model.config.max_length)


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
    model, _ = _model(config, config.model, is_there=True)
    columns = length or config.rl.max_prompt_length if name in RL else _fitting(model, length)
    if columns is None:
        return config
    own = getattr(config, name)
    if name in RL:
        columns += config.rl.max_new_tokens
        rows = config.rl.batch_size // (own.num_minibatches * own.num_microbatches)
    else:
        answers = 2 if name in ("reward_model", "dpo") else 1
        rows = answers * own.batch_size // own.num_microbatches
    parts = sharding.num_parts(_mesh(config, target))
    stored = memory.stored(model.config, -(-rows // parts), columns)
    is_deep = model.config.num_layers >= initial.DEEP
    remat = is_deep and memory.wants_remat(stored, limit)
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat=remat))


def _widened(tree: Any) -> Any:
    """The shapes with float32 in place of shorter floats."""

    def widened(x: Any) -> Any:
        if not (hasattr(x, "dtype") and x.dtype in (jnp.bfloat16, jnp.float16)):
            return x
        return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)

    return jax.tree.map(widened, tree)


def _spread(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The shapes of a batch, its rows over the devices."""
    rows = sharding.rows(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), tree)


def _laid_out(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The shapes of parameters, or of a state with them, on the devices as the mesh says."""
    arrays = jax.eval_shape(lambda tree: jax.tree.map(jnp.asarray, tree), tree)
    where = layout.shardings(mesh, arrays)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays, where
    )


def _reward(config: RunConfig, rows: int | None, is_there: bool) -> Any:
    """The part of a run's reward that runs on the devices, with the models' parameters as shapes;
    None if there is no such part.
    """
    entries = [entry for entry in config.reward if ".py:" not in entry]
    if not entries:
        return None

    def with_score(params: Params) -> Params:
        return models.add_head(jax.random.key(0), params, "score")

    def load(source: str) -> spec.RewardModel:
        model, params = _model(config, source, is_there)
        score_fn = ops.by_rows(models.score_fn(model), rows)
        return spec.RewardModel(score_fn, jax.eval_shape(with_score, params), "")

    tokenizer: Any = types.SimpleNamespace(fingerprint="", encode=lambda text: [0])
    return spec.build_reward(entries, tokenizer=tokenizer, load=load, columns=ANSWERS).fn


def _teacher(config: RunConfig, own: Any, is_there: bool) -> LanguageModel | None:
    """The teacher of a distillation with its parameters as shapes; None if there is none, or if it
    is on a server.
    """
    if not own.needs_teacher or own.teacher_server is not None:
        return None
    if own.teacher is None:
        raise UserError("rlhf-jax plan: no teacher; give --distill.teacher")
    model, params = _model(config, own.teacher, is_there)
    tokenizer: Any = None  # log-probabilities need none
    return LanguageModel(model, params, tokenizer)


def _supervised(
    config: RunConfig, name: str, mesh: jax.sharding.Mesh, length: int | None, is_there: bool
) -> tuple[dict[str, Any], Programs, dict[str, Any]]:
    settings = getattr(config, name)
    model, params = _model(config, config.model, is_there)
    optimizer = make_optimizer(settings.optimizer, 1)
    is_scorer = name == "reward_model"

    def first(params: Params) -> tuple[initial.Trainable, TrainState]:
        params = models.add_head(jax.random.key(1), params, "score") if is_scorer else params
        start = initial.trainable(config.lora, params, jax.random.key(2))
        return start, references.state(settings).create(start.params, optimizer)

    start, state = _laid_out(jax.eval_shape(first, params), mesh)
    of: Any = {"sft": Demonstrations, "kto": Feedback}.get(name, Comparisons)
    shape = (settings.batch_size, *((2,) if of is Comparisons else ()), _fitting(model, length))
    tokens, flags = (_spread(jax.ShapeDtypeStruct(x, jnp.int32), mesh) for x in (shape, shape[:1]))
    batch = of(tokens, tokens, tokens, flags) if name == "kto" else of(tokens, tokens, tokens)
    model_fn: Any = models.score_fn(model) if is_scorer else models.policy_fn(model)
    rows = memory.score_rows(config.compute, 2 * settings.batch_size, settings)
    compares = name == "kto" or (name == "dpo" and settings.needs_reference)
    ref_fn = None
    if references.moves(settings):
        ref_fn = start.bind(ops.by_rows(model_fn, rows))
    elif compares:
        ref_fn = jax.tree_util.Partial(ops.by_rows(model_fn, rows), start.base or start.loaded)

    def learn(
        state: Any, batch: Any, key: jax.Array, bound: Any, ref_fn: Any
    ) -> tuple[Any, Metrics]:
        if references.moves(settings):
            ref_fn = jax.tree_util.Partial(ref_fn, state.reference)
        batch = batch if ref_fn is None else SUPERVISED[name].with_reference(batch, ref_fn)
        own = {
            "optimizer": optimizer,
            "config": settings,
            "minibatch_sharding": sharding.rows(mesh),
        }
        return SUPERVISED[name].update(
            state, batch, key, **own, **{"score_fn" if is_scorer else "policy_fn": bound}
        )

    key = jax.eval_shape(jax.random.key, 0)
    held = {"parameters": state.params, "optimizer": state.opt_state, "frozen weights": start.base}
    held["reference"] = start.loaded if ref_fn is not None else None
    if references.moves(settings):
        held["reference"] = state.reference
    return held, {"learn": (learn, state, batch, key, start.bind(model_fn), ref_fn)}, {}


def _reinforcement(
    config: RunConfig, name: str, mesh: jax.sharding.Mesh, length: int | None, is_there: bool
) -> tuple[dict[str, Any], Programs, dict[str, Any]]:
    algorithm = RL[name]
    own = getattr(config, name)
    settings = config.rl
    model, params = _model(config, config.model, is_there)
    size = settings.batch_size
    prompt = length or settings.max_prompt_length
    if prompt is None:
        raise UserError(
            "rlhf-jax plan: nobody knows the longest prompt; give --length or "
            "--rl.max-prompt-length"
        )
    _fitting(model, prompt + settings.max_new_tokens)
    penalty = penalty_of(config, algorithm, own)
    has_reference = penalty is not phases.NO_PENALTY
    refreshes = settings.reference_moves
    rows = memory.score_rows(config.compute, size, own)

    value = critic.settings(own).value if algorithm.needs_values else None
    stage = Stage(config, name, None, mesh)  # type: ignore[arg-type]
    shapes = jax.eval_shape(lambda params: critic.start(stage, params, value)[1].params, params)
    optimizer = critic.make_optimizer(settings, critic.settings(own), 1, shapes)

    def first(params: Params) -> tuple[initial.Trainable, initial.Trainable, phases.LoopState]:
        start, trained = critic.start(stage, params, value)
        train = algorithm.State.create(trained.params, optimizer)
        return (
            start,
            trained,
            phases.LoopState.create(train, 0.0, start.params if refreshes else None),
        )

    start, trained, state = _laid_out(jax.eval_shape(first, params), mesh)
    model_fn = models.policy_fn(model, settings.temperature, prompt)
    teacher = _teacher(config, own, is_there)
    taught_by = None if teacher is None else models.Teacher(teacher.model, own.measure)
    trained_fn = models.policy_fn(
        model, settings.temperature, prompt, model if value == "separate" else None, taught_by
    )
    teacher_params = None if teacher is None else _laid_out(teacher.params, mesh)
    reward = _reward(config, rows, is_there)
    if teacher is not None and not config.reward:
        reward = teachers.log_ratio(teacher, settings, rows)
    reward_fn = None if reward is None else _laid_out(reward, mesh)
    frozen = start.base or start.loaded if has_reference and not refreshes else None
    ref_fn = jax.tree_util.Partial(ops.by_rows(model_fn, rows), frozen)
    refreshed = start.bind(ops.by_rows(model_fn, rows)) if refreshes else None
    functions = phases.Functions(
        trained.bind(trained_fn),
        reward_fn,
        ref_fn if frozen else refreshed,
        start.base,
        teacher_params,
    )
    samples = SamplingConfig(settings.max_new_tokens, settings.temperature, eos_id=0, pad_id=1)
    shape, masked = rules(settings, samples)
    learning: dict[str, Any] = {"algorithm": algorithm, "config": own, "optimizer": optimizer}
    learning |= {"shape": shape, "penalty": penalty, "masked": masked, "mesh": mesh}
    tokens = jnp.zeros((size, prompt), jnp.int32)
    numbers = jnp.zeros(size, jnp.int32)
    prompts = _spread(phases.Prompts(tokens, tokens, numbers), mesh)
    key = jax.eval_shape(jax.random.key, 0)

    def collect(key: jax.Array, state: Any, prompts: Any, functions: Any) -> Any:
        policy = phases.sampler(state, functions.base)
        sampled = phases.respond(policy, prompts, key, model=model, config=samples, mesh=mesh)
        return phases.rescored(state, sampled, functions, eos_ids=samples.eos_ids, score_rows=rows)

    def learn(state: Any, rollout: Any, key: jax.Array, functions: Any) -> Any:
        return phases.learn(state, rollout, key, functions, **learning)

    inputs = (state, prompts, functions)
    with jax.set_mesh(mesh) if is_there else contextlib.nullcontext():
        collected, _ = jax.eval_shape(collect, key, *(inputs if is_there else _widened(inputs)))
    rollout = _spread(collected, mesh)
    scored = dataclasses.replace(
        rollout, scores=_spread(jax.ShapeDtypeStruct((size,), jnp.float32), mesh)
    )
    if own.needs_teacher and teacher is None:
        scored = dataclasses.replace(scored, teacher_log_probs=rollout.log_probs)
    programs: Programs = {SAMPLING: (collect, key, state, prompts, functions)}
    if reward_fn is not None:
        programs["reward"] = (phases.reward, rollout, functions)
    programs["learn"] = (learn, state, scored, key, functions)
    held = {
        "parameters": state.train.params,
        "optimizer": state.train.opt_state,
        "frozen weights": start.base,
    }
    held |= {
        "reference": state.reference if refreshes else frozen and start.loaded,
        "teacher": teacher_params,
        "reward models": reward_fn if config.reward else None,
        "policy that samples": phases.policy(state) if settings.rollouts_ahead else None,
    }
    cache = jax.eval_shape(lambda: model.init_cache(size, prompt + settings.max_new_tokens))
    return held, programs, {"cache": _spread(cache, mesh)}


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
    rows: list[tuple[int, str]] = []
    for part, size in made.held.items():
        rows.append((size, part))
    for phase, size in made.phases.items():
        rows.append((size, f"more in the phase {phase!r}"))
    for part, size in made.parts.items():
        rows.append((size, f"of it {part}"))
    rows.append((made.peak, "at the peak"))
    if target is None:
        on_host = jax.device_count() * made.peak + PROCESS
        rows.append((on_host, "of the whole process, where a CPU is the device"))
    lines = [_title(name, target)]
    lines += [f"{memory.amount(size):>14}  {what}" for size, what in rows]
    for phase, figures in made.figures.items():
        lines += _figure_lines(phase, figures)
    if limit is None and target is not None:
        limit = target.memory
    if limit is None:
        return lines
    if made.peak <= limit:
        return [
            *lines,
            f"fits in {memory.amount(limit)}, with {memory.amount(limit - made.peak)} to spare",
        ]
    helps = OTHERWISE
    least = made.peak
    for flag, other in options(config, name, _mesh(config, target)).items():
        peak = plan(other, name, length, target).peak
        if peak < least:
            least = peak
            helps = f"{flag}, a peak of {memory.amount(peak)}"
    return [*lines, f"does not fit in {memory.amount(limit)}; what helps most: {helps}"]


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


def options(config: RunConfig, name: str, mesh: jax.sharding.Mesh) -> dict[str, RunConfig]:
    """{flag: the settings with it} for the settings that save memory."""
    section = getattr(config, name)
    batch_size = (config.rl if name in RL else section).batch_size
    device_rows = batch_size // sharding.num_parts(mesh)
    # Each device has one row in each microbatch.
    most = max(device_rows // getattr(section, "num_minibatches", 1), section.num_microbatches)
    compute = config.compute
    flag = f"--{name.replace('_', '-')}.num-microbatches {most}"
    changed: dict[str, dict[str, Any]] = {
        flag: {name: dataclasses.replace(section, num_microbatches=most)},
        "--compute.remat": {"compute": dataclasses.replace(compute, remat=True)},
        "--compute.dtype bfloat16": {"compute": dataclasses.replace(compute, dtype="bfloat16")},
    }
    if config.model is not None:
        lora = dataclasses.replace(config.lora, rank=config.lora.rank or 8)
        changed["--lora.rank 8"] = {"lora": lora}
    made = {flag: dataclasses.replace(config, **change) for flag, change in changed.items()}
    return {flag: other for flag, other in made.items() if other != config}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan of a command line."""
    parser = argparse.ArgumentParser(
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
    settings = parse(RunConfig, flags, prog="rlhf-jax plan")
    target = targets.find(given.target) if given.target else None
    stage = given.stage.replace("-", "_")
    length = given.length or longest(settings, stage)
    available = limit or (target.memory if target else devices.memory_limit())
    settings = with_remat(settings, stage, length, available, target)
    print("\n".join(report(settings, stage, length, limit or None, target)))
    return 0


if __name__ == "__main__":
    cli.run_script(main)
