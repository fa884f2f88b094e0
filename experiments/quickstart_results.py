"""The numbers of quickstarts as a table (docs/results/quickstart.json), from their folders.

for seed in 0 1 2; do
    rlhf-jax quickstart --seed $seed --output-dir runs/quickstart-$seed
done
python experiments/quickstart_results.py runs/quickstart-? --out docs/results/quickstart.json
"""

import datetime
import json
import sys
from pathlib import Path

import results
import tyro

from rlhf_jax import cli
from rlhf_jax.report import records
from rlhf_jax.report.records import RunRecord
from rlhf_jax.training import pipeline

VARIANT = "quickstart"


def table(folder: Path) -> list[results.Row]:
    """What the page shows of a finished quickstart, as a long table, with 95% intervals of shares
    over the held-out rows.
    """
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    pairs = json.loads((folder / "data" / "heldout_preference_data.json").read_text("utf-8"))
    [ppo] = records.find([folder / "ppo"])
    num_prompts = summary["heldout_prompts"]
    accuracy = summary["reward_model"]["accuracy"]
    wins = summary["win_rate"]
    shares = {
        "reward model's accuracy": results.share(accuracy * len(pairs), len(pairs)),
        "PPO beats SFT": results.share(wins * num_prompts, num_prompts),  # wider than with its ties
    }
    last = summary["kl"]["last_iterations"]
    numbers = {
        "lowest KL of the last 10": min(last),
        "highest KL of the last 10": max(last),
        "rubric, SFT": summary["rubric"]["sft"],
        "rubric, PPO": summary["rubric"]["ppo"],
    }
    for name, ends in shares.items():
        for end, value in ends.items():
            numbers[f"{name}{end}"] = value
    seed = summary["seed"]
    rows = []
    for name, value in numbers.items():
        number = results.row(VARIANT, seed, ppo.steps, name, value)
        rows.append(number)
    return rows


def seconds(stages: list[RunRecord]) -> float:
    """Of all steps and validations, those that compile included."""
    total = 0.0
    for record in stages:
        for row in record.timing:
            total += sum(value for name, value in row.items() if name != "step")
    return total


def main(folders: tyro.conf.Positional[tuple[Path, ...]], out: Path) -> None:
    """Writes the table: of each seed, and of several also the means over them.

    Args:
        folders: of finished quickstarts, one for each seed.
        out: the file.
    """
    rows = [row for folder in folders for row in table(folder)]
    if len(folders) > 1:
        rows += results.over_seeds(rows)
    stages = records.find([folder / name for folder in folders for name in pipeline.STAGES])
    ended = max((folder / "summary.json").stat().st_mtime for folder in folders)
    tree = stages[0].manifest.get("git") or {"commit": "unknown", "modified": False}
    facts = {
        "date": datetime.datetime.fromtimestamp(ended, datetime.UTC).date().isoformat(),
        "revision": tree["commit"][:8] + "-dirty" * tree["modified"],
    }
    seeds = dict.fromkeys(str(row["seed"]) for row in rows if row["seed"] != results.ALL)
    command = f"rlhf-jax quickstart --seed {', '.join(seeds)}"
    results.write(out, command, seconds(stages) / len(folders), rows, **facts)


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
