"""online_dpo.py: online DPO (Guo et al. 2024)."""

from dataclasses import dataclass

import jax.numpy as jnp

from rlhf_jax import Comparisons, TrainState, dpo, ops
from rlhf_jax.algorithms import policy

State, needs_values, kl_coef = TrainState, False, 0.0


@dataclass(frozen=True)
class Config(policy.Batching):
    beta: float = 0.1
    group_size: int = 2
    kl_in_loss = True  # requests the reference's log-probabilities


def prepare(rollout, *, config, axis_name=None):
    """A pair of each prompt's responses; the higher score is chosen, ties do not count."""

    def pairs(x):
        return x.reshape(-1, 2, *x.shape[1:])

    scores = pairs(policy.row_rewards(rollout))
    ref_log_probs = jnp.sum(ops.masked(rollout.ref_log_probs, rollout.mask), axis=1)
    return Comparisons(
        *(pairs(x) for x in (rollout.tokens, rollout.attention_mask, rollout.response_mask)),
        best=jnp.argmax(scores, axis=1),
        weight=(scores[:, 0] != scores[:, 1]).astype(jnp.float32),
        ref_log_probs=pairs(ref_log_probs),
    )


def loss(params, pairs, key, *, policy_fn, config):
    dpo_config = dpo.Config(beta=config.beta)
    return dpo.loss(params, pairs, key, policy_fn=policy_fn, config=dpo_config)


update = policy.updater(prepare, loss)
