"""Slow NumPy versions, in float64 and plain loops, of what the library computes; and ragged masks
to run them on.
"""

import functools
import math

import numpy as np
from hypothesis import strategies as st
from tabular import teacher_params

SHAPES = [(1, 1), (3, 5), (4, 8)]  # few, since each shape is compiled once


def columns(mask_row):
    return [t for t, bit in enumerate(mask_row) if bit]


def inverse_deviation(var, mean):
    return 1 / math.sqrt(var + (1e-7 * mean) ** 2) if var else 0.0


def whiten(x, mask, shift_mean=True):
    said = [float(v) for v in x[mask]]
    mean = sum(said) / max(len(said), 1)
    var = sum((v - mean) ** 2 for v in said) / max(len(said), 1)
    white = (np.where(mask, x, 0.0) - mean) * inverse_deviation(var, mean)
    return np.where(
        mask,
        white if shift_mean else white + mean,
        0.0,
    )


def ratio(d):
    """Continued by its tangent beyond 40."""
    return math.exp(min(d, 40.0)) + math.exp(40.0) * max(d - 40.0, 0.0)


def kl(d, estimator):
    if estimator == "k3":
        return math.expm1(min(-d, 40.0)) + math.exp(40.0) * max(-d - 40.0, 0.0) + d
    return {"k1": d, "k2": d * d / 2}[estimator]


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
    r = ratio(log_ratio)
    loss = max(
        -advantage * r,
        -advantage * min(max(r, 1 - low), 1 + high),
    )
    return min(loss, -dual_clip * advantage) if dual_clip is not None and advantage < 0 else loss


def clipped_value(value, old, target, clip):
    clipped = min(
        max(value, old - clip),
        old + clip,
    )
    return 0.5 * max((value - target) ** 2, (clipped - target) ** 2)


def comparison(scores, best, margin=0.0, centering=0.0):
    """One row; an absent answer is None."""
    there = [s for s in scores if s is not None]
    loss = centering * sum(there) ** 2 if len(there) == len(scores) else 0.0
    if scores[best] is None:
        return loss
    entered = [s - margin if k == best else s for k, s in enumerate(scores) if s is not None]
    most = max(entered)
    return (
        loss + most + math.log(sum(math.exp(s - most) for s in entered)) - (scores[best] - margin)
    )


def dpo(delta, beta, kind, smoothing=0.0, gamma=0.0):
    """One pair."""
    h = beta * delta - gamma
    s = smoothing
    right, flipped = (
        max(x, 0.0) + math.log1p(math.exp(-abs(x))) for x in (-h, h)
    )  # -log sigmoid of h and of -h
    return {
        "sigmoid": (1 - s) * right + s * flipped,
        "robust": ((1 - s) * right - s * flipped) / (1 - 2 * s),
        "hinge": max(0.0, 1 - h),
        "ipo": (delta - 1 / (2 * beta)) ** 2,
        "simpo": (1 - s) * right + s * flipped,
    }[kind]


def orpo(chosen, rejected, beta):
    """One pair of mean log-probs: the odds p / (1 - p) of each."""
    odds = [math.exp(x) / -math.expm1(x) for x in (chosen, rejected)]
    return -chosen + beta * math.log1p(odds[1] / odds[0])


def gae(rewards, values, mask, gamma, lam):
    advantages = np.zeros(mask.shape)
    for i in range(len(mask)):
        after = 0.0, 0.0
        for t in reversed(columns(mask[i])):
            delta = float(rewards[i, t]) + gamma * after[1] - float(values[i, t])
            advantages[i, t] = delta + gamma * lam * after[0]
            after = advantages[i, t], float(values[i, t])
    return advantages, np.where(
        mask,
        advantages + np.where(mask, values, 0.0),
        0.0,
    )


def leave_one_out(scores, mask):
    out = np.zeros(mask.shape)
    for n, g in zip(*np.nonzero(mask), strict=True):
        others = [float(scores[n, k]) for k in columns(mask[n]) if k != g]
        if others:
            out[n, g] = scores[n, g] - sum(others) / len(others)
    return out


