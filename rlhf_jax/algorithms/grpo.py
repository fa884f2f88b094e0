"""Group relative policy optimisation (Shao et al. 2024, "DeepSeekMath", section 4.1) and Dr. GRPO
(Liu et al. 2025).

``A_i = (r_i - mean) / (std + eps)`` over the G answers to a prompt, one advantage for all tokens of
an answer; the ratio of each token is clipped as in PPO, the KL is a term of the loss, and there is
no value function. Dr. GRPO is ``scale=False, aggregate="fixed", length=max_new_tokens``. Column t
of every [B, T] array belongs to ``tokens[:, t]``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

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
    step_end: str | None = None
    """A component of the reward that is not 0 at the last token of each step (of a process reward
    model step_end, NAME/step_end among several rewards): advantages of steps; null: of answers."""
    kl_loss_coef: float = 0.04
    """Weight of the KL term in the loss; the KL penalty in the reward is the loop's kl_coef."""
    kl_loss_estimator: ops.KLEstimator = "k3"
    """k2: the gradient of each token's KL(policy || reference); k3: that of its KL(reference ||
    policy).
    """

    @property
    def extras(self) -> Mapping[str, Literal["row", "token"]]:  # type: ignore[override]
        """What the update reads of ``rollout.extras``."""
        return {self.step_end: "token"} if self.step_end else {}

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_numbers(self, "group_size", at_least=2)
        ops.check_numbers(self, "eps", at_least=0)


def prepare(rollout: Rollout, *, config: Config, axis_name: AxisName = None) -> Rollout:
    """The rollout with ``advantages`` [B, T]: ``advantages.group_normalized`` rewards, on all
    tokens of a row.

    With ``config.step_end`` the rewards of all steps of a group, each the sum of ``rewards`` over
    its tokens, are normalised together, and the advantage of a token is the sum over the steps that
    end at it or later (section 4.1.3). The end of a response ends a step.

    The reward of a row is the sum of ``rewards`` over its response where they are given, else
    ``scores``; dense rewards keep their places (``policy.with_group_advantages``). Missing rows,
    groups of equal rewards and a group with a single answer get 0. A rollout that has advantages is
    a ValueError: they would not be used.

    Args:
      rollout: rows of one prompt are adjacent, ``group_size`` of them.
      axis_name: changes nothing: groups do not cross devices.
    """
    estimate = partial(advantages.group_normalized, eps=config.eps, scale=config.scale)
    if config.step_end is None:
        return policy.with_group_advantages(rollout, config.group_size, estimate)
    policy.check_unprepared(rollout)
    mask = rollout.mask
    ends = (policy.extra(rollout, config.step_end) != 0) & mask | ops.is_last(mask)
    number = jnp.cumsum(ends, axis=1) - ends  # of the step that each token is in
    add = jax.vmap(partial(jax.ops.segment_sum, num_segments=mask.shape[1]))
    of_steps = add(ops.masked(policy.field(rollout, "rewards"), mask), number)
    of_steps = jnp.take_along_axis(of_steps, number, axis=1)
    groups = (-1, config.group_size * mask.shape[1])
    normalized = estimate(of_steps.reshape(groups), mask=ends.reshape(groups)).reshape(mask.shape)
    return replace(rollout, advantages=advantages.discounted_returns(normalized, mask))


loss = rloo.loss  # only the advantages differ
update = policy.updater(prepare, loss)
"""See ``policy.updater``. The rollout has ``log_probs``, ``rewards`` or ``scores`` and, with a KL
term, ``ref_log_probs``."""
