"""Masks, positions, rotations by hand, and the invariances (padding, packing, decoding, remat,
scan, dropout, bf16).
"""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import (
    CONFIG,
    GEMMA,
    LLAMA,
    LLAMA3,
    MISTRAL,
    MORE,
    QWEN2,
    QWEN3,
    grid,
    initial_params,
    perturbed,
    slow,
    soak,
    some_params,
    some_tokens,
    stack_layers,
    tiny,
)
from jax.extend.core import jaxprs_in_params
from numpy.testing import assert_allclose, assert_array_equal
from tabular import assert_close

from rlhf_jax import models, ops, sampling, sharding
from rlhf_jax.models import attention, decoder, gpt2, kernels, rope, stack
from rlhf_jax.models.kernels import initialize, norms

FAMILIES = pytest.mark.parametrize("config", [CONFIG, LLAMA, GEMMA], ids=["gpt2", "llama", "gemma"])
# Most tests run the same programs: three rows of eight tokens, with a mask.
TOKENS = some_tokens(3, 8)
MASK = grid("00011111", "11111111", "01011111")
ONES = np.ones_like(MASK)
ATOL = 1e-5


def test_positions_by_hand():
    single = grid("1111", "0011", "0110", "1010", "0000")
    packed = grid("1122230", "0220110")
    found = jax.jit(attention.positions)
    for mask, expected in (
        (single, grid("0123", "0001", "0012", "0112", "0000")),
        (packed, grid("0101201", "0012012")),
    ):
        for dtype in (np.int32, np.float32):
            assert_array_equal(found(mask.astype(dtype)), expected)
    assert_array_equal(found(single.astype(bool)), grid("0123", "0001", "0012", "0112", "0000"))


def test_masks_by_hand():
    @functools.partial(jax.jit, static_argnums=1)
    def in_text(mask, window=None):
        return attention.visible(attention.seen_in_text(mask, window))[0, 0]

    of_documents = in_text(grid("01122"))
    assert_array_equal(of_documents, grid("00000", "01000", "01100", "00010", "00011"))
    in_window = in_text(grid("01111"), 2)
    assert_array_equal(in_window[2:], grid("01100", "00110", "00011"))


@pytest.mark.parametrize(
    ("index", "queries", "window", "key_slots", "expected"),
    [
        (1, 2, None, [0, 1, 2, 3, 4], ("01000", "01100")),
        (0, 3, None, [0, 1, 2], ("000", "010", "011")),  # an empty cache: one another alone
        # slot s is at place s % 3, the query's own is written over slot 1
        (4, 1, 3, [3, 4, 2], ("111",)),
        (1, 1, 3, [0, 1, -1], ("010",)),  # slot 0 is a pad, place 2 is empty
        (3, 2, 3, [0, 1, 2, 3, 4], ("01110", "00111")),  # the cache before, and one another
    ],
)
def test_what_a_cache_shows_by_hand(index, queries, window, key_slots, expected):
    @jax.jit
    def shown(key_mask):
        seen = attention.seen_in_cache(key_mask, index, queries, window)
        return seen.key_slots, attention.visible(seen)[0, 0]

    slots, visible = shown(grid("01111"))
    assert_array_equal(slots, key_slots)
    assert_array_equal(visible, grid(*expected))


@pytest.mark.parametrize(
    ("config", "pad_id", "dtype"),
    [(CONFIG, 99, bool), slow(LLAMA, 0, np.float32), (GEMMA, -1, np.int32)],
)
def test_padding_changes_no_logits(config, pad_id, dtype):
    """One text of five tokens, before, between and behind pads."""
    model, params = tiny(config)
    mask = grid("00011111", "11111000", "01111100")
    tokens = np.full((3, 8), pad_id)
    tokens[mask == 1] = np.tile(TOKENS[0, :5], 3)
    logits = np.asarray(model.apply(params, tokens, mask.astype(dtype)))
    assert np.all(np.isfinite(logits))
    behind, alone, between = logits[mask == 1].reshape(3, 5, 13)
    assert_allclose(behind, alone, atol=ATOL)
    assert_allclose(between, alone, atol=ATOL)


