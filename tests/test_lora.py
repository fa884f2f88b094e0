"""LoRA as functions of parameters: the factored term, its gradient, merging, memory, PEFT's folders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rlhf_jax import models, sft
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora
from rlhf_jax.models.stack import Dense
from rlhf_jax.types import Demonstrations, TrainState

GPT2 = models.GPT2Config(vocab_size=24, max_length=16, hidden_size=16, num_layers=2, num_heads=2)
LLAMA = models.LlamaConfig(
    vocab_size=24, max_length=16, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=20
)
CONFIGS = {"gpt2": GPT2, "gpt2 scanned": dataclasses.replace(GPT2, scan_layers=True, remat=True), "llama": LLAMA}
TOKENS = jax.random.randint(jax.random.key(9), (2, 8), 2, 24)


def grown(adapters):
    """Adapters as after some training: B is no longer 0."""
    leaves = flatten_dict(adapters)
    rng = np.random.default_rng(0)
    noise = {path: 0.2 * rng.normal(size=leaf.shape) * (path[-1] != "lora_scale") for path, leaf in leaves.items()}
    return unflatten_dict({path: jnp.float32(leaf + noise[path]) for path, leaf in leaves.items()})


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def adapted(request):
    model = models.build(request.param)
    params = model.init(jax.random.key(0))
    return model, params, lora.init(jax.random.key(1), params, 3, alpha=6.0)


def test_the_layer_adds_the_factored_term():
    params = {
        "kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]]),
        "bias": jnp.array([10.0, 20.0]),
        "lora_a": jnp.array([[1.0], [3.0]]),
        "lora_b": jnp.array([[5.0, 7.0]]),
        "lora_scale": jnp.float32(0.5),
    }
    # x W + b = (11, 22); x A = 7; 0.5 * 7 * (5, 7) = (17.5, 24.5)
    out = Dense(2).apply({"params": params}, jnp.array([[1.0, 2.0]]))
    np.testing.assert_array_equal(out, [[28.5, 46.5]])


def test_adapters_start_at_zero_with_peft_s_range_and_scale(adapted):
    model, params, adapters = adapted
    apply = jax.jit(model.apply)
    assert (apply(params, TOKENS) == apply(lora.attach(params, adapters), TOKENS)).all()
    leaves = flatten_dict(adapters)
    kernels = [path for path, leaf in flatten_dict(params).items() if path[-1] == "kernel"]
    assert {path[:-1] for path in leaves} == {path[:-1] for path in kernels}
    for path, leaf in leaves.items():
        size_in, size_out = flatten_dict(params)[(*path[:-1], "kernel")].shape[-2:]
        if path[-1] == "lora_a":
            assert leaf.shape[-2:] == (size_in, 3)
            assert 0.5 / size_in**0.5 < jnp.abs(leaf).max() <= 1 / size_in**0.5
        elif path[-1] == "lora_b":
            assert leaf.shape[-2:] == (3, size_out)
            assert (leaf == 0).all()
        else:
            assert (leaf == 2.0).all()


def test_match_chooses_layers():
    params = models.build(GPT2).init(jax.random.key(0))
    adapters = lora.init(jax.random.key(1), params, 2, "h_1/attn/c_attn|mlp/c_fc")
    assert {"/".join(path[:-1]) for path in flatten_dict(adapters)} == {
        "h_0/mlp/c_fc",
        "h_1/attn/c_attn",
        "h_1/mlp/c_fc",
    }
    with pytest.raises(ValueError, match="no kernel's path matches 'q_proj'; the layers hold attn/c_attn, attn/c_proj"):
        lora.init(jax.random.key(1), params, 2, "q_proj")
    with pytest.raises(ValueError, match="rank must be at least 1"):
        lora.init(jax.random.key(1), params, 0)
    with pytest.raises(ValueError, match="h_2/attn/c_attn/lora_a belongs to no kernel"):
        lora.attach(params, {"h_2": {"attn": adapters["h_1"]["attn"]}})


def test_merging_gives_the_same_function_and_not_the_base(adapted):
    model, params, adapters = adapted
    adapters = grown(adapters)
    attached, merged = lora.attach(params, adapters), lora.merge(params, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    apply = jax.jit(model.apply)
    logits = apply(attached, TOKENS)
    np.testing.assert_allclose(apply(merged, TOKENS), logits, atol=2e-6)
    assert jnp.abs(logits - apply(params, TOKENS)).max() > 0.05
    # The sampler decodes through the adapters too.
    positions = jnp.broadcast_to(jnp.arange(8), TOKENS.shape)
    decoded, _ = jax.jit(model.decode)(attached, TOKENS, positions, jnp.ones_like(TOKENS), model.init_cache(2, 8), 0)
    np.testing.assert_allclose(decoded, logits, atol=2e-6)


def test_gradients_are_those_of_the_product(adapted):
    model, params, adapters = adapted
    adapters = grown(adapters)

    def loss(tree):
        return jnp.square(model.apply(tree, TOKENS)).mean()

    found = flatten_dict(jax.jit(jax.grad(lambda adapters: loss(lora.attach(params, adapters))))(adapters))
    of_kernels = flatten_dict(jax.jit(jax.grad(loss))(lora.merge(params, adapters)))
    leaves = flatten_dict(adapters)
    for path in leaves:
        if path[-1] != "lora_a":
            continue
        module = path[:-1]
        a, b = leaves[(*module, "lora_a")], leaves[(*module, "lora_b")]
        of_kernel = 2.0 * of_kernels[(*module, "kernel")]  # the scale is 6 / 3
        np.testing.assert_allclose(found[path], of_kernel @ jnp.swapaxes(b, -1, -2), atol=1e-6)
        np.testing.assert_allclose(found[(*module, "lora_b")], jnp.swapaxes(a, -1, -2) @ of_kernel, atol=1e-6)
        assert (found[(*module, "lora_scale")] == 0).all()


def test_a_small_change_survives_merging_into_bfloat16_weights():
    model = models.build(dataclasses.replace(GPT2, compute_dtype="bfloat16"))
    params = jax.tree.map(lambda leaf: (leaf + 1.0).astype(jnp.bfloat16), model.init(jax.random.key(0)))
    adapters = lora.init(jax.random.key(1), params, 2)
    adapters = jax.tree.map(lambda new, first: first + 2e-3 * (new - first), grown(adapters), adapters)
    merged = flatten_dict(jax.device_get(jax.jit(lora.merge)(params, adapters)))
    for path, leaf in flatten_dict(jax.device_get(params)).items():
        adapts = path[-1] == "kernel"
        assert merged[path].dtype == (jnp.float32 if adapts else jnp.bfloat16)
        assert (merged[path] != leaf).any() == adapts
        assert not adapts or (merged[path].astype(jnp.bfloat16) == leaf).mean() > 0.9  # what rounding would have lost


def step(model, optimizer):
    def update(state, batch, policy_fn):
        return sft.update(
            state, batch, jax.random.key(0), policy_fn=policy_fn, optimizer=optimizer, config=sft.Config()
        )

    ones = jnp.ones_like(TOKENS)
    return jax.jit(update), Demonstrations(tokens=TOKENS, attention_mask=ones, response_mask=ones.at[:, :3].set(0))


@pytest.mark.slow
def test_a_step_trains_adapters_and_heads_alone_and_reads_a_frozen_base_in_its_own_dtype():
    model = models.build(GPT2)
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.init(jax.random.key(0)))
    head = models.add_head(jax.random.key(2), base, "value")["value"]
    trained = {**lora.init(jax.random.key(1), base, 2), "value": head}
    update, batch = step(model, optimizer := optax.adam(5e-2))
    state = TrainState.create(trained, optimizer)
    policy_fn = lora.bind(models.policy_fn(model), base)
    assert policy_fn(trained, TOKENS, jnp.ones_like(TOKENS), None).values is not None
    losses = []
    for _ in range(12):
        state, metrics = update(state, batch, policy_fn)
        losses.append(float(metrics["sft/loss"]))
    assert losses[-1] < losses[0] - 0.1
    assert jax.tree.structure(state.params) == jax.tree.structure(trained)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    assert (state.params["h_0"]["attn"]["c_attn"]["lora_scale"] == 1.0).all()


@pytest.mark.slow
def test_a_step_needs_less_than_half_again_the_memory_of_the_weights():
    config = models.GPT2Config(vocab_size=512, max_length=16, hidden_size=192, num_layers=3, num_heads=4)
    model = models.build(config)
    base = model.init(jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    update, batch = step(model, optimizer := optax.adam(1e-2))
    fn, state = models.policy_fn(model), TrainState.create(lora.init(jax.random.key(1), base, 4), optimizer)

    def through_a_merged_copy(base, adapters, *args):
        return fn(lora.merge(base, adapters), *args)

    temporary = [
        update.lower(state, batch, policy_fn).compile().memory_analysis().temp_size_in_bytes
        for policy_fn in (lora.bind(fn, base), jax.tree_util.Partial(through_a_merged_copy, base))
    ]
    assert temporary[0] < 1.5 * size < temporary[1]


def test_peft_folders_round_trip(adapted, tmp_path):
    _, params, adapters = adapted
    head = models.add_head(jax.random.key(3), params, "score")["score"]
    head |= {"gain": jnp.float32(2.0), "bias": jnp.float32(0.25), "shift": jnp.float32(-3.0)}
    lora.save(tmp_path, params, {**grown(adapters), "score": head}, base_model="some/base")
    loaded = lora.load(tmp_path, params)
    with safe_open(tmp_path / "adapter_model.safetensors", "numpy") as weights:
        assert weights.metadata() == {"reward_shift": "-2.5"}  # two entries would be written in a random order
    # A score comes back as gain 1 and bias 0.
    kept = {"kernel": 2.0 * head["kernel"], "gain": 1.0, "bias": 0.0, "shift": -2.5}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), loaded, {**grown(adapters), "score": kept})
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (3, 6.0, ["score"])
    assert config["base_model_name_or_path"] == "some/base"


def test_partial_and_strange_folders(tmp_path):
    params = models.build(GPT2).init(jax.random.key(0))
    file, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"

    def saved_targets(match):
        lora.save(tmp_path, params, lora.init(jax.random.key(1), params, 2, match))
        return json.loads(file.read_text("utf-8"))["target_modules"]

    places = ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj"]
    assert saved_targets("h_1/attn|h_0/attn/c_attn") == places
    assert saved_targets("h_1/attn") == ["attn.c_attn", "attn.c_proj"]
    expected = lora.init(jax.random.key(1), params, 2, "h_1/attn")
    assert jax.tree.structure(lora.load(tmp_path, params)) == jax.tree.structure(expected)
    config, tensors = json.loads(file.read_text("utf-8")), load_file(weights)

    def refuses(match, **changes):
        file.write_text(json.dumps(config | changes), encoding="utf-8")
        with pytest.raises(UserError, match=match):
            lora.load(tmp_path, params)

    refuses("peft_type is 'IA3', and only LORA is read", peft_type="IA3")
    refuses("use_dora is True: such adapters are not supported", use_dora=True)
    refuses("bias is 'all'", bias="all")
    refuses("lora_alpha is None, expected a number", lora_alpha=None)
    file.write_text(json.dumps(config | {"use_rslora": True, "lora_alpha": 8}), encoding="utf-8")
    assert lora.load(tmp_path, params)["h_1"]["attn"]["c_attn"]["lora_scale"] == pytest.approx(8 / 2**0.5)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": np.ones((2, 16), np.float32)}, weights)
    refuses("unexpected tensors: lm_head.lora_A.weight")
    save_file({name: value for name, value in tensors.items() if "h.1.attn.c_proj.lora_B" not in name}, weights)
    refuses(r"missing tensors: transformer.h.1.attn.c_proj.lora_B.weight")
    save_file({"base_model.model.score.weight": np.ones((1, 16), np.float32)}, weights, {"reward_shift": "much"})
    refuses("reward_shift in its metadata is no number")
    save_file({}, weights)
    refuses("no adapter of a kernel of this model")
    file.unlink()
    with pytest.raises(UserError, match="an adapter folder holds adapter_config"):
        lora.load(tmp_path, params)
    two_ranks = [lora.init(jax.random.key(1), params, rank, match) for rank, match in ((1, "h_0"), (2, "h_1"))]
    for adapters, message in (
        (two_ranks[0] | two_ranks[1], "one rank and scale"),
        ({"value": {"kernel": jnp.zeros(16)}}, "cannot save value/kernel as adapters"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.save(tmp_path, params, adapters)
