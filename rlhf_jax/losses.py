"""Losses on arrays, and how losses of tokens become one number. No parameters, no models.

Losses of tokens ([B, T]) are reduced by ``aggregate``, losses of rows ([B]) by ``weighted_mean``.
All are float32.

Masked columns: ``policy_gradient`` and ``cross_entropy`` take the mask. ``clipped_surrogate`` and
``clipped_value`` do not: call them with ``jnp.where(mask, new, old)``, so that neither the
exponential nor its gradient ever sees a masked column.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax import ops
from rlhf_jax.types import Mean

DPOKind = Literal["sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down", "simpo", "orpo"]
KTOKind = Literal["kto", "bco"]
Surrogate = Literal["clip", "cispo", "sapo", "vespo", "gmpo"]
Aggregation = Literal["token", "sequence", "sum", "fixed"]
Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
ImportanceSampling = Literal[
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "geometric_truncate",
    "geometric_mask",
    "tv_mask",
    "kl_mask",
]
Gate = Literal["none", "tv", "kl", "drift"]


def comparison(
    scores: Array, best: Array, margin: Array | None = None, centering: float = 0.0
) -> Array:
    """Negative log-likelihood of the human's choice among K answers:
    ``-log_softmax(scores)[best]``.

    K = 4 in lm-human-preferences (Ziegler et al. 2019, eq. 1); K = 2 is Bradley-Terry. Equal scores
    give ln K.

    Args:
      scores: [B, K]; a missing answer enters as -inf and gets gradient 0.
      best: [B] int, the chosen column. A row whose chosen answer is missing gives 0.
      margin: [B], subtracted from the chosen answer's score (Llama 2, Touvron et al. 2023, eq. 2).
      centering: weight of the squared sum of a pair's scores, which pulls scores towards 0
        (Eisenstein et al. 2023); a pair with a missing answer adds 0.

    Returns:
      [B] float32.
    """
    chex.assert_rank([scores, best], [2, 1])
    chex.assert_equal_shape_prefix([scores, best], 1)
    has_centering = not ops.is_zero(centering)
    num_answers = scores.shape[1]
    if has_centering and num_answers != 2:
        raise ValueError(
            f"centering: defined for pairs (K = 2) only, got K = {num_answers}; use centering=0"
        )
    scores = ops.float32(scores)
    present = scores != -jnp.inf
    is_best = jnp.arange(num_answers)[None, :] == best[:, None]
    usable = jnp.any(present & is_best, axis=1, keepdims=True)  # [B, 1]
    # An unusable row becomes zeros: log_softmax of a row of -inf would put NaN into the gradient.
    entered = jnp.where(usable, scores, 0.0)
    if margin is not None:
        chex.assert_equal_shape([margin, best])
        entered = entered - jnp.where(is_best & usable, ops.float32(margin)[:, None], 0.0)
    log_probs = jax.nn.log_softmax(entered, axis=1)
    chosen = jnp.take_along_axis(log_probs, best[:, None], axis=1)
    loss = jnp.where(usable, -chosen, 0.0)[:, 0]
    if has_centering:
        is_pair = jnp.all(present, axis=1, keepdims=True)
        sums = jnp.sum(jnp.where(is_pair, scores, 0.0), axis=1)
        loss = loss + centering * jnp.square(sums)
    return loss


def regression(scores: Array, targets: Array) -> Array:
    """Squared error against target scores (jRLHF), elementwise: the shape of ``scores`` such as [B,
    K], float32.
    """
    chex.assert_equal_shape([scores, targets])
    return jnp.square(ops.float32(scores) - ops.float32(targets))


def policy_gradient(log_probs: Array, advantages: Array, mask: Array) -> Array:
    """REINFORCE: ``-advantage * log_prob`` per token, 0 where masked (Williams 1992). Aggregate by
    ``sum``.

    Args:
      log_probs, mask: [B, T].
      advantages: [B, T], or [B] for one advantage a row. They are not differentiated.

    Returns:
      [B, T] float32.
    """
    chex.assert_rank(log_probs, 2)
    advantages = ops.frozen(advantages)
    if advantages.ndim == 1:
        chex.assert_equal_shape_prefix([advantages, log_probs], 1)
        advantages = jnp.broadcast_to(advantages[:, None], jnp.shape(log_probs))
    chex.assert_equal_shape([log_probs, advantages, mask])
    return -ops.masked(advantages, mask) * ops.masked(log_probs, mask)


def clipped_surrogate(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Array:
    """PPO's policy loss per token, the loss of ``clip``.

    There is no mask: pass ``jnp.where(mask, new, old)`` as ``log_probs``.

    Args:
      log_probs, old_log_probs, advantages: the same shape, such as [B, T]. Only ``log_probs`` is
        differentiated.

    Returns:
      The same shape, float32.
    """
    chex.assert_equal_shape([log_probs, old_log_probs, advantages])
    log_ratio = ops.float32(log_probs) - ops.frozen(old_log_probs)
    loss, _ = clip(
        log_ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    return loss


def clip(
    log_ratio: Array,
    advantages: Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> tuple[Array, Array]:
    """PPO's surrogate: ``max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high))``.

    Schulman et al. 2017, eq. 7; asymmetric clipping as in DAPO (Yu et al. 2025). ``dual_clip`` = c
    bounds the loss of A < 0 by ``-c * A`` (Ye et al. 2020, "Mastering Complex Control in MOBA
    Games", eq. 5). The ratio is ``ops.bounded_exp`` of its logarithm.

    Args:
      log_ratio: such as [B, T], of tokens, or that of their row (GSPO); it alone is differentiated.
      advantages: the same shape.

    Returns:
      The loss of each token, float32, and bool: where the clipped term is the larger.
    """
    chex.assert_equal_shape([log_ratio, advantages])
    advantages = ops.frozen(advantages)
    ratio = ops.bounded_exp(log_ratio)
    free = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    is_clipped = clipped > free
    loss = jnp.where(is_clipped, clipped, free)  # at a bound the gradient is that of ``free``
    if dual_clip is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)
    return loss, is_clipped


def cispo(
    log_ratio: Array,
    advantages: Array,
    *,
    log_probs: Array,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> tuple[Array, Array]:
    """CISPO's surrogate: ``-clip(ratio, 1 - clip_low, 1 + clip_high) * A * log_prob``, where the
    clipped ratio is a constant weight, so that no token loses its gradient.

    MiniMax-M1 (MiniMax 2025, arXiv 2506.13585), eqs. 4 and 5; its runs have no bound from below,
    ``clip_low`` 1.

    Args:
      log_ratio, advantages: as in ``clip``; neither is differentiated.
      log_probs: of the tokens, the same shape.

    Returns:
      The loss of each token, float32, and bool: where the weight is clipped.
    """
    ratio = jax.lax.stop_gradient(ops.bounded_exp(log_ratio))
    weight = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return _weigh(log_probs, weight, advantages), weight != ratio


def sapo(
    log_ratio: Array, advantages: Array, *, temperatures: Sequence[float] = (1.0, 1.05)
) -> tuple[Array, Array]:
    """SAPO's surrogate: ``-A * 4 / tau * sigmoid(tau * (ratio - 1))``, whose gradient fades as the
    ratio leaves 1, where it is that of ``-A * ratio``.

    Gao et al. 2025, "Soft Adaptive Policy Optimization", arXiv 2511.20347.

    Args:
      log_ratio, advantages: as in ``clip``.
      temperatures: tau of tokens with A > 0 and of all others; a larger one fades sooner.

    Returns:
      The loss of each token, float32, and bool: where less than half of its gradient is left.
    """
    chex.assert_equal_shape([log_ratio, advantages])
    advantages = ops.frozen(advantages)
    tau = jnp.where(advantages > 0, temperatures[0], temperatures[1])
    gate = jax.nn.sigmoid(tau * (ops.bounded_exp(log_ratio) - 1.0))
    return -advantages * gate * 4.0 / tau, 4.0 * gate * (1.0 - gate) < 0.5


def vespo(
    log_ratio: Array,
    advantages: Array,
    *,
    log_probs: Array,
    powers: Sequence[float] = (2.0, 3.0),
    decays: Sequence[float] = (3.0, 2.0),
) -> tuple[Array, Array]:
    """VESPO's surrogate: ``-w^k * exp(c * (1 - w)) * A * log_prob`` with the ratio w of the whole
    response. The factor is a constant weight, 1 at w = 1 and near 0 far from it.

    "VESPO: Variational Sequence-Level Soft Policy Optimization", 2026, arXiv 2602.10693.

    Args:
      log_ratio: log w, the sum of the log-ratios of the response's tokens, in each of its columns;
        not differentiated.
      log_probs, advantages: as in ``cispo``.
      powers, decays: k and c where A >= 0, and where A < 0.

    Returns:
      The loss of each token, float32, and bool: where the weight is below a half.
    """
    power = jnp.where(advantages >= 0, powers[0], powers[1])
    decay = jnp.where(advantages >= 0, decays[0], decays[1])
    fall = decay * (1.0 - ops.bounded_exp(log_ratio))
    weight = jax.lax.stop_gradient(jnp.exp(power * log_ratio + fall))
    return _weigh(log_probs, weight, advantages), weight < 0.5


def gmpo(
    log_ratio: Array, advantages: Array, *, mask: Array, clip_low: float, clip_high: float
) -> tuple[Array, Array]:
    """GMPO's surrogate: ``-A * ratio`` with the geometric mean of the response's ratios, each of
    which is clipped first: to at most ``exp(clip_high)`` where A > 0, to at least
    ``exp(-clip_low)`` where A < 0.

    Zhao et al. 2025, "Geometric-Mean Policy Optimization", arXiv 2507.20673, eq. 4. Of tokens, [B,
    T] each; the results are as in ``clip``.
    """
    advantages = ops.frozen(advantages)
    sign = jnp.sign(advantages)
    limit = jnp.where(sign > 0, clip_high, clip_low)
    is_clipped = sign * log_ratio > limit
    held = sign * jnp.where(is_clipped, limit, sign * log_ratio)
    ratio = ops.bounded_exp(ops.masked_mean(held, mask, axis=1, keepdims=True))
    return -advantages * ratio, is_clipped


def _weigh(log_probs: Array, weight: Array, advantages: Array) -> Array:
    """``-weight * A * log_prob``, of which only ``log_probs`` is differentiated."""
    chex.assert_equal_shape([log_probs, weight, advantages])
    return -ops.frozen(weight * advantages) * ops.float32(log_probs)


def surrogate(
    kind: Surrogate,
    log_probs: Array,
    advantages: Array,
    *,
    log_ratio: Array,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    mask: Array | None = None,
) -> tuple[Array, Array]:
    """The policy loss of each token by the surrogate of this name, and which tokens are clipped.

    Args:
      log_probs, advantages, log_ratio: [B, T], 0 outside the response.
      mask: [B, T] of the response, for ``gmpo``; None: all.

    Returns:
      [B, T] float32, and [B, T] bool.
    """
    ops.check_choice("kind", kind, Surrogate)
    mask = jnp.ones_like(log_ratio) if mask is None else mask
    surrogates: dict[Surrogate, Callable[..., tuple[Array, Array]]] = {
        "clip": partial(clip, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip),
        "cispo": partial(cispo, log_probs=log_probs, clip_low=clip_low, clip_high=clip_high),
        "sapo": sapo,
        "vespo": partial(vespo, log_probs=log_probs),
        "gmpo": partial(gmpo, mask=mask, clip_low=clip_low, clip_high=clip_high),
    }
    return surrogates[kind](log_ratio, advantages)


def importance_weights(
    log_probs: Array,
    *,
    behaviour_log_probs: Array,
    mask: Array,
    cap: float | None,
    floor: float = 0.0,
    how: ImportanceSampling = "token_truncate",
) -> Array:
    """Weights of tokens that another engine drew, ``w = exp(log_probs - behaviour_log_probs)``,
    limited by ``floor`` and ``cap``.

    - ``token_...``: each token's own w (Yao et al. 2025, "Your Efficient RL Framework Secretly
      Brings You Off-Policy RL Training").
    - ``sequence_...``: every token of a response gets the product of w over the response. Only this
      product is unbiased for the whole response (Liu et al. 2025, "When Speed Kills Stability").
    - ``geometric_...``: every token gets the geometric mean of w over the response.
    - ``..._truncate``: w clipped to [floor, cap] (Ionides 2008, with a cap).
    - ``..._mask``: 0 in place of w outside [floor, cap], so that the token, or the row, has no
      gradient; it still counts in the loss's denominator. ``token_mask`` is IcePop (Ling team 2025,
      "Every Step Evolves").
    - ``tv_mask``, ``kl_mask``: w where the token's ``binary_divergence`` from the engine is at most
      cap, else 0; no floor.

    Args:
      log_probs: [B, T] of the policy.
      behaviour_log_probs, mask: [B, T] of the engine.
      cap: None or ``math.inf``: no bound, the raw weights if ``floor`` is 0.

    Returns:
      [B, T] float32, 0 outside the response; no gradient flows through it.
    """
    cap = jnp.inf if cap is None else cap
    ops.check_number("cap", cap, above=0)
    ops.check_number("floor", floor, at_least=0, at_most=cap)
    ops.check_choice("how", how, ImportanceSampling)
    chex.assert_equal_shape([log_probs, behaviour_log_probs, mask])
    log_probs, behaviour = (ops.masked(x, mask) for x in (log_probs, behaviour_log_probs))
    log_ratio = log_probs - behaviour
    level, kind = how.split("_")
    if level == "sequence":
        log_ratio = jnp.sum(log_ratio, axis=1, keepdims=True)
    elif level == "geometric":
        log_ratio = ops.masked_mean(log_ratio, mask, axis=1, keepdims=True)
    weight = ops.bounded_exp(log_ratio)
    if kind == "truncate":
        weight = jnp.clip(weight, floor, cap)
    elif level in ("tv", "kl"):
        apart = binary_divergence(log_probs, behaviour, "tv" if level == "tv" else "kl")
        weight = jnp.where(apart <= cap, weight, 0.0)
    else:
        weight = jnp.where((weight >= floor) & (weight <= cap), weight, 0.0)
    return ops.frozen(ops.masked(weight, mask))


def binary_divergence(log_probs: Array, old_log_probs: Array, kind: Literal["tv", "kl"]) -> Array:
    """How far a token's probability p is from an older q, for this token and all others together:
    ``tv``, ``|p - q|``; ``kl``, ``q log(q / p) + (1 - q) log((1 - q) / (1 - p))`` nats (Qi et al.
    2026, arXiv 2602.04879, eqs. 13 and 14). Any shape, float32.
    """
    new, old = ops.float32(log_probs), ops.float32(old_log_probs)
    q = jnp.exp(old)
    if kind == "tv":
        return ops.absolute(jnp.exp(new) - q)
    # A probability of 1, whose complement has an infinite logarithm, is replaced by exp(-1e-6).
    new, old = jnp.minimum(new, -1e-6), jnp.minimum(old, -1e-6)
    p_others, q_others = -jnp.expm1(new), -jnp.expm1(old)
    return q * (old - new) + q_others * jnp.log(q_others / p_others)


def gated(
    gate: Gate, log_probs: Array, old_log_probs: Array, advantages: Array, mask: Array, limit: float
) -> Array:
    """The tokens whose policy loss a gate drops, [B, T] bool of arrays [B, T] that are 0 outside
    the response.

    - ``tv``, ``kl``: where the loss moves the token further away from the old policy (A > 0 and
      ratio > 1, or A < 0 and ratio < 1) and ``binary_divergence`` is above the limit (DPPO, Qi et
      al. 2026, "Rethinking the Trust Region in LLM Reinforcement Learning", eq. 12).
    - ``drift``: A < 0 in rows whose mean of ``log(old / new)`` over the response is above the limit
      ("DeepSeek-V3.2", 2025, eq. 9).
    """
    if gate == "drift":
        drift = ops.masked_mean(old_log_probs - log_probs, mask, axis=1, keepdims=True)
        return (advantages < 0) & (drift > limit)
    apart = binary_divergence(log_probs, old_log_probs, "tv" if gate == "tv" else "kl")
    return (advantages * (log_probs - old_log_probs) > 0) & (apart > limit)


def clipped_value(values: Array, old_values: Array, returns: Array, clip: float = 0.2) -> Array:
    """PPO's value loss: ``0.5 * max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2)``, as
    in lm-human-preferences.

    Args:
      values, old_values, returns: the same shape, such as [B, T]. Only ``values`` is
        differentiated. There is no mask: pass ``jnp.where(mask, new, old)`` as ``values``.
      clip: how far, in units of reward, values may move from ``old_values`` and still lower the
        loss.

    Returns:
      The same shape, float32.
    """
    chex.assert_equal_shape([values, old_values, returns])
    values = ops.float32(values)
    old_values = ops.frozen(old_values)
    returns = ops.frozen(returns)
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))


def dpo(
    log_ratio_chosen: Array,
    log_ratio_rejected: Array,
    beta: float,
    kind: DPOKind = "sigmoid",
    label_smoothing: float = 0.0,
    *,
    gamma: float = 0.0,
) -> Array:
    """Direct preference losses of Delta = log_ratio_chosen - log_ratio_rejected, with h = beta *
    Delta - gamma and label smoothing s. Only ``simpo`` has a gamma other than 0.

    - ``sigmoid``: ``-(1 - s) log sigmoid(h) - s log sigmoid(-h)``; s = 0 is Rafailov et al. 2023,
      eq. 7, s > 0 conservative DPO (Mitchell 2023).
    - ``robust``: ``(-(1 - s) log sigmoid(h) + s log sigmoid(-h)) / (1 - 2 s)``, unbiased when a
      fraction s of the labels is flipped (Chowdhury et al. 2024).
    - ``hinge``: ``max(0, 1 - h)`` (SLiC, Zhao et al. 2023).
    - ``ipo``: ``(Delta - 1 / (2 beta))^2`` (Azar et al. 2023, eq. 17).
    - ``apo_zero``: ``1 - sigmoid(beta l_w) + sigmoid(beta l_l)`` of the two log-ratios, for chosen
      answers that are better than the policy's own (D'Oosterlinck et al. 2024, "Anchored Preference
      Optimization", arXiv 2408.06266, eq. 7, plus 1).
    - ``apo_down``: ``sigmoid(beta l_w) + 1 - sigmoid(h)``, for chosen answers that are worse than
      the policy's own (the same, eq. 8, plus 1).
    - ``simpo``: ``-log sigmoid(h)`` with the target margin gamma (Meng et al. 2024, eq. 6),
      smoothed as ``sigmoid``.
    - ``orpo``: ``-l_w - beta log sigmoid(log odds(l_w) - log odds(l_l))`` of the chosen l_w and the
      rejected l_l, with ``log odds(l) = l - log(1 - exp l)``: the chosen answer's negative
      log-likelihood plus the odds ratio (Hong et al. 2024, eqs. 6 and 7; beta is the paper's
      lambda).

    Args:
      log_ratio_chosen, log_ratio_rejected: [B], policy minus reference log-probability in nats,
        summed over the response. For ``simpo`` and ``orpo``, which have no reference: the mean
        log-probability of a response token.

    Returns:
      [B] float32.
    """
    check_dpo(kind, label_smoothing=label_smoothing, gamma=gamma)
    chex.assert_equal_shape([log_ratio_chosen, log_ratio_rejected])
    chosen = ops.float32(log_ratio_chosen)
    rejected = ops.float32(log_ratio_rejected)
    if kind == "orpo":
        return -chosen - beta * jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))
    if kind == "apo_zero":
        return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)
    delta = chosen - rejected
    if kind == "apo_down":
        return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * delta)
    if kind == "ipo":
        return jnp.square(delta - 1.0 / (2.0 * beta))
    if kind == "hinge":
        return jax.nn.relu(1.0 - beta * delta)
    h = beta * delta - gamma
    right = (1.0 - label_smoothing) * -jax.nn.log_sigmoid(h)
    flipped = label_smoothing * -jax.nn.log_sigmoid(-h)
    if kind == "robust":
        return (right - flipped) / (1.0 - 2.0 * label_smoothing)
    return right + flipped


def _log_odds(log_prob: Array) -> Array:
    # A likelihood of 1, whose odds are infinite, is replaced by exp(-1e-6).
    below_one = jnp.minimum(log_prob, -1e-6)
    return log_prob - jnp.log(-jnp.expm1(below_one))


def check_dpo(kind: DPOKind, *, label_smoothing: float, gamma: float = 0.0) -> None:
    """Raises ValueError for an unknown kind, a label smoothing outside [0, 0.5) or with a kind that
    has none, and a gamma without simpo.
    """
    ops.check_choice("kind", kind, DPOKind)
    ops.check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
    if not ops.is_zero(label_smoothing) and kind not in ("sigmoid", "robust", "simpo"):
        raise ValueError(
            f"label_smoothing: not defined for {kind!r}; use 'sigmoid' or 'robust', or 0"
        )
    if not ops.is_zero(gamma) and kind != "simpo":
        raise ValueError(f"gamma is the target margin of 'simpo'; {kind!r} has no margin, so use 0")


def kto(
    log_ratio: Array,
    *,
    reference_point: Array,
    desirable: Array,
    beta: float,
    kind: KTOKind = "kto",
) -> Array:
    """The loss of single answers that are desirable or not, with ``s = beta (l - z)`` of a
    desirable answer and ``s = beta (z - l)`` of an undesirable one.

    - ``kto``: ``1 - sigmoid(s)`` (Ethayarajh et al. 2024, eq. 8, before the weights lambda).
    - ``bco``: ``-log sigmoid(s)``, the cross-entropy of a classifier whose logit is the reward,
      where beta z is the reward shift delta (Jung et al. 2024, "Binary Classifier Optimization for
      Large Language Model Alignment", arXiv 2404.04656).

    Args:
      log_ratio: [B], l: policy minus reference log-probability in nats, summed over the response.
      reference_point: z, in nats, to which l is compared; [] or [B]. It is not differentiated.
      desirable: [B], true or non-zero for yes.

    Returns:
      [B] float32; of ``kto`` in (0, 1).
    """
    chex.assert_equal_shape([log_ratio, desirable])
    ops.check_choice("kind", kind, KTOKind)
    above = ops.float32(log_ratio) - jax.lax.stop_gradient(reference_point)
    better = jnp.where(jnp.asarray(desirable) != 0, above, -above)
    if kind == "bco":
        return -jax.nn.log_sigmoid(beta * better)
    return jax.nn.sigmoid(-beta * better)


def divergence(
    logits: Array, *, teacher_logits: Array, kind: Divergence = "reverse_kl", beta: float = 0.5
) -> Array:
    """How far a student's next-token distribution p is from a teacher's q, in nats, over the whole
    vocabulary: 0 where they are equal.

    - ``reverse_kl``: KL(p || q); the student avoids what is unlikely for the teacher.
    - ``forward_kl``: KL(q || p); the student covers all that is likely for the teacher.
    - ``jsd``: ``beta KL(q || m) + (1 - beta) KL(p || m)`` with ``m = beta q + (1 - beta) p``, the
      generalised Jensen-Shannon divergence (Agarwal et al. 2024, arXiv 2306.13649). Divided by beta
      it goes to the forward KL as beta goes to 0, divided by 1 - beta to the reverse KL at 1.

    Args:
      logits, teacher_logits: [..., V], finite. Only ``logits`` is differentiated.
      beta: of ``jsd``, above 0 and below 1.

    Returns:
      [...] float32.
    """
    chex.assert_equal_shape([logits, teacher_logits])
    ops.check_choice("kind", kind, Divergence)
    student = jax.nn.log_softmax(ops.float32(logits))
    teacher = jax.nn.log_softmax(ops.frozen(teacher_logits))
    if kind == "reverse_kl":
        return _kl(student, teacher)
    if kind == "forward_kl":
        return _kl(teacher, student)
    mixture = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)


def _kl(log_probs: Array, other: Array) -> Array:
    return jnp.sum(jnp.exp(log_probs) * (log_probs - other), axis=-1)


def cross_entropy(log_probs: Array, mask: Array) -> Array:
    """Negative log-likelihood per token in nats, 0 where masked: [B, T] -> [B, T] float32."""
    chex.assert_equal_shape([log_probs, mask])
    return -ops.masked(log_probs, mask)


def row_weights(weight: Array | None, *, present: Array) -> Array:
    """Weights of rows in float32, of the shape of ``present``: 0 where a row is missing, and 1 for
    the others if ``weight`` is None.
    """
    if weight is None:
        return ops.float32(present)
    chex.assert_equal_shape([weight, present])
    return ops.masked(weight, present)


def weighted_mean(x: Array, weight: Array) -> Mean:
    """``sum(weight * x) / sum(weight)``, of any shape and any sign of the weights; 0 if they add up
    to 0. ``x`` may be NaN where the weight is 0.
    """
    chex.assert_equal_shape([x, weight])
    total = jnp.sum(weight * readable(x, weight))
    return Mean(total, jnp.sum(weight, dtype=jnp.float32))


def readable(x: Array, weight: Array) -> Array:
    """``x`` with 0 in place of what is not finite where the weight is 0. What is finite stays, as
    a loss has a gradient with respect to weights at 0.
    """
    return jnp.where((weight == 0) & ~jnp.isfinite(x), 0.0, x)


def aggregate(
    per_token: Array, mask: Array, how: Aggregation = "token", length: int | None = None
) -> Mean:
    """One number from losses of tokens; rows with an empty mask do not count, and a mean over no
    tokens is 0.

    - ``token``: sum over response tokens / number of response tokens (PPO; DAPO for groups).
    - ``sequence``: mean over rows of row means (GRPO, Shao et al. 2024, eq. 3).
    - ``sum``: mean over rows of row sums (REINFORCE, RLOO).
    - ``fixed``: sum / (rows * length) (Dr. GRPO, Liu et al. 2025); ``length`` is
      ``max_new_tokens``.

    Args:
      per_token, mask: [B, T]; values in masked columns are not read.

    Returns:
      The mean, not divided yet, so that the means of a batch's parts can be added: see
      ``types.Mean``.
    """
    check_aggregation(how, length)
    chex.assert_rank(per_token, 2)
    chex.assert_equal_shape([per_token, mask])
    present = jnp.asarray(mask) != 0
    per_row = jnp.sum(ops.masked(per_token, mask), axis=1)
    num_tokens = jnp.sum(present, axis=1, dtype=jnp.float32)
    if how == "token":
        return Mean(jnp.sum(per_row), jnp.sum(num_tokens))
    if how == "sequence":
        per_row = per_row / jnp.maximum(num_tokens, 1.0)
    count = jnp.sum(num_tokens > 0, dtype=jnp.float32)
    if length is not None and how == "fixed":
        count = count * length
    return Mean(jnp.sum(per_row), count)


def check_aggregation(how: Aggregation, length: int | None) -> None:
    """Raises ValueError for an unknown choice, and for ``fixed`` without a positive length."""
    ops.check_choice("aggregate", how, Aggregation)
    ops.check_number("length", length, at_least=1)
    if how == "fixed" and length is None:
        raise ValueError(
            "length: aggregate 'fixed' needs a length, such as max_new_tokens, got None"
        )
