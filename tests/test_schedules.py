"""Learning-rate schedules and early stopping against numbers worked by hand, and in killed runs."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_loop import run_loop
from test_training import Killed

from rlhf_jax.algorithms import ppo
from rlhf_jax.config import Optimizer, RLStage, RunConfig, SFTStage
from rlhf_jax.runs import checkpoint
from rlhf_jax.training import loop, rl
from rlhf_jax.training.optimizer import Judge, make_optimizer, times_exhausted
from rlhf_jax.training.phases import LoopState
from rlhf_jax.training.stage import open_stage
from rlhf_jax.types import TrainState


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"schedule": "constant"}, [0.8] * 6),
        ({"schedule": "linear"}, [0.8, 0.6, 0.4, 0.2, 0.0, 0.0]),
        ({"schedule": "cosine"}, [0.8, 0.4 * (1 + 0.5**0.5), 0.4, 0.4 * (1 - 0.5**0.5), 0.0, 0.0]),
        ({"schedule": "step", "decay_every": 2, "decay_factor": 0.5}, [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]),
        ({"schedule": "step", "decay_every": 1, "warmup_steps": 2, "decay_factor": 0.25}, [0, 0.4, 0.8, 0.2, 0.05]),
        ({"schedule": "linear", "warmup_steps": 2}, [0, 0.4, 0.8, 0.4, 0.0]),
        ({"schedule": "plateau", "warmup_steps": 1}, [0, 0.8, 0.8]),
    ],
)
def test_the_rate_of_each_step(settings, rates):
    """Four steps long. Adam's step on a constant gradient is the learning rate itself."""
    optimizer = make_optimizer(Optimizer(learning_rate=0.8, max_grad_norm=None, eps=0.0, **settings), 4)
    params = {"w": jnp.float32(0.0)}
    state, taken = optimizer.init(params), []
    for _ in rates:
        updates, state = jax.jit(optimizer.update)({"w": jnp.float32(3.0)}, state, params)
        taken.append(-float(updates["w"]))
    np.testing.assert_allclose(taken, rates, atol=2e-5)


def test_matrices_are_decayed_and_nothing_else():
    """On a gradient of 0 AdamW takes away learning_rate * weight_decay of what it decays."""
    optimizer = make_optimizer(Optimizer(learning_rate=0.5, weight_decay=0.2, max_grad_norm=None), 1)
    layer = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2, 2)), "lora_a": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    params = {"h_0": layer, "wte": {"embedding": jnp.ones((2, 2))}, "value": {"kernel": jnp.ones(2)}}
    params |= {"score": {"kernel": jnp.ones(2), "gain": jnp.ones(()), "shift": jnp.ones(())}}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    decayed = {jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(updates) if leaf.any()}
    assert decayed == {"['h_0']['kernel']", "['h_0']['lora_a']", "['wte']['embedding']"}
    np.testing.assert_allclose(updates["h_0"]["kernel"], -0.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "patience", "times"),
    [
        ([5.0, 5.0], 1, 1),  # equal is no improvement
        ([5.0, 4.0, 4.5, 3.0, 4.0], 2, 0),  # a new minimum starts the count anew
        ([1.0, 2.0, 2.0, 2.0, 2.0, 2.0], 2, 2),
        ([float("nan"), 2.0, 1.0], 1, 1),
        ([float("nan")] * 3, 3, 1),
    ],
)
def test_times_exhausted(values, patience, times):
    assert times_exhausted(values, patience) == times


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *((values, "the schedule step needs decay_every") for values in ({"schedule": "step"}, {"decay_every": 3})),
        ({"schedule": "plateau", "decay_patience": 0}, "decay_patience must be at least 1"),
        ({"decay_factor": 1.0}, "decay_factor must be above 0 and below 1, got 1.0"),
    ],
)
def test_settings_of_schedules(values, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(**values)


# --- In a run -------------------------------------------------------------------------------------------------------

SCORES = [1.0, 2.0, 3.0, 2.5, 3.0, 2.0, 4.0]  # step 5 is the third validation in a row without improvement


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_early_stopping_ends_a_run_and_says_so(tmp_path, capsys):
    config = RunConfig(output_dir=str(tmp_path / "run"), checkpoint_interval=2, early_stopping_patience=3)
    assert run_loop(config, scores=SCORES)[0] == 5
    said = "ended early, after step 5 of 6: validation/score has not improved for 3 validations"
    assert said in capsys.readouterr().out
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] == 5
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = dataclasses.replace(config, resume=True)
    assert run_loop(again, die_at=5, scores=SCORES)[0] == 5  # finished: no step is taken
    assert said in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    changed = dataclasses.replace(again, early_stopping_patience=4, allow_changed=("early_stopping_patience",))
    assert run_loop(changed, scores=SCORES)[0] == 6


