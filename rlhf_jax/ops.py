"""Masked statistics and token log-probabilities: the array maths everything else is built on.

Column t of every [B, T] array speaks of ``tokens[:, t]``; it is predicted by the logits at t - 1, and column 0 is 0.
Results are float32 whatever the input. Masks may be bool, int or float; non-zero is true. Masked entries are replaced
by ``jnp.where`` before anything is computed from them, so a NaN or 1e4 there reaches neither value nor gradient.

``axis_name`` names the mapped axis (or axes) of ``shard_map`` or ``pmap`` over which rows are split: sums and counts
are then ``psum``-ed and every device holds the global result. Gradients of such a result are to be combined by
``pmean``: a ``psum`` transposes to a ``psum``, which already makes each device's gradient as many times too large as
there are devices.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from rlhf_jax.types import PolicyFn, PolicyOutput

AxisName = str | tuple[str, ...]
KLEstimator = Literal["k1", "k2", "k3"]

# The square of e^40 still fits in float32, so gradient norms stay finite too.
_MAX_LOG_RATIO = 40.0


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ValueError, listing the choices, unless ``value`` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_rank(rank: int, **arrays: Any) -> None:
    """Raises ValueError, naming the array, unless each has this number of dimensions."""
    for name, array in arrays.items():
        if jnp.ndim(array) != rank:
            raise ValueError(f"{name}: expected {rank} dimensions, got shape {jnp.shape(array)}")


def check_same_shape(**arrays: Any) -> None:
    """Raises ValueError, naming the arrays and their shapes, unless all shapes are equal."""
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"expected equal shapes, got {', '.join(f'{name} {shape}' for name, shape in shapes.items())}")


def psum(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Sum of ``x``, of any shape, over the devices of ``axis_name``; ``x`` itself where that is None."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def masked_mean(
    x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None, axis_name: AxisName | None = None
) -> jax.Array:
    """Mean of ``x`` where ``mask`` is non-zero; a mean over nothing is 0.

    Args:
      x, mask: the same shape, any rank.
      axis: dimensions to reduce; None reduces all to a scalar.
      axis_name: mapped axis over which the rows are split; the mean is then global.

    Raises:
      ValueError: ``x`` and ``mask`` differ in shape.
    """
    return _masked_mean(x, mask, axis, axis_name, keepdims=False)


def _masked_mean(
    x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None, axis_name: AxisName | None, keepdims: bool
) -> jax.Array:
    check_same_shape(x=x, mask=mask)
    present = jnp.asarray(mask) != 0
    x = jnp.where(present, jnp.asarray(x, jnp.float32), 0.0)
    total = psum(jnp.sum(x, axis=axis, keepdims=keepdims), axis_name)
    count = psum(jnp.sum(present, axis=axis, keepdims=keepdims, dtype=jnp.float32), axis_name)
    return total / jnp.maximum(count, 1.0)


def masked_var(
    x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None, axis_name: AxisName | None = None
) -> jax.Array:
    """Population variance (divides by n) of ``x`` where ``mask`` is non-zero; 0 over nothing. Arguments and errors as
    ``masked_mean``."""
    mean = _masked_mean(x, mask, axis, axis_name, keepdims=True)
    x = jnp.where(jnp.asarray(mask) != 0, jnp.asarray(x, jnp.float32), mean)
    return masked_mean(jnp.square(x - mean), mask, axis, axis_name)


def whiten(
    x: jax.Array, mask: jax.Array, shift_mean: bool = True, axis_name: AxisName | None = None, *, eps: float = 1e-8
) -> jax.Array:
    """Scales ``x`` to unit variance over the masked entries: ``(x - mean) * rsqrt(var + eps)``, 0 elsewhere.

    The population variance over all entries, of all devices of ``axis_name`` (lm-human-preferences computes it per
    rank).

    Args:
      x, mask: the same shape, any rank.
      shift_mean: False adds the mean back, as for rewards, whose sign means something.

    Returns:
      The same shape, float32.

    Raises:
      ValueError: ``x`` and ``mask`` differ in shape.
    """
    mean = masked_mean(x, mask, axis_name=axis_name)
    var = masked_var(x, mask, axis_name=axis_name)
    present = jnp.asarray(mask) != 0
    x = jnp.where(present, jnp.asarray(x, jnp.float32), 0.0)
    white = (x - mean) * jax.lax.rsqrt(var + eps)
    return jnp.where(present, white if shift_mean else white + mean, 0.0)


def _predicting_logits(logits: jax.Array, temperature: float | jax.Array) -> jax.Array:
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    return jnp.asarray(logits)[..., :-1, :].astype(jnp.float32) / temperature


def _align(x: jax.Array) -> jax.Array:
    """Puts a 0 in front of the last dimension: what position t - 1 says of t moves to column t."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 0)])