def group_normalized(scores, mask, eps, scale):
    out = np.zeros(mask.shape)
    for n, present in enumerate(mask):
        group = np.asarray(scores[n][present], np.float64)
        if len(group) > 1 and np.ptp(group) > 0:
            spread = group.std(ddof=1) + eps if scale else 1.0
            out[n, present] = (group - group.mean()) / spread
    return out


# Losses of whole algorithms, of the lookup tables in ``tabular``: (loss, metrics). ``stopped`` are
# the parameters of what no gradient flows through, so that differences of the loss are its
# gradient.


def policy(params, tokens):
    """``tabular.policy_fn``: log-probs, entropy and values [B, T] of a bigram table; column 0 is
    0.
    """
    outputs = np.zeros((3, *tokens.shape))
    for i, t in np.ndindex(*tokens.shape):
        if t > 0:
            logits = params["logits"][tokens[i, t - 1]]
            log_p = logits - np.log(np.sum(np.exp(logits)))
            outputs[:, i, t] = (
                log_p[tokens[i, t]],
                -np.sum(np.exp(log_p) * log_p),
                params["values"][tokens[i, t - 1]],
            )
    return outputs


def sft(params, batch, config):
    mask = batch.response_mask != 0
    value = aggregate(
        -policy(params, batch.tokens)[0],
        mask,
        config.aggregate,
    )
    return value, {"sft/loss": value}


def _averages(prefix, names, rows):
    """The weighted mean of each number over the rows that have it, and that of the losses."""
    metrics = {}
    for name in names:
        held = [row for row in rows if name in row]
        total = sum(row["weight"] for row in held)
        sums = sum(row["weight"] * row[name] for row in held)
        metrics[f"{prefix}/{name}"] = sums / total if total else 0.0
    return metrics[f"{prefix}/loss"], metrics


def _at(array, i, default):
    return default if array is None else array[i]


def reward_model(params, batch, config):
    table = params["scores"][batch.tokens]
    scores = np.sum(np.where(batch.attention_mask != 0, table, 0.0), axis=2)
    rows = []
    for i, row in enumerate(scores):
        weight = {"weight": _at(batch.weight, i, 1.0)}
        present = batch.response_mask[i].any(axis=1)
        best = _at(batch.best, i, 0)
        if batch.targets is not None:
            errors = np.square(row - batch.targets[i])[present]
            rows += [{"loss": error, **weight} for error in errors]
        elif present[best]:
            entered = [s if here else None for s, here in zip(row, present, strict=True)]
            margin = _at(batch.margin, i, 0.0)
            rows.append({"loss": comparison(entered, best, margin, config.centering), **weight})
            others = np.delete(row, best)[np.delete(present, best)]
            if len(others):
                ahead = row[best] - max(others)
                rows[-1] |= {"margin": ahead, "accuracy": 0.5 * (1 + np.sign(ahead))}
    names = ["loss"] if batch.targets is not None else ["loss", "accuracy", "margin"]
    return _averages("reward_model", names, rows)


