"""What keeps a policy near the one that sampled: the gates of DPPO and DeepSeek-V3.2, GMPO's clip
of each token in log space, and Clip-Cov's of the tokens that cost entropy.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import goes_on_alike, letters_run, metric_rows, with_rl
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import grpo, losses, training
from rlhf_jax.algorithms import clip_cov, otb
from rlhf_jax.types import PolicyOutput, Rollout

MASK = np.array([[0, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
OLD = np.log([[1, 0.3, 0.6, 0.5, 1], [1, 0.5, 0.4, 1, 1], [1, 0.35, 1, 0.7, 0.2], [1] * 5])
MOVED = [[0, 0.6, -0.4, 0.15, 0], [0, -0.7, 0.1, 0, 0], [0, 0.5, 0, -0.35, -0.1], [0] * 5]
NEW = OLD + np.array(MOVED)
ADVANTAGES = np.where(MASK, np.array([[1.5], [-0.5], [-2.0], [0.0]]), 0.0)
UNCLIPPED = {"clip_low": 1.0, "clip_high": np.inf, "kl_loss_coef": 0.0, "aggregate": "token"}


def rollout(**changes):
    arrays = (np.zeros(MASK.shape, np.int32), np.ones_like(MASK), MASK)
    advantages = jnp.asarray(changes.pop("advantages", ADVANTAGES), jnp.float32)
    return Rollout(*arrays, jnp.asarray(OLD, jnp.float32), advantages=advantages, **changes)


def found(config, loss=None, key=None, new=NEW, **changes):
    """Value, gradient with respect to the log-probs, and metrics, of the package."""
    batch = rollout(**changes)

    def total(log_probs):
        policy_fn = lambda *_: PolicyOutput(log_probs, jnp.zeros(MASK.shape))  # noqa: E731
        of_module = loss or grpo.loss
        value, metrics = of_module(None, batch, key, policy_fn=policy_fn, config=config)
        terms = value if isinstance(value, tuple) else (value,)
        return sum(term.value for term in terms), {k: m.value for k, m in metrics.items()}

    of_log_probs = jax.jit(jax.value_and_grad(total, has_aux=True))
    (value, metrics), gradient = of_log_probs(jnp.asarray(new, jnp.float32))
    return value, gradient, metrics


def check(result, loss):
    """Value and gradient are those of a function of log-probs in float64, and its slopes."""
    slopes = np.zeros(MASK.shape)
    for at in zip(*np.nonzero(MASK), strict=True):
        step = np.zeros(MASK.shape)
        step[at] = 1e-5
        slopes[at] = (loss(NEW + step) - loss(NEW - step)) / 2e-5
    value, gradient, _ = result
    assert_allclose(value, loss(NEW), rtol=1e-6, atol=1e-6)
    assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-6)
    return gradient


def mean(per_token):
    return per_token[MASK != 0].sum() / MASK.sum()


# --- Gates


def dropped(gate, limit):
    """Token by token, from the papers' formulas."""
    out = np.zeros(MASK.shape, bool)
    for i, t in zip(*np.nonzero(MASK), strict=True):
        p, q, a = np.exp(NEW[i, t]), np.exp(OLD[i, t]), ADVANTAGES[i, t]
        away = (a > 0 and p > q) or (a < 0 and p < q)
        if gate == "tv":
            out[i, t] = away and abs(p - q) > limit
        elif gate == "kl":
            kl = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
            out[i, t] = away and kl > limit
        else:
            columns = np.nonzero(MASK[i])[0]
            drift = sum(OLD[i, c] - NEW[i, c] for c in columns) / len(columns)
            out[i, t] = a < 0 and drift > limit
    return out


@pytest.mark.parametrize(("gate", "limit"), [("tv", 0.1), ("kl", 0.03), ("drift", 0.05)])
def test_a_gate_drops_the_policy_loss_of_tokens_that_moved_too_far(gate, limit):
    config = grpo.Config(gate=gate, gate_limit=limit, **UNCLIPPED)
    result = found(config)
    gone = dropped(gate, limit)
    assert 0 < gone.sum() < MASK.sum()
    kept = lambda new: mean(np.where(gone, 0.0, -ADVANTAGES * np.exp(new - OLD)))  # noqa: E731
    gradient = check(result, kept)
    assert_array_equal(gradient == 0, gone | (MASK == 0))
    assert_allclose(result[2]["policy/gated_fraction"], gone.sum() / MASK.sum(), rtol=1e-6)
    _, open_gradient, metrics = found(grpo.Config(**UNCLIPPED))
    assert_array_equal(open_gradient != 0, MASK != 0)
    assert "policy/gated_fraction" not in metrics


