"""The settings of the decoder that its families share, each by hand: norms, rotary positions, soft
caps, sinks, multipliers, experts.
"""

import ast
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import LLAMA, MORE, ROOT, YARN, slow, some_params, some_tokens, tiny
from flax.traverse_util import flatten_dict
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import models
from rlhf_jax.errors import UserError
from rlhf_jax.models import attention, families, lora, mlp, names, rope, stack
from rlhf_jax.parallel import sharding

TOKENS = some_tokens(2, 6)


def weights(config):
    """Parameters as NumPy arrays, which broadcast."""
    return jax.tree.map(np.asarray, some_params(config))


def logits(config, params=None):
    return np.asarray(tiny(config)[0].apply(params or some_params(config), TOKENS))


# --- Rotary positions


def test_yarn_keeps_fast_waves_and_stretches_slow_ones():
    """Eight columns, base 100: the frequencies are 1, 10^-.5, .1, 10^-1.5. In 100 tokens they make
    16, 5, 1.6 and .5 waves, so bounds of 10 and 1 lie at the indices .41 and 2.41.
    """
    config = replace(LLAMA, head_dim=8, rope_theta=100.0)
    plain = rope.frequencies(config)
    assert_allclose(plain, [1.0, 10**-0.5, 0.1, 10**-1.5], rtol=1e-6)
    scaling = models.RopeScaling(
        "yarn", 4.0, original_max_length=100, beta_fast=10.0, beta_slow=1.0, truncate=False
    )
    first, last = (4 * math.log(100 / (2 * math.pi * waves)) / math.log(100) for waves in (10, 1))
    stretched = np.clip((np.arange(4) - first) / (last - first), 0, 1)
    expected = plain * (1 - stretched) + plain / 4 * stretched
    assert_allclose(rope.frequencies(replace(config, rope_scaling=scaling)), expected, rtol=1e-6)
    # Rounded outwards, the bounds are 0 and 3.
    rounded = replace(config, rope_scaling=replace(scaling, truncate=True))
    thirds = np.arange(4) / 3
    expected = plain * (1 - thirds) + plain / 4 * thirds
    assert_allclose(rope.frequencies(rounded), expected, rtol=1e-6)
    # The bounds end at the first index and at the last one of all columns, 7.
    wide = replace(scaling, original_max_length=10000, beta_fast=1e5, beta_slow=0.1)
    stretched = np.arange(4) / 7
    expected = plain * (1 - stretched) + plain / 4 * stretched
    assert_allclose(rope.frequencies(replace(config, rope_scaling=wide)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (models.RopeScaling("yarn", math.e), 1.1),
        (models.RopeScaling("yarn", math.e, attention_factor=3.0), 3.0),
        (models.RopeScaling("yarn", math.e, mscale=2.0, mscale_all_dim=5.0), 1.2 / 1.5),
        (models.RopeScaling("yarn", math.e, mscale=2.0), 1.1),
        (models.RopeScaling("linear", math.e, attention_factor=3.0), 1.0),
        (models.RopeScaling("dynamic", 4.0), 1.0),
        (None, 1.0),
    ],
)
def test_attention_factors(scaling, expected):
    config = replace(LLAMA, rope_scaling=scaling)
    assert rope.attention_factor(config) == pytest.approx(expected)


def test_long_texts_take_the_long_factors():
    config = replace(
        MORE["phi3"],
        rope_theta=100.0,
        rope_scaling=models.RopeScaling(
            "longrope",
            16.0,
            original_max_length=16,
            short_factor=(1.0, 2.0),
            long_factor=(3.0, 5.0),
        ),
    )
    assert config.max_length == 16
    assert_allclose(rope.frequencies(config), [1.0, 0.1 / 2], rtol=1e-6)
    longer = replace(config, max_length=17)
    assert_allclose(rope.frequencies(longer), [1 / 3, 0.1 / 5], rtol=1e-6)
    assert rope.attention_factor(config) == pytest.approx(math.sqrt(2))


