"""Slow NumPy versions, in float64 and plain loops, of what the library computes; and ragged masks
to run them on.
"""

import math

import numpy as np
from hypothesis import strategies as st

SHAPES = [(1, 1), (3, 5), (4, 8)]  # few, since each shape is compiled once


def columns(mask_row):
    return [t for t, bit in enumerate(mask_row) if bit]


def whiten(x, mask, shift_mean=True, eps=1e-8):
    said = [float(v) for v in x[mask]]
    mean = sum(said) / max(len(said), 1)
    var = sum((v - mean) ** 2 for v in said) / max(len(said), 1)
    white = (np.where(mask, x, 0.0) - mean) / math.sqrt(var + eps)
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
            out[n, g] = (
                0.0 if equal else (float(scores[n, g]) - mean) / (std + eps if scale else 1.0)
            )
    return out


# Losses of whole algorithms, of the lookup tables in ``tabular``: (loss, metrics). ``stopped`` are
# the parameters of what no gradient flows through, so that differences of the loss are its
# gradient.


def policy(params, tokens):
    """``tabular.policy_fn``: log-probs, entropy and values [B, T] of a bigram table; column 0 is 0."""
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


def _weighted_mean(numbers, weights):
    return (
        sum(w * x for w, x in zip(weights, numbers, strict=True)) / sum(weights)
        if sum(weights)
        else 0.0
    )


def reward_model(params, batch, config):
    scores = np.sum(
        np.where(
            batch.attention_mask != 0,
            params["scores"][batch.tokens],
            0.0,
        ),
        axis=2,
    )
    value = []
    accuracy = []
    margins = []
    weights = []
    compared = []
    for i, row in enumerate(scores):
        weight = 1.0 if batch.weight is None else batch.weight[i]
        present = [bool(mask.any()) for mask in batch.response_mask[i]]
        if batch.targets is not None:
            value += [
                (s - y) ** 2
                for s, y, here in zip(
                    row,
                    batch.targets[i],
                    present,
                    strict=True,
                )
                if here
            ]
            weights += [weight] * sum(present)
            continue
        best = 0 if batch.best is None else batch.best[i]
        if not present[best]:
            continue
        entered = [s if here else None for s, here in zip(row, present, strict=True)]
        value.append(
            comparison(
                entered, best, 0.0 if batch.margin is None else batch.margin[i], config.centering
            )
        )
        weights.append(weight)
        others = [s for k, s in enumerate(entered) if s is not None and k != best]
        if others:
            margins.append(row[best] - max(others))
            accuracy.append(0.5 * (1 + np.sign(margins[-1])))
            compared.append(weight)
    value = _weighted_mean(value, weights)
    if batch.targets is not None:
        return value, {"reward_model/loss": value}
    return value, {
        "reward_model/loss": value,
        "reward_model/accuracy": _weighted_mean(accuracy, compared),
        "reward_model/margin": _weighted_mean(margins, compared),
    }


def dpo_loss(params, batch, config):
    value = []
    accuracy = []
    margins = []
    chosen = []
    rejected = []
    weights = []
    for i in range(len(batch.tokens)):
        if not all(mask.any() for mask in batch.response_mask[i]):
            continue
        log_probs = policy(params, batch.tokens[i])[0]
        said = [log_probs[k][columns(batch.response_mask[i, k])] for k in (0, 1)]
        ratios = [
            x.sum() - config.needs_reference * batch.ref_log_probs[i, k] for k, x in enumerate(said)
        ]
        if config.length_normalised or not config.needs_reference:
            ratios = [ratio / len(x) for ratio, x in zip(ratios, said, strict=True)]
        best = 0 if batch.best is None else batch.best[i]
        chosen.append(ratios[best])
        rejected.append(ratios[1 - best])
        delta = chosen[-1] - rejected[-1]
        if config.kind == "orpo":
            value.append(
                orpo(
                    chosen[-1],
                    rejected[-1],
                    config.beta,
                )
            )
        else:
            value.append(
                dpo(
                    delta,
                    config.beta,
                    config.kind,
                    config.label_smoothing,
                    config.gamma,
                )
            )
        margins.append(config.beta * delta)
        accuracy.append(0.5 * (1 + np.sign(delta)))
        weights.append(1.0 if batch.weight is None else batch.weight[i])
    lists = {"loss": value, "accuracy": accuracy, "margin": margins}
    lists |= {"chosen_log_ratio": chosen, "rejected_log_ratio": rejected}
    metrics = {f"dpo/{name}": _weighted_mean(numbers, weights) for name, numbers in lists.items()}
    return metrics["dpo/loss"], metrics


def kto(params, batch, config):
    """With the reference point that is given."""
    log_probs = policy(params, batch.tokens)[0]
    responses = [columns(mask) for mask in batch.response_mask]
    point = batch.reference_point[0]
    value = []
    side = []
    ratios = []
    weights = []
    for i, said in enumerate(responses):
        if said:
            ratios.append(log_probs[i, said].sum() - batch.ref_log_probs[i])
            sign = 1.0 if batch.desirable[i] else -1.0
            coef = config.desirable_weight if batch.desirable[i] else config.undesirable_weight
            value.append(coef * (1 - 1 / (1 + np.exp(-config.beta * sign * (ratios[-1] - point)))))
            side.append(0.5 * (1 + sign * np.sign(ratios[-1] - point)))
            weights.append(1.0 if batch.weight is None else batch.weight[i])
    liked = np.array([bool(batch.desirable[i]) for i, said in enumerate(responses) if said])
    lists = {
        "loss": (value, weights),
        "accuracy": (side, weights),
        "reference_point": ([point] * len(side), weights),
    }
    lists |= {
        "desirable_log_ratio": (ratios, weights * liked),
        "undesirable_log_ratio": (ratios, weights * ~liked),
    }
    metrics = {f"kto/{name}": _weighted_mean(*pair) for name, pair in lists.items()}
    return metrics["kto/loss"], metrics


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


