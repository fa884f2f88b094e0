"""GPT-2 against transformers on torch: logits, scores, and folders both ways, on random tiny weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models

pytestmark = pytest.mark.parity

BASE = {"vocab_size": 31, "n_positions": 24, "n_embd": 16, "n_layer": 3, "n_head": 4}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
CONFIGS = {
    "gelu_new": {},
    "gelu": {"activation_function": "gelu", "n_inner": 20},
    "relu": {"activation_function": "relu", "layer_norm_epsilon": 0.1},
    "silu": {"activation_function": "silu", "scale_attn_weights": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "unscaled by layer": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
}


def torch_model(kind, **changes):
    """A transformers model whose weights are large enough for every option to show in the logits."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.GPT2Config(**{**BASE, **IDS, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if "ln_" in name else 0.3))
    return model


def left_padded(batch=4, length=12):
    """Tokens without the pad id, and a mask with 0, 3, 6, ... pads on the left."""
    tokens = np.random.default_rng(0).integers(3, BASE["vocab_size"], (batch, length))
    mask = (np.arange(length)[None, :] >= 3 * np.arange(batch)[:, None]).astype(np.int32)
    return np.where(mask, tokens, IDS["pad_token_id"]), mask


def torch_forward(model, tokens, mask):
    import torch

    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)
        ).logits.numpy()


def torch_tensors(model):
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_equal_transformers(tmp_path, changes):
    reference = torch_model("GPT2LMHeadModel", **changes)
    reference.save_pretrained(tmp_path)
    tokens, mask = left_padded()
    expected = torch_forward(reference, tokens, mask)
    for scan_layers in (False, True):
        model, params = models.load(tmp_path, scan_layers=scan_layers)
        logits = jax.jit(model.apply)(params, tokens, mask)
        assert np.std(expected[mask == 1]) > 1.0
        np.testing.assert_allclose(np.asarray(logits)[mask == 1], expected[mask == 1], atol=2e-4)


def test_scores_equal_transformers_classifier(tmp_path):
    reference = torch_model("GPT2ForSequenceClassification", num_labels=1)
    reference.save_pretrained(tmp_path)
    model, params = models.load(tmp_path)
    tokens, mask = left_padded()
    scores = models.score_fn(model)(params, tokens, mask, None)
    np.testing.assert_allclose(scores, torch_forward(reference, tokens, mask)[:, 0], atol=2e-4)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_saved_folder_loads_bit_equal_in_transformers(tmp_path, scan_layers):
    import transformers

    config = models.GPT2Config(31, 24, 16, 3, 4, pad_token_id=0, eos_token_id=1, scan_layers=scan_layers)
    model = models.build(config)
    params = model.init(jax.random.key(0))
    models.save(tmp_path, model, params)
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert reference.config.eos_token_id == 1
    assert reference.config.bos_token_id is None
    found = torch_tensors(reference)
    if not scan_layers:
        np.testing.assert_array_equal(found["transformer.wte.weight"], params["wte"]["embedding"])
        np.testing.assert_array_equal(found["transformer.h.2.mlp.c_fc.weight"], params["h_2"]["mlp"]["c_fc"]["kernel"])
    # transformers writes the same file again: same names, same bits.
    reference.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again").keys() == stored(tmp_path).keys()
    for name, value in stored(tmp_path).items():
        np.testing.assert_array_equal(found[name], value)
        np.testing.assert_array_equal(stored(tmp_path / "again")[name], value)
    tokens, mask = left_padded()
    expected = torch_forward(reference.eval(), tokens, mask)
    logits = model.apply(params, tokens, mask)
    np.testing.assert_allclose(np.asarray(logits)[mask == 1], expected[mask == 1], atol=2e-4)


