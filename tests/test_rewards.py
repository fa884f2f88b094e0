"""rewards: where scores come from (jittable and on the host), and how they are shaped."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import Rollout, rewards
from rlhf_jax.errors import UserError
from rlhf_jax.rewards import texts
from rlhf_jax.rewards.functions import close_turns

EOS = 9
PAD = 0
call = jax.jit(lambda fn, rollout: fn(rollout))


kl_shaped = jax.jit(rewards.kl_shaped, static_argnums=2)


def scores_of(fn, rollout):
    scores, parts = call(fn, rollout)
    assert parts == {}
    return scores


def a_rollout(**fields):
    """Four rows: ended, cut off, with a hole, and absent."""
    tokens = np.array(
        [[0, 5, 4, 5, EOS, 0], [6, 5, 5, 5, 5, 5], [7, 8, 1, 2, 3, EOS], [5, 5, 5, EOS, 0, 0]],
        np.int32,
    )
    response = np.array(
        [[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]], np.int32
    )
    attention = (tokens != PAD).astype(np.int32)
    return Rollout(
        tokens, attention, response, np.where(response, -1.0, 0.0).astype(np.float32)
    ).replace(**fields)


def constant(value):
    return lambda rollout: (jnp.full(rollout.tokens.shape[0], value, jnp.float32), {})


# Jittable rewards


def test_token_count_by_hand():
    counted = {
        rewards.token_count(5): [2, 5, 0, 3],
        rewards.token_count(5, cap=3): [2, 3, 0, 3],
        rewards.token_count(5, include_prompt=False): [1, 4, 0, 0],
        # A pad is no token, even when its id is the one that is counted.
        rewards.token_count(PAD): [0, 0, 0, 0],
    }
    for fn, expected in counted.items():
        assert_array_equal(scores_of(fn, a_rollout()), expected)
    assert_array_equal(scores_of(rewards.token_count(5), responses([5] * 120)), [100])


def weighted_dense(shape):
    return rewards.weighted({"dense": (lambda rollout: (jnp.zeros(shape), {}), 1.0)})(a_rollout())


def test_a_models_parameters_travel_through_jit_as_arguments():
    def table_score(params, tokens, attention_mask, key):
        assert key is None  # scoring is without dropout
        return jnp.where(attention_mask != 0, params["table"][tokens], 0.0).sum(axis=1)

    fn = rewards.from_model(table_score, {"table": jnp.arange(1_000_000.0)})
    assert isinstance(fn, Partial)
    assert_array_equal(scores_of(fn, a_rollout()), [23, 31, 30, 24])
    for reward in (fn, rewards.weighted({"a": (fn, 2.0)}), rewards.ensemble([fn, fn])):
        assert (
            len(call.lower(reward, a_rollout()).as_text()) < 100_000
        )  # the table would be megabytes of text
    carrying = rewards.from_model(
        Partial(lambda bias, params, *inputs: params + bias, jnp.ones(4)), jnp.zeros(4)
    )
    assert (
        len(jax.tree.leaves(carrying)) == 2
    )  # what a Partial carries stays visible inside another


@pytest.mark.parametrize(
    ("how", "expected"), [("mean", 3.0), ("min", 1.0), ("uncertainty", 3.0 - 0.5 * 8 / 3)]
)
def test_ensemble_by_hand(how, expected):
    fn = rewards.ensemble([constant(1.0), constant(3.0), constant(5.0)], how, coef=0.5)
    scores, parts = call(fn, a_rollout())
    assert_allclose(scores, [expected] * 4, rtol=1e-6)
    assert_allclose(parts["uncertainty"], [math.sqrt(8 / 3)] * 4, rtol=1e-6)


def test_weighted_sums_its_parts_and_reports_each_before_its_weight():
    inner = rewards.ensemble([constant(1.0), constant(3.0)])
    fn = rewards.weighted({"model": (inner, 0.5), "fives": (rewards.token_count(5), -1.0)})
    scores, parts = call(fn, a_rollout())
    assert_allclose(scores, [-1, -4, 1, -2])
    expected = {"model": [2, 2, 2, 2], "fives": [2, 5, 0, 3], "model/uncertainty": [1, 1, 1, 1]}
    assert {name: part.tolist() for name, part in parts.items()} == expected


SCORED = a_rollout(scores=np.ones(4))
REFUSED = [
    (lambda: rewards.ensemble([constant(1.0)], "max"), r"mean, min, uncertainty.*'max'"),
    (lambda: rewards.ensemble({}), "at least one"),
    (lambda: rewards.weighted({}), "at least one"),
    (lambda: weighted_dense((4, 1)), r"\(4, 1\) but expected \(4, 6\)"),
    (lambda: weighted_dense(()), r"\(\) but expected \(4,?\)"),
    (lambda: rewards.diversity(0), "ngram must be at least 1, got 0"),
    (lambda: rewards.repetition(0), "ngram must be at least 1, got 0"),
    (lambda: rewards.kl_shaped(a_rollout(), 0.1), "got neither"),
    (lambda: rewards.kl_shaped(SCORED, 0.1), "ref_log_probs is None"),
    (lambda: rewards.missing_eos(SCORED, SCORED.scores, EOS), "one of penalty and score"),
    (lambda: rewards.missing_eos(SCORED, SCORED.scores, EOS, 1.0, 0.0), "one of penalty and score"),
    (lambda: rewards.adaptive_kl(0.1, 1.0, target=6.0, horizon=0, n=1), "horizon"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_has_no_meaning_is_refused(make, message):
    with pytest.raises((ValueError, AssertionError), match=message):
        make()


def responses(*rows):
    """Rows of response tokens, None for a hole, after a prompt token 1; padded with 1s that are no
    response.
    """
    shape = (len(rows), 1 + max(map(len, rows)))
    tokens = np.ones(shape, np.int32)
    mask = np.zeros(shape, np.int32)
    for i, row in enumerate(rows):
        said = slice(1, 1 + len(row))
        tokens[i, said] = [7 if token is None else token for token in row]
        mask[i, said] = [token is not None for token in row]
    return Rollout(tokens, np.ones_like(mask), mask, np.zeros(shape, np.float32))


def test_diversity_by_hand():
    """Bigrams. Row 0: 11, 12, 23, of which 12 is row 1's too. Row 1: 12 (twice), 21, of which 21 is
    its own. Row 2: 77 across a hole. Rows 3 and 4: too short, absent. Row 5: 23, which is row
    0's."""
    batch = responses([1, 1, 2, 3], [1, 2, 1, 2], [7, None, 7], [3], [], [2, 3])
    assert_allclose(scores_of(rewards.diversity(), batch), [1 / 3, 1 / 2, 1, 0, 0, 0])
    assert_allclose(
        scores_of(rewards.diversity(ngram=9), batch), np.zeros(6)
    )  # longer than the row


