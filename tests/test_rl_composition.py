"""The composition of an RL run: what its check of memory calls, and what decides its remat."""

from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import letters_run, with_rl
from recorded import rl_inputs

from rlhf_jax import iteration, ppo, rloo, training, vpg
from rlhf_jax.config import Optimizer, PPOStage, RLStage
from rlhf_jax.generation.environment import Environment
from rlhf_jax.graders import spec
from rlhf_jax.iteration import NO_PENALTY, LoopState
from rlhf_jax.training.common import memory, remat
from rlhf_jax.training.rl import job
from rlhf_jax.training.rl.method import Method
from rlhf_jax.training.rl.programs import Programs, make_optimizer
from rlhf_jax.training.rl.run import adopt_coefficient
from rlhf_jax.types import AlgorithmConfig, Rollout

WORLD = """
def silent(conversation, row):
    with open(__file__ + ".log", "a") as log:
        log.write("x")
"""


def refused(*args):
    raise AssertionError("a check of memory calls no server and none of the user's Python")


def test_a_check_of_memory_has_silent_parts():
    ones = jnp.ones((2, 3), jnp.int32)
    rollout = Rollout(ones, ones, ones, jnp.zeros((2, 3)))
    inputs = rl_inputs(
        reward=spec.Reward(host=refused),
        guard=refused,
        environment=Environment(refused, None, None, 1),
        ask_teacher=refused,
    ).without_python({"cost": "row", "step_end": "token"})
    scores, extras = inputs.reward.host(rollout, {})
    assert scores.tolist() == [0.0, 0.0]
    assert {name: x.shape for name, x in extras.items()} == {"cost": (2,), "step_end": (2, 3)}
    assert inputs.environment.fn([], {}) == (None, 0.0, {"step_end": 0.0})
    assert inputs.guard is None
    np.testing.assert_array_equal(inputs.ask_teacher(rollout), np.zeros((2, 3)))


@pytest.mark.parametrize("client", [None, "an engine"])
def test_a_rehearsal_checks_the_programs_that_run_here_and_calls_no_engine(client, monkeypatch):
    checked = []
    check = memory.check

    def note(phase, *inputs):
        checked.append(phase)
        return check(phase, *inputs)

    monkeypatch.setattr(memory, "check", note)
    opened = SimpleNamespace(layout=SimpleNamespace(sampling_mesh=None))
    parts = dict.fromkeys(field.name for field in fields(job.Job))
    parts |= {
        "run": opened,
        "method": SimpleNamespace(algorithm_config=AlgorithmConfig()),
        "inputs": rl_inputs(reward=spec.Reward(host=refused)),
        "programs": Programs(*[jax.jit(lambda x: x + 1)] * len(Programs._fields)),
        "client": client,
        "ahead": "one step ahead",
    }
    rehearsal = job.Job(**parts).rehearsal()
    assert (rehearsal.client, rehearsal.ahead) == (None, None)
    assert rehearsal.inputs.reward.host is not refused
    assert rehearsal.programs.choose is None  # the widest batch has the rows of the schedule
    for program in rehearsal.programs[:-1]:
        np.testing.assert_array_equal(program(jnp.ones(2)), np.zeros(2))
    elsewhere = {"choose"} | ({"respond", "respond_greedily"} if client else set())
    assert checked == [phase for phase in Programs._fields if phase not in elsewhere]


@pytest.mark.slow
def test_the_check_of_memory_asks_neither_reward_nor_environment(tmp_path):
    """In one step without a validation each is called once for the batch of four rows."""
    asked = []

    def reward(rollout, columns):
        asked.append(len(rollout.tokens))
        return np.zeros(len(rollout.tokens), np.float32), {}

    world = tmp_path / "world.py"
    world.write_text(WORLD)
    config = replace(letters_run(tmp_path), reward=())
    config = with_rl(
        config, num_iterations=1, validation_fraction=0.0, environment=f"{world}:silent"
    )
    training.rl.run(config, vpg, reward=reward)
    assert asked == [4]
    assert (tmp_path / "world.py.log").read_text() == "xxxx"


