"""Masked statistics and token log-probabilities: the array maths everything else is built on.

Column t of every [B, T] array belongs to ``tokens[:, t]``, which the logits at t - 1 predict;
column 0 is 0. Results are float32 whatever the input. Masks may be bool, int or float; non-zero
is true. Masked entries are replaced by ``jnp.where`` before anything is computed from them, so a
NaN or 1e4 there reaches neither value nor gradient.

``axis_name`` names the mapped axis (or axes) of ``shard_map`` or ``pmap`` over which rows are
split: sums and counts are then ``psum``-ed and every device holds the global result.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhf_jax.parallel import blocks
from rlhf_jax.types import (
    AxisName,
    Comparisons,
    Demonstrations,
    DropoutKey,
    EosId,
    Params,
    PolicyFn,
    PolicyOutput,
    Rollout,
)

Function = TypeVar("Function", bound=Callable[..., Any])
Axis = int | tuple[int, ...] | None  # dimensions to reduce; None: all
KLEstimator = Literal["k1", "k2", "k3"]

# The square of e^40 still fits in float32, so gradient norms stay finite too.
_MAX_LOG_RATIO = 40.0
# The logit of an id that could not be drawn. Finite, so that 0 times it is 0.
_IMPOSSIBLE = -1e30


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ValueError, listing the choices, unless ``value`` is one of them."""
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


def check_numbers(settings: Any, *names: str, **bounds: float) -> None:
    """``check_number`` of each of these fields of the settings."""
    for name in names:
        check_number(name, getattr(settings, name), **bounds)


def check_choices(settings: Any, **literals: Any) -> None:
    """``check_choice`` of fields of the settings, each given with its Literal type."""
    for name, literal in literals.items():
        check_choice(name, getattr(settings, name), get_args(literal))


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


def frozen(x: Any) -> Array:
    """``x`` in float32 as a constant: no gradient flows through it."""
    return jax.lax.stop_gradient(float32(x))


def masked(x: Array, mask: Array) -> Array:
    """``x`` in float32 where ``mask`` is non-zero, 0 elsewhere. Masked values are never used, not
    even NaN.
    """
    return jnp.where(jnp.asarray(mask) != 0, float32(x), 0.0)


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
    x: Array,
    mask: Array,
    axis: Axis = None,
    axis_name: AxisName = None,
    *,
    keepdims: bool = False,
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
    x: Array,
    mask: Array,
    axis: Axis = None,
    axis_name: AxisName = None,
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


def masked_var(
    x: Array,
    mask: Array,
    axis: Axis = None,
    axis_name: AxisName = None,
) -> Array:
    """Population variance (divides by n) of ``x`` where ``mask`` is non-zero; 0 over nothing, and
    exactly 0 of equal numbers. Arguments as ``masked_mean``.
    """
    differences, _ = centred(x, mask, axis, axis_name)
    return masked_mean(jnp.square(differences), mask, axis, axis_name)


def whiten(
    x: Array,
    mask: Array,
    shift_mean: bool = True,
    axis_name: AxisName = None,
) -> Array:
    """Scales ``x`` to unit variance over the masked entries: ``(x - mean) * rsqrt(var + 1e-8)``, 0
    elsewhere. Equal numbers give exactly 0.

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
    white = differences * jax.lax.rsqrt(var + 1e-8)
    return white if shift_mean else masked(white + mean, mask)


def _predicting_logits(logits: Array, temperature: float | Array) -> Array:
    check_number("temperature", temperature, above=0)
    return jnp.asarray(logits)[..., :-1, :].astype(jnp.float32) / temperature


def _align(x: Array) -> Array:
    """Moves predictions from position t - 1 to column t by putting a 0 in front of the last
    dimension.
    """
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 0)])


def _predicted(support: Array | None) -> Array | None:
    """The support [B, T - 1, K] of the tokens that logits predict."""
    return None if support is None else support[..., 1:, :]


def token_log_probs(
    logits: Array,
    tokens: Array,
    temperature: float | Array = 1.0,
    support: Array | None = None,
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


def entropy(
    logits: Array,
    temperature: float | Array = 1.0,
    support: Array | None = None,
) -> Array:
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


def among(logits: Array, support: Array | None) -> Array:
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


def with_support(support: Array | None) -> dict[str, Array]:
    """The keyword that a PolicyFn gets of a rollout's support; none if that is None."""
    return {} if support is None else {"support": support}


