"""Rewards: where scores come from, and how they are shaped before an update reads them.

A RewardFn takes a rollout and returns (scores [B] or dense rewards [B, T], {name of a component:
[B]}). Those made here are ``jax.tree_util.Partial``, so the arrays that they hold (a reward model's
parameters) are arguments of ``jit``. A HostReward is ordinary Python and runs between two jits;
``on_host`` calls it. ``graders.spec`` builds the reward of a run from ``--reward``,
``graders.filter`` is the safety filter after it.
"""

from rlhf_jax.rewards.functions import (
    EnsembleMethod,
    behind_turns,
    ensemble,
    from_model,
    from_steps,
    length,
    token_count,
    weighted,
)
from rlhf_jax.rewards.host import HostReward, Unscored, on_host
from rlhf_jax.rewards.ngrams import diversity, repetition
from rlhf_jax.rewards.shaping import (
    adaptive_kl,
    kl_shaped,
    length_penalty,
    missing_eos,
    overlong_penalty,
)
from rlhf_jax.rewards.texts import Decoder, from_text, teacher_prompts

# Traced: scores from counts, models and n-grams, and sums of them
__all__ = [
    "EnsembleMethod",
    "behind_turns",
    "diversity",
    "ensemble",
    "from_model",
    "from_steps",
    "length",
    "repetition",
    "token_count",
    "weighted",
]
# In Python, between two jits
__all__ += ["Decoder", "HostReward", "Unscored", "from_text", "on_host", "teacher_prompts"]
# From scores to what an update reads
__all__ += ["adaptive_kl", "kl_shaped", "length_penalty", "missing_eos", "overlong_penalty"]
