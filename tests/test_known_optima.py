"""Policy gradients in a language all of whose responses can be listed: every algorithm finds its own optimum, from the
exact gradient and from samples, and would miss it with another coefficient."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_language as tiny

from rlhf_jax import rewards
from rlhf_jax.algorithms import grpo, ppo, rloo, vpg

KEY = jax.random.key(7)
COEF = 0.5


def test_fixed_points_in_cases_with_a_closed_form():
    """Rewards of the first token alone are a bandit's: k2 gives ref exp(r / c), k3 c ref / (lambda - r). And with an
    uninformative reward nothing moves, whatever the weights."""
    first = np.array([1.0, 0.0, 2.0, 0.5])[tiny.TOKENS[:, 1]]
    ref = np.array([tiny.REF[tiny.TOKENS[:, 1] == token].sum() for token in range(4)])
    for estimator in ("k2", "k3"):
        found = tiny.fixed_point(lambda probs: first, COEF, estimator, np.ones(121))
        share = np.array([found[tiny.TOKENS[:, 1] == token].sum() for token in range(4)])
        within = [found[tiny.TOKENS[:, 1] == token] / share[token] for token in range(4)]
        before = [tiny.REF[tiny.TOKENS[:, 1] == token] / ref[token] for token in range(4)]
        np.testing.assert_allclose(np.concatenate(within), np.concatenate(before), rtol=1e-6)
        if estimator == "k2":
            expected = ref * np.exp(np.array([1.0, 0.0, 2.0, 0.5]) / COEF)
            np.testing.assert_allclose(share, expected / expected.sum(), rtol=1e-6)
        else:  # COEF * ref / share + r is the same number for all
            np.testing.assert_allclose(np.ptp(COEF * ref / share + np.array([1.0, 0.0, 2.0, 0.5])), 0.0, atol=1e-6)
        same = tiny.fixed_point(lambda probs: np.zeros(121), COEF, estimator, 1.0 / tiny.LENGTHS)
        np.testing.assert_allclose(same, tiny.REF, rtol=1e-6)


def leave_one_out(probs):
    """A in expectation over the other answer."""
    return tiny.REWARDS - probs @ tiny.REWARDS


def unscaled(probs):
    """(G - 1) / G of that: half, in pairs."""
    return 0.5 * leave_one_out(probs)


def scaled(probs):
    """(r - s) / 2 over the pair's standard deviation |r - s| / sqrt 2, which is +-1 / sqrt 2: how often r wins."""
    difference = tiny.REWARDS[:, None] - tiny.REWARDS[None, :]
    return (0.5 * difference / (np.abs(difference) / np.sqrt(2.0) + 1e-4)) @ probs


def with_kl_in_loss(algorithm, advantage, estimator, coef, by_row=False, **fields):
    """Algorithm, config, coefficient of k1 in the reward, and the optimum for ``factor`` times the coefficient."""
    config = algorithm.Config(group_size=2, kl_loss_coef=coef, kl_loss_estimator=estimator, **fields)
    weight = 1.0 / tiny.LENGTHS if by_row else np.ones(121)
    return algorithm, config, 0.0, lambda factor: tiny.fixed_point(advantage, factor * coef, estimator, weight)


def with_kl_in_reward(algorithm, config, coef=0.5):
    return algorithm, config, coef, lambda factor: tiny.tilted(factor * coef)


DR_GRPO = {"scale": False, "aggregate": "fixed", "length": tiny.STEPS}
GROUPS = {
    "rloo": with_kl_in_reward(rloo, rloo.Config(group_size=2)),
    "rloo_k2": with_kl_in_loss(rloo, leave_one_out, "k2", 0.5),
    "grpo_k2": with_kl_in_loss(grpo, unscaled, "k2", 0.2, by_row=True, scale=False),
    "grpo_k3": with_kl_in_loss(grpo, unscaled, "k3", 0.2, by_row=True, scale=False),
    "dr_grpo_k2": with_kl_in_loss(grpo, unscaled, "k2", 0.2, **DR_GRPO),
    "dr_grpo_k3": with_kl_in_loss(grpo, unscaled, "k3", 0.2, **DR_GRPO),
    "grpo_scaled": with_kl_in_loss(grpo, scaled, "k3", 0.2, by_row=True),
}


