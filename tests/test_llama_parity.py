"""Llama against transformers on torch: logits, greedy tokens, scores, and folders both ways, on random tiny weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models_parity import left_padded, torch_forward

from rlhf_jax import models, sampling

pytestmark = pytest.mark.parity

BASE = {
    "vocab_size": 31,
    "max_position_embeddings": 64,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2, "rms_norm_eps": 1e-2},
    "one key head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 6, "hidden_act": "gelu"},
    "llama3": {"rope_parameters": LLAMA3, "num_key_value_heads": 2},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
}


def torch_model(kind, **changes):
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.LlamaConfig(**{**BASE, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if "norm" in name else 0.3))
    return model


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers(tmp_path, changes):
    reference = torch_model("LlamaForCausalLM", **changes)
    reference.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens, mask = left_padded()
    expected = torch_forward(reference, tokens, mask)
    for scan_layers in (False, True):
        model, params = models.load(tmp_path, scan_layers=scan_layers)
        logits = jax.jit(model.apply)(params, tokens, mask)
        assert np.std(expected[mask == 1]) > 0.9
        np.testing.assert_allclose(np.asarray(logits)[mask == 1], expected[mask == 1], atol=2e-4)


def test_greedy_equals_transformers_generate(tmp_path):
    import torch

    reference = torch_model("LlamaForCausalLM", **CONFIGS["llama3"])
    reference.save_pretrained(tmp_path)
    tokens, mask = left_padded()
    expected = reference.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(mask), max_new_tokens=16, do_sample=False
    ).numpy()
    model, params = models.load(tmp_path)
    config = sampling.SamplingConfig(max_new_tokens=16, temperature=0.0, eos_id=1, pad_id=0)
    result = sampling.generate(model, params, jnp.asarray(tokens), jnp.asarray(mask), jax.random.key(0), config=config)
    np.testing.assert_array_equal(np.asarray(result.tokens)[:, : expected.shape[1]], expected)
    assert not np.asarray(result.tokens)[:, expected.shape[1] :].any()


@pytest.mark.parametrize("tied", [False, True])
def test_scores_equal_transformers_classifier(tmp_path, tied):
    reference = torch_model("LlamaForSequenceClassification", num_labels=1, tie_word_embeddings=tied)
    reference.save_pretrained(tmp_path)
    model, params = models.load(tmp_path)
    tokens, mask = left_padded()
    scores = models.score_fn(model)(params, tokens, mask, None)
    np.testing.assert_allclose(scores, torch_forward(reference, tokens, mask)[:, 0], atol=2e-4)


@pytest.mark.parametrize("name", ["plain", "one key head, tied", "biases, wide heads", "llama3"])
@pytest.mark.parametrize("score", [False, True], ids=["language model", "reward model"])
def test_saved_folder_loads_bit_equal_in_transformers(tmp_path, name, score):
    import transformers

    kind = "LlamaForSequenceClassification" if score else "LlamaForCausalLM"
    torch_model("LlamaForCausalLM", **CONFIGS[name]).save_pretrained(tmp_path / "first")
    model, params = models.load(tmp_path / "first")
    if score:
        params = models.add_head(jax.random.key(0), params, "score")
    models.save(tmp_path / "ours", model, params)
    loaded, report = getattr(transformers, kind).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, mask = left_padded()
    found = torch_forward(loaded.eval(), tokens, mask)
    if score:
        expected = models.score_fn(model)(params, tokens, mask, None)
        np.testing.assert_allclose(found[:, 0], expected, atol=2e-4)
        return
    logits = np.asarray(model.apply(params, tokens, mask))
    np.testing.assert_allclose(logits[mask == 1], found[mask == 1], atol=2e-4)
    loaded.save_pretrained(tmp_path / "theirs")
    _, again = models.load(tmp_path / "theirs")
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), params, again))
