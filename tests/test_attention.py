"""The implementations of attention: equal to the plain one for every mask, their memory, and what
is lowered for GPU and TPU."""

import functools
import itertools
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import initial_params, perturbed, slow
from numpy.testing import assert_allclose
from programs import array_sizes, mesh_of

from rlhf_jax import Demonstrations, TrainState, models, sft, sharding
from rlhf_jax.models import attention
from rlhf_jax.models.kernels import fused

KEY = jax.random.key(0)

MASKS = {
    "causal": ([1] * 7, None),
    "left padding": ([0, 0, 1, 1, 1, 1, 1], None),
    "documents": ([0, 1, 1, 2, 2, 2, 3], None),
    "window": ([1] * 7, 3),
    "window in documents": ([0, 1, 1, 1, 1, 2, 2], 2),
}
GPT2 = models.GPT2Config(64, 2048, 32, 3, 4, remat=True, scan_layers=True)


def inputs(length=7, heads=2, groups=2, width=4):
    """Queries [B, H, G, T, Dh], keys and values."""
    draw = np.random.default_rng(0)
    shapes = [(2, heads, groups, length, width), *[(2, heads, length, width)] * 2]
    return [draw.normal(size=shape).astype(np.float32) for shape in shapes]


def gradients(compute, mask, length=7):
    """The output at real tokens, and the gradients of a weighted sum of it."""
    weights = (
        np.random.default_rng(1).normal(size=inputs(length)[0].shape)
        * (mask != 0)[:, None, None, :, None]
    )

    def loss(*arrays):
        mixed = compute(*arrays)
        return jnp.sum(weights * mixed), jnp.where(weights != 0, mixed, 0)

    (_, mixed), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*inputs(length))
    return mixed, grads


def of(compute, **settings):
    @jax.jit
    def run(mask, window):  # the window is an argument, so that all masks share a program
        seen = attention.seen_in_text(mask)._replace(window=window)
        return gradients(lambda *arrays: compute(*arrays, seen, **settings), mask)

    return run


@functools.cache
def plain():
    return of(attention.attention)


def rows(mask):
    return jnp.asarray([mask, [1] * len(mask)])


def assert_close(found, expected):
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=2e-5, rtol=1e-5), found, expected)


