"""The steps of an RL iteration on the host: who is given which rollout and which columns."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import letters_run, metric_rows, with_rl

from rlhf_jax import rloo, training
from rlhf_jax.config import Network, Optimizer, RunConfig, Text, Tokenizer, model_source
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders import spec
from rlhf_jax.iteration import LoopState
from rlhf_jax.training.common import initial
from rlhf_jax.training.common.optimizer import make_optimizer
from rlhf_jax.training.rl import steps, validation
from rlhf_jax.training.rl.schedule import Batch
from rlhf_jax.types import Rollout, TrainState

STAGE = SimpleNamespace(config=RunConfig(), shard=lambda batch: batch)
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
        given.append(columns["topic"])
        return scored, {}, None

    score = steps.on_host(STAGE, spec.Reward(host=reward), guard)
    scored = score(replace(sampled, rewards=None), batch)
    assert given == [["c", "a"]] * 2
    assert scored.rollout.scores.tolist() == [1.0, 2.0]


def test_the_judge_scores_without_the_rewards_of_the_environment(batch, sampled):
    """They are paid in training, and the judge tells what training does not."""
    given = {}

    def scorer(name, score):
        def scored(rollout, batch):
            given[name] = rollout.rewards
            rollout = replace(rollout, scores=jnp.full(2, score))
            return steps.Scored(rollout, {"objective/score": jnp.float32(score)})

        return scored

    policy = LanguageModel(None, None, characters("abcd"))

    def sample(state, batch):
        return sampled, {}

    reward = scorer("reward", 3.0)
    judge = scorer("judge", 4.0)
    validate = validation.validator(STAGE, policy, batch, sample, reward, judge)
    metrics, samples = validate(None)
    assert metrics == {"validation/score": 3.0, "validation/judge": 4.0}
    assert [(row["prompt"], row["score"]) for row in samples] == [("c", 3.0), ("a", 3.0)]
    assert given["judge"] is None
    assert given["reward"] is sampled.rewards


@pytest.mark.slow
def test_a_run_draws_as_many_reserves_as_its_settings_say(tmp_path):
    """All groups have equal scores, so that all reserves are drawn."""
    config = replace(letters_run(tmp_path), reward=("length*0",))
    config = with_rl(config, num_iterations=1, dynamic_sampling=2, validation_interval=9)
    folder = training.rl.run(config, rloo, rloo.Config(group_size=2)).folder
    last = metric_rows(folder)[-1]
    assert (last["sampling/rounds"], last["sampling/uninformative"]) == (2.0, 1.0)


@pytest.mark.parametrize(("taken", "said"), [(4, "too early"), (1, ""), (0, "too late")])
def test_a_schedule_that_counts_other_steps_than_are_taken_is_said_once(taken, said, capsys):
    """Of 9 iterations with a step each."""
    optimizer = make_optimizer(Optimizer(schedule="linear"), 9)
    params = {"w": jnp.zeros(2)}
    update = jax.jit(optimizer.update)

    def advance(state, step):
        opt_state = state.train.opt_state
        for _ in range(taken):
            _, opt_state = update(params, opt_state, params)
        return replace(state, train=replace(state.train, opt_state=opt_state)), {"nonfinite": 0.0}

    state = LoopState.create(TrainState.create(params, optimizer), 0.0)
    counting = steps.counting(advance, 1)
    for step in range(3):
        state, _ = counting(state, step)
    out = capsys.readouterr().out
    assert out.count("optimizer steps") == bool(said)
    assert said in out
    assert (f"took {taken} optimizer steps" in out) == bool(said)


def test_only_some_schedules_count_the_steps_of_a_run():
    assert Optimizer(schedule="linear").counts_steps
    assert Optimizer(schedule="cosine").counts_steps
    assert Optimizer(schedule="constant", warmup_steps=0.1).counts_steps
    assert not Optimizer(schedule="constant", warmup_steps=3).counts_steps
    assert not Optimizer(schedule="step", decay_every=2).counts_steps


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