def test_repetition_by_hand():
    """Bigrams 12, 21, 12, 21: half of them came before. Trigrams 121, 212, 121: a third did."""
    batch = responses([1, 2, None, 1, 2, 1], [3], [4, 4, 4, 4])
    assert_allclose(scores_of(rewards.repetition(2), batch), [1 / 2, 0, 2 / 3])
    assert_allclose(scores_of(rewards.repetition(), batch), [1 / 3, 0, 1 / 2])


# Rewards on the host


class Spelled:
    """Ids as digits; EOS and pad are left out, as tokenizers here do."""

    def decode(self, ids):
        assert all(type(i) is int for i in ids)
        return "".join(str(i) for i in ids if i not in (EOS, PAD))


@pytest.mark.parametrize("absent", range(4))
def test_from_text_shows_present_rows_their_texts_and_columns(absent):
    """Whichever row is absent: the columns and the scores are those of the right rows."""
    shown = [("5", "45", "a"), ("65", "5555", "b"), ("78", "13", "c"), ("555", "", "d")]
    numbers = {"a": 1, "b": 2.5, "c": np.float32(3), "d": 7}

    def fn(prompts, responses, answers):
        assert (
            list(zip(prompts, responses, answers, strict=True))
            == shown[:absent] + shown[absent + 1 :]
        )
        return [numbers[answer] for answer in answers], {
            "tone": [-numbers[answer] for answer in answers]
        }

    mask = a_rollout().response_mask.copy()
    mask[3, 3] = 1  # EOS alone
    mask[absent] = 0
    reward = rewards.from_text(fn, Spelled())
    columns = {"answers": list("abcd")}
    rollout, parts = rewards.on_host(reward, a_rollout(response_mask=mask), columns)
    expected = np.where(np.arange(4) == absent, 0, [1, 2.5, 3, 7])
    assert_array_equal(rollout.scores, expected)
    assert_array_equal(parts["tone"], np.where(np.arange(4) == absent, math.nan, -expected))
    assert_array_equal(rollout.response_mask, mask)
    assert (rollout.scores.dtype, rollout.response_mask.dtype) == (np.float32, mask.dtype)