@pytest.mark.parametrize(
    "scores", [14, 21]
)  # blocks of 2 and of 3 queries: the last one is not full
def test_blocks_give_the_same_values_and_gradients(scores, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_SCORES", scores)
    blockwise = of(attention.blockwise)
    for mask, window in MASKS.values():
        assert_close(blockwise(rows(mask), window or 7), plain()(rows(mask), window or 7))


@pytest.mark.parametrize("name", MASKS)
def test_what_cudnn_is_asked_for_gives_the_same_values_and_gradients(name, monkeypatch):
    """The call alone is replaced: cuDNN needs a GPU. Seven tokens become eight, as it wants an even
    number.
    """
    original = jax.nn.dot_product_attention

    def on_cpu(query, key, value, *, implementation, **settings):
        assert implementation == "cudnn"
        assert query.shape == (2, 8, 4, 4)
        assert key.shape == (2, 8, 2, 4)
        return original(query, key, value, **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    mask = rows(MASKS[name][0])
    window = MASKS[name][1]
    compute = functools.partial(fused.attention, name="cudnn", window=window)

    @jax.jit
    def run(mask):
        return gradients(lambda *arrays: compute(*arrays, mask), mask)

    assert_close(run(mask), plain()(mask, window or 7))


ROWS = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
)


@pytest.fixture
def by_lengths(monkeypatch):
    """cuDNN's attention of rows of one text by JAX's formula for it; the lengths that it got."""
    original = jax.nn.dot_product_attention
    asked = []

    def on_cpu(query, key, value, *, implementation, **settings):
        assert implementation == "cudnn"
        assert settings.get("mask") is None
        assert settings["is_causal"]
        assert settings["query_seq_lengths"] is settings["key_value_seq_lengths"]
        jax.debug.callback(lambda x: asked.append(x.tolist()), settings["query_seq_lengths"])
        return original(query, key, value, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    return asked


@pytest.mark.slow
def test_rows_of_one_text_need_no_mask(by_lengths):
    """Log-probs, scores and gradients are those of the plain formula, wherever in its row a text
    begins; a row without a token gives numbers too.
    """
    sizes = {"num_kv_heads": 2, "intermediate_size": 12, "sliding_window": 3, "global_every": 2}
    config = models.Gemma3TextConfig(13, 16, 8, 2, 4, attention="xla", **sizes)
    plain = models.build(config)
    fused_model = models.build(replace(plain.config, attention="cudnn"))
    params = models.add_head(KEY, perturbed(initial_params(plain)), "score")
    real = jnp.asarray(ROWS)
    outside = config.vocab_size  # an id of pads alone
    tokens = jnp.where(real, 1 + jnp.arange(35).reshape(5, 7) % 12, outside)

    def figures(model):
        def loss(params):
            log_probs = models.policy_fn(model, one_text=True)(params, tokens, real).log_probs
            learned = real[:, 1:] * real[:, :-1]
            counted = jnp.where(learned, log_probs[:, 1:], 0.0)
            scores = models.score_fn(model, one_text=True)(params, tokens, real)
            return jnp.sum(jnp.sin(counted)) + jnp.sum(jnp.cos(scores)), (counted, scores)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    found = figures(fused_model)
    assert by_lengths
    assert_close(found, figures(plain))
    whole = jax.jit(functools.partial(fused_model.hidden, one_text=True))(params, tokens, real)
    assert np.isfinite(whole).all()


def test_the_lengths_that_cudnn_is_told(by_lengths):
    """Of an empty row one: a softmax over nothing is not a number. A pad's id is not looked up."""
    model = models.build(models.GPT2Config(13, 16, 8, 1, 2, attention="cudnn"))
    hidden = jax.jit(functools.partial(model.hidden, one_text=True))
    states = hidden(initial_params(model), np.where(ROWS, 1, 13), ROWS)
    jax.effects_barrier()
    assert by_lengths == [[7, 5, 4, 4, 1]]
    assert np.isfinite(states).all()


@pytest.mark.parametrize("name", ["auto", "xla", "blockwise"])
def test_what_reads_no_lengths_computes_the_same_bits(name):
    model = models.build(models.GPT2Config(13, 16, 8, 1, 2, attention=name))
    arguments = (initial_params(model), np.ones_like(ROWS), ROWS)
    programs = [
        str(jax.make_jaxpr(functools.partial(model.hidden, **said))(*arguments))
        for said in ({}, {"one_text": True})
    ]
    assert programs[0] == programs[1]


@pytest.mark.slow
def test_splash_gives_the_same_values_and_gradients(monkeypatch):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    monkeypatch.setattr(
        splash, "make_splash_mha", functools.partial(splash.make_splash_mha, interpret=True)
    )
    documents, window = MASKS["window in documents"]
    mask = rows(np.repeat(documents, 20))
    window = 20 * window
    compute = functools.partial(fused.attention, name="splash", window=window)
    found = gradients(lambda *arrays: compute(*arrays, mask), mask, 140)
    seen = attention.seen_in_text(mask, window)
    assert_close(found, gradients(lambda *arrays: attention.attention(*arrays, seen), mask, 140))


def test_attention_from_its_definition():
    """Softmax of the scores of what is seen, in both dtypes of a model."""
    query, key, value = inputs()
    scores = np.where(
        np.tri(7, dtype=bool),
        np.einsum("bhgtd,bhsd->bhgts", query, key),
        -np.inf,
    )
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    expected = np.einsum("bhgts,bhsd->bhgtd", weights, value)

    @jax.jit
    def mixed(*arrays):
        return attention.attention(*arrays, attention.seen_in_text(jnp.ones((2, 7), int)))

    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.03)):
        found = mixed(*(np.asarray(x, dtype) for x in (query, key, value)))
        assert_allclose(np.float32(found), expected, atol=tolerance)


