"""Nash-MD-PG (Munos et al. 2023, "Nash Learning from Human Feedback", arXiv 2312.00886, section 7):
REINFORCE with the probability that an answer is preferred to one of the mixture of policy and
reference, ``policy^(1 - mixture) * reference^mixture`` for each token, minus a baseline of 1/2.

The KL to the reference is a term of each token's loss (tau is ``kl_loss_coef``). For answers of one
token and ``mixture`` 0 the fixed point is the regularised Nash equilibrium. Rows of the mixture do
not learn.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax import losses, ops, sampling, types
from rlhf_jax.algorithms import online_dpo, policy, rloo

State, needs_values, kl_coef = types.TrainState, False, 0.0
Preference = Literal["wins", "scores"]


@dataclass(frozen=True)
class Config(policy.Config):
    """Nash-MD by policy gradients."""

    aggregate: losses.Aggregation = "sum"
    """How losses of tokens become one number."""
    kl_loss_coef: float = 0.1
    """Weight of the KL term in the loss."""
    mixture: float = 0.5
    """Weight of the reference in what answers are compared with; 0: with the policy itself."""
    preference: Preference = "wins"
    """wins: rewards are shares of comparisons that are won (pairs:SPEC); scores: the probability is
    the sigmoid of the difference of two rewards, as of a reward model."""
    group_size = 2  # no setting
    score_range = property(lambda self: (0.0, 1.0) if self.preference == "wins" else (-1e15, 1e15))
    kl_in_loss = True  # the reference is there, whatever the coefficient

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_numbers(self, "mixture", at_least=0, at_most=1)
        ops.check_choice("preference", self.preference, Preference)


def respond(
    sample: Any, prompts: Any, key: Any, *, model: Any, policy: Any, reference: Any, config: Config
) -> Any:
    """Two answers to each prompt: even rows are the policy's, odd ones the mixture's."""
    mixed = sampling.mixture(model, config.mixture)
    pair = (policy, reference)
    return online_dpo.in_pairs(sample, prompts, key, policy=policy, other=pair, model=mixed)


def prepare(rollout: types.Rollout, *, config: Config, axis_name: Any = None) -> types.Rollout:
    """The even rows with ``advantages`` [B, T]; odd ones, and rows whose opponent is missing,
    become missing rows.
    """
    policy.check_unprepared(rollout)
    scores = policy.row_rewards(rollout).reshape(-1, 2)
    # Shares of one comparison add up to 1; other rewards are none, and NaN stops the run.
    wins = jnp.where(jnp.abs(jnp.sum(scores, axis=1) - 1.0) < 1e-3, scores[:, 0], jnp.nan)
    if config.preference == "scores":
        wins = jax.nn.sigmoid(scores[:, 0] - scores[:, 1])
    both = jnp.all(rollout.present.reshape(-1, 2), axis=1)
    learns = jnp.stack([both, jnp.zeros_like(both)], axis=1).reshape(-1, 1)
    own = replace(rollout, response_mask=jnp.where(learns, rollout.response_mask, 0))
    return policy.spread(jnp.repeat(wins - 0.5, 2), own)


loss = rloo.loss  # only the advantages differ
update = policy.updater(prepare, loss)
"""See ``policy.updater``. The rollout is that of ``respond``, with ``ref_log_probs``."""
