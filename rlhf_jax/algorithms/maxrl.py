"""Maximum likelihood reinforcement learning (Tajwar et al. 2026, arXiv 2602.02710, algorithm 1):
RLOO with ``A_i = (r_i - mean) / mean`` over the G answers to a prompt. With rewards 0 and 1 it
climbs ``log(pass@1)`` up to order G - 1, in which hard prompts weigh more than in the mean reward.
"""

from dataclasses import dataclass

from rlhf_jax import advantages, losses, ops
from rlhf_jax.algorithms import policy, rloo
from rlhf_jax.types import AxisName, Rollout


@dataclass(frozen=True)
class Config(policy.Config):
    """Maximum likelihood reinforcement learning."""

    group_size: int = 8
    """Answers to each prompt, in adjacent rows of the rollout."""
    aggregate: losses.Aggregation = "sum"
    """How losses of tokens become one number; sum: the objective's gradient."""
    score_range = (0.0, 1e15)  # no setting: those of ``advantages.max_likelihood``

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_numbers(self, "group_size", at_least=2)


def prepare(rollout: Rollout, *, config: Config, axis_name: AxisName = None) -> Rollout:
    """As ``rloo.prepare``, with ``advantages.max_likelihood`` of the rewards of rows, which are to
    be 0 or 1: a KL penalty in the reward makes others of them, and one below 0 ends the run.
    """
    return policy.with_group_advantages(rollout, config.group_size, advantages.max_likelihood)


loss = rloo.loss  # only the advantages differ
update = policy.updater(prepare, loss)
"""See ``policy.updater``. The rollout has ``log_probs`` and ``rewards`` or ``scores``."""
