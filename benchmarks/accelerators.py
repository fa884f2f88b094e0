"""What the programs of a stage need on an accelerator that is not here, by its own compiler.

    pip install 'rlhf-jax[cuda12]'     # or rlhf-jax[tpu]: the compilers, no device is needed
    python benchmarks/accelerators.py grpo --target h200x8 --model gpt2 --mesh.tensor 2 \
        --compute.dtype bfloat16 --reward length --rl.max-prompt-length 512

Takes the settings of a run, as ``rlhf-jax plan`` does, and prints the memory on each device, which
is not estimated; of each phase its kernels, collectives, products and traffic, with the time that
the target needs for these at least; and whether all of it fits.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import hlo
import jax
import targets

from rlhf_jax import cli
from rlhf_jax.cli.console import show
from rlhf_jax.cli.planning import plan, shapes
from rlhf_jax.cli.planning.shapes import Case, Program
from rlhf_jax.config import RunConfig, command_line
from rlhf_jax.errors import UserError, logger
from rlhf_jax.training.common import memory


class Figures(NamedTuple):
    """What one phase's program does, by the compiler of its target."""

    work: hlo.Work  # on each device
    flops: float  # on each device
    seconds: float  # at least, by the target's products and bandwidth
    custom_calls: dict[str, int]  # {name: how many are in the program}

    def lines(self, phase: str) -> list[str]:
        """The figures in words."""
        work = self.work
        per_token = f", {work.in_loop:.0f} of them for each token" if work.in_loop else ""
        collectives = ", ".join(f"{n} {what}" for what, n in sorted(work.collectives.items()))
        calls = ", ".join(f"{n} {what}" for what, n in sorted(self.custom_calls.items()))
        lines = [
            f"phase {phase!r}: {work.kernels:,.0f} kernels{per_token}; "
            f"{self.flops / 1e12:.3f} TFLOP of products, {work.bytes / 1e9:.1f} GB read and "
            f"written; at least {self.seconds:.3g} s",
            f"  collectives: {collectives or 'none'}",
            f"  custom calls in the program: {calls or 'none'}",
        ]
        if work.unknown:
            loops = "1 loop" if work.unknown == 1 else f"each of {work.unknown} loops"
            lines.append(
                f"  these are lower bounds: {loops} of unknown length is counted as one turn"
            )
        return lines


def compile_for(
    target: targets.Target, case: Case, phase: str, program: Program, options: Any = None
) -> jax.stages.Compiled:
    """The program of a phase, compiled for the target with ``options`` of XLA.

    Raises:
        UserError: it does not fit the target's memory.
    """
    logger.info(f"compiling the phase {phase!r} for {target.name}")
    started = time.monotonic()
    try:
        compiled = plan.compile_phase(case, phase, program, options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).partition("\n")[0]
        raise UserError(
            f"{case.name} does not fit {target.name}: its compiler says of the phase {phase!r}: "
            f"{first}; what helps: more --{case.name.replace('_', '-')}.num-microbatches, "
            f"--compute.remat, --lora.rank 8, or {plan.OTHERWISE}"
        ) from error
    logger.info(f"compiled in {time.monotonic() - started:.0f} s")
    return compiled


def figures_of(
    turns: int | None, compiled: jax.stages.Compiled, program: Program, target: targets.Target
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


def report(config: RunConfig, name: str, length: int | None, target: targets.Target) -> list[str]:
    """The plan of a stage on a target as lines."""
    loops = {shapes.SAMPLING: config.rl, shapes.ANSWERING: getattr(config, name, None)}
    figures = {}

    def compile_phase(case: Case, phase: str, program: Program) -> jax.stages.Compiled:
        compiled = compile_for(target, case, phase, program)
        turns = loops[phase].max_new_tokens if phase in loops else None
        figures[phase] = figures_of(turns, compiled, program, target)
        return compiled

    planned = plan.plan(config, name, length, target.devices, compile_phase)
    lines = [f"{name} on {target.name}, on each device: compiled by its compiler, not run"]
    lines += [f"{memory.amount(size):>14}  {what}" for what, size in planned.lines().items()]
    for phase, of_phase in figures.items():
        lines += of_phase.lines(phase)
    room = memory.amount(target.memory)
    spare = target.memory - planned.peak
    if spare < 0:
        return [*lines, f"does not fit in {room}"]
    return [*lines, f"fits in {room}, with {memory.amount(spare)} to spare"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line.Parser("accelerators.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--target", required=True, help=targets.EXAMPLES)
    given, settings, stage = plan.parse_stage(parser, argv)
    jax.config.update("jax_platforms", "cpu")  # nothing is run
    target = targets.find(given.target)
    length = given.length
    if length is None:
        settings, length = plan.read_data(settings, stage)
    settings = plan.choose_remat(settings, stage, length, target.memory, target.devices)
    first, *lines = report(settings, stage, length, target)
    about = plan.describe_length(stage, given.length, length)
    show("\n".join(filter(None, [first, about, *lines])))


if __name__ == "__main__":
    cli.run_script(main)
