"""LoRA against PEFT on torch: folders both ways, logits, scores and gradients, on random tiny
weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_keys import ADAPTER_KEYS, HARMLESS_KEYS, READ_KEYS
from flax.traverse_util import flatten_dict
from numpy.testing import assert_allclose
from torch_models import left_padded, torch_forward, torch_model

from rlhf_jax import models
from rlhf_jax.errors import UserError
from rlhf_jax.models import families, lora

pytestmark = pytest.mark.parity

FAMILIES = {
    "GPT2": ["c_attn", "mlp.c_proj"],
    "Llama": ["q_proj", "down_proj", "v_proj"],
    "Qwen2 grouped": ["q_proj", "v_proj"],
    "Qwen3 wide heads": ["k_proj", "o_proj"],
    "Mistral windows": ["q_proj", "gate_proj"],
    "Gemma3 tied": ["q_proj", "up_proj", "o_proj"],
    "GPTNeoX parallel": ["query_key_value", "dense_h_to_4h"],
    "Phi3 partial": ["qkv_proj", "down_proj"],
    "Qwen3Moe normalized": ["q_proj", "o_proj"],
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def with_peft(reference, targets, **config):
    """The torch model with PEFT's adapters on it, none of them zero."""
    import peft
    import torch

    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        reference, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **config)
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return adapted.eval()


def peft_gradients(adapted, tokens, mask):
    """Of the mean square of the logits at real tokens, by the adapters' names."""
    import torch

    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    logits = adapted(**{name: torch.tensor(array) for name, array in inputs.items()}).logits
    logits[torch.tensor(mask.astype(bool))].square().mean().backward()
    parameters = adapted.named_parameters()
    return {name: p.grad.numpy() for name, p in parameters if p.grad is not None}


def by_their_names(model, found):
    """Pairs of PEFT's name and the gradient of an adapter of ours."""
    for path in [path for path in found if path[-1] != "lora_scale"]:
        stored = families.family_of(model.config).tensors((*path[:-1], "kernel"), found[path].shape)
        layers = np.asarray(found[path] if path[0] == "h" else [found[path]])
        kind = path[-1][-1].upper()
        for name, gradient in zip(stored, layers, strict=True):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            yield f"{module}.lora_{kind}.default.weight", gradient


@pytest.mark.parametrize(
    ("family", "scan_layers"), [*((family, False) for family in FAMILIES), ("GPT2", True)]
)
def test_peft_s_adapters_give_its_logits_and_gradients(tmp_path, family, scan_layers):
    reference = torch_model(family)
    reference.save_pretrained(tmp_path / "base")
    adapted = with_peft(reference, FAMILIES[family])
    adapted.save_pretrained(tmp_path / "adapter")
    tokens, mask = left_padded()
    expected = torch_forward(adapted, tokens, mask)

    model, params = models.load(tmp_path / "base", scan_layers=scan_layers)
    adapters = lora.load(tmp_path / "adapter", params)
    forward = jax.jit(model.apply)
    real = mask.astype(bool)
    for tree in (lora.attach(params, adapters), lora.merge(params, adapters)):
        found = np.asarray(forward(tree, tokens, mask))
        assert_allclose(found[real], expected[real], atol=2e-4)
    assert np.abs(np.asarray(forward(params, tokens, mask)) - expected)[real].max() > 0.01

    gradients = peft_gradients(adapted, tokens, mask)

    def loss(adapters):
        found = model.apply(lora.attach(params, adapters), tokens, mask)
        return jnp.mean(jnp.square(found), where=real[..., None])

    found = flatten_dict(jax.jit(jax.grad(loss))(adapters))
    ours = dict(by_their_names(model, found))
    assert ours.keys() == gradients.keys()
    for name, theirs in gradients.items():
        shape = theirs.T.shape
        assert_allclose(ours[name].reshape(shape), theirs.T, atol=2e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"q_proj": 2, r"model\.layers\.\d\.mlp\.down_proj": 4}},
        {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
        {"layers_to_transform": [0]},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"exclude_modules": ["v_proj"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"lora_dropout": 0.3},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "gaussian"},
        {"qalora_group_size": 2, "megatron_core": "other.core"},
    ],
    ids=str,
)
def test_settings_of_peft_that_are_read_give_its_logits(tmp_path, config):
    reference = torch_model("Llama")
    reference.save_pretrained(tmp_path / "base")
    adapted = with_peft(reference, FAMILIES["Llama"], **config)
    adapted.save_pretrained(tmp_path / "adapter")
    tokens, mask = left_padded()
    expected = torch_forward(adapted, tokens, mask)
    model, params = models.load(tmp_path / "base")
    adapters = lora.load(tmp_path / "adapter", params, model)
    found = np.asarray(jax.jit(model.apply)(lora.attach(params, adapters), tokens, mask))
    assert_allclose(found[mask == 1], expected[mask == 1], atol=2e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"},
        {"alpha_pattern": {"q_proj": 2}},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"trainable_token_indices": [1, 2]},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"use_qalora": True, "qalora_group_size": 2},
    ],
    ids=str,
)
def test_other_adapters_that_peft_writes_are_refused_by_name(tmp_path, config):
    reference = torch_model("Llama")
    reference.save_pretrained(tmp_path / "base")
    with_peft(reference, FAMILIES["Llama"], **config).save_pretrained(tmp_path / "adapter")
    _, params = models.load(tmp_path / "base")
    with pytest.raises(UserError, match=f"{next(iter(config))} is .* only plain LoRA is read"):
        lora.load(tmp_path / "adapter", params)


