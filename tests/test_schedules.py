"""Learning-rate schedules and early stopping against numbers worked by hand, and in killed runs."""

from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax.algorithms import distill, dpo, grpo, kto, ppo, reward_model, rloo, sft, vpg
from rlhf_jax.config import Optimizer, PPOStage, RLStage, RunConfig, parse
from rlhf_jax.errors import UserError
from rlhf_jax.iteration import NO_PENALTY, LoopState
from rlhf_jax.training.common.layout import layout_of
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.training.common.optimizer import (
    Patience,
    check_frozen,
    learning_rates,
    make_optimizer,
    times_exhausted,
)
from rlhf_jax.training.rl import method
from rlhf_jax.types import TrainState


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"schedule": "constant"}, [0.8] * 6),
        ({"schedule": "linear"}, [0.8, 0.6, 0.4, 0.2, 0.0, 0.0]),
        ({"schedule": "cosine"}, [0.8, 0.4 * (1 + 0.5**0.5), 0.4, 0.4 * (1 - 0.5**0.5), 0.0, 0.0]),
        ({"schedule": "linear", "warmup_steps": 2}, [0, 0.4, 0.8, 0.4, 0.0]),
        ({"schedule": "plateau", "warmup_steps": 1}, [0, 0.8, 0.8]),
        ({"schedule": "linear", "warmup_steps": 0.3}, [0, 0.4, 0.8, 0.4, 0.0]),
        ({"schedule": "linear", "min_lr_ratio": 0.25}, [0.8, 0.65, 0.5, 0.35, 0.2, 0.2]),
        (  # from 0.8 to 0.2 along half a cosine: 0.2 + 0.3 (1 + cos)
            {"schedule": "cosine", "min_lr_ratio": 0.25},
            [0.8, 0.2 + 0.3 * (1 + 0.5**0.5), 0.5, 0.2 + 0.3 * (1 - 0.5**0.5), 0.2, 0.2],
        ),
    ],
)
def test_the_rate_of_each_step(settings, rates):
    """Four steps long. Adam's step on a constant gradient is the learning rate itself."""
    optimizer = make_optimizer(
        Optimizer(learning_rate=0.8, max_grad_norm=None, eps=0.0, **settings), 4
    )
    params = {"w": jnp.float32(0.0)}
    state = optimizer.init(params)
    taken = []
    for _ in rates:
        updates, state = jax.jit(optimizer.update)({"w": jnp.float32(3.0)}, state, params)
        taken.append(-float(updates["w"]))
    assert_allclose(taken, rates, atol=2e-5)


def test_a_floor_needs_a_schedule_that_ends():
    with pytest.raises(ValueError, match=r"min_lr_ratio: .* constant"):
        Optimizer(min_lr_ratio=0.1)


def test_matrices_are_decayed_and_nothing_else():
    """On a gradient of 0 AdamW takes away learning_rate * weight_decay of what it decays."""
    optimizer = make_optimizer(
        Optimizer(learning_rate=0.5, weight_decay=0.2, max_grad_norm=None), 1
    )
    layer = {
        "kernel": jnp.ones((2, 2)),
        "bias": jnp.ones((2, 2)),
        "lora_a": jnp.ones((2, 2)),
        "scale": jnp.ones(2),
    }
    params = {
        "h_0": layer,
        "wte": {"embedding": jnp.ones((2, 2))},
        "value": {"kernel": jnp.ones(2)},
    }
    params |= {"score": {"kernel": jnp.ones(2), "gain": jnp.ones(()), "shift": jnp.ones(())}}
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    decayed = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
        if leaf.any()
    }
    assert decayed == {"['h_0']['kernel']", "['h_0']['lora_a']", "['wte']['embedding']"}
    assert_allclose(updates["h_0"]["kernel"], -0.1, rtol=1e-6)


LAYERS = {  # two stacked layers and a last one
    "wte": {"embedding": jnp.float32([[1.0, -0.0]])},
    "h": {"attn": {"kernel": jnp.ones((2, 3, 3))}},
    "h_2": {"attn": {"kernel": jnp.ones((3, 3))}},
    "value": {"kernel": jnp.ones(2)},
}
CLIPPED = Optimizer(learning_rate=0.1, max_grad_norm=1.0, weight_decay=0.2, eps=0.0)


