"""``rlhf-jax rounds``: feedback and training take turns, as in Christiano et al. (2017) and Ziegler
et al. (2019), section 2.

A round samples pairs of answers of the current policy, has people or a judge compare them, trains
a reward model on the comparisons of all rounds so far, and trains the policy on it.
"""

from rlhf_jax.inference.rounds.folders import Round
from rlhf_jax.inference.rounds.job import Result, run

__all__ = ["Result", "Round", "run"]
