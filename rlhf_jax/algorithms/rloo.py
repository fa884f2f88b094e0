"""REINFORCE leave-one-out (Ahmadian et al. 2024, "Back to Basics"): each of G answers to a prompt against the others.

``A_i = r_i - mean of the group's other rewards``, one advantage for all tokens of an answer; the ratio of each token is
clipped as in PPO, and there is no value function. Column t of every [B, T] array speaks of ``tokens[:, t]``.
"""

from dataclasses import dataclass

import jax

from rlhf_jax import advantages, losses, ops
from rlhf_jax.algorithms import policy
from rlhf_jax.types import AxisName, Mean, Params, Parts, PolicyFn, Rollout, TrainState

State = TrainState
needs_values = False
kl_coef = 0.05


@dataclass(frozen=True)
class Config(policy.Config):
    """REINFORCE leave-one-out."""

    group_size: int = 4
    """Answers to each prompt, in adjacent rows of the rollout."""
    aggregate: losses.Aggregation = "sum"
    """How losses of tokens become one number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_number("group_size", self.group_size, at_least=2)


def prepare(rollout: Rollout, *, config: Config, axis_name: AxisName | None = None) -> Rollout:
    """The rollout with ``advantages`` [B, T]: ``advantages.leave_one_out`` of the rewards, on all tokens of a row.

    The reward of a row is the sum of ``rewards`` over its response where they are given, else ``scores``. Absent rows,
    and a group with a single answer, get 0. Minibatches may split groups afterwards.

    Args:
      rollout: rows of one prompt are adjacent, ``group_size`` of them.
      axis_name: changes nothing: groups do not cross devices.
    """
    del axis_name
    return policy.with_group_advantages(rollout, config.group_size, advantages.leave_one_out)


def loss(
    params: Params, rollout: Rollout, key: jax.Array | None, *, policy_fn: PolicyFn, config: Config
) -> tuple[Mean, Parts]:
    """``policy.loss`` of a prepared rollout. ``key`` is unused: dropout is off in RL."""
    del key
    return policy.loss(ops.evaluate(policy_fn, params, rollout), rollout, config)


update = policy.updater(prepare, loss)
"""See ``policy.updater``. The rollout has ``log_probs`` and ``rewards`` (KL penalty included, if any) or ``scores``."""