def three_steps(settings, params, gradient=2.0):
    optimizer = make_optimizer(settings, 3)
    state = optimizer.init(params)
    for _ in range(3):
        grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), params)
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_frozen_parameters_keep_their_bits_and_have_no_moments():
    settings = replace(CLIPPED, frozen="wte|h_0/")
    params, state = three_steps(settings, LAYERS)
    before = np.asarray(LAYERS["wte"]["embedding"])
    assert np.asarray(params["wte"]["embedding"]).tobytes() == before.tobytes()  # and -0.0
    first, second = np.asarray(params["h"]["attn"]["kernel"])
    assert (first == 1.0).all()
    assert (second < 0.8).all()
    sizes = [leaf.size for leaf in jax.tree.leaves(state)]
    trained = [
        leaf.size for name in ("h", "h_2", "value") for leaf in jax.tree.leaves(LAYERS[name])
    ]
    assert sum(sizes) - sum(size == 1 for size in sizes) == 2 * sum(trained)


def test_what_is_not_frozen_learns_as_if_it_were_alone():
    """A frozen parameter counts neither in the clipping nor in anything else. With a large epsilon
    Adam's steps show how gradients were clipped."""
    clipped = replace(CLIPPED, eps=1.0)
    settings = replace(clipped, frozen="wte|^h_[01]/|value")
    params, _ = three_steps(settings, LAYERS)
    alone, _ = three_steps(clipped, {"h_2": LAYERS["h_2"]})
    assert_array_equal(params["h_2"]["attn"]["kernel"], alone["h_2"]["attn"]["kernel"])
    assert_array_equal(params["h"]["attn"]["kernel"], LAYERS["h"]["attn"]["kernel"])
    # A frozen layer of a stack does not count either.
    params, _ = three_steps(replace(clipped, frozen="wte|h_0/|value"), LAYERS)
    single = {"attn": {"kernel": jnp.ones((3, 3))}}
    alone, _ = three_steps(clipped, {"h_1": single, "h_2": single})
    assert_allclose(params["h"]["attn"]["kernel"][1], alone["h_1"]["attn"]["kernel"], rtol=1e-6)


def test_names_that_freeze_nothing_or_everything_are_refused(caplog):
    with caplog.at_level("INFO"):
        check_frozen("sft", Optimizer(frozen="h_1/"), LAYERS)
    assert "sft.optimizer.frozen h_1/: 9 of 31 parameters keep their values" in caplog.text
    for pattern, found in (("h_3", "no name"), (".", "all names")):
        with pytest.raises(UserError, match=f"rl.optimizer.frozen {pattern}: .* in {found}.* h_2"):
            check_frozen("rl", Optimizer(frozen=pattern), LAYERS)
    with pytest.raises(ValueError, match="frozen is no regular expression"):
        Optimizer(frozen="h_[")


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


def test_a_lowered_state_takes_smaller_steps():
    settings = Optimizer(learning_rate=1.0, eps=0.0, max_grad_norm=None, schedule="plateau")
    patience = Patience("max:validation/score", None, settings)
    optimizer = make_optimizer(settings, 4)
    assert patience.used
    state = LoopState(TrainState.create({"w": jnp.zeros(())}, optimizer), 0.1)
    # twice five without improvement, and four
    rows = [{"validation/score": score} for score in (1.0, 2.0, *[2.0, 1.5] * 7)]
    lowered = patience.lowered(state, rows)
    assert jax.tree.structure(lowered) == jax.tree.structure(state)
    assert float(learning_rates(lowered)["plateau_scale"]) == pytest.approx(0.01)
    updates, after = optimizer.update(
        {"w": jnp.float32(3.0)}, lowered.train.opt_state, lowered.train.params
    )
    assert float(updates["w"]) == pytest.approx(-0.01, rel=1e-4)
    assert float(learning_rates(after)["lr"]) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"schedule": "linear"}, (0.5, 0.375, 0.25, 0.125)),
        ({"schedule": "constant", "warmup_steps": 2}, (0.0, 0.25, 0.5, 0.5)),
        ({"schedule": "constant", "frozen": "b"}, (0.5,) * 4),
    ],
)
def test_the_recorded_rate_is_that_of_the_step(how, expected):
    optimizer = make_optimizer(Optimizer(learning_rate=0.5, eps=0.0, **how), 4)
    params = {"w": jnp.zeros(()), "b": jnp.zeros(())}
    state = TrainState.create(params, optimizer)
    for rate in expected:
        updates, opt_state = optimizer.update(
            {"w": jnp.float32(0.25), "b": jnp.float32(0.0)}, state.opt_state, params
        )
        state = state.replace(opt_state=opt_state)
        found = learning_rates(LoopState(state, 0.1))
        assert found.keys() == {"lr"}
        assert float(found["lr"]) == pytest.approx(rate)
        assert float(updates["w"]) == pytest.approx(-rate, rel=1e-3)
    assert learning_rates(optax.adam(0.1).init(params)) == {}


# --- The length of a run
# --------------------------------------------------------------------------------------------


def test_a_length_in_episodes_is_told_the_two_that_there_are():
    with pytest.raises(UserError, match=r"--rl\.num-epochs: passes .* are rl\.num_iterations"):
        parse(RunConfig, ["--rl.num-episodes", "9"])


