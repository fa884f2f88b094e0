"""Each algorithm's loss as a whole, with metrics and gradient, against slow NumPy: ragged responses
with holes, rows and answers that are absent, one-token responses, huge log-ratios, and anything at
all in masked columns."""

import functools
import math
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from tabular import assert_identical, numbers, score_fn

from rlhf_jax import distill, dpo, grpo, kto, ppo, reward_model, rloo, sft, vpg
from rlhf_jax.types import Comparisons, Feedback, PolicyOutput

POISONED = {
    "log_probs",
    "ref_log_probs",
    "values",
    "rewards",
    "advantages",
    "importance_weights",
    "scores",
    "targets",
}
SLOW = {
    sft: references.sft,
    reward_model: references.reward_model,
    vpg: references.vpg,
    dpo: references.dpo_loss,
    kto: references.kto,
}
# Parts of these losses have no gradient: the loop takes their parameters apart.
SLOW_WITH_STOPPED = {ppo: references.ppo, rloo: references.rloo, grpo: references.grpo}
SLOW_WITH_STOPPED[distill] = references.distill


def slow_loss(case, params, stopped, batch):
    if case.module in SLOW:
        return SLOW[case.module](params, batch, case.config)
    return SLOW_WITH_STOPPED[case.module](params, stopped, batch, case.config)


@functools.cache
def value_and_gradient(name):
    """``(params, batch, poison) -> ((loss, metrics), gradient)`` with the poison in every masked
    column and in the scores of absent rows and answers."""
    algorithm = CASES[name].module
    config = CASES[name].config

    def loss(params, batch, poison):
        inside = batch.response_mask != 0
        present = inside.any(axis=-1)

        def poisoned(x):  # added, so that what is masked too late comes back as a gradient
            kept = inside if x.ndim == inside.ndim else present
            return x + jnp.where(kept, 0.0, poison)

        def policy(*args):
            outside = ~inside.reshape(-1, inside.shape[-1])
            output = CASES[name].model["policy_fn"](*args)
            return jax.tree.map(lambda x: x + jnp.where(outside, poison, 0.0), output)

        def score(params, *args):
            # A missing answer has no token, through which a gradient could come back.
            own = jnp.sum(params["scores"])
            absent = poison + own - jax.lax.stop_gradient(own)
            return score_fn(params, *args) + jnp.where(present.ravel(), 0.0, absent)

        parts = POISONED & {field.name for field in fields(batch)}
        held = {part: getattr(batch, part) for part in parts}
        batch = batch.replace(**{part: poisoned(x) for part, x in held.items() if x is not None})
        model = {"score_fn": score} if algorithm is reward_model else {"policy_fn": policy}
        if algorithm in SLOW_WITH_STOPPED:
            batch = algorithm.prepare(batch.replace(advantages=None), config=config)
        return numbers(algorithm.loss)(params, batch, None, **model, config=config)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def along(gradient, direction):
    return sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), gradient, direction)))


def check_gradient(gradient, loss, at, rng):
    """Along three directions, by differences of the loop."""
    wide = jax.tree.map(lambda g: np.asarray(g, np.float64), gradient)
    size = math.sqrt(along(wide, wide))
    for _ in range(3):
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), at)
        up, down = (
            loss(jax.tree.map(lambda x, d, h=h: x + h * d, at, direction)) for h in (1e-6, -1e-6)
        )
        slope = along(gradient, direction)
        assert_allclose(slope, (up - down) / 2e-6, rtol=1e-4, atol=1e-4 * size + 1e-6)


FAST = {"sft sequence", "reward_model", "centering", "regression", "vpg token", "ppo fixed", "kto"}
FAST |= {"dpo sft", "orpo", "cispo sequence", "reinforce++ baseline", "sapo", "vespo"}
FAST |= {"distill sampled"}


@pytest.mark.parametrize(
    "name", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in CASES]
)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.125, 4.0, 1024.0]))
def test_loss_metrics_and_gradient_equal_a_loop(name, seed, scale):
    case = CASES[name]
    rng = np.random.default_rng(seed)
    params, batch = case.draw(rng, scale)
    result = value_and_gradient(name)(params, batch, 0.0)
    (value, metrics), gradient = result
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    expected, expected_metrics = slow_loss(case, exact, exact, batch)
    assert metrics.keys() == expected_metrics.keys()
    expected_metrics["loss"] = expected
    for metric, found in {**metrics, "loss": value}.items():
        assert_allclose(found, expected_metrics[metric], rtol=3e-5, atol=1e-5, err_msg=metric)

    check_gradient(gradient, lambda point: slow_loss(case, point, exact, batch)[0], exact, rng)
    for poison in (math.nan, 1e4):
        assert_identical(value_and_gradient(name)(params, batch, poison), result)


def test_ties_of_log_ratios_are_those_of_rounding():
    """Differences of 5e-5, -5e-5, 2e-4 and -2e-4 nats: half, half, won, lost. Without a reference
    the least difference decides."""
    differences = np.array([5e-5, -5e-5, 2e-4, -2e-4, 0.0], np.float32)
    assert dpo._wins(differences, dpo.TIE).tolist() == [0.5, 0.5, 1.0, 0.0, 0.5]
    assert dpo._wins(differences, 0.0).tolist() == [1.0, 0.0, 1.0, 0.0, 0.5]
    with pytest.raises(ValueError, match="sft_coef: the kind orpo has such a term"):
        dpo.Config(kind="orpo", sft_coef=0.5)
    with pytest.raises(ValueError, match="sft_coef must be at least 0"):
        dpo.Config(sft_coef=-0.5)


