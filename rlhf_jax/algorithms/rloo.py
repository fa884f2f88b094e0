"""REINFORCE leave-one-out (Ahmadian et al. 2024, "Back to Basics"): each of G answers to a prompt
against the others; and REINFORCE++ (Hu et al. 2025, arXiv 2501.03262v9): each token against all
tokens of the batch.

RLOO: ``A_i = r_i - mean of the group's other rewards``, one advantage for all tokens of an answer.
The ratio of each token is clipped as in PPO, and there is no value function. REINFORCE++ is
``baseline="global"``, ``group_size=1``: ``A_t = (sum of the rewards from t on - mean) / std`` over
the batch's response tokens, the KL being in the rewards (eqs. 4 and 5). REINFORCE++ with baseline
is ``baseline="both"``: ``r_i - mean of the group``, on all tokens of an answer, whitened in the
same way (eqs. 6 and 7). FlashREINFORCE (Hu et al. 2026) is ``baseline="batch"``, ``group_size=1``:
``r_i - mean of the batch``, as it is. Column t of every [B, T] array belongs to ``tokens[:, t]``.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from rlhf_jax import advantages, losses, ops
from rlhf_jax.algorithms import policy
from rlhf_jax.types import (
    AxisName,
    DropoutKey,
    LossAndMetrics,
    Params,
    PolicyFn,
    Rollout,
    TrainState,
)

State = TrainState
needs_values = False
kl_coef = 0.05
Baseline = Literal["group", "global", "both", "batch"]


@dataclass(frozen=True)
class Config(policy.Config):
    """REINFORCE leave-one-out."""

    group_size: int = 4
    """Answers to each prompt, in adjacent rows of the rollout."""
    baseline: Baseline = "group"
    """group: the mean reward of a prompt's other answers; global: rewards to go, whitened over the
    batch (REINFORCE++), for which group_size may be 1; both: reward minus the mean of all answers
    of its prompt, whitened over the batch; batch: reward minus the mean of all rows of the batch
    (FlashREINFORCE), for which group_size may be 1."""
    aggregate: losses.Aggregation = "sum"
    """How losses of tokens become one number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_choice("baseline", self.baseline, Baseline)
        if self.baseline in ("group", "both"):
            ops.check_numbers(self, "group_size", at_least=2)


def prepare(rollout: Rollout, *, config: Config, axis_name: AxisName = None) -> Rollout:
    """The rollout with ``advantages`` [B, T]: ``advantages.leave_one_out`` of the rewards, on all
    tokens of a row. With ``baseline="both"`` the rewards minus the mean of their group, and with
    "global" the rewards from each token on, are brought to mean 0 and variance 1 over the response
    tokens. With "batch" it is the reward of a row minus the mean of all rows, dense rewards or not.

    The reward of a row is the sum of ``rewards`` over its response where they are given, else
    ``scores``; dense rewards keep their places (``policy.with_group_advantages``). Missing rows,
    and a group with a single answer, get 0. A rollout that has advantages is a ValueError: they
    would not be used.

    Args:
      rollout: rows of one prompt are adjacent, ``group_size`` of them.
      axis_name: of whitening and of the batch's mean, which are over all devices; groups do not
        cross devices.
    """
    if config.baseline == "group":
        return policy.with_group_advantages(rollout, config.group_size, advantages.leave_one_out)
    policy.check_unprepared(rollout)
    if config.baseline == "batch":
        rewards, present = policy.row_rewards(rollout), rollout.present
        return policy.spread(ops.centred(rewards, present, axis_name=axis_name)[0], rollout)
    mask = rollout.response_mask
    if config.baseline == "both":
        # Not leave_one_out, which is G / (G - 1) times as large: if answers are missing, G differs
        # from group to group, and whitening over the batch does not take the factor away.
        centred = partial(advantages.group_normalized, scale=False)
        prepared = policy.with_group_advantages(rollout, config.group_size, centred)
        advantage = policy.field(prepared, "advantages")
    else:
        rewards = policy.field(rollout, "rewards", "rewards.kl_shaped makes them")
        advantage = advantages.discounted_returns(rewards, mask)
    whitened = ops.whiten(advantage, mask, axis_name=axis_name)
    return replace(rollout, advantages=whitened)


def loss(
    params: Params, rollout: Rollout, key: DropoutKey, *, policy_fn: PolicyFn, config: Config
) -> LossAndMetrics:
    """``policy.loss`` of a prepared rollout. ``key`` is unused: dropout is off in RL."""
    return policy.loss(ops.evaluate(policy_fn, params, rollout), rollout, config)


update = policy.updater(prepare, loss)
"""See ``policy.updater``. The rollout has ``log_probs`` and ``rewards`` (KL penalty included, if
any) or ``scores``.
"""
