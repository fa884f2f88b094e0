"""What ``compute.scan_layers`` costs and saves at 2, 12 and 24 layers, as a markdown table.

    python benchmarks/depth.py
    python benchmarks/depth.py --family Qwen2    # of families.py, whose heads share keys

The preset ``char-small``, a GPT-2, with 4 rows. Programs are compiled without a cache. All times
are CPU seconds of this process, which other programs disturb little; a step is the least of three.
"""

import argparse
import dataclasses
import itertools
import time
from typing import Any

import jax
from families import CONFIGS
from steps import PRESETS, work

from rlhf_jax.models.config import ModelConfig

LAYERS = (2, 12, 24)
KINDS = ("unrolled", "scanned")


def row(name: Any, config: ModelConfig, layers: int, kind: str) -> list[str]:
    """Instructions, CPU seconds of tracing and compiling, and of a call."""
    preset = PRESETS["char-small"]
    model = dataclasses.replace(config, num_layers=layers, scan_layers=kind != KINDS[0])
    timed = work(name, preset._replace(model=model, batch=4))
    jax.clear_caches()
    started = time.process_time()
    compiled = timed.compile()
    seconds = [time.process_time() - started]
    carry = timed.carry
    for _ in range(4):
        started = time.process_time()
        carry, _ = jax.block_until_ready(compiled(carry, timed.data))
        seconds.append(time.process_time() - started)
    instructions = sum(" = " in line for line in compiled.as_text().splitlines())
    return [f"{instructions:,}", f"{seconds[0]:.1f}", f"{min(seconds[2:]):.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=CONFIGS)
    family = parser.parse_args().family
    config = CONFIGS[family] if family else PRESETS["char-small"].model
    jax.config.update("jax_enable_compilation_cache", False)
    print(
        "| program | layers | kind | instructions | CPU s to compile | CPU s of a call "
        "|\n|---|---|---|---|---|---|"
    )
    for name, kind in itertools.product(("sft", "rollout"), KINDS):
        for layers in LAYERS:
            print(
                "|",
                " | ".join([name, str(layers), kind, *row(name, config, layers, kind)]),
                "|",
                flush=True,
            )


if __name__ == "__main__":
    main()
