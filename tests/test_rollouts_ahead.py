"""``rl.rollouts_ahead`` with the run's own sampler: who samples, resume, what is refused."""

from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import goes_on_alike, metric_rows, save_base, slow, soak, with_rl
from numpy.testing import assert_array_equal
from recorded import rl_job

from rlhf_jax import ppo, sharding, vpg
from rlhf_jax.config import Compute, LoRA, Mesh, RLStage
from rlhf_jax.errors import UserError
from rlhf_jax.iteration import LoopState, Prompts
from rlhf_jax.training import rl
from rlhf_jax.training.common import layout
from rlhf_jax.training.rl import ahead as ahead_module
from rlhf_jax.training.rl.ahead import Ahead
from rlhf_jax.training.rl.sample import _responder
from rlhf_jax.types import TrainState


@pytest.fixture
def short(config):
    return with_rl(config, num_iterations=3, validation_interval=2, kl_target=None)


def rollouts(config, name, rate, **changes):
    """The tokens of a run's rollouts, at a learning rate."""
    drawn = []

    def observe(step, state, metrics, rollout):
        assert "policy/importance_weight_mean" not in metrics
        drawn.append(np.asarray(rollout.tokens))

    config = replace(with_rl(config, **changes), output_dir=f"{config.output_dir}-{name}")
    rl.run(config, vpg, vpg.Config(), optimizer=optax.sgd(rate), on_step=observe)
    return drawn


@pytest.mark.slow
def test_a_rollout_comes_from_the_policy_before_the_last_update(short):
    """The first two come from the first policy, the third from that after one update."""
    short = with_rl(short, validation_interval=9)
    ahead = rollouts(short, "ahead", 3.0, rollouts_ahead=1, engine_importance="off")
    still = rollouts(short, "still", 0.0)
    assert_array_equal(ahead[:2], still[:2])
    assert np.any(ahead[2] != still[2])


class AtOnce:
    """An executor that does what is submitted on the spot."""

    def submit(self, fn, *args):
        done = Future()
        done.set_result(fn(*args))
        return done


@pytest.mark.parametrize("thread", [None, AtOnce()])
def test_each_step_has_its_own_prompts_and_the_policy_before_the_last_update(thread, monkeypatch):
    """The update adds 1 to the policy, which is 0; of the state it changes nothing else."""
    drawn = []

    def sample(job, state, batch):
        assert state.behind is None
        # A thread has the policy on the host, so that it starts no program on devices that learn.
        is_on_host = isinstance(state.train.params["w"], np.ndarray)
        assert is_on_host == (thread is not None and batch != "prompts 0")
        drawn.append((batch, float(state.train.params["w"])))
        return batch, {}

    monkeypatch.setattr(ahead_module, "sample", sample)
    ahead = Ahead(thread)
    prompts = SimpleNamespace(batches=lambda step: [f"prompts {step}", "reserve"])
    job = rl_job(settings=RLStage(num_iterations=4), schedule=prompts)
    job.run.layout.copy = lambda tree: jax.tree.map(jnp.copy, tree)
    first = TrainState(jnp.int32(0), {"w": jnp.float32(0.0)}, ())
    state = LoopState(first, 0.0, behind=first)
    for step in range(4):
        behind = ahead.start(job, state, step + 1)
        assert behind.params["w"] is not state.train.params["w"]  # which the update gives up
        rollout, _ = ahead.sample(job, state, f"prompts {step}")
        assert rollout == f"prompts {step}"
        params = {"w": state.train.params["w"] + 1.0}
        state = replace(state, train=replace(state.train, params=params), behind=behind)
    assert drawn == [("prompts 0", 0.0), ("prompts 1", 0.0), ("prompts 2", 1.0), ("prompts 3", 2.0)]
    assert float(state.behind.params["w"]) == 3.0


