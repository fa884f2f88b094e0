"""One set of settings for PPO here and for TRL's, whose runs experiments/preferences.py compares.

TRL's runs in any Python that has it and need not have this library:

    pip install torch transformers trl==1.12.0 peft requests
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_jax.errors import UserError

TRL = Path(__file__).with_name("preferences_trl.py")


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