@functools.cache
def optimum_of(name, factor=1):
    return LEARNERS[name][3](factor)


def shaped(batch, kl_coef):
    return batch.replace(rewards=rewards.kl_shaped(batch, kl_coef)) if kl_coef else batch


@pytest.mark.parametrize(
    "name", [name if name in ("rloo", "grpo_k3") else pytest.param(name, marks=pytest.mark.slow) for name in GROUPS]
)
def test_expected_gradient_vanishes_at_the_optimum(name):
    """All 121 x 121 groups of two answers, each with its probability: no samples, no steps."""
    algorithm, config, kl_coef, _ = GROUPS[name]
    pairs = np.stack(np.indices((121, 121)), axis=-1).reshape(-1, 2)

    @jax.jit
    def gradient(params, probs, listed, pairs):
        batch = shaped(tiny.every_response(params, listed), kl_coef)

        def expected(params):
            output = tiny.policy_fn(params, listed.tokens, listed.attention_mask, None)

            def loss(pair):
                group, of_pair = jax.tree.map(lambda x: jnp.asarray(x)[pair], (batch, output))
                group = algorithm.prepare(group, config=config)
                loss, _ = algorithm.loss(params, group, KEY, policy_fn=lambda *args: of_pair, config=config)
                return loss.value

            return jnp.sum(jnp.prod(probs[pairs], axis=1) * jax.vmap(loss)(pairs))

        return jax.grad(expected)(params)["logits"]

    def size(probs):
        params = tiny.params() | {"logits": jnp.asarray(tiny.table(probs), jnp.float32)}
        return np.linalg.norm(gradient(params, jnp.asarray(probs, jnp.float32), tiny.LISTED, pairs))

    optimum, elsewhere = optimum_of(name), optimum_of(name, 2)
    assert tiny.distance(optimum, elsewhere) > 0.1
    assert size(optimum) < 1e-3 * size(elsewhere)
    assert size(optimum) < 1e-3 * size(tiny.REF)


def test_the_optima_differ():
    """What is tested above tells the algorithms apart: a KL per token in the loss is not the KL of the response, k2 is
    not k3, and counting every row alike is not counting every token alike."""
    for one, other in itertools.combinations(GROUPS, 2):
        assert tiny.distance(optimum_of(one), optimum_of(other)) > 0.05, (one, other)


# From samples, step by step


LEARNERS = {
    "vpg": with_kl_in_reward(vpg, vpg.Config()),
    "ppo": with_kl_in_reward(ppo, ppo.Config()),
    **GROUPS,
}


def train(algorithm, config, kl_coef, num_steps=500, rows=2048):
    optimizer = tiny.adam(num_steps)

    def iteration(state, uniform):
        batch = shaped(tiny.draw(state.params, uniform), kl_coef)
        return algorithm.update(state, batch, KEY, policy_fn=tiny.policy_fn, optimizer=optimizer, config=config)

    uniform = np.random.default_rng(3).random((num_steps // config.num_epochs, rows), np.float32)
    state, metrics = tiny.repeat(iteration, algorithm.State.create(tiny.params(), optimizer), uniform)
    assert not metrics["nonfinite"].any()
    return tiny.probabilities(state.params["logits"])


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_learning_from_samples_reaches_the_optimum(name):
    algorithm, config, kl_coef, _ = LEARNERS[name]
    found = train(algorithm, config, kl_coef)
    assert tiny.distance(found, optimum_of(name)) < 0.03
    assert tiny.distance(found, optimum_of(name, 2)) > 0.1
