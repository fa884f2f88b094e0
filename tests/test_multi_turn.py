"""Responses with holes: the policy speaks, a tool or the user answers, the policy goes on. What is in a hole is context
of what follows and nothing else: no loss, advantage, statistic or gradient reads it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from tabular import assert_close, assert_identical, numbers

from rlhf_jax import ops
from rlhf_jax.algorithms import dpo, grpo, ppo, reward_model, rloo, sft, vpg
from rlhf_jax.rewards import kl_shaped
from rlhf_jax.types import Comparisons, Demonstrations, PolicyOutput, Rollout

KEY = jax.random.key(7)
VOCAB_SIZE = 5
# P prompt, a what the policy said, x what others said in between or afterwards, - padding.
LAYOUT = ["-Paaxxaa", "PPaxaxa-", "-Pxaaxx-", "PPxxx---", "PPaaaa--", "-Paxxxxa", "PPaaxxx-", "-Pxxxxx-"]
LETTERS = np.array([list(row) for row in LAYOUT])


def in_columns(letters, tokens, **fields):
    """A Rollout whose masks come from letters [B, T]."""
    return Rollout(
        tokens=tokens.astype(np.int32),
        attention_mask=(letters != "-").astype(np.int32),
        response_mask=(letters == "a").astype(np.int32),
        **{name: np.asarray(x, np.float32) for name, x in fields.items()},
    )


def conversations(closed_up=False):
    """The rows of LAYOUT with random numbers in every field, or the same with the holes cut out."""
    rng = np.random.default_rng(0)
    arrays = {"tokens": rng.integers(0, VOCAB_SIZE, size=LETTERS.shape)}
    for name in ("log_probs", "ref_log_probs", "values", "rewards"):
        arrays[name] = rng.normal(scale=0.3, size=LETTERS.shape) - ("log" in name)
    letters = LETTERS
    if closed_up:
        rank = np.select([letters == "P", letters == "a"], [1, 2], 3)
        rank = np.where((letters == "-") & (np.arange(8)[None, :] == 0), 0, rank)  # left padding stays
        order = np.argsort(rank, axis=1, kind="stable")
        letters = np.take_along_axis(np.where(letters == "x", "-", letters), order, axis=1)
        arrays = {name: np.take_along_axis(x, order, axis=1) for name, x in arrays.items()}
    return in_columns(letters, **arrays)


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=VOCAB_SIZE).astype(np.float32) for name in ("logits", "values")}


def alone(params, tokens, attention_mask, key):
    """Log-probs and values by the token itself, whatever stands before it: cutting a hole out changes none of them."""
    del attention_mask, key
    logits = jnp.broadcast_to(params["logits"], (*tokens.shape, VOCAB_SIZE))
    log_probs = jax.nn.log_softmax(params["logits"])[tokens]
    return PolicyOutput(log_probs, ops.entropy(logits), jnp.asarray(params["values"])[tokens])


def pairs(batch):
    return Comparisons(
        *(x.reshape(-1, 2, x.shape[1]) for x in (batch.tokens, batch.attention_mask, batch.response_mask))
    )


def of_sft(params, batch, policy_fn):
    demonstrations = Demonstrations(batch.tokens, batch.attention_mask, batch.response_mask)
    return sft.loss(params, demonstrations, None, policy_fn=policy_fn, config=sft.Config())


def of_vpg(params_now, batch, policy_fn):
    batch = batch.replace(advantages=kl_shaped(batch, 0.1).sum(axis=1))
    return vpg.loss(params_now, batch, KEY, policy_fn=policy_fn, config=vpg.Config(entropy_coef=0.1))


def of_clipped(algorithm, config, params_now, batch, policy_fn):
    batch = algorithm.prepare(batch.replace(rewards=kl_shaped(batch, 0.1)), config=config)
    return algorithm.loss(params_now, batch, KEY, policy_fn=policy_fn, config=config)


def of_dpo(params_now, batch, policy_fn):
    batch = dpo.with_reference(pairs(batch), functools.partial(policy_fn, params(1)))
    return dpo.loss(params_now, batch, KEY, policy_fn=policy_fn, config=dpo.Config(beta=0.5))


TERMS = {"kl_loss_coef": 0.1, "entropy_coef": 0.1}
LOSSES = {
    "sft": of_sft,
    "vpg": of_vpg,
    "ppo": functools.partial(of_clipped, ppo, ppo.Config(whiten_rewards=True, **TERMS)),
    "rloo": functools.partial(of_clipped, rloo, rloo.Config(group_size=4, **TERMS)),
    "grpo": functools.partial(of_clipped, grpo, grpo.Config(group_size=4, **TERMS)),
    "dpo": of_dpo,
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_in_a_hole_does_not_matter(name):
    """Loss, metrics and gradient are those of the policy's tokens put side by side, and the same to the last bit
    whatever numbers and tokens the hole holds: GAE, whitening, KL penalty, groups and means see nothing of it."""
    hole = LETTERS == "x"

    @jax.jit
    def run(batch, poison):
        def poisoned(x):  # added, so that what is masked too late comes back as a gradient
            return x + jnp.where(hole, poison, 0.0)

        def policy_fn(*args):
            return PolicyOutput(*(poisoned(x) for x in alone(*args)))

        fields = ("log_probs", "ref_log_probs", "values", "rewards")
        batch = batch.replace(**{field: poisoned(getattr(batch, field)) for field in fields})
        return jax.value_and_grad(numbers(LOSSES[name]), has_aux=True)(params(), batch, policy_fn)

    batch = conversations()
    expected = run(batch, 0.0)
    assert max(np.abs(x).max() for x in jax.tree.leaves(expected[1])) > 0.01
    assert_close(expected, run(conversations(closed_up=True), 0.0), atol=2e-6)
    other_tokens = batch.replace(tokens=np.where(hole, (batch.tokens + 1) % VOCAB_SIZE, batch.tokens))
    for poison in (np.nan, 1e4, -1e4):
        assert_identical(run(other_tokens, poison), expected)


def test_the_layout_has_what_it_should():
    """Holes at the start, in the middle, at the end, and responses that are nothing but hole: absent rows."""
    closed = conversations(closed_up=True)
    np.testing.assert_array_equal(closed.response_mask.sum(axis=1), [4, 3, 2, 0, 4, 2, 2, 0])
    np.testing.assert_array_equal(closed.response_mask[1], [0, 0, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(closed.attention_mask[0], [0, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(closed.tokens[1, 2:5], conversations().tokens[1, [2, 4, 6]])


# Numbers by hand


def bigram(params, tokens, attention_mask, key):
    """A table of logits by the token before."""
    del attention_mask, key
    logits = params[tokens]
    return PolicyOutput(ops.token_log_probs(logits, tokens), ops.entropy(logits))


BIGRAM = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))  # p(1 | 0) = 1/4, p(1 | 1) = 1/2
TURNS = np.array([list("Paxax"), list("Paxx-"), list("Pxxx-"), list("P----")])  # two rows that count


def example():
    """Policy and reference differ by ln 2 on each policy token of the first row, by nothing on the second's."""
    tokens = np.array([[0, 1, 0, 1, 1], [0, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    log_probs = np.where(TURNS == "a", math.log(0.25), np.nan)
    return in_columns(
        TURNS,
        tokens,
        log_probs=log_probs,
        ref_log_probs=log_probs - np.array([[math.log(2.0)], [0.0], [0.0], [0.0]]),
        values=np.where(TURNS == "a", [[0, 0.1, 0, 0.4, 0]], np.nan),
        scores=[2.0, 1.0, np.nan, np.nan],
    )


def test_rewards_and_advantages_by_hand():
    """The score is on the last thing the policy said, though a tool answered it; GAE steps over the hole; whitening
    counts the three tokens of the policy; groups compare the two rows that are there."""
    of_grpo = grpo.Config(group_size=4, kl_loss_coef=0.5, eps=0.0)

    @jax.jit
    def run(batch):
        batch = batch.replace(rewards=kl_shaped(batch, 0.5))
        plain = ppo.prepare(batch, config=ppo.Config(gae_lambda=0.5, whiten_advantages=False))
        white = ppo.prepare(batch, config=ppo.Config(gae_lambda=0.5))
        configs = ((rloo, rloo.Config()), (grpo, of_grpo))
        groups = [algorithm.prepare(batch, config=config) for algorithm, config in configs]
        losses = [
            numbers(rloo.loss)(BIGRAM, groups[0], KEY, policy_fn=bigram, config=rloo.Config()),
            numbers(grpo.loss)(BIGRAM, groups[1], KEY, policy_fn=bigram, config=of_grpo),
        ]
        return batch.rewards, plain, white.advantages, groups[0].advantages, losses

    shaped, plain, white, by_group, losses = run(example())
    k = 0.5 * math.log(2.0)
    np.testing.assert_allclose(shaped, [[0, -k, 0, 2 - k, 0], [0, 1, 0, 0, 0], [0] * 5, [0] * 5], rtol=1e-6)
    last = 2 - k - 0.4
    first = -k + 0.4 - 0.1 + 0.5 * last
    np.testing.assert_allclose(plain.advantages[:2], [[0, first, 0, last, 0], [0, 0.9, 0, 0, 0]], rtol=1e-5)
    np.testing.assert_allclose(plain.returns[:2], [[0, first + 0.1, 0, last + 0.4, 0], [0, 1, 0, 0, 0]], rtol=1e-5)
    three = np.array([first, last, 0.9])
    expected = np.zeros((4, 5))
    expected[TURNS == "a"] = (three - three.mean()) / three.std()
    np.testing.assert_allclose(white, expected, atol=1e-4)

    difference = 1 - 2 * k  # 2 - 2 k against 1
    expected = [[0, difference, 0, difference, 0], [0, -difference, 0, 0, 0], [0] * 5, [0] * 5]
    np.testing.assert_allclose(by_group, expected, rtol=1e-5)
    (value, metrics), (grpo_value, grpo_metrics) = losses
    np.testing.assert_allclose(value, -(2 * difference - difference) / 2, rtol=1e-5)
    assert metrics["policy/ratio_max"] == 1.0
    np.testing.assert_allclose(grpo_metrics["policy/kl_loss"], 0.193147 / 2, rtol=1e-4)  # k3 of ln 2, and 0
    np.testing.assert_allclose(grpo_value, 0.5 * 0.193147 / 2, atol=1e-6)  # the advantages cancel: +-1 / sqrt 2


def test_dpo_sums_what_the_policy_said():
    """1/4 against the reference's 1/8 is ln 2 for each token: Delta = 2 ln 2 - ln 2, without the tools."""

    @jax.jit
    def run(batch):
        reference = jnp.log(jnp.array([[0.875, 0.125], [0.5, 0.5]]))
        batch = dpo.with_reference(batch, Partial(bigram, reference))
        return batch.ref_log_probs, numbers(dpo.loss)(BIGRAM, batch, KEY, policy_fn=bigram, config=dpo.Config(beta=1.0))

    ref_log_probs, (value, metrics) = run(pairs(example()))
    np.testing.assert_allclose(ref_log_probs[0], [2 * math.log(0.125), math.log(0.125)], rtol=1e-6)
    np.testing.assert_allclose(value, math.log(1.5), rtol=1e-5)  # -log sigmoid(ln 2); the second pair is absent
    np.testing.assert_allclose(metrics["dpo/chosen_log_ratio"], 2 * math.log(2.0), rtol=1e-5)


def test_a_reward_model_reads_tool_output_but_needs_an_answer():
    """Scores are of the whole text, holes included; an answer that the policy never spoke in is absent."""
    batch = pairs(example())
    table = {"scores": jnp.array([0.25, 1.0])}

    def score_fn(params, tokens, attention_mask, key):
        del key
        return jnp.sum(jnp.where(attention_mask != 0, params["scores"][tokens], 0.0), axis=1)

    f = jax.jit(functools.partial(numbers(reward_model.loss), score_fn=score_fn, config=reward_model.Config()))
    value, metrics = f(table, batch, None)
    # 01011 against 0111: 3.5 against 3.25; the second pair has no answer at all.
    np.testing.assert_allclose(value, math.log1p(math.exp(-0.25)), rtol=1e-6)
    assert metrics["reward_model/margin"] == 0.25
    filled = batch.replace(response_mask=batch.attention_mask * batch.response_mask.any(axis=2, keepdims=True))
    assert_identical(f(table, filled, None), (value, metrics))
