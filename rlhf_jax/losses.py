"""Losses on arrays, and how losses of tokens become one number. No parameters, no models.

Losses of tokens ([B, T]) are reduced by ``aggregate``; losses of rows ([B]) by ``ops.masked_mean``. All are float32.

Masked columns: ``policy_gradient`` and ``cross_entropy`` take the mask. ``clipped_surrogate`` and ``clipped_value``
do not: call them with ``jnp.where(mask, new, old)``, so that neither the exponential nor its gradient ever sees a
masked column.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from rlhf_jax import ops
from rlhf_jax.ops import AxisName

DPOKind = Literal["sigmoid", "robust", "hinge", "ipo"]
Aggregation = Literal["token", "sequence", "sum", "fixed"]


def comparison(
    scores: jax.Array, best: jax.Array, margin: jax.Array | None = None, centering: float = 0.0
) -> jax.Array:
    """Negative log-likelihood of the human's choice among K answers: ``-log_softmax(scores)[best]``.

    K = 4 in lm-human-preferences (Ziegler et al. 2019, eq. 1); K = 2 is Bradley-Terry. Equal scores give ln K.

    Args:
      scores: [B, K]; an absent answer enters as -inf and gets gradient 0.
      best: [B] int, the chosen column. A row whose chosen answer is absent gives 0.
      margin: [B], subtracted from the chosen answer's score (Llama 2, Touvron et al. 2023, eq. 2).
      centering: weight of the squared sum of a pair's scores, which pulls scores towards 0 (Eisenstein et al. 2023);
        a pair with an absent answer adds 0.

    Returns:
      [B] float32.

    Raises:
      ValueError: a wrong rank or batch size, or ``centering`` is not 0 and K is not 2.
    """
    ops.check_rank(2, scores=scores)
    ops.check_rank(1, best=best)
    num_answers = jnp.shape(scores)[1]
    if centering != 0 and num_answers != 2:
        raise ValueError(f"centering: defined for pairs (K = 2) only, got K = {num_answers}; use centering=0")
    scores = jnp.asarray(scores, jnp.float32)
    ops.check_same_shape(best=best, one_answer_of_scores=scores[:, 0])
    best = jnp.asarray(best)[:, None]
    present = scores != -jnp.inf
    usable = jnp.take_along_axis(present, best, axis=1)  # [B, 1]
    # A row of zeros in place of an unusable one: log_softmax of nothing but -inf would put NaN into the gradient.
    entered = jnp.where(usable, scores, 0.0)
    if margin is not None:
        ops.check_same_shape(margin=margin, best=best[:, 0])
        is_best = jnp.arange(num_answers)[None, :] == best
        entered = entered - jnp.where(is_best & usable, jnp.asarray(margin, jnp.float32)[:, None], 0.0)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(entered, axis=1), best, axis=1)
    loss = jnp.where(usable, -chosen, 0.0)[:, 0]
    if centering != 0:
        pair = jnp.all(present, axis=1, keepdims=True)
        loss = loss + centering * jnp.square(jnp.sum(jnp.where(pair, scores, 0.0), axis=1))
    return loss


def regression(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """Squared error against target scores (jRLHF), elementwise: the shape of ``scores`` such as [B, K], float32.

    Raises:
      ValueError: unequal shapes.
    """
    ops.check_same_shape(scores=scores, targets=targets)
    return jnp.square(jnp.asarray(scores, jnp.float32) - jnp.asarray(targets, jnp.float32))


def policy_gradient(log_probs: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
    """REINFORCE: ``-advantage * log_prob`` per token, 0 where masked (Williams 1992). Aggregate by ``sum``.

    Args:
      log_probs, mask: [B, T].
      advantages: [B, T], or [B] for one advantage a row. They are not differentiated.

    Returns:
      [B, T] float32.

    Raises:
      ValueError: shapes that are not one [B, T] (advantages also [B]).
    """
    ops.check_rank(2, log_probs=log_probs)
    advantages = jax.lax.stop_gradient(jnp.asarray(advantages, jnp.float32))
    if advantages.ndim == 1:
        ops.check_same_shape(advantages=advantages, one_column_of_log_probs=log_probs[:, 0])
        advantages = jnp.broadcast_to(advantages[:, None], jnp.shape(log_probs))
    ops.check_same_shape(log_probs=log_probs, advantages=advantages, mask=mask)
    present = jnp.asarray(mask) != 0
    return -jnp.where(present, advantages, 0.0) * jnp.where(present, jnp.asarray(log_probs, jnp.float32), 0.0)


def clipped_surrogate(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> jax.Array:
    """PPO's policy loss per token: ``max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))``.

    Schulman et al. 2017, eq. 7; asymmetric clipping as in DAPO (Yu et al. 2025). ``dual_clip`` = c bounds the loss of
    A < 0 by ``-c * A`` (Ye et al. 2020, "Mastering Complex Control in MOBA Games", eq. 5). The ratio is
    ``ops.ratio``: a log-ratio above 40 is continued linearly. There is no mask: pass ``jnp.where(mask, new, old)`` as
    ``log_probs``.

    Args:
      log_probs, old_log_probs, advantages: the same shape, such as [B, T]. Only ``log_probs`` is differentiated.

    Returns:
      The same shape, float32.

    Raises:
      ValueError: unequal shapes, or ``dual_clip`` is not above 1.
    """
    ops.check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip: expected a number above 1 (or None), got {dual_clip}")
    advantages = jax.lax.stop_gradient(jnp.asarray(advantages, jnp.float32))
    ratio = ops.ratio(log_probs, jax.lax.stop_gradient(old_log_probs))
    loss = jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high))
    if dual_clip is None:
        return loss
    return jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)


def clipped_value(values: jax.Array, old_values: jax.Array, returns: jax.Array, clip: float = 0.2) -> jax.Array:
    """PPO's value loss: ``0.5 * max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2)``, as in
    lm-human-preferences.

    Args:
      values, old_values, returns: the same shape, such as [B, T]. Only ``values`` is differentiated. There is no
        mask: pass ``jnp.where(mask, new, old)`` as ``values``.
      clip: how far, in units of reward, values may move from ``old_values`` and still lower the loss.

    Returns:
      The same shape, float32.

    Raises:
      ValueError: unequal shapes.
    """
    ops.check_same_shape(values=values, old_values=old_values, returns=returns)
    values = jnp.asarray(values, jnp.float32)
    old_values = jax.lax.stop_gradient(jnp.asarray(old_values, jnp.float32))
    returns = jax.lax.stop_gradient(jnp.asarray(returns, jnp.float32))
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))


def dpo(
    log_ratio_chosen: jax.Array,
    log_ratio_rejected: jax.Array,
    beta: float,
    kind: DPOKind = "sigmoid",
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Direct preference losses of Delta = log_ratio_chosen - log_ratio_rejected, with h = beta * Delta and label
    smoothing s.

    - ``sigmoid``: ``-(1 - s) log sigmoid(h) - s log sigmoid(-h)``; s = 0 is Rafailov et al. 2023, eq. 7, s > 0
      conservative DPO (Mitchell 2023).
    - ``robust``: ``(-(1 - s) log sigmoid(h) + s log sigmoid(-h)) / (1 - 2 s)``, unbiased when a fraction s of the
      labels is flipped (Chowdhury et al. 2024).
    - ``hinge``: ``max(0, 1 - h)`` (SLiC, Zhao et al. 2023).
    - ``ipo``: ``(Delta - 1 / (2 beta))^2`` (Azar et al. 2023, eq. 17).

    Args:
      log_ratio_chosen, log_ratio_rejected: [B], policy minus reference log-probability in nats, summed over the
        response.

    Returns:
      [B] float32.

    Raises:
      ValueError: unknown kind, unequal shapes, or a label smoothing outside [0, 0.5) or with hinge or ipo.
    """
    check_dpo(kind, label_smoothing)
    ops.check_same_shape(log_ratio_chosen=log_ratio_chosen, log_ratio_rejected=log_ratio_rejected)
    delta = jnp.asarray(log_ratio_chosen, jnp.float32) - jnp.asarray(log_ratio_rejected, jnp.float32)
    if kind == "ipo":
        return jnp.square(delta - 1.0 / (2.0 * beta))
    if kind == "hinge":
        return jax.nn.relu(1.0 - beta * delta)
    right = -jax.nn.log_sigmoid(beta * delta)
    flipped = -jax.nn.log_sigmoid(-beta * delta)
    if kind == "robust":
        return ((1.0 - label_smoothing) * right - label_smoothing * flipped) / (1.0 - 2.0 * label_smoothing)
    return (1.0 - label_smoothing) * right + label_smoothing * flipped


