"""The task of experiments/pass_at_k.py by hand, and a short form of the whole."""

import json

import jax.numpy as jnp
import numpy as np
import pass_at_k
import pytest
import results
from numpy.testing import assert_allclose
from pass_at_k import FREQUENCIES, KS, LIKELIHOOD, Sizes

from rlhf_jax.types import PolicyOutput

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


def test_pass_at_k_of_a_network_is_that_of_its_probabilities():
    """A prompt's next letter has a quarter, all others a twentieth."""

    def policy_fn(params, tokens, attention_mask, key):
        is_common = tokens[:, 1] == (tokens[:, 0] + 1) % pass_at_k.LETTERS
        log_probs = np.log(np.where(is_common, 0.25, 0.05))
        return PolicyOutput(jnp.stack([jnp.zeros(len(tokens)), log_probs], axis=1), None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pass_at_k, "POLICY_FN", policy_fn)
        found = pass_at_k.measured({})
    frequency = FREQUENCIES[np.arange(16), (np.arange(16) + 1) % 16].mean()
    for i, k in enumerate(KS):
        expected = frequency * (1 - 0.75**k) + (1 - frequency) * (1 - 0.95**k)
        assert_allclose(found.passes[i], expected, rtol=1e-5)
    mean = frequency * np.log(0.25) + (1 - frequency) * np.log(0.05)
    assert_allclose(found.likelihood, mean, rtol=1e-5)


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
