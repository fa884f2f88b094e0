"""Group relative policy optimisation (Shao et al. 2024, "DeepSeekMath", section 4.1) and Dr. GRPO
(Liu et al. 2025).

``A_i = (r_i - mean) / (std + eps)`` over the G answers to a prompt, one advantage for all tokens of
an answer; the ratio of each token is clipped as in PPO, the KL is a term of the loss, and there is
no value function. Dr. GRPO is ``scale=False, aggregate="fixed", length=max_new_tokens``. Column t
of every [B, T] array belongs to ``tokens[:, t]``.
"""

from dataclasses import dataclass
from functools import partial

from rlhf_jax import advantages, losses, ops
from rlhf_jax.algorithms import policy, rloo
from rlhf_jax.types import AxisName, Rollout, TrainState

State = TrainState
needs_values = False
kl_coef = 0.0


@dataclass(frozen=True)
class Config(policy.Config):
    """Group relative policy optimisation."""

    group_size: int = 8
    """Answers to each prompt, in adjacent rows of the rollout."""
    aggregate: losses.Aggregation = "sequence"
    """How losses of tokens become one number."""
    scale: bool = True
    """Divide advantages by the standard deviation of the group's rewards; false: Dr. GRPO."""
    eps: float = 1e-4
    """Added to that standard deviation."""
    kl_loss_coef: float = 0.04
    """Weight of the KL term in the loss; the KL penalty in the reward is the loop's kl_coef."""
    kl_loss_estimator: ops.KLEstimator = "k3"
    """k2: the gradient of each token's KL(policy || reference); k3: that of its KL(reference ||
    policy).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_numbers(self, "group_size", at_least=2)
        ops.check_numbers(self, "eps", at_least=0)


def prepare(rollout: Rollout, *, config: Config, axis_name: AxisName = None) -> Rollout:
    """The rollout with ``advantages`` [B, T]: ``advantages.group_normalized`` rewards, on all
    tokens of a row.

    The reward of a row is the sum of ``rewards`` over its response where they are given, else
    ``scores``; dense rewards keep their places (``policy.with_group_advantages``). Missing rows,
    groups of equal rewards and a group with a single answer get 0. Minibatches may split groups
    afterwards. A rollout that has advantages is a ValueError: they would not be used.

    Args:
      rollout: rows of one prompt are adjacent, ``group_size`` of them.
      axis_name: changes nothing: groups do not cross devices.
    """
    estimate = partial(advantages.group_normalized, eps=config.eps, scale=config.scale)
    return policy.with_group_advantages(rollout, config.group_size, estimate)


loss = rloo.loss  # only the advantages differ
update = policy.updater(prepare, loss)
"""See ``policy.updater``. The rollout has ``log_probs``, ``rewards`` or ``scores`` and, with a KL
term, ``ref_log_probs``."""