def dpo_loss(params, batch, config):
    by_token = config.length_normalised or not config.needs_reference
    rows = []
    for i, masks in enumerate(batch.response_mask):
        if not masks.any(axis=1).all():
            continue
        log_probs = policy(params, batch.tokens[i])[0]
        ratios = [log_probs[k][columns(masks[k])].sum() for k in (0, 1)]
        if config.needs_reference:
            ratios = [ratio - batch.ref_log_probs[i, k] for k, ratio in enumerate(ratios)]
        if by_token:
            ratios = [ratio / len(columns(masks[k])) for k, ratio in enumerate(ratios)]
        best = _at(batch.best, i, 0)
        chosen = ratios[best]
        rejected = ratios[1 - best]
        delta = chosen - rejected
        if config.kind == "orpo":
            loss = orpo(chosen, rejected, config.beta)
        else:
            loss = dpo(delta, config.beta, config.kind, config.label_smoothing, config.gamma)
        rows.append(
            {
                "loss": loss,
                "accuracy": 0.5 * (1 + np.sign(delta)),
                "margin": config.beta * delta,
                "chosen_log_ratio": chosen,
                "rejected_log_ratio": rejected,
                "weight": _at(batch.weight, i, 1.0),
            }
        )
    names = ["loss", "accuracy", "margin", "chosen_log_ratio", "rejected_log_ratio"]
    loss, metrics = _averages("dpo", names, rows)
    if not config.sft_coef:
        return loss, metrics
    sft_loss = chosen_nll(params, batch)
    return loss + config.sft_coef * sft_loss, metrics | {"dpo/sft_loss": sft_loss}


def chosen_nll(params, batch):
    """Nats per token of the chosen answers of whole pairs."""
    total = tokens = 0.0
    for i, masks in enumerate(batch.response_mask):
        if masks.any(axis=1).all():
            best = _at(batch.best, i, 0)
            weight = _at(batch.weight, i, 1.0)
            log_probs = policy(params, batch.tokens[i])[0]
            total -= weight * log_probs[best][columns(masks[best])].sum()
            tokens += weight * len(columns(masks[best]))
    return total / tokens if tokens else 0.0


def kto(params, batch, config):
    """With the reference point that is given."""
    log_probs = policy(params, batch.tokens)[0]
    point = batch.reference_point[0]
    rows = []
    for i, mask in enumerate(batch.response_mask):
        said = columns(mask)
        if not said:
            continue
        ratio = log_probs[i, said].sum() - batch.ref_log_probs[i]
        is_liked = bool(batch.desirable[i])
        above = ratio - point if is_liked else point - ratio
        coef = config.desirable_weight if is_liked else config.undesirable_weight
        right = 1 / (1 + np.exp(-config.beta * above))
        loss = np.logaddexp(0, -config.beta * above) if config.kind == "bco" else 1 - right
        rows.append(
            {
                "loss": coef * loss,
                "accuracy": 0.5 * (1 + np.sign(above)),
                "reference_point": point,
                f"{'' if is_liked else 'un'}desirable_log_ratio": ratio,
                "weight": _at(batch.weight, i, 1.0),
            }
        )
    names = ["loss", "accuracy", "reference_point", "desirable_log_ratio"]
    return _averages("kto", [*names, "undesirable_log_ratio"], rows)


def vpg(params, batch, config):
    mask = batch.response_mask != 0
    log_probs, entropy, _ = policy(params, batch.tokens)
    advantages = batch.advantages[:, None] if batch.advantages.ndim == 1 else batch.advantages
    weights, metrics = _importance(batch)
    value = aggregate(
        -weights * advantages * log_probs,
        mask,
        config.aggregate,
        config.length,
    )
    bonus = aggregate(entropy, mask, config.aggregate, config.length)
    metrics |= {"policy/loss": value, "objective/entropy": aggregate(entropy, mask, "sum")}
    return value - config.entropy_coef * bonus, metrics


def _importance(batch):
    if batch.importance_weights is None:
        return 1.0, {}
    mean = aggregate(batch.importance_weights, batch.response_mask != 0, "token")
    return batch.importance_weights, {"policy/importance_weight_mean": mean}


def _of_token(log_prob, d, still, advantage, config):
    """(surrogate, ratio, whether it is clipped) of log-ratios with and without a gradient."""
    now = ratio(still)
    held = min(max(now, 1 - config.clip_low), 1 + config.clip_high)
    if config.surrogate == "cispo":
        return -held * advantage * log_prob, now, held != now
    if config.surrogate == "sapo":
        tau = 1.0 if advantage > 0 else 1.05
        gate, frozen = (1 / (1 + math.exp(-tau * (ratio(x) - 1))) for x in (d, still))
        return -advantage * 4 / tau * gate, now, 4 * frozen * (1 - frozen) < 0.5
    if config.surrogate == "vespo":
        power, decay = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
        weight = math.exp(power * still + decay * (1 - now))
        return -weight * advantage * log_prob, now, weight < 0.5
    bounds = config.clip_low, config.clip_high, config.dual_clip
    surrogate = clipped_surrogate(d, advantage, *bounds)
    return surrogate, now, -advantage * held > -advantage * now


