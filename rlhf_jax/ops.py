"""Masked statistics and token log-probabilities: the array maths everything else is built on.

Column t of every [B, T] array belongs to ``tokens[:, t]``, which the logits at t - 1 predict;
column 0 is 0. Results are float32 whatever the input. Masks may be bool, int or float; non-zero
is true. Masked entries are replaced by ``jnp.where`` before anything is computed from them, so a
NaN or 1e4 there reaches neither value nor gradient.

``axis_name`` names the mapped axis (or axes) of ``shard_map`` or ``pmap`` over which rows are
split: sums and counts are then ``psum``-ed and every device holds the global result.
"""

import operator
from collections.abc import Callable
from typing import Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.policies import Policy
from rlhf_jax.policies import by_rows as by_rows
from rlhf_jax.policies import evaluate as evaluate
from rlhf_jax.policies import split_rows as split_rows
from rlhf_jax.types import (
    AxisName,
    Comparisons,
    Demonstrations,
    DropoutKey,
    EosId,
    Params,
    PolicyFn,
    PolicyOutput,
    known,
)

Axis = int | tuple[int, ...] | None  # dimensions to reduce; None: all
KLEstimator = Literal["k1", "k2", "k3"]

# The square of e^40 still fits in float32, so gradient norms stay finite too.
_MAX_LOG_RATIO = 40.0
# The logit of an id that could not be drawn. Finite, so that 0 times it is 0.
_IMPOSSIBLE = -1e30


def check_choice(name: str, value: object, literal: Any) -> None:
    """Raises ValueError, listing the choices, unless ``value`` is one of those of a Literal."""
    choices = get_args(literal)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


_RULES = {
    "at_least": operator.ge,
    "above": operator.gt,
    "at_most": operator.le,
    "below": operator.lt,
}


def check_number(name: str, value: Any, **bounds: float) -> None:
    """Raises ValueError, naming the setting, unless ``value`` keeps the bounds: at_least, above,
    at_most, below.

    None passes, and so does a JAX tracer, whose value is not known while a function is traced.
    """
    if value is None or isinstance(value, jax.core.Tracer):
        return
    for rule, bound in bounds.items():
        try:
            is_kept = _RULES[rule](value, bound)
        except TypeError:
            raise ValueError(f"{name} must be a number, got {value!r}") from None
        if not is_kept:
            raise ValueError(f"{name} must be {rule.replace('_', ' ')} {bound}, got {value}")


def check_temperature(name: str, value: Any) -> None:
    """`check_number` of a sampling temperature: lower ones lose log-probabilities in float32."""
    check_number(name, value, at_least=0, below=float("inf"))
    if value and value < 1e-6:
        raise ValueError(f"{name} must be 0 (greedy) or at least 1e-06, got {value}")


def check_numbers(settings: Any, *names: str, **bounds: float) -> None:
    """``check_number`` of each of these fields of the settings."""
    for name in names:
        check_number(name, getattr(settings, name), **bounds)


def is_zero(coefficient: Array | float) -> bool:
    """True for Python's 0, whose term is left out; False for an array or tracer of any value."""
    return isinstance(coefficient, int | float) and coefficient == 0


def psum(x: Any, axis_name: AxisName) -> Any:
    """Sum of ``x``, an array or a tree of arrays, over the devices of ``axis_name``; ``x`` itself
    if that is None.
    """
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def float32(x: Any) -> Array:
    """``x``, an array or a number, in float32."""
    return jnp.asarray(x, jnp.float32)


# A user context is part of jit's cache key: a loss that is jitted is traced for each value.
_is_differentiable = jax.make_user_context(False)


def frozen(x: Any) -> Array:
    """``x`` in float32, of what a loss is given, such as advantages: a constant, through which no
    gradient flows, but in a function that is ``differentiable``.
    """
    x = float32(x)
    return x if _is_differentiable.value else jax.lax.stop_gradient(x)


