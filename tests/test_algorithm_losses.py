"""Each algorithm's loss as a whole, with metrics and gradient, against slow NumPy: ragged responses
with holes, rows and answers that are absent, one-token responses, huge log-ratios, and anything at
all in masked columns."""

import dataclasses
import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial
from tabular import VOCAB_SIZE, comparisons, numbers, policy_fn, policy_params, rollout, score_fn

from rlhf_jax import dpo, grpo, kto, ppo, reward_model, rloo, sft, vpg
from rlhf_jax.training import phases
from rlhf_jax.types import Demonstrations, Feedback, PolicyOutput

ROWS = 8
LENGTH = 4
FIXED = {"aggregate": "fixed", "length": LENGTH}
K3 = {"kl_loss_coef": 0.1, "kl_loss_estimator": "k3"}


def dense(rng, scale):
    """A rollout of eight rows: two absent for sure, some responses with holes; log-ratios of the
    size of ``scale``.
    """
    seed = int(rng.integers(2**31))
    lengths = rng.integers(1, LENGTH + 1, size=ROWS) * (rng.permutation(ROWS) > 1)
    batch = jax.tree.map(np.asarray, rollout(seed, lengths))
    mask = batch.response_mask * (rng.random(batch.tokens.shape) > 0.2)
    near = batch.ref_log_probs  # within about 0.5 of the policy's
    return policy_params(seed), batch.replace(
        response_mask=mask,
        log_probs=(near + scale * rng.normal(size=near.shape)).astype(np.float32),
        advantages=rng.normal(size=near.shape).astype(np.float32),
        scores=rng.normal(size=ROWS).astype(np.float32),  # not read beside rewards
    )


def scored(rng, scale):
    params, batch = dense(rng, scale)
    return params, batch.replace(
        rewards=None, scores=rng.integers(0, 3, size=ROWS).astype(np.float32)
    )


def weighed(rng, scale):
    params, batch = dense(rng, scale)
    return params, batch.replace(
        importance_weights=rng.uniform(0, 2, size=batch.tokens.shape).astype(np.float32)
    )


def one_advantage_a_row(rng, scale):
    params, batch = weighed(rng, scale)
    return params, batch.replace(advantages=batch.advantages[:, 0])


def texts(rng, scale):
    params, batch = dense(rng, scale)
    return params, Demonstrations(batch.tokens, batch.attention_mask, batch.response_mask)


def feedback(rng, scale):
    """Single answers with a reference point; no likes in one batch of some."""
    params, batch = dense(rng, scale)
    made = (
        (-5 + scale * rng.normal(size=ROWS)).astype(np.float32),
        rng.integers(0, 3, size=ROWS).astype(np.float32),
    )
    point = np.full(ROWS, abs(scale * rng.normal()), np.float32)
    liked = rng.random(ROWS) < rng.choice([0.0, 0.5])
    rows = Feedback(
        batch.tokens, batch.attention_mask, batch.response_mask, liked, made[1], made[0]
    )
    return params, rows.replace(reference_point=point)


def answers(rng, scale, num_answers, **fields):
    """Comparisons with absent answers, a row that has none, and holes in the responses."""
    seed = int(rng.integers(2**31))
    absent = [(0, k) for k in range(num_answers)] + list(
        zip([2, 3], rng.integers(0, num_answers, size=2), strict=True)
    )
    batch = jax.tree.map(np.asarray, comparisons(seed, ROWS, num_answers, absent=absent))
    mask = batch.response_mask * (rng.random(batch.tokens.shape) > 0.2)
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


