"""Value and score heads, and the chunked log-probabilities against ops on full logits."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models, ops
from rlhf_jax.models import heads

CONFIG = models.GPT2Config(vocab_size=11, max_length=12, hidden_size=8, num_layers=1, num_heads=2)
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 9))
MASK = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9, [0, 1, 1, 1, 1, 1, 0, 0, 0]])


@functools.cache
def tiny():
    """A model with compiled functions: run operation by operation, it costs far more compilations."""
    model = models.build(CONFIG)
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(0)))
    noise = np.random.default_rng(1)
    params = tree.unflatten([x + 0.3 * noise.standard_normal(x.shape).astype(np.float32) for x in leaves])
    compiled = {name: jax.jit(getattr(model, name)) for name in ("apply", "hidden", "unembed")}
    return model._replace(**compiled), params


def with_value(params, scale=1.0):
    params = models.add_head(jax.random.key(0), params, "value")
    kernel = np.linspace(-scale, scale, 8, dtype=np.float32)
    return {**params, "value": {"kernel": jnp.asarray(kernel), "bias": jnp.float32(0.5)}}


@pytest.mark.parametrize(("columns_per_chunk", "prompt_length"), [(None, 0), (3, 0), (None, 4), (2, 4), (1, 1)])
def test_policy_fn_equals_ops_on_full_logits(monkeypatch, columns_per_chunk, prompt_length):
    if columns_per_chunk is not None:
        monkeypatch.setattr(heads, "_CHUNK_LOGITS", columns_per_chunk * CONFIG.vocab_size)
    model, params = tiny()
    temperature = 0.7
    assert columns_per_chunk is None or (9 - max(prompt_length, 1)) > columns_per_chunk
    policy = models.policy_fn(model, temperature, prompt_length)
    scored = jnp.arange(9) >= max(prompt_length, 1)
    weights = np.random.default_rng(2).standard_normal((2, 3, 9)).astype(np.float32)

    def chunked(params):
        out = policy(params, TOKENS, MASK, None)
        return out.log_probs, out.entropy

    def full(params):
        logits = model.apply(params, TOKENS, MASK)
        both = ops.token_log_probs(logits, TOKENS, temperature), ops.entropy(logits, temperature)
        return tuple(jnp.where(scored[None], x, 0.0) for x in both)

    def value_and_gradient(function):
        def loss(params):
            outputs = function(params)
            return sum(jnp.sum(w * x) for w, x in zip(weights, outputs, strict=True)), outputs

        (_, outputs), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return outputs, gradient

    outputs, gradient = value_and_gradient(chunked)
    expected, expected_gradient = value_and_gradient(full)
    for got, want in zip(outputs, expected, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert np.all(np.asarray(got)[:, : max(prompt_length, 1)] == 0)
        assert np.max(np.abs(got)) > 1.0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), gradient, expected_gradient)


def array_sizes(jaxpr):
    """Sizes of all arrays computed, inner programs included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.size
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from array_sizes(inner)


def test_no_array_of_all_logits_is_built():
    vocab, length = 2**15, 128  # four chunks of 32 columns
    model = models.build(dataclasses.replace(CONFIG, vocab_size=vocab, max_length=length))
    policy = models.policy_fn(model)

    def loss(params, tokens, mask):
        out = policy(params, tokens, mask, None)
        return jnp.sum(out.log_probs + out.entropy)

    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    sizes = list(array_sizes(jax.make_jaxpr(jax.grad(loss))(params, tokens, tokens).jaxpr))
    assert max(sizes) == 2 * 32 * vocab


def test_prompt_columns_are_not_computed():
    model, params = tiny()
    seen = []

    def unembed(params, hidden):
        seen.append(hidden.shape)
        return model.unembed(params, hidden)

    models.policy_fn(model._replace(unembed=unembed), prompt_length=6)(params, TOKENS, MASK, None)
    assert seen == [(3, 3, 8)]


def test_values_are_the_head_one_column_earlier():
    model, params = tiny()
    params = with_value(params)
    hidden = np.asarray(model.hidden(params, TOKENS, MASK))
    out = models.policy_fn(model, prompt_length=4)(params, TOKENS, MASK, None)
    expected = np.zeros((3, 9))
    for b, t in np.ndindex(3, 9):
        if t >= 4:
            expected[b, t] = hidden[b, t - 1] @ np.linspace(-1, 1, 8) + 0.5
    np.testing.assert_allclose(out.values, expected, atol=1e-5)
    assert models.policy_fn(model)(params, TOKENS, MASK, None).values.shape == (3, 9)


def test_values_and_scores_need_a_head():
    model, params = tiny()
    assert models.policy_fn(model)(params, TOKENS, MASK, None).values is None
    fresh = models.add_head(jax.random.key(0), params, "value")
    assert np.all(models.policy_fn(model)(fresh, TOKENS, MASK, None).values == 0)
    with pytest.raises(ValueError, match="the model has no score head"):
        models.score_fn(model)(params, TOKENS, MASK, None)
    both = {"policy": params, "value": params}
    with pytest.raises(ValueError, match="the model has no value head"):
        models.policy_fn(model, value_model=model)(both, TOKENS, MASK, None)


