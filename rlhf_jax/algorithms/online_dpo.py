"""Online DPO (Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback", arXiv
2402.04792): DPO on the policy's own answers, which a reward compares while it trains.

Of the answers to a prompt the best is chosen and the worst rejected; a prompt whose rewards are
equal counts nowhere.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax import advantages, ops, types
from rlhf_jax.algorithms import dpo, policy

State, needs_values, kl_coef = types.TrainState, False, 0.0
Kind = Literal["sigmoid", "hinge", "ipo"]


@dataclass(frozen=True)
class Config(types.AlgorithmConfig):
    """Online direct preference optimisation."""

    group_size: int = 2
    """Answers to each prompt; of more than two the best and the worst are compared."""
    num_minibatches: int = 1
    """Optimizer steps, each on its share of the rollout."""
    num_microbatches: int = 1
    """Parts of a minibatch that are run one after the other to save memory."""
    beta: float = 0.1
    """Reward per nat of log-ratio: the larger, the nearer to the reference the policy stays."""
    kind: Kind = "sigmoid"
    """The loss of a pair: that of DPO, SLiC or IPO."""
    kl_in_loss = whole_groups = True  # no settings: what an update reads, and how it divides

    def __post_init__(self) -> None:
        ops.check_numbers(self, "num_minibatches", "num_microbatches", at_least=1)
        ops.check_numbers(self, "group_size", at_least=2)
        ops.check_numbers(self, "beta", above=0)
        ops.check_choice("kind", self.kind, Kind)


def in_pairs(sample: Any, prompts: Any, key: Any, *, policy: Any, other: Any, model: Any) -> Any:
    """The rollout of a ``respond`` whose even rows are the policy's, and whose odd rows answer the
    same prompts by ``model`` with the params ``other``.
    """
    keys = jax.random.split(key)
    own = sample(policy, jax.tree.map(lambda x: x[::2], prompts), keys[0])
    theirs = sample(other, jax.tree.map(lambda x: x[1::2], prompts), keys[1], model=model)
    pairs = jax.tree.map(lambda *x: jnp.stack(x, axis=1), own, theirs)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pairs)


def prepare(rollout: types.Rollout, *, config: Config, axis_name: Any = None) -> types.Rollout:
    """The rollout with ``advantages`` [B, T], which the loss compares: ``policy.row_rewards`` less
    the mean of the group's others. 0 where they are equal.
    """
    of_rows = replace(rollout, dense=False)
    return policy.with_group_advantages(of_rows, config.group_size, advantages.leave_one_out)


def pair_loss(output: types.PolicyOutput, rollout: types.Rollout, config: Config) -> Any:
    """``dpo.pair_loss`` of the best and the worst answer to each prompt of a prepared rollout; rows
    of one prompt are adjacent. ``output`` is the policy's on the rollout, which has
    ``ref_log_probs``.
    """
    groups = (-1, config.group_size)
    scores, mask = policy.field(rollout, "advantages", "call prepare first"), rollout.mask
    upper = jnp.max(jnp.where(mask, scores, -jnp.inf), axis=1).reshape(groups)
    lower = jnp.min(jnp.where(mask, scores, jnp.inf), axis=1).reshape(groups)
    order = jnp.stack([jnp.argmax(upper, axis=1), jnp.argmin(lower, axis=1)], axis=1)

    def picked(x: Any) -> Any:
        in_groups = x.reshape(*groups, *x.shape[1:])
        return jax.vmap(lambda group, places: group[places])(in_groups, order)

    reference = policy.field(rollout, "ref_log_probs", "give rollout.collect a ref_fn")
    pairs = types.Comparisons(
        picked(rollout.tokens),
        picked(rollout.attention_mask),
        picked(rollout.response_mask),
        weight=ops.float32(jnp.max(upper, axis=1) > jnp.min(lower, axis=1)),
        ref_log_probs=picked(ops.response_sums(reference, rollout)),
    )
    log_probs = picked(ops.response_sums(output.log_probs, rollout))
    return dpo.pair_loss(log_probs, pairs, dpo.Config(beta=config.beta, kind=config.kind))


def loss(params: Any, rollout: types.Rollout, key: Any, *, policy_fn: Any, config: Config) -> Any:
    """``pair_loss`` of a rollout. ``key`` is unused: dropout is off in RL."""
    return pair_loss(ops.evaluate(policy_fn, params, rollout), rollout, config)


update = policy.updater(prepare, loss)
"""See ``policy.updater``. The rollout has ``ref_log_probs``, and ``rewards`` or ``scores``."""
