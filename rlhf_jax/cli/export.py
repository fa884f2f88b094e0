"""``rlhf-jax export``: a run's model as a Hugging Face folder."""

import tyro

from rlhf_jax.cli.console import show
from rlhf_jax.report import export


def export_run(run: tyro.conf.Positional[str], folder: tyro.conf.Positional[str]) -> None:
    """Copy a run's model to a Hugging Face folder with its tokenizer and a model card; or merge a
    PEFT adapter into the base model that it names.

    Args:
        run: the folder of a finished run, or of an adapter.
        folder: the new folder.
    """
    show(f"wrote {export.export(run, folder)}")
