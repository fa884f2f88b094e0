"""gradient_step and minibatch_epochs: steps by hand, the finite guard, microbatches, which rows
meet in a minibatch.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import initial_params
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal
from tabular import assert_close, assert_identical, every_way

from rlhf_jax import errors, gradient_step, losses, minibatch_epochs, models, rloo, sharding
from rlhf_jax.algorithms import lengths
from rlhf_jax.types import Max, Mean, PolicyOutput, Rollout, TrainState

KEY = jax.random.key(0)

SGD = optax.sgd(1.0)


def half_square(params):
    return Mean.of(0.5 * jnp.square(params["w"] - 3.0)), {"w": Mean.of(params["w"])}


def test_gradient_step_by_hand():
    optimizer = optax.chain(
        optax.add_decayed_weights(0.5), optax.sgd(0.1)
    )  # the optimizer sees the parameters
    step = jax.jit(partial(gradient_step, half_square, optimizer=optimizer))
    state, metrics = step(TrainState.create({"w": jnp.array(1.0)}, optimizer))
    assert_allclose(state.params["w"], 1.15, rtol=1e-6)
    assert state.step == 1
    assert {k: float(v) for k, v in metrics.items()} == {
        "loss": 2.0,
        "w": 1.0,
        "grad_norm": 2.0,
        "nonfinite": 0.0,
    }


def test_the_state_is_kept_where_a_gradient_is_not_finite():
    """The root has an infinite slope at 0."""
    optimizer = optax.adam(0.1)
    state = TrainState.create({"w": jnp.array([0.1, 0.3])}, optimizer)
    loss_fn = lambda params, x: (Mean.of(jnp.sum(jnp.sqrt(params["w"] * x))), {})  # noqa: E731
    step = jax.jit(lambda state, x: gradient_step(partial(loss_fn, x=x), state, optimizer))
    for x, bad in ((1.0, 0), (0.0, 1), (1.0, 0)):
        before = state
        state, metrics = step(state, x)
        assert metrics["nonfinite"] == bad
        if bad:
            assert_identical(state, before)
    assert state.step == 2


def test_steps_that_rounding_undoes_are_counted_where_precision_is_low(caplog):
    """At a rate of 1e-6 the bfloat16 1 stays 1, 1e-5 moves, and 2 has no gradient."""
    rows = {"w": jnp.array([1.0, 1e-5, 2.0])}
    optimizer = optax.sgd(1e-6)
    loss_fn = lambda params: (Mean.of(params["w"][0] + params["w"][1]), {})  # noqa: E731
    step = jax.jit(partial(gradient_step, loss_fn, optimizer=optimizer))
    errors.warn_once.cache_clear()
    for dtype, unmoved, moved in (("bfloat16", 0.5, [0, 1, 0]), ("float32", None, [1, 1, 0])):
        params = jax.tree.map(partial(jnp.asarray, dtype=dtype), rows)
        caplog.clear()
        for _ in range(2):
            state, metrics = step(TrainState.create(params, optimizer))
        assert metrics.get("params/unmoved") == unmoved
        assert_array_equal(state.params["w"] != params["w"], np.array(moved, bool))
        said = [record for record in caplog.records if "master_weights" in record.message]
        assert [record.levelname for record in said] == ["WARNING"] * (dtype == "bfloat16")


def squares(params, part):
    loss = Mean.of(jnp.square(params["w"] * part["x"] - 1.0))
    return loss, {"half": 0.5 * loss, "x_max": Max(jnp.max(part["x"]))}


def test_microbatches_of_low_precision_are_summed_in_float32():
    """And so is the norm of the gradient."""

    def loss_fn(params, part):
        return Mean(jnp.sum(params["w"]) * jnp.sum(part), jnp.float32(1 / 300)), {}

    state = TrainState.create({"w": jnp.zeros(3, jnp.bfloat16)}, SGD)
    step = jax.jit(partial(gradient_step, loss_fn, optimizer=SGD, num_microbatches=300))
    state, metrics = step(state, batch=np.ones(300, jnp.bfloat16))
    assert_array_equal(state.params["w"], -300.0)  # in bfloat16, 256 + 1 = 256
    assert state.params["w"].dtype == jnp.bfloat16
    assert_allclose(metrics["grad_norm"], 300.0 * np.sqrt(3.0), rtol=1e-6)


def test_row_i_is_in_microbatch_i_modulo_their_number():
    """Of rows 0, 1 and 2, 3 the loss would be 58 / 4."""

    def squared_sum(params, part):
        return Mean(params["w"] * jnp.square(part.sum()), jnp.float32(part.size)), {}

    state = TrainState.create({"w": jnp.ones(())}, SGD)
    batch = np.array([1.0, 2, 3, 4], np.float32)
    step = partial(gradient_step, squared_sum, optimizer=SGD, num_microbatches=2)
    _, metrics = jax.jit(step)(state, batch=batch)
    assert metrics["loss"] == ((1 + 3) ** 2 + (2 + 4) ** 2) / 4


def long_rollout(slots=128, prompt_length=3):
    """16 rows of 3 + 128 slots; the quarters of rows by length have at most 32, 64, 96 and 128
    response tokens.
    """
    lengths = np.random.default_rng(0).permutation(8 * np.arange(1, 17))[:, None]
    column = np.arange(3 + slots)[None]
    mask = ((column >= 3) & (column < 3 + lengths)).astype(np.int32)
    log_probs = np.random.default_rng(1).normal(size=mask.shape).astype(np.float32)
    return Rollout(mask, mask, mask, log_probs, row_ids=np.arange(16), prompt_length=prompt_length)


def cubes(params, part):
    """A loss of response tokens that differ, and the columns that are computed."""
    rows = jnp.sum(
        jnp.where(part.response_mask != 0, (params["w"] * part.log_probs - 1.0) ** 3, 0.0), axis=1
    )
    return Mean(jnp.sum(rows * part.row_ids), jnp.sum(part.response_mask)), {
        "columns": Mean.of(part.tokens.shape[1])
    }


def of_cubes(rollout):
    """The loss at a parameter of a half, and its slope."""
    x = rollout.log_probs.astype(np.float64)
    base = np.where(rollout.response_mask != 0, 0.5 * x - 1.0, 0.0)
    ids = rollout.row_ids[:, None]
    count = rollout.response_mask.sum()
    return np.sum(ids * base**3) / count, np.sum(3 * ids * x * base**2) / count


@pytest.mark.parametrize(
    ("rollout", "parts", "columns"),
    [
        (long_rollout(), 4, (35 + 67 + 131 + 131) / 4),
        # A half has rows of 8 and of 64 tokens: it is as wide as the longer ones need.
        (long_rollout(), 2, (67 + 131) / 2),
        (long_rollout(prompt_length=None), 4, 131),
        (long_rollout(slots=127), 4, 130),
    ],
)
def test_microbatches_of_rollouts_are_as_wide_as_their_longest_response(rollout, parts, columns):
    state = TrainState.create({"w": jnp.array(0.5)}, SGD)
    how = {"num_microbatches": parts, "by_length": lengths.can_cut(rollout)}
    found, metrics = jax.jit(partial(gradient_step, cubes, optimizer=SGD, **how))(
        state, batch=rollout
    )
    assert metrics["columns"] == columns
    loss, slope = of_cubes(rollout)
    assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_allclose(found.params["w"], 0.5 - slope, rtol=1e-5)


def test_rows_of_like_length_stay_on_their_device():
    state = TrainState.create({"w": jnp.array(0.5)}, SGD)
    rows = sharding.rows(sharding.make_mesh(4))

    def update(state, batch, key, **options):
        options |= {"batch": batch, "num_microbatches": 4, "by_length": lengths.can_cut(batch)}
        state, metrics = gradient_step(cubes, state, SGD, **options)
        return state, metrics["columns"]

    _, slope = of_cubes(long_rollout())
    ways = every_way(update, state, long_rollout(), KEY, [True], minibatch_sharding=rows)
    for found, columns in ways:
        assert_allclose(found.params["w"], 0.5 - slope, rtol=1e-5)
        assert 35 < columns < 131


def ragged_rollout():
    """16 rows with responses of 1 to 16 tokens behind prompts that are padded on the left."""
    rng = np.random.default_rng(0)
    column = np.arange(19)
    lengths = rng.permutation(16)[:, None] + 1
    response = ((column >= 3) & (column < 3 + lengths)).astype(np.int32)
    both = response + ((column < 3) & (column >= lengths % 3))
    log_probs, ref_log_probs, scores = rng.normal(size=(3, 16, 19)).astype(np.float32) - 2.0
    batch = Rollout(rng.integers(1, 7, both.shape), both, response, log_probs, prompt_length=3)
    return batch.replace(ref_log_probs=ref_log_probs, scores=scores[:, 0])


def test_an_update_of_rl_leaves_out_the_columns_that_no_row_of_a_part_needs(monkeypatch):
    monkeypatch.setattr(lengths, "LONG", 16)
    widths = set()

    def policy_fn(params, tokens, *inputs):
        widths.add(tokens.shape[1])
        log_probs = params["w"] * jnp.ones(tokens.shape)
        return PolicyOutput(log_probs, entropy=-log_probs)

    config = rloo.Config(group_size=2, num_microbatches=4, kl_loss_coef=0.1)
    update = partial(rloo.update, policy_fn=policy_fn, optimizer=SGD, config=config)
    jax.eval_shape(update, TrainState.create({"w": 1.0}, SGD), ragged_rollout(), KEY)
    assert widths == {7, 11, 19}


@pytest.mark.slow
def test_a_language_model_learns_the_same_from_rows_of_like_length(monkeypatch):
    """On 2 x 2 devices its weights are cut over fsdp."""
    sizes = {"vocab_size": 7, "max_length": 24, "hidden_size": 8, "num_layers": 1, "num_heads": 2}
    model = models.build(models.GPT2Config(**sizes, initializer_range=0.5))
    params = initial_params(model)
    policy_fn = models.policy_fn(model, prompt_length=3)
    batch = ragged_rollout()
    widths = set()

    def seen(params, tokens, *inputs):
        widths.add(tokens.shape[1])
        return policy_fn(params, tokens, *inputs)

    def updated(parts, params, batch, **options):
        config = rloo.Config(
            group_size=2, num_microbatches=parts, aggregate="token", kl_loss_coef=0.1
        )
        update = partial(rloo.update, policy_fn=seen, optimizer=SGD, config=config, **options)
        return jax.jit(update)(TrainState.create(params, SGD), batch, jax.random.key(1))

    expected, metrics = updated(1, params, batch)
    widths.clear()
    monkeypatch.setattr(lengths, "LONG", 16)
    mesh = sharding.make_mesh(2, fsdp=2)
    placed = jax.device_put(params, sharding.by_path(params, models.SHARDING, mesh))
    spread = sharding.shard_rows(mesh, batch)
    with jax.set_mesh(mesh):  # as in a run
        found, own = updated(4, placed, spread, minibatch_sharding=sharding.rows(mesh))
    assert widths == {7, 11, 19}
    assert_close(found.params, expected.params, atol=1e-6)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), found.params, params)
    assert max(jax.tree.leaves(moved)) > 0.1
    assert_close(own, metrics, atol=0)


@pytest.mark.parametrize(
    ("learning_rate", "expected"), [(0.0, [1.0, 1.0, 0.5, 0.5]), (0.5, [1.0] * 4)]
)
def test_the_optimizer_gets_the_loss(learning_rate, expected):
    """optax's extra-args protocol: the plateau halves the step after two losses that did not
    fall.
    """
    optimizer = optax.chain(
        optax.sgd(learning_rate), optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    )
    state = TrainState.create({"w": jnp.array(1.0)}, optimizer)
    step = jax.jit(lambda state: gradient_step(half_square, state, optimizer))
    scales = []
    for _ in range(4):
        state, _ = step(state)
        scales.append(float(state.opt_state[1].scale))
    assert scales == expected


@pytest.mark.parametrize("loss", [jnp.float32(1.0), (Mean.of(1.0), jnp.float32(1.0))])
def test_a_loss_is_made_of_means(loss):
    state = TrainState.create({"w": jnp.array(1.0)}, SGD)
    for terms, metrics in ((loss, {}), (Mean.of(1.0), {"w": jnp.float32(1.0)})):
        with pytest.raises(TypeError, match=r"losses\.aggregate"):
            gradient_step(lambda params, terms=terms, metrics=metrics: (terms, metrics), state, SGD)


def test_means_by_hand():
    one = Mean(jnp.float32(6.0), jnp.float32(4.0))
    both = one.merge(2.0 * Mean.of(jnp.array([1.0, 2.0])))
    assert both.total == 12.0
    assert both.count == 6.0
    assert both.value == 2.0
    assert Mean(jnp.float32(0.0), jnp.float32(0.0)).value == 0
    assert float(Max(jnp.float32(1.0)).merge(Max(jnp.float32(3.0)))) == 3.0
    for add in (lambda: one + 0.1 * both, lambda: sum([one, both]), lambda: one - both):
        with pytest.raises(TypeError, match=r"tuple of Means, .* a\.merge\(b\)"):
            add()


def test_keys_of_microbatches_and_devices_differ():
    """Microbatch m on device d draws with fold_in(fold_in(key, m), d); without devices with
    fold_in(key, m).
    """
    key = jax.random.key(1)
    state = TrainState.create({"w": jnp.array(1.0)}, SGD)

    def drawn(params, part, key):
        return Mean.of(params["w"] * jax.random.uniform(key)), {}

    step = partial(gradient_step, drawn, optimizer=SGD, key=key, num_microbatches=2)
    fold = jax.random.fold_in
    uniform = jax.random.uniform
    expected = np.mean([uniform(fold(key, m)) for m in range(2)])
    _, metrics = jax.jit(step)(state, batch=np.ones(2, np.float32))
    assert_allclose(metrics["loss"], expected, rtol=1e-6)
    mapped = jax.shard_map(
        lambda batch: step(state, batch=batch, axis_name="data")[1]["loss"],
        mesh=sharding.make_mesh(4),
        in_specs=P("data"),
        out_specs=P(),
    )
    expected = np.mean([uniform(fold(fold(key, m), d)) for m in range(2) for d in range(4)])
    assert_allclose(jax.jit(mapped)(np.ones(8, np.float32)), expected, rtol=1e-6)


def two_terms(state, batch, key=None, num_microbatches=1, axis_name=None):
    """A mean over tokens, and a tenth of a mean over rows, as of GRPO and SFT."""
    del key

    def loss_fn(params, batch):
        rows = losses.weighted_mean(
            jnp.square(params["w"] - batch["x"][:, 0]),
            batch["weight"],
        )
        tokens = losses.aggregate(
            jnp.square(params["w"] * batch["x"]),
            batch["mask"],
        )
        return (tokens, 0.1 * rows), {"rows": rows}

    return gradient_step(
        loss_fn, state, SGD, batch=batch, num_microbatches=num_microbatches, axis_name=axis_name
    )


def test_terms_with_different_denominators():
    """The gradient is that of the sum of the two whole losses, however the batch is cut."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 3)).astype(np.float32)
    weight = rng.integers(0, 3, 16).astype(np.float32)
    mask = rng.random((16, 3)) < np.linspace(0.1, 1.0, 16)[:, None]
    state = TrainState.create({"w": jnp.float32(0.5)}, SGD)
    batch = {"x": x, "weight": weight, "mask": mask}
    after, metrics = expected = jax.jit(two_terms)(state, batch)
    rows = np.average((0.5 - x[:, 0]) ** 2, weights=weight)
    assert_allclose(metrics["rows"], rows, rtol=1e-5)
    assert_allclose(metrics["loss"], np.mean((0.5 * x[mask]) ** 2) + 0.1 * rows, rtol=1e-5)
    slope = np.mean(x[mask] ** 2) + 0.2 * np.average(0.5 - x[:, 0], weights=weight)
    assert_allclose(after.params["w"], 0.5 - slope, rtol=1e-5)
    for result in every_way(partial(two_terms, num_microbatches=2), state, batch, KEY, [True]):
        assert_close(result, expected)