def test_whole_value_model():
    model, params = tiny()
    value_model = models.build(dataclasses.replace(CONFIG, num_layers=2))
    value_params = with_value(value_model.init(jax.random.key(5)), scale=2.0)
    value_model = value_model._replace(hidden=jax.jit(value_model.hidden))
    joint = models.policy_fn(model, 0.7, 3, value_model)({"policy": params, "value": value_params}, TOKENS, MASK, None)
    alone = models.policy_fn(model, 0.7, 3)(params, TOKENS, MASK, None)
    values = models.policy_fn(value_model, 0.7, 3)(value_params, TOKENS, MASK, None).values
    np.testing.assert_array_equal(joint.log_probs, alone.log_probs)
    np.testing.assert_array_equal(joint.values, values)
    assert np.max(np.abs(values)) > 0.1


def test_dropout_needs_a_key():
    model, params = models.build(dataclasses.replace(CONFIG, residual_dropout=0.5)), tiny()[1]
    policy = jax.jit(models.policy_fn(model))
    still, first, again, other = (
        policy(params, TOKENS, MASK, key).log_probs for key in (None, *map(jax.random.key, (0, 0, 1)))
    )
    np.testing.assert_allclose(still, models.policy_fn(tiny()[0])(params, TOKENS, MASK, None).log_probs, atol=1e-5)
    np.testing.assert_array_equal(first, again)
    assert min(np.max(np.abs(first - still)), np.max(np.abs(first - other))) > 1e-2


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        models.policy_fn(tiny()[0], temperature)


def test_prompt_longer_than_the_row_is_refused():
    model, params = tiny()
    with pytest.raises(ValueError, match="prompt_length 10 is longer than the 9 columns"):
        models.policy_fn(model, prompt_length=10)(params, TOKENS, MASK, None)
    everything_is_prompt = models.policy_fn(model, prompt_length=9)(params, TOKENS, MASK, None)
    np.testing.assert_array_equal(everything_is_prompt.log_probs, np.zeros((3, 9)))


def test_masked_columns_stay_finite_for_pad_ids_outside_the_vocabulary():
    model, params = tiny()
    tokens = np.where(MASK, TOKENS, 50256)
    out = models.policy_fn(model)(params, tokens, MASK, None)
    assert np.all(np.isfinite(out.log_probs))
    real = MASK[:, 1:] == 1
    expected = models.policy_fn(model)(params, TOKENS, MASK, None)
    np.testing.assert_array_equal(out.log_probs[:, 1:][real], expected.log_probs[:, 1:][real])


def test_scores_by_hand():
    model, params = tiny()
    kernel = np.linspace(-1, 1, 8, dtype=np.float32)
    head = {"kernel": kernel, "bias": 0.25, "gain": 3.0, "shift": -2.0}
    params = {**params, "score": {name: jnp.float32(x) for name, x in head.items()}}
    mask = np.concatenate([MASK, np.zeros((1, 9), int)])
    tokens = np.concatenate([TOKENS, TOKENS[:1]])
    scores = models.score_fn(model)(params, tokens, mask, None)
    hidden = np.asarray(model.hidden(params, tokens, mask))
    expected = [3.0 * (hidden[row, last] @ kernel + 0.25) - 2.0 for row, last in ((0, 8), (1, 8), (2, 5))]
    np.testing.assert_allclose(scores, [*expected, 0.0], atol=1e-5)


def test_score_gradient_spares_gain_and_shift_and_empty_rows():
    model, params = tiny()
    params = models.add_head(jax.random.key(0), params, "score")
    params["score"]["gain"] = jnp.float32(2.0)

    def loss(params, mask):
        return jnp.sum(models.score_fn(model)(params, TOKENS, mask, None) ** 2)

    gradient = jax.jit(jax.grad(loss))(params, MASK)
    assert gradient["score"]["gain"] == gradient["score"]["shift"] == 0
    assert np.all(np.abs(gradient["score"]["kernel"]) > 1e-4)
    assert abs(gradient["score"]["bias"]) > 1e-4
    empty = jax.jit(jax.grad(loss))(params, np.zeros_like(MASK))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(empty))


def test_add_head_initial_values():
    wide = models.build(dataclasses.replace(CONFIG, hidden_size=2048, num_heads=1, intermediate_size=1))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(wide.init, jax.random.key(0)))
    before = dict(params)
    head = models.add_head(jax.random.key(0), params, "score")["score"]
    assert params == before
    np.testing.assert_allclose(np.std(head["kernel"]), 2049**-0.5, rtol=0.05)
    assert (head["bias"], head["gain"], head["shift"]) == (0, 1, 0)
    other = models.add_head(jax.random.key(1), params, "score")["score"]
    assert np.max(np.abs(head["kernel"] - other["kernel"])) > 1e-3
    value = models.add_head(jax.random.key(0), params, "value")["value"]
    assert value["kernel"].shape == (2048,)
    assert np.all(value["kernel"] == 0)
    assert value["bias"] == 0
    with pytest.raises(ValueError, match="unknown head 'reward'; choose from value, score"):
        models.add_head(jax.random.key(0), params, "reward")
