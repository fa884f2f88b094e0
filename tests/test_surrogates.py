"""SAPO, LUSPO and VESPO on the numbers of a batch, as TRL 1.16 computes its losses of these
names.
"""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from rlhf_jax.algorithms import grpo, policy
from rlhf_jax.types import PolicyOutput, Rollout

RNG = np.random.default_rng(0)
ROWS = 6
COLUMNS = 9
MASK = np.arange(COLUMNS) < RNG.integers(2, COLUMNS, (ROWS, 1))
OLD = np.where(MASK, -RNG.random((ROWS, COLUMNS)), 0.0)
NEW = np.where(MASK, OLD + 0.6 * RNG.normal(size=(ROWS, COLUMNS)), 0.0)
ADVANTAGES = RNG.normal(size=(ROWS, 1))
LOG_RATIO = NEW - OLD
LENGTHS = MASK.sum(axis=1)


def ours(**settings):
    """The policy loss and its metrics."""
    given = np.where(MASK, ADVANTAGES, 0.0)
    arrays = (np.zeros((ROWS, COLUMNS), np.int32), MASK, MASK, OLD)
    batch = Rollout(*(np.asarray(x, np.float32) for x in arrays), advantages=np.float32(given))
    output = PolicyOutput(np.float32(NEW), np.zeros((ROWS, COLUMNS), np.float32), None)
    config = grpo.Config(kl_loss_coef=0.0, **settings)
    loss, metrics = policy.loss(output, batch, config)
    return float(loss.total / loss.count), metrics


def test_sapo():
    tau = np.where(ADVANTAGES > 0, 1.0, 1.05)
    gate = 1 / (1 + np.exp(-tau * (np.exp(LOG_RATIO) - 1)))
    per_token = -gate * 4 / tau * ADVANTAGES
    expected = ((per_token * MASK).sum(axis=1) / LENGTHS).mean()
    assert_allclose(ours(surrogate="sapo")[0], expected, rtol=1e-5)
    wide = {"sapo_temperatures": (0.5, 1.05), "surrogate": "sapo"}
    assert abs(ours(**wide)[0] - expected) > 1e-3


def test_luspo():
    ratio = np.exp((LOG_RATIO * MASK).sum(axis=1, keepdims=True) / LENGTHS[:, None])
    held = np.clip(ratio, 1 - 0.02, 1 + 0.03)
    per_token = -np.minimum(ratio * ADVANTAGES, held * ADVANTAGES) * MASK
    expected = per_token.sum(axis=1).mean()
    settings = {"ratio": "sequence", "aggregate": "sum", "clip_low": 0.02, "clip_high": 0.03}
    assert_allclose(ours(**settings)[0], expected, rtol=1e-5)


def gamma_weights():
    """phi(w) [B, 1] of whole rows, w the product of their ratios."""
    ratio = np.exp((LOG_RATIO * MASK).sum(axis=1, keepdims=True))
    power = np.where(ADVANTAGES >= 0, 2.0, 3.0)
    decay = np.where(ADVANTAGES >= 0, 3.0, 2.0)
    return np.exp(decay) * ratio**power * np.exp(-decay * ratio)


def test_vespo():
    weight = gamma_weights()
    per_token = -weight * ADVANTAGES * NEW * MASK
    loss, metrics = ours(surrogate="vespo", ratio="product", aggregate="token")
    assert_allclose(loss, per_token.sum() / MASK.sum(), rtol=1e-5)
    clipped = metrics["policy/clip_fraction"]
    assert 0 < clipped.total < clipped.count
    assert_allclose(clipped.total, ((weight < 0.5) & MASK).sum())


@pytest.mark.soak  # needs TRL 1.16, which CI does not install
def test_vespos_weights_are_trls():
    import torch
    from trl import GRPOTrainer

    arrays = {
        "advantages": ADVANTAGES,
        "log_ratio_per_token": LOG_RATIO,
        "mask": MASK.astype(float),
    }
    given = {name: torch.tensor(array) for name, array in arrays.items()}
    theirs = GRPOTrainer.get_gamma_weights(**given, importance_sampling_ratio=None)
    assert_allclose(theirs.numpy(), gamma_weights(), rtol=1e-6)