def record(state, minibatch, key):
    """A step that trains nothing and writes down which rows it saw, and the key it was given."""
    seen = state.params["rows"].at[state.step].set(minibatch["row"])
    keys = state.params["keys"].at[state.step].set(jax.random.key_data(key))
    metrics = {
        "first": minibatch["row"][0],
        "largest": Max(state.step),
        "step_max": state.step,
        "nonfinite": (state.step == 1).astype(jnp.float32),
    }
    return TrainState(
        step=state.step + 1, params={"rows": seen, "keys": keys}, opt_state=()
    ), metrics


def minibatches(rows, key, num_epochs, num_minibatches, shuffle_blocks=1, **options):
    """Row numbers [epochs * minibatches, rows of a minibatch on this device], keys and metrics."""
    steps = num_epochs * num_minibatches
    size = rows.shape[0] // max(num_minibatches, 1)
    params = {
        "rows": jnp.full((steps, size), -1),
        "keys": jnp.zeros((steps, 2), jnp.uint32),
    }
    state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=())
    options |= {
        "num_epochs": num_epochs,
        "num_minibatches": num_minibatches,
        "shuffle_blocks": shuffle_blocks,
    }
    state, metrics = minibatch_epochs(record, state, {"row": rows, "absent": None}, key, **options)
    return state.params["rows"], state.params["keys"], metrics