def test_every_field_of_peft_s_config_is_known_to_the_tests():
    import dataclasses

    import peft

    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= {*ADAPTER_KEYS, *HARMLESS_KEYS, *READ_KEYS}


@each_family
def test_peft_loads_our_adapters(tmp_path, family):
    import peft

    reference = torch_model(family)
    reference.save_pretrained(tmp_path / "base")
    model, params = models.load(tmp_path / "base")
    adapters = lora.init(jax.random.key(0), params, 2, "attn|h_1/mlp", alpha=3.0)
    adapters = jax.tree.map(
        lambda leaf: (
            leaf + 0.2 * jax.random.normal(jax.random.key(1), leaf.shape) if leaf.ndim else leaf
        ),
        adapters,
    )
    lora.save(tmp_path / "adapter", params, adapters)
    adapted = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    tokens, mask = left_padded()
    expected = torch_forward(adapted, tokens, mask)
    found = np.asarray(jax.jit(model.apply)(lora.attach(params, adapters), tokens, mask))
    real = mask.astype(bool)
    assert_allclose(found[real], expected[real], atol=2e-4)
    # What export writes is the same model without PEFT.
    models.save(tmp_path / "merged", model, lora.merge(params, adapters))
    merged = type(reference).from_pretrained(tmp_path / "merged").eval()
    assert_allclose(torch_forward(merged, tokens, mask)[real], expected[real], atol=2e-4)


@each_family
def test_reward_models_travel_both_ways(tmp_path, family):
    import peft

    reference = torch_model(family, "classifier", num_labels=1, pad_token_id=0)
    reference.save_pretrained(tmp_path / "base")
    theirs = with_peft(reference, FAMILIES[family], task_type="SEQ_CLS")
    theirs.save_pretrained(tmp_path / "theirs")
    tokens, mask = left_padded()
    expected = torch_forward(theirs, tokens, mask)[:, 0]
    model, params = models.load(tmp_path / "base")
    adapters = lora.load(tmp_path / "theirs", params)
    score = jax.jit(models.score_fn(model))
    found = score(lora.attach(params, adapters), tokens, mask, None)
    assert_allclose(found, expected, atol=2e-4)

    lora.save(tmp_path / "ours", params, adapters)
    fresh = type(reference).from_pretrained(tmp_path / "base")
    ours = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    assert_allclose(torch_forward(ours, tokens, mask)[:, 0], expected, atol=2e-4)


def test_modules_that_peft_saves_whole_give_its_logits(tmp_path):
    import peft
    import torch

    reference = torch_model("Llama grouped")
    reference.save_pretrained(tmp_path / "base")
    whole = ["embed_tokens", "lm_head", "input_layernorm", "up_proj"]
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=whole)
    adapted = peft.get_peft_model(reference, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name or "lora_B" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    tokens, mask = left_padded()
    expected = torch_forward(adapted, tokens, mask)
    model, params = models.load(tmp_path / "base")
    adapters = lora.load(tmp_path / "adapter", params, model)
    found = jax.jit(model.apply)(lora.attach(params, adapters), tokens, mask)
    real = mask.astype(bool)
    assert_allclose(np.asarray(found)[real], expected[real], atol=2e-4)
