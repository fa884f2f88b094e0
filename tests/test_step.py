"""gradient_step and minibatch_epochs: steps by hand, the finite guard, microbatches, which rows meet in a minibatch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tabular import assert_close, assert_identical

from rlhf_jax import sharding
from rlhf_jax.algorithms.step import gradient_step, minibatch_epochs
from rlhf_jax.types import TrainState


def half_square(params):
    return 0.5 * jnp.square(params["w"] - 3.0), {"w": params["w"]}


def test_gradient_step_by_hand():
    optimizer = optax.sgd(0.1)
    state, metrics = gradient_step(half_square, TrainState.create({"w": jnp.array(1.0)}, optimizer), optimizer)
    np.testing.assert_allclose(state.params["w"], 1.2, rtol=1e-6)
    assert state.step == 1
    assert {k: float(v) for k, v in metrics.items()} == {"loss": 2.0, "w": 1.0, "grad_norm": 2.0, "nonfinite": 0.0}


def test_optimizer_sees_params():
    optimizer = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0))
    state, _ = gradient_step(half_square, TrainState.create({"w": jnp.array(1.0)}, optimizer), optimizer)
    assert state.params["w"] == 1.0 + 2.0 - 0.5


def test_low_precision_gradients_have_a_float32_norm():
    params = {"w": jnp.full(4096, 1.0, jnp.bfloat16)}
    optimizer = optax.sgd(0.1)
    state, metrics = gradient_step(
        lambda p: (jnp.sum(p["w"].astype(jnp.float32)), {}), TrainState.create(params, optimizer), optimizer
    )
    assert metrics["grad_norm"] == 64.0
    assert state.params["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_finite_guard_keeps_the_state(bad):
    def loss_fn(params, x):
        if bad == "loss":
            return jnp.sum(params["w"]) + jnp.log(x), {}
        return jnp.sum(jnp.sqrt(params["w"] * x)), {}  # the root has an infinite slope at 0

    optimizer = optax.adam(0.1)
    state = TrainState.create({"w": jnp.array([0.1, 0.3])}, optimizer)
    step = jax.jit(lambda state, x: gradient_step(partial(loss_fn, x=x), state, optimizer))
    state, metrics = step(state, jnp.array(1.0))
    assert metrics["nonfinite"] == 0
    kept, metrics = step(state, jnp.array(0.0))
    assert metrics["nonfinite"] == 1
    assert_identical(kept, state)
    moved, metrics = step(kept, jnp.array(1.0))
    assert metrics["nonfinite"] == 0
    assert moved.step == 2


def share(params, part, total):
    loss = jnp.sum(jnp.square(params["w"] * part["x"] - 1.0)) / total
    return loss, {"rows": jnp.asarray(part["x"].shape[0], jnp.float32), "x_max": jnp.max(part["x"])}


def test_microbatches_add_up_to_the_batch():
    batch = {"x": jnp.arange(1.0, 13.0) / 12.0, "absent": None}
    optimizer = optax.sgd(1.0)
    state = TrainState.create({"w": jnp.array([0.5])}, optimizer)
    run = partial(gradient_step, partial(share, total=12.0), state, optimizer, batch=batch)
    whole, metrics = run()
    for num_microbatches in (2, 3, 12):
        parts, part_metrics = run(num_microbatches=num_microbatches)
        assert_close(parts, whole)
        assert part_metrics["rows"] == 12
        assert part_metrics["x_max"] == 1.0
        assert_close(part_metrics["loss"], metrics["loss"])


def test_microbatches_of_low_precision_are_summed_in_float32():
    optimizer = optax.sgd(1.0)
    state = TrainState.create({"w": jnp.zeros((), jnp.bfloat16)}, optimizer)

    def loss_fn(params, part):
        return params["w"] * jnp.sum(part), {}

    state, _ = gradient_step(loss_fn, state, optimizer, batch=jnp.ones(300, jnp.bfloat16), num_microbatches=300)
    assert state.params["w"] == -300.0  # in bfloat16, 256 + 1 = 256
    assert state.params["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("batch", "num_microbatches", "message"),
    [
        ({"x": jnp.ones(6)}, 4, "num_microbatches=4 does not divide the 6 rows"),
        ({"x": jnp.ones(6)}, 0, "num_microbatches=0"),
        (None, 2, "num_microbatches=2 needs a batch"),
        ({"x": jnp.ones(6), "y": jnp.ones(4)}, 2, r"sizes \[4, 6\]"),
    ],
)
def test_microbatch_errors(batch, num_microbatches, message):
    optimizer = optax.sgd(1.0)
    state = TrainState.create({"w": jnp.ones(1)}, optimizer)
    with pytest.raises(ValueError, match=message):
        gradient_step(partial(share, total=6.0), state, optimizer, batch=batch, num_microbatches=num_microbatches)


def record(state, minibatch, key):
    """A step that trains nothing and writes down which rows it saw, and the key it was given."""
    seen = state.params["rows"].at[state.step].set(minibatch["row"])
    keys = state.params["keys"].at[state.step].set(jax.random.key_data(key))
    metrics = {"first": minibatch["row"][0], "step_max": state.step, "nonfinite": (state.step == 1).astype(jnp.float32)}
    return TrainState(step=state.step + 1, params={"rows": seen, "keys": keys}, opt_state=()), metrics


def minibatches(key, num_rows, num_epochs, num_minibatches, shuffle_blocks, axis_name=None, num_devices=1, **kwargs):
    """Row numbers [epochs * minibatches, rows of a minibatch on this device], keys and metrics."""

    def run(rows, key):
        params = {
            "rows": jnp.full((num_epochs * num_minibatches, num_rows // num_minibatches // num_devices), -1),
            "keys": jnp.zeros((num_epochs * num_minibatches, 2), jnp.uint32),
        }
        state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=())
        state, metrics = minibatch_epochs(
            record,
            state,
            {"row": rows, "absent": None},
            key,
            num_epochs=num_epochs,
            num_minibatches=num_minibatches,
            shuffle_blocks=shuffle_blocks,
            axis_name=axis_name,
            **kwargs,
        )
        return state.params["rows"], state.params["keys"], metrics

    return run


def test_minibatches_as_a_loop():
    """Blocks, permutations and slices as the docstring has them, in NumPy."""
    key = jax.random.key(3)
    rows, _, _ = jax.jit(minibatches(key, 24, 2, 3, 4))(jnp.arange(24), key)
    expected = []
    for epoch in range(2):
        epoch_key = jax.random.fold_in(key, epoch)
        blocks = [
            6 * block + np.asarray(jax.random.permutation(jax.random.fold_in(epoch_key, block), 6))
            for block in range(4)
        ]
        expected += [np.concatenate([block[2 * m : 2 * m + 2] for block in blocks]) for m in range(3)]
    np.testing.assert_array_equal(rows, expected)


def test_every_row_once_an_epoch_in_a_fresh_order():
    key = jax.random.key(0)
    run = jax.jit(minibatches(key, 32, 3, 4, 1))
    rows, keys, metrics = run(jnp.arange(32), key)
    epochs = np.asarray(rows).reshape(3, 32)
    for epoch in epochs:
        assert sorted(epoch) == list(range(32))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    shuffles = [jax.random.fold_in(jax.random.fold_in(key, epoch), block) for epoch in range(3) for block in range(4)]
    keys = [tuple(k) for k in (*np.asarray(keys).tolist(), *(jax.random.key_data(k).tolist() for k in shuffles))]
    assert len(set(keys)) == 24  # no key is used twice
    np.testing.assert_array_equal(run(jnp.arange(32), key)[0], rows)
    assert np.any(run(jnp.arange(32), jax.random.key(1))[0] != rows)
    np.testing.assert_allclose(metrics["first"], np.mean(np.asarray(rows)[:, 0]), rtol=1e-6)
    assert metrics["step_max"] == 11
    assert metrics["nonfinite"] == 1


def test_a_single_minibatch_is_the_batch_as_it_is():
    key = jax.random.key(0)
    rows, keys, metrics = minibatches(key, 6, 2, 1, 1)(jnp.arange(6), key)
    np.testing.assert_array_equal(rows, np.tile(np.arange(6), (2, 1)))
    assert np.any(keys[0] != keys[1])
    assert metrics["step_max"] == 1


@pytest.mark.parametrize("shuffle_blocks", [4, 8])
def test_devices_form_the_same_minibatches(shuffle_blocks):
    key, mesh = jax.random.key(5), sharding.make_mesh(4)
    one, one_keys, _ = jax.jit(minibatches(key, 32, 2, 2, shuffle_blocks))(jnp.arange(32), key)
    spread = sharding.shard_rows(mesh, jnp.arange(32))
    run = minibatches(key, 32, 2, 2, shuffle_blocks, minibatch_sharding=sharding.rows(mesh))
    jitted, jitted_keys, _ = jax.jit(run)(spread, sharding.replicate(mesh, key))
    np.testing.assert_array_equal(jitted, one)
    np.testing.assert_array_equal(jitted_keys, one_keys)

    def on_device(rows, key):
        rows, keys, _ = minibatches(key, 32, 2, 2, shuffle_blocks, axis_name="data", num_devices=4)(rows, key)
        return rows, keys

    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P(None, "data"), P()), check_vma=False
    )
    rows, keys = jax.jit(mapped)(spread, key)
    np.testing.assert_array_equal(rows, one)
    np.testing.assert_array_equal(keys, one_keys)


def minibatch_shard_rows(shuffle_blocks, minibatch_sharding):
    """How many of a minibatch's 16 rows each of 4 devices holds when the batch of 32 is sharded, and the program."""
    mesh = sharding.make_mesh(4)
    seen = []

    def step(state, minibatch, key):
        del key
        jax.debug.inspect_array_sharding(minibatch, callback=seen.append)
        return state + jnp.sum(jnp.sin(minibatch)), {}

    def run(state, batch, key):
        options = {"num_epochs": 1, "num_minibatches": 2, "shuffle_blocks": shuffle_blocks}
        return minibatch_epochs(step, state, batch, key, minibatch_sharding=minibatch_sharding, **options)

    batch = sharding.shard_rows(mesh, jnp.ones((32, 8)))
    arguments = sharding.replicate(mesh, (jnp.zeros(()), jax.random.key(0)))
    compiled = jax.jit(run).lower(arguments[0], batch, arguments[1]).compile()
    (found,) = seen
    return found.shard_shape((16, 8))[0], compiled.as_text()