def test_every_row_once_an_epoch_in_a_fresh_order():
    key = KEY
    program = jax.jit(partial(minibatches, num_epochs=3, num_minibatches=4))

    def run(key):
        return jax.tree.map(np.asarray, program(np.arange(32), key))

    rows, keys, metrics = run(key)
    epochs = np.asarray(rows).reshape(3, 32)
    for epoch in epochs:
        assert sorted(epoch) == list(range(32))
    assert len({tuple(epoch) for epoch in epochs}) == 3
    shuffles = [
        jax.random.fold_in(jax.random.fold_in(key, epoch), block)
        for epoch in range(3)
        for block in range(4)
    ]
    keys = [
        tuple(k)
        for k in (*np.asarray(keys).tolist(), *(jax.random.key_data(k).tolist() for k in shuffles))
    ]
    assert len(set(keys)) == 24  # no key is used twice
    assert_array_equal(run(key)[0], rows)
    assert np.any(run(jax.random.key(1))[0] != rows)
    assert_allclose(
        metrics["first"],
        np.mean(np.asarray(rows)[:, 0]),
        rtol=1e-6,
    )
    assert metrics["largest"] == 11  # by its type; a name decides nothing
    assert metrics["step_max"] == 5.5
    assert metrics["nonfinite"] == 1
    single = jax.jit(partial(minibatches, num_epochs=2, num_minibatches=1))
    single, keys, _ = jax.tree.map(np.asarray, single(np.arange(6), key))  # the batch as it is
    assert_array_equal(single, np.tile(np.arange(6), (2, 1)))
    assert np.any(keys[0] != keys[1])


