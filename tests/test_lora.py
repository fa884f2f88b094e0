"""LoRA as functions of parameters: the factored term, its gradient, merging, memory, PEFT's
folders.
"""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_keys import ADAPTER_KEYS, HARMLESS_KEYS
from builders import (
    CONFIG,
    LLAMA,
    initial_params,
    some_params,
    some_tokens,
    stack_layers,
    tiny,
)
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.testing import assert_allclose, assert_array_equal
from programs import array_sizes
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rlhf_jax import models
from rlhf_jax.config import LoRA
from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora
from rlhf_jax.models.stack import Dense
from rlhf_jax.report import export

KEY = jax.random.key(0)

CONFIGS = {
    "gpt2 scanned": replace(CONFIG, num_layers=3, scan_layers=True, remat=True),
    "llama": LLAMA,
}
TOKENS = some_tokens(2, 8)


merge = jax.jit(lora.merge)


def grown(adapters):
    """Adapters as after some training: B is no longer 0."""
    leaves = flatten_dict(adapters)
    rng = np.random.default_rng(0)
    noise = {
        path: 0.2 * rng.normal(size=leaf.shape) * (path[-1] != "lora_scale")
        for path, leaf in leaves.items()
    }
    return unflatten_dict({path: jnp.float32(leaf + noise[path]) for path, leaf in leaves.items()})


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def adapted(request):
    model = models.build(request.param)
    params = initial_params(model)
    return (
        model._replace(apply=jax.jit(model.apply)),
        params,
        lora.init(jax.random.key(1), params, 3, alpha=6.0),
    )


def test_the_layer_adds_the_factored_term():
    params = {
        "kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]]),
        "bias": jnp.array([10.0, 20.0]),
        "lora_a": jnp.array([[1.0], [3.0]]),
        "lora_b": jnp.array([[5.0, 7.0]]),
        "lora_scale": jnp.float32(0.5),
    }

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient_and_output(params):
        out = Dense(CONFIG, (2,)).apply({"params": params}, np.array([[1.0, 2.0]], np.float32))
        return out[0, 0], out

    gradient, out = gradient_and_output(params)
    # x W + b = (11, 22); x A = 7; 0.5 * 7 * (5, 7) = (17.5, 24.5)
    assert_array_equal(out, [[28.5, 46.5]])
    assert_array_equal(gradient["lora_a"], [[2.5], [5.0]])  # 0.5 * x * 5
    assert_array_equal(gradient["lora_b"], [[3.5, 0.0]])
    assert gradient["lora_scale"] == 0


def test_adapters_start_at_zero_with_peft_s_range_and_scale(adapted):
    model, params, adapters = adapted
    assert_array_equal(
        model.apply(params, TOKENS), model.apply(lora.attach(params, adapters), TOKENS)
    )
    leaves = flatten_dict(adapters)
    kernels = [path for path in flatten_dict(params) if path[-1] == "kernel"]
    assert len(leaves) == 3 * len(kernels)
    for *module, _ in kernels:
        shape = flatten_dict(params)[(*module, "kernel")].shape
        first = 1 + (module[0] == "h")
        *layers, size_in = shape[:first]
        names = ("lora_a", "lora_b", "lora_scale")
        a, b, scale = (np.asarray(leaves[(*module, name)]) for name in names)
        assert a.shape == (*layers, size_in, 3)
        assert 0.5 / size_in**0.5 < np.abs(a).max() <= 1 / size_in**0.5
        assert_array_equal(b, np.zeros((*layers, 3, *shape[first:])))
        assert_array_equal(scale, np.full(layers, 2.0))


