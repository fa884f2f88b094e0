"""Meshes, rows spread over devices, shardings by parameter path."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_array_equal
from programs import mesh_of

from rlhf_jax import models, sharding
from rlhf_jax.errors import UserError

KEY = jax.random.key(0)


def test_make_mesh():
    mesh = sharding.make_mesh()
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert list(sharding.make_mesh(2).devices.flat) == jax.devices()[:2]
    assert list(sharding.make_mesh(1, devices=jax.devices()[3:]).devices.flat) == jax.devices()[3:]
    # Neighbours share a tensor group.
    assert sharding.make_mesh(fsdp=2, tensor=2).devices[0, 1].tolist() == jax.devices()[2:]
    assert dict(sharding.make_mesh(2, fsdp=-1).shape) == {"data": 2, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize(
    "act",
    [
        sharding.rows,
        sharding.replicated,
        lambda mesh: sharding.by_path({"w": jnp.zeros(4)}, [("", P())], mesh),
        lambda mesh: sharding.shard_rows(mesh, jnp.zeros(4)),
    ],
)
def test_explicit_axes_are_refused_with_the_mesh_to_take(act):
    with pytest.raises(UserError, match=r"Explicit.*jax.sharding.AxisType.Auto,\) \* 1"):
        act(jax.make_mesh((4,), ("data",)))
    act(jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)))


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((5,), "data 5 x fsdp 1 x tensor 1"),
        ((-1, 3), "data -1 x fsdp 3 x tensor 1"),
        ((-1, 8), "data -1 x fsdp 8 x tensor 1"),
        ((-1, -1), "data -1 x fsdp -1 x tensor 1"),
        ((0, 2), "data 0 x fsdp 2 x tensor 1"),
        ((-2, 2), "data -2 x fsdp 2 x tensor 1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices(sizes, shape):
    with pytest.raises(
        UserError,
        match=(
            f"^mesh: {shape} does not fit 4 devices; take sizes whose product divides that number$"
        ),
    ):
        mesh_of(*sizes)


@pytest.mark.parametrize(
    ("sizes", "platform", "expected"),
    [
        ((4,), "cpu", False),
        ((2, 2), "cpu", True),
        ((4,), "tpu", True),
        ((4,), "gpu", True),
        ((1,), "tpu", False),
    ],
)
def test_when_a_run_sets_its_mesh(sizes, platform, expected):
    """Where it cuts parameters, and for the kernels of several accelerators."""
    real = mesh_of(*sizes)
    devices = np.full(real.devices.shape, SimpleNamespace(platform=platform))
    mesh = SimpleNamespace(shape=real.shape, size=real.size, devices=devices)
    assert sharding.is_set(mesh) == expected


def test_rows_and_copies():
    mesh = sharding.make_mesh(4)
    batch = sharding.shard_rows(mesh, {"x": np.arange(16).reshape(8, 2), "absent": None})
    assert batch["absent"] is None
    assert [s.data.tolist() for s in batch["x"].addressable_shards][1] == [[4, 5], [6, 7]]
    tree = sharding.replicate(mesh, {"w": np.arange(3), "key": KEY})
    assert tree["w"].sharding.is_fully_replicated
    assert all(s.data.tolist() == [0, 1, 2] for s in tree["w"].addressable_shards)
    assert jax.random.uniform(tree["key"]) == jax.random.uniform(KEY)


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_follow_their_devices_wherever_they_stand_in_the_mesh(processes, monkeypatch):
    mesh = jax.sharding.Mesh(np.array(jax.devices())[[0, 2, 1, 3]], ("data",))
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    batch = {"x": np.arange(8), "key": jax.random.split(KEY, 8)}
    spread = sharding.shard_rows(mesh, batch)
    assert_array_equal(spread["x"], batch["x"])
    assert [(shard.device.id, shard.data.tolist()) for shard in spread["x"].addressable_shards][
        1
    ] == (2, [2, 3])
    assert (spread["key"] == batch["key"]).all()


def test_rows_that_do_not_divide():
    with pytest.raises(
        UserError, match=r"10 rows does not divide over 4 devices: .* a multiple of 4"
    ):
        sharding.shard_rows(sharding.make_mesh(4), jnp.ones((10, 2)))


PARAMS = {
    "h_0": {"attn": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}},
    "wte": {"embedding": jnp.ones((6, 4))},
}


def test_by_path_takes_the_first_rule_that_matches():
    mesh = sharding.make_mesh(4)
    rules = [
        ("attn/kernel", P(None, "data")),
        ("kernel$", P("data")),
        ("bias$", P()),
        ("^wte/", P(None, "data")),
    ]
    shardings = sharding.by_path(PARAMS, rules, mesh)
    assert shardings["h_0"]["attn"]["kernel"].spec == P(None, "data")
    assert shardings["h_0"]["attn"]["bias"].spec == P()
    assert shardings["wte"]["embedding"].spec == P(None, "data")
    placed = jax.device_put(PARAMS, shardings)
    assert placed["h_0"]["attn"]["kernel"].addressable_shards[0].data.shape == (4, 2)
    abstract = jax.eval_shape(lambda: PARAMS)
    assert sharding.by_path(abstract, [(".*", P())], mesh)["wte"]["embedding"].is_fully_replicated


def test_a_tuple_speaks_of_the_last_axes_and_cuts_what_divides():
    """Of Adam's moments, stacked layers and members as of the parameters; 6 rows do not divide by 4
    devices.
    """
    rules = [("kernel$", ("data", "fsdp")), ("embedding$", ("data", None)), ("", ())]
    stacked = {"mu": jax.tree.map(lambda leaf: leaf[None], PARAMS), "count": jnp.zeros(())}
    shardings = sharding.by_path(stacked, rules, sharding.make_mesh(4))
    assert shardings["mu"]["h_0"]["attn"]["kernel"].spec == P(None, "data", "fsdp")
    assert shardings["mu"]["wte"]["embedding"].spec == P(None, None, None)
    assert shardings["count"].is_fully_replicated
    shardings = sharding.by_path(
        stacked, [("embedding$", ("data", "fsdp")), ("", ())], sharding.make_mesh(4)
    )
    assert shardings["mu"]["wte"]["embedding"].spec == P(None, None, ("fsdp", "data"))


LLAMA = models.LlamaConfig(8, 8, 8, 2, 2, intermediate_size=16)
GPT2 = models.GPT2Config(8, 8, 8, 2, 2)
READS = P("fsdp", "tensor")
WRITES = P("tensor", "fsdp")
SPECS = {
    LLAMA: {
        **{f"h_0/attn/{name}_proj/kernel": READS for name in "qkv"},
        **{f"h_1/mlp/{name}_proj/kernel": READS for name in ("gate", "up")},
        "h_0/attn/o_proj/kernel": WRITES,
        "h_0/mlp/down_proj/kernel": WRITES,
        "h_0/mlp/down_proj/lora_a": P("tensor", None),
        "h_0/mlp/down_proj/lora_b": P(None, "fsdp"),
        "h_0/attn/k_proj/lora_a": P("fsdp", None),
        "h_0/attn/k_proj/lora_b": P(None, "tensor"),
        "h_0/attn/k_proj/lora_scale": P(),
        "wte/embedding": WRITES,
        "lm_head/embedding": WRITES,
        "ln_f/scale": P(None),
    },
    replace(LLAMA, scan_layers=True): {
        "h/attn/q_proj/kernel": P(None, *READS),
        "h/attn/o_proj/lora_a": P(None, "tensor", None),
    },
    GPT2: {
        "h_0/attn/c_attn/kernel": P("fsdp", None, "tensor"),
        "h_0/attn/c_attn/lora_b": P(None, None, "tensor"),
        "h_0/attn/c_proj/kernel": WRITES,
        "h_0/mlp/c_fc/kernel": READS,
        "h_0/attn/c_attn/bias": P(None, None),
        "wpe/embedding": P(None, None),
        "value/kernel": P(None),
    },
}


@pytest.mark.parametrize("config", SPECS, ids=["llama", "scanned", "gpt2"])
def test_the_rules_of_the_families(config):
    def state(key):
        params = models.build(config).init(key)
        adapted = models.lora.attach(params, models.lora.init(key, params, 2))
        return models.add_head(key, adapted, "value")

    mesh = sharding.make_mesh(1, fsdp=2, tensor=2)
    shapes = jax.eval_shape(state, KEY)
    ndims = jax.tree.map(lambda x: x.ndim, flatten_dict(shapes, sep="/"))
    found = flatten_dict(sharding.by_path(shapes, models.SHARDING, mesh), sep="/")
    for path, spec in SPECS[config].items():
        assert found[path].is_equivalent_to(NamedSharding(mesh, spec), ndims[path]), path


def test_cut_where_there_is_a_mesh_that_divides():
    x = jnp.ones((4, 2))
    mesh = sharding.make_mesh(fsdp=2)

    def cut(x, *axes):
        return jax.jit(lambda x: sharding.cut(x, *axes))(x).sharding.spec

    assert sharding.cut(x, "data") is x  # no mesh
    with jax.set_mesh(mesh):
        assert cut(x, "data", "fsdp") == cut(x[:, 0], "data", "fsdp") == P(("data", "fsdp"))
        assert cut(x, "fsdp") == P("fsdp")
        assert cut(x[:3], "fsdp") == cut(x, "expert") == P()
        rows = P(("data", "fsdp"))
        mapped = jax.shard_map(
            lambda x: sharding.cut(x, "data"), mesh=mesh, in_specs=rows, out_specs=rows
        )
        assert_array_equal(jax.jit(mapped)(x), x)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("kernel|embedding", P())], "no sharding rule matches parameter h_0/attn/bias"),
        (
            [("embedding", P("data")), (".*", P())],
            "parameter wte/embedding of shape",
        ),  # 6 rows over 4 devices
        ([("bias", P(None, "data")), (".*", P())], "parameter h_0/attn/bias of shape"),
    ],
)
def test_by_path_errors_name_the_parameter(rules, message):
    with pytest.raises(UserError, match=message):
        sharding.by_path(PARAMS, rules, sharding.make_mesh(4))