def test_local_layers_turn_unscaled_and_global_ones_perhaps_not_at_all():
    config = MORE["olmo3"]
    unscaled = replace(config, rope_theta=99.0, rope_scaling=None)
    local = rope.frequencies(config, is_local=True)
    assert_array_equal(local, rope.frequencies(unscaled))
    assert rope.attention_factor(config, is_local=True) == 1.0
    assert rope.attention_factor(config) > 1.0
    smol = MORE["smollm3"]
    assert smol.local_layers == [True, False]
    assert_array_equal(rope.frequencies(smol), [0.0])
    assert_array_equal(rope.frequencies(smol, is_local=True), [1.0])


def test_only_the_first_columns_are_turned():
    x = np.arange(24.0, dtype=np.float32).reshape(1, 1, 3, 8)
    angles = np.array([0.0, 0.5, 1.0])[:, None]
    rotation = jnp.float32(np.stack([np.cos(angles), np.sin(angles)])[:, None, None])
    turned = np.asarray(jax.jit(stack.rotate)(x, rotation))
    assert_array_equal(turned[..., 2:], x[..., 2:])
    first, second = x[0, 0, 1, :2]
    by_hand = [
        first * math.cos(0.5) - second * math.sin(0.5),
        second * math.cos(0.5) + first * math.sin(0.5),
    ]
    assert_allclose(turned[0, 0, 1, :2], by_hand, rtol=1e-5)


def test_queries_grow_with_their_position():
    config = replace(MORE["ministral3"], num_layers=1)
    plain = replace(config, rope_scaling=replace(YARN, query_beta=None))
    differs = np.abs(logits(config) - logits(plain, some_params(config)))
    assert not differs[:, :4].any()  # the original length is 4
    assert differs[:, 4:].min() > 0


# --- Attention


def test_a_sink_takes_weight_and_a_cap_bounds_scores():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 2, *shape)) for shape in ((2, 5, 4), (5, 4), (5, 4)))
    sinks = rng.normal(size=(2, 2))
    scores = 1.5 * np.tanh(np.einsum("bhgtd,bhsd->bhgts", query, key) / 1.5)
    scores = np.where(np.tril(np.ones((5, 5))), scores, -np.inf)
    weights = np.exp(scores)
    total = weights.sum(axis=-1, keepdims=True) + np.exp(sinks)[None, :, :, None, None]
    expected = np.einsum("bhgts,bhsd->bhgtd", weights / total, value)
    softmax = attention.Softmax(1.5, jnp.float32(sinks))

    @jax.jit
    def both(*arrays):
        seen = attention.seen_in_text(jnp.ones((1, 5), int))
        computed = (attention.attention, attention.blockwise)
        return [compute(*arrays, seen, softmax=softmax) for compute in computed]

    for found in both(query, key, value):
        assert_allclose(found, expected, atol=1e-5)


def test_the_two_halves_of_a_long_text_have_caps_and_sinks_too():
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.float32(rng.normal(size=shape))
        for shape in ((1, 1, 1, 64, 4), (1, 1, 64, 4), (1, 1, 64, 4))
    )
    seen = attention.seen_in_text(jnp.ones((1, 64), int), None)
    softmax = attention.Softmax(None, jnp.ones((1, 1)))
    attend = jax.jit(attention.attention, static_argnames="first")
    seen = seen._replace(window=jnp.int32(64))
    softmax = softmax._replace(softcap=jnp.float32(0.5))
    whole = attend(query, key, value, seen, softmax=softmax)
    halves = attend(query, key, value, seen, first=0, softmax=softmax)
    assert_allclose(halves, whole, atol=1e-6)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_fused_kernels_are_refused_where_they_cannot_compute_the_scores(name):
    with pytest.raises(ValueError, match="has neither soft caps nor sinks"):
        replace(MORE[name], attention="splash")
    config = replace(MORE[name], compute_dtype="bfloat16", head_dim=8)
    assert attention.implementation(config, 1024, 1024, False) == "blockwise"


# --- Residual blocks, multipliers, caps


