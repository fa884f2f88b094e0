"""DAPO in runs (Yu et al. 2025, arXiv 2503.14476): dynamic sampling, truncated responses, the
overlong penalty.
"""

import functools
import types
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import goes_on_alike, letters_run, run_grpo, with_rl
from numpy.testing import assert_allclose, assert_array_equal
from recorded import rl_job

from rlhf_jax import grpo, iteration, ppo, training
from rlhf_jax.config import RLStage, RunConfig
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.errors import UserError
from rlhf_jax.training.common.layout import layout_of
from rlhf_jax.training.rl import method
from rlhf_jax.training.rl.dynamic import replace_uninformative
from rlhf_jax.training.rl.schedule import Schedule
from rlhf_jax.types import Rollout, TrainState

EOS = 1
LENGTH = 4
NAN = float("nan")


def answers(scores, first=0, unfinished=()):
    """Responses of 2 tokens to prompts of 1, ended by EOS but for those ``unfinished``; rows count
    from ``first``.
    """
    scores = np.asarray(scores, np.float32)
    rows = np.arange(len(scores), dtype=np.int32)
    tokens = np.stack(
        [rows + first, rows + 2, np.where(np.isin(rows, unfinished), 2, 1)], axis=1
    ).astype(np.int32)
    said = np.ones_like(tokens) * (np.arange(3) > 0)
    numbers = (
        tokens,
        np.ones_like(tokens),
        said,
        np.zeros(tokens.shape, np.float32),
        rows + first,
        scores,
    )
    return Rollout(*numbers)


def informative(rollout, unfinished=()):
    """[groups] of pairs, as GRPO says."""
    masked = iteration.mask_truncated(EOS) if unfinished else iteration.unchanged
    how = {"algorithm": grpo, "config": grpo.Config(group_size=2), "masked": masked}
    loop = iteration.LoopState(TrainState(jnp.zeros(()), {}, ()), 0.0)
    ask = jax.jit(lambda rows: iteration.informative(loop, rows, None, NO_FUNCTIONS, **how))
    return np.array(ask(rollout))


NO_FUNCTIONS = iteration.Functions(None)
REFILL = jax.jit(iteration.refill)


@pytest.mark.parametrize(
    ("kept", "fresh", "expected", "unfinished"),
    [
        ([1, 1, 2, 3, 0, 0, 4, 4], [5, 5, 6, 7, 8, 8, 9, 1], [102, 103, 2, 3, 106, 107, 6, 7], ()),
        ([1, 2, 2, 3, 0, 1, 4, 5], [5, 6, 6, 7, 8, 9, 9, 1], [0, 1, 2, 3, 4, 5, 6, 7], ()),
        ([1, 2, 2, 2], [5, 5, 6, 6], [0, 1, 2, 3], ()),
        ([1, 1, 2, 2], [5, 6, 7, 8], [100, 101, 102, 103], ()),
        ([1, NAN, 2, 2], [5, 6, 7, 8], [0, 1, 100, 101], ()),  # the run has to stop at it
        ([1, 2, 2, 3], [5, 6, 7, 8], [100, 101, 2, 3], (1,)),  # masked, so row 0 is alone
    ],
)
def test_groups_that_score_alike_are_replaced_in_order(kept, fresh, expected, unfinished):
    """The rest are all other groups, those that were replaced in the places of the taken ones."""
    rows, drawn = answers(kept, unfinished=unfinished), answers(fresh, 100)
    where = {"wanting": ~informative(rows, unfinished), "offered": informative(drawn)}
    refilled, rest = REFILL(rows, fresh=drawn, **where)
    assert_array_equal(refilled.row_ids, expected)
    assert_array_equal(np.asarray(refilled.tokens)[:, 0], expected)  # whole rows move
    both = np.concatenate([refilled.row_ids, rest.row_ids]).tolist()
    assert sorted(both) == sorted([*rows.row_ids, *drawn.row_ids])
    assert_array_equal(np.asarray(rest.row_ids)[::2] + 1, rest.row_ids[1::2])


