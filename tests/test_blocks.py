"""``compute.blocks``: the same bytes on any number of devices, after any move and with several
processes.
"""

import json
import os
import signal
import time
from dataclasses import replace

import calculator
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import (
    CONFIG,
    TINY,
    finished_run,
    launch,
    perturbed,
    program,
    results,
    save_base,
    slow,
    soak,
    some_tokens,
    tiny,
)
from digests import check_digest
from numpy.testing import assert_array_equal

from rlhf_jax import advantages, gradient_step, models, ops, sampling, sft, sharding, training
from rlhf_jax.cli import verify
from rlhf_jax.config import Compute, Mesh, RunConfig
from rlhf_jax.errors import UserError
from rlhf_jax.parallel import blocks
from rlhf_jax.runs import devices, manifest
from rlhf_jax.runs import folder as folders
from rlhf_jax.training.common import layout
from rlhf_jax.training.common.layout import Layout, layout_of
from rlhf_jax.types import Demonstrations, Max, Mean, TrainState

VALUES = np.random.default_rng(0).standard_normal(8).astype(np.float32) * 10.0 ** np.arange(8)
VALUES = VALUES.astype(np.float32)
COUNTS = (1, 4)


def on(count, program, *args, num_blocks=8):
    """The result of a program in blocks on so many devices."""
    mesh = sharding.make_mesh(devices=jax.devices()[:count])
    args = sharding.replicate(mesh, args)
    return jax.device_get(jax.jit(blocks.replicated(program, mesh, num_blocks))(*args))


def by_pairs(values):
    """The sum in pairs, pairs of pairs, ..."""
    values = list(values)
    while len(values) > 1:
        values = [values[i] + values[i + 1] for i in range(0, len(values), 2)]
    return values[0]


def test_parts_are_added_in_pairs_on_any_number_of_devices():
    """Their sum in another order is another number."""

    def total(values):
        def part(number):
            own = jnp.asarray(values)[number]
            return {"array": own, "mean": Mean(own, 1.0 + own), "max": Max(own)}

        return blocks.tree_sum(part, 8)

    expected = by_pairs(VALUES)
    assert expected != np.cumsum(VALUES)[-1]
    for count in COUNTS:
        got = on(count, total, VALUES)
        assert got["array"] == expected == got["mean"].total
        assert got["mean"].count == by_pairs(1 + VALUES)
        assert got["max"].value == VALUES.max()


def test_rows_are_mapped_block_by_block_and_stay_in_order():
    seen = []

    def double(rows):
        seen.append(len(rows["x"]))
        assert blocks.number() == 0  # a block is not cut again
        return {"y": 2 * rows["x"], "z": jnp.sum(rows["x"], axis=1)}

    rows = {"x": np.arange(48, dtype=np.float32).reshape(16, 3)}
    for count in COUNTS:
        got = on(count, lambda rows: blocks.map_rows(double, rows), rows)
        assert_array_equal(got["y"], 2 * rows["x"])
        assert_array_equal(got["z"], rows["x"].sum(axis=1))
    assert set(seen) == {2}
    # Rows that do not divide go at once, on every device; so do all outside of ``replicated``.
    seen.clear()
    nine = {"x": np.ones((9, 3), np.float32)}
    assert_array_equal(on(2, lambda rows: blocks.map_rows(double, rows)["y"], nine), 2 * nine["x"])
    jax.eval_shape(lambda: blocks.map_rows(double, rows))
    assert seen == [9, 16]


def test_a_jitted_function_is_traced_apart_inside_a_block():
    """Eight rows are divided over the devices, and the eight rows of a block are its own."""
    double = jax.jit(lambda rows: blocks.map_rows(lambda block: 2 * block, rows))

    def program(rows):
        return double(rows[:8]), blocks.map_rows(double, rows)

    rows = np.arange(64, dtype=np.float32)
    for count in COUNTS:
        first, whole = on(count, program, rows)
        assert_array_equal(first, 2 * rows[:8])
        assert_array_equal(whole, 2 * rows)


