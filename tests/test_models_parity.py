"""Each family against transformers on torch, on random tiny weights: logits, greedy tokens, scores,
folders.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file
from torch_models import CONFIGS, left_padded, torch_forward, torch_model

from rlhf_jax import models, sampling

pytestmark = pytest.mark.parity

CLASSIFIERS = [
    "GPT2",
    "Llama",
    "Llama one key head, tied",
    "Qwen2 grouped",
    "Qwen3 wide heads",
    "Mistral windows",
    "Gemma3 tied",
    "GPTNeoX parallel",
    "Olmo2 grouped",
    "Olmo3 two ropes",
    "SmolLM3 every second",
    "Phi3 partial",
    "Gemma2 caps",
    "Ministral3 scaled queries",
    "Qwen3Moe normalized",
    "Mixtral windows",
    "GptOss yarn",
]
each_config = pytest.mark.parametrize("name", CONFIGS)


def torch_tensors(model):
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def loaded(kind, folder):
    """What transformers makes of a folder, and that it misses and ignores no tensor."""
    import transformers

    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert_array_equal(tensor, right[name])


@each_config
def test_logits_equal_transformers(tmp_path, name):
    reference = torch_model(name)
    reference.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens, mask = left_padded()
    expected = torch_forward(reference, tokens, mask)
    model, params = models.load(tmp_path)
    logits = jax.jit(model.apply)(params, tokens, mask)
    assert np.std(expected[mask == 1]) > 0.9
    assert_allclose(np.asarray(logits)[mask == 1], expected[mask == 1], atol=2e-4)


LONGER = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("Llama llama3", {"rope_scaling": {**LONGER, "rope_theta": 99.0}}),
        ("Qwen2 tied", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("Gemma2 caps", {"rope_scaling": LONGER}),
        ("Granite multipliers", {"rope_scaling": {**LONGER, "rope_theta": 99.0}}),
        ("GPTNeoX parallel", {"rope_scaling": {**LONGER, "partial_rotary_factor": 0.5}}),
        (
            "Ministral3 scaled queries",
            {"rope_scaling": {**LONGER, "rope_theta": 99.0, "llama_4_scaling_beta": 0.2}},
        ),
        ("Olmo3 two ropes", {"rope_scaling": {"factor": 8.0}}),
        ("Gemma3 tied", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ],
)
def test_rope_scaling_beside_rope_parameters_is_read_as_transformers_does(tmp_path, name, added):
    torch_model(name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    keys = json.loads(file.read_text())
    assert keys["rope_parameters"]
    file.write_text(json.dumps(keys | added))
    tokens, mask = left_padded()
    plain = torch_forward(torch_model(name), tokens, mask)
    expected = torch_forward(type(torch_model(name)).from_pretrained(tmp_path), tokens, mask)
    assert np.abs(expected - plain)[mask == 1].max() > 0.1
    model, params = models.load(tmp_path)
    logits = jax.jit(model.apply)(params, tokens, mask)
    assert_allclose(np.asarray(logits)[mask == 1], expected[mask == 1], atol=2e-4)


each_family = pytest.mark.parametrize(
    "name",
    [
        "GPT2 gelu_new",
        "Llama llama3",
        "Qwen2 tied",
        "Qwen3 wide heads",
        "Mistral windows",
        "Gemma3 tied",
        "GPTNeoX parallel",
        "Olmo2 grouped",
        "Olmo3 two ropes",
        "SmolLM3 every second",
        "Phi3 partial",
        "Phi3 longrope",
        "Gemma2 caps",
        "Granite multipliers",
        "Ministral3 scaled queries",
        "Qwen3Moe normalized",
        "Mixtral windows",
        "Olmoe plain",
        "GptOss yarn",
    ],
)


@each_family
def test_packed_documents_equal_transformers_on_each_alone(tmp_path, name):
    """By stacked layers, whose attention is computed in blocks."""
    reference = torch_model(name)
    reference.save_pretrained(tmp_path)
    tokens = left_padded(1, 16)[0]
    mask = np.array([[0, 0, *[1] * 7, *[2] * 5, 3, 3]])
    model, params = models.load(tmp_path, attention="blockwise", scan_layers=True)
    logits = np.asarray(jax.jit(model.apply)(params, tokens, mask))
    for number in (1, 2, 3):
        alone = tokens[mask == number][None]
        expected = torch_forward(reference, alone, np.ones_like(alone))
        assert_allclose(logits[mask == number], expected[0], atol=2e-4)


@each_family
def test_greedy_equals_transformers_generate(tmp_path, name):
    import torch

    reference = torch_model(name, n_positions=64) if "GPT2" in name else torch_model(name)
    reference.save_pretrained(tmp_path)
    tokens, mask = left_padded()
    expected = reference.generate(
        torch.tensor(tokens), attention_mask=torch.tensor(mask), max_new_tokens=16, do_sample=False
    ).numpy()
    model, params = models.load(tmp_path)
    config = sampling.SamplingConfig(max_new_tokens=16, temperature=0.0, eos_id=1, pad_id=0)
    generate = jax.jit(partial(sampling.generate, model, config=config))
    result = generate(params, tokens, mask, jax.random.key(0))
    assert_array_equal(np.asarray(result.tokens)[:, : expected.shape[1]], expected)
    assert not np.asarray(result.tokens)[:, expected.shape[1] :].any()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores_equal_transformers_classifier(tmp_path, name):
    reference = torch_model(name, "classifier", num_labels=1)
    reference.save_pretrained(tmp_path)
    model, params = models.load(tmp_path)
    tokens, mask = left_padded()
    scores = jax.jit(models.score_fn(model))(params, tokens, mask, None)
    assert_allclose(scores, torch_forward(reference, tokens, mask)[:, 0], atol=2e-4)


@each_config
def test_saved_folder_loads_bit_equal_in_transformers(tmp_path, name):
    reference = torch_model(name)
    reference.save_pretrained(tmp_path / "theirs")
    models.save(tmp_path / "ours", *models.load(tmp_path / "theirs"))
    again = loaded("AutoModelForCausalLM", tmp_path / "ours")
    assert_same_tensors(torch_tensors(again), torch_tensors(reference))
    assert_same_tensors(stored(tmp_path / "ours"), stored(tmp_path / "theirs"))
    tokens, mask = left_padded()
    assert_array_equal(torch_forward(again, tokens, mask), torch_forward(reference, tokens, mask))


def stored(folder):
    return load_file(folder / "model.safetensors")


def test_ids_that_are_none_stay_none(tmp_path):
    model = models.build(models.GPT2Config(31, 24, 16, 3, 4, pad_token_id=0, eos_token_id=1))
    models.save(tmp_path, model, model.init(jax.random.key(0)))
    config = loaded("AutoModelForCausalLM", tmp_path).config
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, None)


def test_half_precision_weights_survive_a_kept_dtype_key(tmp_path):
    """A folder that says float16 must not have its float32 successor rounded by transformers."""
    torch_model("GPT2").half().save_pretrained(tmp_path / "half")
    for dtype in (jnp.float32, None):
        model, params = models.load(tmp_path / "half", dtype=dtype)
        assert params["wte"]["embedding"].dtype == (dtype or jnp.float16)
        params["wte"]["embedding"] += 1e-5
        models.save(tmp_path / "again", model, params)
        found = torch_tensors(loaded("AutoModelForCausalLM", tmp_path / "again"))[
            "transformer.wte.weight"
        ]
        assert found.dtype == params["wte"]["embedding"].dtype
        assert_array_equal(found, params["wte"]["embedding"])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_saved_reward_model_equals_transformers_logit_plus_shift(tmp_path, name):
    # From a folder whose labels and problem type are those of another task.
    torch_model(name, problem_type="single_label_classification").save_pretrained(tmp_path / "base")
    model, params = models.load(tmp_path / "base")
    params = models.add_head(jax.random.key(1), params, "score")
    params["score"] |= {
        "gain": jnp.float32(2.5),
        "bias": jnp.float32(0.7),
        "shift": jnp.float32(-1.25),
    }
    models.save(tmp_path / "reward", model, params)
    reference = loaded("AutoModelForSequenceClassification", tmp_path / "reward")
    assert (
        type(reference).__name__.removesuffix("ForSequenceClassification").removesuffix("Text")
        == name.split()[0]
    )
    assert reference.config.num_labels == 1
    assert_array_equal(torch_tensors(reference)["score.weight"][0], 2.5 * params["score"]["kernel"])
    shift = json.loads((tmp_path / "reward" / "config.json").read_text())["reward_shift"]
    assert shift == reference.config.reward_shift
    tokens, mask = left_padded()
    expected = torch_forward(reference, tokens, mask)[:, 0] + shift
    scores = jax.jit(models.score_fn(model))(params, tokens, mask, None)
    assert_allclose(scores, expected, atol=2e-4)


@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB"])
def test_folders_of_transformers_come_back_bit_equal(tmp_path, max_shard_size):
    reference = torch_model("GPT2", resid_pdrop=0.3, summary_type="mean", own_key=[1, 2])
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == (max_shard_size == "8KB")
    model, params = models.load(tmp_path / "theirs")
    assert (model.config.embedding_dropout, model.config.residual_dropout) == (0.1, 0.3)
    models.save(tmp_path / "ours", model, params)
    assert_same_tensors(stored(tmp_path / "ours"), torch_tensors(reference))
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours")
    )
    assert {name: after[name] for name in before} == before


def test_body_without_prefix_loads(tmp_path):
    torch_model("GPT2", "body").save_pretrained(tmp_path)
    _, params = models.load(tmp_path)
    assert not [name for name in stored(tmp_path) if name.startswith("transformer.")]
    assert_array_equal(
        params["h_1"]["attn"]["c_proj"]["kernel"], stored(tmp_path)["h.1.attn.c_proj.weight"]
    )


def test_bfloat16_compute_is_close(tmp_path):
    reference = torch_model("GPT2")
    reference.save_pretrained(tmp_path)
    model, params = models.load(tmp_path, compute_dtype="bfloat16")
    tokens, mask = left_padded()
    expected = torch_forward(reference, tokens, mask)[mask == 1]
    logits = jax.jit(model.apply)(params, tokens, mask)
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
    layer = params["h_1"]
    theirs = reference.h[1]
    for ours, weight in (
        (params["wte"]["embedding"], reference.wte.weight),
        (params["wpe"]["embedding"], reference.wpe.weight),
        (layer["attn"]["c_attn"]["kernel"], theirs.attn.c_attn.weight),
        (layer["attn"]["c_proj"]["kernel"], theirs.attn.c_proj.weight),
        (layer["mlp"]["c_fc"]["kernel"], theirs.mlp.c_fc.weight),
        (layer["mlp"]["c_proj"]["kernel"], theirs.mlp.c_proj.weight),
    ):
        assert ours.size == weight.numel()
        assert_allclose(np.std(ours), weight.std().item(), rtol=0.05)