def stored(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_half_precision_weights_survive_a_kept_dtype_key(tmp_path):
    """A folder that says float16 must not have its float32 successor rounded by transformers."""
    import transformers

    torch_model("GPT2LMHeadModel").half().save_pretrained(tmp_path / "half")
    model, params = models.load(tmp_path / "half", dtype=jnp.float32)
    params["wte"]["embedding"] += 1e-5
    models.save(tmp_path / "full", model, params)
    found = torch_tensors(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full"))
    np.testing.assert_array_equal(found["transformer.wte.weight"], params["wte"]["embedding"])

    model, params = models.load(tmp_path / "half")
    assert params["wte"]["embedding"].dtype == jnp.float16
    models.save(tmp_path / "half again", model, params)
    found = torch_tensors(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half again"))
    assert found["transformer.wte.weight"].dtype == np.float16
    np.testing.assert_array_equal(found["transformer.wte.weight"], params["wte"]["embedding"])


def test_saved_reward_model_equals_transformers_logit_plus_shift(tmp_path):
    import transformers

    # From a folder whose labels and problem type are those of another task.
    torch_model("GPT2LMHeadModel", problem_type="single_label_classification").save_pretrained(tmp_path / "base")
    model, params = models.load(tmp_path / "base")
    params = models.add_head(jax.random.key(1), params, "score")
    params["score"] |= {"gain": jnp.float32(2.5), "bias": jnp.float32(0.7), "shift": jnp.float32(-1.25)}
    models.save(tmp_path / "reward", model, params)
    kind = transformers.AutoModelForSequenceClassification
    reference, report = kind.from_pretrained(tmp_path / "reward", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(reference).__name__ == "GPT2ForSequenceClassification"
    assert reference.config.num_labels == 1
    np.testing.assert_array_equal(torch_tensors(reference)["score.weight"][0], 2.5 * params["score"]["kernel"])
    shift = json.loads((tmp_path / "reward" / "config.json").read_text())["reward_shift"]
    assert shift == reference.config.reward_shift
    tokens, mask = left_padded()
    expected = torch_forward(reference.eval(), tokens, mask)[:, 0] + shift
    np.testing.assert_allclose(models.score_fn(model)(params, tokens, mask, None), expected, atol=2e-4)


@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB"])
def test_folders_of_transformers_come_back_bit_equal(tmp_path, max_shard_size):
    reference = torch_model("GPT2LMHeadModel", resid_pdrop=0.3, summary_type="mean", own_key=[1, 2])
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (max_shard_size == "8KB")
    model, params = models.load(tmp_path / "theirs")
    assert (model.config.embedding_dropout, model.config.residual_dropout) == (0.1, 0.3)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 1)
    models.save(tmp_path / "ours", model, params)
    ours = stored(tmp_path / "ours")
    theirs = torch_tensors(reference)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    before = json.loads((tmp_path / "theirs" / "config.json").read_text())
    after = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {name: after[name] for name in before} == before


def test_body_without_prefix_loads(tmp_path):
    reference = torch_model("GPT2Model")
    reference.save_pretrained(tmp_path)
    _, params = models.load(tmp_path)
    assert not [name for name in stored(tmp_path) if name.startswith("transformer.")]
    np.testing.assert_array_equal(params["h_1"]["attn"]["c_proj"]["kernel"], stored(tmp_path)["h.1.attn.c_proj.weight"])


def test_bfloat16_compute_is_close(tmp_path):
    reference = torch_model("GPT2LMHeadModel")
    reference.save_pretrained(tmp_path)
    model, params = models.load(tmp_path, compute_dtype="bfloat16")
    tokens, mask = left_padded()
    expected = torch_forward(reference, tokens, mask)[mask == 1]
    logits = model.apply(params, tokens, mask)
    assert logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits)[mask == 1] - expected)
    assert 1e-4 < np.mean(error) < 0.05 * np.std(expected)


def test_initial_weights_follow_transformers():
    import torch
    import transformers

    torch.manual_seed(0)
    config = models.GPT2Config(300, 64, 96, 2, 4)
    sizes = {"vocab_size": 300, "n_positions": 64, "n_embd": 96, "n_layer": 2, "n_head": 4}
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).transformer
    params = models.build(config).init(jax.random.key(0))
    pairs = [
        (params["wte"]["embedding"], reference.wte.weight),
        (params["wpe"]["embedding"], reference.wpe.weight),
        (params["h_1"]["attn"]["c_attn"]["kernel"], reference.h[1].attn.c_attn.weight),
        (params["h_1"]["attn"]["c_proj"]["kernel"], reference.h[1].attn.c_proj.weight),
        (params["h_1"]["mlp"]["c_fc"]["kernel"], reference.h[1].mlp.c_fc.weight),
        (params["h_1"]["mlp"]["c_proj"]["kernel"], reference.h[1].mlp.c_proj.weight),
    ]
    for ours, theirs in pairs:
        assert ours.shape == tuple(theirs.shape)
        np.testing.assert_allclose(np.std(ours), theirs.std().item(), rtol=0.05)
