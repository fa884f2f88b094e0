"""The scores of a rollout: of a reward on the devices, or of one in Python on the host."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlhf_jax.graders import spec
from rlhf_jax.iteration import Functions
from rlhf_jax.runs import processes
from rlhf_jax.training.rl.schedule import Batch
from rlhf_jax.types import AlgorithmConfig, Metrics, Rollout

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


def unfit_scores(job: "Job", rollout: Rollout) -> Callable[[], str]:
    """Tells, once the update was not finite, which scores or components of rows the algorithm
    cannot read; "" if it can read all.
    """
    config, extras = job.method.algorithm_config, rollout.extras or {}
    parts: Any = {name: extras[name] for name, kind in config.extras.items() if kind == "row"}
    parts |= {} if rollout.scores is None else {"scores": rollout.scores}
    given: Any = (rollout.row_ids, parts)

    def cause() -> str:
        numbers, found = processes.fetch(given)
        for name, values in found.items():
            low, high = config.score_range if name == "scores" else AlgorithmConfig.score_range
            outside = np.flatnonzero((values < low) | (values > high))
            if len(outside):
                place = outside[0]
                return (
                    f"{len(outside)} of {len(values)} {name} are outside of {low:g} to {high:g}, "
                    f"which {job.run.name} needs: {values[place]!s} for "
                    f"{job.inputs.prompts.rows[numbers[place]].source}. Give scores of that range; "
                    "--reward 'SPEC*WEIGHT' scales them"
                )
        return ""

    return cause