def test_a_token_that_comes_back_is_learned_from():
    """However far it is: with the other sign of the advantages, other tokens are dropped."""
    moved = [jnp.asarray(x, jnp.float32) for x in (NEW, OLD)]
    by = partial(losses.gated, "tv", *moved)
    away, back = (by(sign * ADVANTAGES, MASK, 0.0) for sign in (1.0, -1.0))
    assert_array_equal(np.asarray(away) ^ np.asarray(back), MASK != 0)


def test_what_no_gate_can_be_is_refused():
    with pytest.raises(ValueError, match="gate must be one of none, tv, kl, drift, got 'ratio'"):
        grpo.Config(gate="ratio")
    with pytest.raises(ValueError, match="gate_limit must be at least 0"):
        grpo.Config(gate="tv", gate_limit=-1.0)
    with pytest.raises(ValueError, match="ratio: 'gmpo' clips each 'token' itself"):
        grpo.Config(surrogate="gmpo", ratio="sequence")


# --- GMPO


def geometric(new, low, high):
    """Zhao et al. 2025, eq. 4, row by row: the bound on the side of the advantage's sign."""
    total = 0.0
    for i in range(3):
        columns = np.nonzero(MASK[i])[0]
        a = ADVANTAGES[i, columns[0]]
        product = 1.0
        for t in columns:
            ratio = np.exp(new[i, t] - OLD[i, t])
            bounded = np.clip(ratio, np.exp(-low), np.exp(high))
            product *= min(ratio, bounded) if a > 0 else max(ratio, bounded)
        total -= a * product ** (1 / len(columns))
    return total / 3


def test_gmpo_is_the_geometric_mean_of_clipped_ratios():
    bounds = {"clip_low": 0.3, "clip_high": 0.2}
    config = grpo.Config(surrogate="gmpo", kl_loss_coef=0.0, **bounds)
    result = found(config)
    gradient = check(result, lambda new: geometric(new, 0.3, 0.2))
    moved = (NEW - OLD) * np.sign(ADVANTAGES)
    clipped = moved > np.where(ADVANTAGES > 0, 0.2, 0.3)
    assert [row.any() for row in clipped[:3]] == [True, True, True]
    assert_array_equal((gradient == 0) & (MASK != 0), clipped)
    assert_allclose(result[2]["policy/clip_fraction"], clipped.sum() / MASK.sum(), rtol=1e-6)


def test_gmpo_without_a_mask_takes_the_mean_of_all_columns():
    log_ratio = jnp.array([[0.1, 0.3], [-0.2, 0.0]])
    advantages = jnp.array([[1.0, 1.0], [2.0, 2.0]])
    by_name = partial(losses.surrogate, "gmpo", log_ratio, advantages, log_ratio=log_ratio)
    loss, _ = by_name(clip_low=9.0, clip_high=9.0)
    assert_allclose(loss, -advantages * np.exp([[0.2], [-0.1]]), rtol=1e-6)


# --- Clip-Cov and KL-Cov


def covariances(advantages=ADVANTAGES):
    inside = MASK != 0
    centred = [x - x[inside].mean() for x in (NEW, advantages)]
    return np.where(inside, centred[0] * centred[1], np.nan)