def _log_ratios(log_probs, batch, config):
    """Of each token, or the mean or sum of its row."""
    mask = batch.response_mask != 0
    log_ratios = np.where(mask, log_probs - batch.log_probs, 0.0)
    if config.ratio == "token":
        return log_ratios
    tokens = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    share = tokens if config.ratio == "sequence" else 1
    return np.broadcast_to(log_ratios.sum(axis=1, keepdims=True) / share, mask.shape)


def _clipped(params, stopped, batch, advantages, config):
    """The policy's part of PPO, RLOO and GRPO."""
    mask = batch.response_mask != 0
    log_probs, entropy, _ = policy(params, batch.tokens)
    squares = np.where(mask, log_probs - batch.log_probs, 0.0) ** 2 / 2
    moved = log_probs - batch.ref_log_probs
    log_ratios = _log_ratios(log_probs, batch, config)
    still = _log_ratios(policy(stopped, batch.tokens)[0], batch, config)
    surrogate, ratios, clipped, kl_term = np.zeros((4, *mask.shape))
    for at in zip(*np.nonzero(mask), strict=True):
        numbers = (x[at] for x in (log_probs, log_ratios, still, advantages))
        surrogate[at], ratios[at], clipped[at] = _of_token(*numbers, config)
        kl_term[at] = min(ratios[at], 10.0) * kl(moved[at], config.kl_loss_estimator)
    weights, metrics = _importance(batch)
    mean = functools.partial(aggregate, mask=mask, how=config.aggregate, length=config.length)
    by_token = functools.partial(aggregate, mask=mask, how="token")
    metrics |= {
        "policy/loss": mean(weights * surrogate),
        "policy/clip_fraction": by_token(clipped),
        "policy/approx_kl": by_token(squares),
        "policy/ratio_max": ratios.max(),
        "objective/entropy": aggregate(entropy, mask, "sum"),
    }
    if config.kl_loss_coef:
        metrics["policy/kl_loss"] = mean(kl_term)
        metrics["policy/kl_capped_fraction"] = by_token(ratios > 10.0)
    value = metrics["policy/loss"] - config.entropy_coef * mean(entropy)
    return value + config.kl_loss_coef * metrics.get("policy/kl_loss", 0.0), metrics


def ppo(params, stopped, batch, config):
    mask = batch.response_mask != 0
    rewards = batch.rewards
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    known = batch.values
    if config.normalize_returns:
        _, sums = gae(rewards, np.zeros(mask.shape), mask, config.gamma, 1.0)
        mean, variance = sums[mask].mean(), sums[mask].var()
        known = mean + math.sqrt(variance) * known
    advantages, returns = gae(rewards, known, mask, config.gamma, config.gae_lambda)
    if config.normalize_returns:
        returns = (returns - mean) * inverse_deviation(variance, mean)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    value, metrics = _clipped(params, stopped, batch, advantages, config)
    clip = math.inf if config.value_clip is None else config.value_clip
    values = policy(params, batch.tokens)[2]
    errors = np.zeros(mask.shape)
    for at in zip(*np.nonzero(mask), strict=True):
        errors[at] = clipped_value(values[at], batch.values[at], returns[at], clip)
    metrics["value/loss"] = aggregate(errors, mask, config.aggregate, config.length)
    return value + config.value_coef * metrics["value/loss"], metrics