def schedule(rounds):
    """Steps of four pairs of answers to 60 prompts, each prompt a token."""
    tokens = np.arange(160)[:, None]
    prompts = EncodedPrompts(tokens, np.ones_like(tokens), tuple(range(160)), {}, {})
    keys = {"order_key": jax.random.key(3), "rollout_key": jax.random.key(4)}
    size = {"num_prompts": 4, "group_size": 2, "samplings": 1 + rounds, "multiple": 1}
    return Schedule(prompts, np.arange(100, 160), **size, **keys)


def step(rounds, number, *scores, observe=None):
    """A step whose draws have these scores: rollout, metrics, the rest, and the batches that it
    drew.
    """
    drawn = []

    def draw(batch):
        drawn.append(batch)
        return answers(scores[len(drawn) - 1], 100 * len(drawn))

    algorithm = types.SimpleNamespace(observe=observe)
    own = types.SimpleNamespace(algorithm=algorithm)

    def refill(rollout, *, fresh, wanting, offered):
        for array in (wanting, offered):  # on a CPU a program may read them at any later time
            array.setflags(write=False)
        return REFILL(rollout, fresh=fresh, wanting=wanting, offered=offered)

    programs = {"refill": refill, "informative": lambda state, rollout: informative(rollout)}
    job = rl_job(programs=programs, schedule=schedule(rounds), method=own)
    rollouts = map(draw, job.schedule.batches(number))
    first = next(rollouts)
    found = replace_uninformative(job, None, first, rollouts, lambda rollout: (rollout,))
    return *found, drawn


def bits(key):
    return jax.random.key_data(key).tobytes()


def test_rounds_have_other_prompts_and_keys_and_end_when_all_groups_differ():
    same = [1] * 8
    one = [1, 2, 3, 3, 4, 4, 5, 5]
    rest = [1, 2, 3, 4, 5, 6, 7, 7]
    rollout, metrics, unread, drawn = step(3, 1, same, one, rest)
    assert unread == []
    assert_array_equal(rollout.row_ids, [200, 201, 300, 301, 302, 303, 304, 305])
    assert {name: float(x) for name, x in metrics.items()} == {
        "sampling/rounds": 2.0,
        "sampling/uninformative": pytest.approx((4 + 3 + 1) / 12),
    }
    drawn_rows = [row for batch in drawn for row in batch.rows]
    assert len(drawn) == 3
    assert len(set(drawn_rows)) == 12
    for batch in drawn:
        assert_array_equal(batch.rows[::2], batch.rows[1::2])  # groups are adjacent
    made = [schedule(3).batches(number) for number in range(9)]
    keys = [bits(batch.key) for step in made for batch in step]
    assert len(set(keys)) == 4 * 9  # no two samplings of a run share a key
    steps = [{row for batch in made[number] for row in batch.rows} for number in (1, 2)]
    assert steps[0] > set(drawn_rows)
    assert not steps[0] & steps[1]
    first = [step[0].rows.tolist() for step in made]  # each prompt has its turn once an epoch
    assert first == [schedule(0).batches(number)[0].rows.tolist() for number in range(9)]
    *_, again = step(3, 1, same, one, rest)
    assert [bits(batch.key) for batch in again] == [bits(batch.key) for batch in drawn] == keys[4:7]


def test_when_the_rounds_run_out_what_is_left_stays():
    rollout, metrics, _, _ = step(1, 0, [1] * 8, [1, 2, 3, 3, 4, 4, 5, 5])
    assert_array_equal(rollout.row_ids, [200, 201, *range(102, 108)])
    assert metrics["sampling/rounds"] == 1
    assert metrics["sampling/uninformative"] == 7 / 8


def test_every_group_that_was_drawn_is_learned_from_or_left_over():
    draws = [1] * 8, [1, 2, 3, 3, 4, 4, 5, 5], [6, 7, 8, 9, 1, 1, 2, 3]
    rollout, _, unread, drawn = step(3, 0, *draws, observe=lambda state, rollout, **_: state)
    assert len(drawn) == 3
    assert len(unread) == 2
    found = np.concatenate([part.row_ids for part in (rollout, *unread)])
    assert sorted(found.tolist()) == [100 * k + i for k in (1, 2, 3) for i in range(8)]
    assert set(rollout.row_ids.tolist()) == {200, 201, 300, 301, 302, 303, 306, 307}


