"""Value and score heads, and the chunked log-probabilities against ops on full logits."""

import functools
from dataclasses import replace
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import CONFIG, slow
from builders import tiny as built
from jax.tree_util import Partial
from numpy.testing import assert_allclose, assert_array_equal
from programs import array_sizes
from tabular import assert_close

from rlhf_jax import models, ops, sampling, sharding, types
from rlhf_jax.algorithms import dpo, sft
from rlhf_jax.models import heads, lora

KEY = jax.random.key(0)

TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 9))
MASK = np.ones((3, 9), int)
MASK[0, :2] = 0
MASK[2, [0, 6, 7, 8]] = 0


tiny = partial(built, replace(CONFIG, num_layers=1))


@functools.cache
def of_all_logits(temperature=1.0):
    """Log-probabilities and entropies of the tokens, in NumPy; 0 in the first column."""
    model, params = tiny()
    logits = np.asarray(model.apply(params, TOKENS, MASK)) / temperature
    every = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    chosen = np.take_along_axis(every[:, :-1], TOKENS[:, 1:, None], axis=-1)[..., 0]
    entropies = -(np.exp(every) * every).sum(axis=-1)[:, :-1]
    return tuple(np.pad(x, ((0, 0), (1, 0))) for x in (chosen, entropies))


def with_value(params, scale=1.0):
    return {**params, "value": {"kernel": jnp.linspace(-scale, scale, 8), "bias": jnp.float32(0.5)}}


@pytest.mark.parametrize(
    ("columns_per_chunk", "prompt_length"), [slow(None, 0), (2, 4), slow(1, 1)]
)
def test_policy_fn_equals_ops_on_full_logits(monkeypatch, columns_per_chunk, prompt_length):
    if columns_per_chunk is not None:
        monkeypatch.setattr(heads, "_logits_at_once", lambda size: columns_per_chunk * size)
    model, params = tiny()
    temperature = 0.7
    first = max(prompt_length, 1)
    policy = models.policy_fn(model, temperature, prompt_length)
    weights = np.random.default_rng(2).standard_normal((2, 3, 9)).astype(np.float32)

    def chunked(params):
        return policy(params, TOKENS, MASK, None)[:2]

    def full(params):
        logits = model.apply(params, TOKENS, MASK)
        both = ops.token_log_probs(logits, TOKENS, temperature), ops.entropy(logits, temperature)
        return tuple(x.at[:, :first].set(0.0) for x in both)

    def value_and_gradient(function):
        def loss(params):
            outputs = function(params)
            return sum(jnp.sum(w * x) for w, x in zip(weights, outputs, strict=True)), outputs

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (_, outputs), gradient = value_and_gradient(chunked)
    (_, expected), expected_gradient = value_and_gradient(full)
    assert_close(outputs, expected, atol=1e-5, rtol=1e-7)
    assert min(np.max(np.abs(output)) for output in outputs) > 1.0
    assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", heads.HEADS)
def test_adapters_get_a_head_of_the_width_that_is_given(kind):
    model, params = tiny()
    adapters = lora.init(jax.random.key(0), params, 2)
    for given in (adapters, adapters["h_0"], {}):
        with pytest.raises(ValueError, match=r"adapters.*model\.config\.hidden_size"):
            models.add_head(jax.random.key(0), given, kind)
    trained = models.add_head(jax.random.key(0), adapters, kind, model.config.hidden_size)
    whole = models.add_head(jax.random.key(0), params, kind)
    jax.tree.map(assert_array_equal, trained[kind], whole[kind])


def test_a_temperature_may_be_traced():
    model, params = tiny()

    def log_probs(temperature):
        policy = models.policy_fn(model, temperature)
        return policy(params, TOKENS, MASK, None).log_probs

    found = jax.jit(log_probs)
    for temperature in (0.5, 2.0):
        expected, _ = of_all_logits(temperature)
        assert_allclose(found(temperature), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"temperature is traced.*models\.policy_fn"):
        jax.eval_shape(
            lambda t: sampling.SamplingConfig(max_new_tokens=1, temperature=t, eos_id=1, pad_id=0),
            1.0,
        )