def test_minibatches_stay_sharded():
    """Shuffled over the whole batch, XLA would replicate them on all four devices."""
    mesh = sharding.make_mesh(4)
    seen = []

    def step(state, minibatch, key):
        jax.debug.inspect_array_sharding(minibatch, callback=seen.append)
        return state + jnp.sum(jnp.sin(minibatch)), {}

    options = {"num_epochs": 1, "num_minibatches": 2, "minibatch_sharding": sharding.rows(mesh)}
    arguments = sharding.replicate(
        mesh,
        (jnp.zeros(()), KEY),
    )
    run = jax.jit(lambda state, batch, key: minibatch_epochs(step, state, batch, key, **options))
    run.lower(
        arguments[0],
        sharding.shard_rows(mesh, jnp.ones((32, 8))),
        arguments[1],
    ).compile()
    assert seen[0].shard_shape((16, 8)) == (4, 8)


@pytest.mark.parametrize(
    ("batch", "num_microbatches", "message"),
    [
        ({"x": np.ones(6)}, 4, "num_microbatches=4 .* 6 rows"),
        ({"x": np.ones(6)}, 0, "num_microbatches=0"),
        (None, 2, r"a batch needs arrays .* sizes \[\]"),
        ({"x": np.ones(6), "y": np.ones(4)}, 2, r"sizes \[4, 6\]"),
    ],
)
def test_microbatch_errors(batch, num_microbatches, message):
    state = TrainState.create({"w": jnp.ones(1)}, SGD)
    with pytest.raises(ValueError, match=message):
        gradient_step(squares, state, SGD, batch=batch, num_microbatches=num_microbatches)


