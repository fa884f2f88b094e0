"""The form of an operation is chosen for the machine that a program is lowered for, whatever
machine that is done on.
"""

import contextlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import initial_params, slow
from numpy.testing import assert_allclose
from programs import mesh_of

from rlhf_jax import models, sharding
from rlhf_jax.models import kernels
from rlhf_jax.models.kernels import cache, fused, norms

SHAPES = {"x": (64, 8), "kernel": (8, 4), "scale": (8,), "bias": (8,)}


def values_and_gradients(x, kernel, scale, bias):
    def loss(x, kernel, scale, bias):
        return jnp.sum(jnp.sin(kernels.product(norms.norm(x, scale, bias, 1e-5), kernel)))

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(x, kernel, scale, bias)


def lowered(function, shapes, platform):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "products"),
    [
        # Four means, the product, and its two gradients, by halves of the rows.
        ("cpu", {"64x2": 4, "2x32x4": 1, "2x8x4": 0, "2x4x8": 1, "2x32x8": 1}),
        ("cuda", {"64x4": 1, "64x8": 1, "8x4": 1}),
        ("tpu", {"64x4": 1, "64x8": 1, "8x4": 1}),
    ],
)
def test_norms_and_products(platform, products):
    """On an accelerator the plain formula: a norm holds no product."""
    text = lowered(values_and_gradients, SHAPES.values(), platform)
    results = re.findall(r"dot_general.*-> tensor<([\dx]+)xf32>", text)
    assert {shape: results.count(shape) for shape in products} == products
    assert len(results) == sum(products.values())


@pytest.mark.parametrize("trained", ["", "scale", "kernel", "scale bias kernel"])
def test_rows_that_are_mapped_meet_weights_that_are_the_same_on_all_devices(trained):
    """Frozen ones beside adapters, for example: the gradient rules are asked for one gradient of
    each, and JAX adds up those of weights over the devices.
    """
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    arrays = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}
    wanted = {"x", *trained.split()}

    def gradients(arrays):
        frozen = {name: x for name, x in arrays.items() if name not in wanted}
        trained = {name: x for name, x in arrays.items() if name in wanted}
        loss = lambda trained: values_and_gradients(**frozen, **trained)[0]  # noqa: E731
        return jax.grad(loss)(trained)

    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    rows = jax.sharding.PartitionSpec("data")
    whole = jax.sharding.PartitionSpec()
    specs = {name: rows if name == "x" else whole for name in arrays}
    of_wanted = {name: specs[name] for name in wanted}
    mapped = jax.shard_map(gradients, mesh=mesh, in_specs=(specs,), out_specs=of_wanted)
    found, expected = jax.jit(mapped)(arrays), jax.jit(gradients)(arrays)
    for name in wanted:
        assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("platform", "rows"), [("cpu", 2), ("cuda", 1), ("tpu", 1)])
def test_the_values_of_one_query(platform, rows):
    shapes = ((3, 2, 1, 7), (3, 2, 7, 4))
    text = lowered(kernels.weighted_sum, shapes, platform)
    assert re.findall(r"dot_general.*-> tensor<([\dx]+)xf32>", text) == [f"3x2x{rows}x4"]
    weights, value = (np.random.default_rng(0).normal(size=shape) for shape in shapes)
    found = jax.jit(kernels.weighted_sum)(np.float32(weights), np.float32(value))
    assert_allclose(found, weights @ value, rtol=1e-4, atol=1e-6)