def _of_groups(batch, group_size, estimate):
    """Advantages [B, T] by the rewards of rows."""
    mask = batch.response_mask != 0
    scores = batch.scores
    if batch.rewards is not None:
        scores = np.where(mask, batch.rewards, 0.0).sum(axis=1, dtype=np.float64)
    groups = (x.reshape(-1, group_size) for x in (scores, mask.any(axis=1)))
    return np.where(mask, estimate(*groups).reshape(-1, 1), 0.0)


def _group_loss(params, stopped, batch, config, estimate, whitened=False):
    mask = batch.response_mask != 0
    advantages = _of_groups(batch, config.group_size, estimate)
    if whitened:
        advantages = whiten(advantages, mask)
    return _clipped(params, stopped, batch, advantages, config)


def rloo(params, stopped, batch, config):
    if config.baseline == "group":
        return _group_loss(params, stopped, batch, config, leave_one_out)
    if config.baseline == "both":
        centred = functools.partial(group_normalized, eps=0.0, scale=False)
        return _group_loss(params, stopped, batch, config, centred, whitened=True)
    mask = batch.response_mask != 0
    to_go, _ = gae(batch.rewards, np.zeros(mask.shape), mask, 1.0, 1.0)
    return _clipped(params, stopped, batch, whiten(to_go, mask), config)


def grpo(params, stopped, batch, config):
    estimate = functools.partial(group_normalized, eps=config.eps, scale=config.scale)
    return _group_loss(params, stopped, batch, config, estimate)


def divergence(p, q, kind, beta):
    """Of a student's probabilities p from a teacher's q."""

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    if kind == "jsd":
        mixture = [beta * y + (1 - beta) * x for x, y in zip(p, q, strict=True)]
        return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)
    return kl(q, p) if kind == "forward_kl" else kl(p, q)


def distill(params, stopped, batch, config):
    mask = batch.response_mask != 0
    teacher = {name: np.asarray(x, np.float64) for name, x in teacher_params().items()}
    if config.group_size == 1:
        centred = functools.partial(group_normalized, eps=0.0, scale=False)
        advantages = _of_groups(batch, len(mask), centred)
    else:
        advantages = _of_groups(batch, config.group_size, leave_one_out)
    if config.divergence == "sampled":
        log_ratio = policy(teacher, batch.tokens)[0] - policy(stopped, batch.tokens)[0]
        to_go, _ = gae(log_ratio, np.zeros(mask.shape), mask, config.discount, 1.0)
        advantages = advantages + config.teacher_coef * to_go
    value, metrics = _clipped(params, stopped, batch, advantages, config)
    apart = np.zeros(mask.shape)
    for i, t in zip(*np.nonzero(mask), strict=True):
        before = batch.tokens[i, t - 1]
        weights = [np.exp(table["logits"][before]) for table in (params, teacher)]
        p, q = (weight / weight.sum() for weight in weights)
        apart[i, t] = divergence(p, q, config.divergence, config.beta)
    metrics["distill/divergence"] = aggregate(apart, mask, "token")
    if config.divergence != "sampled":
        mean = aggregate(apart, mask, config.aggregate, config.length)
        value = value + config.teacher_coef * mean
    return value, metrics


@st.composite
def batches(draw, shapes=tuple(SHAPES), arrays=1, scales=(1.0,)):
    """(arrays [B, T] float32 of a size from ``scales``, ragged mask [B, T] with holes, empty rows,
    one-token rows).
    """
    shape = draw(st.sampled_from(shapes))
    scale = draw(st.sampled_from(scales))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = rng.random(shape) < rng.choice([0.2, 0.6, 1.0], size=(shape[0], 1))
    mask[rng.random(shape[0]) < 0.2] = np.arange(shape[1]) == rng.integers(shape[1])
    mask[rng.random(shape[0]) < 0.2] = False
    return [scale * rng.normal(size=shape).astype(np.float32) for _ in range(arrays)], mask


def poisoned(x, mask, poison):
    return np.where(
        mask,
        x,
        np.float32(poison),
    )