def test_packed_documents_equal_separate_rows():
    model, params = tiny()
    tokens = TOKENS[0]
    (mask,) = grid("01122330")
    packed = model.apply(params, *np.tile([tokens, mask], (3, 1, 1)).swapaxes(0, 1))[0]
    # Each document alone in a row of its own.
    masks = np.stack([mask == number for number in (1, 2, 3)])
    separate = np.asarray(model.apply(params, np.where(masks, tokens, 0), masks.astype(int)))
    assert_allclose(packed[mask > 0], separate[masks], atol=ATOL)


def test_frequencies_by_hand():
    # Dh = 8, theta = 10000: 10000 ** -(0, 1/4, 1/2, 3/4). 64 tokens hold 10.19, 1.019, .1019 and
    # .01019 waves: above 4 is kept, below 1 divided by 8, and 1.019 is (1.019 - 1) / 3 = .6197%
    # kept.
    plain = np.array([1.0, 0.1, 0.01, 0.001])
    kept = (64 * 0.1 / (2 * math.pi) - 1) / 3
    for scaling, expected in (
        (None, plain),
        (models.RopeScaling("linear", 4.0), plain / 4),
        (LLAMA3, [1.0, 0.1 * kept + 0.1 / 8 * (1 - kept), 0.01 / 8, 0.001 / 8]),
    ):
        config = replace(LLAMA, head_dim=8, rope_scaling=scaling)
        assert_allclose(rope.frequencies(config), expected, rtol=1e-6)


def rms_normed(x, weights):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * weights["scale"]


def turned(x):
    """[T, H Dh] -> [T, H, Dh / 2] complex: a head's halves are the parts of numbers that a position
    turns.
    """
    angles = np.arange(6)[:, None] * 10000.0 ** -np.array([0, 0.5])
    first, second = np.split(x.reshape(6, -1, 4), 2, axis=-1)
    return (first + 1j * second) * np.exp(1j * angles)[:, None]


def llama_block(x, layer):
    parts = layer["attn"] | layer["mlp"]
    kernels = {name: part["kernel"] for name, part in parts.items()}
    normed = rms_normed(x, layer["ln_1"])
    query = turned(normed @ kernels["q_proj"])
    key = np.repeat(turned(normed @ kernels["k_proj"]), 2, axis=1)
    value = np.repeat((normed @ kernels["v_proj"]).reshape(6, 2, 4), 2, axis=1)
    scores = np.einsum("thd,shd->hts", query, key.conj()).real / 2
    weights = np.exp(scores) * np.tri(6)
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = np.einsum("hts,shd->thd", weights, value)
    x = x + mixed.reshape(6, 16) @ kernels["o_proj"]
    normed = rms_normed(x, layer["ln_2"])
    gate = normed @ kernels["gate_proj"]
    silu = gate / (1 + np.exp(-gate))
    return x + silu * (normed @ kernels["up_proj"]) @ kernels["down_proj"]


def test_llama_from_its_definition():
    """Touvron et al. 2023, in complex numbers."""
    model, params = tiny(replace(LLAMA, head_dim=4))
    params = jax.tree.map(np.asarray, params)
    tokens = some_tokens(1, 6)
    x = params["wte"]["embedding"][tokens[0]]
    for layer in (params["h_0"], params["h_1"]):
        x = llama_block(x, layer)
    logits = rms_normed(x, params["ln_f"]) @ params["lm_head"]["embedding"].T
    assert_allclose(model.apply(params, tokens)[0], logits, atol=1e-4)


ALL_LOCAL = replace(GEMMA, global_every=3)


@pytest.mark.parametrize("config", [slow(MISTRAL), ALL_LOCAL])
def test_two_layers_of_windows_reach_twice_as_far(config):
    """Each layer reaches 2 tokens back: the token at 0 shows in the logits at 4 and not in those at
    5.
    """
    model, params = tiny(config)
    other = (TOKENS + np.eye(1, 8, dtype=int)) % 13
    changed = np.abs(model.apply(params, other, ONES) - model.apply(params, TOKENS, ONES))
    assert changed[:, 4].max() > 1e-3
    assert_array_equal(changed[:, 5:], 0)