@pytest.mark.parametrize(("platform", "columns"), [("cpu", 32), ("gpu", 256)])
def test_no_array_of_all_logits_is_built(platform, columns, monkeypatch):
    monkeypatch.setattr(heads.fused, "platform", lambda: platform)
    vocab = 2**15
    length = 4 * columns
    model = models.build(replace(CONFIG, vocab_size=vocab, max_length=length, num_layers=1))
    policy = models.policy_fn(model)

    def loss(params, tokens, mask):
        out = policy(params, tokens, mask, None)
        return jnp.sum(out.log_probs + out.entropy)

    params = jax.eval_shape(model.init, KEY)
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    program = jax.make_jaxpr(jax.grad(loss))(params, tokens, tokens)
    assert max(array_sizes(program.jaxpr)) == 2 * columns * vocab


def test_prompt_columns_are_not_computed():
    model, params = tiny()
    seen = []

    def unembed(params, hidden):
        seen.append(hidden.shape)
        return model.unembed(params, hidden)

    policy = models.policy_fn(model._replace(unembed=unembed), prompt_length=6)
    jax.eval_shape(policy, params, TOKENS, MASK, None)
    assert seen == [(3, 3, 8)]


# Responses of 0, 3 and 2 columns in 8 columns after the first.
READ = np.array([[0] * 9, [0, 0, 0, 0, 1, 1, 0, 0, 1], [0, 0, 1, 1, 0, 0, 0, 0, 0]])


def embedded(params, tokens, mask, key, columns):
    """The hidden states of a network without layers."""
    return params["wte"]["embedding"][tokens][:, columns]


def chunks_of(monkeypatch, columns, model):
    """The model with chunks of so many columns, and the list of chunks whose logits are computed
    when its functions run.
    """
    monkeypatch.setattr(heads, "_logits_at_once", lambda size: columns * size)
    computed = []

    def unembed(params, hidden):
        jax.debug.callback(lambda: computed.append(hidden.shape))
        return model.unembed(params, hidden)

    return model._replace(unembed=unembed), computed


def test_logits_are_computed_for_the_columns_of_responses(monkeypatch):
    model, params = tiny()
    model, computed = chunks_of(monkeypatch, 2, model._replace(hidden=embedded))
    policy = models.policy_fn(model)

    def loss(params, **read):
        output = policy(params, TOKENS, MASK, None, **read)
        return jnp.sum(READ * (output.log_probs + 0.3 * output.entropy)), output.log_probs

    read = partial(loss, response_mask=READ)
    jax.jit(read)(params)
    jax.effects_barrier()
    assert len(computed) == 2  # the responses' columns fit into two of four chunks
    (_, whole), of_whole = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    (_, some), of_some = jax.jit(jax.value_and_grad(read, has_aux=True))(params)
    assert_allclose(READ * some, READ * whole, rtol=1e-6)
    assert_close(of_some, of_whole, atol=1e-6, rtol=1e-5)


def test_losses_say_which_columns_they_read(monkeypatch):
    model, params = tiny()
    model, computed = chunks_of(monkeypatch, 2, model)
    reference = lora.bind(ops.by_rows(models.policy_fn(model), None), params)
    adapters = lora.init(KEY, params, rank=1)
    comparisons = types.Comparisons(*(x[None, 1:] for x in (TOKENS, MASK, READ)))
    made = jax.jit(dpo.with_reference)(comparisons, reference.bind(adapters))
    jax.effects_barrier()
    assert len(computed) == 2
    full, _ = of_all_logits()
    assert_allclose(made.ref_log_probs[0], np.sum(READ * full, axis=1)[1:], rtol=1e-5)
    computed.clear()
    rows = types.Demonstrations(TOKENS, MASK, READ)
    options = {"policy_fn": models.policy_fn(model), "config": sft.Config()}
    value, _ = jax.jit(partial(sft.loss, **options))(params, rows, None)
    jax.effects_barrier()
    assert len(computed) == 2
    assert_allclose(value.total / value.count, -np.sum(READ * full) / 5, rtol=1e-5)


@pytest.mark.slow
def test_an_update_over_devices_reads_the_same_columns(monkeypatch):
    """Two microbatches over two devices under ``shard_map``, of chunks that are left out."""
    model, params = tiny()
    model, _ = chunks_of(monkeypatch, 2, model._replace(hidden=embedded))
    rows = types.Demonstrations(*(np.concatenate([x, x[:1]]) for x in (TOKENS, MASK, READ)))
    state = types.TrainState.create(params, optax.sgd(0.1))
    how = {
        "policy_fn": models.policy_fn(model),
        "optimizer": optax.sgd(0.1),
        "config": sft.Config(num_microbatches=2),
    }
    alone, _ = jax.jit(partial(sft.update, **how))(state, rows, KEY)
    layout = sharding.rows(sharding.make_mesh(2))
    over_devices = partial(sft.update, **how, minibatch_sharding=layout)
    apart, _ = jax.jit(over_devices)(state, jax.device_put(rows, layout), KEY)
    assert_close(apart.params, alone.params, atol=1e-6)


