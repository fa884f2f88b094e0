"""Prompts that a group of rows shares are computed once, with the numbers of single rows."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import CONFIG, GEMMA, LLAMA, MISTRAL, slow, some_params, stack_layers
from jax.sharding import Mesh

from rlhf_jax import models, rewards, sampling
from rlhf_jax.data import batches
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.data.rows import Row
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.models.kernels import shared
from rlhf_jax.models.kernels.shared import Groups
from rlhf_jax.training.common import reward_models
from rlhf_jax.types import Rollout

P = 6
R = 5
G = 3
LONGEST = replace(CONFIG, max_length=16, num_layers=1)
SLIDING = replace(MISTRAL, num_layers=1)


def batch(seed=0, prompts=2):
    """[N G, P + R] rows of groups: prompts padded on the left, responses on the right."""
    random = np.random.default_rng(seed)
    real = random.integers(1, P + 1, prompts)
    lengths = random.integers(1, R + 1, prompts * G)
    real[0] = P
    lengths[0] = R
    tokens = random.integers(0, 13, (prompts * G, P + R))
    tokens[:, :P] = np.repeat(tokens[::G, :P], G, axis=0)
    prompt = np.arange(P)[None] >= P - np.repeat(real, G)[:, None]
    response = np.arange(R)[None] < lengths[:, None]
    mask = np.concatenate([prompt, response], axis=1).astype(np.int32)
    return tokens, mask


def params_of(config, *heads):
    params = some_params(replace(config, scan_layers=False, remat=False, attention="auto"))
    if config.scan_layers:
        params = stack_layers(params)
    for kind in heads:
        params = models.add_head(jax.random.key(3), params, kind)
        params[kind]["kernel"] = params[kind]["kernel"] + 0.1
    return params


def weighted(config, group_size, **said):
    """The output of a PolicyFn of the batch, and the gradient of a sum over its response tokens."""
    model = models.build(config)
    tokens, mask = batch()
    policy = models.policy_fn(model, 0.7, P, group_size=group_size, **said)
    is_response = (mask != 0) & (np.arange(P + R) >= P)
    weights = np.random.default_rng(1).normal(size=(3, *tokens.shape)).astype(np.float32)

    def loss(params):
        output = policy(params, tokens, mask, None)
        columns = [output.log_probs, output.entropy, output.values]
        kept = [jnp.where(is_response, column, 0.0) for column in columns]
        return jnp.sum(weights * jnp.stack(kept)), kept

    grads, kept = jax.jit(jax.grad(loss, has_aux=True))(params_of(config, "value"))
    return kept, grads


@functools.cache
def of_single_rows(config):
    return weighted(config, 1)


def assert_close(found, expected, tolerance=1e-5):
    found, expected = (map(np.asarray, jax.tree.leaves(tree)) for tree in (found, expected))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(np.abs(b).max(), 1.0))


@pytest.mark.parametrize(
    "config",
    [
        slow(LONGEST),
        slow(replace(GEMMA, scan_layers=True, remat=True, num_layers=4)),
        replace(LLAMA, num_layers=1),
        slow(replace(LLAMA, scan_layers=True, remat=True)),
        replace(SLIDING, attention="blockwise"),
    ],
)
def test_outputs_and_gradients_are_those_of_single_rows(config, monkeypatch):
    monkeypatch.setattr("rlhf_jax.models.attention.BLOCK_SCORES", 24)
    assert_close(weighted(config, G), of_single_rows(replace(config, attention="auto")))


@pytest.mark.parametrize("config", [SLIDING, slow(replace(GEMMA, scan_layers=True, num_layers=4))])
def test_cudnn_is_asked_for_the_same_values_and_gradients(config, monkeypatch):
    """Of rows by their lengths, without a mask, with an even number of columns; the call alone is
    replaced, as cuDNN needs a GPU.
    """
    original = jax.nn.dot_product_attention
    asked = set()

    def on_cpu(query, key, value, *, implementation, is_causal, **settings):
        assert implementation == "cudnn"
        assert is_causal
        assert settings.get("mask") is None
        assert len(settings["query_seq_lengths"]) == len(query)
        asked.add((query.shape[:2], key.shape[:2]))
        return original(query, key, value, implementation="xla", is_causal=True, **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    found = weighted(replace(config, attention="cudnn"), G, one_text=True)
    assert asked == {((2 * G, P + R + 1), (2 * G, P + R + 1))}
    assert_close(found, of_single_rows(config))


@pytest.mark.parametrize("name", ["auto", "xla", "blockwise"])
def test_groups_that_read_no_lengths_compute_the_same_bits(name):
    model = models.build(replace(LONGEST, attention=name))
    arguments = (params_of(LONGEST), *batch(), None)
    programs = [
        str(jax.make_jaxpr(models.policy_fn(model, 0.7, P, group_size=G, **said))(*arguments))
        for said in ({}, {"one_text": True})
    ]
    assert programs[0] == programs[1]


def test_how_long_groups_attend(monkeypatch):
    config = models.GPT2Config(13, 2048, 128, 1, 2, compute_dtype="bfloat16")
    assert shared.is_plain(config, 511)
    assert not shared.is_plain(config, 512)
    assert shared.is_plain(replace(config, attention="xla"), 512)
    assert not shared.is_plain(replace(config, attention="splash"), 511)


def test_a_prompt_is_embedded_and_goes_through_the_layers_once():
    model = models.build(LONGEST)
    params = params_of(LONGEST)
    tokens, mask = batch()
    policy = models.policy_fn(model, prompt_length=P, group_size=G)
    text = str(jax.make_jaxpr(policy)(params, tokens, mask, None))
    packed = f"f32[2,{P + G * R},8]"
    assert packed in text
    assert f"[{2 * G},{P + R},8]" not in text


def score_batch():
    """A batch whose third row is scored at the last token of its prompt."""
    tokens, mask = batch(1)
    mask[2, P:] = 0
    return tokens, mask


@functools.cache
def scores(config, group_size):
    """The gradient of a weighted sum of scores, and the scores."""
    score = models.score_fn(models.build(config), prompt_length=P, group_size=group_size)
    tokens, mask = score_batch()

    def total(params):
        of_rows = score(params, tokens, mask, None)
        return jnp.sum(of_rows * np.arange(1.0, 7.0)), of_rows

    return jax.jit(jax.grad(total, has_aux=True))(params_of(config, "score"))


@pytest.mark.parametrize("config", [LONGEST, slow(GEMMA)])
def test_scores_are_those_of_single_rows(config):
    assert_close(scores(config, G), scores(config, 1), 5e-5)  # the gradients cancel


def test_a_reward_model_computes_the_prompts_of_a_rollout_once():
    model = models.build(LONGEST)
    params = params_of(LONGEST, "score")
    tokens, mask = map(jnp.asarray, score_batch())
    responses = mask * (np.arange(P + R)[None] >= P)
    rollout = Rollout(tokens, mask, responses, mask, prompt_length=P, group_size=G)
    in_groups = functools.partial(models.score_fn, model)
    reward = rewards.from_model(models.score_fn(model), params, in_groups)
    program = jax.jit(reward).trace(rollout)
    assert f"f32[2,{P + G * R},8]" in str(program.jaxpr)
    found, _ = program.lower().compile()(rollout)
    _, expected = scores(LONGEST, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    _, in_groups = reward_models.scorers(model, G)
    by_rows = in_groups(prompt_length=P, group_size=G)
    found = jax.jit(by_rows)(params, tokens, mask, None)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("columns", [slow(None), slice(P + 1, P + R), slow(slice(1, 7))])
def test_all_columns_that_are_asked_for(columns):
    config = replace(GEMMA, num_layers=1)
    model = models.build(config)
    params = params_of(config)
    tokens, mask = batch()
    hidden = functools.partial(model.hidden, key=None, columns=columns)
    found = jax.jit(functools.partial(hidden, groups=Groups(P, G)))(params, tokens, mask)
    expected = jax.jit(hidden)(params, tokens, mask)
    real = mask[:, columns or slice(None)] != 0
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)


@pytest.mark.slow
def test_adapters_a_teacher_and_a_whole_value_model():
    config = replace(LLAMA, num_layers=1)
    model = models.build(config)
    base = params_of(config)
    adapters = models.lora.init(jax.random.key(5), base, 2)
    adapters = jax.tree.map(lambda x: np.asarray(x) + 0.1, adapters)
    params = {"policy": models.lora.attach(base, adapters), "value": params_of(config, "value")}
    tokens, mask = batch()

    def squared(logits, *, teacher_logits):
        return jnp.sum((logits - teacher_logits) ** 2, axis=-1)

    teacher = models.Teacher(model, squared)

    def output(group_size):
        policy = models.policy_fn(model, 1.0, P, model, teacher=teacher, group_size=group_size)
        found = jax.jit(policy)(params, tokens, mask, None, base)
        return jax.tree.map(lambda x: jnp.where(mask != 0, x, 0.0), found)

    found = output(G)
    assert found.divergence is not None
    assert found.values is not None
    assert_close(found, output(1), 2e-5)


@pytest.mark.slow
def test_bfloat16_rounds_as_single_rows_do():
    config = replace(LLAMA, compute_dtype="bfloat16")
    found, _ = weighted(config, G)
    expected, _ = weighted(config, 1)
    exact, _ = weighted(LLAMA, 1)
    for a, b, c in zip(found, expected, exact, strict=True):
        error = jnp.max(jnp.abs(b - c))
        assert 0 < jnp.max(jnp.abs(a - c)) < 2 * error + 1e-3


@pytest.mark.slow
def test_with_dropout_each_row_is_computed_by_itself():
    config = replace(LONGEST, residual_dropout=0.5)
    model = models.build(config)
    params = params_of(config)
    tokens, mask = batch()
    key = jax.random.key(0)
    found = models.policy_fn(model, prompt_length=P, group_size=G)(params, tokens, mask, key)
    expected = models.policy_fn(model, prompt_length=P)(params, tokens, mask, key)
    np.testing.assert_array_equal(found.log_probs, expected.log_probs)


def test_packing_by_hand():
    groups = Groups(2, 2)
    rows = np.array([[1, 2, 3, 4], [1, 2, 5, 6]])

    @jax.jit
    def arranged(rows, columns):
        packed = groups.packed(rows)
        back = groups.unpacked(packed, 2), groups.unpacked(packed[:, 1:], 1)
        return packed, *back, groups.places(columns, 4)

    found = arranged(rows, np.array([[1, 3], [2, 0]]))
    expected = ([[1, 2, 3, 4, 5, 6]], rows, rows[:, 1:], [[1, 3, 4, 0]])
    jax.tree.map(np.testing.assert_array_equal, found, tuple(map(np.array, expected)))


def test_a_part_that_no_query_reaches_adds_nothing():
    joined = jax.jit(shared.joined)

    def part(weighted, highest, total):
        rows = (np.full((1, 2), weighted), np.full((1, 1), highest), np.full((1, 1), total))
        return shared.Part(*map(np.float32, rows))

    near = part(3.0, 0.0, 2.0)
    np.testing.assert_array_equal(joined(near, part(1.0, -1e30, 1.0)), [[1.5, 1.5]])
    np.testing.assert_array_equal(joined(near, part(1.0, 0.0, 2.0)), [[1.0, 1.0]])


@pytest.mark.parametrize(
    ("settings", "message"), [((0, 2), "prompt_length"), ((4, 0), "at least 1")]
)
def test_wrong_groups_are_refused(settings, message):
    prompt_length, group_size = settings
    with pytest.raises(ValueError, match=message):
        models.score_fn(models.build(LLAMA), prompt_length=prompt_length, group_size=group_size)


# --- Sampling


SAMPLING = sampling.SamplingConfig(R, eos_id=1, pad_id=0)


def prompts_of():
    tokens, mask = batch(2, 4)
    return tokens[:, :P], mask[:, :P]


@functools.cache
def sampled(config, **how):
    inputs = (params_of(config), *prompts_of(), jax.random.key(4))
    generate = functools.partial(sampling.generate, models.build(config), config=SAMPLING)
    return jax.jit(functools.partial(generate, **how))(*inputs)


@pytest.mark.parametrize("config", [SLIDING, slow(GEMMA)])
def test_samples_of_groups_are_those_of_single_rows(config):
    found = sampled(config, group_size=G)
    expected = sampled(config)
    assert len(set(map(bytes, np.asarray(expected.tokens[:G, P:])))) > 1
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.response_mask, expected.response_mask)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)


def test_a_prompt_is_decoded_and_cached_once():
    model = models.build(LONGEST)
    params = params_of(LONGEST)
    start = jax.eval_shape(
        lambda: sampling.decoding.start(
            model,
            params,
            *prompts_of(),
            jax.random.key(0),
            max_new_tokens=R,
            pad_id=0,
            places=jnp.arange(4 * G),
            used=jnp.zeros(4 * G, jnp.int32),
            group_size=G,
        )
    )
    rows, loop = start
    _, values = rows.prompts.cache[0]
    assert values.shape == (4, 2, P - 1, 4)
    _, values = loop.cache[0]
    assert values.shape == (4 * G, 2, 1 + R, 4)


def test_groups_that_devices_divide_are_run_row_by_row():
    mesh = Mesh(np.array(jax.devices()[:3]), ("data",))  # four rows each
    found = sampled(SLIDING, mesh=mesh, group_size=G)
    np.testing.assert_array_equal(found.tokens, sampled(SLIDING).tokens)


def test_a_language_model_keeps_groups_whole_in_its_batches():
    policy = LanguageModel(models.build(SLIDING), params_of(SLIDING), None)
    tokens, mask = prompts_of()
    prompts = EncodedPrompts(tokens[::G], mask[::G], [Row("", (), "")] * (len(tokens) // G), (), {})
    how = {"numbers": np.repeat(np.arange(len(prompts)), G), "batch_size": 7}  # 6 rows at once
    found, _ = policy.respond(prompts, jax.random.key(4), config=SAMPLING, **how)
    np.testing.assert_array_equal(found.tokens, sampled(SLIDING).tokens)


def test_groups_of_different_prompts_are_refused():
    tokens, mask = prompts_of()
    model = models.build(LONGEST)
    for rows, message in ((np.arange(12) ^ 1, "from row 0"), (np.arange(10), "10 prompts")):
        inputs = (model, {}, tokens[rows], mask[rows], jax.random.key(0))
        with pytest.raises(ValueError, match=message):
            sampling.generate(*inputs, config=SAMPLING, group_size=G)


@pytest.mark.parametrize(
    ("numbers", "length"), [([4, 4, 2, 2], 2), ([4, 4, 2], 1), ([3], 1), ([5, 5, 5], 3)]
)
def test_runs_of_equal_numbers(numbers, length):
    assert batches.run_length(np.array(numbers)) == length