def test_none_takes_the_row_out():
    reward = rewards.from_text(
        lambda prompts, responses: ([1, None, 3], {"part": [4, math.nan, None]}), Spelled()
    )
    rollout, parts = rewards.on_host(reward, jax.tree.map(jnp.asarray, a_rollout()), {})
    assert_array_equal(rollout.scores, [1, 0, 3, 0])
    assert_array_equal(
        rollout.response_mask, a_rollout().response_mask * np.array([[1], [0], [1], [1]])
    )
    assert_array_equal(parts["part"], [4, math.nan, math.nan, math.nan])


NAN = math.nan
NOT_FINITE = [
    ([1, bad, 3, 4], {}, r"^(?!.*row 0).*row 1 \(data row 11\)")
    for bad in (NAN, math.inf, 1e300, 10**400)
]
NOT_FINITE.append(([1, 2, 3, 4], {"tone": [NAN] * 4}, r"component 'tone'.*row 0.*row 1.*row 2"))


@pytest.mark.parametrize(("scores", "parts", "message"), NOT_FINITE)
def test_a_number_that_is_not_finite_stops_with_rows_and_prompts(scores, parts, message):
    with pytest.raises(FloatingPointError, match=message):
        rewards.on_host(
            lambda rollout, columns: (scores, parts), a_rollout(row_ids=np.arange(10, 14)), {}
        )
    reward = rewards.from_text(lambda prompts, responses: [1, np.float32("nan"), 3], Spelled())
    with pytest.raises(FloatingPointError, match=r"^(?!.*row 0).*row 1, prompt '65'"):
        rewards.on_host(reward, a_rollout(), {})
    rollout = jax.tree.map(lambda x: np.repeat(x[:1], 5, axis=0), a_rollout())
    sources = {texts.SOURCE: [f"f.json, line {i}" for i in range(5)]}
    reward = rewards.from_text(lambda prompts, responses, **rest: [NAN] * 5, Spelled())
    with pytest.raises(FloatingPointError) as error:
        rewards.on_host(reward, rollout, sources)
    shown = re.findall(
        r"row (\d), prompt '5' of f\.json, line (\d), response '.+?': nan", f"{error.value}"
    )
    assert shown == [("0", "0"), ("1", "1"), ("2", "2")]
    assert "; and 2 more of 5 rows)" in f"{error.value}"
    rewards.on_host(
        lambda rollout, columns: ([1, 2, 3, NAN], {}), a_rollout(), {}
    )  # nobody reads an absent row's