def test_what_is_wrapped_around_a_policy_need_not_take_the_mask(monkeypatch):
    model, params = tiny()
    model, _ = chunks_of(monkeypatch, 2, model._replace(hidden=embedded))
    policy = models.policy_fn(model)
    rows = types.Demonstrations(TOKENS, MASK, READ)

    def mine(inner, *arguments):
        return inner(*arguments)

    def wrapped(params, tokens, mask, key):
        return policy(params, tokens, mask, key)

    functools.update_wrapper(wrapped, policy)
    bound = lora.bind(partial(mine, policy), params)
    adapters = lora.init(KEY, params, rank=1)
    need_not = [partial(mine, policy), wrapped, ops.by_rows(partial(mine, policy), None)]
    lets_through = [jax.jit(policy), Partial(policy), policy.bind(), ops.by_rows(policy, None)]
    cases = [(fn, params, False) for fn in need_not] + [(fn, params, True) for fn in lets_through]
    cases += [(bound, adapters, False), (lora.bind(policy, params), adapters, True)]
    for fn, trained, is_told in cases:
        program = str(jax.make_jaxpr(partial(ops.evaluate, fn))(trained, rows))
        assert ("argsort" in program) == is_told  # the columns that are read come first


def test_on_accelerators_all_columns_are_computed(monkeypatch):
    model, params = tiny()
    model, _ = chunks_of(monkeypatch, 2, model)
    monkeypatch.setattr(heads, "_ON_ACCELERATORS", 1)
    for platform in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(heads.fused, "platform", lambda name=platform: name)
        policy = partial(models.policy_fn(model), response_mask=READ)
        program = str(jax.make_jaxpr(policy)(params, TOKENS, MASK, None))
        assert ("argsort" in program) == (platform == "cpu")


def test_values_are_the_head_one_column_earlier():
    model, params = tiny()
    policy = jax.jit(models.policy_fn(model, prompt_length=4))
    out = policy(with_value(params), TOKENS, MASK, None)
    expected = np.asarray(model.hidden(params, TOKENS, MASK)) @ np.linspace(-1, 1, 8) + 0.5
    assert_allclose(out.values, np.pad(expected[:, 3:-1], ((0, 0), (4, 0))), atol=1e-5)
    assert jax.eval_shape(models.policy_fn(model), params, TOKENS, MASK, None).values is None
    fresh = models.add_head(KEY, params, "value")
    assert_array_equal(policy(fresh, TOKENS, MASK, None).values, np.zeros((3, 9)))


def test_a_network_has_a_value_head_of_its_own():
    """It reads the states before each token, and takes the place of params["value"]."""
    model, params = tiny()
    own = model._replace(values=lambda params, states: states.sum(axis=-1))
    policy_fn = jax.jit(models.policy_fn(own, prompt_length=2))
    values = policy_fn(with_value(params), TOKENS, MASK, None).values
    expected = np.asarray(model.hidden(params, TOKENS, MASK)).sum(axis=-1)[:, 1:8]
    assert_allclose(values[:, 2:], expected, atol=1e-4)
    assert not np.any(values[:, :2])


def test_whole_value_model():
    model, params = tiny()
    value_model, _ = tiny(activation="relu")
    both = {"policy": params, "value": with_value(params, scale=2.0)}
    joint = jax.jit(models.policy_fn(model, 0.7, 3, value_model))(both, TOKENS, MASK, None)
    log_probs, _ = of_all_logits(0.7)
    assert_allclose(joint.log_probs[:, 3:], log_probs[:, 3:], atol=1e-5)
    states = np.asarray(value_model.hidden(params, TOKENS, MASK))
    values = states @ np.linspace(-2, 2, 8) + 0.5
    assert_allclose(joint.values[:, 3:], values[:, 2:-1], atol=1e-5)
    assert np.max(np.abs(values)) > 0.1


def test_dropout_needs_a_key():
    model, params = tiny(residual_dropout=0.5)
    policy = jax.jit(models.policy_fn(model))
    still, first, again, other = (
        np.asarray(policy(params, TOKENS, MASK, key).log_probs)
        for key in (None, *map(jax.random.key, (0, 0, 1)))
    )
    assert_allclose(still, of_all_logits()[0], atol=1e-5)
    assert_array_equal(first, again)
    assert min(np.max(np.abs(first - still)), np.max(np.abs(first - other))) > 1e-2


