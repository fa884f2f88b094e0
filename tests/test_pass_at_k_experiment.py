"""The task of experiments/pass_at_k.py by hand, and a short form of the whole."""

import json

import jax
import numpy as np
import pass_at_k
import pytest
import results
from numpy.testing import assert_allclose
from pass_at_k import FREQUENCIES, KS, LIKELIHOOD, Sizes

SIZES = Sizes(steps=4, every=2, sweep_seeds=1, seeds=2)


def test_eight_answers_to_a_prompt_may_be_right():
    ordered = np.sort(FREQUENCIES, axis=1)[:, ::-1]
    assert_allclose(ordered.sum(axis=1), 1)
    assert_allclose(ordered[:, 1:8] / ordered[:, :7], 2 / 3)
    assert (ordered[:, 8:] == 0).all()
    assert len(set(FREQUENCIES.argmax(axis=1).tolist())) > 1


def test_no_policy_passes_more_than_the_best():
    """Nor does one near it, towards any answer; the best for two of two answers by hand."""
    assert_allclose(pass_at_k.best(np.array([0.75, 0.25]), 2), [0.75, 0.25], atol=1e-9)
    assert pass_at_k.passes(np.array([0.75, 0.25]), np.array([0.75, 0.25]), 2) == 0.8125
    frequency = FREQUENCIES[0]
    for k in KS:
        policy = pass_at_k.best(frequency, k)
        assert_allclose(policy.sum(), 1, atol=1e-9)
        highest = pass_at_k.passes(policy, frequency, k)
        for answer in np.eye(len(frequency)):
            near = 0.99 * policy + 0.01 * answer
            assert pass_at_k.passes(near, frequency, k) <= highest + 1e-9


def test_pass_at_k_of_a_network_is_that_of_its_samples():
    params = jax.tree.map(lambda x: 8 * x, pass_at_k.MODEL.init(jax.random.key(0)))
    found = pass_at_k.measured(params)
    prompts = np.repeat(np.arange(pass_at_k.LETTERS), 8 * 400)[:, None]
    said = pass_at_k.sampling.generate(
        pass_at_k.MODEL,
        params,
        prompts,
        np.ones_like(prompts),
        jax.random.key(1),
        config=pass_at_k.SAMPLER,
    )
    answers = np.asarray(said.tokens[:, 1]).reshape(pass_at_k.LETTERS, 400, 8)
    for i, k in enumerate(KS):
        once = [
            np.mean([sum(frequency[list({*few[:k]})]) for few in of_prompt])
            for frequency, of_prompt in zip(FREQUENCIES, answers, strict=True)
        ]
        assert_allclose(found.passes[i], np.mean(once), atol=0.02)


@pytest.mark.slow
def test_the_short_form(tmp_path):
    out = tmp_path / "pass_at_k.json"
    pass_at_k.main(out, SIZES)
    rows = json.loads(out.read_text("utf-8"))["rows"]
    assert {row["variant"] for row in rows} >= {*pass_at_k.METHODS, "best for pass@8"}
    steps = [row["step"] for row in rows if (row["variant"], row["seed"]) == ("RLOO", 1)]
    assert sorted({*steps}) == [2, 4]
    of_all = {row["metric"] for row in rows if row["seed"] == results.ALL}
    assert {"pass@1", "pass@8 low", LIKELIHOOD, "learning rate"} <= of_all
