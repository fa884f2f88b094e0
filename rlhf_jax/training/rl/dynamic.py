"""Dynamic sampling (Yu et al. 2025, DAPO, arXiv 2503.14476, section 3.2): groups whose scores are
equal, which teach nothing, are replaced by groups of other prompts.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax.numpy as jnp

from rlhf_jax.types import Metrics, Rollout

if TYPE_CHECKING:
    from rlhf_jax.training.rl.job import Job


def replace_uninformative(
    job: "Job", rollout: Rollout, fresh: Iterator[Rollout]
) -> tuple[Rollout, Metrics]:
    """The rollout, whose groups of equal scores are replaced by groups of fresh rollouts while
    there are any; and metrics of how often.

    Each round draws a whole batch, so that nothing is compiled anew. The metrics of scores and
    responses are those of the first draw: of the policy, not of the groups that were chosen.
    """
    left = float(job.programs.num_equal(rollout))
    equal = [left]
    while left and (offered := next(fresh, None)) is not None:
        equal.append(float(job.programs.num_equal(offered)))
        rollout = job.programs.refill(rollout, fresh=offered)
        left = float(job.programs.num_equal(rollout))
    share = sum(equal) / (len(equal) * job.schedule.num_prompts)
    return rollout, {
        "sampling/rounds": jnp.float32(len(equal) - 1),
        "sampling/uninformative": jnp.float32(share),
    }
