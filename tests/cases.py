"""The table of all algorithms: a config and a batch that reach each of its terms."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from tabular import comparisons, policy_fn, policy_params, rollout, score_fn

from rlhf_jax import dpo, grpo, kto, ppo, reward_model, rloo, sft, vpg
from rlhf_jax.algorithms.step import minibatch_epochs
from rlhf_jax.types import Demonstrations, Feedback, TrainState

KEY = jax.random.key(7)
LEARNING_RATE = 0.3
SGD = optax.sgd(LEARNING_RATE)
# Groups of four rows, one group on each device: 7, 3, 0 and 8 tokens; absent rows beside present
# ones.
LENGTHS = [4, 1, 2, 0, 3, 0, 0, 0, 0, 0, 0, 0, 2, 4, 1, 1]
# Two blocks on each device.
MINIBATCHES = {"num_minibatches": 2, "shuffle_blocks": 8}
TERMS = {"entropy_coef": 0.1, "kl_loss_coef": 0.1}


class Case(NamedTuple):
    """One line of the table. The config is that of a step on the whole batch."""

    module: Any
    config: Any
    batch: Callable[[], Any]
    num_epochs: int = 2

    @property
    def model(self):
        return {"score_fn": score_fn} if self.module is reward_model else {"policy_fn": policy_fn}

    @property
    def start(self):
        params = (
            {"scores": jnp.sin(jnp.arange(5.0))}
            if self.module is reward_model
            else policy_params(0)
        )
        return getattr(self.module, "State", TrainState).create(params, SGD)

    def update(self, config=None, **kwargs):
        return partial(
            self.module.update,
            **{**self.model, "optimizer": SGD, "config": config or self.config, **kwargs},
        )

    def steps(self, state, batch, key, **kwargs):
        """Epochs of shuffled minibatches, each in two microbatches: those of the update, or
        ``minibatch_epochs`` around one that has none."""
        config = dataclasses.replace(self.config, num_microbatches=2)
        if hasattr(config, "num_minibatches"):
            epochs = {} if self.module is vpg else {"num_epochs": self.num_epochs}
            return self.update(dataclasses.replace(config, **MINIBATCHES, **epochs), **kwargs)(
                state, batch, key
            )
        step = self.update(config, **kwargs)
        return minibatch_epochs(
            step, state, batch, key, num_epochs=self.num_epochs, **MINIBATCHES, **kwargs
        )


def demonstrations():
    batch = rollout(0, LENGTHS)
    return Demonstrations(batch.tokens, batch.attention_mask, batch.response_mask)


def answers(num_answers, **fields):
    """Comparisons without a third device, and without two of the other answers."""
    absent = [
        (1, 1),
        (2, 0),
        *((row, answer) for row in range(8, 12) for answer in range(num_answers)),
    ]
    batch = comparisons(0, 16, num_answers, absent=absent)
    return batch.replace(
        best=jnp.arange(16) % num_answers, weight=jnp.linspace(0.5, 2.0, 16), **fields
    )


def with_targets():
    return answers(3, targets=jnp.sin(jnp.arange(48.0)).reshape(16, 3))


def pairs():
    return dpo.with_reference(answers(2), Partial(policy_fn, policy_params(1)))


def feedback():
    batch = rollout(0, LENGTHS)
    liked = jnp.arange(16) % 3 == 0
    weight = jnp.linspace(0.5, 2.0, 16)
    rows = Feedback(batch.tokens, batch.attention_mask, batch.response_mask, liked, weight)
    return kto.with_reference(rows, Partial(policy_fn, policy_params(1)))


def samples():
    """A rollout without advantages, which the update is to make."""
    batch = rollout(0, LENGTHS)
    weights = jnp.exp(0.3 * batch.advantages)
    return batch.replace(advantages=None, returns=None, importance_weights=weights)


PPO = ppo.Config(num_epochs=1, whiten_rewards=True, dual_clip=1.2, **TERMS)
CASES = {
    "sft": Case(sft, sft.Config(), demonstrations),
    "reward_model": Case(reward_model, reward_model.Config(), partial(answers, 4)),
    "centering": Case(reward_model, reward_model.Config(centering=0.01), partial(answers, 2)),
    "regression": Case(reward_model, reward_model.Config(), with_targets),
    "dpo": Case(dpo, dpo.Config(beta=0.5, label_smoothing=0.1), pairs),
    "simpo": Case(dpo, dpo.Config(kind="simpo", beta=2.0, gamma=0.5), partial(answers, 2)),
    "kto": Case(kto, kto.Config(beta=0.5, desirable_weight=1.5), feedback),
    "vpg": Case(
        vpg, vpg.Config(entropy_coef=0.1, aggregate="fixed", length=4), samples, num_epochs=1
    ),
    "ppo": Case(ppo, PPO, samples),
    "rloo": Case(rloo, rloo.Config(**TERMS), samples),
    "grpo": Case(grpo, grpo.Config(group_size=4, **TERMS), samples),
    "cispo": Case(
        grpo, grpo.Config(group_size=4, surrogate="cispo", clip_low=1.0, clip_high=4.0), samples
    ),
    "reinforce++": Case(rloo, rloo.Config(baseline="global", group_size=1, **TERMS), samples),
    "reinforce++ baseline": Case(rloo, rloo.Config(baseline="both", **TERMS), samples),
    "gspo": Case(grpo, grpo.Config(group_size=4, ratio="sequence", **TERMS), samples),
}