def check_dpo(kind: DPOKind, label_smoothing: float) -> None:
    """Raises ValueError: an unknown kind, or a label smoothing outside [0, 0.5) or with hinge or ipo."""
    ops.check_choice("kind", kind, get_args(DPOKind))
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing: expected a number in [0, 0.5), got {label_smoothing}")
    if label_smoothing and kind in ("hinge", "ipo"):
        raise ValueError(f"label_smoothing: not defined for {kind!r}; use 'sigmoid' or 'robust', or 0")


def cross_entropy(log_probs: jax.Array, mask: jax.Array) -> jax.Array:
    """Negative log-likelihood per token in nats, 0 where masked: [B, T] -> [B, T] float32.

    Raises:
      ValueError: unequal shapes.
    """
    ops.check_same_shape(log_probs=log_probs, mask=mask)
    return -jnp.where(jnp.asarray(mask) != 0, jnp.asarray(log_probs, jnp.float32), 0.0)


def denominator(
    mask: jax.Array, how: Aggregation, length: int | None = None, axis_name: AxisName | None = None
) -> jax.Array:
    """What ``aggregate`` divides by: a scalar float32, at least 1, of all devices of ``axis_name``.

    ``token``: response tokens; ``sequence`` and ``sum``: rows with at least one response token; ``fixed``: those rows
    times ``length``. Taken from the mask of the whole batch and given to ``aggregate`` of each of its microbatches,
    it makes their losses, and so their gradients, add up to those of the whole batch.

    Args:
      mask: [B, T].

    Raises:
      ValueError: unknown ``how``, ``fixed`` without a positive ``length``, or a mask that is not [B, T].
    """
    ops.check_choice("how", how, get_args(Aggregation))
    ops.check_rank(2, mask=mask)
    if how == "fixed" and (length is None or length <= 0):
        raise ValueError(f"length: 'fixed' needs a positive length, such as max_new_tokens, got {length}")
    present = jnp.asarray(mask) != 0
    counted = present if how == "token" else jnp.any(present, axis=1)
    count = jnp.maximum(ops.psum(jnp.sum(counted, dtype=jnp.float32), axis_name), 1.0)
    return count * length if how == "fixed" and length is not None else count


