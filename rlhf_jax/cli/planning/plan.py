"""``rlhf-jax plan``: the memory that a stage would hold on each device, and need on top in each
phase. It allocates nothing.

The held memory is exact: shapes, dtypes and shardings are those of a run. The memory of a phase is
XLA's ``memory_analysis`` of the run's own programs, compiled for as many fake CPU devices with
shapes in place of arrays. They are compiled in float32, since a CPU has no bfloat16 products. For
another ``compute.dtype`` the memory of a phase is halved, except for the update's float32 arrays:
gradients, and as much again while the optimizer runs.

``benchmarks/accelerators.py`` compiles the programs for accelerators.
"""

import dataclasses
import functools
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.cli.console import show
from rlhf_jax.cli.planning.shapes import COMPARING, PAIRS, RL, Case, Program, shapes_of
from rlhf_jax.cli.stages import STAGES
from rlhf_jax.config import RunConfig, command_line, data_source, model_source, parse
from rlhf_jax.data import batches
from rlhf_jax.data.rows import texts
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.errors import UserError, logger
from rlhf_jax.models import hf
from rlhf_jax.parallel import sharding
from rlhf_jax.runs import devices
from rlhf_jax.runs.log import Pulse
from rlhf_jax.training.common import initial, memory, remat
from rlhf_jax.training.common.layout import Layout, row_parts
from rlhf_jax.training.rl.job import rows_at_once
from rlhf_jax.training.supervised import batching, reading
from rlhf_jax.training.tasks import TASKS

# Bytes of a process beside its arrays: Python, JAX, the tokenizer, compiled programs, as measured
# in runs on a CPU.
PROCESS = 2**29
# The advice if no flag lowers the peak.
OTHERWISE = "shorter texts, a smaller batch, or more devices with mesh.fsdp"
# Of the compiler: optimized code takes longer to compile and needs the same memory.
OPTIONS = {"xla_backend_optimization_level": 0}
Compile = Callable[[Case, str, Program], jax.stages.Compiled]
"""(the stage, a phase, its program) -> the program, compiled."""


class Plan(NamedTuple):
    """Bytes on each device."""

    held: dict[str, int]  # all the time, by what it is
    phases: dict[str, int]  # on top while a phase runs: gradients, activations, the sampler's cache
    parts: dict[str, int]  # of the phases, what is known exactly: gradients, the cache

    @property
    def peak(self) -> int:
        """The most at any time."""
        return sum(self.held.values()) + max(self.phases.values())

    def lines(self) -> dict[str, int]:
        """{what it is: bytes}."""
        lines = dict(self.held)
        lines |= {f"more in the phase {phase!r}": size for phase, size in self.phases.items()}
        lines |= {f"of it {part}": size for part, size in self.parts.items()}
        return lines | {"at the peak": self.peak}


def compile_phase(
    case: Case, phase: str, program: Program, options: Any = OPTIONS
) -> jax.stages.Compiled:
    """The program of a phase, compiled for the devices of the case with ``options`` of XLA."""
    fn, *arguments = program
    jitted: Any = Layout(case.mesh).jit_update(fn, 1) if phase == "learn" else jax.jit(fn)
    with case.in_mesh():
        compiled: jax.stages.Compiled = jitted.lower(*case.inputs(arguments)).compile(options)
    return compiled


def plan(
    config: RunConfig,
    name: str,
    length: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    compile_phase: Compile = compile_phase,
) -> Plan:
    """The memory that the stage ``name`` of a run needs on each device; the arguments and errors
    are those of ``shapes_of``.
    """
    case = Case(config, name, devices)
    shapes, programs, known = shapes_of(config, name, length, devices)
    sizes = {part: memory.on_device(tree) for part, tree in shapes.items()}
    held = {part: size for part, size in sizes.items() if size}
    is_halved = devices is None and config.compute.dtype != "float32"
    scale = 0.5 if is_halved else 1.0
    parts = {"gradients": held["parameters"]}
    parts |= {part: int(scale * memory.on_device(tree)) for part, tree in known.items()}
    phases = {}
    for phase, program in programs.items():
        needed = memory.needed(compile_phase(case, phase, program))
        # Gradients, and as much again while the optimizer runs, are float32 in every run.
        exact = min(needed, 2 * parts["gradients"]) if phase == "learn" else 0
        phases[phase] = int(exact + scale * (needed - exact))
    first = next(iter(phases))
    if "reference" in config.compute.offload:
        size = held.pop("reference", 0)
        for phase in phases.keys() & {first, COMPARING}:
            phases[phase] += size
    if "reward" in config.compute.offload and "reward models" in held:
        phases["reward"] += held.pop("reward models")
    return Plan(held, phases, parts)


