"""References that move after the policy: the weights by hand, and runs of DPO and RL with them."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import goes_on_alike, letters_run, metric_rows, save_base, with_rl
from flax.traverse_util import flatten_dict
from numpy.testing import assert_allclose

from rlhf_jax import training
from rlhf_jax.algorithms import grpo
from rlhf_jax.config import DPOStage, LoRA, RLStage, RunConfig, Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.training import dpo
from rlhf_jax.training.common import layout, memory, references
from rlhf_jax.training.supervised import run as supervised

RNG = np.random.default_rng(0)
POLICIES = RNG.normal(size=(8, 3)).astype(np.float32)
"""The weights of a policy before each step, and after the last one."""


def followed(settings, num_steps=7):
    """[num_steps, 3] the weights of the reference in each step of such a policy."""
    seen = []

    move = references.mover(settings)
    reference = {"w": jnp.asarray(POLICIES[0])}
    for step in range(1, num_steps + 1):
        if references.moves(settings) and references.is_due(settings, step):
            reference = move(reference, {"w": jnp.asarray(POLICIES[step - 1])})
        seen.append(np.array(reference["w"]))
    return np.stack(seen)


def by_hand(share, every, num_steps=7):
    """The same, as TRL's ``SyncRefModelCallback`` computes it after each of its steps."""
    reference = POLICIES[0].astype(np.float64)
    seen = []
    for step in range(num_steps):
        if step and step % every == 0:
            reference = reference * (1.0 - share) + share * POLICIES[step]
        seen.append(reference)
    return np.stack(seen)


@pytest.mark.parametrize("stage", [RLStage, DPOStage])
@pytest.mark.parametrize(
    ("settings", "share", "every"),
    [
        ({"reference_ema": 0.6}, 0.6, 1),
        ({"reference_ema": 0.0}, 0.0, 1),
        ({"reference_refresh": 3}, 1.0, 3),
        ({"reference_ema": 0.25, "reference_refresh": 2}, 0.25, 2),
        ({}, 0.0, 1),
    ],
)
def test_the_weights_of_a_reference_by_hand(stage, settings, share, every):
    assert_allclose(followed(stage(**settings)), by_hand(share, every), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ValueError, match="reference_ema must be at"):
        DPOStage(reference_ema=share)
    with pytest.raises(ValueError, match="reference_ema must be at"):
        RLStage(reference_ema=share)


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_a_loss_without_a_reference_has_none_that_moves(kind):
    for name, value in {"reference_ema": 0.5, "reference_refresh": 2}.items():
        with pytest.raises(ValueError, match=f"{kind} has no reference"):
            DPOStage(kind=kind, **{name: value})


def test_it_stays_on_the_devices_and_needs_a_kl(config):
    moving = replace(config, dpo=replace(config.dpo, reference_ema=0.5))
    offloading = replace(moving, compute=replace(config.compute, offload=("reference",)))
    with pytest.raises(UserError, match=r"compute\.offload: a reference that moves"):
        dpo.run(offloading)
    rl = with_rl(config, reference_ema=0.5, kl_coef=0.0, kl_target=None)
    with pytest.raises(UserError, match=r"rl\.reference_ema: no KL is used here"):
        training.rl.run(rl, grpo, grpo.Config(group_size=4, kl_loss_coef=0.0))


# --- Runs

LETTERS = """
def letters(prompts, responses):
    return [len(set(response)) for response in responses]
"""


@pytest.fixture
def short(config, tmp_path):
    """Some steps of DPO, six iterations of GRPO with a KL in the loss."""
    stage = replace(config.dpo, batch_size=20, beta=1.0, num_epochs=2)
    rl = replace(config.rl, num_iterations=6, kl_target=None)
    (tmp_path / "reward.py").write_text(LETTERS)
    reward = (f"{tmp_path}/reward.py:letters",)
    return replace(config, dpo=stage, rl=rl, reward=reward)


def with_stage(config, name, **changes):
    return replace(config, **{name: replace(getattr(config, name), **changes)})


def dpo_run(config, **settings):
    """The result of a run, and (policy, reference or None) after each of its steps."""
    states = []

    def keep(step, state, row):
        reference = getattr(state, "reference", None)
        states.append(jax.tree.map(np.array, (state.params, reference)))

    config = with_stage(config, "dpo", **settings)
    folder = f"{config.output_dir}-dpo-{'-'.join(map(str, settings.values()))}"
    return supervised.run(replace(config, output_dir=folder), dpo.TASK, keep), states


def of_steps(result, name):
    return [row[name] for row in metric_rows(result.folder) if name in row]


