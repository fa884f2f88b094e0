"""Vanilla policy gradient, REINFORCE (Williams 1992) with a running-mean baseline, as jRLHF's
Shakespeare job has it; and ReMax (Li et al. 2023, arXiv:2310.10505, algorithm 1), whose baseline is
the reward of the greedy response.

``loss = -mean_i [A_i sum_t log p_it]`` with ``A_i = r_i - b``, where ``b <- 0.9 b + 0.1 mean(r)``
comes first. The baseline b travels in ``vpg.State``. ReMax is ``baseline="greedy"``: each row has
the b of its prompt. Column t of every [B, T] array belongs to ``tokens[:, t]``.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import flax.struct
import jax.numpy as jnp
from jax import Array

from rlhf_jax import advantages, losses, ops
from rlhf_jax.algorithms import policy
from rlhf_jax.types import (
    AxisName,
    DropoutKey,
    LossAndMetrics,
    Metrics,
    Params,
    PolicyFn,
    Rollout,
    TrainState,
)

needs_values = False
kl_coef = 0.05
Baseline = Literal["ema", "greedy", "none"]


@dataclass(frozen=True)
class Config(policy.Batching):
    """Vanilla policy gradient."""

    baseline: Baseline = "ema"
    """What is subtracted from a reward: the running mean of the rewards, the reward of the policy's
    greedy response to the same prompt (ReMax; without KL), or nothing."""
    baseline_decay: float = 0.9
    """Share of the running mean that survives an iteration."""
    aggregate: losses.Aggregation = "sum"
    """How losses of tokens become one number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_choice("baseline", self.baseline, Baseline)
        ops.check_numbers(self, "baseline_decay", at_least=0, at_most=1)


@flax.struct.dataclass
class State(TrainState):
    """A TrainState with the moving baseline, which starts at 0."""

    baseline: Array = flax.struct.field(default_factory=lambda: jnp.zeros(()))  # [] float32


def prepare(
    rollout: Rollout, *, config: Config, axis_name: AxisName = None, baseline: Array | float = 0.0
) -> Rollout:
    """The rollout with ``advantages`` [B, T], reward of the row - baseline; as it is if it has
    advantages.

    The reward of a row is the sum of ``rewards`` over its response where they are given, else
    ``scores``. Dense rewards keep their places (``rollout.dense``): the advantage of a token has
    the rewards from it on, less the same baseline. With ``config.baseline = "greedy"`` the baseline
    is ``rollout.greedy_rewards`` [B].

    Args:
      baseline: of ``config.baseline = "ema"``, before this rollout moves it.
    """
    if rollout.advantages is not None:
        return rollout
    advantage = policy.row_rewards(rollout)
    if config.baseline == "ema":
        _, advantage = advantages.ema_baseline(
            baseline, advantage, rollout.present, decay=config.baseline_decay, axis_name=axis_name
        )
    elif config.baseline == "greedy":
        hint = "iteration.with_greedy makes them"
        advantage = advantage - policy.field(rollout, "greedy_rewards", hint, ndim=1)
    if not rollout.dense:
        return policy.spread(advantage, rollout)
    # Of the rewards before a token the token is no cause.
    rewards = policy.field(rollout, "rewards")
    before = policy.row_rewards(rollout)[:, None] - advantages.discounted_returns(
        rewards, rollout.mask
    )
    at_tokens = ops.masked(advantage[:, None] - before, rollout.mask)
    return dataclasses.replace(rollout, advantages=at_tokens)


def loss(
    params: Params, rollout: Rollout, key: DropoutKey, *, policy_fn: PolicyFn, config: Config
) -> LossAndMetrics:
    """Policy-gradient loss - entropy bonus, and the metrics ``policy/loss`` and
    ``objective/entropy`` (nats per row).

    Args:
      rollout: with ``advantages`` [B, T] (or [B], one for each row). With ``importance_weights``
        see ``policy.with_entropy``, which adds a metric.
      key: unused: dropout is off in RL.
    """
    if rollout.advantages is None:
        raise ValueError("rollout.advantages [B, T] is needed, got None: call vpg.prepare first")
    mask = rollout.mask  # [B, T]
    output = ops.evaluate(policy_fn, params, rollout)
    policy_loss = losses.policy_gradient(output.log_probs, rollout.advantages, mask)
    per_token, metrics = policy.with_entropy(policy_loss, output, rollout, config)
    return config.mean(per_token, mask), metrics


_passes = policy.updater(prepare, loss)


def update(
    state: policy.State,
    rollout: Rollout,
    key: Array,
    *,
    config: Config,
    axis_name: AxisName = None,
    **options: Any,
) -> tuple[policy.State, Metrics]:
    """See ``policy.updater``. The rollout has ``rewards`` (KL penalty included, if any) or
    ``scores``; or ``advantages``, used as they are.

    Args:
      state: ``vpg.State``, whose baseline moves unless a step was not finite; any TrainState where
        the rollout has ``advantages`` or ``config.baseline`` is not "ema".
    """
    options |= {"config": config, "axis_name": axis_name}
    if rollout.advantages is not None or config.baseline != "ema":
        return _passes(state, rollout, key, **options)
    if not isinstance(state, State):
        raise ValueError(
            "vpg needs a vpg.State, which carries the moving baseline, or rollout.advantages [B, T]"
        )
    prepared = prepare(rollout, config=config, axis_name=axis_name, baseline=state.baseline)
    after, metrics = _passes(state, prepared, key, **options)
    moved, _ = advantages.ema_baseline(
        state.baseline,
        policy.row_rewards(rollout),
        rollout.present,
        decay=config.baseline_decay,
        axis_name=axis_name,
    )
    baseline = jnp.where(metrics["nonfinite"] > 0, state.baseline, moved)
    return after.replace(baseline=baseline), metrics
