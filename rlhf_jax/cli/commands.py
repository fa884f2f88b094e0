"""The ``rlhf-jax`` command: which command line runs what.

A command's module is imported when it runs, so that ``rlhf-jax --help`` waits neither for it nor
for JAX.
"""

import importlib
import sys
from typing import NamedTuple

import rlhf_jax
from rlhf_jax.cli.console import attach_console, run_script, show
from rlhf_jax.cli.stages import STAGES, find_method, method_names, train, train_algorithm
from rlhf_jax.errors import UserError, did_you_mean


class Command(NamedTuple):
    """A command that is no stage: the function that runs it, and a line for ``--help``."""

    function: str
    """MODULE:FUNCTION in ``rlhf_jax.cli``; ``main`` reads its flags itself."""
    summary: str


COMMANDS = {
    "quickstart": Command("quickstart:main", "begin here: SFT, reward model, PPO in three minutes"),
    "chat": Command("chat:chat_with", "talk with a model, or with two side by side"),
    "serve": Command("serve:serve_models", "an OpenAI-compatible server, and a page"),
    "generate": Command("generate:generate_answers", "answers to prompts from files"),
    "label": Command("label:label_pairs", "compare pairs of answers yourself"),
    "export": Command("report:export_run", "a Hugging Face folder with a model card"),
    "report": Command("report:report_runs", "one HTML page: curves, samples, settings"),
    "evaluate": Command("evaluate:evaluate_run", "judge a model by data"),
    "verify": Command("verify:verify_run", "repeat a part of a run, compare byte by byte"),
    "fork": Command("fork:fork", "go on from a checkpoint of a run with a change"),
    "data check": Command("data:check_data", "every problem of data files"),
    "data preview": Command("preview:main", "the first rows, and what of them a stage learns"),
    "data demo": Command("data:write_demo", "write the generated corpus"),
    "data gym": Command("data:write_gym", "write prompts of a reasoning-gym task"),
    "models": Command("lists:list_models", "families of models that load"),
    "configs": Command("lists:list_configs", "settings that come along: --config NAME"),
    "plan": Command("planning.plan:main", "memory that a run will need on each device"),
    "doctor": Command("doctor:examine", "versions, devices, one step of every phase"),
}
# The lines of each group: commands, and what they do where the commands' own words do not say it.
# With a line for each command they would not fit on a screen of 24 lines.
GROUPS: dict[str, dict[str, str]] = {
    "Train": {
        "quickstart": "",
        "sft": "",
        "reward-model": "",
        "dpo, kto": "a policy on preferences, or on good and bad answers",
        "ppo": "",
        "grpo, rloo, vpg": "the same without a value model",
        "distill": "",
        "METHOD": "any other method by its name, such as maxrl",
        "pipeline": "",
    },
    "Use": {
        "chat, serve": "talk with models; let other programs ask them",
        "generate": "",
        "label": "",
        "export": "",
    },
    "Look": {
        "report": "",
        "evaluate": "",
        "verify, fork": "repeat a part of a run; go on from it with a change",
    },
    "Data": {"data": "data check, preview, demo, gym: your files"},
    "Machine": {"models": "", "configs": "", "plan": "", "doctor": ""},
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
        code: int | None
        if function == "main":
            code = command(rest)
            return code
        command_line = importlib.import_module("rlhf_jax.config.command_line")
        code = command_line.call(command, rest, prog)
        return code
    if (method := find_method(name)) is not None:
        train_algorithm(method, rest, prog=prog)
        return 0
    last_word = [*argv, "--help"][words - 1]
    if last_word not in ("-h", "--help"):
        known = [*STAGES, *COMMANDS, *method_names()]
        hint = did_you_mean(name, known)
        raise UserError(f"rlhf-jax: no command {name!r}{hint}\nThere are: {', '.join(known)}")
    show(overview("data" if words == 2 else None))
    return 0


def overview(only: str | None = None) -> str:
    """The commands in groups, on one screen of 24 lines; or those that begin with ``only``."""
    if only is not None:
        lines = [
            f"  {name:<14}{command.summary}"
            for name, command in COMMANDS.items()
            if name.startswith(f"{only} ")
        ]
        return "\n".join([*lines, f"rlhf-jax {only} COMMAND --help says more of a command."])
    lines = []
    for group, shown in GROUPS.items():
        label = group
        for names, words in shown.items():
            lines.append(f"{label:<9}{names:<17}{words or _summary(names)}")
            label = ""
    lines.append("rlhf-jax COMMAND --help says more of a command.")
    return "\n".join(lines)


def _summary(name: str) -> str:
    return STAGES[name].summary if name in STAGES else COMMANDS[name].summary


def main() -> None:
    """Entry point of the installed command, and of ``python -m rlhf_jax``."""
    sys.argv[0] = "rlhf-jax"  # as manifests and messages name it
    run_script(lambda: run(sys.argv[1:]))
