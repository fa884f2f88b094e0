"""``rewards.spec`` with the loader of this package, until the stages call it themselves."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax import models, rewards
from rlhf_jax.config import Compute
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import spec
from rlhf_jax.rewards.filter import Verdict
from rlhf_jax.rewards.spec import sources as sources
from rlhf_jax.training import setup
from rlhf_jax.types import Metrics, RewardFn, Rollout

Enforce = Callable[[Rollout, Rollout, Mapping[str, Sequence[Any]]], tuple[Rollout, Metrics, list[Verdict]]]


class RunReward(NamedTuple):
    """``spec.Reward`` and the safety filter after it."""

    fn: RewardFn | None = None
    host: rewards.HostReward | None = None
    enforce: Enforce | None = None


def load(path: str, compute: Compute) -> spec.RewardModel:
    """The reward model in a folder, for ``spec.build``."""
    model, params, tokenizer = setup.load_language_model(path, compute)
    if "score" not in params:
        raise UserError(f"{path}: this model has no score head; train one with experiments/reward_model.py")
    return spec.RewardModel(models.score_fn(model), params, tokenizer.fingerprint)


def build(specs: Sequence[str], tokenizer: Tokenizer, compute: Compute, columns: Collection[str]) -> RunReward:
    """As ``spec.build``."""
    return RunReward(*spec.build(specs, tokenizer=tokenizer, load=lambda path: load(path, compute), columns=columns))


def as_host(reward: RunReward) -> rewards.HostReward:
    """As ``spec.as_host``."""
    return spec.as_host(spec.Reward(reward.fn, reward.host))
