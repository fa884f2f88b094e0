"""The tables of a page that show what samples.jsonl holds: samples before and after, and the pairs
that a reward model gets wrong.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf_jax.report.parts import Table
from rlhf_jax.report.records import Row, RunRecord

MAX_SAMPLES = 8  # of one group of runs
# Columns of samples.jsonl for pairs, for answers with target scores, for prompts that the data
# answers too and for prompts: first those that are the same at each validation, then those that
# change. A row is of the first of these kinds whose last unchanging column it has, or else of the
# last kind.
PAIR = ("prompt", "chosen", "rejected")
ANSWER = ("prompt", "answer")
SAMPLE_COLUMNS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (PAIR, ("margin",)),
    (("prompt", "response", "target"), ("score",)),
    ((*ANSWER, "desirable"), ("response", "log_ratio")),
    (ANSWER, ("response", "log_ratio")),
    (("prompt",), ("response", "score")),
)
NUMBERS = ("score", "margin", "log_ratio")  # what the names of columns of numbers begin with


def tables(run_records: Sequence[RunRecord], is_one: bool) -> list[Table]:
    """The samples of each run that has any, and of reward models the pairs that they get wrong.

    is_one: the page's chapter is of one run, which no title has to name.
    """
    sampled = [record for record in run_records if record.samples]
    shown = [_before_and_after(record, is_one) for record in sampled]
    wrong = [_wrong(record, is_one) for record in sampled]
    return shown + [table for table in wrong if table.rows]


def _wrong(record: RunRecord, is_one: bool) -> Table:
    """The pairs of the last validation whose rejected answer scores higher, worst margin first."""
    step, last = record.validations[-1]
    pairs = [row for row in last if "margin" in row]
    wrong = [row for row in pairs if row["margin"] < 0]
    wrong.sort(key=lambda row: row["margin"])
    rows = []
    for row in wrong[:MAX_SAMPLES]:
        texts = [_with_line_ends(row.get(name)) for name in PAIR[1:]]
        rows.append([_prompt(row), *texts, row["margin"]])
    title = "Pairs that it gets wrong"
    if not is_one:
        title = f"Pairs that {record.name} gets wrong"
    note = f"{len(wrong)} of {len(pairs)} in samples.jsonl of step {step}; the worst margins first."
    return Table(title, [*PAIR, "margin"], rows, {"margin": ".3g"}, note)


def _before_and_after(record: RunRecord, is_one: bool) -> Table:
    """The first rows of the last validation. Each value that changes stands beside the value that
    the first validation had in the same row. A column without a value is left out.
    """
    steps, validations = zip(*record.validations, strict=True)
    last = validations[-1]
    for fixed, changing in SAMPLE_COLUMNS:  # noqa: B007
        if fixed[-1] in last[0]:
            break
    changing = tuple(name for name in changing if any(name in row for row in last))
    numbered = [_numbered(rows, fixed) for rows in validations]
    shown = list(numbered[-1].items())
    rows = []
    for key, row in shown[:MAX_SAMPLES]:
        texts = [row.get(name) for name in fixed[1:]]
        for by_key in numbered:
            at_step = by_key.get(key, {})
            texts += [at_step.get(name) for name in changing]
        rows.append([_prompt(row), *map(_with_line_ends, texts)])
    at_steps = [f"{name}, step {step}" for step in steps for name in changing]
    columns = [*fixed, *at_steps]
    title = "Samples before and after" if len(steps) > 1 else "Samples"
    if not is_one:
        title += f": {record.name}"
    formats = {name: ".3g" for name in columns if name.startswith(NUMBERS)}
    note = f"Of {len(last)} in samples.jsonl. ↵ marks a line's end that the text holds."
    return Table(title, columns, rows, formats, note)


def _prompt(row: Row) -> str:
    """Without the empty lines around it, which the template adds."""
    return str(row.get("prompt") or "").strip("\n")


def _with_line_ends(text: Any) -> Any:
    return text.replace("\n", "↵\n") if isinstance(text, str) else text


def _numbered(rows: Sequence[Row], fixed: Sequence[str]) -> dict[tuple[str, int], Row]:
    """{(the values that stay the same, how often they came before): row}."""
    numbered: dict[tuple[str, int], Row] = {}
    count = Counter[str]()
    for row in rows:
        values = repr([row.get(name) for name in fixed])
        numbered[values, count[values]] = row
        count[values] += 1
    return numbered