def ratio(log_probs: Array, old_log_probs: Array) -> Array:
    """``exp(log_probs - old_log_probs)``, same shape, float32.

    Exact up to a log-ratio of 40 (2e17) and continued by its tangent beyond: huge log-ratios
    overflow neither in value nor in gradient, and the gradient keeps its direction.
    """
    chex.assert_equal_shape([log_probs, old_log_probs])
    log_ratio = float32(log_probs) - float32(old_log_probs)
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
    2506.09477). The exponential of k3 is continued as in ``ratio``.

    Args:
      log_probs, ref_log_probs: the same shape; put equal numbers in masked columns first.

    Returns:
      The same shape, float32.
    """
    check_choice("estimator", estimator, get_args(KLEstimator))
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


class PolicySettings(NamedTuple):
    """What a policy function computes, so that it can be compared with what was sampled, and what
    more it can be told.
    """

    temperature: Any = None  # by which it divides logits; None: unknown
    prompt_length: int = 0  # its log-probabilities of columns before this one are 0
    takes_response_mask: bool = False  # as a keyword: the columns that are read


def with_settings(
    fn: Function, temperature: Any, prompt_length: int = 0, *, takes_response_mask: bool = False
) -> Function:
    """``fn``, a PolicyFn, which notes that it has these settings (``check_fits`` compares them)."""
    known = None if isinstance(temperature, jax.core.Tracer) else temperature
    settings = PolicySettings(known, prompt_length, takes_response_mask)
    vars(fn)["policy_settings"] = settings
    return fn


def noted(fn: Function, like: Any) -> Function:
    """``fn``, a PolicyFn that calls another one, ``like``, and notes that it has its settings."""
    takes_mask = _takes_response_mask(like)
    settings = settings_of(like)._replace(takes_response_mask=takes_mask)
    vars(fn)["policy_settings"] = settings
    return fn


def settings_of(fn: Any) -> PolicySettings:
    """The settings of a PolicyFn of ``policy_fn`` or ``models.policy_fn``, also if it is jitted or
    bound to its parameters (``functools.partial``, ``Partial``, ``lora.bind``); of others unknown.
    """
    found = getattr(fn, "policy_settings", None)
    if isinstance(found, PolicySettings):
        return found
    inner: tuple[Any, ...] = (fn.func, *fn.args) if isinstance(fn, functools.partial) else ()
    if hasattr(fn, "fun"):  # in which JAX hides a Partial inside a Partial
        inner = (fn.fun,)
    for part in filter(callable, inner):
        settings = settings_of(part)
        if settings != PolicySettings():
            return settings
    return PolicySettings()


def check_fits(fn: Any, rollout: Any, name: str = "policy_fn") -> None:
    """Raises ValueError if a PolicyFn was made for another temperature than the rollout's, or for
    longer prompts, whose columns it does not compute. What one of the two does not know is not
    compared, and neither is the temperature of greedy responses. Raises it too for samples of a
    truncated distribution that do not say among which ids they were drawn.
    """
    if getattr(rollout, "truncated", False) and rollout.support is None:
        raise ValueError(
            "the responses do not come from the whole softmax (top_k, top_p, min_p or "
            "repetition_penalty), and the rollout does not say among which tokens they were drawn: "
            "sample with SamplingConfig(record_support=True), as rollout.collect does"
        )
    settings = settings_of(fn)
    temperature = getattr(rollout, "temperature", None)
    is_known = temperature and isinstance(settings.temperature, int | float)
    if is_known and settings.temperature != temperature:
        raise ValueError(
            f"{name} has temperature {settings.temperature}, but the responses were sampled at "
            f"{temperature}: give both the same"
        )
    first = settings.prompt_length
    mask = rollout.response_mask
    prompt_length = getattr(rollout, "prompt_length", None)
    is_left_out = prompt_length is not None and first > prompt_length
    is_known_mask = not isinstance(mask, jax.core.Tracer) and _is_here(mask)
    if prompt_length is None and first and is_known_mask:
        # By NumPy: inside a jit jax.numpy would trace it, also where the mask is a constant.
        is_left_out = bool(np.any(np.asarray(mask)[..., :first] != 0))
    if is_left_out:
        where = "" if prompt_length is None else f", which follow prompts of {prompt_length} slots"
        raise ValueError(
            f"{name} has prompt_length {first}, so it computes no log-probability of the first "
            f"response tokens{where}: give it the prompts' own number of slots, or 0"
        )


def _is_here(x: Any) -> bool:
    """Whether this process has all of an array."""
    return bool(getattr(x, "is_fully_addressable", True))


def policy_fn(apply_fn: Callable[..., Array], temperature: float | Array = 1.0) -> PolicyFn:
    """Makes a PolicyFn of any ``apply_fn(params, tokens, attention_mask, key) -> logits [B, T,
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
    ) -> PolicyOutput:
        logits = apply_fn(params, tokens, attention_mask, key)
        log_probs = token_log_probs(logits, tokens, temperature, support)
        return PolicyOutput(log_probs, entropy(logits, temperature, support))

    return with_settings(apply_policy, temperature)