def _clipped(params, stopped, batch, advantages, config):
    """The policy's part of PPO, RLOO and GRPO."""
    mask = batch.response_mask != 0
    log_probs, entropy, _ = policy(params, batch.tokens)
    frozen = policy(stopped, batch.tokens)[0]
    surrogate, kl_term, squares, clipped, ratios, capped = np.zeros((6, *mask.shape))
    for at in zip(*np.nonzero(mask), strict=True):
        d = log_probs[at] - batch.log_probs[at]
        a = advantages[at]
        squares[at] = d * d / 2
        still = frozen[at] - batch.log_probs[at]
        if config.ratio == "sequence":
            row = at[0]
            here = mask[at[0]]
            d, still = ((x[row] - batch.log_probs[row])[here].mean() for x in (log_probs, frozen))
        surrogate[at] = clipped_surrogate(
            d,
            a,
            config.clip_low,
            config.clip_high,
            config.dual_clip,
        )
        ratios[at] = ratio(still)
        held = min(
            max(ratios[at], 1 - config.clip_low),
            1 + config.clip_high,
        )
        kl_term[at] = min(ratios[at], 10.0) * kl(
            log_probs[at] - batch.ref_log_probs[at], config.kl_loss_estimator
        )
        capped[at] = ratios[at] > 10.0
        clipped[at] = -a * held > -a * ratios[at]
        if config.surrogate == "cispo":
            surrogate[at] = -held * a * log_probs[at]
            clipped[at] = held != ratios[at]
    how = config.aggregate, config.length
    weights, metrics = _importance(batch)
    metrics |= {
        "policy/loss": aggregate(weights * surrogate, mask, *how),
        "policy/clip_fraction": aggregate(clipped, mask, "token"),
        "policy/approx_kl": aggregate(squares, mask, "token"),
        "policy/ratio_max": ratios.max(),
        "objective/entropy": aggregate(entropy, mask, "sum"),
    }
    if config.kl_loss_coef:
        metrics["policy/kl_loss"] = aggregate(kl_term, mask, *how)
        metrics["policy/kl_capped_fraction"] = aggregate(capped, mask, "token")
    value = metrics["policy/loss"] - config.entropy_coef * aggregate(entropy, mask, *how)
    return value + config.kl_loss_coef * metrics.get("policy/kl_loss", 0.0), metrics


def ppo(params, stopped, batch, config):
    mask = batch.response_mask != 0
    rewards = (
        whiten(batch.rewards, mask, shift_mean=False) if config.whiten_rewards else batch.rewards
    )
    advantages, returns = gae(
        rewards,
        batch.values,
        mask,
        config.gamma,
        config.gae_lambda,
    )
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    value, metrics = _clipped(params, stopped, batch, advantages, config)
    values = policy(params, batch.tokens)[2]
    errors = np.zeros(mask.shape)
    for at in zip(*np.nonzero(mask), strict=True):
        clip = math.inf if config.value_clip is None else config.value_clip
        errors[at] = clipped_value(
            values[at],
            batch.values[at],
            returns[at],
            clip,
        )
    metrics["value/loss"] = aggregate(errors, mask, config.aggregate, config.length)
    return value + config.value_coef * metrics["value/loss"], metrics


def _group_loss(params, stopped, batch, config, estimate, whitened=False):
    mask = batch.response_mask != 0
    if batch.rewards is not None:
        scores = np.array(
            [row[columns(said)].sum() for row, said in zip(batch.rewards, mask, strict=True)]
        )
    else:
        scores = batch.scores
    advantages = estimate(
        *(x.reshape(-1, config.group_size) for x in (scores, mask.any(axis=1)))
    ).ravel()
    advantages = np.where(
        mask,
        advantages[:, None],
        0.0,
    )
    return _clipped(
        params, stopped, batch, whiten(advantages, mask) if whitened else advantages, config
    )


def rloo(params, stopped, batch, config):
    if config.baseline == "global":
        mask = batch.response_mask != 0
        to_go, _ = gae(
            batch.rewards,
            np.zeros(mask.shape),
            mask,
            1.0,
            1.0,
        )
        return _clipped(
            params,
            stopped,
            batch,
            whiten(to_go, mask),
            config,
        )
    if config.baseline == "group":
        return _group_loss(params, stopped, batch, config, leave_one_out)

    def centred(scores, present):
        return group_normalized(scores, present, 0.0, False)

    return _group_loss(params, stopped, batch, config, centred, whitened=True)


def grpo(params, stopped, batch, config):
    def estimate(scores, present):
        return group_normalized(scores, present, config.eps, config.scale)

    return _group_loss(params, stopped, batch, config, estimate)


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
