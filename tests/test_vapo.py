"""What VAPO adds to PPO: advantages whose lambda grows with the response, and the likelihood of
right answers."""

import jax
import numpy as np
import pytest
import references
from numpy.testing import assert_allclose
from tabular import numbers, policy_fn, policy_params, rollout

from rlhf_jax import ppo

LENGTHS = [4, 1, 2, 0, 3, 4]


def by_loop(batch, config, values):
    """Advantages of each row with its own lambda, before they are whitened."""
    mask = np.asarray(batch.response_mask) != 0
    advantages = np.zeros(mask.shape)
    for row, length in enumerate(LENGTHS):
        decay = max(1 - 1 / (config.length_adaptive * length), 0.0) if length else 0.0
        one = slice(row, row + 1)
        numbers_of = (np.asarray(x)[one] for x in (batch.rewards, values, mask))
        advantages[one], _ = references.gae(*numbers_of, 0.9, decay)
    return advantages


@pytest.mark.parametrize("normalize", [True, False])
def test_advantages_have_a_lambda_of_their_own_and_returns_keep_theirs(normalize):
    batch = rollout(0, LENGTHS).replace(advantages=None, returns=None)
    common = {"gamma": 0.9, "normalize_returns": normalize, "whiten_advantages": False}
    config = ppo.Config(length_adaptive=0.4, **common)  # 1 - 1 / (0.4 * 2) is below 0
    prepared = jax.jit(lambda batch: ppo.prepare(batch, config=config))(batch)
    plain = jax.jit(lambda batch: ppo.prepare(batch, config=ppo.Config(**common)))(batch)
    values = np.asarray(batch.values, np.float64)
    if normalize:
        mask = np.asarray(batch.response_mask) != 0
        _, sums = references.gae(np.asarray(batch.rewards), 0 * values, mask, 0.9, 1.0)
        values = sums[mask].mean() + sums[mask].std() * values
    assert_allclose(prepared.advantages, by_loop(batch, config, values), atol=1e-5)
    assert_allclose(prepared.returns, plain.returns)
    assert np.max(np.abs(prepared.advantages - plain.advantages)) > 0.1


def test_the_likelihood_of_right_answers_is_a_term_per_token():
    """Scores above 0 are right; a missing row says nothing."""
    batch = rollout(1, LENGTHS).replace(scores=np.float32([1, -1, 0, 1, 0.5, -1]))
    params = policy_params(1)

    def loss(params, coefficient):
        config = ppo.Config(positive_coef=coefficient)
        return numbers(ppo.loss)(params, batch, None, policy_fn=policy_fn, config=config)

    def of_right(params):
        log_probs = policy_fn(params, batch.tokens, None, None).log_probs
        right = (np.asarray(batch.response_mask) * [[1], [0], [0], [1], [1], [0]]) != 0
        return -(log_probs * right).sum() / right.sum()

    found = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), gradient = found(params, 0.1)
    (without, _), before = jax.jit(jax.value_and_grad(lambda x: loss(x, 0.0), has_aux=True))(params)
    expected, added = jax.jit(jax.value_and_grad(of_right))(params)
    assert_allclose(metrics["policy/positive_loss"], expected, rtol=1e-6)
    assert_allclose(value, without + 0.1 * expected, rtol=1e-6)
    assert_allclose(gradient["logits"], before["logits"] + 0.1 * added["logits"], atol=1e-6)


def test_right_answers_need_scores():
    config = ppo.Config(positive_coef=0.1)
    with pytest.raises(ValueError, match=r"rollout\.scores is needed"):
        ppo.loss(policy_params(0), rollout(0, LENGTHS), None, policy_fn=policy_fn, config=config)