@pytest.mark.parametrize(
    ("config", "kernels"), [(QWEN3, ("q_proj", "k_proj")), (GEMMA, ("o_proj", "down_proj"))]
)
def test_the_length_of_what_is_normed_does_not_matter(config, kernels):
    model, params = tiny(config)

    def longer(path, leaf):
        return 3.0 * leaf if any(part.key in kernels for part in path) else leaf

    found = model.apply(jax.tree_util.tree_map_with_path(longer, params), TOKENS, ONES)
    assert_allclose(found, model.apply(params, TOKENS, ONES), atol=2e-3)  # up to epsilon


def test_qwen2_has_biases_in_queries_keys_and_values_alone():
    layers = some_params(QWEN2)["h_0"]["attn"]
    biased = {name for name, layer in layers.items() if "bias" in layer}
    assert biased == {"q_proj", "k_proj", "v_proj"}


def test_gemma_by_hand():
    module = decoder.Decoder(GEMMA)
    params = some_params(GEMMA)
    tokens = some_tokens(1, 3)
    rows = module.apply({"params": params}, tokens, tokens, tokens >= 0, method="embed")
    assert_allclose(rows, params["wte"]["embedding"][tokens] * 8**0.5, rtol=1e-6)
    assert module.scales() == [5**-0.5] * 2
    assert_allclose(rope.frequencies(GEMMA)[1], 1e6 ** (-2 / 6), rtol=1e-6)
    assert_allclose(rope.frequencies(GEMMA, is_local=True)[1], 1e4 ** (-2 / 6), rtol=1e-6)
    assert (GEMMA.windows, GEMMA.local_layers) == ((None, 3), [True, False])


def test_gemma_s_local_layers_turn_by_their_own_base():
    """Their frequencies are above."""
    (plain, params), (base, _) = (tiny(ALL_LOCAL, **theta) for theta in ({}, {"rope_theta": 5.0}))
    assert_array_equal(plain.apply(params, TOKENS, ONES), base.apply(params, TOKENS, ONES))


def test_positions_beyond_the_table_use_its_last_row():
    _, params = tiny()
    tokens, places = some_tokens(1, 4), np.array([[0, 9, 10, 13]])
    embed = functools.partial(gpt2.GPT2(CONFIG).apply, method="embed")
    rows = jax.jit(embed)({"params": params}, tokens, places, places >= 0)
    of_tokens, of_places = (np.asarray(params[name]["embedding"]) for name in ("wte", "wpe"))
    assert_allclose(rows, of_tokens[tokens] + of_places[[[0, 9, 9, 9]]], atol=ATOL)


def test_a_real_token_outside_the_vocabulary_gives_nan():
    model, params = tiny()
    tokens = TOKENS.copy()
    tokens[0, 4] = CONFIG.vocab_size
    logits = model.apply(params, tokens, MASK)
    assert_array_equal(np.isnan(logits[:, 4]).all(axis=-1), [True, False, False])


@pytest.mark.parametrize("config", [CONFIG, slow(GEMMA)])
def test_samples_have_the_log_probs_of_the_full_forward(config):
    """Also behind prompts that are padded on the left, or have a hole."""
    (model, params) = tiny(config)
    tokens = some_tokens(3, 4)
    mask = grid("1111", "0001", "0101")
    how = sampling.SamplingConfig(4, eos_id=None, pad_id=0)
    sample = jax.jit(functools.partial(sampling.generate, model, config=how))
    sampled = sample(params, tokens, mask, jax.random.key(1))
    logits = model.apply(params, sampled.tokens, sampled.attention_mask)
    expected = jax.jit(ops.token_log_probs)(logits, sampled.tokens)
    assert_allclose(sampled.log_probs[:, 4:], expected[:, 4:], atol=ATOL)


