"""The rewards and algorithms that the documentation shows, as it shows them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
from builders import ROOT
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import Comparisons, PolicyOutput, Rollout, TrainState, dpo, rewards
from rlhf_jax.algorithms import online_dpo
from rlhf_jax.data.tokenizers import train_bpe
from rlhf_jax.rewards import Unscored


def shown(name):
    """A module of the documentation's."""
    path = ROOT / "docs" / "programs" / f"{name}.py"
    module = types.ModuleType(name)
    exec(compile(path.read_text("utf-8"), path, "exec"), vars(module))
    return module


COPIED = shown("copied")
FENCED = "Here:\n```python\ndef f(x):\n    return {}\n```\nDone."


def test_rewards_of_form_and_length():
    whole = "<think>3 + 4</think>\n<answer>7</answer>"
    said = [whole, f"{whole} more", "<answer>7</answer>", ""]
    assert COPIED.form(said) == [1, 0, 0, 0]
    assert COPIED.tags([*said, "<answer>" * 2]) == [1, 1, 0.5, 0, 0]
    ids = [[1] * n for n in (0, 10, 20, 200, 300, 500)]
    assert COPIED.soft_length(ids) == [0, 0.5, 1, 1, 0.5, 0]
    scores, parts = COPIED.careful(["p"] * 4, said)
    assert scores == [2, 1, 0.5, 0]
    assert parts == {"form": [1, 0, 0, 0], "tags": [1, 1, 0.5, 0]}


def test_code_is_run_with_its_tests():
    tests = ["assert f(2) == 4", "assert f(3) == 6"]
    said = [FENCED.format("2 * x"), FENCED.format("4"), "no code", FENCED.format("x")]
    given = [tests, tests, tests, None]
    right, half, none, unscored = COPIED.code(said, given)
    assert (right, half, none) == (1, 0.5, 0)
    assert isinstance(unscored, Unscored)
    assert COPIED.only_code(said, given, ["code", "maths", "code", "maths"]) == [1, None, 0, None]


def test_language_and_tasks():
    latin, mixed, none = COPIED.language(["Ein Schloß.", "да no", "12!"])
    assert (latin, mixed) == (1, 0.5)
    assert isinstance(none, Unscored)
    said = COPIED.only_maths([" 7", "8", "9"], ["7", "7", None], ["maths", "maths", "code"])
    assert said == [1, 0, None]


def test_repeated_lines_are_punished_where_they_begin():
    assert COPIED.no_repeated_lines(["a\nb\n\na\n\na"]) == [[(5, -1.0), (8, -1.0)]]
    tokenizer = train_bpe(["ab"], 258)
    ids = tokenizer.encode("pa\na")
    tokens = np.array([[*ids, tokenizer.eos_id]], np.int32)
    mask = np.array([[0, 1, 1, 1, 1]])
    rollout = Rollout(tokens, np.ones_like(mask), mask, 0.0 * mask)
    for name, expected in (("no_repeated_lines", [[0, 0, 0, -1, 0]]), ("remote", [3])):
        reward = rewards.from_text(getattr(COPIED, name), tokenizer, tokenizer.decode_raw)
        assert_array_equal(rewards.on_host(reward, rollout, {})[0].scores, expected)


# --- Algorithms


def pairs_rollout(**fields):
    """Two prompts with two responses of two tokens each."""
    tokens = jnp.array([[0, 1, 2], [0, 2, 2], [0, 1, 1], [0, 2, 2]])
    mask = jnp.array([[0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 0]])
    ref = jnp.log(jnp.full(tokens.shape, 0.25))
    return Rollout(tokens, jnp.ones_like(mask), mask, 0.0 * ref, ref_log_probs=ref, **fields)


def table_policy(params, tokens, attention_mask, key):
    log_probs = jax.nn.log_softmax(params)[tokens]
    return PolicyOutput(log_probs, jnp.zeros_like(log_probs))


def test_online_dpo_makes_the_step_of_dpo_on_the_judged_pairs():
    """A tie does not count."""
    rollout = pairs_rollout(scores=jnp.array([0.2, 0.8, 0.5, 0.5]))
    optimizer = optax.sgd(1.0)
    state = TrainState.create(jnp.array([0.0, 0.5, -0.5]), optimizer)
    how = {"policy_fn": table_policy, "optimizer": optimizer}
    key = jax.random.key(0)
    after, metrics = online_dpo.update(state, rollout, key, config=online_dpo.Config(), **how)
    chosen_first = Comparisons(
        rollout.tokens[None, :2],
        rollout.attention_mask[None, :2],
        rollout.response_mask[None, :2],
        best=jnp.array([1]),
        ref_log_probs=2 * jnp.log(jnp.full((1, 2), 0.25)),
    )
    expected, _ = dpo.update(state, chosen_first, key, config=dpo.Config(beta=0.1), **how)
    assert_allclose(after.params, expected.params, rtol=1e-6)
    assert_allclose(metrics["dpo/accuracy"], 0)
    assert float(jnp.abs(after.params - state.params).max()) > 0.01


def test_the_judge_of_pairs_prefers_the_shorter_response():
    shorter = shown("prefer").shorter
    assert shorter(["p"] * 3, ["a", "aa", "a"], ["aa", "a", "b"]) == [1, 0, 0.5]