def test_blocks_drop_as_many_weights():
    """Values of ones: the mean of what arrives is 1 whatever is dropped, and each block draws for
    itself.
    """
    (query, key, _) = inputs(64)
    draws = KEY
    seen = attention.seen_in_text(jnp.ones((2, 64), int))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK_SCORES", 64 * 16)
        drop = jax.jit(
            lambda key: attention.blockwise(query * 0, key, jnp.ones_like(key), seen, (draws, 0.5))
        )
        mixed = np.asarray(drop(key))[..., 0]
    assert abs(np.mean(mixed) - 1) < 0.05
    assert np.std(mixed[..., 16:]) > 0.1
    # With one draw for both, their sums over the same keys would rise and fall together.
    third = mixed[..., 32:48].ravel()
    fourth = mixed[..., 48:].ravel()
    assert np.corrcoef(third, fourth)[0, 1] < 0.3


@pytest.mark.parametrize(
    ("backend", "changes", "queries", "keys", "drops", "expected"),
    [
        ("cpu", {}, 511, 511, False, "xla"),
        ("cpu", {}, 512, 512, False, "blockwise"),
        ("cpu", {}, 1, 4096, False, "xla"),
        ("cpu", {"attention": "xla"}, 4096, 4096, False, "xla"),
        ("cpu", {"attention": "blockwise"}, 4, 4, False, "blockwise"),
        ("gpu", {"compute_dtype": "bfloat16"}, 512, 512, False, "cudnn"),
        ("gpu", {"compute_dtype": "bfloat16"}, 512, 512, True, "blockwise"),
        ("gpu", {"compute_dtype": "bfloat16"}, 512, 1024, False, "blockwise"),
        (
            "gpu",
            {"compute_dtype": "bfloat16", "num_heads": 8},
            512,
            512,
            False,
            "blockwise",
        ),  # heads of 4
        ("gpu", {}, 512, 512, False, "blockwise"),
        ("tpu", {}, 512, 512, False, "splash"),
        ("tpu", {"attention": "xla"}, 512, 512, False, "xla"),
        ("cpu", {"attention": "splash"}, 16, 16, False, "splash"),
        ("cpu", {"attention": "splash"}, 1, 16, False, "xla"),
    ],
)
def test_which_implementation_is_taken(
    backend, changes, queries, keys, drops, expected, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    card = SimpleNamespace(compute_capability="8.0")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [card])
    config = models.GPT2Config(64, 4096, 32, 2, changes.pop("num_heads", 4), **changes)
    assert attention.implementation(config, queries, keys, drops) == expected


def test_splash_is_taken_for_several_tpus_where_their_mesh_is_known(monkeypatch):
    monkeypatch.setattr(fused, "platform", lambda: "tpu")
    assert attention.implementation(GPT2, 512, 512, False) == "blockwise"
    with jax.set_mesh(sharding.make_mesh(4)):
        assert attention.implementation(GPT2, 512, 512, False) == "splash"


GEMMA = models.Gemma3TextConfig(
    32,
    256,
    16,
    3,
    2,
    head_dim=8,
    intermediate_size=24,
    num_kv_heads=1,
    sliding_window=5,
    global_every=3,
)


@pytest.mark.slow
def test_a_model_computes_the_same_in_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_SCORES", 40)
    config = replace(GEMMA, scan_layers=True)
    plain, blocks = (models.build(replace(config, attention=name)) for name in ("xla", "blockwise"))
    params = initial_params(plain)
    tokens = np.arange(20).reshape(2, 10)
    mask = np.array(
        [
            [0, 0, *[1] * 8],
            [1] * 4 + [2] * 6,
        ]
    )
    columns = jnp.array([[9, 3], [5, 0]])
    ours, theirs = (
        jax.jit(model.hidden)(params, tokens, mask, None, columns) for model in (blocks, plain)
    )
    assert_allclose(ours, theirs, atol=2e-5)


