"""Whether the answers to a prompt compute it once (``compute.share_prompts``)."""

import math
from typing import NamedTuple

from rlhf_jax.config import ALGORITHMS, Compute, RLStage
from rlhf_jax.config.settings import Switch
from rlhf_jax.training.common import shared_prompts
from rlhf_jax.training.common.layout import Layout
from rlhf_jax.training.rl.method import divisors
from rlhf_jax.types import AlgorithmConfig


def saved(prompt: int, response: int, group_size: int) -> float:
    """The share of the token passes that a prompt computed once for its group saves."""
    return (group_size - 1) * prompt / (group_size * (prompt + response))


class Answers(NamedTuple):
    """The answers of a run to its prompts."""

    name: str  # the section of the algorithm
    own: AlgorithmConfig  # its settings
    settings: RLStage
    wanted: Switch  # ``compute.share_prompts``
    prompt: int  # columns of the longest prompt
    takes_groups: bool  # whether the model computes a prompt once for its group
    on: Layout

    def obstacle(self) -> str | None:
        """Why the answers to a prompt cannot compute it once; None if they can. That an algorithm
        from Python keeps groups together in its minibatches, only its author knows.
        """
        if self.name not in ALGORITHMS and self.wanted == "auto":
            return f"{self.name} comes from Python"
        if self.own.group_size == 1:
            return f"{self.name} samples one answer to a prompt"
        if not self.takes_groups:
            return "this network computes each row by itself"
        size = self.settings.batch_size
        num_groups = size // self.own.group_size
        for parts in divisors(self.name, self.own, self.on):
            if num_groups % math.prod(parts.values()):
                product = " x ".join(f"{count} {key}" for key, count in parts.items())
                return f"the {num_groups} groups of rl.batch_size {size} do not divide by {product}"
        return None

    def saved(self) -> float:
        """The share of the token passes that a prompt computed once saves."""
        return saved(self.prompt, self.settings.max_new_tokens, self.own.group_size)

    def group_size(self) -> int:
        """How many adjacent rows of a rollout compute their prompt once; 1: each row by itself.

        Raises:
            UserError: ``compute.share_prompts`` is true, and they cannot.
        """
        is_shared = shared_prompts.is_wanted(self.wanted, self.obstacle(), self.saved())
        return self.own.group_size if is_shared else 1


def decided(compute: Compute, answers: Answers) -> tuple[Compute, int]:
    """The settings with ``compute.share_prompts`` true or false, and ``Answers.group_size``. It
    prints the choice where a prompt has several answers.
    """
    size = answers.group_size()
    number = answers.own.group_size
    if number > 1:
        what = f"a prompt of {answers.prompt} tokens computed once for {number} answers"
        shared_prompts.say(size > 1, what, answers.saved())
    return shared_prompts.recorded(compute, size > 1), size
