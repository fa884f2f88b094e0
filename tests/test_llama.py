"""Llama: rotary frequencies by hand, grouped heads against repeated ones, config.json, folders."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import ATOL, LLAMA, some_tokens, tiny

from rlhf_jax import models
from rlhf_jax.errors import UserError
from rlhf_jax.models import llama, stack

LLAMA3 = models.RopeScaling("llama3", 8.0, 1.0, 4.0, 64)


def test_frequencies_by_hand():
    # Dh = 8, theta = 10000: 10000 ** -(0, 1/4, 1/2, 3/4). 64 tokens hold 10.19, 1.019, .1019 and .01019 waves: above 4
    # is kept, below 1 divided by 8, and 1.019 is (1.019 - 1) / 3 = .6197% kept.
    plain, kept = np.array([1.0, 0.1, 0.01, 0.001]), (64 * 0.1 / (2 * math.pi) - 1) / 3
    for scaling, expected in (
        (None, plain),
        (models.RopeScaling("linear", 4.0), plain / 4),
        (LLAMA3, [1.0, 0.1 * kept + 0.1 / 8 * (1 - kept), 0.01 / 8, 0.001 / 8]),
    ):
        config = dataclasses.replace(LLAMA, head_dim=8, rope_scaling=scaling)
        np.testing.assert_allclose(llama.frequencies(config), expected, rtol=1e-6)


def test_rotation_by_hand():
    """(x, y) turned by an angle a is (x cos a - y sin a, y cos a + x sin a)."""
    angle = jnp.full((1, 1, 1, 2), 0.3)
    turned = stack.rotate(jnp.array([[[[1.0, 2.0]]]]), (jnp.cos(angle), jnp.sin(angle)))
    expected = [math.cos(0.3) - 2 * math.sin(0.3), 2 * math.cos(0.3) + math.sin(0.3)]
    np.testing.assert_allclose(turned[0, 0, 0], expected, rtol=1e-6)


def test_the_order_of_two_tokens_shows_in_what_follows_them():
    model, params = tiny(LLAMA)
    tokens = some_tokens(2, 5)
    logits, swapped = (np.asarray(model.apply(params, ids))[:, 2:] for ids in (tokens, tokens[:, [1, 0, 2, 3, 4]]))
    assert np.abs(swapped - logits).max() > 1e-2


def test_grouped_heads_are_heads_whose_keys_are_shared():
    model, params = tiny(LLAMA)
    whole, _ = tiny(LLAMA, num_kv_heads=4)

    def repeated(path, leaf):  # [D, 2 Dh] -> [D, 4 Dh], each head twice
        is_shared = any(part.key in ("k_proj", "v_proj") for part in path)
        return jnp.repeat(leaf.reshape(8, 2, 2), 2, axis=1).reshape(8, 8) if is_shared else leaf

    wide, tokens = jax.tree_util.tree_map_with_path(repeated, params), some_tokens(2, 6)
    np.testing.assert_allclose(model.apply(params, tokens), whole.apply(wide, tokens), atol=ATOL)


EVERYTHING = {"attention_bias": True, "mlp_bias": True, "head_dim": 6, "rope_scaling": LLAMA3, "eos_token_id": (3, 4)}
OPTIONS = {
    "tied and scanned": {"tie_embeddings": True, "scan_layers": True},
    "everything": EVERYTHING,
    "linear": {"rope_scaling": models.RopeScaling("linear", 2.0), "rope_theta": 5e5},
}


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_a_saved_folder_comes_back_bit_equal(changes, tmp_path):
    model = models.build(dataclasses.replace(LLAMA, **changes))
    params = model.init(jax.random.key(0))
    models.save(tmp_path, model, params)
    again, loaded = models.load(tmp_path, scan_layers=model.config.scan_layers)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_reward_model_has_no_output_table(tmp_path):
    model, params = tiny(LLAMA)
    params = models.add_head(jax.random.key(1), params, "score")
    models.save(tmp_path, model, params)
    loaded = models.load(tmp_path)[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, {key: params[key] for key in params.keys() - {"lm_head"}})


@pytest.fixture
def folder(tmp_path):
    """Makes a folder whose config.json has these keys and those of the model's sizes; the weights stay."""
    models.save(tmp_path, *tiny(LLAMA))
    names = ["vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"]
    keys = json.loads((tmp_path / "config.json").read_text())
    sizes = {name: keys[name] for name in (*names, "model_type", "num_key_value_heads", "intermediate_size")}

    def make(**changes):
        (tmp_path / "config.json").write_text(json.dumps(sizes | changes))
        return tmp_path

    return make


def test_both_forms_of_the_rotary_keys_are_read(folder):
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"original_max_position_embeddings": 64}
    # JSON does not tell 0 from 0.0.
    for keys, expected in (
        ({}, (1e4, None, 1e-6)),
        ({"rope_theta": 500.0, "rope_scaling": scaled}, (500.0, LLAMA3, 1e-6)),
        ({"rope_parameters": {"rope_theta": 500.0, **scaled}}, (500.0, LLAMA3, 1e-6)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, (1e4, models.RopeScaling("linear", 2), 1e-6)),
        ({"rms_norm_eps": 0}, (1e4, None, 0.0)),
    ):
        config = models.load(folder(**keys))[0].config
        assert (config.rope_theta, config.rope_scaling, config.rms_norm_epsilon) == expected
        assert isinstance(config.rms_norm_epsilon, float)
        assert not config.tie_embeddings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "rope_parameters.rope_type is 'yarn'; the supported"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "rope_scaling.low_freq_factor is None, expected a number"),
        ({"rope_theta": "1"}, "rope_theta is '1', expected a number"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor changes the logits"),
        ({"rope_parameters": [1]}, "rope_parameters is [1], expected an object"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 3}, "even head_dim, got 3"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
    ],
)
def test_keys_that_change_logits_are_refused_by_name(folder, changes, message):
    with pytest.raises(UserError) as refused:
        models.load(folder(**changes))
    assert message in str(refused.value)
