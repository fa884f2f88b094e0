"""``rlhf-jax generate``: a model's answers to prompts of files."""

import tyro

from rlhf_jax.cli.console import show
from rlhf_jax.inference import generate


def generate_answers(
    run: tyro.conf.Positional[str],
    config: tyro.conf.OmitArgPrefixes[generate.Config],
) -> None:
    """Write a model's answers to prompts from files, as JSON lines {prompt, response}.

    The same command completes a file that was interrupted.

    For example: rlhf-jax generate runs/ppo --prompts prompts.txt --out answers.jsonl

    Args:
        run: the folder of a finished run, or of a model.
        config: which prompts, and how they are asked.
    """
    show(f"wrote {generate.run(run, config)} responses to {config.out}")