def step_and_arguments(length, batch=2, **changes):
    """An SFT update and the shapes of its arguments."""
    model = models.build(replace(GPT2, **changes))
    optimizer = optax.adam(1e-3)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    state = jax.eval_shape(lambda: TrainState.create(model.init(KEY), optimizer))
    batch = Demonstrations(tokens=tokens, attention_mask=tokens, response_mask=tokens)
    settings = {
        "policy_fn": models.policy_fn(model),
        "optimizer": optimizer,
        "config": sft.Config(),
    }
    step = jax.jit(lambda state, batch: sft.update(state, batch, KEY, **settings))
    return step, (state, batch)


def temporary_bytes(length, **changes):
    step, arguments = step_and_arguments(length, **changes)
    return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_grows_with_the_length_and_not_with_its_square():
    """Each doubling at most 2.3 times, where the plain form
    grows by 3 to 4.
    """
    lengths = (256, 512, 1024, 2048)
    sizes = {"batch": 8, "hidden_size": 128, "num_layers": 4}
    auto = [temporary_bytes(length, **sizes) for length in lengths]
    print(
        dict(
            zip(
                lengths,
                (f"{size / 2**20:.0f} MiB" for size in auto),
                strict=True,
            )
        )
    )
    assert max(later / former for former, later in itertools.pairwise(auto)) < 2.3
    assert temporary_bytes(lengths[-1], **sizes, attention="xla") > 2.5 * auto[-1]


SCORES = re.compile(r"\d+x(128|256)x256xf32")  # of all queries, or of the later half


@pytest.mark.slow
def test_splash_is_lowered_for_tpu():
    """A training step, the prompt of a decode and one token: the kernel where there are many
    queries, and no scores.
    """
    step, arguments = step_and_arguments(256, attention="splash")
    text = step.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3  # forward, queries' and keys' gradients
    assert not SCORES.search(text)
    plain, _ = step_and_arguments(256, attention="xla")
    assert SCORES.search(plain.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text())
    model = models.build(replace(GPT2, attention="splash"))
    params, cache = jax.eval_shape(lambda: (model.init(KEY), model.init_cache(2, 300)))
    for queries, is_fused in ((256, True), (1, False)):
        tokens, key_mask = (jax.ShapeDtypeStruct((2, n), jnp.int32) for n in (queries, 300))
        decode = jax.jit(functools.partial(model.decode, index=0))
        text = (
            decode.trace(params, tokens, tokens, key_mask, cache)
            .lower(lowering_platforms=("tpu",))
            .as_text()
        )
        assert ("tpu_custom_call" in text) == is_fused


def test_cudnn_is_lowered_for_cuda(monkeypatch):
    """The call is replaced, since JAX refuses it where there is no cuDNN; nothing else holds
    float32 scores.
    """
    asked = []

    def stand_in(query, key, value, **settings):
        asked.append((query.dtype, settings["implementation"]))
        return query * jnp.mean(key * value, axis=(1, 2), keepdims=True)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    config = replace(GPT2, attention="cudnn", compute_dtype="bfloat16", num_layers=2)
    model = models.build(config)
    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    step = jax.jit(jax.grad(lambda *inputs: model.hidden(*inputs).astype(jnp.float32).sum()))
    shapes = jax.eval_shape(model.init, KEY)
    text = step.trace(shapes, tokens, tokens).lower(lowering_platforms=("cuda",)).as_text()
    assert asked
    assert set(asked) == {(jnp.dtype("bfloat16"), "cudnn")}
    assert not SCORES.search(text)


@pytest.mark.parametrize("first", [0, 3])
def test_the_first_half_of_the_queries_leaves_out_later_keys(first):
    """The same values and gradients as with all keys, for fewer scores; of all queries, or of the
    last ones.
    """
    length = 2 * attention.HALF + 5
    query, key, value = inputs(length)
    documents = np.ones((2, length), np.int32)
    documents[1, :9] = 0  # the second row begins with pads

    def compute(told):
        def weighted(query, key, value):
            seen = attention.seen_in_text(documents)
            seen = seen._replace(slots=seen.slots[:, first:], documents=documents[:, first:])
            mixed = attention.attention(query, key, value, seen, first=told)
            return jnp.sum(jnp.sin(mixed) * (seen.documents != 0)[:, None, None, :, None])

        program = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2))).trace(*arrays)
        return program.lower().compile()(*arrays), max(array_sizes(program.jaxpr.jaxpr))

    arrays = (query[:, :, :, first:], key, value)
    (got, fewer) = compute(first)
    (want, all_scores) = compute(None)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert fewer < 0.6 * all_scores


