"""Divergences of a student from a teacher, and the policy function that computes them in chunks."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import CONFIG, tiny
from numpy.testing import assert_allclose
from programs import array_sizes
from tabular import policy_params, rollout

from rlhf_jax import distill, losses, models, ops
from rlhf_jax.config import RLStage
from rlhf_jax.models import heads
from rlhf_jax.training.rl.teacher import log_ratio
from rlhf_jax.types import PolicyOutput, Rollout

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(scale=2.0, size=(3, 4, 7)).astype(np.float32)
THEIRS = RNG.normal(scale=2.0, size=(3, 4, 7)).astype(np.float32)
KINDS = ("reverse_kl", "forward_kl", "jsd")


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_zero_between_equals_and_flat_there(kind):
    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def total(logits, teacher):
        each = losses.divergence(logits, teacher_logits=teacher, kind=kind)
        return jnp.sum(each), each

    shifted = LOGITS + 3.0  # the same distributions
    (value, _), (gradient, _) = total(LOGITS, shifted)
    assert_allclose(value, 0.0, atol=1e-5)
    assert_allclose(gradient, 0.0, atol=1e-6)
    (_, each), (_, of_teacher) = total(LOGITS, THEIRS)
    assert np.min(each) > 0.01
    assert not np.any(of_teacher)


def test_the_jensen_shannon_divergence_lies_between_the_two():
    divergence = jax.jit(losses.divergence, static_argnames="kind")
    ours = partial(divergence, LOGITS, teacher_logits=THEIRS)
    swapped = partial(divergence, THEIRS, teacher_logits=LOGITS)
    assert_allclose(ours(kind="jsd", beta=0.5), swapped(kind="jsd", beta=0.5), rtol=1e-5)
    assert_allclose(ours(kind="jsd", beta=0.3), swapped(kind="jsd", beta=0.7), rtol=1e-5)
    assert_allclose(ours(kind="reverse_kl"), swapped(kind="forward_kl"), rtol=1e-5)
    assert np.max(ours(kind="jsd", beta=0.5)) <= math.log(2.0)
    assert_allclose(ours(kind="jsd", beta=1e-3) / 1e-3, ours(kind="forward_kl"), rtol=0.05)
    assert_allclose(ours(kind="jsd", beta=1.0 - 1e-3) / 1e-3, ours(kind="reverse_kl"), rtol=0.05)


def test_what_is_no_divergence():
    with pytest.raises(ValueError, match="kind must be one of"):
        losses.divergence(LOGITS, teacher_logits=THEIRS, kind="kl")
    with pytest.raises(AssertionError):
        losses.divergence(LOGITS, teacher_logits=THEIRS[..., :5])


def test_a_policy_without_a_teacher_is_refused():
    alone = ops.policy_fn(lambda params, tokens, mask, key: params["logits"][tokens])
    loss = partial(distill.loss, policy_fn=alone, config=distill.Config())
    with pytest.raises(ValueError, match=r"a policy_fn with a teacher.*models\.Teacher"):
        jax.eval_shape(loss, policy_params(0), rollout(0, [4, 1]), None)


def two_tokens():
    """A response of two tokens, and a policy of four equal logits with a teacher at a distance."""
    at = np.array([[0, 0, 1, 1]])
    log_prob = np.full((1, 4), -math.log(4.0), np.float32)
    output = PolicyOutput(log_prob, log_prob, None, log_prob - 1.0, np.full((1, 4), 3.0))
    batch = Rollout(np.zeros((1, 4), int), at, at, log_prob, advantages=0 * log_prob)
    return batch, lambda *_: jax.tree.map(jnp.asarray, output)


def two_token_loss(config):
    batch, policy_fn = two_tokens()
    return jax.jit(partial(distill.loss, policy_fn=policy_fn, config=config))(None, batch, None)


@pytest.mark.parametrize("coef", [0.0, 2.5])
def test_the_coefficient_weighs_the_divergence(coef):
    loss, metrics = two_token_loss(distill.Config(teacher_coef=coef))
    assert_allclose(loss.value, coef * 3.0, rtol=1e-6)
    assert_allclose(metrics["distill/divergence"].value, 3.0, rtol=1e-6)


def test_a_sampled_token_that_the_teacher_finds_unlikely_is_a_loss():
    """Its advantage is log q - log p = -1, and so is the score of a run without a reward."""
    loss, _ = two_token_loss(distill.Config(divergence="sampled"))
    assert_allclose(loss.value, 1.0, rtol=1e-6)
    batch, _ = two_tokens()
    told = batch.replace(teacher_log_probs=batch.log_probs - 1.0)
    score = log_ratio(None, RLStage(max_new_tokens=2), None)
    assert_allclose(score(told)[0], [-2.0], rtol=1e-6)


TOKENS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (3, 9))
MASK = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9, [0, 1, 1, 1, 1, 1, 0, 0, 0]])


def with_teacher(prompt_length=0, **changes):
    """A policy of two layers and a teacher of one, with their parameters."""
    model, params = tiny()
    own, theirs = tiny(replace(CONFIG, num_layers=1, **changes))
    measure = distill.Config(divergence="jsd", beta=0.3).measure
    policy = models.policy_fn(model, 0.7, prompt_length, teacher=models.Teacher(own, measure))
    return model, policy, params, own, jax.tree.map(lambda x: 3.0 * np.asarray(x), theirs)


def value_and_gradient(function, params):
    """The outputs, and the gradient of a sum of them with random weights."""
    weights = np.random.default_rng(2).standard_normal((2, 3, 9)).astype(np.float32)

    def loss(params):
        outputs = function(params)
        return sum(jnp.sum(w * x) for w, x in zip(weights, outputs, strict=True)), outputs

    (_, outputs), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return outputs, jax.tree.leaves(gradient)


@pytest.mark.slow
@pytest.mark.parametrize(("columns_per_chunk", "prompt_length"), [(None, 0), (2, 4)])
def test_chunks_equal_full_logits(monkeypatch, columns_per_chunk, prompt_length):
    """Values and gradient; the parameters of the teacher are an argument."""
    if columns_per_chunk is not None:
        monkeypatch.setattr(heads, "_logits_at_once", lambda size: columns_per_chunk * size)
    model, policy, params, own, theirs = with_teacher(prompt_length)
    first = max(prompt_length, 1)

    def chunked(params):
        output = policy(params, TOKENS, MASK, None, theirs)
        return output.teacher_log_probs, output.divergence

    def full(params):
        logits = model.apply(params, TOKENS, MASK) / 0.7
        teacher = own.apply(theirs, TOKENS, MASK) / 0.7
        apart = losses.divergence(logits, teacher_logits=teacher, kind="jsd", beta=0.3)[:, :-1]
        both = ops.token_log_probs(teacher, TOKENS), jnp.pad(apart, ((0, 0), (1, 0)))
        return tuple(x.at[:, :first].set(0.0) for x in both)

    outputs, gradient = value_and_gradient(chunked, params)
    expected, expected_gradient = value_and_gradient(full, params)
    for got, want in zip((*outputs, *gradient), (*expected, *expected_gradient), strict=True):
        assert_allclose(got, want, atol=1e-5)
    assert min(np.abs(x).max() for x in outputs) > 0.01
    assert max(np.abs(x).max() for x in gradient) > 1e-3


def test_without_its_parameters_the_teacher_is_not_called():
    _, policy, params, *_ = with_teacher()
    output = jax.eval_shape(policy, params, TOKENS, MASK, None)
    assert output.divergence is None
    assert output.teacher_log_probs is None


def test_of_a_padded_vocabulary_the_shared_tokens_are_compared():
    model, policy, params, own, theirs = with_teacher(vocab_size=CONFIG.vocab_size + 3)

    @jax.jit
    def both(params, theirs):
        output = policy(params, TOKENS, MASK, None, theirs)
        teacher = own.apply(theirs, TOKENS, MASK)[..., : CONFIG.vocab_size] / 0.7
        student = model.apply(params, TOKENS, MASK) / 0.7
        apart = losses.divergence(student, teacher_logits=teacher, kind="jsd", beta=0.3)
        found = output.divergence[:, 1:], output.teacher_log_probs
        return found, (apart[:, :-1], ops.token_log_probs(teacher, TOKENS))

    for found, expected in zip(*both(params, theirs), strict=True):
        assert_allclose(found, expected, atol=1e-5)


def test_no_array_of_all_logits_is_built():
    """Four chunks of 32 columns, forwards and backwards."""
    model = models.build(replace(CONFIG, vocab_size=2**15, max_length=128))
    policy = models.policy_fn(model, teacher=models.Teacher(model, distill.Config().measure))

    def loss(params, teacher, tokens):
        return jnp.sum(policy(params, tokens, tokens, None, teacher).divergence)

    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    program = jax.make_jaxpr(jax.grad(loss))(params, params, tokens)
    assert max(array_sizes(program.jaxpr)) == 2 * 32 * 2**15