def differentiable(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, in which ``frozen`` gives what it is given, while it is traced."""

    def unfrozen(*args: Any, **named: Any) -> Any:
        with _is_differentiable(True):
            return fn(*args, **named)

    return unfrozen


def masked(x: Array, mask: Array) -> Array:
    """``x`` in float32 where ``mask`` is non-zero, 0 elsewhere. Masked values are never used, not
    even NaN.
    """
    return jnp.where(jnp.asarray(mask) != 0, float32(x), 0.0)


def absolute(x: Array) -> Array:
    """``|x|`` in float32. Its gradient at 0 is 0, where that of ``jnp.abs`` is 1."""
    x = float32(x)
    return x * jax.lax.stop_gradient(jnp.sign(x))


def is_last(present: Array) -> Array:
    """[B, T] bool: the last entry of each row that is present [B, T]; none in an empty row."""
    remaining = jax.lax.cumsum(present.astype(jnp.int32), axis=1, reverse=True)
    return present & (remaining == 1)


def at_end(scores: Array, mask: Array) -> Array:
    """Dense rewards [B, T], 0 where the mask [B, T] is 0: scores [B] stand at the last entry of
    their rows, and dense ones [B, T] stay where they are.
    """
    present = jnp.asarray(mask) != 0
    if scores.ndim == 2:
        return masked(scores, present)
    return masked(scores[:, None], is_last(present))


def masked_mean(
    x: Array, mask: Array, axis: Axis = None, axis_name: AxisName = None, *, keepdims: bool = False
) -> Array:
    """Mean of ``x`` where ``mask`` is non-zero; a mean over nothing is 0.

    Args:
      x, mask: the same shape, any rank.
      axis: dimensions to reduce; None reduces all to a scalar.
      axis_name: mapped axis over which the rows are split; the mean is then global.
    """
    chex.assert_equal_shape([x, mask])
    present = jnp.asarray(mask) != 0
    total = jnp.sum(masked(x, present), axis=axis, keepdims=keepdims)
    count = jnp.sum(present, axis=axis, keepdims=keepdims, dtype=jnp.float32)
    return psum(total, axis_name) / jnp.maximum(psum(count, axis_name), 1.0)


def centred(
    x: Array, mask: Array, axis: Axis = None, axis_name: AxisName = None
) -> tuple[Array, Array]:
    """``x`` minus its mean over the masked entries, 0 elsewhere; and the mean, whose reduced
    dimensions have size 1. Arguments as ``masked_mean``.

    Equal numbers give exactly 0, and their mean is exactly that number. A sum divided by its count
    is not: in float32 the mean of 992 times 10.1 is 10.100004, and what is left of such numbers
    would be scaled up to any size by a division by their standard deviation.
    """
    chex.assert_equal_shape([x, mask])
    present = jnp.asarray(mask) != 0
    x = float32(x)
    least = jnp.min(
        jnp.where(present, jax.lax.stop_gradient(x), jnp.inf),
        axis=axis,
        keepdims=True,
        initial=jnp.inf,
    )
    if axis_name is not None:
        least = jax.lax.pmin(least, axis_name)
    least = jnp.where(least == jnp.inf, 0.0, least)  # nothing is present
    above = jnp.where(present, x - least, 0.0)
    mean_above = masked_mean(above, present, axis, axis_name, keepdims=True)
    return jnp.where(present, above - mean_above, 0.0), least + mean_above


def masked_var(x: Array, mask: Array, axis: Axis = None, axis_name: AxisName = None) -> Array:
    """Population variance (divides by n) of ``x`` where ``mask`` is non-zero; 0 over nothing, and
    exactly 0 of equal numbers. Arguments as ``masked_mean``.
    """
    differences, _ = centred(x, mask, axis, axis_name)
    return masked_mean(jnp.square(differences), mask, axis, axis_name)


def inverse_deviation(var: Array, mean: Array | float) -> Array:
    """``1 / sqrt(var + (1e-7 mean)^2)`` of numbers of any unit with this variance and mean: those
    that differ by rounding alone are not scaled up to 1. 0, as its gradient, if the variance is 0.
    """
    varies = var != 0  # NaN too
    scale = jnp.where(varies, var + jnp.square(1e-7 * mean), 1.0)
    return jnp.where(varies, jax.lax.rsqrt(scale), 0.0)


def whiten(x: Array, mask: Array, shift_mean: bool = True, axis_name: AxisName = None) -> Array:
    """Scales ``x`` to unit variance over the masked entries: ``(x - mean) * inverse_deviation(var,
    mean)``, 0 elsewhere. The unit of ``x`` changes nothing, and equal numbers give exactly 0.

    The population variance over all entries, of all devices of ``axis_name`` (lm-human-preferences
    computes it per rank).

    Args:
      x, mask: the same shape, any rank.
      shift_mean: False adds the mean back, as for rewards, whose sign means something.

    Returns:
      The same shape, float32.
    """
    differences, mean = centred(x, mask, axis_name=axis_name)
    var = masked_mean(jnp.square(differences), mask, axis_name=axis_name)
    white = differences * inverse_deviation(var, mean)
    return white if shift_mean else masked(white + mean, mask)


def _predicting_logits(logits: Array, temperature: float | Array) -> Array:
    check_number("temperature", temperature, above=0)
    return jnp.asarray(logits)[..., :-1, :].astype(jnp.float32) / temperature


def _align(x: Array) -> Array:
    """Moves predictions from position t - 1 to column t by putting a 0 in front of the last
    dimension.
    """
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 0)])


def from_column(x: Array, first: int) -> Array:
    """[B, N, ...] as [B, first + N, ...], with zeros before it."""
    return jnp.pad(x, [(0, 0), (first, 0)] + [(0, 0)] * (x.ndim - 2))


def _predicted(support: Array | None) -> Array | None:
    """The support [B, T - 1, K] of the tokens that logits predict."""
    return None if support is None else support[..., 1:, :]


def token_log_probs(
    logits: Array, tokens: Array, temperature: float | Array = 1.0, support: Array | None = None
) -> Array:
    """Log-probability, in nats, of each token under the temperature-scaled softmax of the column
    before it.

    Args:
      logits: [B, T, V] of any float type (leading dimensions may be any number).
      tokens: [B, T] int.
      temperature: divides the logits.
      support: [B, T, K] ids among which each token was drawn (``Rollout.support``), itself
        included; None: the whole vocabulary.

    Returns:
      [B, T] float32, ``logit - logsumexp``: no second [B, T, V] array is kept. Column 0 is 0, and
      so is an id outside the vocabulary, such as that of a pad, through which no gradient flows.
    """
    chex.assert_shape(tokens, jnp.shape(logits)[:-1])
    scaled = _predicting_logits(logits, temperature)
    predicted = jnp.asarray(tokens)[..., 1:]
    inside = (predicted >= 0) & (predicted < scaled.shape[-1])
    chosen = jnp.take_along_axis(scaled, predicted[..., None], axis=-1, mode="clip")[..., 0]
    normalizer = jax.nn.logsumexp(among(scaled, _predicted(support)), axis=-1)
    return _align(jnp.where(inside, chosen - normalizer, 0.0))


def entropy(logits: Array, temperature: float | Array = 1.0, support: Array | None = None) -> Array:
    """Entropy, in nats, of the temperature-scaled softmax from which each token was drawn.

    Args:
      logits: [B, T, V] of any float type; -inf is allowed and counts as probability 0.
      support: as in ``token_log_probs``.

    Returns:
      [B, T] float32, aligned as ``token_log_probs``: column t belongs to the logits at t - 1,
      column 0 is 0.
    """
    scaled = among(_predicting_logits(logits, temperature), _predicted(support))
    log_probs = jax.nn.log_softmax(scaled, axis=-1)
    terms = jnp.exp(log_probs) * jnp.where(log_probs != -jnp.inf, log_probs, 0.0)
    return _align(-jnp.sum(terms, axis=-1))


def among(logits: Array, support: Array | None = None) -> Array:
    """The logits of the ids in a sampler's support: a softmax of them is the distribution that it
    drew from.

    Args:
      logits: [..., V].
      support: [..., K] ids, then -1; None: the whole vocabulary.

    Returns:
      [..., K] float32, -1e30 at the -1. Where all are -1, as outside a response, the result is
      finite and has no meaning. ``logits`` in float32 if the support is None.
    """
    logits = float32(logits)
    if support is None:
        return logits
    chosen = jnp.take_along_axis(logits, jnp.maximum(support, 0), axis=-1, mode="clip")
    places = jax.lax.broadcasted_iota(jnp.int32, support.shape, support.ndim - 1)
    return jnp.where((support >= 0) | (places == 0), chosen, _IMPOSSIBLE)


def ratio(log_probs: Array, old_log_probs: Array) -> Array:
    """``exp(log_probs - old_log_probs)`` by ``bounded_exp``, same shape, float32."""
    chex.assert_equal_shape([log_probs, old_log_probs])
    return bounded_exp(float32(log_probs) - float32(old_log_probs))


def bounded_exp(log_ratio: Array) -> Array:
    """``exp(log_ratio)``, same shape, float32.

    Exact up to a log-ratio of 40 (2e17) and continued by its tangent beyond: huge log-ratios
    overflow neither in value nor in gradient, and the gradient keeps its direction.
    """
    log_ratio = float32(log_ratio)
    return jnp.exp(jnp.minimum(log_ratio, _MAX_LOG_RATIO)) + _tangent(log_ratio)


def _tangent(log_ratio: Array) -> Array:
    return jnp.exp(_MAX_LOG_RATIO) * jnp.maximum(log_ratio - _MAX_LOG_RATIO, 0.0)


def kl(log_probs: Array, ref_log_probs: Array, estimator: KLEstimator = "k1") -> Array:
    """Per-token estimate of KL(policy || reference) in nats from tokens drawn by the policy
    (Schulman 2020, "Approximating KL Divergence", joschu.net/blog/kl-approx.html).

    With d = log_probs - ref_log_probs: ``k1`` = d, ``k2`` = d^2 / 2, ``k3`` = exp(-d) - 1 + d. k1
    and k3 are unbiased, k2 and k3 never negative. As a loss, k2 has the gradient of KL(policy ||
    reference) of that one token, k3 that of its KL(reference || policy), and k1 has expected
    gradient 0. None has the effect of a token on the KL of later tokens (Tang and Munos 2025, arXiv
    2506.09477). The exponential of k3 is continued as in ``bounded_exp``.

    Args:
      log_probs, ref_log_probs: the same shape; put equal numbers in masked columns first.

    Returns:
      The same shape, float32.
    """
    check_choice("estimator", estimator, KLEstimator)
    chex.assert_equal_shape([log_probs, ref_log_probs])
    d = float32(log_probs) - float32(ref_log_probs)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * jnp.square(d)
    return jnp.expm1(jnp.minimum(-d, _MAX_LOG_RATIO)) + _tangent(-d) + d


def response_mask(tokens: Array, prompt_length: int, eos_id: EosId) -> Array:
    """1 from column ``prompt_length`` up to and including the first EOS there; to the end if there
    is none.

    Args:
      tokens: [B, T]; an EOS inside the prompt ends nothing.
      eos_id: the token that ends a response, or several.

    Returns:
      [B, T] int32.
    """
    chex.assert_rank(tokens, 2)
    columns = jnp.arange(jnp.shape(tokens)[1])
    in_response = columns[None, :] >= prompt_length
    is_eos = (in_response & jnp.isin(tokens, jnp.asarray(eos_id))).astype(jnp.int32)
    eos_before = jnp.cumsum(is_eos, axis=1) - is_eos
    return (in_response & (eos_before == 0)).astype(jnp.int32)


def policy_fn(apply_fn: Callable[..., Array], temperature: float | Array = 1.0) -> Policy:
    """Makes a policy of any ``apply_fn(params, tokens, attention_mask, key) -> logits [B, T,
    V]``.

    Values are None. The whole [B, T, V] array exists at once: right for small vocabularies, lookup
    tables and other libraries' models; ``models.policy_fn`` works in chunks.
    """

    def apply_policy(
        params: Any,
        tokens: Array,
        attention_mask: Array,
        key: DropoutKey,
        *,
        support: Array | None = None,
        statistic: Callable[..., Any] | None = None,
        arrays: tuple[Array, ...] = (),
    ) -> PolicyOutput:
        logits = apply_fn(params, tokens, attention_mask, key)
        log_probs = token_log_probs(logits, tokens, temperature, support)
        output = PolicyOutput(log_probs, entropy(logits, temperature, support))
        if statistic is None:
            return output
        made = statistic(_predicting_logits(logits, temperature), *(x[:, 1:] for x in arrays))
        return output._replace(statistic=jax.tree.map(lambda x: from_column(x, 1), made))

    known = temperature if isinstance(temperature, int | float) else None
    return Policy(apply_policy, temperature=known, takes_statistic=True)


def best_of(best: Array | None, present: Array, num_answers: int) -> Array:
    """``Comparisons.best``, or zeros; ``present`` has its shape. ValueError if one of a comparison
    that is present is known to be no answer.
    """
    places, counts = known(best), known(present)
    if places is not None and counts is not None:
        wrong = places[counts & ((places < 0) | (places >= num_answers))]
        if wrong.size:
            last = num_answers - 1
            raise ValueError(f"comparisons.best must be from 0 to {last}, got {wrong[0]}")
    return jnp.zeros(present.shape, jnp.int32) if best is None else jnp.asarray(best)


def response_log_probs(
    policy_fn: PolicyFn, params: Params, batch: Any, *, name: str = "policy_fn"
) -> Array:
    """Log-probability, in nats, of each response: the sum over its tokens; 0 for a missing one.

    Args:
      batch: a batch with tokens and masks [B, T] or [B, K, T], such as Demonstrations or
        Comparisons; all rows go through ``policy_fn`` at once, without dropout.

    Returns:
      [B] float32, or [B, K]; [B, C, K] for packed comparisons.
    """
    arrays = [batch.tokens, batch.attention_mask, batch.response_mask]
    chex.assert_equal_shape(arrays)
    rows = Demonstrations(*(x.reshape(-1, x.shape[-1]) for x in arrays))
    log_probs = float32(evaluate(policy_fn, params, rows, name=name).log_probs)
    return response_sums(log_probs.reshape(batch.tokens.shape), batch)


def response_sums(x: Array, batch: Any) -> Array:
    """Sum of ``x``, of the shape of ``batch.tokens``, over the tokens of each response. The result
    has the shape of `response_log_probs`.
    """
    x = jnp.where(batch.response_mask != 0, x, 0)
    if isinstance(batch, Comparisons) and batch.documents is not None:
        is_own = batch.attention_mask[:, None, None] == batch.documents[..., None]  # [B, C, K, T]
        x = jnp.where(is_own, x[:, None, None], 0)
    return jnp.sum(x, axis=-1)
