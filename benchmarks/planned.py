"""What ``rlhf-jax plan`` says beside what a run takes, on one CPU (Linux): a markdown table.

    python benchmarks/planned.py sft dpo ppo

A GPT-2 of 4 layers of width 256 is trained on rows of 112 tokens. Measured is what lies on the
device before a step, plus the growth of resident memory up to its peak in the step, so neither the
compiler's memory nor a checkpoint's.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from rlhf_jax import models, training
from rlhf_jax.algorithms import ppo
from rlhf_jax.cli.planning import plan
from rlhf_jax.config import RLStage, RunConfig
from rlhf_jax.data import tokenizers
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.training.common.progress import Progress

MIB = 2**20
ROWS = 32
TOKENS = 112


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM, the peak of the process."""
    return 1024 * int(
        re.findall(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))[0]
    )


def config_of(stage: str, folder: Path, num_microbatches: int) -> RunConfig:
    """A run on the model and data of ``folder``, which it writes."""
    tokenizer = tokenizers.characters(["abcdefgh"])
    ids = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    model = models.build(models.GPT2Config(tokenizer.vocab_size, TOKENS, 256, 4, 4, **ids))
    how = SamplingConfig(4, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    LanguageModel(model, model.init(jax.random.key(0)), tokenizer).save(
        folder / "m", template="{prompt}", config=how
    )
    prompts = [f"{number:064b}".translate({48: "a", 49: "b"}) for number in range(2 * ROWS)]
    pairs = [{"prompt": prompt, "chosen": "a" * 47, "rejected": "b" * 47} for prompt in prompts]
    (folder / "pairs.json").write_text(json.dumps(pairs), "utf-8")
    rl = RLStage(
        num_iterations=1,
        batch_size=ROWS,
        max_new_tokens=48,
        max_prompt_length=64,
        validation_fraction=0.0,
    )
    given = {
        "data": (str(folder / "pairs.json"),),
        "model": str(folder / "m"),
        "output_dir": str(folder / "run"),
    }
    config = RunConfig(**given, reward=("length",), rl=rl)  # type: ignore[arg-type]
    own: dict[str, Any] = {"num_microbatches": num_microbatches}
    if stage != "ppo":
        own |= {"batch_size": ROWS, "validation_fraction": 0.0, "num_epochs": 1}
    return dataclasses.replace(
        config, **{stage: dataclasses.replace(getattr(config, stage), **own)}
    )


def measured(config: RunConfig, stage: str) -> int:
    """The most bytes during a step of a run, after the one that is attempted before step 0."""
    peaks = []
    before = 0.0
    steps, record = Progress.steps, Progress.record

    def begun(self: Progress) -> Iterator[int]:
        nonlocal before
        for step in steps(self):
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            arrays = (x for x in jax.live_arrays() if not x.is_deleted())
            held = {x.unsafe_buffer_pointer(): x.nbytes for x in arrays}
            before = resident("VmRSS") - sum(held.values())
            Path("/proc/self/clear_refs").write_text("5", "utf-8")  # the peak starts anew
            yield step

    def ended(self: Progress, *step: Any, **more: Any) -> None:
        record(self, *step, **more)
        jax.block_until_ready(self.state)
        peaks.append(resident("VmHWM") - before)

    Progress.steps, Progress.record = begun, ended  # type: ignore[method-assign]
    try:
        training.rl.run(config, ppo) if stage == "ppo" else getattr(training, stage).run(config)
    finally:
        Progress.steps, Progress.record = steps, record  # type: ignore[method-assign]
    return max(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="+", choices=("sft", "dpo", "ppo"))
    parser.add_argument("--microbatches", type=int, nargs="+", default=(1, 4))
    args = parser.parse_args()
    print(
        "| stage | microbatches | planned MiB | measured MiB | planned / measured "
        "|\n|---|---|---|---|---|"
    )
    for stage in args.stages:
        for count in args.microbatches:
            with tempfile.TemporaryDirectory() as name:
                config = config_of(stage, Path(name), count)
                took = measured(config, stage)
                says = plan.plan(config, stage, 64 if stage == "ppo" else TOKENS).peak
            cells = f"{says / MIB:.0f} | {took / MIB:.0f} | {says / took:.2f}"
            print(f"| {stage} | {count} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