def test_a_parallel_residual_adds_what_the_mlp_makes_of_the_same_input():
    """With o_proj at 0 the attention adds its bias alone, so the two forms differ by the MLP's
    input.
    """
    config = replace(MORE["gpt_neox"], num_layers=1)
    params = weights(config)
    layer = params["h_0"]
    kernel = layer["attn"]["o_proj"]["kernel"]
    layer = layer | {"attn": layer["attn"] | {"o_proj": {"kernel": 0 * kernel, "bias": BIAS}}}
    params = params | {"h_0": layer}
    parallel = tiny(config)[0].hidden(params, TOKENS)
    after = tiny(config, parallel_residual=False)[0].hidden(params, TOKENS)
    assert np.abs(parallel - after).max() > 1e-3
    x = params["wte"]["embedding"][TOKENS]

    def normed(x, norm):
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        return centred / np.sqrt(variance + 1e-5) * norm["scale"] + norm["bias"]

    def mlp_of(x):
        up = normed(x, layer["ln_2"]) @ layer["mlp"]["up_proj"]["kernel"]
        up += layer["mlp"]["up_proj"]["bias"]
        inner = up * (1 + np.vectorize(math.erf)(up / 2**0.5)) / 2
        down = layer["mlp"]["down_proj"]
        return inner @ down["kernel"] + down["bias"]

    expected = normed(x + BIAS + mlp_of(x), params["ln_f"])
    assert_allclose(parallel, expected, atol=1e-4)
    expected = normed(x + BIAS + mlp_of(x + BIAS), params["ln_f"])
    assert_allclose(after, expected, atol=1e-4)


BIAS = np.linspace(-1.0, 1.0, 8, dtype=np.float32)


def test_olmo_norms_what_is_added_and_nothing_before():
    layer = some_params(MORE["olmo2"])["h_0"]
    assert {name for name in layer if name.startswith("ln")} == {"ln_1_post", "ln_2_post"}
    assert layer["attn"]["q_norm"]["scale"].shape == (8,)
    assert layer["attn"]["k_norm"]["scale"].shape == (4,)


def test_multipliers_and_caps_of_logits():
    states = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    for name in ("granite", "gemma2"):
        params = weights(MORE[name])
        table = params["lm_head" if "lm_head" in params else "wte"]["embedding"]
        expected = states @ table.T / 2
        found = jax.jit(models.build(MORE[name]).unembed)(params, states)
        by_hand = expected if name == "granite" else 2 * np.tanh(expected)
        assert_allclose(found, by_hand, rtol=1e-5, atol=1e-5)


def test_multipliers_of_the_embedding_and_of_what_layers_add():
    """Where nothing is added, the logits are those of the embedding."""
    config = replace(MORE["granite"], residual_multiplier=1e-9, num_layers=1)
    assert models.model.Decoder(config).scales() == [0.4]
    params = weights(config)
    row = params["wte"]["embedding"][TOKENS] * 3.0
    normed = row / np.sqrt((row**2).mean(axis=-1, keepdims=True) + 1e-6) * params["ln_f"]["scale"]
    expected = normed @ params["lm_head"]["embedding"].T / 2
    assert_allclose(logits(config, params), expected, atol=1e-4)


# --- Experts


@pytest.mark.parametrize("name", [slow("mixtral"), "qwen3_moe", "gpt_oss"])
def test_experts_are_the_weighted_mlps_that_the_router_chooses(name):
    config = MORE[name]
    params = weights(config)["h_0"]["mlp"]
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    module = mlp.MixtureOfExperts(config)
    found = jax.jit(module.apply)({"params": params}, x)
    assert_allclose(found, by_hand(config, params, x), atol=1e-4)


def by_hand(config, params, x):
    """The mixture token by token, expert by expert."""
    router = params["router"]
    scores = x @ router["kernel"] + router.get("bias", 0.0)
    shares = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        chosen = np.argsort(-shares[place])[: config.experts_per_token]
        weights = shares[place][chosen]
        if config.normalize_experts:
            weights = weights / weights.sum()
        for weight, number in zip(weights, chosen, strict=True):
            out[place] += weight * expert(config, params["experts"], number, x[place])
    return out


