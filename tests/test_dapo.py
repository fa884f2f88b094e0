"""DAPO in runs (Yu et al. 2025, arXiv 2503.14476): dynamic sampling, truncated responses, the
overlong penalty.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import Killed, config, data, interrupt, outputs  # noqa: F401 (fixtures)

from rlhf_jax import grpo, ppo, sampling, training
from rlhf_jax.config import RLStage
from rlhf_jax.errors import UserError
from rlhf_jax.training import phases, rl
from rlhf_jax.types import Rollout, TrainState

pytestmark = pytest.mark.usefixtures("no_pages")

SAMPLING = sampling.SamplingConfig(max_new_tokens=4, eos_id=1, pad_id=0)
NAN = float("nan")


def recipe(algorithm=grpo, size=2, **settings):
    how = RLStage(**{"batch_size": 8, "max_new_tokens": 4, **settings})
    return phases.Recipe(None, SAMPLING, algorithm, grpo.Config(group_size=size), None, how)


def answers(scores, first=0, unfinished=()):
    """Responses of 2 tokens to prompts of 1, ended by EOS but for those ``unfinished``; rows count
    from ``first``.
    """
    scores, rows = np.asarray(scores, np.float32), np.arange(len(scores), dtype=np.int32)
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
    return Rollout(*map(jnp.asarray, numbers))


@pytest.mark.parametrize(
    ("kept", "fresh", "expected", "left", "unfinished"),
    [
        (
            [1, 1, 2, 3, 0, 0, 4, 4],
            [5, 5, 6, 7, 8, 8, 9, 1],
            [102, 103, 2, 3, 106, 107, 6, 7],
            1,
            (),
        ),
        ([1, 2, 2, 3, 0, 1, 4, 5], [5, 6, 6, 7, 8, 9, 9, 1], [0, 1, 2, 3, 4, 5, 6, 7], 0, ()),
        ([1, 2, 2, 2], [5, 5, 6, 6], [0, 1, 2, 3], 1, ()),
        ([1, 1, 2, 2], [5, 6, 7, 8], [100, 101, 102, 103], 0, ()),
        (
            [1, NAN, 2, 2],
            [5, 6, 7, 8],
            [0, 1, 100, 101],
            0,
            (),
        ),  # is not hidden: the run has to stop at it
        (
            [1, 2, 2, 3],
            [5, 6, 7, 8],
            [100, 101, 2, 3],
            0,
            (1,),
        ),  # row 1 is masked, so row 0 is alone
    ],
)
def test_groups_that_score_alike_are_replaced_in_order(kept, fresh, expected, left, unfinished):
    how = recipe(mask_truncated=bool(unfinished))
    refill = jax.jit(functools.partial(phases.refill, recipe=how))
    refilled = refill(answers(kept, unfinished=unfinished), answers(fresh, 100))
    np.testing.assert_array_equal(refilled.row_ids, expected)
    np.testing.assert_array_equal(refilled.tokens[:, 0], expected)  # whole rows move
    assert phases.num_equal(refilled, recipe=how) == left


class Trainer:
    """What ``_Trainer._rollout`` needs: the scores of each sampling are given."""

    _rollout, rows_of = rl._Trainer._rollout, rl._Trainer.rows_of
    train_rows, group_size, order_key = np.arange(100, 160), 2, jax.random.key(3)
    parts = types.SimpleNamespace(prompts="all")

    def __init__(self, rounds, *scores):
        self.samplings = 1 + rounds
        self.settings, self.scores, self.calls = (
            RLStage(batch_size=8, dynamic_sampling=rounds),
            list(scores),
            [],
        )
        parts = (phases.num_equal, phases.refill)
        self._num_equal, self._refill = (functools.partial(part, recipe=recipe()) for part in parts)

    def _narrowed(self, prompts, rows):
        return prompts, rows.tolist()

    def _sampled(self, state, prompts, rows, number):
        step = (
            number // self.samplings
        )  # all samplings of a step have the columns that all of its prompts need
        assert prompts == ("all", self.rows_of(step).ravel().tolist())
        self.calls.append((rows.tolist(), number))
        return answers(self.scores.pop(0), 100 * len(self.calls)), {}

    def step(self, number):
        return self._rollout(None, number)


def test_rounds_have_other_prompts_and_keys_and_end_when_all_groups_differ():
    same, one, rest = [1] * 8, [1, 2, 3, 3, 4, 4, 5, 5], [1, 2, 3, 4, 5, 6, 7, 7]
    trainer = Trainer(3, same, one, rest)
    rollout, metrics = trainer.step(1)
    np.testing.assert_array_equal(rollout.row_ids, [200, 201, 300, 301, 302, 303, 304, 305])
    assert {name: float(x) for name, x in metrics.items()} == {
        "sampling/rounds": 2.0,
        "sampling/uninformative": pytest.approx((4 + 3 + 1) / 12),
    }
    prompts, numbers = zip(*trainer.calls, strict=True)
    assert len({row for rows in prompts for row in rows}) == 12
    assert numbers == (4, 5, 6)  # the first step has 0 to 3: no two samplings of a run share a key
    steps = [set(trainer.rows_of(step).ravel()) for step in (1, 2)]
    assert steps[0] > {row for rows in prompts for row in rows}
    assert not steps[0] & steps[1]
    plain = Trainer(0)  # in which each prompt has its turn once an epoch
    assert [trainer.rows_of(step)[0].tolist() for step in range(9)] == [
        plain.rows_of(i)[0].tolist() for i in range(9)
    ]
    again = Trainer(3, same, one, rest)
    again.step(1)
    assert again.calls == trainer.calls


def test_when_the_rounds_run_out_what_is_left_stays():
    rollout, metrics = Trainer(1, [1] * 8, [1, 2, 3, 3, 4, 4, 5, 5]).step(0)
    np.testing.assert_array_equal(rollout.row_ids, [200, 201, *range(102, 108)])
    assert metrics["sampling/rounds"] == 1
    assert metrics["sampling/uninformative"] == 7 / 8


class Recorder:
    """An algorithm that returns what it is given."""

    @staticmethod
    def update(state, rollout, key, **options):
        return rollout, {"nonfinite": 0.0}


def learnt(rollout, **settings):
    loop = phases.LoopState.create(TrainState(jnp.zeros(()), {}, ()), 0.0)
    learn = functools.partial(phases.learn, recipe=recipe(Recorder, **settings))
    after, metrics = jax.jit(
        lambda loop, rollout: learn(loop, rollout, None, phases.Functions(None))
    )(loop, rollout)
    return after.train, metrics


def test_truncated_responses_are_absent_from_the_loss():
    rollout = answers([1, 2, 3, 4], unfinished=(1, 2))
    rollout = rollout.replace(response_mask=rollout.response_mask.at[3].set(0))  # absent already
    given, metrics = learnt(rollout, mask_truncated=True)
    np.testing.assert_array_equal(given.response_mask, [[0, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert metrics["response/masked"] == 2
    assert metrics["objective/reward"] == 2  # of all three that are there
    given, metrics = learnt(rollout)
    np.testing.assert_array_equal(given.response_mask, rollout.response_mask)
    assert "response/masked" not in metrics


@pytest.mark.parametrize(("tokens", "lost"), [(1, 0.0), (2, 0.0), (3, 1.5), (4, 3.0)])
def test_the_last_tokens_of_a_response_cost_ever_more(tokens, lost):
    """Eq. 13 with L_max 4 and L_cache 2, times 3."""
    said = (jnp.arange(5) > 0) & (jnp.arange(5) <= tokens)
    ids = jnp.full((2, 5), 2)
    rollout = Rollout(
        ids, ids, jnp.stack([said, said]), jnp.zeros((2, 5)), scores=jnp.array([7.0, 1.0])
    )
    given, _ = learnt(rollout, overlong_buffer=2, overlong_penalty=3.0)
    np.testing.assert_allclose(given.rewards.sum(axis=1), [7.0 - lost, 1.0 - lost])


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
        rl._sizes("ppo", RLStage(**settings), ppo.Config(), 1)


REWARD = """
def score(prompts, responses):
    return [float("e" in response) for response in responses]
"""


@pytest.mark.parametrize(
    "on_host",
    [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.soak)],
)
def test_a_run_with_dynamic_sampling_goes_on_bit_for_bit(on_host, config, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "reward.py").write_text(REWARD)
    rules = {"dynamic_sampling": 2, "mask_truncated": True, "overlong_buffer": 2}
    config = dataclasses.replace(
        config,
        reward=(f"{tmp_path / 'reward.py'}:score",) if on_host else ("count:e",),
        rl=dataclasses.replace(config.rl, num_iterations=4, kl_target=None, **rules),
        grpo=grpo.Config(group_size=4, num_epochs=1),
    )
    straight = training.rl.run(config, grpo)
    assert straight.metrics["sampling/rounds"] >= 1
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"))
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(Killed):
            training.rl.run(again, grpo)
    resumed = training.rl.run(dataclasses.replace(again, resume=True), grpo)
    assert outputs(resumed.folder) == outputs(straight.folder)
