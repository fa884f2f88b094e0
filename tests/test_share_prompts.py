"""``compute.share_prompts``: when a run computes a prompt once for its answers, what it says and
records, and that it learns the same.
"""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from builders import letters_run, metric_rows, run_grpo, with_rl

from rlhf_jax import grpo, iteration, minibatch_epochs, ops, ppo, rloo
from rlhf_jax.algorithms import policy, step
from rlhf_jax.algorithms.lengths import sort_rows
from rlhf_jax.config import Compute, RLStage
from rlhf_jax.errors import UserError
from rlhf_jax.training.common.layout import Layout
from rlhf_jax.training.rl.sharing import Answers, decided, saved
from rlhf_jax.types import Mean, Rollout, TrainState


def answers(own, name="grpo", prompt=8, takes_groups=True, devices=1, share="auto"):
    mesh = SimpleNamespace(size=devices, shape={"data": devices, "fsdp": 1})
    settings = RLStage(batch_size=32, max_new_tokens=8)
    return Answers(name, own, settings, share, prompt, takes_groups, Layout(mesh))


def test_the_saved_share_by_hand():
    # 8 rows of 45 + 8 tokens are 424; shared, 45 + 8 * 8 = 109.
    assert saved(45, 8, 8) == pytest.approx((424 - 109) / 424)
    assert saved(45, 8, 1) == 0


FOUR = grpo.Config(group_size=4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (answers(FOUR), 4),
        (answers(FOUR, share=False), 1),
        (answers(FOUR, prompt=1), 1),  # saves 3 of 36 passes
        (answers(FOUR, prompt=2), 4),  # 6 of 40
        (answers(FOUR, prompt=1, share=True), 4),
        (answers(ppo.Config(), "ppo"), 1),
        (answers(rloo.Config(group_size=4), "rloo"), 4),
        (answers(FOUR, takes_groups=False), 1),
        (answers(FOUR, "of_ones_own"), 1),
        (answers(FOUR, "of_ones_own", share=True), 4),
        (answers(replace(FOUR, num_minibatches=8)), 4),
        (answers(replace(FOUR, num_minibatches=16)), 1),
        (answers(replace(FOUR, num_minibatches=4, num_microbatches=4)), 1),
        (answers(replace(FOUR, num_minibatches=4, shuffle_blocks=4)), 1),
        (answers(FOUR, devices=16), 1),
    ],
)
def test_who_shares(given, expected):
    assert given.group_size() == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (answers(ppo.Config(), "ppo"), "ppo samples one answer"),
        (answers(FOUR, takes_groups=False), "this network"),
        (answers(replace(FOUR, num_minibatches=16)), "8 groups .* 16 grpo.num_minibatches"),
    ],
)
def test_true_is_an_error_where_prompts_cannot_be_shared(given, message):
    with pytest.raises(UserError, match=message):
        given._replace(wanted=True).group_size()


def test_the_choice_is_printed_and_recorded(capsys):
    compute, size = decided(Compute(), answers(FOUR))
    assert size == 4
    assert compute.share_prompts is True
    assert "share_prompts true" in capsys.readouterr().out
    compute, size = decided(Compute(), answers(ppo.Config(), "ppo"))
    assert size == 1
    assert compute.share_prompts is False
    assert not capsys.readouterr().out


def met_rows(group_size, num_minibatches=3, shuffle_blocks=2):
    """The rows of each minibatch of two epochs over 24 rows: [6, n]."""
    seen = []

    def learn(state, minibatch, key):
        return state, {"rows": minibatch.astype(jnp.float32)}

    state = TrainState(jnp.int32(0), {}, ())
    collected = []
    original = step._average
    try:
        step._average = lambda metrics: collected.append(metrics) or metrics
        minibatch_epochs(
            learn,
            state,
            jnp.arange(24),
            jax.random.key(0),
            num_epochs=2,
            num_minibatches=num_minibatches,
            shuffle_blocks=shuffle_blocks,
            group_size=group_size,
        )
    finally:
        step._average = original
    seen = np.asarray(collected[-1]["rows"])
    return seen.reshape(2 * num_minibatches, -1).astype(int)


def test_minibatches_hold_whole_groups():
    rows = met_rows(group_size=4)
    assert sorted(rows[:3].ravel()) == sorted(rows[3:].ravel()) == list(range(24))
    groups = rows.reshape(-1, 4)
    assert (groups[:, :1] % 4 == 0).all()
    assert (groups - groups[:, :1] == np.arange(4)).all()
    assert (rows[:, :4] < 12).all()  # one group of each block
    assert (rows[:, 4:] >= 12).all()
    assert len({tuple(batch) for batch in rows}) == 6  # another order in each epoch


