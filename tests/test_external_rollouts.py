"""Rollouts of another engine: texts and token ids by hand, what is refused, importance weights."""

import math
from functools import partial

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from tabular import assert_identical

from rlhf_jax import rewards, rollout
from rlhf_jax.data.tokenizers import characters
from rlhf_jax.errors import UserError
from rlhf_jax.types import PolicyOutput, Rollout

LETTERS = characters("abcdefghij")  # pad 0, EOS 1, a 2, b 3, ...


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
        tokens=np.int32(
            [[2, 3, 4, 5, 0, 0], [0, 4, 5, 1, 0, 0], [0, 2, 5, 6, 1, 0], [2, 3, 7, 0, 0, 0]]
        ),
        attention_mask=np.int32(
            [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]
        ),
        response_mask=np.int32(
            [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0]]
        ),
        log_probs=np.float32(
            [[0, 0, -1, -2, 0, 0], [0, 0, -3, -4, 0, 0], [0, 0, -5, -6, -7, 0], [0, 0, -8, 0, 0, 0]]
        ),
        row_ids=np.int32([7, 5, 7, 9]),
        prompt_length=2,
    )
    assert_identical(made, expected)


def test_ids_say_whether_eos_ended_them_and_prompts_have_the_width_that_is_asked_for():
    narrow = rollout.from_text(
        [[2], [2, 3]], [[5, 1], [6]], LETTERS, log_probs=[[-1, -2], [-3]], prompt_length=3
    )
    assert_array_equal(narrow.tokens, [[0, 0, 2, 5, 1], [0, 2, 3, 6, 0]])
    assert_array_equal(narrow.row_ids, [0, 1])
    missing_eos = jax.jit(partial(rewards.missing_eos, eos_id=1, score=-1.0))
    assert_array_equal(missing_eos(narrow, np.array([3.0, 3.0])), [3, -1])


def test_turns_of_others_are_holes():
    """The policy, its EOS, a user's turn with an EOS of its own, the policy again; and a row it
    said nothing of.
    """
    made = rollout.from_text(
        [[2], [2]],
        [[5, 1, 6, 1, 7], [5, 6]],
        LETTERS,
        log_probs=[[-1, -2, None, math.nan, -3, -4], [None, 5.0]],
        finished=[True, False],
        masks=[[1, 1, 0, 0, 1, 1], [0, 0]],
    )
    assert_array_equal(made.tokens, [[2, 5, 1, 6, 1, 7, 1], [2, 5, 6, 0, 0, 0, 0]])
    assert_array_equal(made.attention_mask, [[1] * 7, [1, 1, 1, 0, 0, 0, 0]])
    assert_array_equal(made.response_mask, [[0, 1, 1, 0, 0, 1, 1], [0] * 7])
    assert_array_equal(made.log_probs, [[0, -1, -2, 0, 0, -3, -4], [0] * 7])
    # An EOS in somebody else's turn did not end the row.
    cut = rollout.from_text(
        [[2]], [[5, 1]], LETTERS, log_probs=[[-1, 0]], finished=[False], masks=[[1, 0]]
    )
    assert_array_equal(cut.response_mask, [[0, 1, 0]])