def test_the_programs_of_a_stage_run_in_blocks():
    for count, expected in ((8, 8), (None, 0)):
        seen = []
        on = Layout(sharding.make_mesh(), count)
        program = on.jit(lambda x, seen=seen: seen.append(blocks.number()) or x)
        program.lower(np.ones(3))
        assert set(seen) == {expected}


def test_score_rows_counts_the_rows_of_all_blocks():
    seen = []

    def score(params, tokens, mask, key):
        seen.append(len(tokens))
        return tokens[:, 0] * params

    tokens = np.arange(64).reshape(32, 2)
    for rows, expected in ((None, 4), (16, 2), (3, 1)):
        seen.clear()
        scored = ops.by_rows(score, rows)
        got = on(2, lambda tokens, scored=scored: scored(3, tokens, tokens), tokens)
        assert_array_equal(got, 3 * tokens[:, 0])
        assert set(seen) == {expected}


def test_gradients_of_low_precision_are_added_in_float32():
    """256 + 7 is 264 in bfloat16; 256 + 1 would be 256 again."""

    def loss_fn(params, part):
        return Mean(params["w"] * jnp.sum(part), jnp.float32(1 / 8)), {}

    def step(state, batch):
        return gradient_step(loss_fn, state, optax.sgd(1.0), batch=batch)[0]

    state = TrainState.create({"w": jnp.zeros((), jnp.bfloat16)}, optax.sgd(1.0))
    batch = jnp.array([256, 1, 1, 1, 1, 1, 1, 1], jnp.bfloat16)
    assert on(2, step, state, batch).params["w"] == -264


