"""How temporary memory and time of a step grow with its sizes: exponents fitted over doublings, as
a markdown table.

    python benchmarks/growth.py sft
    python benchmarks/growth.py iteration --time     # on a machine that does nothing else

Every row changes one size of the preset ``char-small`` and keeps the others. Memory is what the
compiled program says (``memory_analysis().temp_size_in_bytes``), so it needs no quiet machine; time
is the median of five calls.
"""

import argparse
import dataclasses
import statistics
from typing import Any

import numpy as np
from bench import measured
from steps import PRESETS, Preset, work

# {size: its values}; the preset's own are batch 64, response 48, width 128, depth 4, vocabulary 65.
SIZES = {
    "batch": (32, 64, 128),
    "response": (48, 96, 192, 384),
    "width": (128, 256, 512),
    "depth": (4, 8, 16),
    "vocabulary": (1024, 4096, 16384),
}


def scaled(size: str, value: int) -> Preset:
    """``char-small`` with one of its sizes changed."""
    preset = PRESETS["char-small"]
    if size in ("batch", "response"):
        preset = preset._replace(**{size: value})
    field = {"width": "hidden_size", "depth": "num_layers", "vocabulary": "vocab_size"}.get(
        size, "max_length"
    )
    value = preset.prompt + preset.response if field == "max_length" else value
    return preset._replace(model=dataclasses.replace(preset.model, **{field: value}))


def exponent(sizes: Any, values: Any) -> float:
    """The slope of log(values) over log(sizes), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def step(name: str, preset: Preset, calls: int) -> tuple[float, float]:
    """Bytes of temporary memory, and the median of the seconds of so many calls (NaN for none)."""
    timed = work(name, preset)
    compiled = timed.compile()
    seconds = []
    carry = timed.carry
    for _ in range(calls + 1 if calls else 0):
        carry, row = measured(compiled, carry, timed.data)
        seconds.append(row["seconds"])
    return compiled.memory_analysis().temp_size_in_bytes, statistics.median(
        seconds[1:]
    ) if calls else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "name", choices=("rollout", "iteration", "reward", "sft", "dpo", "grpo", "vpg")
    )
    parser.add_argument("--time", action="store_true")
    args = parser.parse_args()
    print(
        f"| {args.name}: size | values | temporary MiB | exponent | seconds | exponent "
        "|\n|---|---|---|---|---|---|"
    )
    for size, values in SIZES.items():
        rows = [step(args.name, scaled(size, value), 5 if args.time else 0) for value in values]
        bytes_used, seconds = zip(*rows, strict=True)
        memory = ", ".join(f"{number / 2**20:.0f}" for number in bytes_used)
        cells = [", ".join(map(str, values)), memory, f"{exponent(values, bytes_used):.2f}"]
        cells += (
            [", ".join(f"{s:.3f}" for s in seconds), f"{exponent(values, seconds):.2f}"]
            if args.time
            else ["", ""]
        )
        print(f"| {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