PAIRS = partial(answers, num_answers=2, ref_log_probs=True)
CASES = {
    "sft sequence": (sft, sft.Config(aggregate="sequence"), texts),
    "choice of four": (reward_model, reward_model.Config(), partial(answers, num_answers=4)),
    "pairs": (
        reward_model,
        reward_model.Config(centering=0.05),
        partial(answers, num_answers=2, best=True, margin=True, weight=True),
    ),
    "regression": (
        reward_model,
        reward_model.Config(),
        partial(answers, num_answers=2, targets=True, weight=True),
    ),
    "vpg token": (vpg, vpg.Config(aggregate="token", entropy_coef=0.2), one_advantage_a_row),
    "vpg fixed": (vpg, vpg.Config(**FIXED, entropy_coef=0.1), weighed),
    "ppo sum": (
        ppo,
        ppo.Config(
            aggregate="sum",
            dual_clip=1.2,
            value_clip=None,
            value_coef=0.5,
            gamma=0.9,
            whiten_advantages=False,
        ),
        dense,
    ),
    "ppo fixed": (
        ppo,
        ppo.Config(
            **FIXED,
            clip_low=0.1,
            whiten_advantages=False,
            whiten_rewards=True,
            entropy_coef=0.1,
            **K3,
        ),
        weighed,
    ),
    "rloo token": (
        rloo,
        rloo.Config(group_size=2, aggregate="token", entropy_coef=0.2, kl_loss_coef=0.3),
        scored,
    ),
    "rloo fixed": (rloo, rloo.Config(**FIXED, dual_clip=1.2, **K3), weighed),
    "grpo": (grpo, grpo.Config(group_size=4), scored),
    "dr grpo": (grpo, grpo.Config(**FIXED, group_size=4, scale=False, entropy_coef=0.1), dense),
    "grpo token": (
        grpo,
        grpo.Config(
            group_size=2,
            aggregate="token",
            eps=0.1,
            clip_high=0.3,
            dual_clip=2.0,
            kl_loss_estimator="k2",
        ),
        dense,
    ),
    "cispo": (
        grpo,
        grpo.Config(
            group_size=4,
            surrogate="cispo",
            clip_low=0.5,
            clip_high=1.0,
            aggregate="token",
            kl_loss_coef=0.0,
        ),
        weighed,
    ),
    "cispo sequence": (
        rloo,
        rloo.Config(
            surrogate="cispo", ratio="sequence", clip_low=0.05, clip_high=0.1, kl_loss_coef=0.1
        ),
        scored,
    ),
    "reinforce++": (rloo, rloo.Config(baseline="global", group_size=1, aggregate="token"), dense),
    "reinforce++ baseline": (rloo, rloo.Config(baseline="both", aggregate="token"), dense),
    "gspo": (
        grpo,
        grpo.Config(group_size=4, ratio="sequence", clip_low=3e-4, clip_high=0.3, entropy_coef=0.1),
        scored,
    ),
    "dpo robust": (
        dpo,
        dpo.Config(kind="robust", label_smoothing=0.2),
        partial(PAIRS, best=True, weight=True),
    ),
    "dpo hinge": (dpo, dpo.Config(kind="hinge", beta=0.5), partial(PAIRS, best=True)),
    "dpo by length": (
        dpo,
        dpo.Config(beta=5.0, length_normalised=True),
        partial(PAIRS, best=True, weight=True),
    ),
    "simpo": (
        dpo,
        dpo.Config(kind="simpo", beta=2.0, gamma=1.0),
        partial(PAIRS, best=True, weight=True),
    ),
    "orpo": (dpo, dpo.Config(kind="orpo"), partial(PAIRS, best=True, weight=True)),
    "kto": (kto, kto.Config(desirable_weight=1.5), feedback),
    "dpo ipo": (dpo, dpo.Config(kind="ipo", beta=0.5), partial(PAIRS, best=True, weight=True)),
}
POISONED = {
    "log_probs",
    "ref_log_probs",
    "values",
    "rewards",
    "advantages",
    "importance_weights",
    "scores",
    "targets",
}
SLOW = {
    sft: references.sft,
    reward_model: references.reward_model,
    vpg: references.vpg,
    dpo: references.dpo_loss,
    kto: references.kto,
}
SLOW_WITH_STOPPED = {ppo: references.ppo, rloo: references.rloo, grpo: references.grpo}


def slow_loss(algorithm, config, params, stopped, batch):
    if algorithm in SLOW:
        return SLOW[algorithm](params, batch, config)
    return SLOW_WITH_STOPPED[algorithm](params, stopped, batch, config)