@pytest.mark.slow
@pytest.mark.parametrize("num_microbatches", [1, 16])
def test_a_step_has_the_same_bits_on_one_device_and_four(num_microbatches, optimized):
    """The step of a whole network, with clipping; and the numbers are those without blocks."""
    model = models.build(CONFIG)
    seen = []

    def policy_fn(params, tokens, *inputs):
        seen.append(len(tokens))
        return models.policy_fn(model)(params, tokens, *inputs)

    optimizer = optax.chain(optax.clip_by_global_norm(1e-3), optax.adam(1e-3))
    state = TrainState.create(perturbed(model.init(jax.random.key(0))), optimizer)
    tokens = jnp.asarray(some_tokens(16, 8))
    lengths = jnp.arange(16)[:, None] % 7
    mask = (jnp.arange(8)[None] <= lengths + 1).astype(jnp.int32)
    batch = Demonstrations(tokens, mask, mask.at[:, 0].set(0))

    def step(state, batch):
        config = sft.Config(num_microbatches=num_microbatches)
        how = {"policy_fn": policy_fn, "optimizer": optimizer, "config": config}
        return sft.update(state, batch, None, **how)

    first = on(1, step, state, batch)
    jax.tree.map(assert_array_equal, first, on(4, step, state, batch))
    assert set(seen) == {16 // max(num_microbatches, 8)}
    plain = jax.device_get(jax.jit(step)(state, batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), first, plain)


@pytest.mark.parametrize("estimate", [advantages.group_normalized, slow(advantages.leave_one_out)])
def test_groups_have_the_same_bits_on_one_device_and_two(estimate, optimized):
    """XLA would compute a division by a number of each group in two ways."""
    scores = np.random.default_rng(0).standard_normal((64, 7)).astype(np.float32)
    assert_array_equal(on(1, estimate, scores), on(2, estimate, scores))


@pytest.mark.slow
def test_responses_are_sampled_block_by_block():
    """Those of a batch as a whole: a row's randomness is its own."""
    model, params = tiny()
    seen = []

    def decode(params, tokens, *inputs):
        seen.append(len(tokens))
        return model.decode(params, tokens, *inputs)

    how = sampling.SamplingConfig(max_new_tokens=4, eos_id=1, pad_id=0)
    prompts = jnp.asarray(some_tokens(16, 4))

    def sample(params, prompts):
        key = jax.random.key(0)
        mask = jnp.ones_like(prompts)
        cached = model._replace(decode=decode)
        return sampling.generate(cached, params, prompts, mask, key, config=how).tokens

    whole = sample(params, prompts)
    assert set(seen) == {16}
    for count in (1, 4):
        seen.clear()
        assert_array_equal(on(count, sample, params, prompts), whole)
        assert set(seen) == {2}


def test_rows_of_a_step_divide_by_blocks_and_microbatches():
    config = RunConfig(compute=Compute(blocks=8))
    assert [layout.row_parts(layout_of(config), number) for number in (1, 4, 16)] == [8, 8, 16]
    assert [layout.row_parts(layout_of(RunConfig()), number) for number in (1, 4)] == [4, 16]


@pytest.mark.parametrize(
    ("compute", "mesh", "microbatches", "message"),
    [
        (Compute(blocks=2), Mesh(), 1, "compute.blocks 2 .* 4 devices"),
        (Compute(blocks=8), Mesh(2, 2), 1, "compute.blocks: .* mesh.fsdp or mesh.tensor"),
        (Compute(blocks=32), Mesh(), 1, "batch_size 16 .* 32 compute.blocks"),
        (Compute(blocks=4), Mesh(), 12, "num_microbatches 12: .* compute.blocks 4"),
    ],
)
def test_what_blocks_cannot_be_is_refused(compute, mesh, microbatches, message, config):
    config = replace(
        config,
        compute=compute,
        mesh=mesh,
        sft=replace(config.sft, num_microbatches=microbatches),
        ppo=replace(config.ppo, num_microbatches=microbatches),
    )
    for run in (training.sft.run, training.rl.run):
        with pytest.raises(UserError, match=message):
            run(config)


def test_a_number_of_blocks_is_a_power_of_two():
    with pytest.raises(ValueError, match=r"blocks .*power of two.* got 6"):
        Compute(blocks=6)


def test_a_minibatch_divides_by_blocks(config):
    config = replace(config, compute=Compute(blocks=16))
    message = "rl.batch_size 16 .* 2 ppo.num_minibatches x 16 compute.blocks; use 32"
    with pytest.raises(UserError, match=message):
        training.rl.run(config)


def test_a_run_in_blocks_may_move_and_says_so(tmp_path, monkeypatch, capsys):
    """Another number of devices is told as no loss, anything else as before."""
    finished_run(tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(record | {"moves": manifest.EXACT}))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with folders.open_run(tmp_path, resume=True) as run:
        manifest.write_manifest(run, {}, {})
    said = capsys.readouterr().out
    assert said == "--resume: devices.count was 4 and is now 1; compute.blocks keeps the bits\n"
    monkeypatch.setattr(manifest.devices, "cpu", lambda: "z80")
    with folders.open_run(tmp_path, resume=True) as run:
        manifest.write_manifest(run, {}, {})
    assert "is now 'z80'. The run goes on, but is no longer bit for bit" in capsys.readouterr().out


def test_a_run_has_as_many_threads_as_blocks(monkeypatch, capsys):
    """XLA's products on a CPU round by their number, which it reads when it starts."""
    late = "JAX had started before, with 4 threads, and this run needs 8: its bits depend on"
    monkeypatch.setenv("NPROC", "4")
    monkeypatch.setenv("XLA_FLAGS", "")
    devices.choose("cpu", threads=8)
    assert os.environ["NPROC"] == "4"
    assert capsys.readouterr().out.startswith(late)
    monkeypatch.setattr(devices.xla_bridge, "backends_are_initialized", lambda: False)
    devices.choose("cpu", threads=8)
    assert os.environ["NPROC"] == "8"
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_stage_has_the_same_bytes_on_one_device_and_four(config, monkeypatch, capsys):
    """With validations, verified from its seed; other stages in the test below."""
    settings = replace(config.sft, num_epochs=1)
    config = replace(config, compute=Compute(blocks=8), sft=settings)
    jax.devices()  # it has started before
    four = training.sft.run(config)
    assert "JAX had started before, with 4 threads, and this run needs 8" in capsys.readouterr().out
    assert json.loads((four.folder / "manifest.json").read_text())["moves"] == "exact"
    monkeypatch.setattr(layout, "mesh_of", lambda config: sharding.make_mesh(1))
    audit = verify.verify(four.folder, from_scratch=True, trust_config=True)
    assert audit.differences == []
    assert audit.compared.endswith("model/")


# --- Runs of their own


def start(script, folder, *flags, devices=1, count=1):
    """The processes of a run in blocks that saves each step."""
    command = [*program(script), "--config", TINY, "--output-dir", folder]
    command += ["--compute.blocks", "8", "--checkpoint-interval", "1", *flags]
    return launch(command, count, devices, ["--processes"])


def finish(running, *codes):
    said = [process.communicate(timeout=1200)[0] for process in running]
    assert {process.returncode for process in running} <= {*(codes or [0])}, said
    return said


def kill(process, folder, rows):
    """Kills a run when its metrics have so many rows."""
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < rows:
        assert process.poll() is None, finish([process])
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    finish([process], -signal.SIGKILL)


@pytest.fixture
def as_users_compile(monkeypatch):
    """And programs are read from the cache alone, where a kill would leave half of one."""
    monkeypatch.setitem(os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    monkeypatch.setitem(os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1e9")


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """A folder with a model, ``base``, and with sums as prompts."""
    folder = tmp_path_factory.mktemp("made")
    save_base(folder / "base", data, num_layers=2)
    calculator.write(str(folder), num_prompts=80)
    return folder


PACKED = ["--text.pack", "--sft.num-microbatches", "16"]
LORA = ["--model", "{made}/base", "--lora.rank", "2", "--compute.scan-layers", "--compute.remat"]
LORA += ["--text.too-long", "truncate"]
ENSEMBLE = ["--reward-model.ensemble-size", "2"]
SHORT = ["--rl.num-iterations", "4"]
SHARED = ["--rl.kl-target", "0.01", "--ppo.num-microbatches", "4"]
SEPARATE = ["--ppo.value", "separate", "--ppo.whiten-rewards", "--rl.top-p", "0.9"]
DYNAMIC = ["--rl.dynamic-sampling", "2", "--grpo.group-size", "4"]
TURNS = ["--rl.environment", "experiments/calculator.py:calculator", "--data", "{made}"]


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        soak("sft", []),
        soak("reward_model", []),
        soak("ppo", SHORT + SEPARATE),
        soak("sft", PACKED),
        soak("sft", LORA),
        soak("reward_model", ENSEMBLE),
        soak("dpo", []),
        soak("kto", []),
        soak("vpg", SHORT),
        soak("ppo", SHORT + SHARED),
        slow("rloo", SHORT),
        soak("grpo", SHORT + DYNAMIC),
        soak("grpo", SHORT + TURNS),
    ],
)
def test_a_stage_has_the_same_bytes_on_any_number_of_devices_and_after_moves(
    script, flags, made, tmp_path, as_users_compile
):
    """On one device; and killed on two, killed on eight, finished by two processes of one device
    each. And the bytes are those that are known of this kind of machine.
    """
    flags = [flag.format(made=made) for flag in flags]
    whole = tmp_path / "whole"
    finish(start(script, whole, *flags))
    one = results(whole)
    assert len(one) > 4

    moved = tmp_path / "moved"
    resume = []
    rows = 0
    for count in (2, 8):
        [process] = start(script, moved, *flags, *resume, devices=count)
        rows += 2
        kill(process, moved, rows)
        resume = ["--resume"]
    said, _ = finish(start(script, moved, *flags, "--resume", devices=1, count=2))
    assert "compute.blocks keeps the bits" in said
    assert "no longer bit for bit" not in said
    assert results(moved) == one

    name = " ".join([script, *flags]).replace(str(made), "made")
    weights, *_ = sorted((whole / "model").rglob("*.safetensors"))
    check_digest(name, weights, "8 blocks")
