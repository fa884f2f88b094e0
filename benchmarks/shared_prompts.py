"""Operations, bytes and memory of a GRPO update, each row by itself and with shared prompts.

    pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 nvidia-cudnn-cu12
    python benchmarks/shared_prompts.py qwen2.5-0.5b llama-8b

Compiled by XLA for H200s that need not be here, not run: prompts of 512 tokens, 16 responses of 512
to each, products in bfloat16, stacked layers. Figures are those of one device, and loops are
counted as often as they run: operations are those of the traced program's products, bytes what the
compiled kernels read and write (``hlo.py``). The update computes no reference.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import accelerators
import targets

from rlhf_jax.algorithms import grpo
from rlhf_jax.cli.planning import shapes
from rlhf_jax.config import Compute, Mesh, RLStage, RunConfig

TOKENS = 512  # of a prompt, and of a response
GROUP = 16


class Case(NamedTuple):
    """A model and the devices that learn one group each, or two."""

    target: str
    groups: int
    mesh: Mesh
    remat: bool
    keys: dict[str, Any]  # of config.json


CASES = {
    "qwen2.5-0.5b": Case(
        "h200x1",
        2,
        Mesh(),
        False,
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
        },
    ),
    "llama-8b": Case(
        "h200x8",
        8,
        Mesh(fsdp=8),
        True,
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "rope_theta": 5e5,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
    ),
}


def row_of(case: Case, folder: Path, *, shares_prompts: bool) -> str:
    """A line of the table; ``folder`` gets the model's config.json."""
    (folder / "config.json").write_text(json.dumps(case.keys), "utf-8")
    target = targets.find(case.target)
    config = RunConfig(
        model=str(folder),
        reward=("length",),
        mesh=case.mesh,
        compute=Compute(
            dtype="bfloat16",
            remat=case.remat,
            scan_layers=True,
            share_prompts=shares_prompts,
        ),
        rl=RLStage(batch_size=GROUP * case.groups, max_prompt_length=TOKENS, max_new_tokens=TOKENS),
        grpo=grpo.Config(group_size=GROUP),
    )
    program = shapes.shapes_of(config, "grpo", None, target.devices).programs["learn"]
    case_of_run = shapes.Case(config, "grpo", target.devices)
    compiled = accelerators.compile_for(target, case_of_run, "learn", program)
    figures = accelerators.figures_of(None, compiled, program, target)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    cells = [
        f"{figures.flops / 1e12:.0f}",
        f"{figures.work.bytes / 1e9:.0f}",
        f"{temporary / 2**30:.1f}",
        f"{figures.seconds:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="+", choices=CASES)
    args = parser.parse_args()
    print("| model | rows, devices | prompts | TFLOP | GB | temporary GiB | at least s |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        for model in args.model:
            case = CASES[model]
            for shares_prompts in (False, True):
                how = "shared" if shares_prompts else "each row's own"
                row = row_of(case, Path(name), shares_prompts=shares_prompts)
                rows = f"{GROUP * case.groups}, {case.target}"
                print(f"| {model} | {rows} | {how} {row}", flush=True)


if __name__ == "__main__":
    main()