def test_match_chooses_layers():
    params = initial_params(models.build(CONFIG))
    adapters = lora.init(jax.random.key(1), params, 2, "h_1/attn/c_attn|mlp/c_fc")
    places = {"/".join(path[:-1]) for path in flatten_dict(adapters)}
    assert places == {"h_0/mlp/c_fc", "h_1/attn/c_attn", "h_1/mlp/c_fc"}
    first, second = (adapters[layer]["mlp"]["c_fc"]["lora_a"] for layer in ("h_0", "h_1"))
    assert (np.asarray(first) != np.asarray(second)).all()  # each layer draws its own
    of_no_layer = {"h_2": {"attn": adapters["h_1"]["attn"]}}
    for message, refused in (
        ("'q_proj'; .* attn/c_attn, attn/c_proj", lambda: lora.init(None, params, 2, "q_proj")),
        ("rank must be at least 1", lambda: lora.init(None, params, 0)),
        ("h_2/attn/c_attn/lora_a belongs", lambda: lora.attach(params, of_no_layer)),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_merging_gives_the_same_function_and_not_the_base(adapted):
    model, params, adapters = adapted
    adapters = grown(adapters)
    attached = lora.attach(params, adapters)
    merged = merge(params, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    logits = np.asarray(model.apply(attached, TOKENS))
    assert_allclose(model.apply(merged, TOKENS), logits, atol=2e-6)
    assert np.abs(logits - model.apply(params, TOKENS)).max() > 0.05


@pytest.mark.parametrize("adapted", [CONFIGS["gpt2 scanned"]], indirect=True)
def test_the_sampler_decodes_through_adapters(adapted):
    model, params, adapters = adapted
    attached = lora.attach(params, grown(adapters))
    positions = np.tile(np.arange(8), (2, 1))
    inputs = (TOKENS, positions, np.ones_like(TOKENS), model.init_cache(2, 8), 0)
    decoded, _ = jax.jit(model.decode)(attached, *inputs)
    assert_allclose(decoded, model.apply(attached, TOKENS), atol=2e-6)


def test_a_base_of_8_bits_has_a_scale_for_each_output_column():
    kernel = jnp.array([[254.0, 0.0], [3.5, 0.0], [100.9, 0.0]], jnp.bfloat16)
    table = jnp.ones(2, jnp.bfloat16)
    base = {"h_0": {"mlp": {"up_proj": {"kernel": kernel}}}, "wte": {"embedding": table}}
    held = jax.jit(lora.quantized)(base)
    layer = held["h_0"]["mlp"]["up_proj"]
    assert layer["kernel"].dtype == jnp.int8
    assert_array_equal(layer["kernel"], [[127, 0], [2, 0], [50, 0]])  # 100.9 is 101 in bfloat16
    assert_array_equal(layer["kernel_scale"], [2.0, 1.0])
    assert lora.quantized({"wte": base["wte"]})["wte"]["embedding"] is table
    merged = merge(held, {})["h_0"]["mlp"]["up_proj"]
    assert_array_equal(merged["kernel"], [[254, 0], [4, 0], [100, 0]])
    assert merged.keys() == {"kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [LLAMA], indirect=True)
def test_a_model_computes_what_its_base_of_8_bits_holds(adapted):
    """Stacked layers and experts are in test_quantization.py."""
    model, params, adapters = adapted
    adapters = grown(adapters)
    held = lora.quantized(params)
    kernels = {path for path in flatten_dict(params) if path[-1] == "kernel"}
    assert {path for path, x in flatten_dict(held).items() if x.dtype == jnp.int8} == kernels
    attached = model.apply(lora.attach(held, adapters), TOKENS)
    merged = model.apply(lora.merge(held, adapters), TOKENS)
    assert_allclose(attached, merged, rtol=1e-4, atol=1e-5)
    unquantized = model.apply(lora.merge(params, adapters), TOKENS)
    assert 1e-5 < np.abs(attached - unquantized).max() < 0.1


def test_a_base_of_8_bits_is_decoded_as_it_is():
    """Its scales keep float32, where other leaves of a layer become bfloat16."""
    config = replace(LLAMA, compute_dtype="bfloat16")
    model = models.build(config)
    held = jax.eval_shape(lora.quantized, initial_params(model))
    layer = jax.eval_shape(model.for_decoding, held)["h_0"]["mlp"]["up_proj"]
    assert layer["kernel"].dtype == jnp.int8
    assert layer["kernel_scale"].dtype == jnp.float32
    with pytest.raises(ValueError, match="base int8: all weights are trained"):
        LoRA(base="int8")


def test_a_small_change_survives_merging_into_bfloat16_weights():
    base = {
        "h_0": {
            "attn": {"kernel": jnp.ones((4, 4), jnp.bfloat16), "bias": jnp.ones(4, jnp.bfloat16)}
        }
    }
    adapters = lora.init(jax.random.key(1), base, 2)
    adapters["h_0"]["attn"]["lora_b"] = np.full((2, 4), 1e-3, np.float32)
    merged = merge(base, adapters)["h_0"]["attn"]
    assert merged["kernel"].dtype == jnp.float32
    assert merged["bias"].dtype == jnp.bfloat16
    kernel = np.asarray(merged["kernel"])
    assert (kernel != 1).all()
    assert (kernel.astype(jnp.bfloat16) == 1).all()  # what rounding would have lost


def test_no_merged_copy_of_a_kernel_and_no_gradient_of_one_is_computed():
    model = models.build(replace(CONFIG, hidden_size=64, num_layers=1, vocab_size=7))
    base = initial_params(model)

    def largest(apply):
        gradient = jax.grad(lambda adapters: jnp.sum(apply(adapters) ** 2))
        adapters = jax.eval_shape(lambda key: lora.init(key, base, 2), KEY)
        return max(array_sizes(jax.make_jaxpr(gradient)(adapters).jaxpr))

    kernel = 64 * 4 * 64
    tokens = TOKENS % 7
    assert largest(lambda adapters: lora.bind(model.apply, base)(adapters, tokens)) < kernel
    assert largest(lambda adapters: model.apply(lora.merge(base, adapters), tokens)) >= kernel


def test_dropout_of_an_adapter_drops_its_inputs_and_scales_the_others():
    """PEFT: W x + scale * B A dropout(x). With A and B of ones on the diagonal the adapter's term
    is the input itself, so that each entry is 0 or x / (1 - rate).
    """
    layer = Dense(replace(CONFIG, lora_dropout=0.25), (16,), use_bias=False)
    x = 1.0 + jnp.arange(64.0).reshape(4, 16)
    one = jnp.eye(16)
    adapter = {"lora_a": one, "lora_b": one, "lora_scale": jnp.float32(2.0)}
    params = {"params": {"kernel": jnp.zeros((16, 16)), **adapter}}
    assert_allclose(layer.apply(params, x), 2 * x, rtol=1e-6)  # no key: nothing is dropped
    with_key = jax.jit(lambda key: layer.apply(params, x, rngs={"dropout": key}))
    terms = np.stack([with_key(jax.random.key(i)) for i in range(20)]) / (2 * np.asarray(x))
    assert_allclose(np.unique(terms.round(5)), [0.0, 1 / 0.75], rtol=1e-4)
    assert 0.2 < np.mean(terms == 0) < 0.3
    plain = {"params": {"kernel": one}}  # what W x reads is whole
    assert_array_equal(layer.apply(plain, x, rngs={"dropout": jax.random.key(0)}), x)


def test_adapters_drop_their_inputs_with_a_key():
    model = models.build(replace(CONFIG, num_layers=1, lora_dropout=0.5))
    base = initial_params(model)
    params = lora.attach(base, grown(lora.init(jax.random.key(1), base, 2)))
    hidden = jax.jit(model.hidden)
    first, again, other = (
        np.asarray(hidden(params, TOKENS, None, key)) for key in map(jax.random.key, (1, 1, 2))
    )
    assert_array_equal(first, again)
    for different in (other, hidden(params, TOKENS)):
        assert np.abs(first - different).max() > 1e-3


def test_peft_folders_round_trip(adapted, tmp_path):
    _, params, adapters = adapted
    head = models.add_head(jax.random.key(3), params, "score")["score"]
    head |= {"gain": jnp.float32(2.0), "bias": jnp.float32(0.25), "shift": jnp.float32(-3.0)}
    lora.save(tmp_path, params, {**grown(adapters), "score": head}, base_model="some/base")
    loaded = lora.load(tmp_path, params)
    with safe_open(tmp_path / "adapter_model.safetensors", "numpy") as weights:
        assert weights.metadata() == {
            "reward_shift": "-2.5"
        }  # two entries would be written in a random order
    # A score comes back as gain 1 and bias 0.
    kept = {"kernel": 2.0 * head["kernel"], "gain": 1.0, "bias": 0.0, "shift": -2.5}
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-6),
        loaded,
        {**grown(adapters), "score": kept},
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert config["r"] == 3
    assert config["lora_alpha"] == 6.0
    assert config["modules_to_save"] == ["score"]
    assert config["base_model_name_or_path"] == "some/base"


@pytest.fixture
def some_layers(tmp_path):
    """(parameters, function that saves adapters of the layers that match and returns their
    keys).
    """
    params = initial_params(models.build(CONFIG))

    def save(match):
        lora.save(tmp_path, params, lora.init(jax.random.key(1), params, 2, match))
        return json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))

    return params, save