def test_minibatches_stay_sharded():
    constraint = sharding.rows(sharding.make_mesh(4))
    assert minibatch_shard_rows(1, constraint)[0] == 4
    assert minibatch_shard_rows(1, None)[0] == 16  # why the constraint exists
    rows, program = minibatch_shard_rows(4, constraint)
    assert rows == 4
    # Blocks never leave their device: the sum over rows is all that is communicated.
    assert not any(name in program for name in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize(
    ("num_rows", "num_minibatches", "shuffle_blocks", "message"),
    [
        (10, 4, 1, "10 rows does not divide into shuffle_blocks=1 blocks times num_minibatches=4"),
        (12, 2, 4, "12 rows .* it must be a multiple of 8"),
        (8, 0, 1, "at least 1, got 1, 0 and 1"),
    ],
)
def test_minibatch_errors_name_the_numbers(num_rows, num_minibatches, shuffle_blocks, message):
    with pytest.raises(ValueError, match=message):
        minibatch_epochs(
            record,
            TrainState(step=jnp.zeros(()), params={}, opt_state=()),
            {"row": jnp.arange(num_rows)},
            jax.random.key(0),
            num_epochs=1,
            num_minibatches=num_minibatches,
            shuffle_blocks=shuffle_blocks,
        )


@pytest.mark.parametrize(("num_minibatches", "shuffle_blocks"), [(2, 1), (2, 2), (2, 6)])
def test_devices_hold_whole_blocks(num_minibatches, shuffle_blocks):
    def on_device(rows, key):
        run = minibatches(key, 24, 1, num_minibatches, shuffle_blocks, axis_name="data", num_devices=4)
        return run(rows, key)[2]

    mapped = jax.shard_map(
        on_device, mesh=sharding.make_mesh(4), in_specs=(P("data"), P()), out_specs=P(), check_vma=False
    )
    with pytest.raises(ValueError, match=f"shuffle_blocks={shuffle_blocks} does not divide over 4 devices"):
        mapped(jnp.arange(24), jax.random.key(0))
