"""Rollouts of another engine: texts and token ids by hand, what is refused, importance weights, a whole update."""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tabular import BANDIT_REWARD, assert_close, assert_identical, bandit_policy_fn, policy_fn, policy_params

from rlhf_jax import grpo, models, ppo, rewards, rloo, rollout, sampling, sharding, vpg
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError
from rlhf_jax.types import PolicyOutput, Rollout, TrainState

LETTERS = characters("abcdefghij")  # pad 0, EOS 1, a 2, b 3, ...
KEY = jax.random.key(0)


def test_rows_by_hand():
    """Text and ids, cut off and ended, with and without the EOS that engines leave out."""
    made = rollout.from_text(
        ["ab", [4], "a", np.array([2, 3])],
        ["cd", [5, 1], [5, 6], np.array([7])],
        LETTERS,
        log_probs=[[-1, -2], [-3, -4], [-5, -6, -7], [-8]],
        finished=[False, True, True, False],
        response_length=4,
        row_ids=[7, 5, 7, 9],
    )
    expected = Rollout(
        tokens=np.int32([[2, 3, 4, 5, 0, 0], [0, 4, 5, 1, 0, 0], [0, 2, 5, 6, 1, 0], [2, 3, 7, 0, 0, 0]]),
        attention_mask=np.int32([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]),
        response_mask=np.int32([[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0]]),
        log_probs=np.float32([[0, 0, -1, -2, 0, 0], [0, 0, -3, -4, 0, 0], [0, 0, -5, -6, -7, 0], [0, 0, -8, 0, 0, 0]]),
        row_ids=np.int32([7, 5, 7, 9]),
    )
    assert_identical(made, expected)
    # Ids say themselves whether EOS ended them; unequal prompts get the longest one's width, or the one asked for.
    narrow = rollout.from_text([[2], [2, 3]], [[5, 1], [6]], LETTERS, log_probs=[[-1, -2], [-3]], prompt_length=3)
    np.testing.assert_array_equal(narrow.tokens, [[0, 0, 2, 5, 1], [0, 2, 3, 6, 0]])
    np.testing.assert_array_equal(narrow.row_ids, [0, 1])
    np.testing.assert_array_equal(rewards.missing_eos(narrow, jnp.array([3.0, 3.0]), 1, score=-1.0), [3, -1])


