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

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from rlhf_jax.cli.console import show
from rlhf_jax.cli.planning import targets
from rlhf_jax.cli.planning.case import RL, Case
from rlhf_jax.cli.planning.choices import with_data, with_remat
from rlhf_jax.cli.planning.phases import OTHERWISE, Figures, plan
from rlhf_jax.cli.stages import STAGES
from rlhf_jax.config import RunConfig, command_line, parse
from rlhf_jax.errors import UserError
from rlhf_jax.parallel import sharding
from rlhf_jax.runs import allocator, devices
from rlhf_jax.training.common import memory

# Bytes of a process beside its arrays: Python, JAX, the tokenizer, compiled programs. Measured in
# docs/notes/measurements.md.
PROCESS = 2**29


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
    if target is None:
        kept = f"{memory.amount(allocator.KEPT)} of what it has freed"
        lines.append(f"that process may keep {kept}; with RLHF_JAX_KEEP_MEMORY=0 it keeps none")
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
        left = limit - of_process
        spare += f"; where a CPU is the device, with {memory.amount(left)}"
        if left < allocator.KEPT:
            spare += " if it starts with RLHF_JAX_KEEP_MEMORY=0"
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
