"""``rlhf-jax evaluate``: a run's policy judged by data."""

from pathlib import Path

import tyro

from rlhf_jax.cli.console import print_table, show
from rlhf_jax.evaluation import evaluate, measures
from rlhf_jax.report import page

Settings = tyro.conf.OmitArgPrefixes[evaluate.Config]


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
    rows = [_cells(row) for row in result.rows]
    print_table(("category", "metric", "value", "95% interval", "n", ""), rows)
    show(f"wrote {result.path}")
    folder = Path(run)
    is_run = (folder / "manifest.json").is_file()
    if is_run and result.path.parent == folder:
        page.write([run], page.default_path([run]))


def _cells(figure: measures.Figure) -> tuple[str, ...]:
    """A figure as the cells of a table."""
    interval = ""
    if figure.low is not None and figure.high is not None:
        interval = f"{figure.low:.3f} to {figure.high:.3f}"
    value = "–"
    if figure.value is not None:
        value = f"{figure.value:.3f}"
    count = f"{figure.n} {figure.unit}"
    if not figure.unit:
        count = ""
    return (
        figure.category,
        figure.metric,
        value,
        interval,
        count,
        figure.note,
    )