def test_folders_name_the_layers_that_are_adapted(some_layers, tmp_path):
    params, save = some_layers

    places = [
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.attn.c_attn",
        "transformer.h.1.attn.c_proj",
    ]
    assert save("h_1/attn|h_0/attn/c_attn")["target_modules"] == places
    assert save("h_1/attn")["target_modules"] == ["attn.c_attn", "attn.c_proj"]
    expected = lora.init(jax.random.key(1), params, 2, "h_1/attn")
    assert jax.tree.structure(lora.load(tmp_path, params)) == jax.tree.structure(expected)


def test_strange_folders_are_refused(some_layers, tmp_path):
    params, save = some_layers
    config = save("h_1/attn")
    file = tmp_path / "adapter_config.json"
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    file.write_text(json.dumps(config | {"use_rslora": True, "lora_alpha": 8}), encoding="utf-8")
    assert lora.load(tmp_path, params)["h_1"]["attn"]["c_attn"]["lora_scale"] == pytest.approx(
        8 / 2**0.5
    )
    one = np.ones((1, 8), np.float32)
    incomplete = {name: value for name, value in tensors.items() if "c_proj.lora_B" not in name}
    score = {"base_model.model.score.weight": one}
    for changes, held, message in (
        ({"peft_type": "IA3"}, tensors, "peft_type is 'IA3'.*LORA"),
        ({"use_dora": True}, tensors, "use_dora is True"),
        ({"bias": "all"}, tensors, "bias is 'all'"),
        ({"lora_alpha": None}, tensors, "lora_alpha is None"),
        *(
            ({"init_lora_weights": start}, tensors, f"init_lora_weights is '{start}'")
            for start in ("pissa", "pissa_niter_4", "olora", "eva", "corda", "loftq")
        ),
        (
            {},
            {**tensors, "base_model.model.lm_head.lora_A.weight": one},
            "unexpected tensors: lm_head.lora_A.weight",
        ),
        ({}, incomplete, "missing tensors: transformer.h.1.attn.c_proj.lora_B.weight"),
        ({}, score, "reward_shift .* is no number"),
        ({}, {}, "no adapter of a kernel of this model"),
    ):
        file.write_text(json.dumps(config | changes), encoding="utf-8")
        save_file(held, weights, {"reward_shift": "much"})
        with pytest.raises(UserError, match=message):
            lora.load(tmp_path, params)
    file.unlink()
    with pytest.raises(UserError, match="an adapter folder holds adapter_config"):
        lora.load(tmp_path, params)


