"""One RL iteration: three jits or one give the same bits; what the phases record."""

import functools
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import builders
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import initial_params
from numpy.testing import assert_allclose, assert_array_equal
from recorded import rl_job
from tabular import policy_fn, policy_params
from tabular import rollout as tabular_rollout

from rlhf_jax import iteration, models, rewards, sampling, sharding
from rlhf_jax.algorithms import vpg
from rlhf_jax.config import RLStage, RunConfig, model_source
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.graders import spec
from rlhf_jax.training.rl import method
from rlhf_jax.training.rl.programs import rules
from rlhf_jax.training.rl.run import collect
from rlhf_jax.training.rl.schedule import Batch
from rlhf_jax.types import PolicyOutput, Rollout

scored = jax.jit(iteration.scored)
PROMPT_LENGTH = 4
ROWS = 8
SAMPLING = sampling.SamplingConfig(max_new_tokens=6, eos_id=1, pad_id=0)
MODEL = models.build(
    models.GPT2Config(vocab_size=12, max_length=16, hidden_size=16, num_layers=1, num_heads=2)
)
POLICY_FN = models.policy_fn(MODEL, prompt_length=PROMPT_LENGTH)
OPTIMIZER = optax.adam(1e-2)


def f32(*x):
    return np.array(x, np.float32)


def start():
    return iteration.LoopState(vpg.State.create(initial_params(MODEL), OPTIMIZER), jnp.float32(0.1))


def prompts():
    tokens = np.random.default_rng(5).integers(2, 12, (ROWS, PROMPT_LENGTH))
    places = np.arange(ROWS, dtype=np.int32)
    return iteration.Prompts(tokens, np.ones_like(tokens), places + 100, places=places)


def functions(reference=True):
    ref_fn = (
        jax.tree_util.Partial(
            POLICY_FN,
            initial_params(MODEL),
        )
        if reference
        else None
    )
    return iteration.Functions(
        jax.tree_util.Partial(POLICY_FN), rewards.token_count(5, include_prompt=False), ref_fn
    )


@functools.cache
def responding(config=SAMPLING):
    return jax.jit(functools.partial(iteration.respond, model=MODEL, config=config))


COLLECT = functools.partial(builders.collected, model=MODEL, config=SAMPLING)
KL = iteration.kl_penalty(0.1)


class Recorder:
    """An algorithm whose state becomes the rollout that it is given."""

    Config = vpg.Config

    @staticmethod
    def update(state, rollout, key, **options):
        return rollout, {"nonfinite": 0.0}


def learning(algorithm=vpg, **how):
    """``iteration.learn`` with its settings bound, as a program."""
    how = {"config": algorithm.Config(), "optimizer": OPTIMIZER, "penalty": KL} | how
    return jax.jit(functools.partial(iteration.learn, algorithm=algorithm, **how))


def one_program(algorithm=vpg, **how):
    """An iteration as one program."""
    return jax.jit(builders.one_program(COLLECT, learning(algorithm, **how)))


@pytest.mark.slow
def test_one_jit_and_three_jits_give_identical_parameters():
    if "use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", ""):
        pytest.skip("equal bits need XLA's newer emitters: .ci/run runs this file with them")
    shape = iteration.missing_eos(SAMPLING.eos_id, penalty=0.5, score=None)
    made = {"shape": shape, "penalty": iteration.kl_penalty(0.1, target=1.0)}
    whole = one_program(**made)
    collect = jax.jit(COLLECT)
    learn = jax.jit(learning(**made))
    reward = jax.jit(iteration.reward)
    one = three = start()
    for step in range(3):
        keys = jax.random.split(jax.random.key(step), 2)
        one, rollout, metrics = whole(one, prompts(), *keys, functions())
        apart, collected = collect(three, prompts(), keys[0], functions())
        apart, rewarded = reward(apart, functions())
        three, learned = learn(three, apart, keys[1], functions())
    assert_array_equal(rollout.row_ids, np.arange(ROWS) + 100)
    assert metrics.keys() == (collected | rewarded | learned).keys()
    jax.tree.map(assert_array_equal, one, three)
    before, after = (state.train.params["h_0"]["mlp"]["c_fc"]["kernel"] for state in (start(), one))
    assert jnp.any(before != after)


