"""Distillation on the policy's own samples (Agarwal et al. 2024, "On-Policy Distillation of
Language Models", arXiv 2306.13649): at every token that the student
sampled, its distribution moves towards the teacher's.

``L = mean over response tokens of D(p || q)``. p and q are the next-token distributions of student
and teacher, D is one of ``losses.divergence`` over the whole vocabulary. As in the paper, no
gradient flows through the sampling.

``divergence="sampled"`` uses q of the sampled token only: its advantage in the clipped policy loss
is ``log q - log p``. With ``discount`` 0 the expected gradient is that of the reverse KL at each
token, with 1 that of the KL of whole responses.

If the run has a reward, its policy loss is added, with the advantage ``A_i = r_i - mean of the
others`` in a group, or ``r_i - mean of the batch`` without groups. With ``sampled`` and discount 1
the optimum is then ``q exp(r / teacher_coef)``, normalised.

Column t of every [B, T] array belongs to ``tokens[:, t]``.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax import advantages, losses, ops
from rlhf_jax.algorithms import policy
from rlhf_jax.types import (
    AxisName,
    DropoutKey,
    LossAndMetrics,
    Mean,
    Params,
    PolicyFn,
    Rollout,
    TrainState,
)

State = TrainState
needs_values = False
kl_coef = 0.0
Divergence = Literal["reverse_kl", "forward_kl", "jsd", "sampled"]


@dataclass(frozen=True)
class Config(policy.Config):
    """Distillation on the policy's own samples."""

    divergence: Divergence = "reverse_kl"
    """The distance to the teacher. reverse_kl: the student avoids what is unlikely for the teacher;
    forward_kl: it covers all that is likely for the teacher; jsd: between the two, by beta;
    sampled: reverse_kl of the sampled tokens only, as their advantage.
    """
    beta: float = 0.5
    """With jsd, the teacher's share of the mixture, above 0 and below 1: near 0 as forward_kl, near
    1 as reverse_kl.
    """
    discount: float = 0.0
    """With sampled, how much of the next token's advantage a token gets too: 0 is its own alone, 1
    all that follow.
    """
    teacher_coef: float = 1.0
    """Weight of the teacher beside the reward, which a run need not have."""
    group_size: int = 1
    """Answers to each prompt, in adjacent rows of the rollout; a reward is compared within them, of
    1 within the batch."""
    needs_teacher = True  # not a setting: the run always loads a teacher

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_choice("divergence", self.divergence, Divergence)
        ops.check_numbers(self, "beta", above=0, below=1)
        ops.check_numbers(self, "discount", at_least=0, at_most=1)
        ops.check_numbers(self, "teacher_coef", at_least=0)

    def measure(self, logits: Array, *, teacher_logits: Array) -> Array:
        """``losses.divergence`` with these settings. For ``sampled`` it is the reverse KL, of which
        the samples are an estimate.
        """
        kind = "reverse_kl" if self.divergence == "sampled" else self.divergence
        return losses.divergence(logits, teacher_logits=teacher_logits, kind=kind, beta=self.beta)


def prepare(rollout: Rollout, *, config: Config, axis_name: AxisName = None) -> Rollout:
    """The rollout with ``advantages`` [B, T] from its reward, the same for all response tokens of a
    row; 0 if the rollout has neither ``rewards`` nor ``scores``.

    The reward of a row is the sum of ``rewards`` over its response or, without ``rewards``, its
    score. The mean of the other rows of its group is subtracted; with a group size of 1, the mean
    of the batch.

    Args:
      rollout: the ``group_size`` rows of a prompt are adjacent.
      axis_name: the mapped axis; the mean of the batch is over the rows of all its devices.
    """
    policy.check_unprepared(rollout)
    if rollout.rewards is None and rollout.scores is None:
        return replace(rollout, advantages=jnp.zeros(rollout.tokens.shape))
    if config.group_size > 1:
        return policy.with_group_advantages(rollout, config.group_size, advantages.leave_one_out)
    rewards = policy.row_rewards(rollout)
    differences, _ = ops.centred(rewards, rollout.present, axis_name=axis_name)
    return policy.spread(differences, rollout)


def loss(
    params: Params, rollout: Rollout, key: DropoutKey, *, policy_fn: PolicyFn, config: Config
) -> LossAndMetrics:
    """``policy.loss`` of a prepared rollout + ``teacher_coef`` * divergence. With ``sampled`` no
    divergence is added: the teacher's part is in the advantages.

    Args:
      rollout: for ``sampled`` without a teacher in ``policy_fn``, it has ``teacher_log_probs``.
      policy_fn: made by ``models.policy_fn`` with a teacher. Its output has ``divergence``,
        computed by ``config.measure``, and ``teacher_log_probs``.
      key: unused: dropout is off in RL.

    Returns:
      The loss, and the metrics of ``policy.loss`` with ``distill/divergence`` (nats per response
      token; with ``sampled`` the reverse KL, or its estimate by the rollout's tokens if they have
      ``teacher_log_probs``).
    """
    output = ops.evaluate(policy_fn, params, rollout)
    per_token = output.divergence
    teacher_log_probs = output.teacher_log_probs
    is_sampled = config.divergence == "sampled"
    if is_sampled and rollout.teacher_log_probs is not None:
        teacher_log_probs = rollout.teacher_log_probs
        per_token = output.log_probs - teacher_log_probs
    if per_token is None or teacher_log_probs is None:
        raise ValueError(
            "distill needs a policy_fn with a teacher, and it returned divergence=None; "
            "models.policy_fn(..., teacher=models.Teacher(model, config.measure)) makes one. With "
            "divergence sampled, rollout.teacher_log_probs may be given in its place"
        )
    mask = rollout.mask  # [B, T]
    if is_sampled:
        gap = ops.masked(teacher_log_probs - jax.lax.stop_gradient(output.log_probs), mask)
        taught = advantages.discounted_returns(gap, mask, config.discount)
        own = ops.masked(policy.field(rollout, "advantages", "call distill.prepare first"), mask)
        rollout = replace(rollout, advantages=own + config.teacher_coef * taught)
    total, metrics = policy.loss(output, rollout, config)
    metrics["distill/divergence"] = losses.aggregate(per_token, mask)
    if is_sampled:
        return total, metrics
    divergence = config.mean(per_token, mask)
    # Both are means over the same tokens or rows, and so is their sum.
    return Mean(total.total + config.teacher_coef * divergence.total, total.count), metrics


update = policy.updater(prepare, loss)
"""See ``policy.updater``. The rollout has ``log_probs`` and, if it has a reward, ``rewards`` or
``scores``.
"""