def expert(config, experts, number, token):
    def layer(name, x):
        own = experts[name]
        return x @ own["kernel"][number] + (own["bias"][number] if "bias" in own else 0.0)

    if config.gate_limit is None:
        gate = layer("gate_proj", token)
        return layer("down_proj", gate / (1 + np.exp(-gate)) * layer("up_proj", token))
    both = layer("gate_up_proj", token)
    gate = np.minimum(both[::2], config.gate_limit)
    up = np.clip(both[1::2], -config.gate_limit, config.gate_limit)
    return layer("down_proj", gate / (1 + np.exp(-1.702 * gate)) * (up + 1))


def test_only_chosen_experts_get_a_gradient():
    config = replace(MORE["mixtral"], num_layers=1)
    params = some_params(config)["h_0"]["mlp"]
    module = mlp.MixtureOfExperts(config)
    x = np.random.default_rng(0).normal(size=(1, 1, 8)).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(params):
        return module.apply({"params": params}, x).sum()

    kernels = np.asarray(gradient(params)["experts"]["down_proj"]["kernel"])
    assert np.any(kernels, axis=(1, 2)).sum() == config.experts_per_token


def test_routing_is_float32_whatever_the_rest_is():
    """Scores that differ by 2^-10 choose the same expert in bfloat16, which cannot tell them
    apart.
    """
    config = replace(MORE["mixtral"], compute_dtype="bfloat16", experts_per_token=1)
    kernel = np.zeros((8, 5), np.float32)
    kernel[0, :2] = 1.0, 1.0 + 2**-10
    router = jax.jit(mlp.Router(config).apply)
    weights, chosen = router({"params": {"kernel": kernel}}, np.ones((1, 8), jnp.bfloat16))
    assert chosen.tolist() == [[1]]
    assert weights.dtype == jnp.float32


def test_adapters_leave_experts_and_routers_alone_unless_asked():
    params = some_params(MORE["qwen3_moe"])
    adapters = flatten_dict(lora.init(jax.random.key(0), params, 2))
    places = {"/".join(path[:-2]) for path in adapters}
    assert places == {"h_0/attn", "h_1/attn", "h_1/mlp"}  # layer 1 has no experts


def test_layers_of_two_kinds_are_not_stacked():
    config = MORE["qwen3_moe"]
    assert config.sparse_layers == [True, False]
    assert replace(config, dense_layers=(), sparse_every=2).sparse_layers == [False, True]
    with pytest.raises(ValueError, match="scan_layers needs layers of one kind"):
        replace(config, scan_layers=True)


@pytest.mark.slow
def test_experts_cut_over_a_mesh_give_the_same_logits():
    config = replace(MORE["gpt_oss"], num_layers=1)
    params = some_params(config)
    whole = jax.jit(models.build(config).apply)(params, TOKENS)
    mesh = sharding.make_mesh(1, fsdp=2, tensor=2)
    cut = jax.device_put(params, sharding.by_path(params, models.SHARDING, mesh))
    kernel = cut["h_0"]["mlp"]["experts"]["gate_up_proj"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, "fsdp", "tensor")
    with jax.set_mesh(mesh):
        parts = jax.jit(models.build(config).apply)(cut, TOKENS)
    assert_allclose(parts, whole, atol=2e-5)