EXPECTED = ": expected a list, tuple or array of 3 scores, one for each row, got "
ENTRY = ", row 1, prompt '65', response '.*': expected a number or None, got "
NO_SCORES = {
    "nothing": (None, f"{EXPECTED}NoneType: None"),
    "too few": ([1, 2], EXPECTED + r"list: \[1, 2\]"),
    "a pair of numbers": ((1, 2), f"{EXPECTED}tuple: "),
    "three values": (([1, 2, 3], {}, "x"), f"{ENTRY}dict: {{}}"),
    "a text": ("123", f"{EXPECTED}str: '123'"),
    "one number": (jnp.float32(1), f"{EXPECTED}float: 1.0"),
    "a column": (
        np.zeros((3, 1)),
        ", row 0, prompt '5', response '.*': 1 numbers for a response of 3 tokens",
    ),
    "a number in quotation marks": ([1, np.str_("2"), 3], f"{ENTRY}str: '2'"),
    "an array in a list": (
        [1, np.ones(1), 3],
        ", row 1, prompt '65', response '.*': 1 numbers for a response of",
    ),
    "a complex number": ([1, np.complex64(2j), 3], f"{ENTRY}complex: "),
    "a component": (([1, 2, 3], {"tone": "abc"}), f", component 'tone'{EXPECTED}str"),
    "dense components": (
        ([1, 2, 3], {"tone": [[1], 2, 3]}),
        ", row 0, prompt '5', response '.*': 1 numbers for a response of 3 tokens",
    ),
}


@pytest.mark.parametrize("what", NO_SCORES)
def test_a_reward_function_that_gives_no_numbers_is_the_users_mistake(what):
    result, message = NO_SCORES[what]

    def politeness(prompts, responses):
        return result

    with pytest.raises(UserError, match=f"^the reward function politeness{message}"):
        rewards.on_host(rewards.from_text(politeness, Spelled()), a_rollout(), {})


@pytest.mark.parametrize(
    "scores",
    [
        [1, True, None],
        (1, np.True_, None),
        np.array([1, 1, None]),
        [jnp.float32(1), np.array(1), None],
    ],
)
def test_what_a_reward_function_may_return(scores):
    reward = rewards.from_text(lambda prompts, responses: scores, Spelled())
    rollout, _ = rewards.on_host(reward, a_rollout(), {})
    assert_array_equal(rollout.scores, [1, 1, 0, 0])
    assert_array_equal(rollout.response_mask.any(axis=1), [True, True, False, False])


def test_a_host_reward_returns_a_pair():
    for result in ([1, 2, 3, 4], ([1, 2, 3, 4], None), {"scores": [1, 2, 3, 4]}):
        with pytest.raises(UserError, match=r"^the judge: expected a pair, .* got (list|tuple|d)"):
            rewards.on_host(lambda *_, result=result: result, a_rollout(), {}, "the judge")


@pytest.mark.parametrize("code", [0, None, "done"])
def test_a_reward_cannot_end_the_run_as_if_it_were_done(code):
    def leaves(prompts, responses):
        raise SystemExit(code)

    with pytest.raises(UserError, match=rf"^the reward function leaves called sys.exit\({code!r}"):
        rewards.on_host(rewards.from_text(leaves, Spelled()), a_rollout(), {})

    def interrupted(prompts, responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewards.on_host(rewards.from_text(interrupted, Spelled()), a_rollout(), {})


def test_a_batch_of_absent_rows_shows_the_function_nothing():
    reward = rewards.from_text(lambda prompts, responses: pytest.fail("called"), Spelled())
    rollout, _ = rewards.on_host(reward, a_rollout(response_mask=np.zeros((4, 6), np.int32)), {})
    assert_array_equal(rollout.scores, [0, 0, 0, 0])


# Shaping


def test_kl_shaped_takes_dense_rewards_and_needs_no_reference_without_a_coefficient():
    mask = a_rollout().response_mask
    dense = a_rollout(
        ref_log_probs=mask * np.float32(-1 - math.log(2)), rewards=np.full((4, 6), 7.0)
    )
    assert_allclose(rewards.kl_shaped(dense, 1.0), mask * (7 - math.log(2)), atol=1e-5)
    scored = a_rollout(scores=np.ones(4, np.float32))
    assert_array_equal(rewards.kl_shaped(scored, 0.0).sum(axis=1), [1, 1, 1, 0])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    references.batches(shapes=((4, 8),), arrays=3),
    st.sampled_from(["k1", "k2", "k3"]),
    st.sampled_from([0.0, 1e4, -1e4, math.nan]),
)
def test_kl_shaped_equals_a_loop_whatever_is_in_masked_columns(batch, estimator, poison):
    (log_probs, ref, scores), mask = batch
    expected = np.zeros(mask.shape)
    for i in range(len(mask)):
        said = references.columns(mask[i])
        for t in said:
            expected[i, t] = -0.3 * references.kl(
                float(log_probs[i, t]) - float(ref[i, t]), estimator
            )
        if said:
            expected[i, said[-1]] += scores[i, 0]
    log_probs, ref = (references.poisoned(array, mask, poison) for array in (log_probs, ref))
    scores = references.poisoned(scores[:, 0], mask.any(axis=1), poison)
    rollout = Rollout(np.zeros_like(mask), mask, mask, log_probs, scores=scores, ref_log_probs=ref)
    shaped = kl_shaped(rollout, 0.3, estimator)
    assert_allclose(shaped, expected, rtol=1e-4, atol=1e-5)


