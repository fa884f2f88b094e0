"""The memory of a stage: what it holds, and its programs compiled phase by phase."""

import time
from typing import Any, NamedTuple

import jax

from rlhf_jax.cli.planning import hlo, targets
from rlhf_jax.cli.planning.case import Case
from rlhf_jax.cli.planning.shapes import ANSWERING, COMPARING, SAMPLING, shapes_of
from rlhf_jax.config import RunConfig
from rlhf_jax.errors import UserError, logger
from rlhf_jax.training.common import memory

# The advice if no flag lowers the peak.
OTHERWISE = "shorter texts, a smaller batch, or more devices with mesh.fsdp"
# Of the compiler: optimized code takes longer to compile and needs the same memory.
OPTIONS = {"xla_backend_optimization_level": 0}


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
            loops = {SAMPLING: config.rl, ANSWERING: getattr(config, name)}
            turns = loops[phase].max_new_tokens if phase in loops else None
            figures[phase] = figures_of(turns, compiled, program, target)
        # Gradients, and as much again while the optimizer runs, are float32 in every run.
        exact = min(needed, 2 * parts["gradients"]) if phase == "learn" else 0
        used[phase] = int(exact + scale * (needed - exact))
    first = next(iter(used))
    if "reference" in config.compute.offload:
        size = held.pop("reference", 0)
        for phase in used.keys() & {first, COMPARING}:
            used[phase] += size
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
    jitted: Any = case.layout.jit_update(fn, 1) if phase == "learn" else jax.jit(fn)
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


def figures_of(
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
