"""The default learning rate: a power of the model's size. docs/rates.md has the sweep behind it."""

from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from rlhf_jax.config import LoRA, Optimizer
from rlhf_jax.errors import logger
from rlhf_jax.types import Params

# {stage: (rate of all weights of a million parameters, exponent of the size)}
POWERS = {
    "sft": (1e-3, 0.5),
    "reward_model": (1e-3, 0.5),
    "dpo": (4e-5, 0.5),
    "kto": (4e-5, 0.5),
    "rl": (5e-4, 0.75),
}
OF_ADAPTERS = 10.0  # times the rate of all weights
MOST = 1e-2  # also of adapters: at 3e-2 RL of a million parameters breaks
SMALLEST, LARGEST = 1e5, 8e9  # parameters: of a size beyond, the rate of this one
HIGH = 10.0  # times the default: a rate above it warns


class Size(NamedTuple):
    """What a stage trains."""

    num_params: int  # of the whole network; those of adapters do not count
    is_adapter: bool

    def __str__(self) -> str:
        what = "adapters of" if self.is_adapter else "full training of"
        return f"{what} {self.num_params:,} parameters"


def size_of(lora: LoRA, params: Params) -> Size:
    """What is trained of a network with these parameters."""
    return Size(sum(leaf.size for leaf in jax.tree.leaves(params)), lora.rank > 0)


def default_rate(stage: str, size: Size) -> float:
    """The peak learning rate of a stage, rounded to one digit.

    stage: a section of the settings: sft, reward_model, dpo, kto or rl.
    """
    rate, exponent = POWERS[stage]
    millions = min(max(size.num_params, SMALLEST), LARGEST) / 1e6
    rate *= millions**-exponent * (OF_ADAPTERS if size.is_adapter else 1.0)
    return float(f"{min(rate, MOST):.0e}")


def with_rate(stage: str, optimizer: Optimizer, size: Size) -> Optimizer:
    """The optimizer of a stage with a learning rate, which is printed where it is the default. A
    given one that is far above the default warns.
    """
    default = default_rate(stage, size)
    rate = optimizer.learning_rate
    if rate is None:
        logger.info(f"rate {_short(default)}: {size}")
        return replace(optimizer, learning_rate=default)
    if rate > HIGH * default:
        logger.info(
            f"warning: {stage}.optimizer.learning_rate {_short(rate)} is high for {size} and may "
            f"undo what they know; the default is {_short(default)}"
        )
    return optimizer


def _short(rate: float) -> str:
    return np.format_float_scientific(rate, trim="-", exp_digits=1)