def read_data(config: RunConfig, name: str) -> tuple[RunConfig, int | None]:
    """The settings with ``compute.share_prompts`` as a run on its data chooses it for comparisons,
    and with as many tokens as a tokenizer has that is trained on them; and the columns of the
    widest batch of the data, or in RL of the longest prompt, as the run's tokenizer reads it: that
    of ``config.model`` or ``config.tokenizer.name``, or the trained one.

    The columns are None without data, for a text that is cut into pieces as long as the model
    reads, and where ``rl.max_prompt_length`` is given.
    """
    if name not in (*TASKS, *RL):
        return config, None
    if config.model is not None:
        config = dataclasses.replace(config, model=hf.model_folder(config.model))
    case = Case(config, name)
    settings = case.settings
    bounded = name in RL and config.rl.max_prompt_length is not None
    if not (settings.data or config.data) or (bounded and config.model is not None):
        return config, None
    task = TASKS.get(name)
    kind = "prompts" if task is None else task.kind
    source = data_source(config)
    read = initial.stage_rows(source, kind, settings.data).rows
    if config.model is not None:
        tokenizer = load_tokenizer(config.model)
    else:
        held_out = []
        if settings.validation_data:
            held_out = initial.stage_rows(source, kind, settings.validation_data).rows
        tokenizer = initial.new_tokenizer(model_source(config), texts([*read, *held_out]))
        entries = dataclasses.replace(config.tokenizer, vocab_size=tokenizer.vocab_size)
        config = dataclasses.replace(config, tokenizer=entries)
        case = Case(config, name)
    if read[0].is_plain_text or bounded:
        return config, None
    policy = case.language_model(config.model)._replace(tokenizer=tokenizer)
    if task is None:
        prompts = initial.prompts_for(config.text, config.rl, policy, read)
        return config, int(prompts.tokens.shape[1])
    network = policy.model.config
    most = reading.longest_text(config.text, network.max_length)
    encoded = reading.encode(config.text, read, tokenizer, most, are_pieces=False)
    every = np.arange(len(encoded))
    form = functools.partial(
        batching.form_batches,
        task=task,
        settings=settings,
        text=config.text,
        num_parts=row_parts(Layout(case.mesh), settings.num_microbatches),
        rows=every,
        key=jax.random.key(0),
        layers=network.num_layers,
    )
    chosen = batching.choose_form(config.compute.share_prompts, encoded, form)
    if encoded.num_answers > 1:
        shares = chosen.encoded.shares_prompts
        compute = dataclasses.replace(config.compute, share_prompts=shares)
        config = dataclasses.replace(config, compute=compute)
    return config, batches.width_of(chosen.encoded, every, bucket_multiple=chosen.bucket_multiple)


def choose_remat(
    config: RunConfig,
    name: str,
    length: int | None,
    limit: float,
    devices: Sequence[jax.Device] | None = None,
) -> RunConfig:
    """The settings with ``compute.remat`` as a run chooses it where it is auto.

    Args:
        length, devices: as in ``shapes_of``.
        limit: bytes of a device; 0: nobody knows.
    """
    if name not in (*TASKS, *RL) or (name in RL and not (length or config.rl.max_prompt_length)):
        return config  # ``shapes_of`` says what is wrong
    case = Case(config, name, devices)
    begun = case.language_model(config.model)
    network = dataclasses.replace(begun.model.config, compute_dtype=config.compute.dtype)
    begun = begun._replace(model=begun.model._replace(config=network))
    networks = 1
    if name in RL:
        prompt = length or config.rl.max_prompt_length or 0
        rows = rows_at_once(case.method(prompt), prompt)
        columns = prompt + config.rl.max_new_tokens
        networks += case.own.value == "separate"
    else:
        texts_of_row = 2 if name in PAIRS and not case.num_answers else 1
        rows = texts_of_row * case.own.batch_size // case.own.num_microbatches
        columns = case.columns(begun.model, length)
    run, _ = remat.choose(case.run, begun, rows, columns, networks, limit)
    compute = dataclasses.replace(config.compute, remat=run.config.compute.remat)
    return dataclasses.replace(config, compute=compute)


def report(
    config: RunConfig, name: str, length: int | None = None, limit: float | None = None
) -> list[str]:
    """The plan as lines: whether it fits, and if not which setting helps most; then the sizes.

    Args:
        limit: bytes of a device; None: a process on this machine's CPU has what is free.
    """
    planned = plan(config, name, length)
    count = jax.device_count()
    sizes = planned.lines()
    if limit is None:
        limit = count * devices.free_memory()
        number: Callable[[int], int] = functools.partial(of_process, count)
        sizes["of the whole process at the peak"] = number(planned.peak)
        has = f"this machine has {gib(limit)} free" if limit else "give --memory to compare it"
    else:
        number = int
        has = f"each device has {gib(limit)}"
    verdict = f"needs {gib(number(planned.peak))} at the peak; {has}"
    if limit and number(planned.peak) <= limit:
        verdict += ": fits"
    elif limit:
        flag, peak = best_option(config, name, length, planned.peak)
        verdict += f": does not fit. What helps most: {flag}"
        verdict += f", needs {gib(number(peak))}" if peak < planned.peak else ""
    lines = [verdict, f"{name} on {count} device{'s' * (count > 1)}, on each: computed, not run"]
    return [*lines, *(f"{memory.amount(size):>14}  {what}" for what, size in sizes.items())]