def test_missing_eos_by_hand():
    scores = jnp.array([1.0, 2, 3, 4])
    assert_allclose(rewards.missing_eos(a_rollout(), scores, EOS, penalty=5.0), [1, -3, 3, 4])
    # An EOS before the last token, such as one at the end of an earlier turn, does not finish the
    # response.
    cut = a_rollout(tokens=np.where(np.arange(6)[None, :] == 2, EOS, a_rollout().tokens))
    assert_allclose(rewards.missing_eos(cut, scores, EOS, score=-1.0), [1, -1, 3, 4])


def test_overlong_penalty_by_hand():
    """DAPO's eq. 13 with a buffer of 4 before 10 tokens: free up to 6, a quarter for each further
    one, 1 from 10 on.
    """
    batch = responses(*([5] * length for length in (1, 6, 7, 9, 10, 12)))
    penalised = rewards.overlong_penalty(batch, jnp.ones(6), max_length=10, buffer=4, penalty=2.0)
    assert_allclose(penalised, [1, 1, 0.5, -0.5, -1, -1], rtol=1e-6)


def test_length_by_hand():
    assert_array_equal(scores_of(rewards.length(), a_rollout()), [3, 4, 3, 0])
    assert_allclose(rewards.length_penalty(a_rollout(), jnp.ones(4), 0.5), [-0.5, -1, -0.5, 1])
    assert_allclose(rewards.length_penalty(a_rollout(), jnp.ones(4), 0.5, target=3), [1, 0.5, 1, 1])


def test_adaptive_kl_by_hand():
    def moved(kl):
        return float(jax.jit(rewards.adaptive_kl)(0.15, kl, target=6.0, horizon=10000, n=512))

    expected = [0.148464, 0.15, 0.15 * (1 + 0.1 * 0.0512), 0.151536]
    assert [moved(kl) for kl in (0.0, 6.0, 6.6, 20.0)] == pytest.approx(expected, abs=1e-6)


def test_turns_are_closed_behind_an_answer_or_in_the_place_of_its_end():
    """Ends are 1 and 2, what closes is 2, 9: an answer that was cut, one that ended by 1, one that
    is shorter, a missing row, and an empty answer to a prompt that ends by 1.
    """
    tokens = jnp.array([[5, 1, 7, 8], [5, 1, 7, 1], [5, 1, 7, 0], [0, 0, 0, 0], [5, 1, 0, 0]])
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    how = {"closing": (2, 9), "ends": (1, 2), "prompt_length": 2}
    closed, real = close_turns(tokens, mask, **how)
    texts = [row[kept != 0].tolist() for row, kept in zip(closed, real, strict=True)]
    assert texts == [[5, 1, 7, 8, 2, 9], [5, 1, 7, 2, 9], [5, 1, 7, 2, 9], [], [5, 1, 2, 9]]
