"""Frozen kernels of few bits: levels and scales by hand, errors, bytes, and what models compute."""

import json
import typing
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import CONFIG, LLAMA, MORE, initial_params, some_params, some_tokens
from flax.traverse_util import flatten_dict
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import models, sharding
from rlhf_jax.cli.planning import shapes
from rlhf_jax.config import LoRA, RLStage, RunConfig
from rlhf_jax.models import lora
from rlhf_jax.models.kernels import quantization
from rlhf_jax.training.common import memory

LEVELS = np.array(quantization.NF4, np.float32)
held_as = jax.jit(quantization.quantized, static_argnums=(1, 2))
dequantized = jax.jit(quantization.dequantized, static_argnums=1)


def test_the_levels_of_nf4_are_exact_and_each_block_has_its_own_scale():
    """80 weights of a column: a block of 64 and one of 16. The second column is 0."""
    first = 3 * np.tile(LEVELS, 4)
    second = -0.5 * LEVELS
    column = np.concatenate([first, second])
    kernel = np.stack([column, 0 * column], axis=1)
    held = held_as(kernel, 0, "nf4")
    assert held["kernel"].dtype == jnp.uint4
    assert_array_equal(np.asarray(held["kernel"])[:64, 0], np.tile(np.arange(16), 4))
    assert_array_equal(held["block_scale"], [[3.0, 1.0], [0.5, 1.0]])
    found = np.asarray(dequantized(held, 0))
    assert_array_equal(found[:64], kernel[:64])
    # No level is the opposite of another, but for 0 and 1: -x of .5 * 0.0796 becomes -0.0911.
    assert_array_equal(found[64:, 0][[0, 7, 15]], [0.5, 0.0, -0.5])
    assert_array_equal(found[64:, 0][8], 0.5 * LEVELS[6])
    assert_array_equal(found[:, 1], 0)


def test_numbers_of_int4_are_sixteen_and_the_largest_is_half_a_step_away():
    column = np.zeros((64, 1))
    column[:6, 0] = [-15.0, 15.0, 1.2, -2.6, 13.1, 0.9]  # the scale is 15 / 7.5
    held = held_as(column, 0, "int4")
    assert held["kernel"].dtype == jnp.int4
    assert_array_equal(np.asarray(held["kernel"])[:6, 0].astype(int), [-8, 7, 1, -1, 7, 0])
    assert_array_equal(held["block_scale"], [[2.0]])
    assert_array_equal(np.asarray(dequantized(held, 0))[:6, 0], [-16, 14, 2, -2, 14, 0])


# The largest error, in units of the largest weight of a block or column; bits of a weight.
FORMS = {
    "bfloat16": (2**-8, 16),
    "int8": (0.5 / 127, 8),
    "int4": (1 / 15, 4),
    "nf4": (float(np.diff(LEVELS).max() / 2), 4),
}


@pytest.mark.parametrize("form", FORMS)
def test_no_weight_is_further_than_half_the_widest_gap(form):
    """Of 2 experts, 100 inputs, outputs [3, 5]."""
    bound, bits = FORMS[form]
    kernel = np.random.default_rng(0).normal(size=(2, 100, 3, 5)).astype(np.float32)
    held = held_as(kernel, 1, form)
    assert jax.dtypes.itemsize_bits(held["kernel"].dtype) == bits
    assert held["kernel"].shape == kernel.shape
    error = np.abs(np.asarray(dequantized(held, 1), np.float32) - kernel)
    blocks = [slice(0, 64), slice(64, 100)] if bits == 4 else [slice(0, 100)]
    for block in blocks:
        largest = np.abs(kernel[:, block]).max(1, keepdims=True)
        assert (error[:, block] <= bound * largest + 1e-6).all()
    assert error.max() > 0.7 * bound


def test_the_setting_has_all_forms():
    hints = typing.get_type_hints(LoRA)["base"]
    forms, _ = typing.get_args(hints)
    assert forms == quantization.Form
    assert FORMS.keys() == set(typing.get_args(forms))


MODELS = {
    "gpt2 scanned": replace(CONFIG, num_layers=2, scan_layers=True),
    "experts": replace(MORE["mixtral"], scan_layers=True),
}
TOKENS = some_tokens(2, 8)
quantized = jax.jit(lora.quantized, static_argnames="form")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_its_base_of_4_bits_holds(name):
    """Also beside adapters, in their gradients, and in decoding."""
    config = MODELS[name]
    model = models.build(config)
    params = some_params(config)
    held = quantized(params, "nf4")
    match = "attn|mlp|experts" if name == "experts" else "attn|mlp"
    adapters = lora.init(jax.random.key(1), params, 2, match)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    plain = jax.jit(lora.merge)(held, {})
    assert jax.tree.structure(plain) == jax.tree.structure(params)

    @jax.jit
    def logits_and_gradients(base):
        def loss(adapters):
            logits = model.apply(lora.attach(base, adapters), TOKENS)
            return jnp.mean(jax.nn.log_softmax(logits)[..., 0]), logits

        return jax.grad(loss, has_aux=True)(adapters)

    found = logits_and_gradients(held)
    expected = logits_and_gradients(plain)
    jax.tree.map(partial(assert_allclose, rtol=1e-4, atol=1e-5), found, expected)
    assert np.abs(found[1] - logits_and_gradients(params)[1]).max() > 1e-3


