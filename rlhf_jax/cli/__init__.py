"""The ``rlhf-jax`` command, a file for each of its commands, and the start of every script."""

from rlhf_jax.cli.commands import main, run
from rlhf_jax.cli.console import attach_console, run_script
from rlhf_jax.cli.stages import train, train_algorithm

__all__ = ["attach_console", "main", "run", "run_script", "train", "train_algorithm"]
