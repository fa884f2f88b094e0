"""Llama: rotary frequencies by hand, grouped heads against repeated ones, config.json, folders."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import LLAMA as CONFIG
from test_models import perturbed, some_tokens

from rlhf_jax import models
from rlhf_jax.errors import UserError
from rlhf_jax.models import llama, stack

LLAMA3 = models.RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
ATOL = 1e-5


def tiny(**changes):
    model = models.build(dataclasses.replace(CONFIG, **changes))
    return model._replace(apply=jax.jit(model.apply)), perturbed(model.init(jax.random.key(0)))


def test_frequencies_by_hand():
    # Dh = 8, theta = 10000: 10000 ** -(0, 1/4, 1/2, 3/4).
    config = dataclasses.replace(CONFIG, head_dim=8)
    plain = [1.0, 0.1, 0.01, 0.001]
    np.testing.assert_allclose(llama.frequencies(config), plain, rtol=1e-6)
    linear = dataclasses.replace(config, rope_scaling=models.RopeScaling("linear", 4.0))
    np.testing.assert_allclose(llama.frequencies(linear), np.array(plain) / 4, rtol=1e-6)
    # 64 tokens hold 10.19, 1.019, .1019 and .01019 waves: above 4 is kept, below 1 divided by 8, and 1.019 is
    # (1.019 - 1) / 3 = .6197% kept.
    kept = (64 * 0.1 / (2 * math.pi) - 1) / 3
    expected = [1.0, 0.1 * kept + 0.1 / 8 * (1 - kept), 0.01 / 8, 0.001 / 8]
    np.testing.assert_allclose(llama.frequencies(dataclasses.replace(config, rope_scaling=LLAMA3)), expected, rtol=1e-6)


def test_rotation_by_hand():
    """(x, y) turned by an angle a is (x cos a - y sin a, y cos a + x sin a)."""
    angle = jnp.full((1, 1, 1, 2), 0.3)
    turned = stack.rotate(jnp.array([[[[1.0, 2.0]]]]), (jnp.cos(angle), jnp.sin(angle)))
    expected = [math.cos(0.3) - 2 * math.sin(0.3), 2 * math.cos(0.3) + math.sin(0.3)]
    np.testing.assert_allclose(turned[0, 0, 0], expected, rtol=1e-6)


def test_the_order_of_two_tokens_shows_in_what_follows_them():
    model, params = tiny()
    tokens = some_tokens(2, 5)
    logits, swapped = (np.asarray(model.apply(params, ids))[:, 2:] for ids in (tokens, tokens[:, [1, 0, 2, 3, 4]]))
    assert np.abs(swapped - logits).max() > 1e-2


def test_grouped_heads_are_heads_whose_keys_are_shared():
    model, params = tiny()
    whole, _ = tiny(num_kv_heads=4)

    def repeated(kernel):  # [D, 2 Dh] -> [D, 4 Dh], each head twice
        return jnp.repeat(kernel.reshape(8, 2, 2), 2, axis=1).reshape(8, 8)

    wide = {}
    for name, leaf in params.items():
        wide[name] = leaf
        if name.startswith("h_"):
            shared = {part: {"kernel": repeated(leaf["attn"][part]["kernel"])} for part in ("k_proj", "v_proj")}
            wide[name] = {**leaf, "attn": {**leaf["attn"], **shared}}
    tokens = some_tokens(2, 6)
    np.testing.assert_allclose(model.apply(params, tokens), whole.apply(wide, tokens), atol=ATOL)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "scan_layers": True},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 6, "rope_scaling": LLAMA3, "eos_token_id": (3, 4)},
        {"rope_scaling": models.RopeScaling("linear", 2.0), "rope_theta": 5e5},
    ],
    ids=["plain", "tied", "everything", "linear"],
)
def test_a_saved_folder_comes_back_bit_equal(changes, tmp_path):
    model, params = tiny(**changes)
    models.save(tmp_path, model, params)
    again, loaded = models.load(tmp_path, scan_layers=model.config.scan_layers)
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), params, loaded))


def test_a_reward_model_has_no_output_table(tmp_path):
    model, params = tiny()
    params = models.add_head(jax.random.key(1), params, "score")
    models.save(tmp_path, model, params)
    _, loaded = models.load(tmp_path)
    assert loaded.keys() == params.keys() - {"lm_head"}
    tokens = some_tokens(2, 5)
    score = models.score_fn(model)
    np.testing.assert_allclose(
        score(loaded, tokens, np.ones((2, 5)), None), score(params, tokens, np.ones((2, 5)), None), rtol=1e-6
    )


KEYS = {
    "model_type": "llama",
    "vocab_size": 13,
    "max_position_embeddings": 16,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
}
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path):
    """Makes a folder whose config.json has other keys; the weights stay."""
    model, params = tiny()

    def make(keys):
        models.save(tmp_path, model, params)
        (tmp_path / "config.json").write_text(json.dumps(keys))
        return tmp_path

    return make


def test_both_forms_of_the_rotary_keys_are_read(folder):
    of_4 = models.load(folder({**KEYS, "rope_theta": 500.0, "rope_scaling": SCALED}))[0].config
    of_5 = models.load(folder({**KEYS, "rope_parameters": {"rope_theta": 500.0, **SCALED}}))[0].config
    older = models.load(folder({**KEYS, "rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 2}}))[0].config
    assert of_4 == of_5
    assert (of_4.rope_theta, of_4.rope_scaling) == (500.0, LLAMA3)
    assert older.rope_scaling == models.RopeScaling("linear", 2)
    integers = models.load(folder({**KEYS, "rms_norm_eps": 0}))[0].config  # JSON does not tell 0 from 0.0
    assert isinstance(integers.rms_norm_epsilon, float)
    bare = models.load(folder(KEYS))[0].config
    assert (bare.rope_theta, bare.rope_scaling, bare.rms_norm_epsilon, bare.tie_embeddings) == (1e4, None, 1e-6, False)


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
    ],
)
def test_keys_that_change_logits_are_refused_by_name(folder, changes, message):
    with pytest.raises(UserError) as refused:
        models.load(folder({**KEYS, **changes}))
    assert message in str(refused.value)


def test_a_tied_config_refuses_two_tables(folder):
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        models.load(folder({**KEYS, "tie_word_embeddings": True}))
