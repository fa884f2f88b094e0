"""rewards: where scores come from (jittable and on the host), and how they are shaped."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial

from rlhf_jax import Rollout, rewards
from rlhf_jax.errors import UserError

EOS, PAD = 9, 0
POISONS = [1e4, -1e4, math.nan]
call = jax.jit(lambda fn, rollout: fn(rollout))


def scores_of(fn, rollout):
    scores, parts = call(fn, rollout)
    assert parts == {}
    return scores


def a_rollout(**fields):
    """Four rows: ended, cut off, with a hole, and absent."""
    tokens = np.array([[0, 5, 4, 5, EOS, 0], [6, 5, 5, 5, 5, 5], [7, 8, 1, 2, 3, EOS], [5, 5, 5, EOS, 0, 0]], np.int32)
    response = np.array([[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]], np.int32)
    attention = (tokens != PAD).astype(np.int32)
    return Rollout(tokens, attention, response, np.where(response, -1.0, 0.0).astype(np.float32)).replace(**fields)


def constant(value):
    return lambda rollout: (jnp.full(rollout.tokens.shape[0], value, jnp.float32), {})


# Jittable rewards


def test_token_count_by_hand():
    np.testing.assert_array_equal(scores_of(rewards.token_count(5), a_rollout()), [2, 5, 0, 3])
    np.testing.assert_array_equal(scores_of(rewards.token_count(5, cap=3), a_rollout()), [2, 3, 0, 3])
    np.testing.assert_array_equal(scores_of(rewards.token_count(5, include_prompt=False), a_rollout()), [1, 4, 0, 0])
    np.testing.assert_array_equal(scores_of(rewards.token_count(5), responses([5] * 120)), [100])
    # A pad is no token, even when its id is the one that is counted.
    np.testing.assert_array_equal(scores_of(rewards.token_count(PAD), a_rollout()), [0, 0, 0, 0])


def table_score(params, tokens, attention_mask, key):
    assert key is None  # scoring is without dropout
    return jnp.where(attention_mask != 0, params["table"][tokens], 0.0).sum(axis=1)


def test_a_models_parameters_travel_through_jit_as_arguments():
    fn = rewards.from_model(table_score, {"table": jnp.arange(1_000_000.0)})
    assert isinstance(fn, Partial)
    np.testing.assert_array_equal(scores_of(fn, a_rollout()), [23, 31, 30, 24])
    for reward in (fn, rewards.weighted({"a": (fn, 2.0)}), rewards.ensemble([fn, fn])):
        assert len(call.lower(reward, a_rollout()).as_text()) < 100_000  # the table would be megabytes of text
    carrying = rewards.from_model(Partial(lambda bias, params, *inputs: params + bias, jnp.ones(4)), jnp.zeros(4))
    assert len(jax.tree.leaves(carrying)) == 2  # what a Partial carries stays visible inside another


def test_new_parameters_do_not_compile_again():
    traces = []

    def score(params, tokens, attention_mask, key):
        traces.append(1)
        return params["w"] * jnp.ones(tokens.shape[0])

    for w in (1.0, 2.0):
        np.testing.assert_array_equal(scores_of(rewards.from_model(score, {"w": jnp.float32(w)}), a_rollout()), [w] * 4)
    assert len(traces) == 1


@pytest.mark.parametrize(("how", "expected"), [("mean", 3.0), ("min", 1.0), ("uncertainty", 3.0 - 0.5 * 8 / 3)])
def test_ensemble_by_hand(how, expected):
    fn = rewards.ensemble([constant(1.0), constant(3.0), constant(5.0)], how, coef=0.5)
    scores, parts = call(fn, a_rollout())
    np.testing.assert_allclose(scores, [expected] * 4, rtol=1e-6)
    np.testing.assert_allclose(parts["uncertainty"], [math.sqrt(8 / 3)] * 4, rtol=1e-6)


def test_weighted_sums_its_parts_and_reports_each_before_its_weight():
    inner = rewards.ensemble([constant(1.0), constant(3.0)])
    fn = rewards.weighted({"model": (inner, 0.5), "fives": (rewards.token_count(5), -1.0)})
    scores, parts = call(fn, a_rollout())
    np.testing.assert_allclose(scores, [-1, -4, 1, -2])
    np.testing.assert_allclose(parts["model"], [2, 2, 2, 2])
    np.testing.assert_allclose(parts["fives"], [2, 5, 0, 3])
    np.testing.assert_allclose(parts["model/uncertainty"], [1, 1, 1, 1])
    assert len(parts) == 3


def test_combined_rewards_refuse_what_they_cannot_mean():
    with pytest.raises(ValueError, match=r"mean, min, uncertainty.*'max'"):
        rewards.ensemble([constant(1.0)], "max")
    for combine, nothing in ((rewards.ensemble, []), (rewards.weighted, {})):
        with pytest.raises(ValueError, match="at least one"):
            combine(nothing)
    for dense in (jnp.zeros((4, 6)), jnp.zeros((4, 1))):
        with pytest.raises(AssertionError, match=r"\(4, \d\) but expected \(4,?\)"):
            rewards.weighted({"dense": (lambda rollout, dense=dense: (dense, {}), 1.0)})(a_rollout())


def responses(*rows):
    """Rows of response tokens, None for a hole, after a prompt token 1; padded with 1s that are no response."""
    length = 1 + max(len(row) for row in rows)
    tokens, mask = np.ones((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        for t, token in enumerate(row):
            tokens[i, t + 1], mask[i, t + 1] = (7, 0) if token is None else (token, 1)
    return Rollout(tokens, np.ones_like(mask), mask, np.zeros(mask.shape, np.float32))


def test_diversity_by_hand():
    """Bigrams. Row 0: 11, 12, 23, of which 12 is row 1's too. Row 1: 12 (twice), 21, of which 21 is its own.
    Row 2: 77 across a hole. Rows 3 and 4: too short, absent. Row 5: 23, which is row 0's."""
    batch = responses([1, 1, 2, 3], [1, 2, 1, 2], [7, None, 7], [3], [], [2, 3])
    np.testing.assert_allclose(scores_of(rewards.diversity(), batch), [1 / 3, 1 / 2, 1, 0, 0, 0])
    np.testing.assert_allclose(scores_of(rewards.diversity(group_size=3), batch), [2 / 3, 1 / 2, 1, 0, 0, 1])
    np.testing.assert_allclose(scores_of(rewards.diversity(ngram=1, group_size=2), batch), [1 / 3, 0, 1, 1, 0, 1])
    same = responses([4, 5, 6], [4, 5, 6])
    np.testing.assert_allclose(scores_of(rewards.diversity(ngram=3), same), [0, 0])
    np.testing.assert_allclose(scores_of(rewards.diversity(ngram=9), same), [0, 0])  # longer than the row