@functools.cache
def value_and_gradient(name):
    """``(params, batch, poison) -> ((loss, metrics), gradient)`` with the poison in every masked
    column and in the scores of absent rows and answers."""
    algorithm, config, _ = CASES[name]

    def loss(params, batch, poison):
        inside = batch.response_mask != 0

        def poisoned(x):  # added, so that what is masked too late comes back as a gradient
            kept = inside if x.ndim == inside.ndim else inside.any(axis=-1)
            return x + jnp.where(kept, 0.0, poison)

        def policy(*args):
            outside = ~inside.reshape(-1, inside.shape[-1])
            return PolicyOutput(*(x + jnp.where(outside, poison, 0.0) for x in policy_fn(*args)))

        def score(
            params, *args
        ):  # an absent answer has no token of its own, through which a gradient could come back
            own = jnp.sum(params["scores"])
            absent = poison + own - jax.lax.stop_gradient(own)
            return score_fn(params, *args) + jnp.where(inside.any(axis=-1).ravel(), 0.0, absent)

        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        batch = batch.replace(
            **{k: poisoned(x) for k, x in fields.items() if k in POISONED and x is not None}
        )
        model = {"score_fn": score} if algorithm is reward_model else {"policy_fn": policy}
        if algorithm in SLOW_WITH_STOPPED:
            batch = algorithm.prepare(batch, config=config)
        return numbers(algorithm.loss)(params, batch, None, **model, config=config)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


FAST = [
    "sft sequence",
    "choice of four",
    "pairs",
    "regression",
    "vpg token",
    "ppo fixed",
    "rloo token",
    "dr grpo",
]
FAST += ["gspo", "dpo robust", "cispo", "orpo", "kto"]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in FAST]


@pytest.mark.parametrize("name", FAST + OTHERS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.125, 4.0, 1024.0]))
def test_loss_metrics_and_gradient_equal_a_loop(name, seed, scale):
    algorithm, config, make = CASES[name]
    rng = np.random.default_rng(seed)
    params, batch = make(rng, scale)
    (value, metrics), gradient = value_and_gradient(name)(params, batch, 0.0)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    expected, expected_metrics = slow_loss(algorithm, config, exact, exact, batch)
    assert metrics.keys() == expected_metrics.keys()
    for metric, found in {**metrics, "loss": value}.items():
        want = {**expected_metrics, "loss": expected}[metric]
        np.testing.assert_allclose(found, want, rtol=3e-5, atol=1e-5, err_msg=metric)

    size = math.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradient)))
    for _ in range(3):  # the gradient along three directions, by differences of the loop
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), exact)
        ends = [jax.tree.map(lambda x, d, h=h: x + h * d, exact, direction) for h in (1e-6, -1e-6)]
        up, down = (slow_loss(algorithm, config, end, exact, batch)[0] for end in ends)
        slope = sum(
            np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True)
        )
        np.testing.assert_allclose(slope, (up - down) / 2e-6, rtol=1e-4, atol=1e-4 * size + 1e-6)

    for poison in (math.nan, 1e4):
        found = value_and_gradient(name)(params, batch, poison)
        jax.tree.map(np.testing.assert_array_equal, found, ((value, metrics), gradient))


def test_the_kl_is_a_mean_of_row_sums_and_its_default_horizon_is_ten_iterations():
    """Rows of 2, 3 and no tokens at ln 2 each are 2.5 ln 2 nats a row; the coefficient then moves
    by a tenth of .2.
    """
    optimizer = optax.sgd(0.0)
    batch = rollout(0, [2, 3, 0])
    batch = batch.replace(
        ref_log_probs=batch.log_probs - math.log(2), rewards=None, advantages=None
    )
    batch = batch.replace(scores=jnp.array([1.0, 2.0, math.nan]))
    loop = phases.LoopState.create(vpg.State.create(policy_params(0), optimizer), 0.15)
    functions = phases.Functions(Partial(policy_fn))
    penalty = phases.kl_penalty(0.15, target=0.5)
    how = {"config": vpg.Config(), "optimizer": optimizer, "penalty": penalty}
    learn = jax.jit(partial(phases.learn, algorithm=vpg, **how))
    loop, metrics = learn(loop, batch, jax.random.key(0), functions)
    np.testing.assert_allclose(metrics["objective/kl"], 2.5 * math.log(2), rtol=1e-6)
    np.testing.assert_allclose(
        metrics["objective/reward"], 1.5 - 0.15 * 2.5 * math.log(2), rtol=1e-6
    )
    np.testing.assert_allclose(loop.kl_coef, 0.15 * 1.02, rtol=1e-6)
    np.testing.assert_allclose(
        loop.train.baseline, 0.1 * (1.5 - 0.15 * 2.5 * math.log(2)), rtol=1e-5
    )