FAMILIES = {
    "gpt2": models.GPT2Config(40, 64, 64, 1, 4, compute_dtype="bfloat16"),
    "llama": models.LlamaConfig(
        40, 64, 64, 3, 4, num_kv_heads=2, intermediate_size=32, scan_layers=True
    ),
    "gemma": models.Gemma3TextConfig(
        40,
        64,
        16,
        3,
        2,
        head_dim=16,
        intermediate_size=24,
        sliding_window=16,
        global_every=3,
        compute_dtype="bfloat16",
    ),
}


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN's attention by JAX's formula for it; its calls: (shape of the queries, of the keys)."""
    calls = []
    attend = jax.nn.dot_product_attention

    def call(query, key, value, *, implementation, **settings):
        assert implementation == "cudnn"
        assert query.dtype == key.dtype == value.dtype == jnp.bfloat16
        calls.append((query.shape, key.shape))
        return attend(query, key, value, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    return calls


def decoded(model, params):
    """Logits of two tokens, one by one, after a prompt of nine that is padded on the left in the
    second row; and the cache.
    """
    tokens = np.arange(22).reshape(2, 11)
    key_mask = (np.arange(64) // 4 != 8).reshape(2, 32).astype(np.int32)
    positions = np.maximum(np.stack([np.arange(11), np.arange(11) - 4]), 0)
    held = model.init_cache(2, 32)
    _, held = model.decode(params, tokens[:, :9], positions[:, :9], key_mask, held, 0)
    outputs = []
    for i in range(9, 11):
        token = tokens[:, i : i + 1], positions[:, i : i + 1]
        logits, held = model.decode(params, *token, key_mask, held, jnp.int32(i))
        outputs.append(logits)
    return jnp.concatenate(outputs, axis=1), held


@pytest.mark.parametrize(
    ("family", "platform"),
    [
        ("gpt2", "gpu"),
        *(slow("gemma", platform) for platform in ("gpu", "tpu")),
        slow("llama", "gpu"),
    ],
)
def test_the_cache_of_an_accelerator_gives_the_same_logits(family, platform, monkeypatch, cudnn):
    """Of a prompt padded on the left, and of single tokens after it; also where cuDNN reads the
    cache: in bfloat16, with windows too."""
    config = FAMILIES[family]
    model = models.build(config)
    params = jax.tree.map(lambda x: 3 * np.asarray(x), initial_params(model))
    expected, _ = jax.jit(lambda: decoded(model, params))()
    monkeypatch.setattr(fused, "platform", lambda: platform)
    found, held = jax.jit(lambda: decoded(model, params))()
    tolerance = 0.05 if config.compute_dtype == "bfloat16" else 1e-4
    assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
    assert {x.ndim for x in jax.tree.leaves(held)} == {3 if platform == "tpu" else 4}
    slots = {keys[1] for _, keys in cudnn}
    assert slots == (
        {"gpt2": {32}, "gemma": {16, 32}, "llama": set()}[family] if platform == "gpu" else set()
    )


def plainly(query, key, value, mask):
    """Attention of queries [B, H, G, 1, Dh] to keys [B, H, S, Dh] in NumPy."""
    scores = np.einsum("bhgtd,bhsd->bhgts", query, key)
    weights = np.exp(np.where(mask[:, None], scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhgts,bhsd->bhgtd", weights, value)


@pytest.mark.parametrize(
    ("sizes", "own"),  # keys of a device
    [
        (None, (2, 96, 2, 16)),
        ((1, 1, 2), (2, 96, 1, 16)),
        ((2, 1, 1), (1, 96, 2, 16)),
        ((1, 1, 4), (2, 96, 2, 16)),
    ],
)
def test_cudnn_reads_the_slots_of_each_row(sizes, own, monkeypatch, cudnn):
    """Those of a window's cache need not be neighbours."""
    monkeypatch.setattr(fused, "platform", lambda: "gpu")
    draw = np.random.default_rng(0)
    shapes = (2, 2, 2, 1, 16), (2, 2, 96, 16), (2, 2, 96, 16)
    query, key, value = (draw.normal(size=shape).astype(jnp.bfloat16) for shape in shapes)
    slots = np.arange(96)
    mask = np.array([slots < 70, (slots >= 5) & (slots < 33) & (slots % 4 != 1)])[:, None, None]

    @jax.jit
    def attend(query, key, value, mask):
        held = cache.held(key, value)
        assert [x.shape for x in held] == [(2, 96, 2, 16)] * 2
        return cache.attention(query, held, mask)

    with contextlib.nullcontext() if sizes is None else jax.set_mesh(mesh_of(*sizes)):
        found = attend(query, key, value, mask)
    expected = plainly(*map(np.float32, (query, key, value)), mask)
    assert_allclose(np.float32(found), expected, atol=0.05)
    assert cudnn == [((own[0], 1, 2 * own[2], 16), own)]