def ngrams_of(rollout, i, n):
    said = rollout.tokens[i][rollout.response_mask[i] != 0].tolist()
    return [tuple(said[t : t + n]) for t in range(len(said) - n + 1)]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from([1, 2, 3, None]), min_size=8, max_size=8), min_size=4, max_size=4))
def test_ngrams_equal_a_loop(rows):
    batch = responses(*rows)
    repeated, new = scores_of(rewards.repetition(2), batch), scores_of(rewards.diversity(group_size=2), batch)
    for i in range(4):
        grams, others = ngrams_of(batch, i, 2), set(ngrams_of(batch, i ^ 1, 2))
        kinds = set(grams)
        assert float(repeated[i]) == pytest.approx(1 - len(kinds) / len(grams) if grams else 0.0, abs=1e-6)
        assert float(new[i]) == pytest.approx(len(kinds - others) / len(kinds) if kinds else 0.0, abs=1e-6)


def test_ngram_terms_refuse_what_they_cannot_mean():
    with pytest.raises(ValueError, match="4 rows do not divide into groups of 3"):
        rewards.diversity(group_size=3)(a_rollout())
    with pytest.raises(ValueError, match="group_size: expected at least 2"):
        rewards.diversity(group_size=1)
    for make in (rewards.diversity, rewards.repetition):
        with pytest.raises(ValueError, match="ngram: expected at least 1"):
            make(ngram=0)


# Rewards on the host


class Spelled:
    """Ids as digits; EOS and pad are left out, as tokenizers here do."""

    def decode(self, ids):
        assert all(type(i) is int for i in ids)
        return "".join(str(i) for i in ids if i not in (EOS, PAD))


