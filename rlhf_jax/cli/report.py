"""``rlhf-jax report`` and ``rlhf-jax export``: a page of what runs did, and a folder of a model."""

from collections.abc import Sequence
from pathlib import Path

import tyro

from rlhf_jax.cli.console import show
from rlhf_jax.report import export, page
from rlhf_jax.report.parts import Part


def report_runs(
    runs: tyro.conf.Positional[tuple[str, ...]],
    output: str | None = None,
    png: str | None = None,
    labels: tuple[str, ...] = (),
    follow: bool = False,
) -> None:
    """Draw what runs did as one HTML page: curves, samples before and after, settings, commands.

    Runs that differ only in the seed are drawn as a mean with a band; a pipeline's folder stands
    for its stages.

    For example: rlhf-jax report runs/sft runs/ppo --output both.html

    Args:
        runs: folders of runs, finished or not.
        output: the page; by default report.html in the run's folder (stages.html in a folder of
            runs), or report.html here for several.
        png: a folder for the page's figures as PNG files too, called by their titles.
        labels: files that `rlhf-jax label` wrote, such as those that a reward model was trained on:
            the page ends with their agreement, bias and speed.
        follow: write the page again while the runs train, until they end; the open page loads
            itself again.
    """
    parts: Sequence[Part] = ()
    if labels:
        from rlhf_jax.inference.labelling import summary  # it needs JAX

        parts = summary.parts(summary.read_all(labels))
    path: str | Path = page.default_path(runs) if output is None else output
    if follow:
        from rlhf_jax.report.follow import follow as follow_runs

        path = follow_runs(runs, output, parts)
    else:
        page.write(runs, path, parts)
    show(path)
    if png is not None:
        show(f"{len(page.write_png(runs, png))} figures in {png}")


def export_run(run: tyro.conf.Positional[str], folder: tyro.conf.Positional[str]) -> None:
    """Copy a run's model to a Hugging Face folder with its tokenizer and a model card; or merge a
    PEFT adapter into the base model that it names.

    For example: rlhf-jax export runs/ppo my-model

    Args:
        run: the folder of a finished run, or of an adapter.
        folder: the new folder.
    """
    show(f"wrote {export.export(run, folder)}")
