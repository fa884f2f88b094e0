"""``rlhf-jax label``: pairs of answers compared by a person in the terminal."""

import tyro

from rlhf_jax.cli.chat import console
from rlhf_jax.cli.console import show, typed_lines
from rlhf_jax.inference import label


def label_pairs(
    run: tyro.conf.Positional[str],
    config: tyro.conf.OmitArgPrefixes[label.Config],
) -> None:
    """Compare pairs of answers in the terminal: rows that reward-model, dpo and kto train on.

    Who wrote which answer is not shown. The same command goes on where it was left.

    Args:
        run: the folder of a finished run, or of a model.
        config: which answers are compared.
    """
    show(label.run(run, config, typed_lines(), console()))