@pytest.mark.parametrize("absent", range(4))
def test_from_text_shows_present_rows_their_texts_and_columns(absent):
    """Whichever row is absent: the columns and the scores are those of the right rows."""

    def fn(prompts, responses, answers):
        assert prompts == [text for text in ("5", "65", "78", "555") if text != shown[absent][0]]
        assert responses == [text for text in ("45", "5555", "13", "") if text != shown[absent][1]]
        assert answers == [answer for answer in "abcd" if answer != "abcd"[absent]]
        return [numbers[answer] for answer in answers], {"tone": [-numbers[answer] for answer in answers]}

    shown = [("5", "45"), ("65", "5555"), ("78", "13"), ("555", "")]
    numbers = {"a": 1, "b": 2.5, "c": np.float32(3), "d": 7}
    mask = a_rollout().response_mask.copy()
    mask[3, 3] = 1  # EOS alone
    mask[absent] = 0
    reward, columns = rewards.from_text(fn, Spelled()), {"answers": list("abcd")}
    rollout, parts = rewards.on_host(reward, a_rollout(response_mask=mask), columns)
    expected = np.where(np.arange(4) == absent, 0, [1, 2.5, 3, 7])
    np.testing.assert_array_equal(rollout.scores, expected)
    np.testing.assert_array_equal(parts["tone"], -expected)
    assert rollout.scores.dtype == np.float32
    np.testing.assert_array_equal(rollout.response_mask, mask)
    assert rollout.response_mask.dtype == mask.dtype


def test_none_takes_the_row_out():
    reward = rewards.from_text(lambda prompts, responses: ([1, None, 3], {"part": [4, math.nan, None]}), Spelled())
    rollout, parts = rewards.on_host(reward, jax.tree.map(jnp.asarray, a_rollout()), {})
    np.testing.assert_array_equal(rollout.scores, [1, 0, 3, 0])
    np.testing.assert_array_equal(rollout.response_mask[1], 0)
    np.testing.assert_array_equal(rollout.response_mask[[0, 2]], a_rollout().response_mask[[0, 2]])
    np.testing.assert_array_equal(parts["part"], [4, 0, 0, 0])


def test_a_number_that_is_not_finite_stops_with_rows_and_prompts():
    for bad in (math.nan, math.inf, np.float32("nan"), 1e300):
        reward = rewards.from_text(lambda prompts, responses, bad=bad: [1, bad, 3], Spelled())
        with pytest.raises(FloatingPointError, match=r"row 1, prompt '65'") as raised:
            rewards.on_host(reward, a_rollout(), {})
        assert "row 0" not in str(raised.value)
    numbered = a_rollout(row_ids=np.arange(10, 14))
    with pytest.raises(FloatingPointError, match=r"row 2 \(data row 12\)"):
        rewards.on_host(lambda rollout, columns: (np.array([1, 2, np.nan, 4]), {}), numbered, {})
    with pytest.raises(FloatingPointError, match=r"part 'tone'.*row 0"):
        rewards.on_host(lambda rollout, columns: ([1, 2, 3, 4], {"tone": [math.nan] * 4}), a_rollout(), {})
    # An absent row's number is read by nobody.
    rewards.on_host(lambda rollout, columns: ([1, 2, 3, math.nan], {}), a_rollout(), {})


@pytest.mark.parametrize(
    ("result", "message"),
    [([1, 2], "expected 3 scores, one for each row, got 2"), (None, "got None"), ([1, "good", 3], "row 1.*'good'")],
)
def test_a_reward_function_that_gives_no_numbers_is_the_users_mistake(result, message):
    with pytest.raises(UserError, match=message):
        rewards.on_host(rewards.from_text(lambda prompts, responses: result, Spelled()), a_rollout(), {})


def test_a_batch_of_absent_rows_shows_the_function_nothing():
    reward = rewards.from_text(lambda prompts, responses: pytest.fail("called"), Spelled())
    rollout, _ = rewards.on_host(reward, a_rollout(response_mask=np.zeros((4, 6), np.int32)), {})
    np.testing.assert_array_equal(rollout.scores, [0, 0, 0, 0])


# Shaping


