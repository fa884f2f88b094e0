"""The steps of an RL iteration on the host: who is given which rollout and which columns."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import letters_run, metric_rows, with_rl
from numpy.testing import assert_array_equal
from recorded import rl_job

from rlhf_jax import rloo, training, vpg
from rlhf_jax.config import (
    Network,
    Optimizer,
    RLStage,
    RunConfig,
    Text,
    Tokenizer,
    model_source,
)
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders import spec
from rlhf_jax.iteration import NO_PENALTY, LoopState
from rlhf_jax.training.common import initial
from rlhf_jax.training.common.optimizer import make_optimizer
from rlhf_jax.training.rl import sample as sample_module
from rlhf_jax.training.rl.method import Method, check_optimizer_steps, optimizer_steps
from rlhf_jax.training.rl.sample import sample
from rlhf_jax.training.rl.schedule import Batch
from rlhf_jax.training.rl.score import score
from rlhf_jax.training.rl.validation import validate
from rlhf_jax.types import Rollout, TrainState

ROWS = [Row(word, (), f"line {i}", columns={"topic": word}) for i, word in enumerate("abcd")]


@pytest.fixture
def batch():
    """Two of four prompts, in another order."""
    tokens = np.full((4, 1), 3, np.int32)
    prompts = EncodedPrompts(tokens, np.ones_like(tokens), ROWS, ["topic"], {})
    return Batch(prompts, np.array([2, 0]), jax.random.key(0))


@pytest.fixture
def sampled():
    """Two responses of two tokens, with an environment's rewards."""
    ones = jnp.ones((2, 3), jnp.int32)
    said = ones.at[:, 0].set(0)
    rewards = 0.5 * said
    return Rollout(3 * ones, ones, said, jnp.zeros((2, 3)), jnp.array([2, 0]), rewards=rewards)


def test_reward_and_filter_on_the_host_get_the_columns_of_each_row(batch, sampled):
    given = []

    def reward(rollout, columns):
        given.append(columns["topic"])
        return np.array([1.0, 2.0], np.float32), {}

    def guard(before, scored, columns):
        assert before.scores is None
        given.append(columns["topic"])
        return scored.replace(scores=-scored.scores), {}, ["unsafe"]

    job = rl_job(
        inputs={"reward": spec.Reward(host=reward, take_unparsed=lambda: 3), "guard": guard}
    )
    rollout = replace(sampled, rewards=None)
    scored = score(job, rollout, batch)
    assert given == [["c", "a"]] * 2
    assert (scored.rollout.scores.tolist(), scored.verdicts) == ([-1.0, -2.0], ["unsafe"])
    assert scored.metrics["reward/unparsed"] == 3  # replies of judges
    judged = score(job, rollout, batch, spec.Reward(host=reward))  # without the filter
    assert given == [["c", "a"]] * 3
    assert (judged.rollout.scores.tolist(), judged.verdicts) == ([1.0, 2.0], None)


def test_a_batch_is_sampled_in_parts_and_the_environment_counts_the_rows_that_are_there(
    batch, sampled, monkeypatch
):
    """A teacher on a server is asked for what the policy sampled, and not for greedy responses."""
    seen = []

    def respond(policy, prompts, key):
        seen.append((prompts.places.tolist(), prompts.row_ids.tolist(), key is batch.key))
        return replace(sampled, row_ids=prompts.row_ids)

    def converse(environment, respond, prompts, rows):
        assert environment == "an environment"
        turns = {2: 1, 0: 3, 1: 2, -1: 99}
        rollout = respond(prompts.tokens[rows], prompts.attention_mask[rows], rows)
        return rollout, {"turns": np.array([turns[row] for row in rows.tolist()])}

    monkeypatch.setattr(sample_module, "converse", converse)
    batch = batch._replace(rows=np.array([2, 0, 1, -1]), shared_by=2, group_size=4)
    job = rl_job(
        settings=RLStage(batch_size=2),
        inputs={
            "initial": LanguageModel(None, None, characters("abcd")),
            "environment": "an environment",
            "ask_teacher": lambda rollout: -rollout.row_ids[:, None] * rollout.response_mask,
        },
        programs={"respond": respond, "respond_greedily": respond},
    )
    state = LoopState(TrainState(0, {}, ()), 0.0)
    rollout, metrics = sample(job, state, batch)
    assert seen == [([0, 1], [2, 0], True), ([2, 3], [1, -1], True)]
    assert (rollout.row_ids.tolist(), rollout.group_size) == ([2, 0, 1, -1], 2)
    assert rollout.group_ids.tolist() == [0] * 4
    assert metrics == {"environment/turns": 2.0}
    assert rollout.teacher_log_probs[:, 1].tolist() == [-2, 0, -1, 1]
    greedy, _ = sample(job, state, batch, "respond_greedily")
    assert greedy.teacher_log_probs is None


