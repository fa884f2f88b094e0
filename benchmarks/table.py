"""The table of docs/results.md: runs its commands one after another, some eleven minutes on two
idle cores.

    pip install -e '.[benchmarks]'
    python benchmarks/table.py

A ratio is the other program's median over ours. A row during which other programs used more than 2%
of the machine is said to be refused: run its command again.
"""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).with_name("bench.py")
# (command, the ratio that is wanted, the least that is accepted)
ROWS = [
    ("rollout --against transformers", 2.5, 2.1),
    ("rollout --against hand", 2.0, 1.6),
    ("reward --against trl", 2.0, 1.4),
    ("reward --against hand", 1.3, 1.05),
    ("sft --against trl", 2.0, 1.4),
    ("sft --against hand", 1.3, 1.05),
    ("iteration --against hand", 1.3, 1.1),
    ("iteration --value separate --against trl", 2.0, 1.6),
    ("dpo --against trl", 2.0, 1.5),
    ("grpo --against trl", 2.0, 1.5),
    ("sft --preset char-wide --against hand", 1.2, 1.0),
    ("reward --preset char-wide --against hand", 1.2, 1.0),
    ("vpg --against hand", 1.3, 1.0),
    ("startup --against trl", None, None),
]


def row(command: str, wanted: float | None, least: float | None) -> str:
    """A row of the table, from the line of JSON that the command prints."""
    words = [sys.executable, str(BENCH), *command.split()]
    output = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False).stdout
    lines = [text for text in output.splitlines() if text.startswith("{")]
    if not lines:
        return f"| `{command}` | failed | | | | | |"
    line = json.loads(lines[-1])
    refused = "refused, " if (line["others_cpu"] or 0.0) > 0.02 else ""
    if line["bench"] == "startup":
        cpu = (
            f"{line['cpu_s']:.1f} CPU-s; cold {line['cold_s']:.1f} s, {line['cold_cpu_s']:.1f} "
            "CPU-s"
        )
        ratios = f"**{line['ratio']:.2f}**, cold **{line['cold_ratio']:.2f}**"
        cells = f"{line['median_s']:.1f} s ({cpu}) | {line['against_median_s']:.1f} s | {ratios} |"
    else:
        cells = (
            f"{line['median_s']:.3f} s | {line['against_median_s']:.3f} s | "
            f"**{line['ratio']:.2f}** |"
        )
    goals = "| 5 CPU-s; cold 12 |" if wanted is None else f"{wanted} | {least} |"
    share = f"{line['flops_share']:.0%}" if "flops_share" in line else ""
    return f"| `{command}` | {refused}{cells} {goals} {share} |"


def main() -> None:
    print(
        "| `bench.py` | here | other | ratio | wanted | at least | of peak "
        "|\n|---|---|---|---|---|---|---|"
    )
    for given in ROWS:
        print(row(*given), flush=True)


if __name__ == "__main__":
    main()
