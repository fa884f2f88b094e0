"""How scores become the rewards that an update reads: the KL penalty, the rule for missing EOS,
length.
"""

import chex
import jax.numpy as jnp
from jax import Array

from rlhf_jax import ops
from rlhf_jax.rewards.functions import length
from rlhf_jax.types import EosId, Rollout

Scalar = Array | float


def kl_shaped(rollout: Rollout, kl_coef: Scalar, estimator: ops.KLEstimator = "k1") -> Array:
    """Rewards per token: the score on the last response token, minus ``kl_coef`` times the KL of
    each token.

    Ziegler et al. 2019, eq. 2. Dense rewards, ``rollout.rewards``, take the place of the score if
    there are no ``scores``. They must not hold a KL penalty: it would be subtracted a second time.

    Args:
      rollout: with ``log_probs``, ``ref_log_probs`` and either ``scores`` [B] or ``rewards`` [B,
        T]. It needs no ``ref_log_probs`` if ``kl_coef`` is the Python number 0.
      kl_coef: reward per nat.

    Returns:
      [B, T] float32, 0 outside the response.

    Raises:
      ValueError: neither or both of scores and rewards are given. Both are there after
        ``replace(rollout, rewards=kl_shaped(rollout, ...))``, whose rewards have been shaped.
    """
    if rollout.rewards is not None and rollout.scores is not None:
        raise ValueError(
            "rollout: expected scores [B] or dense rewards [B, T], got both, and rewards may have "
            "been shaped already; use replace(rollout, rewards=None) to shape the scores, or "
            "scores=None to shape dense rewards"
        )
    if rollout.rewards is not None:
        chex.assert_equal_shape([rollout.rewards, rollout.mask])
        rewards = ops.masked(rollout.rewards, rollout.mask)
    elif rollout.scores is not None:
        chex.assert_shape(rollout.scores, rollout.mask.shape[:1])
        rewards = ops.at_end(rollout.scores, rollout.mask)
    else:
        raise ValueError(
            "rollout: expected scores [B] or rewards [B, T], got neither; call a reward function "
            "first"
        )
    if rollout.ref_log_probs is None:
        if not isinstance(kl_coef, int | float) or kl_coef != 0:
            raise ValueError(
                "rollout.ref_log_probs is None: give rollout.collect a ref_fn, or use kl_coef=0.0"
            )
        return rewards
    log_probs = ops.masked(rollout.log_probs, rollout.mask)
    ref_log_probs = ops.masked(rollout.ref_log_probs, rollout.mask)
    return rewards - kl_coef * ops.kl(log_probs, ref_log_probs, estimator)


def missing_eos(
    rollout: Rollout,
    scores: Array,
    eos_id: EosId,
    penalty: float | None = None,
    score: float | None = None,
) -> Array:
    """Scores [B] with a rule for responses that neither EOS nor a stop string ended. Exactly one of
    the two is given:

    Args:
      scores: [B].
      eos_id: the token that ends a response, or several.
      penalty: subtracted from the score of such a response.
      score: replaces the score of such a response (lm-human-preferences: -1).

    Returns:
      [B] float32; the scores of missing rows do not change.
    """
    if (penalty is None) == (score is None):
        raise ValueError(
            f"missing_eos: expected one of penalty and score, got penalty={penalty}, score={score}"
        )
    chex.assert_shape(scores, rollout.tokens.shape[:1])
    is_eos = jnp.isin(rollout.tokens, jnp.asarray(eos_id))
    unfinished = jnp.any(ops.is_last(rollout.mask) & ~is_eos, axis=1)
    if rollout.stopped is not None:
        unfinished &= ~rollout.stopped
    scores = jnp.asarray(scores, jnp.float32)
    changed = jnp.float32(score) if penalty is None else scores - penalty
    return jnp.where(unfinished, changed, scores)


def length_penalty(rollout: Rollout, scores: Array, coef: float, *, target: int = 0) -> Array:
    """``scores - coef * length(target)``, [B] float32: each response token beyond ``target`` costs
    ``coef``.
    """
    excess, _ = length(target)(rollout)
    chex.assert_equal_shape([scores, excess])
    return jnp.asarray(scores, jnp.float32) - coef * excess


def overlong_penalty(
    rollout: Rollout, scores: Array, *, max_length: int, buffer: int, penalty: float
) -> Array:
    """Scores [B] less a soft punishment of length (Yu et al. 2025, DAPO, eq. 13, times
    ``penalty``): nothing up to ``max_length - buffer`` response tokens, then evenly more up to
    ``penalty`` at ``max_length`` and beyond.

    Args:
      scores: [B].
      max_length, buffer: response tokens; EOS counts.

    Returns:
      [B] float32.
    """
    excess, _ = length(max_length - buffer)(rollout)
    chex.assert_equal_shape([scores, excess])
    return jnp.asarray(scores, jnp.float32) - penalty * jnp.minimum(excess / buffer, 1.0)


def adaptive_kl(kl_coef: Scalar, kl: Scalar, *, target: float, horizon: Scalar, n: Scalar) -> Array:
    """``kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon)`` (Ziegler et al. 2019,
    section 2.2).

    Args:
      kl: mean over responses of the KL summed over the response, in nats.
      target: the KL to hold, in nats, above 0.
      horizon: episodes over which the coefficient moves by about a fifth, above 0.
      n: episodes of this iteration.

    Returns:
      The new coefficient, scalar float32.
    """
    ops.check_number("target", target, above=0)
    ops.check_number("horizon", horizon, above=0)
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -0.2, 0.2)
    return jnp.asarray(kl_coef, jnp.float32) * (1.0 + error * n / horizon)