def test_a_prompt_that_occurs_twice_gets_two_samples_and_its_place_says_which():
    """As in a group of answers, whose prompts have one data row."""
    same = jax.tree.map(
        lambda x: np.repeat(x[:1], ROWS, axis=0),
        prompts(),
    )
    policy = start().train.params
    sample = functools.partial(responding(), policy, key=jax.random.key(3))
    places = prompts().places
    sampled = sample(same._replace(places=places))
    assert len({row.tobytes() for row in np.asarray(sampled.tokens)}) == ROWS
    turned = sample(same._replace(places=places[::-1]))
    assert_array_equal(turned.tokens, np.asarray(sampled.tokens)[::-1])
    assert turned.row_ids.tolist() == [100] * ROWS


def test_the_greedy_response_is_the_baseline():
    """The score counts token 5: that of the greedy responses, after the rule for missing EOS, and
    without KL.
    """
    likeliest = replace(SAMPLING, temperature=0.0)
    rule = iteration.missing_eos(SAMPLING.eos_id, penalty=0.5, score=None)

    join = jax.jit(functools.partial(iteration.with_greedy, shape=rule))
    given = prompts()
    encoded = EncodedPrompts(given.tokens, given.attention_mask, [], [], {})
    batch = Batch(encoded, given.places, jax.random.key(5))
    job = rl_job(
        own=vpg.Config(baseline="greedy"),
        settings=RLStage(batch_size=ROWS),
        inputs={
            "initial": SimpleNamespace(tokenizer=None),
            "reward": spec.Reward(fn=functions().reward_fn),
        },
        programs={
            "respond": responding(),
            "respond_greedily": responding(likeliest),
            "rescored": lambda loop, sampled, functions: (sampled, {}),
            "reward": jax.jit(iteration.reward),
            "with_greedy": join,
        },
    )
    loop = start()
    rollout, metrics = collect(job, loop, batch)
    greedy = responding(likeliest)(loop.train.params, prompts(), jax.random.key(6))
    greedy = jax.tree.map(np.asarray, greedy)
    said = np.where(greedy.response_mask, greedy.tokens, 0)
    counts = np.sum(said == 5, axis=1)
    ended = np.any(said == 1, axis=1)
    assert len(set(counts)) > 1
    assert_allclose(rollout.greedy_rewards, counts - 0.5 * ~ended)
    assert metrics["objective/greedy_score"] == pytest.approx(counts.mean())
    assert not np.array_equal(rollout.tokens, greedy.tokens)


def test_a_row_without_a_greedy_score_is_absent():
    scores = f32(1.0, 2.0)
    rollout = made_rollout(scores=scores)
    greedy = made_rollout(scores=scores + 5)
    greedy = greedy.replace(response_mask=greedy.response_mask * [[0], [1]])
    rule = iteration.missing_eos(SAMPLING.eos_id, penalty=None, score=-1.0)
    join = jax.jit(functools.partial(iteration.with_greedy, shape=rule))
    joined = jax.tree.map(np.asarray, join(rollout, greedy=greedy))
    assert_array_equal(joined.response_mask, [[0, 0, 0, 0], [0, 0, 1, 1]])
    assert joined.greedy_rewards[1] == 7
    assert_array_equal(joined.scores, scores)


def test_kl_coefficient_follows_the_kl():
    """Ziegler et al. 2019: with n = horizon the coefficient moves by at most a fifth of itself."""
    learn = learning(Recorder, penalty=iteration.kl_penalty(0.1, target=1e-3, horizon=2))
    begun = iteration.LoopState(None, 0.1)
    scored = made_rollout(scores=f32(1.0, 2.0))
    loop, metrics = learn(begun, scored, None, iteration.Functions(None))
    # The policy is still the reference: 0 / target - 1, clipped to -.2.
    assert float(metrics["objective/kl"]) == 0.0
    assert_allclose(loop.kl_coef, 0.1 * 0.8, rtol=1e-6)
    assert float(metrics["kl/coef"]) == pytest.approx(0.1)  # the one that shaped these rewards