def test_clip_cov_draws_its_share_from_the_band():
    """Over many keys each token of the band is drawn equally often, and no other one."""
    cov = covariances()
    low, high = np.nanquantile(cov, 0.3), np.nanquantile(cov, 0.95)
    band = (cov > low) & (cov < high)
    config = clip_cov.Config(share=0.3, cov_low=low, cov_high=high, **UNCLIPPED)
    number = int(0.3 * MASK.sum())
    assert (number, band.sum()) == (2, 4)

    def gradient(log_probs, key):
        policy_fn = lambda *_: PolicyOutput(log_probs, jnp.zeros(MASK.shape))  # noqa: E731
        batch = rollout()
        terms, _ = clip_cov.loss(None, batch, key, policy_fn=policy_fn, config=config)
        return sum(term.value for term in terms)

    keys = jax.random.split(jax.random.key(0), 600)
    of_keys = jax.jit(jax.vmap(jax.grad(gradient), in_axes=(None, 0)))
    gone = (np.asarray(of_keys(jnp.asarray(NEW, jnp.float32), keys)) == 0) & (MASK != 0)
    assert_array_equal(gone.sum(axis=(1, 2)), number)
    assert_allclose(gone.mean(axis=0), band * number / band.sum(), atol=0.08)
    result = found(config, clip_cov.loss, jax.random.key(5))
    drawn = (np.asarray(result[1]) == 0) & (MASK != 0)
    left = lambda new: mean(np.where(drawn, 0.0, -ADVANTAGES * np.exp(new - OLD)))  # noqa: E731
    check(result, left)
    assert_allclose(result[2]["policy/chosen_fraction"], number / MASK.sum(), rtol=1e-6)


@pytest.mark.parametrize(("share", "number"), [(0.01, 1), (0.49, 3)])
def test_kl_cov_holds_the_tokens_of_the_largest_covariances(share, number):
    """At least one; nothing is drawn, and importance weights leave the KL alone."""
    cov = covariances()
    held = cov >= np.sort(cov[MASK != 0])[-number]
    config = clip_cov.Config(kind="kl", share=share, kl_cov_coef=0.7, **UNCLIPPED)
    result = found(config, clip_cov.loss)

    def loss(new):
        policy_loss = -ADVANTAGES * np.exp(new - OLD)
        return mean(policy_loss + 0.7 * np.where(held, np.abs(new - OLD), 0.0))

    check(result, loss)
    assert_allclose(result[2]["policy/chosen_fraction"], number / MASK.sum(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["clip", "kl"])
def test_kl_cov_holds_no_token_that_did_not_move(kind):
    """The KL of a policy from itself is 0, and so is its gradient."""
    how = {"share": 1.0, **UNCLIPPED}
    config = clip_cov.Config(kind=kind, kl_cov_coef=0.7, cov_low=np.inf, cov_high=np.inf, **how)
    start = found(config, clip_cov.loss, jax.random.key(0), new=OLD)
    plain = found(grpo.Config(**UNCLIPPED), new=OLD)
    assert_array_equal(start[1], plain[1])
    assert np.abs(plain[1]).max() > 0.1
    assert start[2]["policy/chosen_fraction"] == (kind == "kl")


# --- In the full run


RUNS = {
    "clip_cov": (clip_cov, {"share": 0.3, "cov_low": -1.0, "kl_loss_coef": 0.02}),
    "kl_cov": (clip_cov, {"kind": "kl", "share": 0.3}),
    "otb": (otb, {"num_microbatches": 2}),
    "dppo": (grpo, {"gate": "tv", "gate_limit": 1e-4, **UNCLIPPED}),
    "gmpo": (grpo, {"surrogate": "gmpo", "clip_low": 1e-3, "kl_loss_coef": 0.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_and_resumes_to_the_same_bytes(name, tmp_path):
    module, settings = RUNS[name]
    config = replace(letters_run(tmp_path), checkpoint_interval=1)
    config = with_rl(config, batch_size=8, num_iterations=3, validation_interval=9)
    own = module.Config(group_size=2, num_minibatches=2, **settings)
    reward = lambda rollout: (jnp.sin(jnp.sum(rollout.tokens * rollout.mask, axis=1)), {})  # noqa: E731
    run = lambda config: training.rl.run(config, module, own, reward=reward)  # noqa: E731
    straight = run(config)
    rows = metric_rows(straight.folder)[1:]
    assert max(row["grad_norm"] for row in rows) > 1e-3
    assert all(row["nonfinite"] == 0 for row in rows)
    if name != "otb":
        fraction = {"dppo": "gated", "gmpo": "clip"}.get(name, "chosen")
        assert 0 < max(row[f"policy/{fraction}_fraction"] for row in rows) < 1
    goes_on_alike(run, config, straight)