@pytest.mark.slow
def test_a_share_of_0_is_a_fixed_reference_bit_for_bit(short):
    fixed, _ = dpo_run(short)
    still, states = dpo_run(short, reference_ema=0.0)
    weights, others = (
        (run.folder / "model/model.safetensors").read_bytes() for run in (fixed, still)
    )
    assert weights == others
    rows = metric_rows(fixed.folder)
    assert [row.pop("validation/moved", None) is None for row in rows].count(False) > 1
    for row in rows:
        row.pop("validation/planned_steps", None)
    assert rows == metric_rows(still.folder)  # whose start is not known to be the reference
    assert all(reference is not None for _, reference in states)


def test_a_stage_moves_its_reference_before_a_step(monkeypatch, tmp_path):
    """Each update adds 1 to the weights; after every two of them they become the reference."""
    apart = []
    more = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1.0, params))

    def jit_update(self, update, num_blocks):
        def add(state, *inputs, **functions):
            ours, theirs = (
                np.asarray(of["ln_f"]["bias"]) for of in (state.params, state.reference)
            )
            apart.append(np.mean(ours - theirs))
            return replace(state, params=more(state.params)), {"nonfinite": 0.0}

        return add

    monkeypatch.setattr(layout.Layout, "jit_update", jit_update)
    monkeypatch.setattr(memory, "check", lambda *args: None)
    config = with_stage(letters_run(tmp_path), "dpo", reference_refresh=2)
    rows = dpo.run(config).rows
    assert apart == [0.0, 1.0] * 3
    assert any("validation/accuracy" in row for row in rows)
    assert not any("validation/moved" in row for row in rows)  # the start is no longer there


def moved(tree, other):
    return max(
        np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (tree, other)), strict=True)
    )


@pytest.mark.slow
def test_the_reference_of_a_run_follows_its_policy_and_a_stopped_run_goes_on_with_it(short):
    result, states = dpo_run(short, reference_ema=0.3, reference_refresh=2)
    every_second = 0
    for step in range(1, len(states)):
        policy, reference = states[step - 1]
        share = 0.3 if step % 2 == 0 else 0.0
        expected = jax.tree.map(lambda p, r, s=share: s * p + (1.0 - s) * r, policy, reference)
        jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-7), states[step][1], expected)
        every_second += moved(states[step][1], reference) > 1e-4
    assert every_second == (len(states) - 1) // 2 > 1
    config = with_stage(short, "dpo", reference_ema=0.3, reference_refresh=2)
    goes_on_alike(dpo.run, config, result)


def rl_run(config, **settings):
    """The result of a run of GRPO, and (policy, reference or None) after each iteration."""
    states = []

    def keep(step, state, row, rollout):
        states.append(jax.tree.map(np.array, (state.train.params, state.reference)))

    config = with_rl(config, **settings)
    algorithm = grpo.Config(group_size=4, kl_loss_coef=0.5)
    return training.rl.run(config, grpo, algorithm, on_step=keep), states


@pytest.mark.slow
def test_the_reference_of_rl_follows_its_policy_and_a_stopped_run_goes_on_with_it(short):
    config = with_rl(short, reference_ema=0.6)
    result, states = rl_run(config)
    for (policy, reference), (_, after) in itertools.pairwise(states):
        expected = jax.tree.map(lambda p, r: 0.6 * p + 0.4 * r, policy, reference)
        jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-7), after, expected)
    policy, reference = states[-1]
    assert moved(states[0][1], reference) > 1e-3 < moved(policy, reference)
    goes_on_alike(lambda config: rl_run(config)[0], config, result)


@pytest.mark.slow
def test_under_lora_the_adapters_of_the_reference_move(short, data, tmp_path):
    model = save_base(tmp_path / "base", data)
    config = replace(short, model=model, tokenizer=Tokenizer(), lora=LoRA(rank=2, alpha=4.0))
    result, states = dpo_run(config, reference_ema=1.0)
    assert_allclose(of_steps(result, "dpo/loss"), np.log(2.0), rtol=1e-5)
    names = {path[-1] for path in flatten_dict(states[-1][1])}
    assert names == {"lora_a", "lora_b", "lora_scale"}
    assert moved(states[-1][1], states[0][1]) > 1e-4


def test_a_config_has_it_in_each_section():
    config = RunConfig()
    for section in (config.rl, config.dpo):
        assert not references.moves(section)
        assert references.moves(replace(section, reference_ema=0.5))
        assert references.moves(replace(section, reference_refresh=5))
    assert not references.moves(config.sft)
    assert not references.moves(config.kto)
