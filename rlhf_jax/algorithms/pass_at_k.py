"""The best of k answers as the objective, of rewards 0 and 1 pass@k (Walder and Karkhanis 2025,
"Pass@K Policy Optimization", arXiv 2505.15201, eq. 33): RLOO with ``advantages.pass_at_k``.
"""

from dataclasses import dataclass
from functools import partial

from rlhf_jax import advantages, losses, ops
from rlhf_jax.algorithms import policy, rloo
from rlhf_jax.types import AxisName, Rollout


@dataclass(frozen=True)
class Config(policy.Config):
    """The best of k answers."""

    group_size: int = 8
    """Answers to each prompt, in adjacent rows of the rollout."""
    k: int = 4
    """Of so many answers the best counts, from 2 to group_size."""
    aggregate: losses.Aggregation = "sum"
    """How losses of tokens become one number; sum: the objective's gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_numbers(self, "k", at_least=2, at_most=self.group_size)


def prepare(rollout: Rollout, *, config: Config, axis_name: AxisName = None) -> Rollout:
    """As ``rloo.prepare``, with ``advantages.pass_at_k`` of the rewards of rows."""
    estimate = partial(advantages.pass_at_k, k=config.k)
    return policy.with_group_advantages(rollout, config.group_size, estimate)


loss = rloo.loss  # only the advantages differ
update = policy.updater(prepare, loss)
"""See ``policy.updater``. The rollout has ``log_probs`` and ``rewards`` or ``scores``."""