@pytest.mark.parametrize(
    ("config", "scan_layers"),
    [
        (GEMMA, True),
        (MORE["gpt_oss"], False),
        slow(CONFIG, False),
        slow(MORE["gpt_oss"], True),
        # With transformers' tokens the parity tests compare those of each family.
        *(soak(config, False) for name, config in MORE.items() if name != "gpt_oss"),
    ],
)
def test_decoding_equals_the_full_forward(config, scan_layers):
    """Not a token later than the query is seen: its logits are there before that token is
    written. Stacked layers decode one by one.
    """
    config = replace(config, num_layers=3 if scan_layers else 1)
    model, params = tiny(config, scan_layers=scan_layers, remat=scan_layers)
    expected = np.asarray(model.apply(params, TOKENS, MASK))
    positions = np.asarray(jax.jit(attention.positions)(MASK))
    cache = model.init_cache(3, 9)
    pieces = []
    decode = jax.jit(model.decode)
    # Slots not written yet are marked as real: only what lies at or before the query may be seen.
    key_mask = np.pad(MASK, ((0, 0), (0, 1)), constant_values=1)
    for first, last in ((0, 4), (4, 6), (6, 7), (7, 8)):
        arguments = (params, TOKENS[:, first:last], positions[:, first:last], key_mask, cache)
        if first == 0:
            logits, cache = jax.jit(functools.partial(model.decode, index=0))(*arguments)
        else:
            logits, cache = decode(*arguments, first)
        pieces.append(logits)
    decoded = np.concatenate(pieces, axis=1)
    assert_allclose(decoded[MASK == 1], expected[MASK == 1], atol=ATOL)


@pytest.mark.parametrize("config", [slow(CONFIG), GEMMA])
def test_a_first_token_decodes_as_a_text_of_one_token(config):
    model, params = tiny(config)
    token = TOKENS[:, :1]
    cache = model.init_cache(3, 9)
    at_start = jax.jit(functools.partial(model.decode, index=0))
    logits, _ = at_start(params, token, np.zeros_like(token), np.ones((3, 9), int), cache)
    assert_allclose(logits, model.apply(params, TOKENS, ONES)[:, :1], atol=ATOL)


@pytest.mark.slow
def test_decoding_can_return_hidden_states():
    model, params = tiny(CONFIG)
    tokens = some_tokens(2, 2)
    inputs = (params, tokens, np.array([[0, 1]] * 2), np.ones((2, 4), int), model.init_cache(2, 4))
    states, _ = model.decode(*inputs, 0, hidden=True)
    assert_allclose(states, model.hidden(params, tokens), atol=ATOL)
    logits, _ = model.decode(*inputs, 0)
    assert_allclose(model.unembed(params, states), logits, atol=ATOL)


@FAMILIES
def test_a_cache_has_the_heads_of_the_keys_and_slots_for_the_window(config):
    model, _ = tiny(config)
    cache = jax.eval_shape(lambda: model.init_cache(3, 9))
    sizes = [9] if config.windows == (None,) else [9, 3]
    keys = {(3, 2, config.head_size, size) for size in sizes}
    values = {(3, 2, size, config.head_size) for size in sizes}
    assert {leaf.shape for leaf in jax.tree.leaves(cache)} == keys | values


def sampler_of(model, mesh=None):
    """The program that samples from a model."""
    settings = sampling.SamplingConfig(max_new_tokens=3, eos_id=1, pad_id=0)
    prompts = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    key = jax.random.key(0)
    sample = functools.partial(sampling.generate, model, key=key, config=settings, mesh=mesh)
    return jax.make_jaxpr(sample)(jax.eval_shape(model.init, key), prompts, prompts)


def loop_over_tokens(config, **changes):
    """The parameters given to the sampler's loop, and the program of one token."""
    model = models.build(replace(config, **changes))
    sampler = sampler_of(model)
    assert str(sampler).count("= scan[") == model.config.scan_layers  # the prompt
    (loop,) = (step for step in sampler.eqns if step.primitive.name == "while")
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.eval_shape(model.for_decoding, params), loop.params["body_jaxpr"].jaxpr


@pytest.mark.parametrize("config", [CONFIG, slow(GEMMA)])
def test_a_prompt_goes_through_scanned_layers_as_one_program(config):
    """Not on a mesh that cuts weights: it would gather stacked ones beside those that decode."""
    model = models.build(replace(config, scan_layers=True))
    meshes = sharding.make_mesh(1), sharding.make_mesh(1, fsdp=2)
    assert [str(sampler_of(model, mesh)).count("= scan[") for mesh in meshes] == [1, 0]


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_layers_are_taken_apart_by_one_kernel_for_all(num_layers):
    rows = np.arange(num_layers * 6, dtype=np.float32).reshape(num_layers, 2, 3) - 5
    numbered = [
        {"a": rows, "b": np.full(num_layers, number, np.float32)}
        for number in (-3.0, np.nan, np.inf)
    ]
    program = jax.jit(stack.apart).lower(numbered[0]).compile()
    for stacked in numbered:
        layers = program(stacked)
        assert len(layers) == num_layers
        for i, layer in enumerate(layers):
            jax.tree.map(assert_array_equal, layer, {name: x[i] for name, x in stacked.items()})
    # XLA knows none of the numbers: it would make a slice of a place that it knows.
    assert program.as_text().count(" dynamic-slice(") == (2 * num_layers if num_layers > 1 else 0)


