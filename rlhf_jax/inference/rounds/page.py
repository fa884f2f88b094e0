"""The page of all rounds: one curve over them, a table of them, and what people's judgements say of
themselves.
"""

from collections.abc import Sequence
from typing import Any

from rlhf_jax.config import Rounds
from rlhf_jax.errors import file_errors, read_file
from rlhf_jax.inference.label import store_file
from rlhf_jax.inference.labelling import summary
from rlhf_jax.inference.rounds.folders import Round
from rlhf_jax.report import figures, page, records
from rlhf_jax.report.parts import Part
from rlhf_jax.runs import reading
from rlhf_jax.runs.writing import write_atomically

WIN_RATE = ("win rate", "win_rate")
QUALITY = ("helpfulness", "quality")
_PLOTS = {
    WIN_RATE: ("Held-out prompts: preferred to the first policy", "share, ties half", "win rate"),
    QUALITY: ("Held-out prompts: mean score", "score", "gold score"),
}
_RUNS = {
    "reward model accuracy": ("reward_model", "validation/accuracy"),
    "KL from the round's start": ("rl", "objective/kl"),
    "reward model's score": ("rl", "validation/score"),
}


def write(rounds: Sequence[Round], how: Rounds) -> list[dict[str, Any]]:
    """Writes ``report.html`` of the finished rounds; returns its figures, a row for each round."""
    rows = [_row(own) for own in rounds]
    judge = f"the gold reward {how.gold}"
    told = ""
    if how.gold is None:
        judge = "the round's own reward model"
        told = (
            " Each round is judged by another reward model, so that the curve cannot show a policy "
            "that exploits it; rounds.gold gives a judge that is never trained on."
        )
    facts = {
        "rounds": len(rounds),
        "compared by": how.judge or f"people: {', '.join(how.annotators)}",
        "pairs are chosen": how.choose,
        "held-out answers are judged by": judge,
    }
    parts: list[Part] = [
        page.Facts("Rounds", facts),
        page.Figures("Curves", _plots(rounds, how)),
        page.Table("Each round", [*rows[0]], [[*row.values()] for row in rows]),
    ]
    labelled = [own.labels for own in rounds if store_file(own.labels).exists()]
    if labelled:
        parts += summary.parts(summary.read_all(labelled))
    text = page.render(
        f"{len(rounds)} rounds of feedback",
        parts,
        "Each round compares answers of the policy, trains a reward model on all comparisons so "
        f"far, and trains the policy on it. Bands are 95% intervals.{told}",
    )
    path = rounds[0].job / "report.html"
    with file_errors(path, "written"):
        write_atomically(path, text)
    return rows


def _row(own: Round) -> dict[str, Any]:
    """The figures of a round."""
    row: dict[str, Any] = {"round": own.number}
    row["rows of preferences"] = len(read_file(own.prefs, most=None).splitlines())
    for name, (run, metric) in _RUNS.items():
        metrics = records.read_rows(own.folder / run / "metrics.jsonl")
        values = records.series(metrics, metric)[1]
        row[name] = values[-1] if values else None
    measured = _evaluated(own)
    for key, (_, _, name) in _PLOTS.items():
        figure = measured.get(key)
        row[name] = figure and figure["value"]
        row[f"{name}, 95% interval"] = figure and f"{figure['low']:.3f} to {figure['high']:.3f}"
    return row


def _evaluated(own: Round) -> dict[tuple[str, str], dict[str, Any]]:
    """{(category, metric): figure} of a round's evaluation that have a value."""
    path = own.evaluation / records.EVALUATION
    rows = reading.read_json(path, reading.EVALUATION, ["rows"])["rows"]
    return {(row["category"], row["metric"]): row for row in rows if row["low"] is not None}


def _plots(rounds: Sequence[Round], how: Rounds) -> list[figures.Plot]:
    """The win rate over the rounds; with a gold reward the mean score too, from the first policy
    on.
    """
    plots = []
    first = Round(0, rounds[0].job)
    for key, (title, unit, name) in _PLOTS.items():
        shown = [*rounds]
        if key == QUALITY:
            if how.gold is None:
                continue
            shown.insert(0, first)
        points = [(own.number, _evaluated(own).get(key)) for own in shown]
        found = [(number, figure) for number, figure in points if figure]
        curve = figures.Series(
            [number for number, _ in found],
            [figure["value"] for _, figure in found],
            [figure["low"] for _, figure in found],
            [figure["high"] for _, figure in found],
        )
        lines = {"as the first": 0.5} if key == WIN_RATE else {}
        plots.append(figures.Plot(title, "round", unit, {name: curve}, lines=lines))
    return plots