@pytest.mark.parametrize(
    ("num_rows", "num_minibatches", "shuffle_blocks", "message"),
    [
        (10, 4, 1, "10 rows .* shuffle_blocks=1 .* num_minibatches=4"),
        (12, 2, 4, "12 rows .* it must be a multiple of 8"),
        (8, 0, 1, "minibatches must be at least 1, got 0"),
    ],
)
def test_minibatch_errors_name_the_numbers(num_rows, num_minibatches, shuffle_blocks, message):
    with pytest.raises(ValueError, match=message):
        minibatches(np.arange(num_rows), KEY, 1, num_minibatches, shuffle_blocks)


def test_devices_hold_whole_blocks():
    run = partial(minibatches, num_epochs=1, num_minibatches=2, shuffle_blocks=6, axis_name="data")
    mapped = jax.shard_map(
        run, mesh=sharding.make_mesh(4), in_specs=(P("data"), P()), out_specs=P(), check_vma=False
    )
    with pytest.raises(ValueError, match="shuffle_blocks=6 does not divide over 4 devices"):
        jax.eval_shape(mapped, np.arange(24), KEY)


def reductions(hlo):
    """The all-reduces of a compiled program, and those of them that stand in a loop's body."""
    bodies = {}
    name = ""
    for line in hlo.splitlines():
        name = (
            line.split()[line.startswith("ENTRY")]
            if line.endswith("{") and not line.startswith(" ")
            else name
        )
        bodies.setdefault(name.lstrip("%"), []).append(line)
    loops = set(re.findall(r"body=%?([\w.\-]+)", hlo))
    count = {
        name: sum("all-reduce(" in line or "all-reduce-start(" in line for line in lines)
        for name, lines in bodies.items()
    }
    return sum(count.values()), sum(count[name] for name in loops)