def test_the_batches_of_a_step_are_as_many_as_the_settings_say(tmp_path):
    """The prompts of the first, and two reserves."""
    config = with_rl(replace(letters_run(tmp_path), reward=("length",)), dynamic_sampling=2)
    with job.open_job(config, rloo, rloo.Config(group_size=2)) as opened:
        drawn = [batch.rows.tolist() for batch in opened.schedule.batches(0)]
    assert [len(rows) for rows in drawn] == [4] * 3
    assert len({row for rows in drawn for row in rows}) == 6


def test_remat_is_chosen_by_the_rows_of_a_microbatch(monkeypatch):
    chosen = []

    def choose(run, begun, rows, length, networks):
        chosen.append((rows, length, networks))
        return None, begun

    monkeypatch.setattr(remat, "choose", choose)
    rl_settings = RLStage(batch_size=64, max_new_tokens=5)
    settings = ppo.Config(num_minibatches=4, num_microbatches=2)
    inputs = rl_inputs(prompts=SimpleNamespace(tokens=np.zeros((9, 7))))
    job._choose_remat(None, Method(ppo, settings, rl_settings, NO_PENALTY, None), inputs)
    assert chosen == [(8, 12, 1)]
    settings = PPOStage(num_minibatches=4, num_microbatches=2, value="separate")
    job._choose_remat(None, Method(ppo, settings, rl_settings, NO_PENALTY, None), inputs)
    assert chosen[1] == (8, 12, 2)


def test_a_schedule_is_as_long_as_all_optimizer_steps_of_a_run():
    """Five iterations of three passes with two minibatches: 30 steps."""
    linear = Optimizer(learning_rate=1.0, schedule="linear")
    own = ppo.Config(num_epochs=3, num_minibatches=2)
    method = Method(ppo, own, RLStage(num_iterations=5, optimizer=linear), NO_PENALTY, None)
    params = {"kernel": jnp.zeros(1)}
    optimizer = make_optimizer(method, params)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    rates = []
    for _ in range(31):
        _, state = update(params, state, params)
        rates.append(state.hyperparams["learning_rate"])
    np.testing.assert_allclose(rates, np.linspace(1.0, 0.0, 31), atol=1e-6)


@pytest.mark.slow
def test_the_kl_coefficient_of_the_settings_counts_when_it_may_change(tmp_path):
    """It begins anew at the changed value, and adapts again."""
    config = with_rl(letters_run(tmp_path), num_iterations=1, kl_coef=0.05, kl_target=1.0)
    config = replace(config, reward=("count:a",))
    training.rl.run(config, vpg)
    config = with_rl(config, num_iterations=3, kl_coef=0.5)
    rows = training.rl.run(replace(config, resume=True, allow_changed=("rl",)), vpg).rows
    before, changed, adapted = (row["kl/coef"] for row in rows[1:])
    assert before == pytest.approx(0.05)
    assert changed == 0.5
    assert 0.4 < adapted < 0.5


def test_a_coefficient_goes_on_only_if_it_adapts_and_began_at_the_same_value():
    adapting, fixed = (
        partial(
            adopt_coefficient,
            SimpleNamespace(
                method=Method(
                    vpg, vpg.Config(), RLStage(kl_coef=0.25, kl_target=target), penalty, None
                )
            ),
        )
        for target in (1.0, None)
        for penalty in [iteration.kl_penalty(0.25, target=target, horizon=10)]
    )
    state = LoopState(None, jnp.float32(0.125))
    assert adapting(state, {"rl": {"kl_coef": 0.25}}) is state
    assert adapting(state, {}) is state  # of an older version
    assert adapting(state, {"rl": {"kl_coef": 0.5}}).kl_coef == 0.25
    assert adapting(state, {"rl": {"kl_coef": None}}).kl_coef == 0.25
    assert fixed(state, {"rl": {"kl_coef": 0.25}}).kl_coef == 0.25
