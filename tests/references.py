"""Slow NumPy versions, in float64 and plain loops, of what the library computes; and ragged masks to run them on."""

import math

import numpy as np
from hypothesis import strategies as st

SHAPES = [(1, 1), (3, 5), (4, 8)]  # few, since each shape is compiled once


def columns(mask_row):
    return [t for t, bit in enumerate(mask_row) if bit]


def kl(d, estimator):
    return {"k1": d, "k2": d * d / 2, "k3": math.expm1(-d) + d}[estimator]


def aggregate(per_token, mask, how, length=None):
    rows = [[float(per_token[i, t]) for t in columns(mask[i])] for i in range(len(mask))]
    rows = [row for row in rows if row]
    if not rows:
        return 0.0
    if how == "token":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if how == "sequence":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(map(sum, rows)) / (len(rows) * (length if how == "fixed" else 1))


def clipped_surrogate(log_ratio, advantage, low, high, dual_clip=None):
    ratio = math.exp(log_ratio)
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
    return min(loss, -dual_clip * advantage) if dual_clip is not None and advantage < 0 else loss


def clipped_value(value, old, target, clip):
    clipped = min(max(value, old - clip), old + clip)
    return 0.5 * max((value - target) ** 2, (clipped - target) ** 2)


def comparison(scores, best, margin=0.0):
    """One row; an absent answer is None."""
    if scores[best] is None:
        return 0.0
    entered = [s - margin if k == best else s for k, s in enumerate(scores) if s is not None]
    return math.log(sum(map(math.exp, entered))) - (scores[best] - margin)


def gae(rewards, values, mask, gamma, lam):
    advantages = np.zeros(mask.shape)
    for i in range(len(mask)):
        after = 0.0, 0.0
        for t in reversed(columns(mask[i])):
            delta = float(rewards[i, t]) + gamma * after[1] - float(values[i, t])
            advantages[i, t] = delta + gamma * lam * after[0]
            after = advantages[i, t], float(values[i, t])
    return advantages, np.where(mask, advantages + np.where(mask, values, 0.0), 0.0)


def discounted_returns(rewards, mask, gamma):
    returns = np.zeros(mask.shape)
    for i in range(len(mask)):
        said = columns(mask[i])
        for k, t in enumerate(said):
            returns[i, t] = sum(gamma**j * float(rewards[i, u]) for j, u in enumerate(said[k:]))
    return returns


def leave_one_out(scores, mask):
    out = np.zeros(mask.shape)
    for n in range(len(mask)):
        for g in columns(mask[n]):
            others = [float(scores[n, k]) for k in columns(mask[n]) if k != g]
            out[n, g] = float(scores[n, g]) - sum(others) / len(others) if others else 0.0
    return out


def group_normalized(scores, mask, eps, scale):
    out = np.zeros(mask.shape)
    for n in range(len(mask)):
        group = [float(scores[n, g]) for g in columns(mask[n])]
        if len(group) < 2:
            continue
        mean = sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
        for g in columns(mask[n]):
            equal = min(group) == max(group)
            out[n, g] = 0.0 if equal else (float(scores[n, g]) - mean) / (std + eps if scale else 1.0)
    return out


@st.composite
def batches(draw, shapes=tuple(SHAPES), arrays=1):
    """(arrays [B, T] float32 of ordinary size, ragged mask [B, T] with holes, empty rows and one-token rows)."""
    shape = draw(st.sampled_from(shapes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = rng.random(shape) < rng.choice([0.2, 0.6, 1.0], size=(shape[0], 1))
    mask[rng.random(shape[0]) < 0.2] = False
    return [rng.normal(size=shape).astype(np.float32) for _ in range(arrays)], mask


def poisoned(x, mask, poison):
    return np.where(mask, x, np.float32(poison))
