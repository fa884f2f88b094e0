"""``rlhf-jax evaluate``: a run's policy judged by data."""

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import tyro

from rlhf_jax.cli.console import show
from rlhf_jax.evaluation import evaluate, measures
from rlhf_jax.report import page

Settings = tyro.conf.OmitArgPrefixes[evaluate.Config]
WIDTH = 80
NOT_RUN = "not run: give "  # how the notes of what was not asked for begin


def evaluate_run(
    run: tyro.conf.Positional[str],
    config: Settings,
) -> None:
    """Judge a run's policy by data: helpfulness, harmlessness, honesty, preferences, diversity,
    against another run.

    Writes evaluation.json and evaluation_samples.jsonl into the run's folder and draws its report
    again.

    For example: rlhf-jax evaluate runs/ppo --preferences pairs.jsonl --against runs/sft

    Args:
        run: the folder of a finished run, or of a model.
        config: what it is judged by.
    """
    result = evaluate.run(run, config)
    for line in lines(result.rows):
        show(line)
    show(f"wrote {result.path}")
    folder = Path(run)
    is_run = (folder / "manifest.json").is_file()
    if is_run and result.path.parent == folder:
        page.write([run], page.default_path([run]))


def lines(figures: Sequence[measures.Figure]) -> Iterator[str]:
    """The figures under their categories, in lines that fit a terminal, each with its note below
    it; and in one sentence the flags that would give more of them.
    """
    yield f"{'':<30}{'value':>8}  {'95% interval':<19} n"
    measured = [figure for figure in figures if not figure.note.startswith(NOT_RUN)]
    for category, group in itertools.groupby(measured, lambda figure: figure.category):
        yield category
        for figure in group:
            interval = ""
            if figure.low is not None and figure.high is not None:
                interval = f"{figure.low:.3f} to {figure.high:.3f}"
            value = "–" if figure.value is None else f"{figure.value:.3f}"
            count = f"{figure.n} {figure.unit}" if figure.unit else ""
            yield f"  {figure.metric:<28}{value:>8}  {interval:<19} {count}".rstrip()
            indent = "    "
            yield from textwrap.wrap(
                figure.note, WIDTH, initial_indent=indent, subsequent_indent=indent
            )
    missing = dict.fromkeys(
        figure.note.removeprefix(NOT_RUN) for figure in figures if figure.note.startswith(NOT_RUN)
    )
    if missing:
        yield from textwrap.wrap(f"More is measured with {', '.join(missing)}", WIDTH)