def open_run(name, settings):
    config = RunConfig(rl=settings)
    return OpenRun(name, None, config, layout_of(config))


def test_length_in_passes_over_the_prompts(capsys):
    """500 prompts with 8 answers are 4000 rows, 31.25 batches of 128."""
    settings = RLStage(num_epochs=3, batch_size=128)
    how = method.Method(grpo, grpo.Config(group_size=8), settings, NO_PENALTY, None)
    run, counted = method.count_iterations(open_run("grpo", settings), how, 500)
    assert counted.settings.num_iterations == 94  # 93.75
    assert run.config.rl.num_iterations == 94
    assert capsys.readouterr().out == (
        "94 iterations of 16 prompts x 8 answers: 3.01 passes over 500 prompts\n"
    )
    fixed = how._replace(settings=RLStage(batch_size=128))
    assert method.count_iterations(run, fixed, 500)[1].settings.num_iterations == 100
    assert capsys.readouterr().out == (
        "100 iterations of 16 prompts x 8 answers: 3.2 passes over 500 prompts\n"
    )
    # 94 iterations are enough for 93 of warm-up, and 90 are not; the default 100 does not count.
    for warmup, prompts in ((93, 500), (100, 600)):
        warmed = RLStage(num_epochs=24, batch_size=128)
        slow = method.Method(ppo, PPOStage(value_warmup=warmup), warmed, NO_PENALTY, None)
        method.check_settings("ppo", warmed, slow.algorithm_config, layout_of(RunConfig()))
        run = open_run("ppo", warmed)
        assert method.count_iterations(run, slow, prompts)
    with pytest.raises(UserError, match=r"ppo.value_warmup 100: of 94 iterations"):
        method.count_iterations(run, slow, 500)


PLAIN = {"learning_rate": 0.1, "eps": 1e-3}
# {setting: (before, after)}, what is allowed to change when a run is resumed
CHANGES = {
    "learning_rate": ({}, {"learning_rate": 0.2}),
    "schedule": ({}, {"schedule": "cosine"}),
    "min_lr_ratio": ({"schedule": "linear"}, {"schedule": "linear", "min_lr_ratio": 0.5}),
    "warmup_steps": ({}, {"warmup_steps": 9.0}),
    "weight_decay": ({}, {"weight_decay": 0.5}),
    "max_grad_norm": ({}, {"max_grad_norm": 1e-3}),
    "b1": ({}, {"b1": 0.1}),
    "b2": ({}, {"b2": 0.1}),
    "eps": ({}, {"eps": 1.0}),
}
OTHERWISE = {"frozen"}  # never allowed


def test_every_setting_of_the_optimizer_acts_on_the_state_of_another():
    """Nothing in the state of a resumed run holds the value before."""
    assert CHANGES.keys() | OTHERWISE == {field.name for field in fields(Optimizer)}
    params = {"c_attn": {"kernel": jnp.array([[1.0, -2.0]])}}
    grads = {"c_attn": {"kernel": jnp.array([[0.5, 0.1]])}}
    for name, (before, after) in CHANGES.items():
        old, new = (make_optimizer(Optimizer(**PLAIN | each), 10) for each in (before, after))
        state = old.init(params)
        for _ in range(2):
            _, state = old.update(grads, state, params)
        carried = jax.tree.unflatten(jax.tree.structure(new.init(params)), jax.tree.leaves(state))
        same, _ = old.update(grads, state, params)
        updates, _ = new.update(grads, carried, params)
        moved = np.abs(updates["c_attn"]["kernel"] - same["c_attn"]["kernel"]).max()
        assert moved > 1e-4, name


@pytest.mark.parametrize("algorithm", [vpg, ppo, rloo, grpo, distill, sft, dpo, kto, reward_model])
def test_a_state_holds_no_setting_that_would_win_over_a_changed_one(algorithm):
    """Beside parameters and their moments: counters; the rate and the scale of a plateau, which are
    computed anew; a mean of scores; the coefficient of the KL, see ``Job.adopt``.
    """
    optimizer = make_optimizer(Optimizer(1e-3, schedule="plateau"), 10)
    kind = getattr(algorithm, "State", TrainState)
    train = kind.create({"c_fc": {"kernel": jnp.ones((2, 2))}}, optimizer=optimizer)
    state = jax.tree.leaves_with_path(LoopState(train, 0.05))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in state]
    scalars = {path.rpartition("/")[2] for path in paths if not path.endswith("c_fc/kernel")}
    known = {"step", "count", "learning_rate", "plateau_scale", "kl_coef"}
    assert scalars - known == ({"baseline"} if algorithm is vpg else set())
