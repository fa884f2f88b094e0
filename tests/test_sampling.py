"""The sampler: exact distributions on a lookup-table model, ends and masks, and what a row may
depend on.
"""

import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from builders import slow
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import ops, rollout, sampling
from rlhf_jax.sampling import SamplingConfig, decoding

KEY = jax.random.key(0)
generate = jax.jit(sampling.generate, static_argnames=("model", "config", "mesh"))
best_of_n = jax.jit(
    sampling.best_of_n, static_argnames=("model", "config", "n", "reward_fn", "mesh")
)


class LookupModel(SimpleNamespace):
    """logits = params["token"][token] + params["position"][position]: every probability can be
    written down.
    """

    __hash__ = object.__hash__


def lookup_model(max_length=64, calls=None):
    def decode(params, tokens, positions, key_mask, cache, index):
        if calls is not None:
            jax.debug.callback(
                lambda i: calls.append((int(i), tokens.shape[1])), jnp.asarray(index)
            )
        token, position = map(jnp.asarray, (params["token"], params["position"]))
        return token[tokens] + position[positions], cache

    return LookupModel(
        config=SimpleNamespace(max_length=max_length),
        init_cache=lambda batch, length: jnp.zeros((batch, length)),
        decode=decode,
    )


MODEL = lookup_model()


def lookup_params(vocab_size=5, seed=0, scale=1.5):
    rng = np.random.default_rng(seed)
    return {
        "token": (rng.normal(size=(vocab_size, vocab_size)) * scale).astype(np.float32),
        "position": (rng.normal(size=(64, vocab_size)) * scale).astype(np.float32),
    }


def config(**changes):
    return SamplingConfig(**({"max_new_tokens": 6, "eos_id": 1, "pad_id": 0} | changes))


