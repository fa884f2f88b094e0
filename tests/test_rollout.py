"""Sampler and policy function together on a small GPT-2: log-probs, values, reference, and what may
not change them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import models, rollout
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.types import PolicyOutput, Rollout

VOCAB = 13
EOS = 8
PAD = 0
ROWS = 8
PROMPT = 5
MODEL = models.build(
    models.GPT2Config(vocab_size=VOCAB, max_length=32, hidden_size=16, num_layers=1, num_heads=2)
)
CONFIG = SamplingConfig(max_new_tokens=7, temperature=0.8, eos_id=EOS, pad_id=PAD)
POLICY = models.policy_fn(MODEL, temperature=0.8, prompt_length=PROMPT)
KEY = jax.random.key(0)

collect = jax.jit(rollout.collect, static_argnames=("model", "sampling", "policy_fn", "mesh"))
policy = jax.jit(POLICY)
init = jax.jit(MODEL.init)


def make_params(seed=2):
    """Weights ten times the usual size, so that the distribution is far from uniform and attention
    matters.
    """
    params = jax.tree.map(lambda x: x * 10 if x.ndim == 2 else x, init(jax.random.key(seed)))
    return {**params, "value": {"kernel": jnp.linspace(-1.0, 1.0, 16), "bias": jnp.asarray(0.5)}}


def prompts(seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, PROMPT + 1, ROWS)
    mask = (np.arange(PROMPT)[None, :] >= PROMPT - lengths[:, None]).astype(np.int32)
    return rng.integers(0, VOCAB, (ROWS, PROMPT)).astype(np.int32), mask


PARAMS = make_params()
REF_PARAMS = make_params(1)
ROW_IDS = np.arange(ROWS, dtype=np.int32)


def run_collect(tokens, mask, sampling=CONFIG, row_ids=ROW_IDS, places=ROW_IDS):
    options = {
        "sampling": sampling,
        "policy_fn": POLICY,
        "ref_fn": jax.tree_util.Partial(POLICY, REF_PARAMS),
    }
    given = {"row_ids": row_ids, "places": places, **options}
    return jax.tree.map(np.asarray, collect(MODEL, PARAMS, tokens, mask, KEY, **given))


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_pad_id_outside_the_vocabulary():
    tokens, mask = prompts()
    options = SamplingConfig(max_new_tokens=7, temperature=0.8, eos_id=EOS, pad_id=VOCAB)
    inside, outside = (
        run_collect(tokens, mask, sampling=sampling_config) for sampling_config in (CONFIG, options)
    )
    assert (np.asarray(outside.tokens) == VOCAB).any()
    assert_array_equal(np.where(outside.tokens == VOCAB, PAD, outside.tokens), inside.tokens)
    assert_array_equal(outside.log_probs, inside.log_probs)


def test_collect():
    """Log-probs and values are those of the policy function's own forward pass."""
    tokens, mask = prompts()
    mask[3] = 0  # an absent row, whose attention sees nothing
    row_ids = ROW_IDS + 40
    rolled = run_collect(tokens, mask, row_ids=row_ids)
    assert_array_equal(rolled.row_ids, row_ids)
    assert rolled.scores is rolled.rewards is None

    response = rolled.mask
    output = policy(PARAMS, rolled.tokens, rolled.attention_mask, None)
    reference = policy(REF_PARAMS, rolled.tokens, rolled.attention_mask, None)
    forwards = output.log_probs, output.values, reference.log_probs
    for got, forward in zip(
        (rolled.log_probs, rolled.values, rolled.ref_log_probs), forwards, strict=True
    ):
        assert got.dtype == np.float32
        assert_allclose(got, np.where(response, forward, 0.0), rtol=1e-4, atol=1e-5)
        assert np.ptp(got[response]) > 0.1
    assert np.abs(rolled.log_probs - rolled.ref_log_probs).max() > 0.1


def test_collected_answers_to_one_data_row_differ_by_their_places():
    tokens, mask = (np.repeat(x[:1], ROWS, axis=0) for x in prompts())
    rows = np.repeat(np.arange(ROWS // 2, dtype=np.int32), 2)
    rolled = run_collect(tokens, mask, row_ids=rows)
    assert_array_equal(rolled.row_ids, rows)
    texts = [tuple(row) for row in rolled.tokens.tolist()]
    assert all(texts[i] != texts[i + 1] for i in range(0, ROWS, 2))
    turned = run_collect(tokens, mask, row_ids=rows[::-1], places=ROW_IDS[::-1])
    assert_array_equal(turned.row_ids, rows[::-1])
    assert_array_equal(turned.tokens, rolled.tokens[::-1])


def test_rescore_masks_and_keeps():
    """By hand: zeros outside the response whatever stands there, no key, and nothing invented."""
    masks = np.array([[0, 0, 1, 1], [0, 0, 1, 0]])
    given = Rollout(
        tokens=np.zeros((2, 4), np.int32),
        attention_mask=np.ones((2, 4), np.int32),
        response_mask=masks,
        log_probs=np.full((2, 4), 7.0, np.float32),
        scores=np.array([1.0, 2.0]),
    )
    values = np.array([[9.0, np.nan, -1.0, -2.0], [np.inf, 9.0, -3.0, np.nan]])
    log_probs = values.astype(jnp.bfloat16)

    def policy_fn(params, tokens, attention_mask, key):
        assert key is None
        return PolicyOutput(params * log_probs, log_probs, 10 * params * log_probs)

    def ref_fn(tokens, attention_mask, key):
        assert key is None
        return PolicyOutput(log_probs * 2, log_probs)

    rescore = jax.jit(partial(rollout.rescore, policy_fn=policy_fn, ref_fn=ref_fn))
    out = rescore(given, jnp.asarray(1.0, jnp.bfloat16))
    for found, factor in ((out.log_probs, 1), (out.values, 10), (out.ref_log_probs, 2)):
        assert found.dtype == jnp.float32
        assert_array_equal(found, factor * np.array([[0, 0, -1, -2], [0, 0, -3, 0]]))
    assert_array_equal(out.scores, [1.0, 2.0])

    no_values = rollout.rescore(
        given, None, policy_fn=lambda *_: PolicyOutput(log_probs, log_probs)
    )
    assert no_values.values is None
    assert no_values.ref_log_probs is None


def test_sampler_gap_by_hand():
    def made(log_probs, response_mask):
        zeros = np.zeros((1, 3), np.int32)
        return Rollout(zeros, zeros, np.array(response_mask), np.array(log_probs, np.float32))

    sampled = made([[5.0, -1.0, -2.0]], [[0, 1, 1]])
    assert rollout.sampler_gap(sampled, made([[0.0, -1.25, -1.5]], [[0, 1, 1]])) == 0.5
    nothing = made([[5.0, -1.0, np.nan]], [[0, 0, 0]])
    assert rollout.sampler_gap(nothing, sampled) == 0.0
