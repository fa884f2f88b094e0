"""Temporary memory of a PPO iteration: as one program or as one for each phase, and with more
microbatches.

    python benchmarks/programs.py char-small
    python benchmarks/programs.py gpt2 --microbatches 1 4 --seconds

Shapes alone: nothing is run, no weights are made. The policy has a reference and a reward model of
its own shape. Memory is XLA's ``memory_analysis`` on one CPU device. The programs are those of
``rlhf-jax plan``, compiled as it does, or with ``--seconds`` as a run does: the processor's seconds
for it. DPO has half as many pairs as PPO has rows.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from steps import PRESETS

from rlhf_jax import models
from rlhf_jax.cli.planning import plan, shapes
from rlhf_jax.config import RLStage, RunConfig
from rlhf_jax.training.common.layout import layout_of

OPTIONS: dict[str, Any] = dict(plan.OPTIONS)


def config_of(
    preset_name: str, folder: Path, num_microbatches: int = 1, stage: str = "ppo"
) -> RunConfig:
    """A run of a preset's shapes; ``folder`` gets the config.json of its models."""
    preset = PRESETS[preset_name]
    model = PRESETS[preset_name].model
    assert isinstance(model, models.GPT2Config)
    sizes = {
        "n_positions": model.max_length,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
    }
    keys = {
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_head": model.num_heads,
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(keys), "utf-8")
    rl = RLStage(
        batch_size=preset.batch, max_prompt_length=preset.prompt, max_new_tokens=preset.response
    )
    config = RunConfig(model=str(folder), reward=(str(folder),), rl=rl)
    own = dataclasses.replace(getattr(config, stage), num_microbatches=num_microbatches)
    if stage == "dpo":
        own = dataclasses.replace(own, batch_size=preset.batch // 2)
    return dataclasses.replace(config, **{stage: own})


def compiled(
    fn: Callable[..., Any], arguments: Any, config: RunConfig, *, updates: bool
) -> list[float]:
    """MiB of temporary memory and at the peak of a program of shapes, and processor seconds of its
    compilation.
    """
    jitted: Any = layout_of(config).jit_update(fn, 1) if updates else jax.jit(fn)
    lowered = jitted.lower(*arguments)
    started = time.process_time()
    used: Any = lowered.compile(compiler_options=OPTIONS).memory_analysis()
    seconds = time.process_time() - started
    peak = (
        used.argument_size_in_bytes
        + used.temp_size_in_bytes
        + used.output_size_in_bytes
        - used.alias_size_in_bytes
    )
    return [used.temp_size_in_bytes / 2**20, peak / 2**20, seconds]


def phases_of(config: RunConfig, stage: str = "ppo") -> dict[str, list[float]]:
    """``compiled`` of each phase's own program, by its name."""
    programs = shapes.shapes_of(config, stage)[1]
    return {
        name: compiled(fn, arguments, config, updates=name == "learn")
        for name, (fn, *arguments) in programs.items()
    }


def whole(config: RunConfig) -> list[float]:
    """``compiled`` of the iteration as one program."""
    programs = shapes.shapes_of(config, "ppo")[1]
    collect, *inputs = programs["sample and score"]
    reward = programs["reward"][0]
    learn = programs["learn"][0]

    rewarded = programs["reward"][-1]

    def iteration(
        state: Any, prompts: Any, key: Any, functions: Any, base: Any, rewarded: Any
    ) -> Any:
        rollout, _ = collect(state, prompts, key, functions, base)
        rollout, _ = reward(rollout, rewarded)
        return learn(state, rollout, key, functions)

    return compiled(iteration, (*inputs, rewarded), config, updates=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", choices=("char-nano", "char-small", "char-wide", "gpt2"))
    parser.add_argument("--microbatches", type=int, nargs="+", default=(1, 4, 16, 64))
    parser.add_argument("--seconds", action="store_true")
    args = parser.parse_args()
    if args.seconds:
        OPTIONS.clear()
    print(
        f"| {args.preset}: microbatches | program | temporary MiB | peak MiB | seconds to compile |"
    )
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for count in args.microbatches:
            config = config_of(args.preset, Path(name), count)
            rows = {"one program": whole(config)} | phases_of(config)
            rows["DPO"] = phases_of(
                config_of(args.preset, Path(name), min(count, 32), "dpo"), "dpo"
            )["learn"]
            for program, (temporary, peak, seconds) in rows.items():
                took = f"{seconds:.1f}" if args.seconds else ""
                print(
                    f"| {count} | {program} | {temporary:.0f} | {peak:.0f} | {took} |", flush=True
                )


if __name__ == "__main__":
    main()