def test_the_length_of_a_row_ends_with_its_last_slot(monkeypatch):
    monkeypatch.setattr(fused, "platform", lambda: "gpu")
    lengths = []

    def call(query, key, value, *, query_seq_lengths, key_value_seq_lengths, **settings):
        lengths.append((query_seq_lengths.tolist(), key_value_seq_lengths.tolist()))
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    mask = (
        jnp.array([[0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1, 0, 0], [1] * 8])[:, None, None] != 0
    )
    query, key = (jnp.ones((3, 1, *shape, 16), jnp.bfloat16) for shape in ((2, 1), (8,)))
    cache.attention(query, cache.held(key, key), mask)
    assert lengths == [([1, 1, 1], [3, 6, 8])]


@pytest.mark.parametrize(
    ("platform", "sizes", "dtype", "width"),
    [
        ("gpu", None, "float32", 16),
        ("gpu", None, "bfloat16", 20),
        ("gpu", None, "bfloat16", 256),
        ("tpu", (1, 1, 2), "bfloat16", 16),
    ],
)
def test_where_the_plain_formula_reads_the_cache(platform, sizes, dtype, width, monkeypatch):
    """On GPUs in float32 and for heads that cuDNN refuses, and heads that a mesh of TPUs cuts."""
    monkeypatch.setattr(fused, "platform", lambda: platform)
    query, key = (np.ones((2, 2, *shape, width), dtype) for shape in ((1, 1), (32,)))

    def attend(query, key):
        return cache.attention(query, cache.held(key, key), jnp.ones((2, 1, 1, 32), bool))

    with contextlib.nullcontext() if sizes is None else jax.set_mesh(mesh_of(*sizes)):
        assert jax.eval_shape(attend, query, key) is None


@pytest.mark.parametrize(
    ("capability", "sizes"),
    [("8.0", {64, 128}), ("9.0", {64, 128, 256}), ("12.0", {64, 128, 256}), ("gfx942", {64, 128})],
)
def test_the_heads_that_cudnn_takes_on_a_card(capability, sizes, monkeypatch):
    card = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [card])
    assert {size for size in (64, 100, 128, 256, 512) if fused.fits_cudnn(size)} == sizes


@pytest.mark.parametrize("device", ["cpu", jax.devices("cpu")[0]])
def test_a_program_is_that_of_the_device_that_is_chosen_for_it(device, monkeypatch):
    """Where JAX's default is another one."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    traced = []
    program = jax.jit(lambda x: traced.append(fused.platform()) or x)
    program(1.0)
    with jax.default_device(device):
        program(1.0)
    assert traced == ["gpu", "cpu"]


def test_a_kernel_gets_all_rows_of_its_heads_where_fsdp_cuts_these():
    """As large models are sampled: rows are mapped over "data", "fsdp" and "tensor" cut heads."""
    mesh = sharding.make_mesh(1, fsdp=2, tensor=2)
    shapes = []

    def kernel(x, rows):
        shapes.append((x.shape, rows.shape))
        return x

    def program(x, rows):
        return fused.on_each_device(kernel, 4, (x,), rows)

    data = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=data, out_specs=data, axis_names={"data"}, check_vma=False
    )
    jax.eval_shape(jax.jit(mapped), jnp.ones((8, 4, 3)), jnp.ones(8))
    assert shapes == [((8, 1, 3), (8,))]