def test_a_judge_of_pairs_compares_with_the_first_validation(batch, sampled, tmp_path):
    """The win rate is the judge's; the reward of training has no opponents."""

    def reward(rollout, functions):
        rollout = replace(rollout, scores=jnp.full(2, 3.0))
        return rollout, {"objective/score": jnp.float32(3.0)}

    def judge(rollout, columns):
        seen.append(columns["opponents"])
        return np.array([0.25, 0.75], np.float32), {}

    seen = []
    letters = characters("abcd")
    job = rl_job(
        settings=RLStage(batch_size=2),
        inputs={
            "initial": LanguageModel(None, None, letters),
            "reward": spec.Reward(fn="reward"),
            "judge": spec.Reward(host=judge, is_pairs=True),
        },
        programs={"respond_to_each": lambda policy, *_: policy, "reward": reward},
        folder=tmp_path,
        held_out=batch,
    )
    sampled = replace(sampled, rewards=None)
    for tokens in (sampled.tokens, sampled.tokens + 1):
        state = LoopState(TrainState(0, replace(sampled, tokens=tokens), ()), 0.0)
        metrics, _ = validate(job, state)
        assert (metrics["validation/win_rate"], metrics["validation/score"]) == (0.5, 3.0)
    first = letters.decode([3, 3])
    assert seen == [[first, first]] * 2


def test_the_judge_scores_without_the_rewards_of_the_environment(batch, sampled, capsys):
    """They are paid in training, and the judge tells what training does not."""
    given = {}

    def reward(rollout, functions):
        given[functions.reward_fn] = rollout.rewards
        score = {"reward": 3.0, "judge": 4.0}[functions.reward_fn]
        rollout = replace(rollout, scores=jnp.full(2, score))
        return rollout, {"objective/score": jnp.float32(score)}

    job = rl_job(
        settings=RLStage(batch_size=2, show_examples=1),
        inputs={
            "initial": LanguageModel(None, None, characters("abcd")),
            "reward": spec.Reward(fn="reward"),
            "judge": spec.Reward(fn="judge"),
        },
        programs={"respond_to_each": lambda *prompts: sampled, "reward": reward},
        held_out=batch,
    )
    metrics, samples = validate(job, LoopState(TrainState(0, {}, ()), 0.0))
    assert metrics == {"validation/score": 3.0, "validation/judge": 4.0}
    assert [(row["prompt"], row["score"]) for row in samples] == [("c", 3.0), ("a", 3.0)]
    assert capsys.readouterr().out.count("Generated: ") == 1
    assert given["judge"] is None
    assert_array_equal(given["reward"], sampled.rewards)


@pytest.mark.slow
def test_a_run_draws_as_many_reserves_as_its_settings_say(tmp_path):
    """All groups have equal scores, so that all reserves are drawn."""
    config = replace(letters_run(tmp_path), reward=("length*0",))
    config = with_rl(config, num_iterations=1, dynamic_sampling=2, validation_interval=9)
    folder = training.rl.run(config, rloo, rloo.Config(group_size=2)).folder
    last = metric_rows(folder)[-1]
    assert (last["sampling/rounds"], last["sampling/uninformative"]) == (2.0, 1.0)


@pytest.mark.parametrize(("taken", "said"), [(4, "too early"), (1, ""), (0, "too late")])
def test_a_schedule_that_counts_other_steps_than_are_taken_is_said(taken, said, capsys):
    """Of 9 iterations with a step each, of which one is done."""
    optimizer = make_optimizer(Optimizer(1e-3, schedule="linear"), 9)
    params = {"w": jnp.zeros(2)}
    update = jax.jit(optimizer.update)
    _, opt_state = update(params, optimizer.init(params), params)
    state = LoopState(TrainState(jnp.int32(1), params, opt_state), 0.0)
    before = optimizer_steps(state)
    assert before == 1
    for _ in range(taken):
        _, opt_state = update(params, opt_state, params)
    state = replace(state, train=replace(state.train, opt_state=opt_state))
    method = Method(vpg, vpg.Config(), RLStage(), NO_PENALTY, None)
    check_optimizer_steps(method, state, before, {"nonfinite": 1.0})
    assert not capsys.readouterr().out  # of an update that was not applied
    check_optimizer_steps(method, state, before, {"nonfinite": 0.0})
    out = capsys.readouterr().out
    assert out.count("optimizer steps") == bool(said)
    assert said in out
    assert (f"took {taken} optimizer steps" in out) == bool(said)


def test_only_some_schedules_count_the_steps_of_a_run():
    assert Optimizer(schedule="linear").counts_steps
    assert Optimizer(schedule="cosine").counts_steps
    assert Optimizer(schedule="constant", warmup_steps=0.1).counts_steps
    assert not Optimizer(schedule="constant", warmup_steps=3).counts_steps
    assert not Optimizer(schedule="plateau").counts_steps


def test_a_run_says_which_model_it_trains(capsys, tmp_path):
    tokenizer = characters("abcd")
    tokenizer.save(tmp_path / "tokenizer")
    network = Network(hidden_size=8, num_layers=1, num_heads=1, max_length=16)
    config = RunConfig(
        network=network, tokenizer=Tokenizer(name=str(tmp_path / "tokenizer")), text=Text()
    )
    made = initial.language_model(model_source(config), (), jax.random.key(0))
    number = sum(leaf.size for leaf in jax.tree.leaves(made.params))
    assert f"model: random weights (no --model), {number:,} parameters" in capsys.readouterr().out
    how = initial.sampling_config(config.rl, tokenizer)
    made.save(tmp_path / "model", template=config.text.template, config=how)
    loaded = RunConfig(model=str(tmp_path / "model"))
    initial.language_model(model_source(loaded), (), jax.random.key(0))
    assert f"model: {tmp_path / 'model'}, {number:,} parameters" in capsys.readouterr().out
    initial.language_model(model_source(config), (), jax.random.key(0), policy=made.model)
    assert "model: the policy that Python gives, " in capsys.readouterr().out
