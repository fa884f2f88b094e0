"""Does TRL learn the same? GRPO and DPO of experiments/learning.py beside TRL 1.16.

    python experiments/learning.py runs/learning
    pip install torch accelerate peft && pip install --no-deps trl==1.16.0
    python benchmarks/peers.py runs/learning --out peers.json

Both libraries train the same adapters on the same rows with the same batches, rates and number of
steps, and are measured on the same held-out rows. The order of the rows and the drawn tokens are
each library's own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rlhf_jax.runs import devices
from rlhf_jax.runs.writing import write_atomically

HERE = Path(__file__).resolve().parent
STAGES = {
    # name: (of the run, metric of its held-out rows, what the metric is)
    "GRPO": ("grpo", "validation/score", "share of right answers"),
    "DPO": ("dpo", "validation/accuracy", "accuracy of held-out pairs"),
}


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def ours(run: Path, metric: str) -> tuple[dict[int, float], float]:
    """{step: value} of a run, and the seconds of its median step."""
    values = {row["step"]: row[metric] for row in rows_of(run / "metrics.jsonl") if metric in row}
    timing = rows_of(run / "timing.jsonl")
    seconds = sorted(row["timing/step"] for row in timing if "timing/step" in row)
    return values, seconds[len(seconds) // 2]


def theirs(
    stage: str, folder: Path, seed: int, *, steps: int, batch: int
) -> tuple[dict[int, float], float]:
    """The same of TRL."""
    out = folder / f"trl-{stage}-{seed}.json"
    if not out.exists():
        words = [stage, folder, seed, steps, batch, out]
        script = [sys.executable, HERE / "peers_trl.py", *words]
        subprocess.run(list(map(str, script)), check=True)
    found = json.loads(out.read_text("utf-8"))
    return {int(step): value for step, value in found["values"].items()}, found["seconds"]


def compared(folder: Path, seed: int) -> list[dict[str, Any]]:
    """The rows of one seed."""
    found = []
    for name, (stage, metric, meaning) in STAGES.items():
        run = folder / f"seed-{seed}" / stage
        of_run = ours(run, metric)
        batch = 64 if stage == "grpo" else 16
        of_trl = theirs(stage, folder, seed, steps=max(of_run[0]), batch=batch)
        for library, (values, seconds) in {"rlhf_jax": of_run, "TRL 1.16": of_trl}.items():
            numbers = [(step, f"{name}: {meaning}", value) for step, value in values.items()]
            numbers.append((max(values), f"{name}: seconds a step", seconds))
            for step, metric_name, value in numbers:
                place = {"variant": library, "seed": seed, "step": step}
                found.append(place | {"metric": metric_name, "value": round(value, 4)})
    return found


def main() -> None:
    """Trains with TRL what the folder's runs have trained, and writes both as one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of experiments/learning.py")
    parser.add_argument("--seeds", type=int, default=2, help="how many of its seeds")
    parser.add_argument("--out", type=Path, help="a file for the results as a table")
    args = parser.parse_args()
    started = time.monotonic()
    rows = []
    for seed in range(args.seeds):
        rows += compared(args.folder, seed)
        if args.out is not None:
            git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
            revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout
            content = {
                "command": f"python benchmarks/peers.py runs/learning --seeds {seed + 1}",
                "revision": revision.strip(),
                "machine": f"{os.cpu_count()} cores, {devices.cpu()}",
                "seconds": round(time.monotonic() - started),
                "rows": rows,
            }
            write_atomically(args.out, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