def _takes_response_mask(fn: Any) -> bool:
    """Whether a PolicyFn uses a ``response_mask`` and gets it through what is wrapped around it."""
    if hasattr(fn, "fun"):  # see settings_of
        return _takes_response_mask(fn.fun)
    if isinstance(fn, functools.partial):
        inner = (part for part in (fn.func, *fn.args) if settings_of(part) != PolicySettings())
        return _lets_through(fn.func) and any(_takes_response_mask(part) for part in inner)
    return settings_of(fn).takes_response_mask and _lets_through(fn)


def _lets_through(fn: Any) -> bool:
    """Whether a function takes ``response_mask``; of what JAX or a partial wraps, True."""
    if hasattr(fn, "fun") or isinstance(fn, functools.partial):
        return True
    parameters = inspect.signature(fn, follow_wrapped=False).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return takes_all or "response_mask" in parameters


def evaluate(
    policy_fn: PolicyFn,
    params: Params,
    batch: Rollout | Demonstrations,
    key: DropoutKey = None,
    *,
    name: str = "policy_fn",
) -> PolicyOutput:
    """The policy's output on the rows of a batch, of use where the ``response_mask`` is not 0: a
    policy of ``models.policy_fn`` may leave out other columns, which are 0 then. Raises
    AssertionError unless its shape is that of the tokens, [B, T], and ValueError, with the ``name``
    of the function, if the policy's settings do not fit (``check_fits``).
    """
    chex.assert_rank(batch.tokens, 2)
    check_fits(policy_fn, batch, name)
    more = with_support(getattr(batch, "support", None))
    if _takes_response_mask(policy_fn):
        more["response_mask"] = batch.response_mask
    output = policy_fn(params, batch.tokens, batch.attention_mask, key, **more)
    chex.assert_equal_shape([batch.tokens, *jax.tree.leaves(output)])
    return output


def by_rows(fn: Callable[..., Any], rows: int | None, *, group_size: int = 1) -> Callable[..., Any]:
    """``fn(params, tokens [B, T], attention_mask [B, T], None)``, a PolicyFn or ScoreFn without a
    gradient, applied to at most ``rows`` rows at a time, so that its activations do not grow with
    B. With ``rows`` None it is applied to all rows at once. Further arrays [B, ...] go to ``fn``
    too, also those with a keyword, such as ``support``.

    The parts are those of ``split_rows``, of each block in ``blocks.replicated``. They hold whole
    groups of ``group_size`` adjacent rows.
    """

    def in_parts(
        params: Params,
        tokens: Array,
        attention_mask: Array,
        key: None = None,
        *further: Array,
        **of_rows: Array,
    ) -> Any:
        at_once = rows and max(rows // max(blocks.number(), 1), 1)

        def apply(part: Any) -> Any:
            (tokens, mask, *others), keywords = part
            return fn(params, tokens, mask, key, *others, **keywords)

        def apply_in_parts(batch: Any) -> Any:
            num_rows = len(batch[0][0])
            num_groups = num_rows // group_size
            groups_at_once = max((at_once or num_rows) // group_size, 1)
            parts = -(-num_groups // groups_at_once)
            while num_groups % parts:
                parts += 1
            if parts == 1:
                return apply(batch)
            results = jax.lax.map(apply, split_rows(batch, parts, group_size=group_size))

            def in_order(x: Array) -> Array:
                """The inverse of ``split_rows``."""
                of_groups = x.reshape(parts, -1, group_size, *x.shape[2:])
                return of_groups.swapaxes(0, 1).reshape(-1, *x.shape[2:])

            return jax.tree.map(in_order, results)

        return blocks.map_rows(apply_in_parts, ((tokens, attention_mask, *further), of_rows))

    return noted(in_parts, fn)


def split_rows(batch: Any, parts: int, *, group_size: int = 1) -> Any:
    """Each leaf [B, ...] of a batch as [parts, B / parts, ...]. Group i of ``group_size`` adjacent
    rows is in part ``i % parts``, so that each device of a sharded batch has rows in every part.
    """

    def split(x: Array) -> Array:
        by_group = x.reshape(-1, parts, group_size, *x.shape[1:]).swapaxes(0, 1)
        return by_group.reshape(parts, -1, *x.shape[1:])

    return jax.tree.map(split, batch)


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
