"""GRPO on the prompts that are answered right about half of the time (Bae et al. 2025, "Online
Difficulty Filtering for Reasoning Oriented Reinforcement Learning", arXiv 2504.03380).

The variance of success, p (1 - p), bounds from below what a step can gain. The paper samples more
prompts than it keeps; here the pass rate p of each prompt is tracked, as in ``spo`` with a constant
rho, and prompts are drawn in proportion to ``sqrt(p (1 - p)) + exploration``: nothing is sampled in
vain. Scores are from 0 to 1.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from rlhf_jax import ops
from rlhf_jax.algorithms import grpo, policy, spo
from rlhf_jax.types import Rollout


@dataclass(frozen=True)
class Config(policy.ReadsOutcomes, grpo.Config):
    """GRPO on prompts of medium pass rate."""

    decay: float = 0.7
    """Share of a prompt's past that counts when it is answered again."""
    exploration: float = 0.05
    """Added to sqrt(p (1 - p)), which is at most 0.5, so that a prompt at 0 or 1 comes back."""
    half_life = 1.0  # of ``spo``: no setting, the distance stays 0
    rho = property(lambda self: (self.decay, self.decay))

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_numbers(self, "decay", at_least=0, at_most=1)
        ops.check_numbers(self, "exploration", above=0)


def prepare(rollout: Rollout, *, state: spo.State, **how: Any) -> Rollout:
    """``grpo.prepare``, whose baselines need no state; NaN where scores are no rates of success."""
    prepared = grpo.prepare(rollout, **how)
    unknown = jnp.where(jnp.isnan(policy.outcomes(rollout)), jnp.nan, 0.0)
    advantages = policy.field(prepared, "advantages") + unknown[:, None]
    return replace(prepared, advantages=advantages)


State = spo.State
choose = spo.choose
observe = spo.advance  # of groups that dynamic sampling left out
loss = grpo.loss
update = policy.updater(prepare, loss, advance=spo.advance)
"""See ``policy.updater``. The rollout has ``row_ids`` too."""
