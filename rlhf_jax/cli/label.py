"""``rlhf-jax label``: pairs of answers compared by a person in the terminal, or by several people
on a page.
"""

from pathlib import Path

import tyro

from rlhf_jax.cli.chat import console
from rlhf_jax.cli.console import show, typed_lines
from rlhf_jax.errors import UserError
from rlhf_jax.inference import label
from rlhf_jax.inference.labelling import summary
from rlhf_jax.inference.labelling.settings import Config


def label_pairs(
    run: tyro.conf.Positional[str | None] = None,
    *,
    config: tyro.conf.OmitArgPrefixes[Config],
) -> None:
    """Compare pairs of answers: rows that reward-model, dpo and kto train on.

    In the terminal, or with --serve on a web page for several people. Who wrote which answer is not
    shown. The same command goes on where it was left.

    For example: rlhf-jax label runs/sft --prompts prompts.txt --out labels.jsonl

    Args:
        run: the folder of a finished run, or of a model.
        config: which answers are compared, and where.
    """
    if config.summary is not None:
        judgements = summary.read(Path(config.summary))
        if config.html is not None:
            summary.write_page(judgements, f"Labels in {config.summary}", Path(config.html))
        show(summary.text(judgements))
        return
    if not config.serve:
        show(label.run(run, config, typed_lines(), console()))
        return
    try:
        from rlhf_jax.inference.labelling import serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"--serve needs the package {error.name}: pip install 'rlhf-jax[label]'"
        ) from None
    show(serve.run(run, config))