def made_rollout(**fields):
    """Two responses of two tokens after prompts of two; the second ends in EOS (1)."""
    tokens = np.array([[2, 3, 4, 5], [2, 3, 4, 1]])
    response_mask = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    zeros = np.zeros((2, 4), np.float32)
    return Rollout(
        tokens,
        np.ones_like(tokens),
        response_mask,
        zeros,
        ref_log_probs=zeros,
        values=zeros,
        **fields,
    )


@pytest.mark.parametrize("dense", [False, True])
def test_a_score_is_added_to_the_rewards_of_an_environment(dense):
    """On the last token, or on its own tokens if it is dense; the scores are the sums."""
    paid = f32([0, 0, 0.5, 0], [0, 0, 0, 0.25])
    scores = f32([9, 9, 0, 1.0], [9, 9, 2.0, 0]) if dense else f32(1.0, 2.0)
    rollout, metrics = scored(made_rollout(rewards=paid), scores, {})
    at_end = [[0, 0, 0.5, 1.0], [0, 0, 0, 2.25]]
    expected = [[0, 0, 0.5, 1.0], [0, 0, 2.0, 0.25]] if dense else at_end
    assert_array_equal(np.asarray(rollout.rewards)[:, 2:], np.array(expected)[:, 2:])
    assert_array_equal(rollout.scores, [1.5, 2.25])
    assert float(metrics["objective/score"]) == 1.875


def rescored_by(importance):
    """Two responses whose tokens have the ratios 1, and 1/2 and 3; the second text is shorter."""
    mask = np.array([[0, 0, 0, 1, 0], [0, 0, 0, 1, 1]])
    attention_mask = mask | np.array([[1, 1, 1, 0, 0], [0, 0, 1, 0, 0]])
    policy = np.log(np.array([[1, 1, 1, 0.5, 1], [1, 1, 1, 0.25, 0.75]], np.float32))
    engine = np.log(np.array([[1, 1, 1, 0.5, 1], [1, 1, 1, 0.5, 0.25]], np.float32))
    sampled = Rollout(np.arange(10).reshape(2, 5), attention_mask, mask, engine)
    policy_fn = jax.tree_util.Partial(lambda *_: PolicyOutput(policy, policy))
    return iteration.rescored(
        iteration.LoopState(vpg.State.create({}, OPTIMIZER), 0.0),
        sampled,
        iteration.Functions(policy_fn),
        eos_ids=(9,),
        importance=importance,
    )


@pytest.mark.parametrize(
    ("importance", "weights", "limited"),
    [
        ((2.0, "sequence_truncate", 0.0), [[1, 0], [1.5, 1.5]], 0),
        ((2.0, "token_truncate", 0.6), [[1, 0], [0.6, 2]], 2 / 3),
        ((2.0, "token_mask", 0.6), [[1, 0], [0, 0]], 2 / 3),
        ((0.3, "tv_mask", 0.2), [[1, 0], [0.5, 0]], 1 / 3),  # 1/2 from 1/4, 3/4 from 1/4
    ],
)
def test_weights_are_of_the_kind_that_is_given(importance, weights, limited):
    made, metrics = rescored_by(importance)
    assert_allclose(made.importance_weights[:, 3:], weights, rtol=1e-6)
    found = {key: float(x) for key, x in metrics.items() if "importance" in key}
    raw = {"policy/importance_raw_mean": 1.5, "policy/importance_raw_max": 3.0}
    assert found == pytest.approx({"policy/importance_limited": limited, **raw})


def test_lengths_are_those_of_responses():
    made, metrics = rescored_by(None)
    assert float(metrics["response/length"]) == 1.5
    assert made.importance_weights is None
    _, metrics = scored(made, f32(1.0, 2.0), {})
    assert_allclose(metrics["reward/length_correlation"], 1.0, rtol=1e-6)