REFUSED = [
    ({"log_probs": [[-1, -2], [-3]]}, "row 1: 1 log_probs for 2 response tokens, EOS included"),
    (
        {"finished": [True, True]},
        "row 0: 2 log_probs for 3 response tokens, EOS included; .* token ids are safer",
    ),
    (
        {"responses": ["abc", [5, 1]], "finished": [False, True]},
        "row 0: 2 log_probs for 3 response tokens",
    ),
    ({"masks": [[1, 1], [1]]}, "row 1: 1 masks for 2 response tokens"),
    (
        {"responses": ["ab", [5, 1]]},
        "row 0: a text does not show whether EOS ended it: give finished",
    ),
    ({"finished": [False, False]}, "row 1: finished is False, but its last token is EOS, 1"),
    ({"prompts": [[2], ""]}, "row 1: the prompt has no tokens"),
    (
        {"responses": [[5, 6], []], "log_probs": [[-1, -2], []]},
        "row 1: the response has no tokens",
    ),
    ({"prompts": [[2], [12]]}, "row 1, prompt: token id 12 is outside the vocabulary of 12"),
    ({"prompts": [[2], [2.0]]}, "row 1, prompt: expected a text or a list of token ids"),
    ({"prompts": ["xy", [2]]}, "alphabet lacks 'x'"),
    (
        {"prompt_length": 2, "prompts": [[2], [2, 3, 4]]},
        "row 1: the prompt has 3 tokens, prompt_length is 2",
    ),
    ({"response_length": 1}, "row 0: the response has 2 tokens, response_length is 1"),
    (
        {"log_probs": [[-1, -2], [-3, 0.5]]},
        "row 1: the log-probability of response token 1 .*: 0.5",
    ),
    (
        {"log_probs": [[math.nan, -2], [-3, -4]]},
        "row 0: the log-probability of response token 0 .*: nan",
    ),
    (
        {"log_probs": [[-1, -math.inf], [-3, -4]]},
        "row 0: the log-probability of response token 1 .*: -inf",
    ),
    ({"log_probs": [[-1, {}], [-3, -4]]}, "row 0: log_probs must be numbers"),
    (
        {"responses": [[5, 6], [1, 5]]},
        "row 1: the policy has tokens after EOS, response token 0 of 2",
    ),
    ({"responses": [[5, 6]]}, "responses: expected one entry for each prompt, 2, got 1"),
    ({"prompts": [], "responses": [], "log_probs": []}, "prompts: expected at least one row"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_is_refused_names_the_row(changes, message):
    good = {"prompts": [[2], [2]], "responses": [[5, 6], [5, 1]], "log_probs": [[-1, -2], [-3, -4]]}
    rollout.from_text(tokenizer=LETTERS, **good)
    with pytest.raises(UserError, match=message):
        rollout.from_text(tokenizer=LETTERS, **{**good, **changes})


def test_weights_by_hand():
    """Ratios 1/2, 4 and 2 under a cap of 2; a hole and what lies outside the response, NaN
    included, get 0.
    """
    engine = np.log(np.array([[1.0, 0.5, 0.125, np.nan, 0.25]], np.float32))
    policy = np.log(np.array([[1.0, 0.25, 0.5, 0.5, 0.5]], np.float32))
    mask = np.array([[0, 1, 1, 0, 1]])
    given = Rollout(np.zeros((1, 5), np.int32), np.ones((1, 5), np.int32), mask, engine)

    @partial(jax.jit, static_argnums=0)
    def rescored(cap, scale=1.0):
        policy_fn = lambda scale, *_: PolicyOutput(scale * policy, policy)  # noqa: E731
        return rollout.rescore(given, scale, policy_fn=policy_fn, importance_cap=cap)

    capped = rescored(2.0)
    assert_allclose(capped.importance_weights, [[0, 0.5, 2, 0, 2]], rtol=1e-6)
    assert_allclose(rescored(math.inf).importance_weights, [[0, 0.5, 4, 0, 2]], rtol=1e-6)
    assert_allclose(capped.log_probs, np.where(mask, policy, 0))
    assert jax.jit(rollout.truncated_share)(capped, 3.0) == 0
    share = jax.jit(rollout.truncated_share)(capped, 3.0, importance_floor=0.5)
    assert share == np.float32(1 / 3)
    assert jax.jit(rollout.truncated_share)(rescored(math.inf), 3.0) == np.float32(1 / 3)
    assert jax.eval_shape(partial(rescored, None)).importance_weights is None
    assert jax.grad(lambda scale: rescored(2.0, scale).importance_weights.sum())(1.0) == 0
    with pytest.raises(ValueError, match="cap must be above 0"):
        rescored(0.0)
