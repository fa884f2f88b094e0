"""MaxRL, the pass@k objective, GDPO and the mean of the batch as a baseline: against their formulas
in NumPy, their objectives by enumeration, and in whole runs.
"""

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular
from builders import goes_on_alike, letters_run, metric_rows, soak, with_rl
from jax.sharding import PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import advantages, sharding, training
from rlhf_jax.algorithms import gdpo, maxrl, pass_at_k, rloo
from rlhf_jax.config import Optimizer
from rlhf_jax.errors import UserError
from rlhf_jax.metrics import best_at_k, majority_at_k

SIZES = [(2, 2), (3, 2), (4, 3), (6, 4), (7, 7)]  # answers, k


def best_without(scores, k):
    """n times eq. 33 of Walder and Karkhanis: over all sets of k answers with i, the best score of
    the set minus the best of the set without i."""
    n = len(scores)
    found = np.zeros(n)
    for chosen in itertools.combinations(range(n), k):
        for i in chosen:
            others = [scores[j] for j in chosen if j != i]
            found[i] += max(*others, scores[i]) - max(others)
    return n * found / math.comb(n, k)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_pass_at_k_is_its_formula(n, k):
    """Also with ties, missing answers (which hold NaN) and a group with fewer than k answers."""
    rng = np.random.default_rng(n)
    scores = np.full((3, n + 2), np.nan, np.float32)
    mask = np.zeros((3, n + 2))
    mask[:2, rng.permutation(n + 2)[:n]] = 1
    mask[2, : k - 1] = 1
    scores[0, mask[0] > 0] = rng.integers(0, 2, n)
    scores[1, mask[1] > 0] = rng.normal(size=n).round(1)
    scores[2, mask[2] > 0] = np.arange(k - 1)
    found = jax.jit(advantages.pass_at_k, static_argnames="k")(scores, k, mask)
    for row in (0, 1):
        expected = best_without(scores[row, mask[row] > 0], k)
        assert_allclose(found[row, mask[row] > 0], expected, rtol=1e-6, atol=1e-6)
    assert_array_equal(np.asarray(found)[mask == 0], 0)
    assert_array_equal(found[2], 0)


def test_a_group_with_a_negative_reward_has_no_likelihood():
    found = advantages.max_likelihood(jnp.array([[-1.0, 1.0], [0.0, 1.0], [0.5, 1.0]]))
    assert_array_equal(np.isnan(found), [[True] * 2, [False] * 2, [False] * 2])
    mask = jnp.array([[0, 1, 1]])
    assert_array_equal(advantages.max_likelihood(jnp.array([[-5.0, 0, 1]]), mask), [[0, -1, 1]])