def test_without_a_penalty_the_rewards_are_the_dense_ones_or_the_scores_at_the_end():
    coef = jnp.float32(0.1)
    rewarded, _ = scored(made_rollout(), f32([9.0, 9.0, 1.0, 2.0], [9.0, 9.0, 3.0, 4.0]), {})
    for rollout, expected in [
        (rewarded, f32([0, 0, 1, 2], [0, 0, 3, 4])),
        (made_rollout(scores=f32(1.0, 2.0)), f32([0, 0, 0, 1], [0, 0, 0, 2])),
    ]:
        found = iteration.NO_PENALTY.apply(coef, rollout)
        assert_array_equal(found[0], expected)
        assert found[1:] == (coef, {})


def test_a_missing_eos_shapes_the_reward_and_leaves_the_scores():
    rollout, metrics = scored(made_rollout(), f32(1.0, 2.0), {})
    assert_array_equal(rollout.scores, [1.0, 2.0])
    assert float(metrics["objective/score"]) == 1.5
    rule = iteration.missing_eos(SAMPLING.eos_id, penalty=5.0, score=None)
    assert_array_equal(rule(rollout).scores, [-4.0, 2.0])
    dense = f32([9.0, 9.0, 1.0, 2.0], [9.0, 9.0, 3.0, 4.0])
    summed, _ = scored(made_rollout(), dense, {"part": f32(1.0, 5.0)})
    assert_array_equal(summed.scores, [3.0, 7.0])
    assert_array_equal(summed.rewards, dense)
    needs = "need one score per response, and missing_eos an eos_id"
    lost = f32([0, 0, 0, 5.0], [0, 0, 0, 0])
    assert_array_equal(rule(summed).rewards, dense - lost)
    with pytest.raises(ValueError, match=needs):
        rule(made_rollout(scores=f32(1.0, 1.0), rewards=dense))
    with pytest.raises(ValueError, match=needs):
        iteration.missing_eos(None, penalty=5.0, score=None)


@pytest.mark.parametrize(("is_rewarded", "expected"), [(True, [-4.5, 1.5]), (False, [-5.5, -0.5])])
def test_the_rules_of_a_run_are_those_of_its_settings(is_rewarded, expected):
    """The first response has no EOS, which costs 5; both are as long as they may be: 0.5."""
    settings = RLStage(
        max_new_tokens=2, missing_eos_penalty=5.0, overlong_buffer=1, overlong_penalty=0.5
    )
    shape, masked = rules(settings, SAMPLING, is_rewarded)
    rollout = made_rollout(scores=f32(1.0, 2.0))
    assert shape(rollout).scores.tolist() == expected
    assert masked is iteration.unchanged
    _, masked = rules(RLStage(mask_truncated=True), SAMPLING)
    assert masked(rollout).present.tolist() == [False, True]


def test_scores_are_clipped_before_the_penalties():
    """The first response has no EOS, which costs 5 of what is left of its score."""
    shape, _ = rules(RLStage(score_clip=1.5, missing_eos_penalty=5.0), SAMPLING)
    rollout = made_rollout(scores=f32(-7.0, 2.0))
    assert shape(rollout).scores.tolist() == [-6.5, 1.5]
    assert rollout.scores.tolist() == [-7.0, 2.0]
    shape, _ = rules(RLStage(score_clip=1.5), SAMPLING)
    assert shape(made_rollout(scores=f32(1.0, -1.25))).scores.tolist() == [1.0, -1.25]


def test_the_update_reads_rewards_less_the_kl_and_the_scores_as_they_were():
    rollout = made_rollout(scores=f32(1.0, 2.0))
    rollout = rollout.replace(ref_log_probs=f32([9.0, 9.0, -0.5, 0.25], [9.0, 9.0, 1, 2]))
    rule = iteration.missing_eos(SAMPLING.eos_id, penalty=5.0, score=None)
    learn = learning(Recorder, shape=rule)
    loop, metrics = learn(
        iteration.LoopState(None, 0.2),
        rollout,
        None,
        iteration.Functions(None),
    )
    # Of each token the coefficient of the state, 0.2, times log-prob 0 less the reference's.
    expected = [
        [0, 0, -0.1, -4 + 0.05],
        [0, 0, 0.2, 2 + 0.4],
    ]
    assert_allclose(loop.train.rewards, expected, rtol=1e-6)
    assert_array_equal(loop.train.scores, [1.0, 2.0])
    assert metrics["objective/reward"] == pytest.approx((-4.05 + 2.6) / 2)
    assert metrics["objective/kl"] == pytest.approx((0.25 - 3) / 2)


