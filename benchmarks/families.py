"""Compile time, size and speed of each model family against Llama's at one shape, as a markdown
table.

    python benchmarks/families.py               # on a machine that does nothing else
    python benchmarks/families.py --rounds 0    # instructions and operations alone: they need no
    quiet machine

The families take turns, in compiling and in each timed call, so that a slow minute of the machine
falls on all of them; a ratio of seconds is the median of the ratios of turns.
"""

import argparse
import statistics
from typing import Any

import jax
from bench import compile_seconds, measured
from figures import matmul_flops
from steps import Preset, work

from rlhf_jax import models
from rlhf_jax.models.config import ModelConfig

CALLS = 5  # timed ones in a round
SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "max_length": 112,
    "hidden_size": 128,
    "num_layers": 4,
    "num_heads": 4,
}
SHARED = {**SIZES, "num_kv_heads": 2, "intermediate_size": 344}
# Heads of 32 for all; GPT-2's have keys of their own, and its MLP two kernels of 516 for three of
# 344.
CONFIGS: dict[str, ModelConfig] = {
    "Llama": models.LlamaConfig(**SHARED),
    "GPT-2": models.GPT2Config(**SIZES, intermediate_size=516),
    "Qwen2": models.Qwen2Config(**SHARED),
    "Qwen3": models.Qwen3Config(**SHARED, head_dim=32),
    "Mistral": models.MistralConfig(**SHARED, sliding_window=64),
    "Gemma 3": models.Gemma3TextConfig(
        **SHARED, head_dim=32, query_scalar=32, sliding_window=64, global_every=4
    ),
}
HEADS = ("compile s", "instructions", "GFLOP", "step s")


def figures(name: Any, rounds: int) -> dict[str, list[list[float]]]:
    """{family: compile seconds, instructions, 10^9 operations of matrix products, step seconds}, by
    turn.
    """
    timed = {family: work(name, Preset(config, 64, 64, 48)) for family, config in CONFIGS.items()}
    found: dict[str, list[list[float]]] = {family: [[] for _ in HEADS] for family in CONFIGS}
    programs: dict[str, Any] = {}
    for family, one in timed.items():
        programs[family] = one.compile()
        found[family][1].append(programs[family].as_text().count(" = "))
        found[family][2].append(
            matmul_flops(jax.make_jaxpr(one.step)(one.carry, one.data).jaxpr, trips=48) / 1e9
        )
    for _ in range(rounds):
        for family, one in timed.items():
            found[family][0].append(compile_seconds(one)[1])
    carries = {family: one.carry for family, one in timed.items()}
    for call in range(rounds * CALLS + 1 if rounds else 0):
        for family, one in timed.items():
            carries[family], row = measured(programs[family], carries[family], one.data)
            found[family][3] += [row["seconds"]] if call else []  # the first one warms up
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for name, title in {"sft": "update", "rollout": "generate"}.items():
        print(
            f"| {title} | {' | '.join(f'{head} | ratio' for head in HEADS)} "
            f"|\n|---{'|---|---' * len(HEADS)}|"
        )
        found = figures(name, rounds)
        for family, columns in found.items():
            cells = [family]
            for own, of_llama in zip(columns, found["Llama"], strict=True):
                ratios = [mine / theirs for mine, theirs in zip(own, of_llama, strict=True)]
                cells += (
                    [f"{statistics.median(own):.4g}", f"{statistics.median(ratios):.2f}"]
                    if own
                    else ["", ""]
                )
            print(f"| {' | '.join(cells)} |", flush=True)
        print()


if __name__ == "__main__":
    main()