def prompts(rows=24, seed=1, width=3, vocab_size=5):
    """Left-padded prompts of 1 to ``width`` tokens, with junk in the pad columns."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, width + 1, rows)
    mask = (np.arange(width)[None, :] >= width - lengths[:, None]).astype(np.int32)
    return rng.integers(0, vocab_size, (rows, width)).astype(np.int32), mask


PARAMS = lookup_params()
PROMPTS = prompts()


def run(
    tokens=PROMPTS[0],
    mask=None,
    key=KEY,
    params=PARAMS,
    model=MODEL,
    row_ids=None,
    places=None,
    mesh=None,
    **options,
):
    """``generate`` under jit, as NumPy arrays; the options are ``config``'s. Without a mask,
    ``tokens`` are all real.
    """
    if mask is None:
        mask = PROMPTS[1] if tokens is PROMPTS[0] else np.ones_like(tokens)
    how = {"config": config(**options), "row_ids": row_ids, "places": places, "mesh": mesh}
    return jax.tree.map(np.asarray, generate(model, params, tokens, mask, key, **how))


def data_mesh(devices):
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def assert_same(actual, expected):
    jax.tree.map(assert_array_equal, actual, expected)


def lookup_log_probs(rollout, temperature=1.0):
    """[B, T] log-probs of the responses to ``PROMPTS`` by a loop over rows and columns, in
    float64.
    """
    table, position_table = (np.asarray(PARAMS[name], np.float64) for name in ("token", "position"))
    tokens = rollout.tokens
    out = np.zeros(rollout.tokens.shape)
    for i, t in zip(*np.nonzero(rollout.response_mask), strict=True):
        logits = table[tokens[i, t - 1]] + position_table[PROMPTS[1][i].sum() + t - 4]
        out[i, t] = scipy.special.log_softmax(logits / temperature)[tokens[i, t]]
    return out


def nucleus(logits, top_p):
    """The definition, token by token: the shortest list of the best that reaches p."""
    probs = scipy.special.softmax(np.asarray(logits, np.float64))
    kept = np.zeros(len(probs), bool)
    for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if probs[kept].sum() < top_p:
            kept[i] = True
    return kept


# --- distributions


T = True
F = False


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({"top_k": 9, "top_p": 1.0, "min_p": 0.0}, [T, T, T, T], [T, T, T, T]),
        ({"top_k": 2}, [T, F, T, F], [T, T, T, T]),  # all tie with the second
        ({"top_p": 0.39}, [T, F, F, F], [T, T, F, F]),
        ({"top_p": 0.6}, [T, F, T, F], [T, T, T, F]),  # the token that crosses stays
        ({"top_p": 1e-6}, [T, F, F, F], [T, F, F, F]),
        ({"top_p": 1e-39}, [T, F, F, F], [T, F, F, F]),  # 0 to XLA
        ({"top_p": 1e-300}, [T, F, F, F], [T, F, F, F]),
        ({"top_k": 2, "top_p": 1e-300, "min_p": 1e-300}, [T, F, F, F], [T, F, F, F]),
        # Renormalised after top-k: .4 / .7 = .571 does not reach .58, where .4 + .3 of the full
        # softmax does.
        ({"top_k": 2, "top_p": 0.56}, [T, F, F, F], [T, T, T, F]),
        ({"top_k": 2, "top_p": 0.58}, [T, F, T, F], [T, T, T, F]),
        ({"min_p": 0.49}, [T, F, T, T], [T, T, T, T]),
        ({"min_p": 0.51}, [T, F, T, F], [T, T, T, T]),
    ],
)
def test_truncate(options, first, second):
    logits = np.log(np.array([[0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]], np.float32))
    left = decoding.truncate(logits, **options)
    assert_array_equal(left, np.where([first, second], logits, -np.inf))


def test_the_nucleus_ends_where_its_probability_is_exactly_p():
    """Four probabilities of 1/4: two of them reach one half, three three quarters."""
    for top_p, number in ((0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3)):
        left = decoding.truncate(np.zeros((2, 4), np.float32), top_p=top_p)
        assert np.isfinite(left).sum(axis=1).tolist() == [number] * 2


def test_truncation_is_that_of_token_by_token():
    """Also where the border lies between equals; by one sort, where ranks would take two."""
    rough = np.round(np.random.default_rng(3).normal(size=(40, 50)) * 2).astype(np.float32) / 2
    for options in ({"top_p": 0.3}, {"top_k": 7, "top_p": 0.5}):
        cut = (
            rough
            if "top_k" not in options
            else np.where(rough < np.sort(rough)[:, -7:-6], -np.inf, rough)
        )
        expected = [nucleus(row, options["top_p"]) for row in cut]
        truncate = jax.jit(partial(decoding.truncate, **options))
        assert_array_equal(np.isfinite(truncate(rough)), expected)
    assert str(jax.make_jaxpr(partial(decoding.truncate, top_p=0.5))(rough)).count(" sort[") == 1


def test_greedy_follows_the_largest_logit():
    rollout = run(temperature=0.0, eos_id=None)
    out = rollout.tokens
    for i in range(24):
        for t in range(3, 9):
            logits = (
                PARAMS["token"][out[i, t - 1]] + PARAMS["position"][PROMPTS[1][i].sum() + t - 4]
            )
            assert out[i, t] == np.argmax(logits)
    # Log-probs of temperature 1, and the key is not used.
    assert_allclose(rollout.log_probs, lookup_log_probs(rollout), atol=1e-5)
    assert_same(run(key=jax.random.key(9), temperature=0.0, eos_id=None), rollout)
    equal = run(params=jax.tree.map(np.zeros_like, PARAMS), temperature=0.0, eos_id=None)
    assert not equal.tokens[:, 3:].any()  # of equals the lowest id


def penalised(logits, tokens, penalty):
    """The logits [24, 6, V], where those of the tokens so far, without padding, are penalised."""
    out = logits.copy()
    for i, slot in np.ndindex(24, 6):
        for token in set(tokens[i, 3 - PROMPTS[1][i].sum() : 3 + slot].tolist()):
            out[i, slot, token] *= penalty if out[i, slot, token] < 0 else 1 / penalty
    return out


@pytest.mark.parametrize(
    ("temperature", "truncation", "penalty"),
    [
        (1.0, {}, 1.0),
        (0.6, {"top_k": 3, "top_p": 0.8}, 3.0),
        slow(1.7, {"min_p": 0.4}, 1.0),
    ],
)
def test_a_token_is_jax_random_categorical_s_of_its_row_and_slot(temperature, truncation, penalty):
    """And the log-probs are of the full softmax all the same."""
    how = {"temperature": temperature, "repetition_penalty": penalty, **truncation}
    rollout = run(eos_id=None, **how)
    tokens = rollout.tokens

    @jax.jit
    def drawn(logits):
        left = decoding.truncate(logits.reshape(-1, 5) / temperature, **truncation)
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        keys = jax.vmap(fold, in_axes=(0, None))(fold(KEY, jnp.arange(24)), jnp.arange(6))
        return jax.vmap(jax.random.categorical)(keys.ravel(), left).reshape(24, 6)

    positions = PROMPTS[1].sum(axis=1)[:, None] - 1 + np.arange(6)
    logits = PARAMS["token"][tokens[:, 2:8]] + PARAMS["position"][positions]
    changed = penalised(logits, tokens, penalty)
    assert np.any(drawn(changed) != drawn(logits)) == (penalty != 1)
    assert_array_equal(tokens[:, 3:], drawn(changed))
    assert rollout.log_probs.dtype == np.float32
    assert_allclose(rollout.log_probs, lookup_log_probs(rollout, temperature), atol=1e-5)


# --- ends and masks


@pytest.mark.parametrize("ends", [1, (3, 0), 0])
def test_end_of_a_response(ends):
    """Up to the first EOS a row has the tokens that nothing ends, pads among them; after it pads,
    masks 0, log-probs 0. The pad may be an EOS.
    """
    endless = run(eos_id=None)
    assert endless.response_mask[:, 3:].all()
    rollout = run(eos_id=ends)
    assert_same((rollout.tokens[:, :3], rollout.attention_mask[:, :3]), PROMPTS)
    is_end = np.isin(endless.tokens, ends) & (np.arange(9) >= 3)
    said = (np.cumsum(is_end, axis=1) - is_end == 0) & (np.arange(9) >= 3)
    assert_array_equal(rollout.response_mask, said)
    assert_array_equal(rollout.attention_mask[:, 3:], said[:, 3:])
    assert_array_equal(rollout.tokens[:, 3:], np.where(said, endless.tokens, 0)[:, 3:])
    assert_array_equal(rollout.log_probs, np.where(said, endless.log_probs, 0.0))
    mask_of = jax.jit(ops.response_mask, static_argnums=(1, 2))
    assert_array_equal(mask_of(rollout.tokens, 3, ends), said)


def test_stops_when_every_row_has_ended():
    """Position 4 allows EOS only: a row with 3 prompt tokens ends with its third, one with 1 with
    its fifth token.
    """
    params = lookup_params()
    params["token"][:, 1] = -100.0
    params["position"][4, 1] = 1000.0
    tokens = np.full((2, 3), 2, np.int32)
    calls = []
    model = lookup_model(calls=calls)

    def decoded(mask):
        calls.clear()
        rollout = run(
            tokens, np.asarray(mask, np.int32), model=model, params=params, max_new_tokens=40
        )
        assert rollout.tokens.shape == (2, 43)
        jax.effects_barrier()
        return sorted(calls), rollout.response_mask.sum(1).tolist()

    prefill = (0, 2)
    assert decoded([[1, 1, 1], [1, 1, 1]]) == ([prefill, (2, 1), (3, 1), (4, 1)], [3, 3])
    assert decoded([[1, 1, 1], [0, 0, 1]]) == ([prefill, *((i, 1) for i in range(2, 7))], [3, 5])
    # A row without a prompt is absent: nothing waits for it.
    assert decoded([[1, 1, 1], [0, 0, 0]]) == ([prefill, (2, 1), (3, 1), (4, 1)], [3, 0])
    assert decoded([[0, 0, 0], [0, 0, 0]]) == ([prefill], [0, 0])


def test_absent_row():
    tokens, mask = prompts()
    mask[2] = 0
    rollout = run(tokens, mask)
    assert_array_equal(rollout.tokens[2], [*tokens[2], 0, 0, 0, 0, 0, 0])
    for field in (rollout.attention_mask, rollout.response_mask, rollout.log_probs):
        assert not field[2].any()
    others = np.arange(24) != 2
    assert_same(*(jax.tree.map(lambda x: x[others], each) for each in (rollout, run())))


# --- what a row may depend on


def test_a_row_does_not_depend_on_its_neighbours():
    rollout = run()
    assert_array_equal(rollout.row_ids, np.arange(24))
    row_ids = np.array([17, 3, 8], np.int32)
    subset = run(PROMPTS[0][row_ids], PROMPTS[1][row_ids], row_ids=row_ids)
    assert_same(subset, jax.tree.map(lambda x: x[row_ids], rollout))


def test_answers_to_one_data_row_differ_and_are_those_of_their_places():
    same = tuple(np.repeat(x[:1], 24, axis=0) for x in PROMPTS)
    ids = np.array([4, 4, 9, 4, 9, 0] * 4)
    rollout = run(*same, row_ids=ids)
    assert_array_equal(rollout.row_ids, ids)
    assert len({tuple(row) for row in rollout.tokens.tolist()}) > 6
    # The first answer to a data row is that of the row alone, whatever rows there are.
    alone = run(same[0][:3], same[1][:3], row_ids=np.array([4, 9, 0]))
    assert_array_equal(rollout.tokens[[0, 2, 5]], alone.tokens)
    moved = run(*same, row_ids=np.full(24, 4), places=np.array([27, 28, *range(2, 24)]))
    assert moved.row_ids.tolist() == [4] * 24
    assert_array_equal(moved.tokens, run(*same, row_ids=np.array([27, 28, *range(2, 24)])).tokens)
    assert_array_equal(moved.tokens[2:], run(*same).tokens[2:])


@pytest.mark.parametrize("options", [{}, slow({"top_k": 2, "record_support": True})])
def test_the_caller_may_map_over_devices_whose_results_are_checked(options):
    """``check_vma`` of ``jax.shard_map`` refuses a loop whose state differs on the devices only at
    its end.
    """

    def sample(params, tokens, mask, key, places):
        how = {"config": config(**options), "places": places}
        return generate.__wrapped__(MODEL, params, tokens, mask, key, **how)

    rows, whole = PartitionSpec("data"), PartitionSpec()
    specs = {"in_specs": (whole, rows, rows, whole, rows), "out_specs": rows}
    mapped = jax.jit(jax.shard_map(sample, mesh=data_mesh(4), check_vma=True, **specs))
    sampled = mapped(PARAMS, *PROMPTS, KEY, np.arange(24, dtype=np.int32))
    assert_same(sampled, run(**options))


def test_a_row_does_not_depend_on_prompt_padding():
    wide = run(
        *(
            np.pad(x, ((0, 0), (5, 0)), constant_values=fill)
            for x, fill in zip(PROMPTS, (4, 0), strict=True)
        )
    )
    for field in ("tokens", "attention_mask", "response_mask", "log_probs"):
        assert_array_equal(getattr(wide, field)[:, 5:], getattr(run(), field), err_msg=field)


def test_devices_do_not_change_the_tokens():
    mesh = data_mesh(4)
    spread = generate(MODEL, PARAMS, *PROMPTS, KEY, config=config(), mesh=mesh)
    assert_same(spread, run())
    assert spread.tokens.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data")), 2)


@pytest.mark.parametrize(
    ("tensor", "mapped"), [(1, {"data", "fsdp", "tensor"}), (2, {"data", "fsdp"})]
)
def test_an_axis_of_one_device_is_mapped_by_hand_too(tensor, mapped):
    """XLA:GPU refuses cuDNN's attention where an axis is left to it beside others mapped by
    hand.
    """
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(-1, 1, tensor), ("data", "fsdp", "tensor"))
    tokens, mask = prompts(rows=4)

    def generate(params):
        key = KEY
        return sampling.generate(
            lookup_model(), params, tokens, mask, key, config=config(), mesh=mesh
        )

    equations = jax.make_jaxpr(generate)(lookup_params()).eqns
    axes = [e.params["newly_manual_axes"] for e in equations if "newly_manual_axes" in e.params]
    assert axes == [mapped]


def test_each_device_stops_by_itself():
    """Rows of the second device never end; the first device still decodes only until its own rows
    have ended.
    """
    params = lookup_params()
    params["token"][:, [1, 3]] = -100.0
    params["token"][3, 1] = 100.0  # 3 is followed by EOS, the others by neither EOS nor 3
    tokens = np.array([[3], [3], [2], [2]], np.int32)
    calls = []
    rollout = run(tokens, model=lookup_model(calls=calls), params=params, mesh=data_mesh(2))
    jax.effects_barrier()
    assert rollout.response_mask.sum(1).tolist() == [1, 1, 6, 6]
    assert len(calls) == 1 + 6


def test_uncached_equals_a_cached_model():
    """Logits by the sum of (id + 1) of all tokens that the mask shows: neither pads nor empty slots
    count.
    """

    def apply_fn(params, tokens, attention_mask, key):
        assert key is None
        logits = params["token"][jnp.sum((tokens + 1) * attention_mask, axis=1) % 5]
        return jnp.broadcast_to(logits[:, None], (*tokens.shape, 5))

    def decode(params, tokens, positions, key_mask, cache, index):
        shown = jax.lax.dynamic_slice_in_dim(key_mask, index, tokens.shape[1], axis=1)
        cache = cache + jnp.sum((tokens + 1) * shown, axis=1)
        return jnp.broadcast_to(params["token"][cache % 5][:, None], (*tokens.shape, 5)), cache

    cached = LookupModel(
        init_cache=lambda batch, length: jnp.zeros(batch, jnp.int32), decode=decode
    )
    model = sampling.uncached(apply_fn)
    assert model == sampling.uncached(apply_fn)  # jit compiles it once
    tokens, mask = prompts()
    mask[2] = 0
    expected, rollout = (run(tokens, mask, model=m) for m in (cached, model))
    assert_array_equal(rollout.tokens, expected.tokens)
    assert_allclose(rollout.log_probs, expected.log_probs, atol=1e-6)
    assert rollout.response_mask.sum() > 48


def test_one_column_prompt_equals_the_tail_of_a_longer_one():
    """P = 1 has no prefill; with the same position its result is that of a prompt padded to 3."""
    single = PROMPTS[1].sum(axis=1) == 1
    assert single.sum() > 3
    assert_array_equal(run(PROMPTS[0][:, 2:]).tokens[single], run().tokens[single, 2:])


# --- mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 9e-7}, r"temperature must be 0 \(greedy\) or at least 1e-06, got 9e-07"),
        ({"temperature": 1e-300}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-7}, "repetition_penalty"),
        ({"eos_id": -1}, "eos_id"),
        ({"pad_id": -1}, "pad_id"),
        ({"eos_id": (1, -1)}, "eos_id"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_new_tokens": 62}, ValueError, r"of 3 tokens \+ max_new_tokens 62 .* max_length 64"),
        ({"tokens": PROMPTS[0][0], "mask": PROMPTS[1][0]}, AssertionError, "has rank 1"),
        ({"tokens": PROMPTS[0][:, :0]}, AssertionError, r"dimension greater than .0. on axis .1."),
        ({"mask": PROMPTS[1][:, 1:]}, AssertionError, "different shapes"),
        ({"row_ids": np.arange(5)}, AssertionError, r"expected \(24,?\)"),
        ({"eos_id": (1, 5)}, ValueError, r"eos_id \(1, 5\) is outside the model's vocabulary of 5"),
        ({"tokens": PROMPTS[0][:6], "mesh": data_mesh(4)}, ValueError, "evenly divi"),
        ({"mesh": Mesh(np.array(jax.devices()[:2]), ("batch",))}, ValueError, "'data'"),
    ],
)
def test_generate_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        run(**changes)


def test_a_response_may_fill_the_models_last_position():
    sample = partial(sampling.generate, MODEL, config=config(max_new_tokens=61))
    assert jax.eval_shape(sample, PARAMS, *PROMPTS, KEY).tokens.shape == (24, 64)


def test_slots_of_earlier_turns_count_once():
    """As positions of the model, which has 64, and as new tokens: rows get 4 and 0 of their 6."""
    tokens = np.full((2, 64), 2, np.int32)
    mask = np.arange(64) >= np.array([[60], [60]])
    used = np.array([2, 6])
    rollout = generate(MODEL, PARAMS, tokens, mask, KEY, config=config(eos_id=None), used=used)
    assert np.asarray(rollout.response_mask).sum(axis=1).tolist() == [4, 0]


def test_prompts_padded_on_the_right_are_refused_where_their_values_are_known():
    tokens = PROMPTS[0][:3]
    mask = np.array([[0, 1, 1], [0, 0, 0], [1, 1, 0]])
    config = SamplingConfig(max_new_tokens=2, eos_id=None, pad_id=0)
    arguments = MODEL, lookup_params(), tokens, mask, KEY
    with pytest.raises(ValueError, match=r"padded on the left: .* first in row 2"):
        sampling.generate(*arguments, config=config)
    with pytest.raises(ValueError, match=r"padded on the left: .* first in row 2"):
        rollout.collect(*arguments, sampling=config, policy_fn=None)
    with pytest.raises(ValueError, match="padded on the left"):  # constants of a jit
        jax.eval_shape(lambda: sampling.generate(*arguments, config=config))
    sample = partial(sampling.generate, MODEL, config=config)
    jax.eval_shape(sample, *arguments[1:])  # traced: nothing is known


# --- best of n


OF_FOUR = prompts(4)
ROW_IDS = np.array([5, 0, 9, 2], np.int32)


GIVEN = np.array([1.0, 1.0, np.nan, -3.0, 0.0, np.inf, np.nan, np.nan], np.float32)


def given(rollout):
    return jnp.asarray(GIVEN), {"part": jnp.asarray(GIVEN)}


def best(reward_fn, n=2, prompts=OF_FOUR, row_ids=ROW_IDS):
    options = {"config": config(), "n": n, "row_ids": row_ids}
    found = best_of_n(MODEL, PARAMS, *prompts, KEY, reward_fn=reward_fn, **options)
    return jax.tree.map(np.asarray, found)


def samples_of_four():
    """Sample i is row row_id * n + i of generate."""
    sample_ids = np.array([10, 11, 0, 1, 18, 19, 4, 5])
    return run(*(np.repeat(x, 2, 0) for x in OF_FOUR), row_ids=sample_ids)


def test_the_best_of_n_has_the_largest_reward():
    samples = samples_of_four()
    lengths = samples.response_mask.sum(1).reshape(4, 2)
    dense, scores = best(lambda rollout: (jnp.where(rollout.response_mask != 0, 1.0, jnp.nan), {}))
    assert_array_equal(scores, lengths)
    longest = samples.tokens.reshape(4, 2, -1)[np.arange(4), lengths.argmax(1)]
    assert_array_equal(dense.tokens, longest)
    assert_array_equal(dense.row_ids, ROW_IDS)


def test_the_best_of_n_of_equal_prompts_are_different_samples():
    again = tuple(np.repeat(x[:1], 4, axis=0) for x in OF_FOUR)
    found, _ = best(given, prompts=again, row_ids=np.array([3] * 4))
    assert found.row_ids.tolist() == [3] * 4
    assert len({tuple(row) for row in found.tokens.tolist()}) > 1


def test_ties_and_scores_that_are_not_numbers_in_the_best_of_n():
    samples = samples_of_four()
    with_parts, scores = best(given)
    assert_array_equal(scores, GIVEN.reshape(4, 2))
    assert_array_equal(with_parts.scores, [1.0, -3.0, np.inf, np.nan])
    assert_array_equal(with_parts.tokens, samples.tokens[[0, 3, 5, 6]])

    with pytest.raises(AssertionError, match=r"shape \(3,\) but expected \(8,?\)"):
        best(lambda rollout: (jnp.zeros(3), {}))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        best(given, n=0)


def test_best_of_n_kl():
    assert sampling.best_of_n_kl(1) == 0.0
    assert sampling.best_of_n_kl(4) == pytest.approx(0.636294)
    with pytest.raises(ValueError, match="n must be at least 1"):
        sampling.best_of_n_kl(0)


def test_prompts_that_a_jit_closes_over_are_sampled_from():
    """Their mask is a constant there, and their tokens are converted inside."""
    tokens, mask = PROMPTS

    @jax.jit
    def inside(params):
        prompts = jnp.asarray(tokens), jnp.asarray(mask)
        return sampling.generate(MODEL, params, *prompts, KEY, config=config())

    assert_array_equal(inside(PARAMS).tokens, run().tokens)
