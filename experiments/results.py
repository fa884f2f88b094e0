"""The long table of results that the jobs of this folder write: a row for each number."""

import collections
import datetime
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax import metrics
from rlhf_jax.runs import devices
from rlhf_jax.runs.writing import write_atomically

ALL = "all"
EDGES = (" low", " high")  # of an interval, behind the name of its metric
Row = dict[str, Any]


def revision() -> str:
    """Of the tree that this file lies in; that of one with changes ends with "-dirty"."""
    here = str(Path(__file__).parent)
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


REVISION = revision()  # of the code that runs: until the end of a long job the tree may change


def row(variant: str, seed: int | str, step: int, metric: str, value: float) -> Row:
    """A number with what it belongs to; the seed is ``ALL`` for a mean over seeds."""
    key = {"variant": variant, "seed": seed, "step": step}
    return key | {"metric": metric, "value": round(float(value), 4)}


def share(num_right: float, num: int) -> dict[str, float]:
    """A share {"": , " low": , " high": } with its 95% interval (``metrics.wilson``)."""
    return with_edges(num_right / num, metrics.wilson(num_right / num, num=num))


def with_edges(value: float, interval: metrics.Interval) -> dict[str, float]:
    """{"": value, " low": , " high": } of its interval, behind the name of a metric."""
    return dict(zip(("", *EDGES), (float(value), *interval), strict=True))


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """The mean of each number over its seeds, with Student's 95% interval if there are several."""
    values = collections.defaultdict(list)
    for one in rows:
        is_edge = one["metric"].endswith(EDGES)
        if not is_edge:
            values[one["variant"], one["step"], one["metric"]].append(one["value"])
    found = []
    for (variant, step, metric), of_seeds in values.items():
        numbers = {"": float(np.mean(of_seeds))}
        if len(of_seeds) > 1:
            numbers = with_edges(numbers[""], metrics.student(np.array(of_seeds)))
        for edge, value in numbers.items():
            found.append(row(variant, ALL, step, f"{metric}{edge}", value))
    return found


def write(path: Path, command: str, seconds: float, rows: list[Row], **more: Any) -> None:
    """Writes {command, date, revision, machine, seconds, rows} as JSON, a row a line. The date
    is UTC's; a test keeps a file whose revision is "-dirty" out of docs/results/.

    more: further keys, such as the settings, or other values of these.
    """
    content = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "revision": REVISION,
        "machine": f"{os.cpu_count()} cores, {devices.cpu()}",
        "seconds": round(seconds),
        **more,
    }
    head, end = json.dumps(content | {"rows": [0]}, indent=1, ensure_ascii=False).rsplit("0", 1)
    lines = ",\n  ".join(json.dumps(one, ensure_ascii=False) for one in rows)
    write_atomically(path, f"{head}{lines}{end}\n")