def test_max_likelihood_is_its_formula():
    scores = np.array([[1, 0, 0, 1], [0, 0, 0, np.nan], [3, 1, 5, np.nan], [1, 1, 1, 1]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    found = jax.jit(advantages.max_likelihood)(scores.astype(np.float32), mask)
    expected = [[1, -1, -1, 1], [0, 0, 0, 0], [0, -2 / 3, 2 / 3, 0], [0, 0, 0, 0]]
    assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("k", [0, 1, 5])
def test_a_k_that_is_no_number_of_other_answers_is_refused(k):
    with pytest.raises(ValueError, match=f"expected 2 to 4, the answers in a group, got {k}"):
        advantages.pass_at_k(jnp.ones((2, 4)), k)
    with pytest.raises(ValueError, match="at least 2 answers in a group"):
        advantages.max_likelihood(jnp.ones((2, 1)))


# --- The objectives, by enumeration of all groups

GROUP = 4
P = np.array([0.45, 0.2, 0.35])  # of three answers
SCORES = np.array([0.0, 1.0, 0.0])
ONE_HOT = np.eye(3)


def expected_gradient(estimate, scores):
    """The mean over a group of advantages times the gradients of log-probabilities, with respect to
    the logits of P: over all groups that can be drawn, each with its probability. [3]
    """
    groups = np.array(list(itertools.product(range(3), repeat=GROUP)))
    found = np.asarray(jax.jit(estimate)(np.float32(scores)[groups]), np.float64)
    gradients = np.mean(found[:, :, None] * (ONE_HOT[groups] - P), axis=1)
    return np.prod(P[groups], axis=1) @ gradients


def gradient_of_best(k, scores=SCORES):
    """Of the expected best score of k answers, over all k that can be drawn. [3]"""
    drawn = np.array(list(itertools.product(range(3), repeat=k)))
    values = np.prod(P[drawn], axis=1) * scores[drawn].max(axis=1)
    return values @ np.sum(ONE_HOT[drawn] - P, axis=1)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_expected_gradient_is_that_of_the_best_of_k(k):
    """Of scores 0 and 1 pass@k, whose gradient is known."""
    estimate = partial(advantages.pass_at_k, k=k)
    found = expected_gradient(estimate, SCORES)
    assert_allclose(found, k * (1 - P[1]) ** (k - 1) * P[1] * (ONE_HOT[1] - P), atol=1e-6)
    scores = np.array([0.2, 2.0, -1.0])
    assert_allclose(expected_gradient(estimate, scores), gradient_of_best(k, scores), atol=1e-6)


def test_the_expected_gradient_of_maxrl_is_that_of_the_likelihood_up_to_an_order():
    """Of the sum over k below the group's size of pass@k / k, and of no other number of terms."""
    found = expected_gradient(advantages.max_likelihood, SCORES)
    terms = np.cumsum([gradient_of_best(k) / k for k in range(1, GROUP + 1)], axis=0)
    assert_allclose(found, terms[GROUP - 2], atol=1e-6)
    assert np.abs(terms - found).max(axis=1)[[GROUP - 3, GROUP - 1]].min() > 0.01


# --- Measures of several answers


def test_best_at_k_is_the_mean_over_all_choices():
    """Missing answers hold NaN; of scores 0 and 1 it is the estimator of Chen et al."""
    rng = np.random.default_rng(0)
    for n, k in [(1, 1), (3, 1), (3, 2), (6, 4), (6, 6)]:
        scores = np.full((2, n + 2), np.nan)
        mask = np.zeros((2, n + 2))
        mask[0, 1:-1] = mask[1, : k - 1] = 1
        scores[0, 1:-1] = rng.normal(size=n)
        scores[1, : k - 1] = 1
        expected = np.mean([max(few) for few in itertools.combinations(scores[0, 1:-1], k)])
        found = best_at_k(scores, k, mask)
        assert_allclose(found[0], expected, rtol=1e-12)
        assert np.isnan(found[1])
    right = np.arange(8) < 3
    expected = 1 - math.comb(5, 4) / math.comb(8, 4)
    assert_allclose(best_at_k(1.0 * right[None], 4), [expected], rtol=1e-12)


def mean_of_majorities(answers, correct, k):
    found = []
    for chosen in itertools.combinations(range(len(answers)), k):
        said = [answers[i] for i in chosen]
        most = max(map(said.count, said))
        tied = {answer for answer in said if said.count(answer) == most}
        found.append(np.mean([correct[answers == answer].mean() for answer in tied]))
    return np.mean(found)


@pytest.mark.parametrize("n", [1, 3, 5, 8])
def test_majority_at_k_is_the_mean_over_all_choices(n):
    """Ties share; equal answers with different verdicts count as their mean."""
    rng = np.random.default_rng(n)
    answers = rng.integers(0, 3, n).astype(str)
    correct = np.where(answers == "1", 1.0, np.where(answers == "2", rng.integers(0, 2, n), 0.0))
    for k in range(1, n + 1):
        found = majority_at_k(answers, correct, k)
        assert_allclose(found, mean_of_majorities(answers, correct, k), rtol=1e-9, atol=1e-12)
    unknown = np.append(correct, np.nan)
    assert majority_at_k(np.append(answers, "1"), unknown, n) == majority_at_k(answers, correct, n)
    assert np.isnan(majority_at_k(np.append(answers, "1"), unknown, n + 1))


def test_a_majority_of_many_answers():
    """Of 64 answers 40 are right, and of 32 of them almost always most."""
    answers = np.array(["1"] * 40 + [str(i % 12 + 2) for i in range(24)])
    assert majority_at_k(answers, 1.0 * (answers == "1"), 32) == pytest.approx(1, abs=1e-6)
    assert majority_at_k(answers, 1.0 * (answers == "1"), 1) == pytest.approx(40 / 64)


def test_measures_of_two_thousand_answers():
    """Binomials of 1,030 and more are no floats. Of 1,200 right answers against the product of
    chances that all of k are wrong, and the sum over votes, in exact fractions.
    """
    n, right, k = 2000, 1200, 301
    scores = np.arange(n) < right
    wrong = math.prod(Fraction(n - right - i, n - i) for i in range(k))
    assert_allclose(best_at_k(1.0 * scores[None], k), [float(1 - wrong)], rtol=1e-12)
    assert_allclose(best_at_k(np.arange(1.0 * n)[None], k), [k * (n + 1) / (k + 1) - 1], rtol=1e-12)
    few = np.arange(n) < 1010
    votes = range(k // 2 + 1, k + 1)
    wins = sum(math.comb(1010, v) * math.comb(n - 1010, k - v) for v in votes)
    found = majority_at_k(few.astype(str), 1.0 * few, k)
    assert_allclose(found, float(Fraction(wins, math.comb(n, k))), rtol=1e-10)
    assert 0.5 < found < 0.7


# --- Updates against NumPy

LENGTHS = [4, 1, 2, 0, 3, 2, 1, 4]  # two groups of four; the last of the first is missing


def component_scores(rng):
    """Two components; the second says nothing of one row."""
    return {
        "correct": np.float32([1, 0, 1, 0, 0, 1, 1, 0]),
        "format": np.where(np.arange(8) == 5, np.nan, np.float32(rng.normal(size=8))),
        "other": np.float32(rng.normal(size=8)),
    }


def grpo_advantages(values, there):
    values = values[there]
    return (values - values.mean()) / (values.std(ddof=1) + 1e-4)


def numpy_advantages(name, rollout):
    """[B] of rows that are not missing; 0 of the others."""
    present = np.array(LENGTHS) > 0
    scores = np.asarray(rollout.scores)
    found = np.zeros(8)
    if name == "batch":
        found[present] = scores[present] - scores[present].mean()
        return found
    for group in np.split(np.arange(8), 2):
        there = group[present[group]]
        if name == "maxrl":
            mean = scores[there].mean()
            found[there] = (scores[there] - mean) / mean
        elif name == "pass_at_k":
            found[there] = best_without(scores[there], 3)
        else:
            for component, weight in (("correct", 2.0), ("format", 0.5)):
                values = np.asarray(rollout.extras[component])
                known = there[~np.isnan(values[there])]
                found[known] += weight * grpo_advantages(values, known)
    if name == "gdpo":
        found[present] -= found[present].mean()
        found[present] /= found[present].std()
    return found


METHODS = {
    "maxrl": (maxrl, {"group_size": 4}),
    "pass_at_k": (pass_at_k, {"group_size": 4, "k": 3}),
    "gdpo": (
        gdpo,
        {"group_size": 4, "components": ("correct", "format"), "weights": (2.0, 0.5)}
        | {"kl_loss_coef": 0.0},
    ),
    "batch": (rloo, {"baseline": "batch", "group_size": 1}),
}


def of_four(seed=0):
    rng = np.random.default_rng(seed)
    unset = dict.fromkeys(("rewards", "advantages", "returns", "importance_weights"))
    scores = np.float32([1, 0, 2, 9, 0, 1, 1, 3])
    batch = tabular.rollout(seed, LENGTHS)
    return batch.replace(scores=scores, extras=component_scores(rng), **unset)


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_equal_numpy(name):
    """The clipped loss of a table of logits, summed over the tokens of a row, and its gradient by
    hand. GDPO means over a row's tokens, as GRPO."""
    module, settings = METHODS[name]
    config = module.Config(**settings)
    rollout = of_four()
    params = tabular.policy_params(0)
    prepared = jax.jit(partial(module.prepare, config=config))(rollout)
    advantage = numpy_advantages(name, rollout)
    mask = np.asarray(rollout.mask)
    assert_allclose(prepared.advantages, advantage[:, None] * mask, rtol=1e-5, atol=1e-6)
    how = {"policy_fn": tabular.policy_fn, "config": config}

    def loss(params):
        found, _ = module.loss(params, prepared, None, **how)
        return found.total / found.count

    total, gradient = jax.jit(jax.value_and_grad(loss))(params)

    logits = np.asarray(params["logits"], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    tokens = np.asarray(rollout.tokens)
    expected, by_hand = 0.0, np.zeros_like(logits)
    num_rows = (mask.any(axis=1)).sum()
    for row, column in zip(*np.nonzero(mask), strict=True):
        before, said = tokens[row, column - 1], tokens[row, column]
        weight = 1 / (mask[row].sum() if name == "gdpo" else 1) / num_rows
        ratio = p[before, said] / np.exp(float(rollout.log_probs[row, column]))
        clipped = np.clip(ratio, 0.8, 1.2)
        losses = -advantage[row] * ratio, -advantage[row] * clipped
        expected += weight * max(losses)
        if losses[0] >= losses[1]:
            by_hand[before] += weight * losses[0] * (np.eye(5)[said] - p[before])
    assert_allclose(total, expected, rtol=1e-5, atol=1e-6)
    assert_allclose(gradient["logits"], by_hand, rtol=1e-4, atol=1e-6)
    assert np.abs(by_hand).max() > 0.01


def test_gdpo_without_scales_adds_differences_from_the_mean():
    """A component of ten times the spread then counts ten times as much."""
    scores = np.float32([0, 1, 2, 5, 1, 1, 4, 2])
    extras = {"correct": scores, "format": 10 * scores[::-1]}
    rollout = tabular.rollout(0, [1] * 8).replace(scores=scores, extras=extras, advantages=None)
    how = {"group_size": 4, "components": ("correct", "format"), "weights": (2.0, 0.5)}
    prepared = gdpo.prepare(rollout, config=gdpo.Config(scale=False, **how))
    total = 2.0 * scores + 0.5 * 10 * scores[::-1]
    total -= np.repeat(total.reshape(2, 4).mean(axis=1), 4)
    found = np.asarray(prepared.advantages).sum(axis=1)
    assert_allclose(found, total / total.std(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_gdpo_learns_nothing_from_a_group_of_equal_components(seed):
    """Exactly, though the mean of the other groups is rounded."""
    scores = np.float32(np.random.default_rng(seed).normal(size=12).round(1))
    scores[8:] = 0.7
    rollout = tabular.rollout(0, [1] * 12).replace(extras={"correct": scores}, advantages=None)
    config = gdpo.Config(group_size=4, components=("correct",), weights=(0.3,))
    found = np.asarray(gdpo.prepare(rollout, config=config).advantages).sum(axis=1)
    assert_array_equal(found[8:], np.zeros(4))
    assert_allclose(np.mean(found**2), 1, rtol=1e-6)


@pytest.mark.parametrize("name", ["gdpo", "batch"])
def test_the_mean_of_the_batch_is_over_all_devices(name):
    module, settings = METHODS[name]
    prepare = partial(module.prepare, config=module.Config(**settings), axis_name="data")
    rollout = of_four()
    places = {"in_specs": PartitionSpec("data"), "out_specs": PartitionSpec("data")}
    split = jax.jit(jax.shard_map(prepare, mesh=sharding.make_mesh(2), **places))
    whole = jax.jit(partial(module.prepare, config=module.Config(**settings)))(rollout)
    assert_allclose(split(rollout).advantages, whole.advantages, rtol=1e-5, atol=1e-6)


def test_what_an_update_needs_is_named():
    """Also that advantages are not overwritten, and what GDPO's run must bring."""
    config = gdpo.Config(group_size=4, components=("correct", "tone"), weights=(1.0, 1.0))
    assert config.extras == {"correct": "row", "tone": "row"}
    with pytest.raises(ValueError, match=r"rollout\.extras\['tone'\] is needed"):
        gdpo.prepare(of_four(), config=config)
    with pytest.raises(ValueError, match="weights: give one for each of components, 2, got 0"):
        gdpo.Config(components=("correct", "tone"))
    with pytest.raises(UserError, match=r"gdpo\.components: name those of the reward"):
        gdpo.prepare(of_four(), config=gdpo.Config(group_size=4))
    with pytest.raises(ValueError, match="k must be at most 4, got 5"):
        pass_at_k.Config(group_size=4, k=5)
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        rloo.Config(baseline="both", group_size=1)
    for module, settings in METHODS.values():
        given = of_four().replace(advantages=np.zeros((8, 7), np.float32))
        with pytest.raises(ValueError, match=r"rollout\.advantages is given"):
            module.prepare(given, config=module.Config(**settings))


# --- Whole runs


PARTS = """
def parts(prompts, responses, letter):
    right = [float(len(set(text)) % 2) for text in responses]
    short = [-float(len(text)) for text in responses]
    return right, {"correct": right, "format": short}
"""
OF_RUN = {
    "maxrl": {"group_size": 4},
    "pass_at_k": {"group_size": 4, "k": 2},
    "gdpo": {
        "group_size": 4,
        "kl_loss_coef": 0.0,
        "components": ("parts/correct", "parts/format"),
        "weights": (1.0, 1.0),
    },
    "batch": {"baseline": "batch", "group_size": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [soak("maxrl"), "pass_at_k", "gdpo", "batch"])
def test_a_run_learns_and_goes_on_exactly(name, tmp_path):
    """Eight answers a step, and three to each of the prompts of validations."""
    module, _ = METHODS[name]
    config = letters_run(tmp_path)
    (tmp_path / "parts.py").write_text(PARTS)
    config = replace(config, reward=(f"{tmp_path / 'parts.py'}:parts",), checkpoint_interval=1)
    config = with_rl(
        config,
        num_iterations=2,
        batch_size=8,
        validation_interval=2,
        validation_samples=3,
        optimizer=Optimizer(learning_rate=0.1, schedule="constant"),
    )

    def run(config):
        return training.rl.run(config, module, module.Config(**OF_RUN[name]))

    straight = run(config)
    rows = metric_rows(straight.folder)
    assert max(row.get("grad_norm", 0.0) for row in rows) > 0
    assert {"validation/pass@3", "validation/best@3_low"} <= rows[-1].keys()
    goes_on_alike(run, config, straight)