@pytest.mark.parametrize(("horizon", "factor"), [(None, 1.02), (12, 1 + 0.2 * 3 / 12)])
def test_the_kl_is_a_mean_of_row_sums_and_its_default_horizon_is_ten_iterations(horizon, factor):
    """Rows of 2, 3 and no tokens at ln 2 each are 2.5 ln 2 nats a row; the coefficient then moves
    by a tenth of .2, or with the horizon of the settings by three twelfths.
    """
    nats = math.log(2)
    batch = tabular_rollout(0, [2, 3, 0])
    ref_log_probs = np.asarray(batch.log_probs) - np.float32(nats)
    batch = batch.replace(ref_log_probs=ref_log_probs, rewards=None)
    batch = batch.replace(scores=f32(1.0, 2.0, math.nan))
    settings = RLStage(kl_coef=0.15, kl_target=0.5, kl_horizon=horizon)
    source = model_source(RunConfig())
    penalty = method.penalty_of(source, settings, method.completed(vpg), vpg.Config())
    learn = learning(Recorder, penalty=penalty)
    start = iteration.LoopState(None, 0.15)
    loop, metrics = learn(start, batch, None, iteration.Functions(None))
    assert_allclose(metrics["objective/kl"], 2.5 * nats, rtol=1e-6)
    assert_allclose(metrics["objective/reward"], 1.5 - 0.15 * 2.5 * nats, rtol=1e-6)
    assert_allclose(loop.kl_coef, 0.15 * factor, rtol=1e-6)


@pytest.mark.parametrize(
    ("responses", "share"),
    [
        ([[5, 6], [5, 6], [5, 6], [6, 5]], 3 / 4),
        ([[5, 6], [5, 6, 0], [5, 6], []], 2 / 3),  # a longer one, and a missing row
        ([[0], [0, 0], [1], [7]], 1 / 4),
        ([[5], []], 0),  # nothing to compare it with
        ([[]], 0),
    ],
)
def test_the_share_of_the_most_common_response(responses, share):
    """Each row begins one column further to the right, and its tokens have a hole between them."""
    tokens = np.full((len(responses), 16), 9)
    mask = np.zeros_like(tokens)
    for row, response in enumerate(responses):
        columns = 1 + row + np.arange(len(response)) * (1 + row % 2)
        tokens[row, columns] = response
        mask[row, columns] = 1
    rollout = Rollout(tokens, mask, mask, mask)
    assert float(jax.jit(iteration.most_common)(rollout)) == pytest.approx(share)


def test_the_most_common_response_of_rows_on_several_devices():
    rows = np.array([[3, 4, 5], [3, 4, 5], *[[3, 4, 5], [3, 4, 6]] * 3])
    rollout = sharding.shard_rows(sharding.make_mesh(), Rollout(rows, rows, rows, rows))
    assert len(rollout.tokens.addressable_shards) == 4
    assert float(jax.jit(iteration.most_common)(rollout)) == 5 / 8


def test_non_finite_rewards_leave_the_loop_as_it_was():
    learn = learning(penalty=iteration.kl_penalty(0.1, target=1.0))
    state = vpg.State.create(policy_params(0), OPTIMIZER)
    loop = iteration.LoopState(state, jnp.float32(0.1))
    rollout = tabular_rollout(0, [2, 3, 0]).replace(advantages=None, rewards=None)
    rollout = rollout.replace(scores=f32(1.0, math.nan, 2.0))
    by_table = iteration.Functions(jax.tree_util.Partial(policy_fn))
    after, metrics = learn(loop, rollout, jax.random.key(4), by_table)
    assert float(metrics["nonfinite"]) == 1.0
    jax.tree.map(assert_array_equal, after, loop)
