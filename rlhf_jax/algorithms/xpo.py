"""Exploratory preference optimisation (Xie et al. 2024, arXiv 2405.21046, algorithm 1): online DPO
on an answer of the policy and one of the reference, plus ``alpha * log p(answer of the
reference)``, which leads the policy to answers that it has not seen.

The paper minimises over the pairs of all iterations; here each update is on those of its own.
"""

from dataclasses import dataclass
from typing import Any

from rlhf_jax import losses, ops, types
from rlhf_jax.algorithms import online_dpo
from rlhf_jax.algorithms.policy import updater

State, needs_values, kl_coef = types.TrainState, False, 0.0
prepare = online_dpo.prepare


@dataclass(frozen=True)
class Config(online_dpo.Config):
    """Exploratory preference optimisation."""

    alpha: float = 1e-5
    """Weight of the log-probability of the reference's answers, in nats an answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_numbers(self, "group_size", at_most=2)
        ops.check_numbers(self, "alpha", at_least=0)


def respond(
    sample: Any, prompts: Any, key: Any, *, model: Any, policy: Any, reference: Any, config: Config
) -> Any:
    """Two answers to each prompt: even rows are the policy's, odd ones the reference's."""
    return online_dpo.in_pairs(sample, prompts, key, policy=policy, other=reference, model=model)


def loss(params: Any, rollout: types.Rollout, key: Any, *, policy_fn: Any, config: Config) -> Any:
    """``online_dpo.pair_loss`` plus ``alpha`` times the metric ``xpo/reference_log_prob``: the
    policy's mean log-probability of the odd rows, in nats. ``key`` is unused: dropout is off.
    """
    output = ops.evaluate(policy_fn, params, rollout)
    of_pairs, metrics = online_dpo.pair_loss(output, rollout, config)
    log_probs = ops.response_sums(output.log_probs, rollout)[1::2]
    optimism = losses.weighted_mean(log_probs, ops.float32(rollout.present[1::2]))
    return (of_pairs, config.alpha * optimism), metrics | {"xpo/reference_log_prob": optimism}


update = updater(prepare, loss)
"""See ``policy.updater``. The rollout is that of ``respond``, with ``ref_log_probs``."""
