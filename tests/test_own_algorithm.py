"""What a run asks of an algorithm of one's own, and what it has by default."""

import dataclasses
import types
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from rlhf_jax import TrainState, iteration, ppo, rloo, vpg
from rlhf_jax.algorithms.policy import wanted
from rlhf_jax.config import Optimizer, PPOStage, RLStage, RunConfig, for_algorithm, parse
from rlhf_jax.errors import UserError
from rlhf_jax.training.rl import critic, method
from rlhf_jax.training.rl.method import completed
from rlhf_jax.training.rl.programs import Sizes
from rlhf_jax.types import AlgorithmConfig, Rollout


def bare(**parts):
    """A module with a name and these parts."""
    return types.SimpleNamespace(__name__="mine", **parts)


def test_an_algorithm_is_a_config_and_an_update():
    complete = completed(bare(Config=rloo.Config, update=rloo.update))
    assert complete.__name__ == "mine"
    assert complete.State is TrainState
    assert complete.needs_values is False
    assert complete.kl_coef == 0.0
    assert complete.update is rloo.update


def test_what_an_algorithm_has_is_kept():
    complete = completed(vpg)
    assert complete.State is vpg.State
    assert complete.kl_coef == vpg.kl_coef
    assert complete.__name__ == vpg.__name__
    assert completed(ppo).needs_values is True


@pytest.mark.parametrize(
    ("parts", "missing"),
    [
        ({}, "needs Config and update"),
        ({"Config": rloo.Config}, "needs update"),
        ({"update": rloo.update}, "needs Config"),
    ],
)
def test_what_is_missing_is_named(parts, missing):
    with pytest.raises(UserError, match=f"mine: an algorithm {missing}:"):
        completed(bare(**parts))


# --- A Config that extends nothing


@dataclass(frozen=True)
class Plain:
    """One setting of its own, and a value model that warms up."""

    weight: float = 0.5
    group_size: int = 2
    value: str = "separate"
    value_warmup: int = 1
    value_learning_rate: float | None = None


MINE = bare(Config=Plain, update=rloo.update)


def test_a_config_of_ones_own_has_the_defaults_of_what_it_leaves_out():
    _, section = for_algorithm(RunConfig(), MINE, Plain(weight=0.25))
    assert type(section) is Plain
    assert (section.weight, section.group_size, section.value) == (0.25, 2, "separate")
    defaults = AlgorithmConfig()
    own = {field.name for field in dataclasses.fields(Plain)}  # what config.yaml has
    assert own == {"weight", "group_size", "value", "value_warmup", "value_learning_rate"}
    names = {*vars(AlgorithmConfig)["__annotations__"], "kl_in_loss", "teacher_server"}
    assert {name: getattr(section, name) for name in names - own} == {
        name: getattr(defaults, name) for name in names - own
    }
    _, again = for_algorithm(RunConfig(), MINE, Plain(weight=0.25))
    assert again == section  # programs are compiled once
    assert hash(again) == hash(section)


def test_a_config_is_a_frozen_dataclass():
    @dataclass
    class Thawed:
        weight: float = 0.5

    for config in (Thawed(), types.SimpleNamespace(weight=0.5)):
        with pytest.raises(UserError, match="mine: its Config must be a frozen dataclass"):
            for_algorithm(RunConfig(), MINE, config)


def test_a_config_file_of_several_stages_is_read_for_an_algorithm_of_ones_own(capsys):
    """tiny.yaml has sections of PPO and RLOO."""
    flags = ["--config", "tiny", "--mine.weight", "0.75"]
    config, section = for_algorithm(parse(RunConfig, flags, algorithm=MINE), MINE)
    assert section.weight == config.own["mine"].weight == 0.75
    assert config.network.hidden_size == 32
    assert "does not read" not in capsys.readouterr().out
    _, section = for_algorithm(parse(RunConfig, ["--config", "tiny"]), MINE)
    assert section.weight == 0.5
    said = "the algorithm mine does not read: ppo.num_minibatches 2, ppo.num_epochs 2, rloo."
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (
            {"Config": Plain()},
            r"mine\.Config must be the class of its settings, got an object, Plain",
        ),
        ({"State": dict.fromkeys}, r"mine\.State needs create\(params, optimizer\)"),
        ({"kl_coef": "0.1"}, r"mine\.kl_coef must be a number, got '0\.1'"),
        (
            {"update": None},
            r"mine\.update: None is not a callable object; a run calls update\(state,",
        ),
        ({"update": lambda state, rollout: None}, r"mine\.update: .*; a run calls update"),
        (
            {"update": lambda state, rollout, key, policy_fn, optimizer, config: None},
            r"mine\.update: .*minibatch_sharding.*; a run calls",
        ),
        (
            {"update": lambda rollout, state, key, **how: None},
            r"mine\.update takes rollout, state, key; a run calls update\(state, rollout, key,",
        ),
    ],
)
def test_parts_that_a_run_cannot_use_are_a_sentence(parts, says):
    with pytest.raises(UserError, match=says):
        completed(bare(**{"Config": Plain, "update": rloo.update} | parts))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group_size": "2"}, "mine.group_size must be a whole number of at least 1, got '2'"),
        ({"group_size": 0}, "mine.group_size must be a whole number of at least 1, got 0"),
        ({"value_warmup": 1.5}, "mine.value_warmup must be a whole number of at least 0, got 1.5"),
    ],
)
def test_counts_of_a_config_are_whole_numbers(changes, says):
    with pytest.raises(UserError, match=says):
        for_algorithm(RunConfig(), MINE, Plain(**changes))
    with pytest.raises(ValueError, match=r"group_size must be .* '2'"):
        rloo.Config(group_size="2")


