"""The phases of one RL iteration, as pure functions: collect -> reward -> learn.

``iteration`` is the three in one call, for one jit. A reward that runs on the host goes between two
jits instead; both ways give the same parameters, up to rounding.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from rlhf_jax import models, ops, rewards, rollout, sampling, sharding
from rlhf_jax.algorithms.policy import row_rewards
from rlhf_jax.config import RLStage
from rlhf_jax.types import Algorithm, Metrics, Params, Rollout, TrainState


@flax.struct.dataclass
class LoopState:
    """Everything that an RL run carries from one iteration to the next."""

    train: TrainState  # of the algorithm's own class
    kl_coef: jax.Array  # [] float32
    reference: Params | None = (
        None  # the policy's parameters at the last refresh; None: the reference never changes
    )

    @classmethod
    def create(
        cls, train: TrainState, kl_coef: float, reference: Params | None = None
    ) -> "LoopState":
        """The state before the first iteration."""
        return cls(train=train, kl_coef=jnp.float32(kl_coef), reference=reference)


class Prompts(NamedTuple):
    """A batch of prompts, left-padded."""

    tokens: jax.Array  # [B, P] int32
    attention_mask: jax.Array  # [B, P]
    row_ids: jax.Array  # [B] data row of each prompt
    used: jax.Array | None = None  # [B] of conversations, see ``sampling.generate``
    places: jax.Array | None = (
        None  # [B] int32, which decide the rows' randomness; None: 0 .. B - 1
    )


@flax.struct.dataclass
class Functions:
    """What the phases call: ``jax.tree_util.Partial``, whose arrays travel through ``jit`` as
    arguments.
    """

    policy_fn: Any  # PolicyFn of ``loop.train.params``; under LoRA ``models.lora.bind(fn, base)``
    reward_fn: Any = None  # RewardFn; None: the reward runs on the host
    # BoundPolicyFn, or PolicyFn of the parameters in ``loop.reference``; None: no reference
    ref_fn: Any = None
    base: Params | None = None  # under LoRA, the frozen parameters


@dataclass(frozen=True)
class Recipe:
    """What stays the same during a run and shapes its programs: static under ``jit``."""

    model: models.Model
    sampling: sampling.SamplingConfig
    algorithm: Algorithm
    algorithm_config: Any
    optimizer: optax.GradientTransformation
    settings: RLStage
    mesh: jax.sharding.Mesh | None = None  # over whose "data" axis rows are spread
    score_rows: int | None = None  # that policy and reference score at once, see ``ops.by_rows``


def sampler(loop: LoopState, base: Params | None) -> Params:
    """The policy's parameters as it samples: under LoRA the ``base`` with its adapters attached.
    Nothing is copied.
    """
    policy = models.policy_params(loop.train.params)
    return policy if base is None else models.lora.attach(base, policy)


def respond(
    policy: Params, prompts: Prompts, key: jax.Array, *, recipe: Recipe, greedy: bool = False
) -> Rollout:
    """A response of the ``sampler`` to each prompt, with its log-probs.

    Randomness is that of the row's place, not of its data row, so a prompt that occurs twice gets
    two samples. ``greedy``: the likeliest token each time, and no randomness.
    """
    config = replace(recipe.sampling, temperature=0.0) if greedy else recipe.sampling
    how: Any = {
        "config": config,
        "row_ids": prompts.places,
        "mesh": recipe.mesh,
        "used": prompts.used,
    }
    sampled = sampling.generate(
        recipe.model, policy, prompts.tokens, prompts.attention_mask, key, **how
    )
    return replace(sampled, row_ids=prompts.row_ids)


def collect(
    loop: LoopState, prompts: Prompts, key: jax.Array, functions: Functions, *, recipe: Recipe
) -> tuple[Rollout, Metrics]:
    """``respond``, then ``rescored``."""
    sampled = respond(sampler(loop, functions.base), prompts, key, recipe=recipe)
    return rescored(loop, sampled, functions, recipe=recipe)


def rescored(
    loop: LoopState, sampled: Rollout, functions: Functions, *, recipe: Recipe
) -> tuple[Rollout, Metrics]:
    """Samples with log-probs and values of the update's own forward pass, the reference's
    log-probs, and metrics.
    """
    ref_fn = functions.ref_fn
    if loop.reference is not None:
        ref_fn = jax.tree_util.Partial(ref_fn, loop.reference)
    policy_fn = ops.by_rows(functions.policy_fn, recipe.score_rows)
    scored = rollout.rescore(sampled, loop.train.params, policy_fn=policy_fn, ref_fn=ref_fn)
    present = _present(scored)
    ended = jnp.any(
        jnp.isin(scored.tokens, jnp.asarray(recipe.sampling.eos_ids)) & (scored.response_mask != 0),
        axis=1,
    )
    repeated, _ = rewards.repetition()(scored)
    metrics = {
        "policy/sampler_gap": rollout.sampler_gap(sampled, scored),
        "response/length": ops.masked_mean(rewards.length()(scored)[0], present),
        "response/eos_fraction": ops.masked_mean(ended.astype(jnp.float32), present),
        "response/repetition": ops.masked_mean(repeated, present),
    }
    return scored, metrics


def reward(rollout: Rollout, functions: Functions) -> tuple[Rollout, Metrics]:
    """``scored`` with the result of ``functions.reward_fn``."""
    return scored(rollout, *functions.reward_fn(rollout))


def scored(
    rollout: Rollout, scores: jax.Array, parts: dict[str, jax.Array]
) -> tuple[Rollout, Metrics]:
    """Fills ``scores`` [B], and ``rewards`` [B, T] where the scores are dense; scores are then
    their row sums.

    An environment's ``rewards`` stay, and the score is added to them, at the end of the response.
    """
    if rollout.rewards is not None:
        at_end = (
            rewards.kl_shaped(replace(rollout, rewards=None, scores=scores), 0.0)
            if scores.ndim == 1
            else scores
        )
        scores = rollout.rewards + at_end
    if scores.ndim == 2:
        rollout = replace(rollout, rewards=scores)
        scores = _row_sums(scores, rollout)
    present = _present(rollout)
    metrics = {f"reward/{name}": ops.masked_mean(values, present) for name, values in parts.items()}
    metrics["reward/length_correlation"] = _correlation(
        scores, rewards.length()(rollout)[0], present
    )
    return replace(rollout, scores=scores), metrics | {
        "objective/score": ops.masked_mean(scores, present)
    }


def with_greedy(rollout: Rollout, greedy: Rollout, *, recipe: Recipe) -> Rollout:
    """The rollout with the rewards of scored greedy responses to the same prompts, after the rules
    for their end.

    A row whose greedy response has no score is absent: without its baseline it would learn from its
    reward alone.
    """
    mask = jnp.where(_present(greedy)[:, None], rollout.response_mask, 0)
    return replace(
        rollout, response_mask=mask, greedy_rewards=row_rewards(_judged_by_end(greedy, recipe))
    )


def refill(kept: Rollout, fresh: Rollout, *, recipe: Recipe) -> Rollout:
    """``kept`` with groups of ``fresh`` whose scores differ in place of its own whose scores do
    not, in order.
    """
    size = recipe.algorithm_config.group_size
    wanting, offered = _equal(kept, recipe), ~_equal(fresh, recipe)  # [groups] each
    number = jnp.cumsum(wanting) - 1  # of the replacement
    source = jnp.argsort(~offered, stable=True)[number]
    rows = jnp.repeat(source * size, size) + jnp.tile(jnp.arange(size), len(source))
    replaced = jnp.repeat(wanting & (number < jnp.sum(offered)), size)  # [B]
    result: Rollout = jax.tree.map(
        lambda old, new: jnp.where(replaced.reshape(-1, *[1] * (old.ndim - 1)), new[rows], old),
        kept,
        fresh,
    )
    return (
        result
        if recipe.mesh is None
        else jax.lax.with_sharding_constraint(result, sharding.rows(recipe.mesh))
    )


def num_equal(rollout: Rollout, *, recipe: Recipe) -> jax.Array:
    """How many groups (without groups: batches) have nothing to learn from: what counts there
    scores alike.
    """
    return jnp.sum(_equal(rollout, recipe)).astype(jnp.float32)


def learn(
    loop: LoopState, rollout: Rollout, key: jax.Array, functions: Functions, *, recipe: Recipe
) -> tuple[LoopState, Metrics]:
    """Shapes the rewards with the rule for missing EOS and the KL penalty, updates the policy,
    adapts the coefficient.

    Raises:
        ValueError: a rule for missing EOS or overlong responses with a dense reward, or for missing
            EOS without an ``eos_id``.
    """
    settings, present, ref_log_probs = recipe.settings, _present(rollout), rollout.ref_log_probs
    judged, counted = _judged_by_end(rollout, recipe), _counted(rollout, recipe)
    shaped = rewards.kl_shaped(judged, 0.0 if ref_log_probs is None else loop.kl_coef)
    metrics = {"objective/reward": ops.masked_mean(_row_sums(shaped, rollout), present)}
    if rollout.scores is not None:
        metrics["reward/equal_groups"] = num_equal(rollout, recipe=recipe)
    to_learn = replace(rollout, rewards=shaped)
    if settings.mask_truncated:
        metrics["response/masked"] = jnp.sum(present & ~counted).astype(jnp.float32)
        to_learn = replace(
            to_learn, response_mask=jnp.where(counted[:, None], rollout.response_mask, 0)
        )
    how: Any = {
        "policy_fn": functions.policy_fn,
        "optimizer": recipe.optimizer,
        "config": recipe.algorithm_config,
    }
    how["minibatch_sharding"] = None if recipe.mesh is None else sharding.rows(recipe.mesh)
    train, update_metrics = recipe.algorithm.update(loop.train, to_learn, key, **how)
    kl_coef = loop.kl_coef
    if ref_log_probs is not None:
        kl = ops.masked_mean(_row_sums(ops.kl(rollout.log_probs, ref_log_probs), rollout), present)
        metrics |= {"objective/kl": kl, "kl/coef": kl_coef}
        if settings.kl_target is not None:
            n = rollout.tokens.shape[0]
            horizon = settings.kl_horizon or 10 * n
            adapted = rewards.adaptive_kl(
                kl_coef, kl, target=settings.kl_target, horizon=horizon, n=n
            )
            # An update that is not finite keeps the policy; the coefficient must then not move
            # either.
            kl_coef = jnp.where(update_metrics["nonfinite"] == 0, adapted, kl_coef)
    return LoopState(train, kl_coef, loop.reference), metrics | update_metrics


def iteration(
    loop: LoopState,
    prompts: Prompts,
    rollout_key: jax.Array,
    update_key: jax.Array,
    functions: Functions,
    *,
    recipe: Recipe,
) -> tuple[LoopState, Rollout, Metrics]:
    """collect, reward and learn, for a reward function that can be traced. Returns the scored
    rollout too.
    """
    rollout, metrics = collect(loop, prompts, rollout_key, functions, recipe=recipe)
    rollout, reward_metrics = reward(rollout, functions)
    if recipe.algorithm_config.baseline == "greedy":
        greedy = respond(
            sampler(loop, functions.base), prompts, rollout_key, recipe=recipe, greedy=True
        )
        greedy, of_greedy = reward(greedy, functions)
        rollout = with_greedy(rollout, greedy, recipe=recipe)
        metrics["objective/greedy_score"] = of_greedy["objective/score"]
    loop, learn_metrics = learn(loop, rollout, update_key, functions, recipe=recipe)
    return loop, rollout, metrics | reward_metrics | learn_metrics


def _judged_by_end(rollout: Rollout, recipe: Recipe) -> Rollout:
    """The rollout with the scores that the rules for missing EOS and for overlong responses leave."""
    settings, eos_id, scores = recipe.settings, recipe.sampling.eos_id, rollout.scores
    penalty, score = settings.missing_eos_penalty, settings.missing_eos_score
    by_eos, buffer = not (penalty is None and score is None), settings.overlong_buffer
    if not by_eos and buffer is None:
        return rollout
    if scores is None or rollout.rewards is not None or (by_eos and eos_id is None):
        raise ValueError(
            "missing_eos and overlong_buffer need one score per response, and missing_eos an eos_id"
        )
    if by_eos and eos_id is not None:
        scores = rewards.missing_eos(rollout, scores, eos_id, penalty=penalty, score=score)
    if buffer is not None:
        length, most = recipe.sampling.max_new_tokens, settings.overlong_penalty
        scores = rewards.overlong_penalty(
            rollout, scores, max_length=length, buffer=buffer, penalty=most
        )
    return replace(rollout, scores=scores)


def _counted(rollout: Rollout, recipe: Recipe) -> jax.Array:
    """The rows [B] that the update reads: those present and, with ``mask_truncated``, ended."""
    present, eos_id = _present(rollout), recipe.sampling.eos_id
    if not recipe.settings.mask_truncated:
        return present
    if eos_id is None:
        raise ValueError("mask_truncated needs an eos_id")
    return present & (
        rewards.missing_eos(rollout, jnp.zeros(present.shape), eos_id, score=1.0) == 0
    )


def _equal(rollout: Rollout, recipe: Recipe) -> jax.Array:
    """Whether all scores of a group that count are alike, or none counts: [groups]; one group if
    there are none. NaN is unlike anything."""
    size, counted = recipe.algorithm_config.group_size, _counted(rollout, recipe)
    size = size if size > 1 else len(counted)
    high, low = (
        jnp.where(counted, row_rewards(rollout), filler).reshape(-1, size)
        for filler in (-jnp.inf, jnp.inf)
    )
    return high.max(axis=1) <= low.min(axis=1)


def _correlation(x: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
    """Pearson's over the rows of the mask, [B] each; 0 where one of the two is constant."""
    lows, highs = (
        jnp.stack([jnp.where(mask, v, filler) for v in (x, y)]) for filler in (jnp.inf, -jnp.inf)
    )
    varies = jnp.all(
        highs.max(axis=1) > lows.min(axis=1)
    )  # exactly: what rounding leaves of a constant correlates too
    x, y = (values - ops.masked_mean(values, mask) for values in (x, y))
    spread = jnp.sqrt(ops.masked_mean(x * x, mask) * ops.masked_mean(y * y, mask))
    return jnp.where(varies, ops.masked_mean(x * y, mask) / jnp.where(varies, spread, 1.0), 0.0)


def _present(rollout: Rollout) -> jax.Array:
    return jnp.any(rollout.response_mask != 0, axis=1)


def _row_sums(values: jax.Array, rollout: Rollout) -> jax.Array:
    return jnp.sum(jnp.where(rollout.response_mask != 0, values, 0.0), axis=1)
