"""Models of transformers with random weights, and their outputs, for the tests with torch."""

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from numpy.testing import assert_allclose

from rlhf_jax.models import families

IDS = {"vocab_size": 31, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
BASE = {
    "max_position_embeddings": 64,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 20,
}
LOCAL_LAST = ["sliding_attention", "full_attention", "sliding_attention"]
GROUPED = {**BASE, "num_key_value_heads": 2}
WINDOWS = {**GROUPED, "sliding_window": 4, "layer_types": LOCAL_LAST}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "num_local_experts": 5}
SIZES = {
    "GPT2": {"n_positions": 24, "n_embd": 16, "n_layer": 3, "n_head": 4},
    **dict.fromkeys(("Llama", "Qwen2", "Qwen3", "Mistral"), BASE),
    "Gemma2": {**WINDOWS, "head_dim": 6},
    "Gemma3": {**WINDOWS, "head_dim": 6},
    "GPTNeoX": {**BASE, "hidden_size": 32},
    **dict.fromkeys(("Olmo2", "SmolLM3", "Phi3", "Granite"), GROUPED),
    "Olmo3": WINDOWS,
    "Ministral3": {**GROUPED, "head_dim": 6},
    **dict.fromkeys(("Mixtral", "Olmoe"), EXPERTS),
    "Qwen3Moe": {**EXPERTS, "head_dim": 6, "moe_intermediate_size": 12},
    "GptOss": {**EXPERTS, **WINDOWS, "head_dim": 6, "swiglu_limit": 1.0},
}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 4.0],
}
HALF_TURNED = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
TWO_YARNS = {"full_attention": YARN, "sliding_attention": TWO_ROPES["sliding_attention"]}
SCALED_QUERIES = {
    **YARN,
    "original_max_position_embeddings": 4,
    "beta_fast": 8.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "llama_4_scaling_beta": 0.5,
}
CONFIGS = {
    "GPT2 gelu_new": {},
    "GPT2 gelu": {"activation_function": "gelu", "n_inner": 20},
    "GPT2 relu": {"activation_function": "relu", "layer_norm_epsilon": 0.1},
    "GPT2 silu": {"activation_function": "silu", "scale_attn_weights": False},
    "GPT2 scaled by layer": {
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
    },
    "GPT2 unscaled by layer": {
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "Llama plain": {},
    "Llama grouped": {"num_key_value_heads": 2, "rms_norm_eps": 1e-2},
    "Llama one key head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "Llama biases, wide heads": {
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 6,
        "hidden_act": "gelu",
    },
    "Llama llama3": {"rope_parameters": LLAMA3, "num_key_value_heads": 2},
    "Qwen2 grouped": {"num_key_value_heads": 2},
    "Qwen2 tied": {"num_key_value_heads": 4, "tie_word_embeddings": True, "rms_norm_eps": 1e-2},
    "Qwen3 wide heads": {"num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": True},
    "Qwen3 biases": {"num_key_value_heads": 4, "head_dim": 4, "attention_bias": True},
    "Mistral windows": {"num_key_value_heads": 2, "sliding_window": 4},
    "Mistral whole": {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 8},
    "Gemma3 tied": {"query_pre_attn_scalar": 10},
    "Gemma3 untied": {"tie_word_embeddings": False, "rope_parameters": TWO_ROPES},
    "Llama linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "Llama yarn": {"rope_parameters": YARN},
    "Llama dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
    },
    "GPTNeoX parallel": {},
    "GPTNeoX sequential": {
        "use_parallel_residual": False,
        "attention_bias": False,
        "hidden_act": "gelu_new",
        "rope_parameters": HALF_TURNED,
    },
    "Olmo2 grouped": {"attention_bias": True},
    "Olmo3 two ropes": {"rope_parameters": TWO_YARNS},
    "SmolLM3 every second": {"no_rope_layer_interval": 2},
    "Phi3 partial": {"rope_parameters": HALF_TURNED, "sliding_window": 4},
    "Phi3 longrope": {"rope_parameters": LONG, "original_max_position_embeddings": 32},
    "Gemma2 caps": {
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "Granite multipliers": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.7,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.4,
    },
    "Ministral3 scaled queries": {"rope_parameters": SCALED_QUERIES},
    "Qwen3Moe dense between": {"mlp_only_layers": [1]},
    "Qwen3Moe normalized": {"norm_topk_prob": True},
    "Mixtral windows": {"sliding_window": 4},
    "Olmoe plain": {},
    "GptOss yarn": {"rope_parameters": {**YARN, "truncate": False}},
}


def torch_model(name, kind="causal_lm", **changes):
    """A transformers model of a family or a row of CONFIGS; its weights are so large that every
    option shows.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    family = name.split()[0]
    causal = "LMHeadModel" if name.startswith("GPT2") else "ForCausalLM"
    text = "Text" if family == "Gemma3" else ""
    kind = {"causal_lm": causal, "classifier": f"{text}ForSequenceClassification", "body": "Model"}[
        kind
    ]
    config = {**IDS, **SIZES[family], **CONFIGS.get(name, {}), **changes}
    model = getattr(transformers, family + kind)(
        getattr(transformers, f"{family}{text}Config")(**config)
    ).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = "norm" in parameter_name or "ln_" in parameter_name
            parameter.add_(torch.randn_like(parameter) * (0.1 if is_norm else 0.3))
    return model


def left_padded(batch=4, length=12):
    """Tokens without the pad id, and a mask with 0, 3, 6, ... pads on the left."""
    tokens = np.random.default_rng(0).integers(3, IDS["vocab_size"], (batch, length))
    mask = (np.arange(length)[None, :] >= 3 * np.arange(batch)[:, None]).astype(np.int32)
    return np.where(mask, tokens, IDS["pad_token_id"]), mask


def torch_forward(model, tokens, mask):
    import torch

    inputs = {
        "input_ids": tokens,
        "attention_mask": mask,
        "position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0),
    }
    with torch.no_grad():
        return model(**{name: torch.tensor(array) for name, array in inputs.items()}).logits.numpy()


def assert_gradients_equal(model, ours, reference):
    """Every parameter of the torch model has our gradient, and no gradient of ours is left out."""
    family = families.family_of(model.config)
    found = {}
    ours = dict(ours)
    if "score" in ours:  # a classifier's head has no bias, and gain and shift are not trained
        score = ours.pop("score")
        assert score["gain"] == score["shift"] == 0
        found[families.SCORE] = score["kernel"][None, :]
    for path, leaf in flatten_dict(ours).items():
        (name,) = family.tensors(path, leaf.shape)
        stored = leaf.T if family.transposed and path[-1] == "kernel" else leaf
        found[name] = stored.reshape(family.stored(path, leaf.shape))
    assert len(found) == len(jax.tree.leaves(ours)) + (families.SCORE in found)
    expected = {name: parameter.grad.numpy() for name, parameter in reference.named_parameters()}
    assert found.keys() == expected.keys()
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for name, gradient in found.items():
        # A difference of two scores leaves nothing to the bias of the last norm but rounding.
        atol = 1e-5 * np.abs(expected[name]).max() + 1e-7 * largest
        assert_allclose(
            gradient,
            expected[name],
            rtol=1e-4,
            atol=atol,
            err_msg=name,
        )
