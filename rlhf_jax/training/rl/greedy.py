"""The greedy baseline of ReMax (Li et al. 2023, arXiv 2310.10505): the score of a greedy response
to the same prompt.
"""

from typing import TYPE_CHECKING

from rlhf_jax.iteration import LoopState
from rlhf_jax.training.rl.sample import sample
from rlhf_jax.training.rl.schedule import Batch
from rlhf_jax.training.rl.score import score
from rlhf_jax.types import Metrics, Rollout

if TYPE_CHECKING:
    from rlhf_jax.training.rl.job import Job


def add_greedy_baseline(
    job: "Job", state: LoopState, prompts: Batch, rollout: Rollout
) -> tuple[Rollout, Metrics]:
    """The rollout with ``greedy_rewards``, and their metric: a greedy response to each prompt is
    sampled and scored too.
    """
    sampled, _ = sample(job, state, prompts, "respond_greedily")
    greedy = score(job, sampled, prompts)
    metrics = {"objective/greedy_score": greedy.metrics["objective/score"]}
    return job.programs.with_greedy(rollout, greedy=greedy.rollout), metrics