def nats(params, tokens, attention_mask, key):
    """A policy that gives every token minus its own number in nats."""
    return PolicyOutput(-params["nat"] * tokens.astype(jnp.float32), jnp.zeros(tokens.shape))


def summed(params, tokens, attention_mask, key):
    return params["nat"] * jnp.sum(tokens * attention_mask, axis=1)


def test_a_reward_model_also_learns_the_best_answers_by_hand():
    """Row 0's best answer has tokens 1 and 2, row 1's has 4, the last row's best one is missing:
    (1 + 2 + 4) / 3 nats per token, beside the loss of ranking."""
    tokens = np.array([[[9, 1, 2], [9, 3, 0]], [[9, 5, 5], [9, 4, 0]], [[9, 7, 0], [9, 6, 0]]])
    response = np.array([[[0, 1, 1], [0, 1, 0]], [[0, 1, 1], [0, 1, 0]], [[0, 0, 0], [0, 1, 0]]])
    mask = response | np.array([1, 0, 0])
    batch = Comparisons(tokens, mask, response, best=np.array([0, 1, 0]))
    params = {"nat": jnp.float32(1.0)}
    functions = {"score_fn": summed, "policy_fn": nats}
    config = reward_model.Config(sft_coef=0.5)

    @jax.jit
    def losses(batch):
        (ranking, sft), metrics = reward_model.loss(params, batch, None, config=config, **functions)
        plain = {"score_fn": summed, "config": reward_model.Config()}
        alone, _ = reward_model.loss(params, batch, None, **plain)
        terms = (ranking, alone, sft, metrics["reward_model/sft_loss"])
        return [term.value for term in terms]

    ranking, alone, sft, nll = losses(batch)
    assert nll == pytest.approx(7 / 3)
    assert sft == pytest.approx(7 / 6)
    assert ranking == alone
    scored = batch.replace(best=None, targets=np.zeros((3, 2)))
    for rows, model, message in (
        (batch, {"score_fn": summed}, "sft_coef needs a policy_fn"),
        (scored, functions, "sft_coef: target scores name no best answer"),
    ):
        loss = functools.partial(reward_model.loss, config=config, **model)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(loss, params, rows, None)


@pytest.mark.parametrize("algorithm", [dpo, kto, reward_model])
def test_losses_have_gradients_with_respect_to_weights_of_any_sign(algorithm):
    """The second row weighs nothing and has one all the same; equal to slopes of the loss."""
    pairs = Comparisons(
        tokens=np.array([[[9, 1, 2], [9, 3, 3]], [[9, 5, 1], [9, 4, 2]], [[9, 7, 3], [9, 6, 1]]]),
        attention_mask=np.ones((3, 2, 3), int),
        response_mask=np.ones((3, 2, 3), int) * [0, 1, 1],
        ref_log_probs=np.array([[-1.0, -2.0], [-3.0, 0.5], [-4.0, -1.0]], np.float32),
    )
    config = algorithm.Config(**({} if algorithm is kto else {"sft_coef": 0.5}))
    functions = {"policy_fn": nats} | ({"score_fn": summed} if algorithm is reward_model else {})

    @jax.jit
    @jax.value_and_grad
    def loss(weight):
        batch = pairs.replace(weight=weight)
        if algorithm is kto:
            arrays = (pairs.tokens, pairs.attention_mask, pairs.response_mask)
            one = [x[:, 0] for x in arrays]
            how = {"weight": weight, "reference_point": np.full(3, 0.25, np.float32)}
            desirable = np.array([1, 0, 1])
            batch = Feedback(*one, desirable, ref_log_probs=pairs.ref_log_probs[:, 0], **how)
        params = {"nat": jnp.float32(0.3)}
        value, _ = algorithm.loss(params, batch, None, config=config, **functions)
        terms = value if isinstance(value, tuple) else (value,)
        return sum(term.value for term in terms)

    weight = np.array([2.0, 0.0, -0.5], np.float32)
    _, gradient = loss(weight)
    for row, step in enumerate(1e-2 * np.eye(3, dtype=np.float32)):
        slope = (loss(weight + step)[0] - loss(weight - step)[0]) / 2e-2
        assert abs(slope) > 1e-3
        assert_allclose(gradient[row], slope, rtol=1e-2)


def test_packed_best_answers_are_those_of_rows_apart():
    """Two pairs in one row [9 1 2 | 9 3 | 9 5 | 9 4], numbered 1 to 4: the best are 1 and 4."""
    tokens = np.array([[9, 1, 2, 9, 3, 9, 5, 9, 4]])
    documents = np.array([[1, 1, 1, 2, 2, 3, 3, 4, 4]])
    response = np.array([[0, 1, 1, 0, 1, 0, 1, 0, 1]])
    numbers = np.array([[[1, 2], [3, 4]]])
    best = np.array([[0, 1]])
    batch = Comparisons(tokens, documents, response, best=best, documents=numbers)

    def of_documents(params, tokens, attention_mask, key, documents):
        return documents.astype(jnp.float32)

    config = reward_model.Config(sft_coef=1.0)
    functions = {"score_fn": of_documents, "policy_fn": nats}
    loss = jax.jit(functools.partial(reward_model.loss, config=config, **functions))
    _, metrics = loss({"nat": jnp.float32(1.0)}, batch, None)
    assert float(metrics["reward_model/sft_loss"].value) == pytest.approx(7 / 3)
