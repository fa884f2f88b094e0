"""Dynamic sampling (Yu et al. 2025, DAPO, arXiv 2503.14476, section 3.2): groups that teach
nothing, such as those of equal scores, are replaced by groups of other prompts.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.iteration import LoopState
from rlhf_jax.runs import processes
from rlhf_jax.types import Metrics, Rollout

if TYPE_CHECKING:
    from rlhf_jax.training.rl.job import Job


def replace_uninformative(
    job: "Job",
    state: LoopState,
    rollout: Rollout,
    fresh: Iterator[Rollout],
    arguments: Callable[[Rollout], tuple[Any, ...]],
) -> tuple[Rollout, Metrics, list[Rollout]]:
    """The rollout, whose groups that teach nothing are replaced by groups of fresh rollouts while
    there are any; metrics of how often; and for an algorithm that observes them all other groups.

    Each round draws a whole batch, so that nothing is compiled anew. The metrics of scores and
    responses are those of the first draw: of the policy, not of the groups that were chosen.

    arguments: of the update with a rollout.
    """

    def informative(rollout: Rollout) -> np.ndarray:
        found = job.programs.informative(state, *arguments(rollout))
        return np.asarray(processes.fetch(found))

    wanting = ~informative(rollout)
    shares = [np.mean(wanting)]
    unread = []
    while wanting.any() and (drawn := next(fresh, None)) is not None:
        offered = informative(drawn)
        shares.append(np.mean(~offered))
        rollout, rest = job.programs.refill(rollout, fresh=drawn, wanting=wanting, offered=offered)
        if job.method.algorithm.observe is not None:
            unread.append(rest)
        # A new array: on a CPU the program may still read the memory of the one that it got.
        wanting = wanting & (np.cumsum(wanting) > offered.sum())
    rounds, share = jnp.float32(len(shares) - 1), jnp.float32(np.mean(shares))
    return rollout, {"sampling/rounds": rounds, "sampling/uninformative": share}, unread