def token_log_probs(logits: jax.Array, tokens: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """Log-probability, in nats, of each token under the temperature-scaled softmax of the column before it.

    Args:
      logits: [B, T, V] of any float type (leading dimensions may be any number).
      tokens: [B, T] int.
      temperature: divides the logits.

    Returns:
      [B, T] float32, ``logit - logsumexp``: no second [B, T, V] array is kept. Column 0 is 0.

    Raises:
      ValueError: ``logits`` is not ``tokens`` with one more dimension, or the temperature is not positive.
    """
    if jnp.shape(logits)[:-1] != jnp.shape(tokens):
        raise ValueError(
            f"expected logits [B, T, V] and tokens [B, T], got shapes {jnp.shape(logits)} and {jnp.shape(tokens)}"
        )
    scaled = _predicting_logits(logits, temperature)
    chosen = jnp.take_along_axis(scaled, jnp.asarray(tokens)[..., 1:, None], axis=-1)[..., 0]
    return _align(chosen - jax.nn.logsumexp(scaled, axis=-1))


def entropy(logits: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """Entropy, in nats, of the temperature-scaled softmax from which each token was drawn.

    Args:
      logits: [B, T, V] of any float type; -inf is allowed and counts as probability 0.

    Returns:
      [B, T] float32, aligned as ``token_log_probs``: column t belongs to the logits at t - 1, column 0 is 0.

    Raises:
      ValueError: the temperature is not positive.
    """
    log_probs = jax.nn.log_softmax(_predicting_logits(logits, temperature), axis=-1)
    possible = log_probs != -jnp.inf
    return _align(-jnp.sum(jnp.exp(log_probs) * jnp.where(possible, log_probs, 0.0), axis=-1))


def ratio(log_probs: jax.Array, old_log_probs: jax.Array) -> jax.Array:
    """``exp(log_probs - old_log_probs)``, same shape, float32.

    Exact up to a log-ratio of 40 (2e17) and continued by its tangent beyond: huge log-ratios overflow neither in
    value nor in gradient, and the gradient keeps its direction.

    Raises:
      ValueError: unequal shapes.
    """
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs)
    log_ratio = jnp.asarray(log_probs, jnp.float32) - jnp.asarray(old_log_probs, jnp.float32)
    return jnp.exp(jnp.minimum(log_ratio, _MAX_LOG_RATIO)) + _tangent(log_ratio)


def _tangent(log_ratio: jax.Array) -> jax.Array:
    return jnp.exp(_MAX_LOG_RATIO) * jnp.maximum(log_ratio - _MAX_LOG_RATIO, 0.0)


def kl(log_probs: jax.Array, ref_log_probs: jax.Array, estimator: KLEstimator = "k1") -> jax.Array:
    """Per-token estimate of KL(policy || reference) in nats from tokens drawn by the policy (Schulman 2020,
    "Approximating KL Divergence", joschu.net/blog/kl-approx.html).

    With d = log_probs - ref_log_probs: ``k1`` = d, ``k2`` = d^2 / 2, ``k3`` = exp(-d) - 1 + d. k1 and k3 are
    unbiased, k2 and k3 never negative. As a loss, k2 has the gradient of KL(policy || reference) of that one token,
    k3 that of its KL(reference || policy), and k1 has expected gradient 0; what a token does to the KL of later ones
    is not in it (Tang and Munos 2025, arXiv 2506.09477). The exponential of k3 is continued as in ``ratio``.

    Args:
      log_probs, ref_log_probs: the same shape; put equal numbers in masked columns first.

    Returns:
      The same shape, float32.

    Raises:
      ValueError: unknown estimator or unequal shapes.
    """
    check_choice("estimator", estimator, get_args(KLEstimator))
    check_same_shape(log_probs=log_probs, ref_log_probs=ref_log_probs)
    d = jnp.asarray(log_probs, jnp.float32) - jnp.asarray(ref_log_probs, jnp.float32)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * jnp.square(d)
    return jnp.expm1(jnp.minimum(-d, _MAX_LOG_RATIO)) + _tangent(-d) + d


def response_mask(tokens: jax.Array, prompt_length: int, eos_id: int) -> jax.Array:
    """1 from column ``prompt_length`` up to and including the first EOS there; to the end if there is none.

    Args:
      tokens: [B, T]; an EOS inside the prompt ends nothing.

    Returns:
      [B, T] int32.

    Raises:
      ValueError: tokens that are not [B, T].
    """
    check_rank(2, tokens=tokens)
    said = jnp.arange(jnp.shape(tokens)[1])[None, :] >= prompt_length
    is_eos = (said & (jnp.asarray(tokens) == eos_id)).astype(jnp.int32)
    return (said & (jnp.cumsum(is_eos, axis=1) - is_eos == 0)).astype(jnp.int32)


def policy_fn(apply_fn: Callable[..., jax.Array], temperature: float | jax.Array = 1.0) -> PolicyFn:
    """Makes a PolicyFn of any ``apply_fn(params, tokens, attention_mask, key) -> logits [B, T, V]``.

    Values are None. The whole [B, T, V] array exists at once: right for small vocabularies, lookup tables and other
    libraries' models; ``models.policy_fn`` works in chunks.
    """

    def apply_policy(params: Any, tokens: jax.Array, attention_mask: jax.Array, key: jax.Array | None) -> PolicyOutput:
        logits = apply_fn(params, tokens, attention_mask, key)
        return PolicyOutput(token_log_probs(logits, tokens, temperature), entropy(logits, temperature))

    return apply_policy