def aggregate(
    per_token: jax.Array,
    mask: jax.Array,
    how: Aggregation = "token",
    length: int | None = None,
    denominator: jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    """One number from losses of tokens; rows with an empty mask count nowhere, and a mean over nothing is 0.

    - ``token``: sum over response tokens / number of response tokens (PPO; DAPO for groups).
    - ``sequence``: mean over rows of row means (GRPO, Shao et al. 2024, eq. 3).
    - ``sum``: mean over rows of row sums (REINFORCE, RLOO).
    - ``fixed``: sum / (rows * length) (Dr. GRPO, Liu et al. 2025); ``length`` is ``max_new_tokens``.

    Args:
      per_token, mask: [B, T]; values in masked columns are not read.
      denominator: from ``losses.denominator`` of a larger batch that this one is a part of; the results of the parts
        then add up to that of the batch. None: this batch's own.
      axis_name: mapped axis over which the rows are split: the result is the global loss on every device, and
        gradients of it are to be combined by ``pmean`` (see ``ops``).

    Returns:
      Scalar float32.

    Raises:
      ValueError: unknown ``how``, unequal shapes, or ``fixed`` with neither ``length`` nor ``denominator``.
    """
    ops.check_choice("how", how, get_args(Aggregation))
    ops.check_rank(2, per_token=per_token)
    ops.check_same_shape(per_token=per_token, mask=mask)
    if denominator is None:
        denominator = _denominator(mask, how, length, axis_name)
    present = jnp.asarray(mask) != 0
    per_row = jnp.sum(jnp.where(present, jnp.asarray(per_token, jnp.float32), 0.0), axis=1)
    if how == "sequence":
        per_row = per_row / jnp.maximum(jnp.sum(present, axis=1, dtype=jnp.float32), 1.0)
    return ops.psum(jnp.sum(per_row), axis_name) / denominator


_denominator = denominator  # the argument of ``aggregate`` hides the function's name there
