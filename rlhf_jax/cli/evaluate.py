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
NOT_RUN = "not run: give "  # how the notes of not_run.yaml begin


def evaluate_run(
    run: tyro.conf.Positional[str],
    config: Settings,
) -> None:
    """Judge a run's policy by data: helpfulness, harmlessness, honesty, preferences, diversity,
    against another run.

    Writes evaluation.json and evaluation_samples.jsonl into the run's folder and draws its report
    again.

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
    """The figures under their categories, in lines that fit a terminal; and in one sentence the
    flags that would give more of them.
    """
    yield f"{'':<30}{'value':>8}  {'95% interval':<19} n"
    missing: dict[str, None] = {}
    for category, group in itertools.groupby(figures, lambda figure: figure.category):
        shown = [figure for figure in group if not figure.note.startswith(NOT_RUN)]
        if shown:
            yield category
            yield from itertools.chain.from_iterable(map(_of_figure, shown))
    for figure in figures:
        if figure.note.startswith(NOT_RUN):
            missing[figure.note.removeprefix(NOT_RUN)] = None
    if missing:
        yield from textwrap.wrap(f"More is measured with {', '.join(missing)}", WIDTH)


def _of_figure(figure: measures.Figure) -> Iterator[str]:
    """A figure, and its note below it."""
    interval = ""
    if figure.low is not None and figure.high is not None:
        interval = f"{figure.low:.3f} to {figure.high:.3f}"
    value = "–"
    if figure.value is not None:
        value = f"{figure.value:.3f}"
    count = f"{figure.n} {figure.unit}" if figure.unit else ""
    yield f"  {figure.metric:<28}{value:>8}  {interval:<19} {count}".rstrip()
    yield from textwrap.wrap(figure.note, WIDTH, initial_indent="    ", subsequent_indent="    ")
