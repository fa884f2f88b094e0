"""The ``rlhf-jax`` command: which command line runs what.

A command's module is imported when it runs, so that ``rlhf-jax --help`` waits neither for it nor
for JAX.
"""

import importlib
import sys
from typing import NamedTuple

import tyro

import rlhf_jax
from rlhf_jax.cli.console import attach_console, run_script, show
from rlhf_jax.cli.stages import ROUNDS, STAGES, train
from rlhf_jax.errors import UserError, did_you_mean


class Command(NamedTuple):
    """A command that is no stage: the function that runs it, and a line for ``--help``."""

    function: str
    """MODULE:FUNCTION in ``rlhf_jax.cli``. ``main`` and ``train_rounds`` read their flags
    themselves."""
    summary: str


COMMANDS = {
    "quickstart": Command("quickstart:main", "SFT, a reward model and PPO in two minutes"),
    "rounds": Command("stages:train_rounds", ROUNDS.summary),
    "chat": Command("chat:chat_with", "talk with a model, or with two side by side"),
    "generate": Command("generate:generate_answers", "answers to prompts from files"),
    "label": Command("label:label_pairs", "compare pairs of answers yourself"),
    "export": Command("export:export_run", "a Hugging Face folder with a model card"),
    "report": Command("report:report_runs", "one HTML page: curves, samples, settings"),
    "evaluate": Command("evaluate:evaluate_run", "judge a model by data"),
    "verify": Command("verify:verify_run", "repeat a part of a run, compare byte by byte"),
    "data check": Command("data:check_data", "every problem of data files"),
    "data preview": Command("preview:main", "the first rows, and what of them a stage learns"),
    "data demo": Command("data:write_demo", "write the generated corpus"),
    "models": Command("stages:list_models", "families of models that load"),
    "configs": Command("stages:list_configs", "settings that come with the package"),
    "plan": Command("planning.plan:main", "memory that a run will need on each device"),
    "bench": Command("benchmark.measure:main", "the time of a step on this machine"),
    "doctor": Command("doctor:examine", "versions, devices, one step of every phase"),
}
GROUPS = {
    "Train": ("quickstart", *STAGES, "rounds"),
    "Use": ("chat", "generate", "label", "export"),
    "Look": ("report", "evaluate", "verify"),
    "Data": ("data check", "data preview", "data demo"),
    "Machine": ("models", "configs", "plan", "bench", "doctor"),
}


def run(argv: list[str]) -> int | None:
    """Runs one command line, without the program's name; returns the exit code (None: 0).

    Raises:
        UserError: there is no such command.
        SystemExit: after ``--help``, or code 2 for wrong flags.
    """
    attach_console()
    words = 2 if argv[:1] == ["data"] else 1
    name = " ".join(argv[:words])
    rest = argv[words:]
    prog = f"rlhf-jax {name}"
    if name == "--version":
        show(rlhf_jax.__version__)
        return 0
    if name in STAGES:
        train(name, rest, prog)
        return 0
    if name in COMMANDS:
        module, _, function = COMMANDS[name].function.partition(":")
        command = getattr(importlib.import_module(f"rlhf_jax.cli.{module}"), function)
        if function in ("main", "train_rounds"):
            code: int | None = command(rest)
            return code
        style = (tyro.conf.PositionalMetavarFromFieldName,)
        return tyro.cli(command, prog=prog, args=rest, config=style)
    last_word = [*argv, "--help"][words - 1]
    if last_word not in ("-h", "--help"):
        known = [*STAGES, *COMMANDS]
        hint = did_you_mean(name, known)
        raise UserError(f"rlhf-jax: no command {name!r}{hint}\nThere are: {', '.join(known)}")
    show(overview("data" if words == 2 else None))
    return 0


def overview(only: str | None = None) -> str:
    """The commands in groups, on one screen; or the group that begins with ``only``."""
    lines = []
    for group, names in GROUPS.items():
        shown = [name for name in names if only is None or name.startswith(f"{only} ")]
        lines += [f"{group}:"] if shown else []
        for name in shown:
            lines.append(f"  {name:<13} {_summary(name)}")
    lines.append("rlhf-jax COMMAND --help says more of a command.")
    return "\n".join(lines)


def _summary(name: str) -> str:
    return STAGES[name].summary if name in STAGES else COMMANDS[name].summary


def main() -> None:
    """Entry point of the installed command, and of ``python -m rlhf_jax``."""
    sys.argv[0] = "rlhf-jax"  # as manifests and messages name it
    run_script(lambda: run(sys.argv[1:]))