@pytest.mark.parametrize(
    ("rows", "whole"), [(16, True), (12, False)], ids=["groups divide", "groups do not divide"]
)
def test_sharing_a_prompt_does_not_decide_which_rows_meet(rows, whole):
    """In two minibatches of answers to four, or three, prompts: policy gradients of one parameter
    for each row, whose signs say which rows a step has read.
    """
    config = grpo.Config(group_size=4, num_minibatches=2, aggregate="sum", kl_loss_coef=0.0)
    ones = jnp.ones((rows, 3), jnp.int32)
    scores = jnp.tile(jnp.array([1.0, 0.0]), rows // 2)
    batch = Rollout(ones, ones, ones.at[:, 0].set(0), jnp.zeros((rows, 3)), scores=scores)
    batch = batch.replace(row_ids=jnp.arange(rows), prompt_length=1)
    seen = []

    def loss(params, part, key, *, policy_fn, config):
        jax.debug.callback(lambda ids: seen.append(sorted(ids.tolist())), part.row_ids)
        return Mean.of(params["w"]), {}

    def read(group_size):
        seen.clear()
        update = policy.updater(grpo.prepare, loss)
        state = TrainState.create({"w": jnp.zeros(())}, optax.sgd(0.1))
        shared = batch.replace(group_size=group_size)
        how = {"policy_fn": None, "optimizer": optax.sgd(0.1), "config": config}
        jax.block_until_ready(update(state, shared, jax.random.key(0), **how)[0].params)
        jax.effects_barrier()
        return [*seen]

    found = read(group_size=1)
    assert len(found) == 2
    assert sorted(found[0] + found[1]) == list(range(rows))
    groups = [{row // 4 for row in step} for step in found]
    assert groups[0].isdisjoint(groups[1]) is whole
    if whole:
        assert read(group_size=4) == found


def test_groups_that_minibatches_would_divide_are_refused():
    with pytest.raises(ValueError, match="groups of 5"):
        met_rows(group_size=5)


def test_rows_are_split_by_groups():
    parts = ops.split_rows(jnp.arange(12), 2, group_size=3)
    np.testing.assert_array_equal(parts, [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]])


def test_rows_that_are_scored_at_once_are_whole_groups():
    shapes = []

    def score(params, tokens, mask, key):
        shapes.append(tokens.shape)
        return tokens[:, 0] + mask[:, 0]

    tokens = jnp.arange(24).reshape(12, 2)
    by_rows = ops.by_rows(score, 5, group_size=3)
    np.testing.assert_array_equal(by_rows(None, tokens, tokens), 2 * tokens[:, 0])
    assert set(shapes) == {(3, 2)}


def test_long_rows_are_sorted_by_groups():
    lengths = np.array([9, 1, 2, 2, 1, 1, 3, 4])  # of four groups of two rows
    mask = (np.arange(130)[None] < lengths[:, None]).astype(np.int32)
    rollout = Rollout(np.arange(8)[:, None].repeat(130, 1), mask, mask, mask, prompt_length=0)

    @jax.jit
    def ordered(rollout):
        return ops.split_rows(sort_rows(rollout, 2, group_size=2).tokens, 2, group_size=2)

    parts = np.asarray(ordered(rollout))[:, :, 0]
    assert sorted(parts[0].tolist()) == [2, 3, 4, 5]  # those of the shortest rows
    assert sorted(parts[1].tolist()) == [0, 1, 6, 7]


@pytest.fixture
def config(tmp_path):
    run = letters_run(tmp_path)
    run = replace(run, grpo=grpo.Config(group_size=2, kl_loss_coef=0.1), reward=("count:e",))
    return with_rl(run, batch_size=8, num_iterations=2, max_new_tokens=4, validation_interval=2)


def of(run, share, **changes):
    return replace(run, compute=replace(run.compute, share_prompts=share), **changes)


@pytest.mark.slow
def test_a_run_that_shares_learns_the_same(config, tmp_path, monkeypatch):
    """A validation has one answer to each prompt, and shares none."""
    sizes = []

    def respond(*inputs, group_size=1, **how):
        sizes.append(group_size)
        return original(*inputs, group_size=group_size, **how)

    original = iteration.respond
    monkeypatch.setattr(iteration, "respond", respond)
    alone = run_grpo(of(config, False)).folder
    assert {*sizes} == {1}
    shared = run_grpo(of(config, "auto", output_dir=str(tmp_path / "second"))).folder
    assert {*sizes} == {1, 2}
    recorded = yaml.safe_load((shared / "config.yaml").read_text())
    assert recorded["compute"]["share_prompts"] is True
    rows = zip(metric_rows(alone), metric_rows(shared), strict=True)
    for expected, found in rows:
        names = [name for name in expected if "/" in name or name in ("loss", "grad_norm")]
        assert "policy/kl_loss" in names or expected["step"] == 0
        for name in names:
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


@pytest.mark.slow
def test_a_resumed_run_shares_as_it_began(config, tmp_path):
    run = run_grpo(of(config, True)).folder
    longer = with_rl(of(config, "auto"), num_iterations=3)
    run_grpo(replace(longer, resume=True, allow_changed=("rl.num_iterations",)))
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert recorded["compute"]["share_prompts"] is True