def steps(jaxpr):
    """The operations of a program and of those that it calls."""
    for step in jaxpr.eqns:
        yield step
        for inner in jaxprs_in_params(step.params):
            yield from steps(inner)


def test_the_loop_over_tokens_is_that_of_an_unrolled_model_and_casts_no_weight():
    config = replace(CONFIG, compute_dtype="bfloat16")
    params, body = loop_over_tokens(config, scan_layers=True)
    assert models.build(replace(config, scan_layers=True)).for_decoding(params) is params
    for changes in ({}, {"scan_layers": True, "remat": True}):
        assert str(body) == str(loop_over_tokens(config, **changes)[1])
    casts = [step for step in steps(body) if step.primitive.name == "convert_element_type"]
    leaves = {leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    assert not {step.invars[0].aval.shape for step in casts} & leaves
    layer = params["h_1"]
    kernel = layer["mlp"].popitem()[1]["kernel"]
    assert kernel.dtype == params["unembedding"].dtype == jnp.bfloat16
    # The rows of tokens are read in float32, and norms are computed in it: decoding equals the
    # full forward.
    assert params["wte"]["embedding"].dtype == layer["ln_1"]["scale"].dtype == jnp.float32


def test_decoding_copies_no_weight_that_is_narrower_than_the_compute_dtype():
    model, params = tiny()
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    prepared = jax.eval_shape(model.for_decoding, half)
    assert {leaf.dtype for leaf in jax.tree.leaves(prepared)} == {jnp.dtype("bfloat16")}


@functools.cache
def states_and_gradient(config, columns, **changes):
    """The program of the states of these columns, and of the gradient of their weighted sum, as a
    function of the weights.
    """
    model, params = tiny(config, **changes)
    hidden = models.build(model.config).hidden
    if columns is not None:
        columns = NUMBERS if columns == "numbers" else slice(*columns)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def program(params, weights):
        states = hidden(params, TOKENS, MASK, None, columns)
        return jnp.sum(weights * states), states

    return functools.partial(program, params)


NUMBERS = jnp.array([[4, 2], [0, 5], [3, 3]])
INVERSE = replace(CONFIG, num_layers=3, scale_attn_by_inverse_layer_idx=True)
BOTH = {"scan_layers": True, "remat": True}


@pytest.mark.parametrize(
    ("config", "changes", "columns"),
    [
        (INVERSE, BOTH, "numbers"),
        slow(CONFIG, {"remat": True}, (2, 5)),
        slow(replace(LLAMA, num_layers=3), BOTH, (2, 5)),
        slow(GEMMA, {}, "numbers"),
        slow(GEMMA, {}, (2, 5)),
    ],
)
def test_columns_that_are_read_are_those_of_all(config, changes, columns):
    """The states, and the gradient of their weighted sum. test_heads.py reads slices."""
    weights = np.random.default_rng(1).normal(size=(3, 8, 8)).astype(np.float32)
    if columns == "numbers":
        chosen = (np.arange(3)[:, None], NUMBERS)
    else:
        chosen = (slice(None), slice(*columns))
    of_columns = weights[chosen]
    (_, states), gradient = states_and_gradient(config, columns, **changes)(of_columns)
    everywhere = np.zeros_like(weights)
    np.add.at(everywhere, chosen, of_columns)
    (_, whole), expected = states_and_gradient(config, None, **changes)(everywhere)
    assert_allclose(states, whole[chosen], atol=ATOL)
    assert_close(gradient, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [slow({"remat": True}), BOTH])
def test_remat_and_scan_change_neither_values_nor_gradients(changes):
    weights = np.random.default_rng(2).normal(size=(3, 8, 8)).astype(np.float32)
    (_, states), gradient = states_and_gradient(INVERSE, None)(weights)
    (_, other), other_gradient = states_and_gradient(INVERSE, None, **changes)(weights)
    assert_allclose(other, states, atol=ATOL)
    expected = stack_layers(gradient) if "scan_layers" in changes else gradient
    assert_close(other_gradient, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("remat", [False, True])
def test_remat_is_applied(remat):
    model, params = tiny(remat=remat, activation="relu")  # GELU has a checkpoint of its own
    program = str(jax.make_jaxpr(model.apply)(params, some_tokens(1, 4)))
    assert ("remat" in program or "checkpoint" in program) == remat


RATES = ("embedding_dropout", "attention_dropout", "residual_dropout")


def test_without_a_key_nothing_drops():
    (plain, params), (model, _) = tiny(), tiny(**dict.fromkeys(RATES, 0.5))
    assert_array_equal(model.apply(params, TOKENS, MASK), plain.apply(params, TOKENS, MASK))


@pytest.mark.parametrize("rate", [*RATES[:2], slow(RATES[2])])
def test_each_rate_drops_with_a_key(rate):
    """The one of residuals is in test_heads.py too."""
    config = replace(CONFIG, num_layers=1)
    (plain, params), (model, _) = tiny(config), tiny(config, **{rate: 0.5})
    keys = map(jax.random.key, (1, 1, 2))
    first, again, other = (np.asarray(model.hidden(params, TOKENS, MASK, key)) for key in keys)
    assert_array_equal(first, again)
    for different in (other, plain.hidden(params, TOKENS, MASK)):
        assert np.abs(first - different).max() > 1e-3


@pytest.mark.parametrize("scan_layers", [slow(False), True])
def test_layers_draw_different_dropout(scan_layers):
    """Two equal layers whose MLPs write ones and whose attention writes nothing: x is the sum of
    the two drops.

    A third, which is never stacked, writes nothing.
    """
    model, params = tiny(
        replace(CONFIG, num_layers=3), residual_dropout=0.5, scan_layers=scan_layers
    )
    params = jax.tree.map(jnp.zeros_like, params)
    for layer in {"h", "h_0", "h_1"} & {*params}:
        params[layer]["mlp"]["c_proj"]["bias"] += 1.0
    params["ln_f"]["scale"] += 1.0
    states = np.asarray(model.hidden(params, TOKENS, None, jax.random.key(3)))
    # With the same draw in both layers a row would hold two levels (0 and 4), with different ones
    # three (0, 2 and 4).
    assert max(len(np.unique(row.round(4))) for row in states.reshape(-1, 8)) == 3


def test_a_parameter_of_another_shape_is_named():
    (_, params) = tiny()
    model = models.build(replace(CONFIG, intermediate_size=6))
    with pytest.raises(ValueError, match=r"h_0/mlp/c_fc/kernel is \(8, 32\).*\(8, 6\)"):
        jax.eval_shape(model.apply, params, some_tokens(1, 3))


def test_a_key_from_which_no_layer_draws_changes_no_program():
    model = models.build(CONFIG)
    (_, params) = tiny()
    program = jax.make_jaxpr(lambda key: model.hidden(params, some_tokens(1, 3), None, key))
    with_key = program(jax.random.key(0))
    without = program(None)
    assert [step.primitive for step in with_key.eqns] == [step.primitive for step in without.eqns]


def test_a_seed_draws_the_numbers_that_it_always_drew():
    """Initial weights, written down on 2026-11-22, and those of stacked layers a day later. Weights
    of one shape are drawn by one program: layers have four kernels, and there are two tables.
    """
    config = replace(CONFIG, num_layers=3)
    programs = initialize._drawn
    programs.clear_cache()
    model = models.build(config)
    params = model.init(jax.random.key(0))
    assert programs._cache_size() == 6
    stacked = models.build(replace(config, scan_layers=True)).init(jax.random.key(0))
    assert programs._cache_size() == 6 + 4
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((params, stacked)))

    def first(layer):
        return np.asarray(layer["attn"]["c_proj"]["kernel"])[..., 0, 0]

    drawn = [first(params[name]) for name in ("h_0", "h_1", "h_2")]
    assert_allclose(drawn, [0.0138717, 0.0026196, 0.0008438], atol=1e-6)
    drawn = [*first(stacked["h"]), first(stacked["h_2"])]
    assert_allclose(drawn, [0.0067511, 0.0111894, 0.0008438], atol=1e-6)


@pytest.mark.slow
def test_a_seed_drops_what_it_always_dropped():
    """Written down on 2026-11-22."""
    model = models.build(replace(CONFIG, num_layers=3, residual_dropout=0.5))
    params = perturbed(model.init(jax.random.key(0)))
    states = jax.jit(model.hidden)(params, some_tokens(1, 3), None, jax.random.key(3))
    assert_allclose(states[0, :, 0], [-0.382069, -0.921606, -0.930254], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [slow(CONFIG), ALL_LOCAL])
def test_layers_of_one_kind_are_traced_once(config):
    """Of four layers the last is traced by itself; Gemma's layers are of two kinds."""
    model = models.build(replace(config, num_layers=4))
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = some_tokens(2, 4)
    cache = model.init_cache(2, 8)
    rest = (np.ones((2, 8)), cache)

    def loss(params):
        return model.hidden(params, tokens).sum()

    kinds = len({*model.config.local_layers[:3]})
    # A prompt's keys are copied into the empty cache as a whole.
    prompt = tokens[:, :2]
    program = jax.make_jaxpr(model.decode, static_argnums=5)(params, prompt, prompt, *rest, 0)
    assert "scatter" not in str(program)
    token = tokens[:, :1]
    learning = jax.make_jaxpr(jax.grad(loss))(params)
    decoding = jax.make_jaxpr(model.decode)(params, token, token, *rest, jnp.int32(3))
    for program, passes in ((learning, 2), (decoding, 1)):
        steps = [step.params for step in program.eqns]
        calls = [step["jaxpr"] for step in steps if step.get("name") == "core_fn"]  # Flax's name
        assert len(calls) == 3 * passes
        assert len(set(map(id, calls))) == kinds * passes


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    plain, params = tiny()
    model, _ = tiny(compute_dtype="bfloat16")
    logits = model.apply(params, TOKENS, MASK)
    fresh = jax.eval_shape(model.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves((fresh, logits))} == {jnp.dtype("float32")}
    states, (leaf, *_) = jax.eval_shape(
        lambda: (model.hidden(params, TOKENS), jax.tree.leaves(model.init_cache(1, 4)))
    )
    assert states.dtype == leaf.dtype == jnp.bfloat16
    difference = np.abs(logits - plain.apply(params, TOKENS, MASK))
    assert 1e-4 < np.mean(difference) < 0.1


def test_master_weights_are_float32_copies_that_an_update_may_donate():
    params = {"low": jnp.array([1.5, 3.0], jnp.bfloat16), "full": jnp.array([0.1])}
    copies = models.master_weights(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(copies)} == {jnp.dtype("float32")}
    jax.tree.map(assert_array_equal, copies, params)
    jax.tree.map(lambda leaf: leaf.delete(), copies)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@FAMILIES
def test_resize_vocabulary_adds_mean_rows_to_every_table(config):
    model, params = tiny(config)
    model = model._replace(config=replace(model.config, other_keys={"mine": 1}))
    wider, wider_params = models.resize_vocabulary(model, params, 15)
    assert (wider.config.other_keys, wider.config.vocab_size) == ({"mine": 1}, 15)
    tables = {"wte", "lm_head"} & {*params}
    for name in tables:
        former, table = (np.asarray(x[name]["embedding"]) for x in (params, wider_params))
        assert_array_equal(table[:13], former)
        assert_allclose(table[13:], np.tile(former.mean(axis=0), (2, 1)), atol=ATOL)
    assert ("lm_head" in tables) == (not wider.config.tie_embeddings)
    others = wider_params | {name: params[name] for name in tables}
    jax.tree.map(assert_array_equal, others, params)
    assert jax.eval_shape(wider.apply, wider_params, TOKENS).shape == (3, 8, 15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "hidden_size 8 .* num_heads 3"),
        ({"activation": "tanh"}, "'tanh'; choose from gelu_new, gelu, relu, silu"),
        ({"num_layers": 0}, "num_layers .*got 0"),
        ({"residual_dropout": 1.0}, "residual_dropout .*got 1.0"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_wrong_shapes_are_refused():
    model, params = tiny()
    tokens = some_tokens(2, 4)
    cache = model.init_cache(2, 4)
    for refused in (
        lambda: model.apply(params, tokens, np.ones((2, 3))),
        lambda: model.apply(params, tokens[0]),
        lambda: model.decode(params, tokens, tokens, np.ones((2, 5)), cache, 0),
        lambda: model.decode(params, tokens, tokens[:, :1], np.ones((2, 4)), cache, 0),
    ):
        with pytest.raises(AssertionError, match=r"shape|rank"):
            refused()


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_last_mlp_runs_on_the_columns_that_are_read(scan_layers):
    """If less than an eighth is left out, it runs on all: one kernel then serves all blocks."""
    model, params = tiny(replace(CONFIG, num_layers=3), scan_layers=scan_layers)
    hidden = models.build(model.config).hidden

    def program(width, columns):
        tokens = jax.ShapeDtypeStruct((3, width), jnp.int32)
        return jax.make_jaxpr(lambda tokens: hidden(params, tokens, None, None, columns))(tokens)

    assert "f32[3,3,32]" in str(program(6, slice(2, 5)))
    wide = program(9, slice(0, 8))
    assert wide.out_avals[0].shape == (3, 8, 8)
    assert "f32[3,8,32]" not in str(wide)


def test_gpt2_divides_the_scores_of_layer_i_by_i_plus_one():
    config = replace(CONFIG, scale_attn_by_inverse_layer_idx=True)
    assert gpt2.GPT2(config).scales() == [4**-0.5, 4**-0.5 / 2]


# An even number of rows is taken in halves.
@pytest.mark.parametrize(("rows", "is_centred"), [(6, True), (7, False)])
def test_the_gradients_written_out_are_the_derived_ones(rows, is_centred):
    shapes = ((rows, 8), (8, 4), (8,), (8,), (rows, 4))
    draw = np.random.default_rng(0)
    drawn = [draw.standard_normal(shape).astype(np.float32) for shape in shapes]
    *values, cotangent = map(jnp.asarray, drawn)

    def ours(x, kernel, scale, bias):
        normed = norms.norm(x, scale, bias if is_centred else None, 1e-5)
        return jnp.sum(kernels.product(normed, kernel) * cotangent)

    def derived(x, kernel, scale, bias):
        centred = x - is_centred * x.mean(1, keepdims=True)
        normed = centred / jnp.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        scaled = normed * scale[None] + is_centred * bias[None]
        return jnp.sum(scaled @ kernel * cotangent)

    every = (0, 1, 2, 3)
    found = jax.jit(jax.value_and_grad(ours, every))(*values)
    expected = jax.jit(jax.value_and_grad(derived, every))(*values)
    assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gemma_s_norm_by_hand_is_computed_in_float32_and_keeps_the_dtype(dtype):
    params = {"params": {"scale": jnp.array([1.0, 0.0])}}
    expected = jnp.array([[2 * 3 / 12.5**0.5, 4 / 12.5**0.5]])
    normed = stack.Norm(GEMMA).apply(params, jnp.array([[3.0, 4.0]], dtype))
    assert_allclose(normed, expected.astype(dtype), rtol=1e-6)


@pytest.mark.slow
def test_products_with_the_hessian_of_a_model():
    """Forward over reverse and reverse over reverse agree, as docs/models.md says of the gradients
    written out.
    """
    model = models.build(models.GPT2Config(7, 8, 8, 1, 2))
    params = initial_params(model)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6) % 7
    along = jax.tree.map(jnp.ones_like, params)

    @jax.grad
    def gradient(params):
        return jnp.sum(jnp.sin(model.apply(params, tokens)))

    def pushed(params):
        return jax.jvp(gradient, (params,), (along,))[1]

    def product(params):
        products = jax.tree.map(jnp.vdot, gradient(params), along)
        return sum(jax.tree.leaves(products))

    forward = jax.jit(pushed)(params)
    reverse = jax.jit(jax.grad(product))(params)
    assert_close(forward, reverse, atol=1e-4, rtol=1e-3)