# --- config.json


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"rope_theta": 1e-300}, "rope_theta must be above 1, got 1e-300"),
        ("llama", {"max_position_embeddings": math.nan}, "max_position_embeddings is nan"),
        (
            "ministral3",
            {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 0}},
            "original_max_position_embeddings must be above 1 and below 2.31, got 0",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0.5}},
            r"beta_fast 0\.5 must be above beta_slow 1\.0",
        ),
        ("llama", {"rope_scaling": {"type": "yarn"}}, "factor is None, expected a number"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}},
            "truncate is 1, which is no value",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1, 2], "long_factor": [1]}},
            "short_factor and long_factor must have 2 numbers each",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1, 2], "long_factor": "2"}},
            "long_factor is '2', expected a list of numbers",
        ),
        ("phi3", {"original_max_position_embeddings": 0}, "expected a positive integer"),
        ("phi3", {"resid_pdrop": 0.1}, r"resid_pdrop is 0\.1"),
        ("gpt_neox", {"rotary_pct": 0.3}, "need an even number of columns, got 1"),
        ("gpt_neox", {"hidden_dropout": 0.1}, r"hidden_dropout is 0\.1"),
        ("smollm3", {"no_rope_layers": [0, 1]}, r"no_rope_layers is \[0, 1\]"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attention_softcap must be above 0"),
        ("gpt_neox", {"head_dim": 5}, "head_dim is 5"),
        ("olmoe", {"clip_qkv": 8.0}, r"clip_qkv is 8\.0"),
        ("mixtral", {"num_experts_per_tok": 6}, "experts_per_token 6 is above num_experts 5"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, r"swiglu_alpha is 1\.5"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config is"),
        (
            "olmo3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types is .*, which changes the logits",
        ),
        (
            "gemma2",
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
            "expected an object for all layers",
        ),
    ],
)
def test_keys_that_do_not_fit_are_sentences(name, changes, message):
    config = MORE.get(name, LLAMA)
    keys = names.to_json(config) | changes
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        names.from_json(keys, "config.json")


def test_keys_that_transformers_leaves_out_have_its_defaults():
    keys = names.to_json(MORE["gpt_oss"])
    for key in ("rope_scaling", "rope_theta", "layer_types", "swiglu_limit"):
        keys.pop(key)
    config = names.from_json(keys, "config.json")
    assert (config.rope_theta, config.gate_limit, config.global_every) == (150000.0, 7.0, 2)
    assert config.rope_scaling == models.RopeScaling(
        "yarn", 32.0, original_max_length=4096, truncate=False
    )
    keys = names.to_json(MORE["phi3"])
    assert keys["max_position_embeddings"] == 32
    assert keys["original_max_position_embeddings"] == 16
    assert names.from_json(keys, "config.json").max_length == 16
    keys = names.to_json(MORE["qwen3_moe"])
    keys["num_local_experts"] = keys.pop("num_experts")
    assert names.from_json(keys | {"mlp_only_layers": None}, "").num_experts == 5


# --- The table


def nodes(tree):
    return sum(1 for _ in ast.walk(tree))


def test_a_dense_family_is_a_table_entry_and_settings():
    """The syntax nodes of a family's class and of its entry in the table, in all at most 150 and
    for a mixture of experts 200; formulas belong to settings that any family may have.
    """
    config, table = (
        ast.parse((ROOT / "rlhf_jax" / "models" / f"{name}.py").read_text("utf-8"))
        for name in ("config", "families")
    )
    classes = {node.name: nodes(node) for node in config.body if isinstance(node, ast.ClassDef)}
    entries = {}
    for node in ast.walk(table):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_relative":
            entries[node.args[0].func.id] = nodes(node)
    own = {name: classes[name] + size for name, size in entries.items()}
    assert len(own) == len(families.FAMILIES) - 2  # GPT-2 and Llama stand in full
    sparse = {type(MORE[name]).__name__ for name in ("qwen3_moe", "mixtral", "olmoe", "gpt_oss")}
    for name, size in own.items():
        assert size <= (200 if name in sparse else 150), (name, size)


def test_no_code_asks_for_a_family_outside_the_table():
    classes = {type(family.defaults).__name__ for family in families.FAMILIES.values()}
    classes -= {"GPT2Config"}  # another network
    for path in (ROOT / "rlhf_jax").rglob("*.py"):
        is_table = path.name in ("config.py", "families.py", "__init__.py")
        if is_table or "cli" in path.parts:  # doctor and plans build networks of chosen shapes
            continue
        text = path.read_text("utf-8")
        if not any(name in text for name in classes):
            continue
        used = {
            getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(ast.parse(text))
        }
        assert not used & classes, path
