"""``rlhf-jax data``: files checked and shown, and the generated corpus."""

import dataclasses
import json
from pathlib import Path

import tyro

from rlhf_jax.cli.console import show
from rlhf_jax.data import check, demo, tokenizers
from rlhf_jax.data.rows import Kind, OnBadRow
from rlhf_jax.errors import UserError, file_errors
from rlhf_jax.graders import verifiable
from rlhf_jax.runs import writing

Positional = tyro.conf.Positional[str]
Files = tyro.conf.Positional[tuple[str, ...]]


def write_demo(folder: Positional, seed: int = 0, shuffle_labels: bool = False) -> None:
    """Write the generated assistant corpus: sft_data.json, preference_data.json, prompts.json and
    held-out files.

    Args:
        folder: where to write; made if missing.
        seed: the same seed gives the same files.
        shuffle_labels: preferences by coin flip, as a negative control.
    """
    demo.write(folder, seed=seed, shuffle_labels=shuffle_labels)
    show(f"wrote the demo corpus to {folder}")


def write_gym(task: Positional, count: int, seed: int = 0, out: str | None = None) -> None:
    """Write prompts of a task of reasoning-gym as JSON lines, for `--reward gym:TASK`.

    Args:
        task: such as leg_counting.
        count: rows, at most a million; each is a function of task, seed and number.
        seed: at most 4,000; no row is one of another seed.
        out: the file; by default the rows are printed.
    """
    if not (0 < count <= 1_000_000 and 0 <= seed <= 4_000):
        raise UserError(f"data gym: a count from 1 to 1,000,000, a seed to 4,000: {count}, {seed}")
    text = "".join(f"{json.dumps(row)}\n" for row in verifiable.gym_rows(task, seed, count))
    if out is None:
        show(text, end="")
    else:
        with file_errors(out, "written"):
            writing.write_atomically(Path(out), text)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How data files are read."""

    tokenizer: str | None = None
    """Folder or name; lengths are then in its tokens, and its chat template renders messages."""
    kind: Kind | None = None
    """What the rows should be; by default what most of them are."""
    columns: tuple[str, ...] = ()
    """Keys of the data under other names, each OURS=THEIRS: prompt=question response=answer."""

    def load_tokenizer(self) -> tokenizers.Tokenizer | None:
        """The tokenizer; None without one."""
        return None if self.tokenizer is None else tokenizers.load_tokenizer(self.tokenizer)


def check_data(
    files: Files,
    reading: tyro.conf.OmitArgPrefixes[Reading],
    on_bad_row: OnBadRow = "error",
    reward: tuple[str, ...] = (),
    math: verifiable.Settings = verifiable.DEFAULT,
) -> int:
    """Read data files to their end: format, counts, lengths, duplicates, what they share, and every
    problem.

    Exits with 2 if a run could not read one of them.

    For example: rlhf-jax data check pairs.jsonl --kind pairs

    Args:
        files: JSON, JSON lines, CSV, Parquet or text files, or names of Hugging Face datasets.
        reading: how they are read.
        on_bad_row: error: rows that a stage cannot use are problems; drop: they are left out and
            counted.
        reward: math, regex:PATTERN or FILE.py:FUNCTION, tried on the rows: does a row's own answer
            score, and the prompt itself, an empty response and another row's answer not?
        math: how math reads answers.
    """
    report = check.check(
        files,
        reading.load_tokenizer(),
        kind=reading.kind,
        columns=reading.columns,
        on_bad_row=on_bad_row,
        reward=reward,
        math=math,
    )
    show(report.text)
    return 2 if report.num_problems else 0
