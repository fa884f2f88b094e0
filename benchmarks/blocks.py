"""What ``compute.blocks`` costs: seconds of a step and memory of runs without it and with 8 blocks.

    python benchmarks/blocks.py --devices 1 8

Real runs of ``char-small`` on random texts, each in a process of its own, in turn. A figure is the
median over the steps of all rounds, without the first two steps of a run. Memory is the largest
that the process had. ``least`` compares the fastest steps, which other programs disturb least.
"""

import argparse
import json
import os
import random
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

from steps import PRESETS, Preset

CHARACTERS = string.ascii_letters + string.digits + " "  # 63, and two special tokens
SKIPPED = 2  # steps: the first one compiles
LIKE = (
    "--tokenizer.kind characters --text.template {prompt} --network.hidden-size 128 "
    "--network.num-layers 4 --network.num-heads 4 --network.max-length 112 --device cpu "
    "--text.bucket-multiple 16 --checkpoint-interval 1000"
)
STAGES = {
    "sft": "--sft.batch-size 64 --sft.num-epochs 1 --sft.validation-fraction 0",
    "ppo": "--ppo.num-epochs 4 --ppo.num-minibatches 1",
    "grpo": "--grpo.group-size 4 --grpo.num-minibatches 1",
}
OF_RL = (
    "--rl.num-iterations {steps} --rl.batch-size 64 --rl.max-new-tokens 48 "
    "--rl.validation-fraction 0 --reward length"
)


class Figures(NamedTuple):
    seconds: list[float]  # of the steps
    mib: float


def write_data(folder: Path, preset: Preset, num_rows: int) -> None:
    """Texts of the preset's lengths."""
    generator = random.Random(0)
    rows = []
    for _ in range(num_rows):
        prompt = "".join(generator.choices(CHARACTERS, k=preset.prompt))
        response = "".join(generator.choices(CHARACTERS, k=preset.response - 1))
        rows.append({"prompt": prompt, "response": response})
    (folder / "sft_data.json").write_text(json.dumps(rows), "utf-8")
    prompts = [{"prompt": row["prompt"]} for row in rows]
    (folder / "prompts.json").write_text(json.dumps(prompts), "utf-8")


def measured(stage: str, folder: Path, devices: int, steps: int, blocks: int) -> Figures:
    """A run of a stage."""
    command = [sys.executable, "-m", "rlhf_jax", stage, *LIKE.split(), *STAGES[stage].split()]
    if stage != "sft":
        command += OF_RL.format(steps=steps).split()
    if blocks:
        command += ["--compute.blocks", str(blocks)]
    output = folder / "run"
    command += ["--data", str(folder), "--output-dir", str(output), "--overwrite"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the run ended with {status}: {' '.join(command)}")
    lines = (output / "timing.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    seconds = [row["timing/step"] for row in rows if "timing/step" in row]
    return Figures(seconds[SKIPPED:], usage.ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=tuple(STAGES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=8)
    args = parser.parse_args()
    print("| stage, devices | s off | s in blocks | ratio | least | MiB off | MiB in blocks |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, PRESETS["char-small"], num_rows=64 * args.steps)
        for stage in args.stages:
            for devices in args.devices:
                found: dict[int, list[Figures]] = {0: [], args.blocks: []}
                for _ in range(args.rounds):
                    for blocks, rounds in found.items():
                        rounds.append(measured(stage, folder, devices, args.steps, blocks))
                seconds = [[s for run in rounds for s in run.seconds] for rounds in found.values()]
                off, on = map(median, seconds)
                least_off, least_on = map(min, seconds)
                mib = [max(run.mib for run in rounds) for rounds in found.values()]
                times = f"{off:.3f} | {on:.3f} | {on / off:.2f} | {least_on / least_off:.2f}"
                print(f"| {stage}, {devices} | {times} | {mib[0]:.0f} | {mib[1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