def test_what_no_model_can_do_is_refused():
    model, params = tiny()
    whole = models.policy_fn(model, value_model=model)
    both = {"policy": params, "value": params}
    too_long = models.policy_fn(model, prompt_length=10)
    for message, refused in (
        ("no score head", lambda: models.score_fn(model)(params, TOKENS, MASK)),
        ("no value head", lambda: whole(both, TOKENS, MASK)),
        ("must be positive, got 0", lambda: models.policy_fn(model, 0)),
        ("must be positive, got nan", lambda: models.policy_fn(model, float("nan"))),
        ("10 is longer than the 9", lambda: too_long(params, TOKENS, MASK)),
        ("'reward'; choose from value", lambda: models.add_head(KEY, params, "reward")),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(refused)
    everything_is_prompt = jax.jit(models.policy_fn(model, prompt_length=9))(
        params, TOKENS, MASK, None
    )
    assert_array_equal(everything_is_prompt.log_probs, np.zeros((3, 9)))


def test_masked_columns_stay_finite_for_pad_ids_outside_the_vocabulary():
    model, params = tiny()
    tokens = np.where(MASK, TOKENS, 50256)
    out = np.asarray(jax.jit(models.policy_fn(model))(params, tokens, MASK, None).log_probs)
    assert np.all(np.isfinite(out))
    expected, _ = of_all_logits()
    assert_allclose(out[MASK == 1], expected[MASK == 1], atol=1e-5)


def test_scores_by_hand():
    model, params = tiny()
    kernel = np.linspace(-1, 1, 8, dtype=np.float32)
    head = {"kernel": kernel, "bias": 0.25, "gain": 3.0, "shift": -2.0}
    params = {**params, "score": jax.tree.map(jnp.float32, head)}
    scores = jax.jit(models.score_fn(model))
    hidden = np.asarray(model.hidden(params, TOKENS, MASK))
    expected = [
        3.0 * (hidden[row, last] @ kernel + 0.25) - 2.0 for row, last in enumerate((8, 8, 5))
    ]
    assert_allclose(scores(params, TOKENS, MASK, None), expected, atol=1e-5)
    assert_array_equal(scores(params, TOKENS, 0 * MASK, None), np.zeros(3))


def test_score_gradient_spares_gain_and_shift_and_empty_rows():
    model, params = tiny()
    params = models.add_head(KEY, params, "score")
    params["score"]["gain"] = jnp.float32(2.0)

    def loss(params, mask):
        return jnp.sum(models.score_fn(model)(params, TOKENS, mask, None) ** 2)

    gradient_of = jax.jit(jax.grad(loss))
    gradient, empty = (
        jax.tree.map(np.asarray, gradient_of(params, mask)) for mask in (MASK, np.zeros_like(MASK))
    )
    assert gradient["score"]["gain"] == gradient["score"]["shift"] == 0
    assert np.all(np.abs(gradient["score"]["kernel"]) > 1e-4)
    assert abs(gradient["score"]["bias"]) > 1e-4
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(empty))


def test_add_head_initial_values():
    params = {"ln_f": {"scale": jnp.ones(2048)}}
    head, other = (
        models.add_head(jax.random.key(seed), params, "score")["score"] for seed in (0, 1)
    )
    assert_allclose(np.std(head["kernel"]), 2049**-0.5, rtol=0.05)
    assert head["bias"] == 0
    assert head["gain"] == 1
    assert head["shift"] == 0
    assert np.max(np.abs(head["kernel"] - other["kernel"])) > 1e-3
    value = models.add_head(KEY, params, "value")["value"]
    assert_array_equal(value["kernel"], np.zeros(2048))
    assert value["bias"] == 0


@pytest.mark.parametrize(
    ("platform", "vocab_size", "columns"),
    [("cpu", 2**15, 32), ("cpu", 2**18, 16), ("gpu", 2**15, 256), ("gpu", 2**20, 16)],
)
def test_a_chunk_has_a_million_logits_of_a_row_and_sixteen_columns(
    monkeypatch, platform, vocab_size, columns
):
    monkeypatch.setattr(heads.fused, "platform", lambda: platform)
    widths = []

    def of_chunk(_, x):
        widths.append(x.shape[1])
        return x

    jax.eval_shape(lambda x: heads._by_chunks(of_chunk, vocab_size, x), jnp.zeros((3, 1024)))
    assert set(widths) == {columns}