def of_process(count: int, peak: int) -> int:
    """The bytes of a process with so many devices of a CPU."""
    return count * peak + PROCESS


def gib(size: float) -> str:
    """Three digits of a verdict, whose two sizes have one unit."""
    return f"{size / 2**30:.3g} GiB"


def best_option(config: RunConfig, name: str, length: int | None, peak: int) -> tuple[str, int]:
    """The flag that lowers the peak most, and the peak with it."""
    helps = OTHERWISE
    for flag, other in options(Case(config, name)).items():
        try:
            lower = plan(other, name, length).peak
        except (UserError, TypeError, ValueError):
            continue  # what no run could do is no advice
        if lower < peak:
            helps, peak = flag, lower
    return helps, peak


def options(case: Case) -> dict[str, RunConfig]:
    """{flag: the settings with it} for the settings that save memory."""
    config = case.config
    compute = config.compute
    device_rows = case.settings.batch_size // sharding.num_parts(case.mesh)
    # Each device has one row in each microbatch.
    most = device_rows // getattr(case.own, "num_minibatches", 1)
    most = max(most, case.own.num_microbatches)
    changes: dict[str, dict[str, Any]] = {
        f"--{case.name.replace('_', '-')}.num-microbatches {most}": {
            case.name: dataclasses.replace(case.own, num_microbatches=most)
        },
        "--compute.remat": {"compute": dataclasses.replace(compute, remat=True)},
        "--compute.dtype bfloat16": {"compute": dataclasses.replace(compute, dtype="bfloat16")},
    }
    if config.model is not None:
        lora = dataclasses.replace(config.lora, rank=config.lora.rank or 8)
        changes["--lora.rank 8"] = {"lora": lora}
    changed = {flag: dataclasses.replace(config, **change) for flag, change in changes.items()}
    return {flag: other for flag, other in changed.items() if other != config}


def describe_length(name: str, given: int | None, found: int | None) -> str:
    """Which length a plan is for, and who says so; "" in RL where a setting does."""
    what = "longest prompt" if name in RL else "row"
    if given is not None:
        return f"{what}: {given} tokens (--length)"
    if found is not None:
        return f"{what}: {found} tokens, of the data"
    if name in RL:
        return ""
    return f"{what}: as many tokens as the model reads; --data or --length say how many there are"


def parse_stage(
    parser: command_line.Parser, argv: Sequence[str] | None
) -> tuple[Any, RunConfig, str]:
    """The parsed flags, the settings of a run and its stage, from a command line that begins with
    the stage.
    """
    parser.add_argument(
        "stage",
        help="sft, reward-model, dpo, kto, ppo, vpg, rloo or grpo; its settings follow as flags",
    )
    parser.add_argument(
        "--length",
        type=int,
        help="tokens of the longest row, or of the longest prompt in RL; default: of the --data",
    )
    given, flags = parser.parse_known_args(argv)
    stage = given.stage.replace("-", "_")
    command = STAGES.get(given.stage.replace("_", "-"))
    sections = (*command.reads, stage) if command else ()  # else ``shapes_of`` names the stages
    return given, parse(RunConfig, flags, prog=parser.prog, sections=sections), stage


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan of a command line."""
    parser = command_line.Parser(
        "rlhf-jax plan",
        description="Whether a stage fits into memory, and what takes it; nothing is run.",
        epilog="For example: rlhf-jax plan ppo --config tiny --devices 8 --memory 80GB",
        allow_abbrev=False,
    )
    parser.add_argument("--devices", type=int, default=1, help="how many there are")
    parser.add_argument(
        "--memory",
        help="of one, such as 80GB (10^9 bytes) or 75GiB; default: what is free on this machine",
    )
    given, settings, stage = parse_stage(parser, argv)
    size = re.fullmatch(r"(\d+\.?\d*) ?(GB|GiB)", given.memory or "0GB")
    if size is None:
        raise UserError(f"--memory {given.memory}: expected a number with GB or GiB, such as 80GB")
    jax.config.update("jax_num_cpu_devices", given.devices)
    devices.choose("cpu")  # with the compiler's flags of a run
    jax.config.update("jax_platforms", "cpu")  # nothing is run
    limit = float(size[1]) * (1e9 if size[2] == "GB" else 2**30)
    length = given.length
    level = logger.level
    logger.setLevel(logging.WARNING)  # what a run says of its data and rates
    pulse = Pulse(say=functools.partial(show, file=sys.stderr, flush=True))
    try:
        with pulse, pulse.during("reading the data and compiling the programs of the stage"):
            if length is None or settings.model is None:
                settings, found = read_data(settings, stage)
                length = length or found
            settings = choose_remat(settings, stage, length, limit or devices.memory_limit())
            verdict, about, *lines = report(settings, stage, length, limit or None)
    finally:
        logger.setLevel(level)
    about_length = describe_length(stage, given.length, length)
    show("\n".join(filter(None, [verdict, about, about_length, *lines])))
    return 0