EMPTY = [{}, [], "", "none", None, False, 0]


@pytest.fixture(scope="module")
def one_adapter(tmp_path_factory):
    """(parameters, an adapter's folder, the content of its adapter_config.json)."""
    params = some_params(LLAMA)
    folder = tmp_path_factory.mktemp("adapter")
    lora.save(folder, params, grown(lora.init(KEY, params, 2, "h_0/attn/q_proj")))
    return params, folder, json.loads((folder / "adapter_config.json").read_text("utf-8"))


@pytest.mark.parametrize("key", ADAPTER_KEYS)
def test_a_key_that_makes_another_kind_of_adapter_is_refused(key, one_adapter):
    params, folder, config = one_adapter
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(config | {key: ADAPTER_KEYS[key]}), "utf-8")
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key} is .*plain LoRA") as caught:
        lora.load(folder, params)
    assert "\n" not in str(caught.value)
    for value in EMPTY:
        file.write_text(json.dumps(config | {key: value}), "utf-8")
        assert lora.load(folder, params)


@pytest.mark.parametrize("key", HARMLESS_KEYS)
def test_a_key_that_leaves_an_adapter_as_it_is_changes_nothing(key, one_adapter):
    params, folder, config = one_adapter
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(config), "utf-8")
    expected = lora.load(folder, params)
    file.write_text(json.dumps(config | {key: HARMLESS_KEYS[key]}), "utf-8")
    jax.tree.map(assert_array_equal, lora.load(folder, params), expected)


