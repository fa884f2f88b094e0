"""Statistics of the next-token distributions, where a loss asks a policy for them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import CONFIG, slow, some_params
from jax.tree_util import Partial
from numpy.testing import assert_allclose
from tabular import assert_close

from rlhf_jax import Demonstrations, models, ops, policies
from rlhf_jax.models import heads, lora

RANDOM = np.random.default_rng(0)
# Two prompts of three columns, each with two answers of five.
TOKENS = RANDOM.integers(0, CONFIG.vocab_size, (4, 8))
TOKENS[1::2, :3] = TOKENS[::2, :3]
IDS = RANDOM.integers(0, CONFIG.vocab_size, (4, 8, 2))
READ = np.array([[0] * 3 + [1] * 5, [0] * 3 + [1, 0, 1, 0, 0], [0] * 8, [0] * 3 + [1, 1, 0, 0, 0]])
ROWS = Demonstrations(TOKENS, np.ones((4, 8), int), READ)
WEIGHTS = RANDOM.standard_normal((4, 8, 2)).astype(np.float32)


def statistic(logits, ids, scale):
    """The log-probs of two ids, times a number; and the sum of squares of all probabilities."""
    log_probs = jax.nn.log_softmax(logits)
    taken = jnp.take_along_axis(log_probs, ids, axis=-1)
    return {"taken": scale[..., None] * taken, "squares": jnp.sum(jnp.exp(2 * log_probs), axis=-1)}


def of_all_logits(model, params, temperature, first):
    """The same of the whole [B, T, V] array, by the logits at t - 1; 0 before ``first``."""
    logits = model.apply(params, TOKENS, ROWS.attention_mask)[:, first - 1 : -1] / temperature
    made = statistic(logits, IDS[:, first:], WEIGHTS[:, first:, 0])
    return {name: ops.from_column(x, first) for name, x in made.items()}


def value_and_gradient(made, params):
    """Of a weighted sum over the columns that are read, with what is summed."""

    def total(params):
        found = made(params)
        columns = [READ[..., None] * found["taken"], READ[..., None] * found["squares"][..., None]]
        return sum(jnp.sum(WEIGHTS * x) for x in columns), columns

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)


def small():
    config = replace(CONFIG, num_layers=1)
    return models.build(config), some_params(config)


POLICIES = {
    "whole": lambda model, params: models.policy_fn(model, 0.7, 3),
    "in chunks": lambda model, params: models.policy_fn(model, 0.7, 3),
    "shared prompts": lambda model, params: models.policy_fn(model, 0.7, 3, group_size=2),
    "rows apart": lambda model, params: ops.by_rows(models.policy_fn(model, 0.7, 3), 2),
    "jitted": lambda model, params: jax.jit(models.policy_fn(model, 0.7, 3)),
    "of logits": lambda model, params: ops.policy_fn(lambda p, t, m, _: model.apply(p, t, m), 0.7),
}


FAST = ("in chunks", "shared prompts", "of logits")


@pytest.mark.parametrize("kind", [x if x in FAST else slow(x) for x in POLICIES])
def test_a_statistic_is_that_of_all_logits_and_so_is_its_gradient(kind, monkeypatch):
    if kind == "in chunks":
        monkeypatch.setattr(heads, "_logits_at_once", lambda size: 2 * size)
    model, params = small()
    policy = POLICIES[kind](model, params)
    asked = {"statistic": statistic, "arrays": (IDS, WEIGHTS[..., 0])}
    made = lambda p: ops.evaluate(policy, p, ROWS, **asked).statistic  # noqa: E731
    (value, found), gradient = value_and_gradient(made, params)
    expected = partial(of_all_logits, model, temperature=0.7, first=3)
    (wanted, columns), slope = value_and_gradient(expected, params)
    assert_close(found, columns, atol=1e-6, rtol=1e-5)
    assert_allclose(value, wanted, rtol=1e-5)
    assert max(np.max(np.abs(x)) for x in jax.tree.leaves(slope)) > 0.1
    assert_close(gradient, slope, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["jitted", "of logits"])
def test_a_statistic_is_of_the_whole_vocabulary_whatever_the_support(kind):
    """The log-probs are those among the ids of a sampler, the statistic is not."""
    model, params = small()
    support = np.stack([TOKENS, (TOKENS + 1) % CONFIG.vocab_size], axis=-1)
    asked = {"statistic": statistic, "arrays": (IDS, WEIGHTS[..., 0]), "support": support}
    policy = partial(POLICIES[kind](model, params), **asked | {"statistic": Partial(statistic)})
    first = 3 if kind == "jitted" else 1

    @jax.jit
    def both(params):
        logits = model.apply(params, TOKENS, ROWS.attention_mask)
        output = policy(params, TOKENS, ROWS.attention_mask, None)
        expected = of_all_logits(model, params, 0.7, first)
        return output, expected, ops.token_log_probs(logits, TOKENS, 0.7)

    output, expected, of_all = both(params)
    assert_close(output.statistic, expected, atol=1e-6, rtol=1e-5)
    assert np.max(np.abs(output.log_probs - of_all)[:, 3:]) > 0.5


def test_adapters_and_checkpointed_losses_get_one_too():
    model, params = small()
    adapters = lora.init(jax.random.key(1), params, 1)
    moved = jax.tree.map(lambda x: x + 0.1, adapters)
    bound = lora.bind(models.policy_fn(model, 0.7, 3), params)
    asked = {"statistic": statistic, "arrays": (IDS, WEIGHTS[..., 0])}

    @jax.checkpoint
    def made(adapters):
        return ops.evaluate(bound, adapters, ROWS, **asked).statistic

    whole = lambda adapters: of_all_logits(model, lora.attach(params, adapters), 0.7, 3)  # noqa: E731
    (_, found), gradient = value_and_gradient(made, moved)
    (_, expected), slope = value_and_gradient(whole, moved)
    assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert_close(gradient, slope, atol=1e-5, rtol=1e-5)


def test_a_function_that_cannot_be_asked_says_so():
    plain = lambda params, tokens, mask, key: None  # noqa: E731
    model, params = small()
    handed = policies.wrap(lambda fn, *rows, **more: fn(*rows, **more), models.policy_fn(model))
    squares = lambda logits: jnp.sum(jax.nn.softmax(logits) ** 2, axis=-1)  # noqa: E731
    with pytest.raises(ValueError, match="my_fn gives no statistic of its logits"):
        ops.evaluate(plain, params, ROWS, name="my_fn", statistic=squares)
    shapes = jax.eval_shape(lambda: ops.evaluate(handed, params, ROWS, statistic=squares))
    assert shapes.statistic.shape == (4, 8)
    of_rows = lambda logits: jnp.sum(logits, axis=(1, 2))[:, None]  # noqa: E731
    with pytest.raises(AssertionError):
        jax.eval_shape(lambda: ops.evaluate(handed, params, ROWS, statistic=of_rows))
