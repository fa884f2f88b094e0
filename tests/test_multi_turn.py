"""Responses with holes: the policy speaks, a tool or the user answers, the policy goes on. What is in a hole is context
of what follows and nothing else: no loss, advantage, statistic or gradient reads it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tabular import assert_close, assert_identical, numbers

from rlhf_jax import ops
from rlhf_jax.algorithms import dpo, grpo, ppo, rloo, sft, vpg
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