def test_alpha_is_divided_by_the_rank_of_the_tensors_that_rank_pattern_gives(one_adapter):
    params, folder, config = one_adapter
    file = folder / "adapter_config.json"
    given = {"r": 8, "lora_alpha": 3, "rank_pattern": {"q_proj": 2}}
    for of_rank, scale in ((False, 3 / 2), (True, 3 / 2**0.5)):
        file.write_text(json.dumps(config | given | {"use_rslora": of_rank}), "utf-8")
        scales = lora.load(folder, params)["h_0"]["attn"]["q_proj"]["lora_scale"]
        assert_allclose(scales, scale, rtol=1e-6)
    for rank in (8, "2", None):
        file.write_text(json.dumps(config | {"r": rank}), "utf-8")
        with pytest.raises(UserError, match=r"q_proj\.lora_A\.weight is of rank 2, .* r .* is"):
            lora.load(folder, params)


def test_whole_modules_of_a_folder_replace_those_of_the_base(tmp_path):
    """Embeddings, the output layer and norms, as PEFT saves its modules_to_save."""
    model = models.build(LLAMA)
    params = some_params(LLAMA)
    adapters = lora.init(KEY, params, 2, "h_0/attn/q_proj")
    lora.save(tmp_path, params, adapters)
    file = tmp_path / "adapter_model.safetensors"
    whole = {
        ("wte", "embedding"): "model.embed_tokens.weight",
        ("lm_head", "embedding"): "lm_head.weight",
        ("ln_f", "scale"): "model.norm.weight",
        ("h_1", "ln_2", "scale"): "model.layers.1.post_attention_layernorm.weight",
        ("h_1", "mlp", "up_proj", "kernel"): "model.layers.1.mlp.up_proj.weight",
    }
    leaves = flatten_dict(params)
    added = {}
    for path, name in whole.items():
        tensor = np.asarray(leaves[path]) + 1
        stored = tensor.T if path[-1] == "kernel" else tensor
        added[f"base_model.model.{name}"] = np.ascontiguousarray(stored)
    save_file(load_file(file) | added, file)
    found = lora.load(tmp_path, params, model)
    for tree in (lora.attach(params, found), merge(params, found)):
        tree = flatten_dict(tree)
        for path, leaf in leaves.items():
            expected = leaf + 1 if path in whole else leaf
            assert_allclose(tree[path], expected, atol=1e-6)
    with pytest.raises(UserError, match=r"unexpected tensors: lm_head\.weight, model\.embed"):
        lora.load(tmp_path, params)
    tied = models.build(replace(LLAMA, tie_embeddings=True))
    of_tied = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        lora.load(tmp_path, of_tied, tied)
    only_inputs = {name: x for name, x in load_file(file).items() if "lm_head" not in name}
    save_file(only_inputs, file)
    with pytest.raises(UserError, match=r"embed_tokens\.weight is saved whole .*merge_and_unload"):
        lora.load(tmp_path, of_tied, tied)


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_adapter_trained_after_tokens_were_added_is_exported_with_them(is_tied, tmp_path):
    """PEFT stores the tables whole where ``resize_token_embeddings`` made them longer."""
    config = replace(LLAMA, tie_embeddings=is_tied)
    model, params = models.build(config), some_params(config)
    models.save(tmp_path / "base", model, params)
    adapters = grown(lora.init(KEY, params, 2, "q_proj"))
    lora.save(tmp_path / "adapter", params, adapters, base_model=str(tmp_path / "base"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    size = config.vocab_size + 3
    tables = {
        name: np.full((size, config.hidden_size), 0.5 if is_tied else number, np.float32)
        for number, name in enumerate(("model.embed_tokens.weight", "lm_head.weight"))
    }
    added = {f"base_model.model.{name}": table for name, table in tables.items()}
    save_file(load_file(file) | added, file)
    with pytest.raises(UserError, match=rf"has {size} rows.*resize_vocabulary.*{size}\)"):
        lora.load(tmp_path / "adapter", params, model)
    export.export(tmp_path / "adapter", tmp_path / "merged")
    merged_model, merged = models.load(tmp_path / "merged")
    assert merged_model.config.vocab_size == size
    assert_array_equal(merged["wte"]["embedding"], tables["model.embed_tokens.weight"])
    if not is_tied:
        assert_array_equal(merged["lm_head"]["embedding"], tables["lm_head.weight"])
    kernel = merged["h_0"]["attn"]["q_proj"]["kernel"]
    assert_allclose(kernel, merge(params, adapters)["h_0"]["attn"]["q_proj"]["kernel"], rtol=1e-6)


def test_an_adapter_s_folder_is_no_model_until_it_is_exported(tmp_path):
    model = models.build(LLAMA)
    params = some_params(LLAMA)
    models.save(tmp_path / "base", model, params)
    adapters = grown(lora.init(KEY, params, 2, "q_proj|down_proj"))
    lora.save(tmp_path / "adapter", params, adapters, base_model=str(tmp_path / "base"))
    (tmp_path / "base" / "tokenizer.json").write_text("{}", encoding="utf-8")
    more = tmp_path / "base" / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("tools")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    norm = np.arange(8, dtype=np.float32)
    save_file(load_file(weights) | {"base_model.model.model.norm.weight": norm}, weights)
    with pytest.raises(UserError, match=r"adapter: a PEFT adapter, no .* `rlhf-jax export .*adapt"):
        models.load(tmp_path / "adapter")
    with pytest.raises(UserError, match="a PEFT adapter, no whole model"):
        load_tokenizer(tmp_path / "adapter")
    export.export(tmp_path / "adapter", tmp_path / "merged")
    again, merged = models.load(tmp_path / "merged")
    assert again.config == model.config
    assert_array_equal(merged["ln_f"]["scale"], norm)
    merged["ln_f"] = params["ln_f"]
    same = partial(assert_allclose, rtol=1e-6)
    jax.tree.map(same, merged, merge(params, adapters))
    assert (tmp_path / "merged" / "tokenizer.json").read_text("utf-8") == "{}"
    assert (tmp_path / "merged" / more.name / "tool_use.jinja").read_text() == "tools"
    with pytest.raises(UserError, match="is in use"):
        export.export(tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="base_model_name_or_path is None"):
        export.export(tmp_path / "adapter", tmp_path / "other")


@pytest.mark.parametrize(
    ("alpha", "factor"), [(1e300, 1.0), (-1e308, 1.0), (2.0, np.nan), (9e37, 1e3)]
)
def test_an_adapter_that_makes_weights_infinite_is_not_exported(alpha, factor, tmp_path):
    model = models.build(LLAMA)
    params = some_params(LLAMA)
    models.save(tmp_path / "base", model, params)
    adapters = grown(lora.init(KEY, params, 2, "q_proj"))
    adapters = jax.tree.map(lambda x: np.asarray(x) * factor if x.ndim else x, adapters)
    lora.save(tmp_path / "adapter", params, adapters, base_model=str(tmp_path / "base"))
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": alpha}))
    with pytest.raises(UserError, match=r"lora_alpha is -?1e\+30|merged .* is not finite; .*alpha"):
        export.export(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_merged_reward_model_says_where_its_score_stands(is_ours, tmp_path):
    """That of somebody else reads the whole text of its chat template."""
    model = models.build(LLAMA)
    params = some_params(LLAMA)
    models.save(tmp_path / "base", model, params)
    adapters = models.add_head(KEY, grown(lora.init(KEY, params, 2, "q_proj")), "score", 8)
    lora.save(tmp_path / "adapter", params, adapters, base_model=str(tmp_path / "base"))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    if not is_ours:
        save_file(load_file(weights), weights)  # without our entry
    export.export(tmp_path / "adapter", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text("utf-8"))
    assert ("score_position" in config) == is_ours


def test_adapters_that_are_no_folder_are_refused(tmp_path):
    params = initial_params(models.build(CONFIG))
    first, second = (lora.init(KEY, params, rank, f"h_{rank - 1}/attn/c_proj") for rank in (1, 2))
    for adapters, message in (
        (first | second, "one rank and scale"),
        ({"value": {"kernel": np.zeros(8)}}, "value/kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.save(tmp_path, params, adapters)


def test_folders_are_the_same_to_the_byte_whether_layers_are_scanned_or_not(tmp_path):
    """Of the model and of its adapters."""
    config = replace(CONFIG, num_layers=3)
    base = some_params(config)
    adapters = grown(lora.init(jax.random.key(1), base, 2))
    written = []
    for scanned in (False, True):
        model, params = tiny(config, scan_layers=scanned)
        trained = stack_layers(adapters) if scanned else adapters
        folder = tmp_path / str(scanned)
        models.save(folder / "model", model, merge(params, trained))
        lora.save(folder / "adapter", params, trained)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        written.append({path.relative_to(folder): path.read_bytes() for path in files})
    assert len(written[0]) >= 4
    assert written[0] == written[1]