@pytest.mark.parametrize(
    ("num_rows", "in_loop"), [(16, False), (8, True)]
)  # 8: two microbatches of less than a row a device
def test_gradients_are_summed_over_devices_once_a_step(num_rows, in_loop):
    mesh = sharding.make_mesh(4)
    state = TrainState.create({"w": jnp.ones(3)}, SGD)
    x = np.sin(np.arange(3 * num_rows, dtype=np.float32)).reshape(num_rows, 3)
    batch = {"x": x}

    def loss_fn(params, part):
        return Mean.of(jnp.square(part["x"] @ params["w"])), {"x_max": Max(jnp.max(part["x"]))}

    step = partial(gradient_step, loss_fn, optimizer=SGD, num_microbatches=4)
    spread = sharding.replicate(mesh, state), sharding.shard_rows(mesh, batch)
    run = jax.jit(
        lambda state, batch: step(state, batch=batch, minibatch_sharding=sharding.rows(mesh))
    )
    _, in_loops = reductions(run.lower(*spread).compile().as_text())
    assert bool(in_loops) is in_loop
    after, metrics = run(*spread)
    sums = x.sum(axis=1)
    assert_allclose(metrics["loss"], np.mean(sums**2), rtol=1e-5)
    assert_allclose(after.params["w"], 1.0 - 2 * np.mean(sums[:, None] * x, axis=0), rtol=1e-5)
    assert metrics["x_max"].value == x.max()