@pytest.mark.parametrize(
    ("interval", "scores", "last", "early"),
    [(2, [1.0, 0, 2.0, 0, 2.0, 0, 3.0], 4, True), (6, [1.0] * 7, 6, False)],  # the last step ends the run anyway
)
def test_validations_count_and_not_steps(tmp_path, capsys, interval, scores, last, early):
    config = RunConfig(output_dir=str(tmp_path), early_stopping_patience=1)
    assert run_loop(config, scores=scores, validation_interval=interval)[0] == last
    assert ("ended early" in capsys.readouterr().out) == early


# Of validation/loss, which goes down: the best is at step 2.
LOSSES = [4.0, 3.0, 2.0, 2.5, 2.0, 3.0, 1.0]


def descend(config: RunConfig, die_at=None):
    """Six steps of Adam on a constant gradient; returns the parameter."""
    optimizer = make_optimizer(config.sft.optimizer, 6)

    @jax.jit
    def update(state):
        updates, opt_state = optimizer.update({"w": jnp.float32(1.0)}, state.opt_state, state.params)
        return TrainState(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    def advance(state, step):
        if step == die_at:
            raise Killed
        return update(state), {"nonfinite": jnp.float32(0)}

    def validate(state):
        return loop.Validation({"validation/loss": LOSSES[int(state.step)]})

    with open_stage(config, "sft", {}) as stage:
        start = stage.replicate(TrainState.create({"w": jnp.float32(0.0)}, optimizer))
        state, _ = loop.train(stage, start, loop.Job(advance, 6, validate, optimizer=config.sft.optimizer))
    return -float(state.params["w"])


def test_a_killed_run_ends_at_the_same_step_and_lowers_alike(tmp_path):
    """Killed between a checkpoint and the validation that ends the run: what was counted before is not forgotten."""
    plateau = {"schedule": "plateau", "decay_patience": 2, "decay_factor": 0.5}
    stage = SFTStage(optimizer=Optimizer(learning_rate=1.0, eps=0.0, max_grad_norm=None, **plateau))
    config = RunConfig(checkpoint_interval=2, early_stopping_patience=3, sft=stage)
    straight, killed = (dataclasses.replace(config, output_dir=str(tmp_path / name)) for name in ("straight", "killed"))
    weight = descend(straight)
    # Steps 1 to 4 at 1; step 4 is the second validation without improvement, so that step 5 is at 0.5.
    assert weight == pytest.approx(4.5, abs=1e-3)
    assert [row.get("plateau_scale") for row in rows(tmp_path / "straight")] == [None, 1, 1, 1, 1, 0.5]
    for resume, die_at in ((False, 3), (True, 4)):
        with pytest.raises(Killed):
            descend(dataclasses.replace(killed, resume=resume), die_at=die_at)
    assert descend(dataclasses.replace(killed, resume=True)) == weight
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_the_state_of_rl_is_lowered_too():
    optimizer = Optimizer(schedule="plateau", decay_patience=1)
    judge = Judge("max:validation/score", None, optimizer)
    assert judge.used
    train = TrainState.create({"w": jnp.zeros(2)}, make_optimizer(optimizer, 4))
    state = LoopState.create(train, 0.1)
    lowered = judge.lowered(state, [{"validation/score": score} for score in (1.0, 2.0, 2.0, 1.5)])
    assert float(judge.metrics(lowered)["plateau_scale"]) == pytest.approx(0.01)
    assert jax.tree.structure(lowered) == jax.tree.structure(state)


# --- The length of a run --------------------------------------------------------------------------------------------


def test_length_in_episodes(capsys):
    odd = RLStage(num_episodes=129, batch_size=64)
    assert [s.length for s in (RLStage(num_iterations=7), RLStage(num_episodes=128, batch_size=64), odd)] == [7, 2, 3]
    rl._sizes("ppo", odd, ppo.Config(), 1)
    said = "rl.num_episodes 129: 3 iterations with 192 episodes, whatever rl.num_iterations is\n"
    assert capsys.readouterr().out == said
