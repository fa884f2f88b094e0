"""A policy is a value: what it carries, what of it reaches a function around it, and what is not
checked of a plain function.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import initial_params
from jax.tree_util import Partial
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import errors, grpo, models, ops, policies
from rlhf_jax.policies import Policy
from rlhf_jax.types import Demonstrations, PolicyOutput, Rollout

SIZES = {"vocab_size": 13, "max_length": 8, "hidden_size": 8, "num_layers": 1, "num_heads": 1}
MODEL = models.build(models.GPT2Config(**SIZES))
POLICY = models.policy_fn(MODEL, 0.5, prompt_length=2)
TOKENS = np.arange(12).reshape(2, 6)
RESPONSE = np.array([[0, 0, 1, 1, 1, 1]] * 2)
INPUTS = (TOKENS, np.ones_like(TOKENS), None)
ROWS = Demonstrations(TOKENS, np.ones_like(TOKENS), RESPONSE)


def drawn(**settings):
    zeros = np.zeros(TOKENS.shape, np.float32)
    batch = Rollout(TOKENS, np.ones_like(TOKENS), RESPONSE, zeros, advantages=zeros)
    return batch.replace(**settings)


def test_what_a_policy_carries_is_its_leaves():
    params = initial_params(MODEL)
    bound = models.lora.bind(ops.by_rows(POLICY, 1), params)
    assert isinstance(bound, Policy)
    for own, leaf in zip(jax.tree.leaves(bound), jax.tree.leaves(params), strict=True):
        assert own is leaf
    assert jax.tree.leaves(POLICY) == []
    assert len({POLICY, POLICY.bind(), Partial(POLICY).func}) == 1
    with pytest.raises(TypeError, match="unhashable"):
        hash(bound)


def test_a_policy_travels_through_jit_with_its_settings():
    """Its arrays are arguments of the program, not constants."""
    params = initial_params(MODEL)
    bound = POLICY.bind(params)

    @jax.jit
    def evaluated(policy, batch):
        assert policy.temperature == 0.5
        return policy.evaluate(batch).log_probs

    constants = jax.make_jaxpr(evaluated)(bound, ROWS).consts
    assert max((np.size(x) for x in constants), default=0) < 13 * 8  # an embedding
    assert_array_equal(
        evaluated(bound, ROWS), jax.jit(ops.evaluate)(POLICY, params, ROWS).log_probs
    )
    in_a_partial = policies.as_policy(Partial(POLICY, params))
    assert_array_equal(evaluated(in_a_partial, ROWS), evaluated(bound, ROWS))
    again = evaluated(models.policy_fn(MODEL, 0.5).bind(params), ROWS)  # a prompt of one column
    assert np.all(np.asarray(again)[:, 1] < 0)


def twice(policy, scale, *arguments, **more):
    output = policy(*arguments, **more)
    return output._replace(log_probs=scale * output.log_probs)


WITH_SETTINGS = {
    "itself": POLICY,
    "bound": POLICY.bind(),
    "jitted": jax.jit(POLICY),
    "in a partial": partial(POLICY, teacher_params=None),
    "in partials": partial(Partial(POLICY), teacher_params=None),
    "jitted in a partial": Partial(jax.jit(POLICY)),
    "by rows": ops.by_rows(Partial(POLICY), 1),
    "wrapped": policies.wrap(twice, POLICY, 2.0),
    "wrapped in a partial": policies.wrap(twice, partial(POLICY, teacher_params=None), 2.0),
}


@pytest.mark.parametrize("fn", WITH_SETTINGS.values(), ids=WITH_SETTINGS)
def test_settings_reach_what_is_made_of_a_policy(fn):
    policy = policies.find_policy(fn)
    assert (policy.temperature, policy.prompt_length) == (0.5, 2)
    assert policy.takes_response_mask
    params = initial_params(MODEL)
    scale = 2.0 if policy.fn is twice else 1.0
    expected = scale * jax.jit(POLICY)(params, *INPUTS).log_probs
    found = jax.jit(lambda params: policy(params, *INPUTS).log_probs)(params)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "fn",
    [lambda *arguments: POLICY(*arguments), partial(twice, POLICY, 2.0), Partial(twice, POLICY)],
    ids=["a lambda", "a partial of another function", "a Partial of another function"],
)
def test_a_plain_function_is_used_unchecked(fn):
    """Another temperature, longer prompts: nothing is known of it."""
    assert policies.find_policy(fn) is None
    policies.as_policy(fn).check(drawn(temperature=2.0, prompt_length=1))
    with pytest.raises(ValueError, match=r"policy_fn has temperature 0\.5"):
        POLICY.check(drawn(temperature=2.0))
    POLICY.check(drawn(temperature=0.0))  # greedy: no temperature would have drawn these


def test_a_loss_names_the_function_that_does_not_fit():
    params = initial_params(MODEL)
    longer = models.policy_fn(MODEL, prompt_length=4)
    for batch, where in (
        (drawn(prompt_length=2), ", which follow prompts of 2 slots"),
        (drawn(), ""),
    ):
        loss = partial(grpo.loss, config=grpo.Config(), policy_fn=longer)
        with pytest.raises(
            ValueError, match=f"^policy_fn has prompt_length 4, .*tokens{where}: give"
        ):
            loss(params, batch, None)


def test_a_policy_must_return_the_shape_of_the_tokens():
    cut = policies.wrap(
        lambda fn, *x, **more: jax.tree.map(lambda y: y[1:], fn(*x, **more)), POLICY
    )
    with pytest.raises(AssertionError):
        ops.evaluate(cut, initial_params(MODEL), ROWS)


def test_a_partial_keeps_its_keywords_and_its_arguments():
    policy = Policy(lambda *arguments, factor=1: (arguments, factor), temperature=2.0)
    found = policies.find_policy(partial(Partial(policy, 1), factor=3))
    assert found.temperature == 2.0
    assert found(2) == ((1, 2), 3)
    assert policies.find_policy(partial(policy.bind(1), 2))(3) == ((1, 2, 3), 1)


@pytest.mark.parametrize("jits", [False, True])
def test_a_policy_reads_from_the_batch_where_its_responses_begin(jits):
    """Of a rollout that was cut to fewer response slots too, and never before its own
    ``prompt_length``.
    """
    config = models.GPT2Config(7, max_length=8, num_layers=1, num_heads=1, hidden_size=4)
    model = models.build(config)
    params = model.init(jax.random.key(0))
    tokens = jnp.arange(12).reshape(2, 6) % 7
    mask = jnp.ones_like(tokens)
    response = mask.at[:, :3].set(0)
    for width in (6, 5, 3):
        rows = [x[:, :width] for x in (tokens, mask, response, jnp.zeros(tokens.shape))]
        for own, begins in ((0, 3), (0, None), (2, 3), (2, None)):
            policy = models.policy_fn(model, prompt_length=own)
            fn = jax.jit(policy) if jits else policy
            found = ops.evaluate(fn, params, Rollout(*rows, prompt_length=begins))
            first = begins or own
            expected = models.policy_fn(model, prompt_length=first)(params, *rows[:2], None)
            jax.tree.map(partial(assert_allclose, atol=1e-6), found, expected)
            assert_array_equal(found.log_probs[:, : max(first, 1)], 0)
            assert np.all(found.log_probs[:, max(first, 1) :] != 0)


def test_a_plain_function_is_warned_of_once_where_samples_know_their_temperature(caplog):
    errors.warn_once.cache_clear()
    ones = jnp.ones((1, 2), jnp.int32)
    texts = Demonstrations(ones, ones, ones)
    samples = Rollout(ones, ones, ones, 1.0 * ones, temperature=0.5)
    policy = Policy(lambda params, tokens, *more: PolicyOutput(tokens * 1.0, tokens * 1.0))
    for fn, batch in ((policy, samples), (policy.fn, texts), (policy.fn, drawn())):
        policies.evaluate(fn, {}, batch)
    assert not caplog.text
    for _ in range(2):
        policies.evaluate(policy.fn, {}, samples)
    [said] = caplog.records
    assert said.levelname == "WARNING"
    assert re.match(r"policy_fn is a plain function: .*temperature .* 0\.5", said.message)


def test_what_is_wrapped_keeps_its_arrays_as_leaves():
    """Also a Partial that is no policy, such as the score of a reward model."""
    inner = Partial(lambda weight, tokens: weight * tokens, jnp.float32(2.0))
    outer = policies.wrap(lambda fn, tokens: fn(tokens) + 1, inner)
    assert [float(leaf) for leaf in jax.tree.leaves(outer)] == [2.0]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, outer)
    assert float(doubled(jnp.float32(3.0))) == 13.0