def test_the_first_half_begins_at_the_first_of_the_chosen_columns():
    model = models.build(models.GPT2Config(13, 96, 8, 1, 2))
    params = perturbed(initial_params(model))
    tokens = np.arange(96)[None] % 13
    chosen = slice(20, 20 + 2 * attention.HALF)
    hidden = jax.jit(functools.partial(model.hidden, columns=chosen))
    whole = jax.jit(model.hidden)(params, tokens)
    assert_allclose(hidden(params, tokens), whole[:, chosen], atol=1e-4)


LAYOUTS = [  # mesh, rows and heads of keys in all, those of a device
    ((2, 2, 1), (4, 2), (1, 2)),
    ((1, 2, 2), (4, 2), (2, 1)),
    ((2, 1, 2), (4, 3), (2, 3)),  # "tensor" does not divide the heads
    ((4, 1, 1), (2, 2), (2, 2)),  # nor "data" the rows
]


def text(rows, heads, length=4, width=4):
    """Queries [B, H, G, T, Dh] with G = 2, keys, values, and documents of which one begins with a
    pad.
    """
    draw = np.random.default_rng(0)
    shapes = [
        (rows, heads, 2, length, width),
        *[(rows, heads, length, width)] * 2,
    ]
    arrays = [draw.normal(size=shape).astype(np.float32) for shape in shapes]
    return *arrays, (np.arange(rows * length) != length).reshape(rows, length).astype(np.int32)


@pytest.mark.parametrize(
    ("sizes", "whole", "own", "mapped"),
    [
        *[(*layout, set()) for layout in LAYOUTS[1:]],
        (*LAYOUTS[1], {"data", "fsdp"}),
        slow(*LAYOUTS[0], {"data", "fsdp"}),
    ],
)
def test_a_fused_kernel_sees_its_device_s_rows_and_heads(sizes, whole, own, mapped, monkeypatch):
    """Values and gradients are those of one device; also inside a function that is mapped over the
    rows already, as sampling is."""
    original = jax.nn.dot_product_attention
    shapes = set()

    def on_cpu(query, key, value, *, implementation, **settings):
        shapes.add((query.shape[0], query.shape[2], key.shape[2]))
        return original(query, key, value, **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    *arrays, documents = text(*whole)
    compute = functools.partial(fused.attention, name="cudnn", window=None)
    real = (documents != 0)[:, None, None, :, None]
    seen = attention.seen_in_text(documents)

    def gradient(compute, seen):
        def loss(*arrays):
            return jnp.sum(jnp.sin(compute(*arrays, seen)) * real)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays)

    expected = gradient(attention.attention, seen)
    with jax.set_mesh(mesh_of(*sizes)):
        if mapped:
            spec = jax.P(("data", "fsdp"))
            compute = jax.shard_map(
                compute, in_specs=spec, out_specs=spec, axis_names=mapped, check_vma=False
            )
        found = gradient(compute, documents)
    assert shapes == {(own[0], 2 * own[1], own[1])}
    assert_close(found, expected)


def test_splash_is_lowered_for_tpus_of_a_mesh():
    """XLA would refuse to partition it: NotImplementedError."""
    shapes = jax.eval_shape(lambda: text(4, 2, length=128, width=64))
    compute = functools.partial(fused.attention, name="splash", window=None)
    gradient = jax.jit(jax.grad(lambda *arrays: compute(*arrays).sum(), argnums=(0, 1, 2)))
    mesh = sharding.make_mesh(2, fsdp=1, tensor=2)
    over_rows = jax.NamedSharding(mesh, jax.P("data"))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over_rows) for x in shapes]
    with jax.set_mesh(mesh):
        lowered = gradient.trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    # Forward, and the gradients of queries and of keys; two rows and half of the heads each.
    assert lowered.count("tpu_custom_call") == 3
    assert "tensor<2x2x128x64xf32>" in lowered