# --- Its value function

PARAMS = {"policy": {"body": jnp.ones(2)}, "value": {"body": jnp.ones(2)}}


def test_the_value_function_of_ones_own_warms_up_at_a_rate_of_its_own():
    """Adam's steps of the policy and of the value model, with one step of warm-up."""
    _, config = for_algorithm(RunConfig(), MINE, Plain(value_learning_rate=0.2))
    adam = Optimizer(learning_rate=0.1, schedule="constant", max_grad_norm=None)
    settings = RLStage(num_iterations=3, optimizer=adam)
    optimizer = critic.make_optimizer(settings, config, 1, PARAMS, None)
    state = optimizer.init(PARAMS)
    for policy in (0.0, -0.1):
        updates, state = optimizer.update(PARAMS, state, PARAMS)
        np.testing.assert_allclose(updates["policy"]["body"], policy, atol=1e-5)
        np.testing.assert_allclose(updates["value"]["body"], -0.2, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "needs_values", "says"),
    [
        ({}, False, "mine.value: the algorithm reads no values"),
        ({"value": "seperate"}, True, "mine.value must be shared or separate, got 'seperate'"),
        ({"value_learning_rate": "1"}, True, "mine.value_learning_rate must be a number .* '1'"),
        ({"value": "shared", "value_from": "rm"}, True, "mine.value_from rm: a shared value"),
    ],
)
def test_what_a_value_function_cannot_be(changes, needs_values, says):
    _, config = for_algorithm(RunConfig(), MINE)
    config = types.SimpleNamespace(**{**vars(AlgorithmConfig), **vars(config), **changes})
    with pytest.raises(UserError, match=says):
        method.check_value_settings("mine", config, needs_values)


def test_a_value_head_in_the_policys_network_learns_with_it():
    for config in (PPOStage(value_warmup=1), PPOStage(value_learning_rate=0.1)):
        with pytest.raises(UserError, match="give value: separate"):
            method.check_own_head(config)
        method.check_own_head(dataclasses.replace(config, value="separate"))
    method.check_own_head(PPOStage())


def test_an_algorithm_without_values_has_no_settings_of_them():
    method.check_value_settings("rloo", rloo.Config(), needs_values=False)
    method.check_value_settings("ppo", ppo.Config(), needs_values=True)


# --- Its state


@flax.struct.dataclass
class Tables(TrainState):
    """A mean for each prompt, and the last rollout."""

    means: Array
    last: Array

    @classmethod
    def create(cls, params, optimizer, rows, columns, prompts):
        start = TrainState.create(params, optimizer)
        return cls(**vars(start), means=jnp.zeros(prompts), last=jnp.zeros((rows, columns)))


def test_a_state_is_told_the_sizes_that_it_asks_for():
    sizes = Sizes(rows=4, columns=6, prompts=9)._asdict()
    assert wanted(TrainState.create, sizes) == {}
    assert wanted(vpg.State.create, sizes) == {}
    told = wanted(Tables.create, sizes)
    state = Tables.create({"x": jnp.zeros(1)}, optax.sgd(0.1), **told)
    assert (state.means.shape, state.last.shape) == ((9,), (4, 6))


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda state: (state, {}), "returns no metric nonfinite"),
        (lambda state: state, "returns TrainState in place of the state and a dict of metrics"),
        (lambda state: ({}, state), "returns dict, TrainState in place of the state"),
        (
            lambda state: (state, {"nonfinite": 0.0, "x": jnp.ones(2)}),
            r"metric x has the shape \(2,\); a metric is one number",
        ),
    ],
)
def test_what_an_update_cannot_return(made, says):
    rollout = Rollout(*jnp.ones((4, 2, 3)), scores=jnp.ones(2))
    loop = iteration.LoopState(TrainState.create({}, optax.sgd(0.1)), 0.0)
    mine = bare(update=lambda state, rollout, key, **how: made(state))
    functions = iteration.Functions(jax.tree_util.Partial(lambda *inputs: None))
    how = {"algorithm": mine, "config": rloo.Config(group_size=2), "optimizer": optax.sgd(0.1)}
    with pytest.raises(UserError, match=says):
        iteration.learn(loop, rollout, jax.random.key(0), functions, **how)