def test_decoding_keeps_a_base_of_4_bits():
    config = replace(LLAMA, num_layers=1, compute_dtype="bfloat16")
    held = jax.eval_shape(lambda params: quantized(params, form="nf4"), some_params(config))
    layer = jax.eval_shape(models.build(config).for_decoding, held)["h_0"]["mlp"]["up_proj"]
    assert layer["kernel"].dtype == jnp.uint4
    assert layer["block_scale"].dtype == jnp.float32


WIDE = replace(LLAMA, hidden_size=128, intermediate_size=128, num_layers=1, initializer_range=0.1)


@pytest.mark.slow
def test_fewer_bits_change_the_distribution_more():
    """KL of the next token from the original model's, in nats a token."""
    model = models.build(WIDE)
    params = initial_params(model, seed=2)
    tokens = some_tokens(64, 8)

    @jax.jit
    def log_probs(params):
        return jax.nn.log_softmax(model.apply(params, tokens))

    whole = np.asarray(log_probs(params))

    @partial(jax.jit, static_argnums=0)
    def held(form):
        return lora.merge(lora.quantized(params, form), {})

    def kl(form):
        return np.mean(np.sum(np.exp(whole) * (whole - log_probs(held(form))), axis=-1))

    found = {form: kl(form) for form in ("int8", "int4", "nf4")}
    assert found["int8"] < 0.1 * found["nf4"]
    assert found["nf4"] < found["int4"] < 0.1


@pytest.mark.slow
def test_a_base_of_4_bits_is_cut_over_a_mesh():
    """Kernels of 128 x 128, of two blocks, on 2 x 2 devices: no device has whole kernels or scales,
    and the logits are the same.
    """
    model = models.build(WIDE)
    held = quantized(some_params(WIDE), "nf4")
    expected = jax.jit(model.apply)(held, TOKENS)
    mesh = sharding.make_mesh(1, fsdp=2, tensor=2)
    cut = jax.device_put(held, sharding.by_path(held, models.SHARDING, mesh))
    for path, leaf in flatten_dict(cut).items():
        if path[-1] in ("kernel", "block_scale"):
            assert leaf.addressable_shards[0].data.size == leaf.size // 4, path
    with jax.set_mesh(mesh):
        assert_allclose(jax.jit(model.apply)(cut, TOKENS), expected, atol=2e-5)


def test_a_plan_counts_the_bits_of_a_base(tmp_path):
    """A Llama of one layer: 4.5 bits of a kernel's weight in nf4, 16 of the other parameters."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 300}
    keys = {"model_type": "llama", "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(sizes | keys | {"dtype": "bfloat16"}))
    stage = RLStage(batch_size=8, max_prompt_length=2, max_new_tokens=2)
    config = RunConfig(model=str(tmp_path), reward=("length",), rl=stage)

    def held(base):
        settings = replace(config, lora=LoRA(rank=2, base=base))
        return memory.on_device(shapes.shapes_of(settings, "grpo")[0]["frozen weights"])

    kernels = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    others = held(None) - 2 * kernels
    assert held("nf4") == kernels * 4.5 / 8 + others


@pytest.mark.slow
def test_a_step_holds_the_weights_of_one_layer():
    """With stacked layers the weights are made again for the gradient, not held for each layer."""
    config = replace(LLAMA, hidden_size=128, intermediate_size=256, num_layers=9, scan_layers=True)
    model = models.build(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    kernels = [leaf for path, leaf in flatten_dict(params).items() if path[-1] == "kernel"]
    weights = sum(leaf.size for leaf in kernels)

    def temporary(form):
        base = jax.eval_shape(partial(lora.quantized, form=form), params)
        adapters = jax.eval_shape(partial(lora.init, rank=1), jax.random.key(1), params)

        def loss(adapters, base):
            return jnp.mean(model.apply(lora.attach(base, adapters), TOKENS[:1, :2]))

        program = jax.jit(jax.grad(loss)).lower(adapters, base).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary("int8") < 1.5 * weights  # of 4 bytes they would be 4 times as much
    assert temporary("nf4") < 2.5 * weights
