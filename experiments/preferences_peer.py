"""PPO of TRL 1.12, the last one that has it, beside ours: one reward model, prompts and settings.

    pip install torch transformers trl==1.12.0 peft requests
    python experiments/preferences_peer.py runs/preferences --out preferences_trl.json

The folder is that of preferences.py, with the taste's reward model. TRL runs in any Python that has
it and need not have this library (``--python``). Both answer the same held-out instructions, and
the taste judges. What the two compute otherwise stands in preferences_trl.py.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import preferences
import results
import sums
import tyro

from rlhf_jax import cli
from rlhf_jax.errors import UserError
from rlhf_jax.runs.writing import write_atomically

TRL = Path(__file__).with_name("preferences_trl.py")
Curve = tuple[dict[int, preferences.Numbers], preferences.Numbers]  # by step, and costs


@dataclass(frozen=True)
class Settings:
    """What both libraries are asked for. The defaults of PPO are TRL's, but for the temperature,
    which is 1 in both.

    Raises:
        UserError: TRL would refuse it, or would drop the last prompts of each pass and have none.
    """

    model: str  # the folder of the first policy
    reward_model: str  # model/ of a reward-model run
    prompts: list[str]  # what users say; the chat template is added
    held_out: list[str]
    iterations: int
    batch: int  # answers of an iteration, each to another prompt
    new_tokens: int
    eval_interval: int  # iterations between answers to the held-out prompts
    seed: int
    learning_rate: float
    schedule: Literal["constant", "linear"] = "linear"
    rank: int = 16  # of adapters; 0 trains all weights
    alpha: float = 32.0
    value_from: Literal["policy", "reward"] = "reward"
    passes: int = 4
    minibatches: int = 1
    microbatches: int = 1  # of the only minibatch, to save memory
    kl_coef: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.1
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None

    def __post_init__(self) -> None:
        if len(self.prompts) < self.batch:
            raise UserError(f"{len(self.prompts)} prompts: a batch has {self.batch}; give more")
        for name in ("minibatches", "microbatches"):
            number = getattr(self, name)
            if self.batch % number:
                raise UserError(f"batch {self.batch} is no multiple of {name} {number}; change one")
        if self.minibatches > 1 and self.microbatches > 1:
            raise UserError("microbatches: TRL then takes one step a pass; leave out minibatches")
        if self.whiten_rewards and self.batch < 8 * self.minibatches:
            raise UserError("whiten_rewards: TRL needs 8 answers in a minibatch; raise the batch")


def flags(asked: Settings) -> list[str]:
    """The flags of ``rlhf-jax ppo`` that come as near to TRL's computation as ours can; model,
    data, reward and folder are left to the caller. What still differs stands in preferences_trl.py.
    """
    given = {
        "seed": asked.seed,
        "lora.rank": asked.rank,
        "rl.num-epochs": None,  # those of --config trl would replace the iterations
        "rl.num-iterations": asked.iterations,
        "rl.batch-size": asked.batch,
        "rl.max-new-tokens": asked.new_tokens,
        "rl.validation-interval": asked.eval_interval,
        "rl.kl-coef": asked.kl_coef,
        "rl.missing-eos-penalty": asked.missing_eos_penalty,
        "rl.optimizer.learning-rate": asked.learning_rate,
        "rl.optimizer.schedule": asked.schedule,
        "rl.optimizer.max-grad-norm": None,
        "ppo.group-size": 1,
        "ppo.num-epochs": asked.passes,
        "ppo.num-minibatches": asked.minibatches,
        "ppo.num-microbatches": asked.microbatches,
        "ppo.gamma": asked.gamma,
        "ppo.gae-lambda": asked.lam,
        "ppo.clip-low": asked.clip,
        "ppo.clip-high": asked.clip,
        "ppo.value-clip": asked.value_clip,
        "ppo.value-coef": asked.value_coef,
        "ppo.value-from": asked.value_from,
    }
    if asked.rank:
        given["lora.alpha"] = asked.alpha
    words = ["--config", "chat", "trl"]
    for name, value in given.items():
        words += [f"--{name}", "null" if value is None else str(value)]
    return [*words, "--ppo.whiten-rewards"] if asked.whiten_rewards else words


def theirs(asked: Settings, out: Path, python: str = sys.executable) -> dict[str, Any]:
    """What preferences_trl.py wrote to ``out``, which it does now where there is no such file.

    Args:
        python: an interpreter with TRL 1.12; PYTHONPATH is ours.

    Raises:
        UserError: the file is of other settings.
    """
    settings = asdict(asked)
    if not out.exists():
        file = out.with_suffix(".asked.json")
        file.write_text(json.dumps(settings), "utf-8")
        subprocess.run([python, str(TRL), str(file), str(out)], check=True, env=os.environ.copy())
    found = json.loads(out.read_text("utf-8"))
    others = {name for name in settings if found["asked"].get(name) != settings[name]}
    if others:
        names = ", ".join(sorted(others))
        raise UserError(f"{out}: made with other settings ({names}); remove it or ask for those")
    return found


def ours(asked: Settings, folder: Path, runs: Path, judge: preferences.Judge) -> Curve:
    """What our run reached, with its median seconds and the most memory of its process in GB."""
    run = runs / "ppo-beside-trl"
    data: dict[str, Any] = {
        "model": asked.model,
        "data": folder / "prompts_train.json",
        "reward": runs / "reward-model",
        "text.bucket-multiple": 8,
        "rl.validation-data": folder / "prompts_held_out.json",
        "rl.validation-prompts": len(asked.held_out),
        "checkpoint-interval": 9999,
    }
    words = [word for key, value in data.items() for word in (f"--{key}", str(value))]
    peak = run / "peak.json"
    preferences.finish(run, ["ppo", *flags(asked), *words, "--output-dir", str(run)])
    if not peak.exists():
        kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        write_atomically(peak, json.dumps(kilobytes / 1024))
    times = [row.get("timing/step") for row in sums.rows_of(run / "timing.jsonl")]
    costs = costs_of([time for time in times if time], json.loads(peak.read_text("utf-8")))
    return preferences.validations(run, judge), costs


def trls(asked: Settings, out: Path, python: str, judge: preferences.Judge) -> Curve:
    """The same of TRL; its answers are scored as ours."""
    found = theirs(asked, out, python)
    kls = {row["step"]: row["kl"] for row in found["iterations"]}
    by_step = {}
    for step, answers in found["answers"].items():
        texts = dict(zip(asked.held_out, answers["texts"], strict=True))
        scores = judge.scores(asked.held_out, answers["texts"])
        by_step[int(step)] = judge.numbers(texts, kls.get(int(step), 0.0), scores)
    seconds = [row["seconds"] for row in found["iterations"]]
    return by_step, costs_of(seconds, found["peak_memory_mb"])


def costs_of(seconds: Sequence[float], megabytes: float) -> preferences.Numbers:
    """The median seconds of an iteration behind the first one, in which ours compiles."""
    return {
        "seconds an iteration": statistics.median(seconds[1:] or seconds),
        "GB at most": megabytes / 1024,
    }


def main(
    folder: tyro.conf.Positional[Path],
    out: Path,
    taste: str = "brief",
    seed: int = 2,
    iterations: int = 15,
    every: int = 5,
    python: str = sys.executable,
) -> None:
    """Trains with both libraries, one after the other, and writes what they reach as one table.

    Args:
        folder: of preferences.py, in which the reward model of the taste and the seed is.
        out: a file for the results as a table.
        taste: that labels the pairs and judges.
        seed: of preferences.py, and of both runs.
        iterations: of PPO.
        every: iterations between answers to the held-out instructions.
        python: an interpreter that has TRL.
    """
    runs = folder / taste / f"seed-{seed}"
    prompts, held_out = (
        [row["prompt"] for row in preferences.read_json(folder / f"prompts_{part}.json")]
        for part in ("train", "held_out")
    )
    asked = Settings(
        model=str(folder / "model"),
        reward_model=str(runs / "reward-model" / "model"),
        prompts=prompts,
        held_out=held_out,
        iterations=iterations,
        batch=32,
        new_tokens=preferences.FULL.new_tokens,
        eval_interval=every,
        seed=seed,
        learning_rate=5e-4,
        schedule="constant",
        passes=2,
        minibatches=2,
    )
    judge = preferences.judge_of(folder, runs, taste)
    both = {
        "rlhf_jax": ours(asked, folder, runs, judge),
        "TRL 1.12": trls(asked, out.with_suffix(".trl.json"), python, judge),
    }
    rows = []
    for name, (by_step, costs) in both.items():
        by_step[iterations].update(costs)
        for step, numbers in by_step.items():
            rows += [results.row(name, seed, step, *item) for item in numbers.items()]
    seconds = sum(iterations * costs["seconds an iteration"] for _, costs in both.values())
    words = f"--taste {taste} --seed {seed} --iterations {iterations} --every {every}"
    command = f"python experiments/preferences_peer.py runs/preferences {words}"
    results.write(out, command, seconds, rows)


if __name__ == "__main__":
    cli.run_script(lambda: tyro.cli(main, args=sys.argv[1:]))
