"""The table of all algorithms: settings that reach each of their terms, a batch for updates, and
random batches for losses."""

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from tabular import VOCAB_SIZE, comparisons, policy_fn, policy_params, rollout, score_fn, taught

from rlhf_jax import distill, dpo, grpo, kto, ppo, reward_model, rloo, sft, vpg
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
WEIGHT = jnp.asarray(np.linspace(0.5, 2.0, 16), jnp.float32)
TERMS = {"entropy_coef": 0.1, "kl_loss_coef": 0.1}


class Case(NamedTuple):
    """One line of the table. The config is that of a step on the whole batch; a line without a
    batch has settings which only losses read.
    """

    module: Any
    config: Any
    draw: Callable[[np.random.Generator, float], Any]
    batch: Callable[[], Any] | None = None
    num_epochs: int = 2

    @property
    def model(self):
        if self.module is distill:
            return {"policy_fn": taught(self.config)}
        return {"score_fn": score_fn} if self.module is reward_model else {"policy_fn": policy_fn}

    @property
    def start(self):
        params = (
            {"scores": jnp.asarray(np.sin(np.arange(5.0)), jnp.float32)}
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
        config = replace(self.config, num_microbatches=2)
        if hasattr(config, "num_minibatches"):
            epochs = {} if self.module is vpg else {"num_epochs": self.num_epochs}
            return self.update(replace(config, **MINIBATCHES, **epochs), **kwargs)(
                state, batch, key
            )
        step = self.update(config, **kwargs)
        return minibatch_epochs(
            step, state, batch, key, num_epochs=self.num_epochs, **MINIBATCHES, **kwargs
        )


# Batches of updates


def made_once(make):
    """What the first call returns: numbers, also where that call is part of a trace."""

    @functools.cache
    def numbers(*args):
        with jax.ensure_compile_time_eval():
            return make(*args)

    return numbers


@made_once
def demonstrations():
    return texts_of(rollout(0, LENGTHS))


def texts_of(batch):
    return Demonstrations(batch.tokens, batch.attention_mask, batch.response_mask)


@made_once
def answers(num_answers):
    """Comparisons without a third device, and without two of the other answers."""
    absent = [
        (1, 1),
        (2, 0),
        *((row, answer) for row in range(8, 12) for answer in range(num_answers)),
    ]
    batch = comparisons(0, 16, num_answers, absent=absent)
    return batch.replace(best=jnp.asarray(np.arange(16) % num_answers), weight=WEIGHT)


@made_once
def with_targets():
    targets = np.sin(np.arange(48.0, dtype=np.float32)).reshape(16, 3)
    return answers(3).replace(targets=jnp.asarray(targets))


@made_once
def pairs():
    return jax.jit(dpo.with_reference)(answers(2), Partial(policy_fn, policy_params(1)))


@made_once
def feedback():
    liked = jnp.asarray(np.arange(16) % 3 == 0)
    rows = Feedback(*vars(demonstrations()).values(), liked, WEIGHT)
    return jax.jit(kto.with_reference)(rows, Partial(policy_fn, policy_params(1)))


@made_once
def samples():
    """A rollout without advantages, which the update is to make."""
    batch = rollout(0, LENGTHS)
    weights = jnp.asarray(np.exp(0.3 * np.asarray(batch.advantages)))
    return batch.replace(advantages=None, returns=None, importance_weights=weights)


# Random parameters and batches of losses: log-ratios have the size of ``scale``

ROWS = 8
LENGTH = 4
MARKED = 2  # of a response's tokens in its mask: any number but 0 counts


def dense(rng, scale):
    """A rollout of eight rows: at least two are absent, some responses have holes."""
    seed = int(rng.integers(2**31))
    lengths = rng.integers(1, LENGTH + 1, size=ROWS) * (rng.permutation(ROWS) > 1)
    batch = jax.tree.map(np.asarray, rollout(seed, lengths))
    mask = MARKED * batch.response_mask * (rng.random(batch.tokens.shape) > 0.2)
    near = batch.ref_log_probs  # within about 0.5 of the policy's
    return policy_params(seed), batch.replace(
        response_mask=mask,
        log_probs=(near + scale * rng.normal(size=near.shape)).astype(np.float32),
        advantages=rng.normal(size=near.shape).astype(np.float32),
        scores=rng.normal(size=ROWS).astype(np.float32),  # not read beside rewards
    )


def scored(rng, scale):
    params, batch = dense(rng, scale)
    scores = rng.integers(0, 3, size=ROWS).astype(np.float32)
    return params, batch.replace(rewards=None, scores=scores)


def weighed(rng, scale):
    params, batch = dense(rng, scale)
    weights = rng.uniform(0, 2, size=batch.tokens.shape).astype(np.float32)
    return params, batch.replace(importance_weights=weights)


def one_advantage_a_row(rng, scale):
    params, batch = weighed(rng, scale)
    return params, batch.replace(advantages=batch.advantages[:, 0])


def texts(rng, scale):
    params, batch = dense(rng, scale)
    return params, texts_of(batch)


def rated(rng, scale):
    """Single answers with a reference point; no likes in one batch of some."""
    params, batch = dense(rng, scale)
    rows = Feedback(
        batch.tokens,
        batch.attention_mask,
        batch.response_mask,
        desirable=rng.random(ROWS) < rng.choice([0.0, 0.5]),
        weight=rng.integers(0, 3, size=ROWS).astype(np.float32),
        ref_log_probs=(-5 + scale * rng.normal(size=ROWS)).astype(np.float32),
    )
    point = np.full(ROWS, abs(scale * rng.normal()), np.float32)
    return params, rows.replace(reference_point=point)


def compared(rng, scale, num_answers, *fields):
    """Comparisons with absent answers, a row that has none, and holes in the responses."""
    seed = int(rng.integers(2**31))
    others = zip([2, 3], rng.integers(0, num_answers, size=2), strict=True)
    absent = [*((0, k) for k in range(num_answers)), *others]
    batch = jax.tree.map(np.asarray, comparisons(seed, ROWS, num_answers, absent=absent))
    mask = MARKED * batch.response_mask * (rng.random(batch.tokens.shape) > 0.2)
    batch = batch.replace(
        response_mask=mask, attention_mask=batch.attention_mask * mask.any(axis=2, keepdims=True)
    )
    made = {
        "best": rng.integers(0, num_answers, size=ROWS),
        "margin": rng.random(ROWS).astype(np.float32),
        "weight": rng.integers(0, 3, size=ROWS).astype(np.float32),
        "targets": rng.normal(size=(ROWS, num_answers)).astype(np.float32),
        "ref_log_probs": (-5 + scale * rng.normal(size=(ROWS, num_answers))).astype(np.float32),
    }
    # Sums of these are exact in float32 too, so that a tie is one in any order of the tokens.
    table = (scale * np.round(16 * rng.normal(size=VOCAB_SIZE)) / 16).astype(np.float32)
    params = {"scores": jnp.asarray(table), **policy_params(seed)}
    return params, batch.replace(**{name: made[name] for name in fields})


def drawn(num_answers, *fields):
    return lambda rng, scale: compared(rng, scale, num_answers, *fields)


def policy(module, draw=dense, batch=None, num_epochs=2, **settings):
    return Case(module, module.Config(**settings), draw, batch, num_epochs)


def preference(draw=None, batch=None, **settings):
    return Case(
        dpo, dpo.Config(**settings), draw or drawn(2, "ref_log_probs", "best", "weight"), batch
    )


PPO = ppo.Config(num_epochs=1, whiten_rewards=True, dual_clip=1.2, **TERMS)
FIXED = {"aggregate": "fixed", "length": LENGTH}
K3 = {"kl_loss_coef": 0.1, "kl_loss_estimator": "k3"}
OF_FOUR = {"group_size": 4, **TERMS}
CASES = {
    "sft": Case(sft, sft.Config(), texts, demonstrations),
    "sft sequence": Case(sft, sft.Config(aggregate="sequence"), texts),
    "reward_model": Case(reward_model, reward_model.Config(), drawn(4), partial(answers, 4)),
    "centering": Case(
        reward_model,
        reward_model.Config(centering=0.01),
        drawn(2, "best", "margin", "weight"),
        partial(answers, 2),
    ),
    "regression": Case(
        reward_model, reward_model.Config(), drawn(2, "targets", "weight"), with_targets
    ),
    "dpo": preference(batch=pairs, beta=0.5, label_smoothing=0.1),
    "dpo robust": preference(kind="robust", label_smoothing=0.2),
    "dpo hinge": preference(drawn(2, "ref_log_probs", "best"), kind="hinge", beta=0.5),
    "dpo by length": preference(beta=5.0, length_normalised=True),
    "dpo ipo": preference(kind="ipo", beta=0.5),
    "dpo sft": preference(kind="robust", label_smoothing=0.2, sft_coef=0.3),
    "orpo": preference(kind="orpo"),
    "simpo": preference(batch=partial(answers, 2), kind="simpo", beta=2.0, gamma=0.5),
    "kto": Case(kto, kto.Config(beta=0.5, desirable_weight=1.5), rated, feedback),
    "bco": Case(kto, kto.Config(kind="bco", beta=0.5, desirable_weight=1.5), rated, feedback),
    "vpg": policy(vpg, weighed, samples, 1, entropy_coef=0.1, **FIXED),
    "vpg token": policy(vpg, one_advantage_a_row, aggregate="token", entropy_coef=0.2),
    "ppo": Case(ppo, PPO, dense, samples),
    "ppo sum": policy(
        ppo,
        aggregate="sum",
        dual_clip=1.2,
        value_clip=None,
        value_coef=0.5,
        gamma=0.9,
        whiten_advantages=False,
    ),
    "ppo fixed": policy(
        ppo,
        weighed,
        clip_low=0.1,
        dual_clip=1.2,
        gamma=0.9,
        whiten_advantages=False,
        whiten_rewards=True,
        entropy_coef=0.1,
        **FIXED,
        **K3,
    ),
    "rloo": policy(rloo, scored, samples, **TERMS),
    "rloo token": policy(
        rloo, scored, group_size=2, aggregate="token", entropy_coef=0.2, kl_loss_coef=0.3
    ),
    "rloo fixed": policy(rloo, weighed, dual_clip=1.2, **FIXED, **K3),
    "grpo": policy(grpo, scored, samples, **OF_FOUR),
    "grpo token": policy(
        grpo,
        group_size=2,
        aggregate="token",
        eps=0.1,
        clip_high=0.3,
        dual_clip=2.0,
        kl_loss_estimator="k2",
    ),
    "dr grpo": policy(grpo, group_size=4, scale=False, entropy_coef=0.1, kl_loss_coef=0.0, **FIXED),
    "cispo": policy(
        grpo, weighed, samples, group_size=4, surrogate="cispo", clip_low=1.0, clip_high=4.0
    ),
    "cispo sequence": policy(
        rloo,
        scored,
        surrogate="cispo",
        ratio="sequence",
        clip_low=0.05,
        clip_high=0.1,
        kl_loss_coef=0.1,
    ),
    "sapo": policy(
        grpo,
        weighed,
        samples,
        group_size=4,
        surrogate="sapo",
    ),
    "vespo": policy(
        grpo,
        scored,
        samples,
        group_size=4,
        scale=False,
        surrogate="vespo",
        ratio="product",
        aggregate="token",
    ),
    "luspo": policy(grpo, scored, ratio="sequence", aggregate="sum", group_size=4),
    "reinforce++": policy(rloo, batch=samples, baseline="global", group_size=1, **TERMS),
    "reinforce++ baseline": policy(rloo, batch=samples, baseline="both", **TERMS),
    "gspo": policy(grpo, scored, samples, ratio="sequence", **OF_FOUR),
    "distill": policy(distill, scored, samples, teacher_coef=0.5, **TERMS),
    "distill forward": policy(distill, divergence="forward_kl", group_size=2, **FIXED),
    "distill jsd": policy(distill, scored, divergence="jsd", beta=0.3, aggregate="sequence"),
    "distill sampled": policy(
        distill, weighed, samples, divergence="sampled", discount=0.5, teacher_coef=2.0, **OF_FOUR
    ),
}
# Those that have updates of their own to test.
UPDATES = {name: case for name, case in CASES.items() if case.batch}
POLICY = [name for name, case in UPDATES.items() if hasattr(case.module, "prepare")]
