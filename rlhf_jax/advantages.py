"""From rewards to advantages. No parameters, no models; everything float32.

[B, T] functions work on response tokens only: columns outside the mask, holes in it included, are
skipped, their values are never used, and their result is 0. [N, G] functions work on G answers to
each of N prompts; missing answers count in no mean, standard deviation or number of answers, and
their result is 0.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax import ops
from rlhf_jax.types import AxisName


def gae(
    rewards: Array, values: Array, mask: Array, gamma: float = 1.0, lam: float | Array = 0.95
) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), from the last response token
    backwards.

    ``delta_t = r_t + gamma * V_next - V_t`` and ``A_t = delta_t + gamma * lam * A_next``, where
    *next* is the next response token of the row; after the last one V and A are 0.

    Args:
      rewards, values, mask: [B, T]; ``values[:, t]`` is V of the state before ``tokens[:, t]``.
      lam: a number, or one for each row, [B] or [B, 1], such as VAPO's, which grows with the
        response (Yue et al. 2025, section 4.2).

    Returns:
      (advantages, returns), [B, T] float32 each; returns = advantages + values.
    """
    chex.assert_rank(rewards, 2)
    chex.assert_equal_shape([rewards, values, mask])
    if jnp.ndim(lam) > 0:
        chex.assert_equal_shape_prefix([lam, rewards], 1)
        lam = jnp.reshape(lam, len(rewards))
    present = jnp.asarray(mask) != 0
    rewards = ops.masked(rewards, present)
    values = ops.masked(values, present)

    def backwards(
        carry: tuple[Array, Array], column: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        next_advantage, next_value = carry  # of the next response token
        reward, value, here = column
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        next_advantage = jnp.where(here, advantage, next_advantage)
        next_value = jnp.where(here, value, next_value)
        return (next_advantage, next_value), jnp.where(here, advantage, 0.0)

    end = jnp.zeros_like(values[:, 0])
    columns = (rewards.T, values.T, present.T)
    _, by_column = jax.lax.scan(backwards, (end, end), columns, reverse=True)
    advantages = by_column.T
    return advantages, advantages + values


def discounted_returns(rewards: Array, mask: Array, gamma: float = 1.0) -> Array:
    """Reward-to-go: ``R_t = r_t + gamma * R_next`` over response tokens, [B, T] -> [B, T] float32,
    0 where masked.
    """
    returns, _ = gae(rewards, jnp.zeros_like(rewards), mask, gamma, lam=1.0)
    return returns


def leave_one_out(scores: Array, mask: Array | None = None) -> Array:
    """RLOO (Ahmadian et al. 2024): each score minus the mean of the group's others, ``G / (G - 1) *
    (r - mean)``.

    Args:
      scores: [N, G].
      mask: [N, G], non-zero where the answer is present; None means all are. G above counts present
        answers.

    Returns:
      [N, G] float32; equal scores give exactly 0, as does a group with fewer than two present
      answers.
    """
    centred, count = _centred(scores, mask)
    num_others = jnp.maximum(count - 1.0, 1.0)
    return centred * (count / num_others)


def group_normalized(
    scores: Array, mask: Array | None = None, *, eps: float = 1e-4, scale: bool = True
) -> Array:
    """GRPO (Shao et al. 2024, section 4.1.2): ``(r - mean) / (std + eps)`` within each group, std
    with n - 1.

    Args:
      scores: [N, G].
      mask: [N, G], non-zero where the answer is present; None means all are.
      eps: added to the standard deviation.
      scale: False divides by nothing (Dr. GRPO, Liu et al. 2025).

    Returns:
      [N, G] float32; equal scores give exactly 0, also at ``eps=0``, as does a group with fewer
      than two present answers. A score that is NaN or infinite makes its whole group NaN, so that
      the step reports ``nonfinite``.
    """
    centred, count = _centred(scores, mask)
    if not scale:
        return centred
    # In units of the largest distance from the mean, whose squares neither overflow nor vanish.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(centred), axis=1, keepdims=True))
    varied = largest != 0  # NaN too
    unit = jnp.where(varied, largest, 1.0)
    centred = centred * (1.0 / unit)
    squares = jnp.sum(jnp.square(centred), axis=1, keepdims=True)
    var = squares / jnp.maximum(count - 1.0, 1.0)
    std = jnp.sqrt(jnp.where(varied, var, 1.0))
    return jnp.where(varied, centred * (1.0 / (std + eps / unit)), 0.0)


def max_likelihood(scores: Array, mask: Array | None = None) -> Array:
    """MaxRL (Tajwar et al. 2026, arXiv 2602.02710, algorithm 1): ``(r - mean) / mean`` within each
    group. Of rewards 0 and 1 the expected gradient of the mean over G answers is that of
    ``sum_(k = 1 .. G - 1) pass@k / k``, the first terms of the series of ``log(pass@1)``.

    Args:
      scores: [N, G]; the paper has 0 and 1. A group with one below 0 is NaN, so that the step
        reports ``nonfinite``: divided by a negative mean its best answer would be the worst.
      mask: [N, G], non-zero where the answer is present; None means all are.

    Returns:
      [N, G] float32; equal scores give exactly 0, as does a group whose mean is 0.
    """
    differences, _ = _centred(scores, mask)
    mean = ops.masked_mean(scores, _present(scores, mask), axis=1, keepdims=True)
    advantages = jnp.where(mean == 0, 0.0, differences / jnp.where(mean == 0, 1.0, mean))
    is_negative = jnp.any(_present(scores, mask) & (scores < 0), axis=1, keepdims=True)
    return jnp.where(is_negative, jnp.nan, advantages)


def pass_at_k(scores: Array, k: int, mask: Array | None = None) -> Array:
    """Pass@k as an objective (Walder and Karkhanis 2025, arXiv 2505.15201, eq. 33): n times the
    paper's ``sloo_minus_one``, so that the mean over the n answers of ``A_i`` times the gradient of
    the log-probability is an unbiased gradient of the expected best score of k answers.

    ``A_i = k * mean over sets J of k - 1 other answers of max(r_i - max_J r, 0)``, in O(G log G):
    from the worst answer on, a step up to the next score counts as often as all of J lie before it.

    Args:
      scores: [N, G]; 0 and 1 for pass@k.
      k: from 2 to G.
      mask: [N, G], non-zero where the answer is present; None means all are.

    Returns:
      [N, G] float32, at least 0; equal scores give exactly 0, as does a group with fewer than k
      present answers.
    """
    chex.assert_rank(scores, 2)
    if not 2 <= k <= scores.shape[1]:
        raise ValueError(f"k: expected 2 to {scores.shape[1]}, the answers in a group, got {k}")
    scores, present = ops.float32(scores), _present(scores, mask)
    count = jnp.sum(present, axis=1, keepdims=True)
    order = jnp.argsort(jnp.where(present, scores, jnp.inf), axis=1)  # missing answers last
    is_there = jnp.take_along_axis(present, order, axis=1)
    ordered = jnp.where(is_there, jnp.take_along_axis(scores, order, axis=1), 0.0)
    steps = jnp.where(is_there, jnp.diff(ordered, axis=1, prepend=ordered[:, :1]), 0.0)
    # C(answers before, k - 1) / C(count - 1, k - 1)
    taken = jnp.arange(k - 1)[None, None, :]
    before = jnp.arange(scores.shape[1])[None, :, None] - taken
    share = jnp.prod(before / jnp.maximum(count[:, :, None] - 1 - taken, 1), axis=2)
    gained = jnp.cumsum(k * share * steps, axis=1)  # of fewer than k answers no share is above 0
    return ops.masked(jnp.take_along_axis(gained, jnp.argsort(order, axis=1), axis=1), present)


def _centred(scores: Array, mask: Array | None) -> tuple[Array, Array]:
    """Scores [N, G] minus the group's mean, 0 for missing answers and for the only answer of a
    group; and the number of answers that are not missing [N, 1].
    """
    chex.assert_rank(scores, 2)
    if scores.shape[1] < 2:
        raise ValueError(f"scores: expected at least 2 answers in a group, got {scores.shape}")
    present = _present(scores, mask)
    count = jnp.sum(present, axis=1, keepdims=True, dtype=jnp.float32)
    differences, _ = ops.centred(scores, present, axis=1)
    return differences, count


def _present(scores: Array, mask: Array | None) -> Array:
    """Whether each score is not missing; all are True if the mask is None."""
    if mask is None:
        return jnp.ones(scores.shape, bool)
    mask = jnp.asarray(mask)
    chex.assert_equal_shape([scores, mask])
    return mask != 0


def ema_baseline(
    baseline: Array | float,
    scores: Array,
    mask: Array | None = None,
    *,
    decay: float = 0.9,
    axis_name: AxisName = None,
) -> tuple[Array, Array]:
    """Moving-average baseline (jRLHF): first ``b <- decay * b + (1 - decay) * mean(scores)``, then
    ``A = scores - b``.

    Args:
      baseline: scalar, 0 at the start of a run.
      scores: [B].
      mask: [B], 0 where the row is missing; None: no row is missing. If all rows are missing, the
          baseline does not change.
      axis_name: the mapped axis; the mean is over the rows of all its devices.

    Returns:
      (baseline, advantages): a scalar and [B], float32; missing rows get advantage 0.
    """
    chex.assert_rank(scores, 1)
    present = _present(scores, mask)
    mean = ops.masked_mean(scores, present, axis_name=axis_name)
    moved = decay * ops.float32(baseline) + (1.0 - decay) * mean
    num_present = ops.psum(jnp.sum(present), axis_name)
    baseline = jnp.where(num_present > 0, moved, baseline)
    return baseline, ops.masked(scores - baseline, present)