def test_what_samples_elsewhere_does_so_for_one_at_a_time():
    """An engine, or devices of their own, whose samples are on the host."""
    state = LoopState(TrainState(jnp.int32(0), {"w": jnp.float32(1.0)}, ()), 0.0)
    prompts = Prompts(*[np.ones((4, 1), np.int32)] * 2, np.arange(4), places=np.arange(4))
    key = jax.random.key(0)
    here = {"ahead": SimpleNamespace(alone=lambda respond: lambda *given: [respond(*given)])}
    client = SimpleNamespace(responder=lambda state, kind: lambda prompts, key: kind)
    assert _responder(rl_job(client=client, **here), state, "respond")(prompts, key) == ["respond"]
    programs = {"respond_to_each": lambda policy, prompts, key: policy["w"] + prompts.row_ids}
    apart = rl_job(programs=programs, **here)
    apart.run.layout.sampling_mesh = sharding.make_mesh(4)
    [sampled] = _responder(apart, state, "respond_to_each")(prompts, key)
    assert isinstance(sampled, np.ndarray)
    assert_array_equal(sampled, [1, 2, 3, 4])


@pytest.mark.parametrize("lora", [slow(LoRA()), soak(LoRA(rank=2))])
def test_a_stopped_run_goes_on_alike(short, data, tmp_path, lora):
    base = str(save_base(tmp_path / "base", data))
    config = replace(with_rl(short, rollouts_ahead=1), model=base, lora=lora)

    def run(config):
        return rl.run(config, ppo)

    result = run(config)
    rows = metric_rows(result.folder)[1:]
    assert rows[0]["policy/update_gap"] < 1e-4
    assert rows[-1]["policy/update_gap"] > 1e-4
    assert all("policy/importance_limited" in row for row in rows)
    goes_on_alike(run, config, result)


@pytest.mark.slow
def test_devices_of_their_own_sample_the_next_rollout(short, data, tmp_path):
    """Two devices learn, two sample: the same tokens and, up to rounding, metrics."""
    base = str(save_base(tmp_path / "base", data))
    config = replace(with_rl(short, rollouts_ahead=1), model=base, lora=LoRA(rank=2))
    drawn = {}

    def run(config):
        rows = drawn.setdefault(config.mesh.sampling, [])

        def observe(step, state, metrics, rollout):
            assert len(rollout.tokens.sharding.device_set) == 4 - config.mesh.sampling
            rows.append(np.asarray(rollout.tokens))

        return rl.run(config, ppo, on_step=observe)

    whole = run(replace(config, output_dir=f"{config.output_dir}-whole"))
    apart = replace(config, mesh=Mesh(sampling=2))
    on = layout.layout_of(apart)
    meshes = (on.mesh, on.sampling_mesh)
    devices = [device for mesh in meshes for device in mesh.devices.flat]
    assert devices == jax.devices()
    result = run(apart)
    assert_array_equal(np.stack(drawn[2]), np.stack(drawn[0]))
    for row, expected in zip(metric_rows(result.folder), metric_rows(whole.folder), strict=True):
        assert row == pytest.approx(expected, rel=2e-3, abs=2e-3)
    first, *_, last = metric_rows(whole.folder)[1:]
    assert first["policy/update_gap"] < 1e-4 < last["policy/update_gap"]
    assert "policy/importance_limited" in last


def test_what_does_not_go_together(short, monkeypatch):
    ahead = with_rl(short, rollouts_ahead=1)
    apart = Mesh(sampling=2)
    blocks = Compute(blocks=4)
    served = with_rl(ahead, engine="stored:x")
    alone = "mesh\\.sampling: devices that sample alone need"
    refused = [
        (lambda: RLStage(rollouts_ahead=1, dynamic_sampling=1), "rollouts_ahead, dynamic_sampling"),
        (lambda: RLStage(rollouts_ahead=2), "rollouts_ahead"),
        (lambda: replace(short, mesh=apart), alone),
        (lambda: replace(ahead, mesh=apart, compute=blocks), alone),
        (lambda: replace(served, mesh=apart), r"mesh\.sampling, rl\.engine: either"),
    ]
    for make, message in refused:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(UserError, match=r"does not fit 0 devices"):
        rl.run(replace(ahead, mesh=Mesh(sampling=4)), ppo)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"rl\.rollouts_ahead: several processes"):
        rl.run(ahead, ppo)