def test_turns_of_others_are_holes():
    """The policy, its EOS, a user's turn with an EOS of its own, the policy again; and a row it said nothing of."""
    made = rollout.from_text(
        [[2], [2]],
        [[5, 1, 6, 1, 7], [5, 6]],
        LETTERS,
        log_probs=[[-1, -2, None, math.nan, -3, -4], [None, 5.0]],
        finished=[True, False],
        masks=[[1, 1, 0, 0, 1, 1], [0, 0]],
    )
    np.testing.assert_array_equal(made.tokens, [[2, 5, 1, 6, 1, 7, 1], [2, 5, 6, 0, 0, 0, 0]])
    np.testing.assert_array_equal(made.attention_mask, [[1] * 7, [1, 1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(made.response_mask, [[0, 1, 1, 0, 0, 1, 1], [0] * 7])
    np.testing.assert_array_equal(made.log_probs, [[0, -1, -2, 0, 0, -3, -4], [0] * 7])
    # An EOS in somebody else's turn did not end the row.
    cut = rollout.from_text([[2]], [[5, 1]], LETTERS, log_probs=[[-1, 0]], finished=[False], masks=[[1, 0]])
    np.testing.assert_array_equal(cut.response_mask, [[0, 1, 0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_probs": [[-1, -2], [-3]]}, "row 1: 1 log_probs for 2 response tokens$"),
        ({"finished": [True, True]}, r"row 0: 2 log_probs for 3 response tokens \(the EOS that finished adds incl"),
        (
            {"responses": ["abc", [5, 1]], "finished": [False, True]},
            "row 0: 2 log_probs for 3 response tokens; a text .* give token ids",
        ),
        ({"masks": [[1, 1], [1]]}, "row 1: 1 masks for 2 response tokens"),
        ({"responses": ["ab", [5, 1]]}, "row 0: a text does not show whether EOS ended it: give finished"),
        ({"finished": [False, False]}, "row 1: finished is False, but its last token is EOS, 1"),
        ({"prompts": [[2], ""]}, "row 1: the prompt has no tokens"),
        ({"responses": [[5, 6], []], "log_probs": [[-1, -2], []]}, "row 1: the response has no tokens"),
        ({"prompts": [[2], [12]]}, "row 1, prompt: token id 12 is outside the vocabulary of 12"),
        ({"responses": [[5, -1], [5, 1]]}, "row 0, response: token id -1 is outside"),
        ({"prompts": [[2], [2.0]]}, "row 1, prompt: expected a text or a list of token ids"),
        ({"prompts": ["xy", [2]]}, "alphabet lacks 'x'"),
        ({"prompt_length": 2, "prompts": [[2], [2, 3, 4]]}, "row 1: the prompt has 3 tokens, prompt_length is 2"),
        ({"response_length": 1}, "row 0: the response has 2 tokens, response_length is 1"),
        ({"log_probs": [[-1, -2], [-3, 0.5]]}, "row 1: the log-probability of response token 1 .*: 0.5"),
        ({"log_probs": [[math.nan, -2], [-3, -4]]}, "row 0: the log-probability of response token 0 .*: nan"),
        ({"log_probs": [[-1, None], [-3, -4]]}, "row 0: the log-probability of response token 1 .*: nan"),
        ({"log_probs": [[-1, -math.inf], [-3, -4]]}, "row 0: the log-probability of response token 1 .*: -inf"),
        ({"log_probs": [[-1, {}], [-3, -4]]}, "row 0: log_probs must be numbers"),
        ({"responses": [[5, 6], [1, 5]]}, "row 1: the policy goes on after EOS, response token 0 of 2"),
        ({"responses": [[5, 6]]}, "responses: expected one entry for each prompt, 2, got 1"),
        ({"row_ids": [1]}, "row_ids: expected one entry for each prompt, 2, got 1"),
        ({"prompts": [], "responses": [], "log_probs": []}, "prompts: expected at least one row"),
    ],
)
def test_what_is_refused_names_the_row(changes, message):
    good = {"prompts": [[2], [2]], "responses": [[5, 6], [5, 1]], "log_probs": [[-1, -2], [-3, -4]]}
    rollout.from_text(tokenizer=LETTERS, **good)
    with pytest.raises(UserError, match=message):
        rollout.from_text(tokenizer=LETTERS, **{**good, **changes})


MODEL = models.build(
    models.GPT2Config(vocab_size=LETTERS.vocab_size, max_length=16, hidden_size=16, num_layers=1, num_heads=2)
)


def test_our_own_samples_come_back_as_they_were():
    """Sampled, written out as an engine would, read again: the same rollout, and weights of 1 up to rounding."""
    params = jax.tree.map(lambda x: x * 5 if x.ndim == 2 else x, jax.jit(MODEL.init)(KEY))
    lengths = np.array([4, 1, 3, 2, 4, 4, 1, 2])
    mask = (np.arange(4)[None, :] >= 4 - lengths[:, None]).astype(np.int32)
    prompts = np.where(mask, np.random.default_rng(0).integers(2, LETTERS.vocab_size, (8, 4)), LETTERS.pad_id)
    config = sampling.SamplingConfig(max_new_tokens=6, temperature=0.7, eos_id=LETTERS.eos_id, pad_id=LETTERS.pad_id)
    sampled = jax.jit(sampling.generate, static_argnames=("model", "config"))(
        MODEL, params, prompts, mask, jax.random.key(2), config=config, row_ids=np.arange(8) + 3
    )
    said = np.asarray(sampled.response_mask) != 0
    ids = [np.asarray(sampled.tokens)[i, said[i]].tolist() for i in range(8)]
    ended = [row[-1] == LETTERS.eos_id for row in ids]
    assert 0 < sum(ended) < 8
    texts = [LETTERS.decode(row) for row in ids]  # without EOS, and without a pad that was sampled
    responses = [row if LETTERS.pad_id in row else text for row, text in zip(ids, texts, strict=True)]
    assert {type(response) for response in responses} == {str, list}
    log_probs = [np.asarray(sampled.log_probs)[i, said[i]].tolist() for i in range(8)]
    common = {"log_probs": log_probs, "response_length": 6, "row_ids": sampled.row_ids}
    spelled = [LETTERS.decode(row[real != 0]) for row, real in zip(prompts, mask, strict=True)]
    made = rollout.from_text(spelled, responses, LETTERS, finished=ended, **common)
    assert_identical(made, sampled)
    assert_identical(rollout.from_text(spelled, ids, LETTERS, **common), sampled)

    policy = models.policy_fn(MODEL, temperature=0.7, prompt_length=4)
    rescored = jax.jit(partial(rollout.rescore, policy_fn=policy, importance_cap=2.0))(made, params)
    np.testing.assert_allclose(rescored.importance_weights, said, atol=1e-4)
    assert float(rollout.sampler_gap(made, rescored)) < 1e-4
    assert float(rollout.truncated_share(rescored, 2.0)) == 0


def test_weights_by_hand():
    """Ratios 1/2, 4 and 2 under a cap of 2; a hole and what lies outside the response, NaN included, get 0."""
    engine = jnp.log(jnp.array([[1.0, 0.5, 0.125, jnp.nan, 0.25], [1.0, 0.5, 1.0, 1.0, 1.0]]))
    policy = jnp.log(jnp.array([[1.0, 0.25, 0.5, 0.5, 0.5], [1.0, jnp.nan, 1.0, 1.0, 1.0]]))
    given = Rollout(
        tokens=jnp.zeros((2, 5), jnp.int32),
        attention_mask=jnp.ones((2, 5), jnp.int32),
        response_mask=jnp.array([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]),
        log_probs=engine,
    )

    def rescored(cap, scale=1.0):
        return rollout.rescore(
            given, scale, policy_fn=lambda scale, *_: PolicyOutput(scale * policy, policy), importance_cap=cap
        )

    capped = rescored(2.0)
    np.testing.assert_allclose(capped.importance_weights, [[0, 0.5, 2, 0, 2], [0] * 5], rtol=1e-6)
    np.testing.assert_allclose(rescored(math.inf).importance_weights, [[0, 0.5, 4, 0, 2], [0] * 5], rtol=1e-6)
    np.testing.assert_allclose(capped.log_probs, np.where(given.response_mask, policy, 0))
    assert rollout.truncated_share(rescored(3.0), 3.0) == np.float32(1 / 3)
    assert rescored(None).importance_weights is None
    assert jax.grad(lambda scale: rescored(2.0, scale).importance_weights.sum())(1.0) == 0
    with pytest.raises(ValueError, match="importance_cap: expected a number above 0"):
        rescored(0.0)
    with pytest.raises(ValueError, match=r"give rollout\.rescore an importance_cap"):
        rollout.truncated_share(rescored(None), 2.0)


# The engine draws the arms of the bandit with probabilities (1/2, 1/4, 1/4), the policy with (1/4, 1/4, 1/2): four rows
# each, in these numbers, are the expectation itself.
ENGINE = (0, 0, 1, 2), (0.5, 0.25, 0.25)
OWN = (0, 1, 2, 2), (0.25, 0.25, 0.5)
POLICY = {"logits": jnp.log(jnp.array([0.25, 0.25, 0.5])), "value": jnp.zeros(())}


class Arms:
    """Arm a is token a; nothing ends a response of one token."""

    pad_id, eos_id, vocab_size = 3, 4, 5


@functools.cache
def arm_rows(arms, probabilities, cap):
    """One row an arm with its reward as advantage, after the policy's own forward."""
    log_probs = np.log(probabilities)[list(arms)][:, None]
    made = rollout.from_text([[0]] * 4, np.array(arms)[:, None], Arms(), log_probs=log_probs)
    made = rollout.rescore(made, POLICY, policy_fn=bandit_policy_fn, importance_cap=cap)
    rewards_of_arms = jnp.where(made.response_mask != 0, BANDIT_REWARD[made.tokens], 0.0)
    return made.replace(advantages=rewards_of_arms, returns=jnp.zeros_like(rewards_of_arms))


def evaluated(algorithm, params, batch, config, policy_fn):
    """The loss, its gradient and its metrics as numbers."""

    def loss(params):
        losses, metrics = algorithm.loss(params, batch, KEY, policy_fn=policy_fn, config=config)
        losses = losses if isinstance(losses, tuple) else (losses,)
        values = [getattr(part, "value", part) for part in losses]
        return sum(values), {name: getattr(part, "value", part) for name, part in metrics.items()}

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return value, grads, metrics


@pytest.mark.parametrize(
    ("algorithm", "config"),
    [
        (vpg, vpg.Config(aggregate="token")),
        (ppo, ppo.Config(value_coef=0.0)),
        (rloo, rloo.Config()),
        (grpo, grpo.Config(kl_loss_coef=0.0)),
    ],
    ids=["vpg", "ppo", "rloo", "grpo"],
)
def test_weights_make_the_expected_gradient_that_of_the_policys_own_samples(algorithm, config):
    def gradient(batch):
        _, grads, metrics = evaluated(algorithm, POLICY, batch, config, bandit_policy_fn)
        return grads["logits"], metrics

    own, _ = gradient(arm_rows(*OWN, math.inf))
    # d/dlogits of -sum_a p_a r_a = -p_a (r_a - mean reward 5/4)
    np.testing.assert_allclose(own, [0.0625, 0.3125, -0.375], rtol=1e-5)
    weighed, metrics = gradient(arm_rows(*ENGINE, math.inf))
    np.testing.assert_allclose(weighed, own, rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/importance_weight_mean"], 1.0, rtol=1e-6)
    # Cap 1: arm 2 counts once instead of twice, so -1/4 [2 (1/2) 1 (e0 - p) + 0 + 2 (e2 - p)].
    capped, metrics = gradient(arm_rows(*ENGINE, 1.0))
    np.testing.assert_allclose(capped, -np.array([1, 0, 2]) / 4 + 0.75 * np.array([0.25, 0.25, 0.5]), rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/importance_weight_mean"], 0.75, rtol=1e-6)


class Ids:
    """The ids of the bigram policy; the last one is EOS and not said here."""

    pad_id, eos_id, vocab_size = 0, 4, 5


@functools.cache
def rollout_of_an_engine():
    """16 ragged rows of ids below 5, one with a hole, with rewards: ready for an update of the bigram policy."""
    rng = np.random.default_rng(1)
    lengths = [4, 1, 2, 4, 2, 2, 1, 3, 1, 1, 2, 4, 3, 4, 1, 1]
    made = rollout.from_text(
        [rng.integers(0, 4, n) for n in rng.integers(1, 4, 16)],
        [rng.integers(0, 4, n) for n in lengths],
        Ids(),
        log_probs=[-rng.uniform(0.2, 3.0, n) for n in lengths],
        masks=[np.ones(n) if i else [1, 0, 1, 1] for i, n in enumerate(lengths)],
    )
    reference = jax.tree_util.Partial(policy_fn, policy_params(2))
    prepare = jax.jit(partial(rollout.rescore, policy_fn=policy_fn, ref_fn=reference, importance_cap=1.5))
    made = prepare(made, policy_params(0))
    said = np.asarray(made.response_mask) != 0
    share = float(rollout.truncated_share(made, 1.5))
    assert 0.1 < share < 0.9
    assert share == np.float32((np.asarray(made.importance_weights)[said] == 1.5).mean())
    numbers = jnp.asarray(np.where(said, rng.normal(size=said.shape), 0.0), jnp.float32)
    return made.replace(rewards=numbers, advantages=numbers, returns=numbers)


SGD = optax.sgd(0.3)
UPDATE = partial(
    ppo.update,
    policy_fn=policy_fn,
    optimizer=SGD,
    config=ppo.Config(num_epochs=2, num_minibatches=2, num_microbatches=2, shuffle_blocks=4),
)
update_on_one = jax.jit(UPDATE)


def test_a_whole_update():
    """Weights go through minibatches and microbatches; masked columns are never read; values do not depend on them."""
    state = TrainState.create(policy_params(0), SGD)
    batch = rollout_of_an_engine()
    weighed, _ = update_on_one(state, batch, KEY)
    assert weighed.step == 4
    response = batch.response_mask != 0
    garbage = jnp.where(response, batch.importance_weights, jnp.nan)
    assert_identical(update_on_one(state, batch.replace(importance_weights=garbage), KEY)[0], weighed)
    unweighed, _ = update_on_one(state, batch.replace(importance_weights=jnp.ones(batch.tokens.shape)), KEY)
    assert np.abs(weighed.params["logits"] - unweighed.params["logits"]).max() > 1e-3
    np.testing.assert_allclose(weighed.params["values"], unweighed.params["values"], atol=1e-6)
    # Microbatches report the mean weight of the whole and make the same step.
    one_step = partial(ppo.update, policy_fn=policy_fn, optimizer=SGD)
    whole, parts = (
        jax.jit(partial(one_step, config=ppo.Config(num_microbatches=n)))(state, batch, KEY) for n in (1, 4)
    )
    assert_close(parts[0].params, whole[0].params)
    mean = np.asarray(batch.importance_weights)[np.asarray(response)].mean()
    np.testing.assert_allclose(parts[1]["policy/importance_weight_mean"], mean, rtol=1e-5)


@pytest.mark.slow
def test_devices_agree():
    state = TrainState.create(policy_params(0), SGD)
    mapped = jax.shard_map(
        partial(UPDATE, axis_name="data"),
        mesh=sharding.make_mesh(4),
        in_specs=(P(), P("data"), P()),
        out_specs=P(),
        check_vma=False,
    )
    args = state, rollout_of_an_engine(), KEY
    assert_close(jax.jit(mapped)(*args), update_on_one(*args))


def test_weights_touch_the_policy_loss_alone():
    """Weights of 0 leave entropy, KL and value terms as they were; weights of 1 leave everything."""
    batch = rollout_of_an_engine()

    def loss(weights):
        weighed = batch.replace(importance_weights=weights)
        config = ppo.Config(entropy_coef=0.3, kl_loss_coef=0.2)
        return evaluated(ppo, policy_params(3), weighed, config, policy_fn)

    value, grads, metrics = loss(None)
    same = value, grads, metrics | {"policy/importance_weight_mean": 1.0}
    assert_close(loss(np.ones(batch.tokens.shape)), same)
    nothing, _, zero_metrics = loss(np.where(batch.response_mask != 0, 0.0, np.nan))
    assert zero_metrics["policy/loss"] == 0
    assert abs(metrics["policy/loss"]) > 0.05
    np.testing.assert_allclose(nothing, value - metrics["policy/loss"], rtol=1e-5)
    with pytest.raises((ValueError, AssertionError), match="shape"):
        loss(np.ones(16))
