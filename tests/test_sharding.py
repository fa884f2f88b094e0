"""Meshes, rows spread over devices, shardings by parameter path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rlhf_jax import sharding
from rlhf_jax.errors import UserError


def test_make_mesh():
    mesh = sharding.make_mesh()
    assert dict(mesh.shape) == {"data": 4}
    assert mesh.axis_types == (AxisType.Auto,)
    assert list(sharding.make_mesh(2).devices) == jax.devices()[:2]
    assert list(sharding.make_mesh(1, devices=jax.devices()[3:]).devices) == jax.devices()[3:]
    with pytest.raises(UserError, match="over 5 devices: there are 4"):
        sharding.make_mesh(5)


def test_rows_and_copies():
    mesh = sharding.make_mesh(4)
    batch = sharding.shard_rows(mesh, {"x": np.arange(16).reshape(8, 2), "absent": None})
    assert batch["absent"] is None
    assert [s.data.tolist() for s in batch["x"].addressable_shards][1] == [[4, 5], [6, 7]]
    tree = sharding.replicate(mesh, {"w": np.arange(3), "key": jax.random.key(0)})
    assert tree["w"].sharding.is_fully_replicated
    assert all(s.data.tolist() == [0, 1, 2] for s in tree["w"].addressable_shards)
    assert jax.random.uniform(tree["key"]) == jax.random.uniform(jax.random.key(0))


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_follow_their_devices_wherever_they_stand_in_the_mesh(processes, monkeypatch):
    mesh = jax.sharding.Mesh(np.array(jax.devices())[[0, 2, 1, 3]], ("data",))
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    batch = {"x": np.arange(8), "key": jax.random.split(jax.random.key(0), 8)}
    spread = sharding.shard_rows(mesh, batch)
    np.testing.assert_array_equal(spread["x"], batch["x"])
    assert [(shard.device.id, shard.data.tolist()) for shard in spread["x"].addressable_shards][1] == (2, [2, 3])
    assert (spread["key"] == batch["key"]).all()


@pytest.mark.parametrize(("num_rows", "nearest"), [(10, "8 or 12"), (3, "4$")])
def test_rows_that_do_not_divide(num_rows, nearest):
    with pytest.raises(UserError, match=f"{num_rows} rows does not divide over 4 devices: .* size of {nearest}"):
        sharding.shard_rows(sharding.make_mesh(4), jnp.ones((num_rows, 2)))


PARAMS = {"h_0": {"attn": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}, "wte": {"embedding": jnp.ones((6, 4))}}


def test_by_path_takes_the_first_rule_that_matches():
    mesh = sharding.make_mesh(4)
    rules = [("attn/kernel", P(None, "data")), ("kernel$", P("data")), ("bias$", P()), ("^wte/", P(None, "data"))]
    shardings = sharding.by_path(PARAMS, rules, mesh)
    assert shardings["h_0"]["attn"]["kernel"].spec == P(None, "data")
    assert shardings["h_0"]["attn"]["bias"].spec == P()
    assert shardings["wte"]["embedding"].spec == P(None, "data")
    placed = jax.device_put(PARAMS, shardings)
    assert placed["h_0"]["attn"]["kernel"].addressable_shards[0].data.shape == (4, 2)
    abstract = jax.eval_shape(lambda: PARAMS)
    assert sharding.by_path(abstract, [(".*", P())], mesh)["wte"]["embedding"].is_fully_replicated


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("kernel|embedding", P())], "no sharding rule matches parameter h_0/attn/bias"),
        ([("embedding", P("data")), (".*", P())], "parameter wte/embedding of shape"),  # 6 rows over 4 devices
        ([("bias", P(None, "data")), (".*", P())], "parameter h_0/attn/bias of shape"),
    ],
)
def test_by_path_errors_name_the_parameter(rules, message):
    with pytest.raises(UserError, match=message):
        sharding.by_path(PARAMS, rules, sharding.make_mesh(4))
