"""The long table of results that the jobs of this folder write: a row for each number."""

import json
import math
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_jax.runs import devices
from rlhf_jax.runs.writing import write_atomically

Z = 1.96  # of a 95% interval
Row = dict[str, Any]


def row(variant: str, seed: int, step: int, metric: str, value: float) -> Row:
    """A number with what it belongs to."""
    key = {"variant": variant, "seed": seed, "step": step}
    return key | {"metric": metric, "value": round(value, 4)}


def share(num_right: float, num: int) -> dict[str, float]:
    """A share {"": , " low": , " high": } with its 95% interval (Wilson 1927)."""
    value = num_right / num
    scale = 1 + Z * Z / num
    centre = (value + Z * Z / (2 * num)) / scale
    spread = Z * math.sqrt(value * (1 - value) / num + Z * Z / (4 * num**2)) / scale
    return {"": value, " low": centre - spread, " high": centre + spread}


def write(path: Path, command: str, seconds: float, rows: list[Row], **more: Any) -> None:
    """Writes {command, revision, machine, seconds, rows} as JSON.

    more: further keys, such as the settings.
    """
    here = str(Path(__file__).parent)
    git = ["git", "-C", here, "rev-parse", "--short", "HEAD"]
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
