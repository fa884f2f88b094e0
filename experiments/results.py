"""The long table of results that the jobs of this folder write: a row for each number."""

import collections
import json
import math
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import scipy.stats

from rlhf_jax.runs import devices
from rlhf_jax.runs.writing import write_atomically

Z = 1.96  # of a 95% interval
ALL = "all"
EDGES = (" low", " high")  # of an interval, behind the name of its metric
Row = dict[str, Any]


def row(variant: str, seed: int | str, step: int, metric: str, value: float) -> Row:
    """A number with what it belongs to; the seed is ``ALL`` for a mean over seeds."""
    key = {"variant": variant, "seed": seed, "step": step}
    return key | {"metric": metric, "value": round(float(value), 4)}


def share(num_right: float, num: int) -> dict[str, float]:
    """A share {"": , " low": , " high": } with its 95% interval (Wilson 1927)."""
    value = num_right / num
    scale = 1 + Z * Z / num
    centre = (value + Z * Z / (2 * num)) / scale
    spread = Z * math.sqrt(value * (1 - value) / num + Z * Z / (4 * num**2)) / scale
    return {"": value, " low": centre - spread, " high": centre + spread}


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """The mean of each number over its seeds, with Student's 95% interval if there are several."""
    values = collections.defaultdict(list)
    for one in rows:
        is_edge = one["metric"].endswith(EDGES)
        if not is_edge:
            values[one["variant"], one["step"], one["metric"]].append(one["value"])
    found = []
    for (variant, step, metric), of_seeds in values.items():
        mean = statistics.fmean(of_seeds)
        found.append(row(variant, ALL, step, metric, mean))
        num = len(of_seeds)
        if num == 1:
            continue
        error = statistics.stdev(of_seeds) / math.sqrt(num)
        half = scipy.stats.t.ppf(0.975, num - 1) * error
        found.append(row(variant, ALL, step, f"{metric} low", mean - half))
        found.append(row(variant, ALL, step, f"{metric} high", mean + half))
    return found


def write(path: Path, command: str, seconds: float, rows: list[Row], **more: Any) -> None:
    """Writes {command, revision, machine, seconds, rows} as JSON.

    more: further keys, such as the settings.
    """
    here = str(Path(__file__).parent)
    git = ["git", "-C", here, "describe", "--always", "--dirty", "--exclude=*"]
    revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    content: Mapping[str, Any] = {
        "command": command,
        "revision": revision,
        "machine": f"{os.cpu_count()} cores, {devices.cpu()}",
        "seconds": round(seconds),
        **more,
        "rows": rows,
    }
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
