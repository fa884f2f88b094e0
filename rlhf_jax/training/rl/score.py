"""The scores of a rollout: of a reward on the devices, or of one in Python on the host."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jax import Array

from rlhf_jax.graders import spec
from rlhf_jax.iteration import Functions
from rlhf_jax.runs import processes
from rlhf_jax.training.rl.schedule import Batch
from rlhf_jax.types import Metrics, Rollout

if TYPE_CHECKING:
    from rlhf_jax.graders.filter import Verdict
    from rlhf_jax.training.rl.job import Job


class Scored(NamedTuple):
    """A rollout with ``scores``, metrics of the reward, and the filter's verdict on each row."""

    rollout: Rollout
    metrics: Metrics
    verdicts: "list[Verdict] | None" = None
    reasons: Sequence[str | None] | None = None  # why rows have no score


def score(job: "Job", rollout: Rollout, batch: Batch, judge: spec.Reward | None = None) -> Scored:
    """The rollout scored by the run's reward and its filter, or by a judge. Several rewards are one
    already, see ``graders.spec.build_reward``.

    Raises:
        TrainingFault: a score of Python is not finite.
    """
    reward = judge or job.inputs.reward
    if reward.host is None:
        return Scored(*job.programs.reward(rollout, Functions(policy_fn=None, reward_fn=reward.fn)))
    from rlhf_jax.training.rl.host import score_on_host

    guard = None if judge is not None else job.inputs.guard
    return score_on_host(job.run.layout, reward, guard, rollout, batch, job.told)


def unfit_scores(job: "Job", scored: tuple[Array | None, Array | None]) -> str:
    """Which scores [B], of data rows [B], the algorithm cannot read; "" if it can read all."""
    low, high = job.method.algorithm_config.score_range
    scores, numbers = map(np.asarray, processes.fetch(scored))
    outside = np.flatnonzero((scores < low) | (scores > high))
    if not len(outside):
        return ""
    score, number = scores[outside[0]], numbers[outside[0]]
    return (
        f"{len(outside)} of {len(scores)} scores are outside of {low:g} to {high:g}, which "
        f"{job.run.name} needs: {score:g} for {job.inputs.prompts.rows[number].source}. Scale the "
        "reward (--reward 'SPEC*WEIGHT')"
    )