class Recorder:
    """An algorithm that returns what it is given."""

    @staticmethod
    def update(state, rollout, key, **options):
        return rollout, {"nonfinite": 0.0}


def learnt(rollout, **settings):
    loop = iteration.LoopState(TrainState(jnp.zeros(()), {}, ()), 0.0)
    how = {"algorithm": Recorder, "config": grpo.Config(group_size=2), "optimizer": None}
    learn = functools.partial(iteration.learn, **how, **settings)
    after, metrics = jax.jit(
        lambda loop, rollout: learn(loop, rollout, None, iteration.Functions(None))
    )(loop, rollout)
    return after.train, metrics


def test_truncated_responses_are_absent_from_the_loss():
    rollout = answers([1, 2, 3, 4], unfinished=(1, 2))
    rollout.response_mask[3] = 0  # absent already
    given, metrics = learnt(rollout, masked=iteration.mask_truncated(EOS))
    assert_array_equal(given.response_mask, [[0, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert metrics["response/masked"] == 2
    assert metrics["objective/reward"] == 2  # of all three that are there
    given, metrics = learnt(rollout)
    assert_array_equal(given.response_mask, rollout.response_mask)
    assert "response/masked" not in metrics


@pytest.mark.parametrize(("tokens", "lost"), [(1, 0.0), (2, 0.0), (3, 1.5), (4, 3.0)])
def test_the_last_tokens_of_a_response_cost_ever_more(tokens, lost):
    """Eq. 13 with L_max 4 and L_cache 2, times 3."""
    said = np.stack([(np.arange(5) > 0) & (np.arange(5) <= tokens)] * 2)
    ids = np.full((2, 5), 2)
    scores = np.array([7.0, 1.0], np.float32)
    rollout = Rollout(ids, ids, said, np.zeros((2, 5), np.float32), scores=scores)
    given, _ = learnt(rollout, shape=iteration.overlong(max_length=LENGTH, buffer=2, penalty=3.0))
    assert_allclose(np.sum(given.rewards, axis=1), [7.0 - lost, 1.0 - lost])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlong_buffer": 33}, "overlong_buffer must be at most 32"),
        ({"dynamic_sampling": -1}, "dynamic_sampling must be at least 0"),
        ({"mask_truncated": True, "missing_eos_penalty": 1.0}, "give one"),
        ({"dynamic_sampling": 1}, "ppo samples one answer to a prompt"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises((UserError, ValueError), match=message):
        method.check_settings("ppo", RLStage(**settings), ppo.Config(), layout_of(RunConfig()))


def test_groups_of_a_run_are_asked_after_its_rules(tmp_path):
    """All answers have one score, and long ones lose some of it: groups of two lengths teach."""
    rules = {"overlong_buffer": 1, "stop": tuple("abcsy "), "dynamic_sampling": 1}
    config = with_rl(letters_run(tmp_path), batch_size=16, num_iterations=1, **rules)
    equal = lambda responses: [1.0] * len(responses)  # noqa: E731
    result = training.rl.run(config, grpo, grpo.Config(group_size=8), reward=equal)
    assert result.metrics["grad_norm"] > 0
    assert result.metrics["sampling/uninformative"] < 1


REWARD = """
def score(prompts, responses):
    return [float("e" in response) for response in responses]
"""


@pytest.mark.parametrize(
    "on_host",
    [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.soak)],
)
def test_a_run_with_dynamic_sampling_goes_on_bit_for_bit(on_host, config, tmp_path):
    (tmp_path / "reward.py").write_text(REWARD)
    rules = {"dynamic_sampling": 2, "mask_truncated": True, "overlong_buffer": 2}
    config = replace(
        config,
        reward=(f"{tmp_path / 'reward.py'}:score",) if on_host else ("count:e",),
        rl=replace(config.rl, num_iterations=4, kl_target=None, **rules),
        grpo=grpo.Config(group_size=4, num_epochs=1),
    )
    straight = run_grpo(config)
    assert straight.metrics["sampling/rounds"] >= 1
    goes_on_alike(run_grpo, config, straight)
