"""``rlhf-jax chat``: a conversation with a model in the terminal."""

import sys

import tyro

from rlhf_jax.cli.console import CONSOLE, columns, show, typed_lines
from rlhf_jax.inference import chat


def chat_with(
    run: tyro.conf.Positional[str],
    config: tyro.conf.OmitArgPrefixes[chat.Config],
    page: bool = False,
) -> None:
    """Talk with a model in the terminal; lines from a pipe are answered one by one.

    The answers go to stdout and all else to stderr. /help lists the commands.

    For example: rlhf-jax chat runs/ppo --compare runs/sft

    Args:
        run: the folder of a finished run, or of a model.
        config: who answers, and how.
        page: talk in a browser instead, on a page that `rlhf-jax serve` serves.
    """
    if page:
        from rlhf_jax.cli import serve  # it needs an extra

        serve.open_page(run, config)
        return
    CONSOLE.file = sys.stderr
    try:
        chat.run(run, config, typed_lines(), console())
    finally:
        CONSOLE.file = None


def console() -> chat.Console:
    """The terminal, as the functions of ``inference`` see it."""
    return chat.Console(
        say=lambda text: show(text, end="", flush=True),
        note=lambda text: show(text, file=sys.stderr, flush=True),
        is_terminal=sys.stdin.isatty(),
        columns=columns if sys.stdout.isatty() else None,
    )