def test_kl_shaped_takes_dense_rewards():
    log_probs = np.where(a_rollout().response_mask, np.float32(-1), 0)
    dense = a_rollout(
        log_probs=log_probs, ref_log_probs=log_probs - np.float32(math.log(2)), rewards=np.full((4, 6), 7.0)
    )
    k = 0.693147
    np.testing.assert_allclose(rewards.kl_shaped(dense, 1.0)[2], [0, 0, 7 - k, 0, 7 - k, 7 - k], atol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(references.batches(arrays=3), st.sampled_from(["k1", "k2", "k3"]), st.sampled_from([0.0, *POISONS]))
def test_kl_shaped_equals_a_loop_whatever_is_in_masked_columns(batch, estimator, poison):
    (log_probs, ref, scores), mask = batch
    expected = np.zeros(mask.shape)
    for i in range(len(mask)):
        said = references.columns(mask[i])
        for t in said:
            expected[i, t] = -0.3 * references.kl(float(log_probs[i, t]) - float(ref[i, t]), estimator)
        if said:
            expected[i, said[-1]] += scores[i, 0]
    present = mask.any(axis=1)
    tokens = np.zeros(mask.shape, np.int32)
    log_probs, ref = (references.poisoned(array, mask, poison) for array in (log_probs, ref))
    scores = references.poisoned(scores[:, 0], present, poison)
    rollout = Rollout(tokens, tokens, mask, log_probs, scores=scores, ref_log_probs=ref)
    shaped = jax.jit(rewards.kl_shaped, static_argnums=2)
    np.testing.assert_allclose(shaped(rollout, 0.3, estimator), expected, rtol=1e-4, atol=1e-5)


def test_kl_shaped_needs_scores_and_a_reference():
    with pytest.raises(ValueError, match="got neither"):
        rewards.kl_shaped(a_rollout(), 0.1)
    scored = a_rollout(scores=np.ones(4, np.float32))
    with pytest.raises(ValueError, match="ref_log_probs is None"):
        rewards.kl_shaped(scored, 0.1)
    np.testing.assert_array_equal(rewards.kl_shaped(scored, 0.0).sum(axis=1), [1, 1, 1, 0])


def test_missing_eos_by_hand():
    scores = jnp.array([1.0, 2, 3, 4])
    np.testing.assert_allclose(rewards.missing_eos(a_rollout(), scores, EOS, penalty=5.0), [1, -3, 3, 4])
    np.testing.assert_allclose(rewards.missing_eos(a_rollout(), scores, EOS, score=-1.0), [1, -1, 3, 4])
    # An EOS before the last token, such as one at the end of an earlier turn, does not finish the response.
    tokens = np.where(np.arange(6)[None, :] == 2, EOS, a_rollout().tokens)
    cut = a_rollout(tokens=tokens)
    np.testing.assert_allclose(rewards.missing_eos(cut, scores, EOS, score=-1.0), [1, -1, 3, 4])
    for both in ({}, {"penalty": 1.0, "score": 0.0}):
        with pytest.raises(ValueError, match="one of penalty and score"):
            rewards.missing_eos(a_rollout(), scores, EOS, **both)


def test_length_by_hand():
    np.testing.assert_array_equal(scores_of(rewards.length(), a_rollout()), [3, 4, 3, 0])
    np.testing.assert_allclose(rewards.length_penalty(a_rollout(), jnp.ones(4), 0.5), [-0.5, -1, -0.5, 1])
    np.testing.assert_allclose(rewards.length_penalty(a_rollout(), jnp.ones(4), 0.5, target=3), [1, 0.5, 1, 1])


def test_adaptive_kl_by_hand():
    def moved(kl):
        return float(jax.jit(rewards.adaptive_kl)(0.15, kl, target=6.0, horizon=10000, n=512))

    assert moved(20.0) == pytest.approx(0.151536, abs=1e-6)
    assert moved(0.0) == pytest.approx(0.148464, abs=1e-6)
    assert moved(6.6) == pytest.approx(0.15 * (1 + 0.1 * 0.0512), abs=1e-6)
    assert moved(6.0) == pytest.approx(0.15)
    with pytest.raises(ValueError, match="horizon"):
        rewards.adaptive_kl(0.1, 1.0, target=6.0, horizon=0, n=1)
