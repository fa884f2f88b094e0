"""The steps of one RL iteration, as pure functions of arrays: sample -> score -> shape -> learn;
and ``iterate``, all of them in one.

``respond`` samples, ``rescored`` adds the log-probs of the update's own forward pass, ``reward``
scores, a ``Rule`` and a ``Penalty`` shape the scores into the rewards of the update, and ``learn``
makes the update. ``training.rl`` compiles each step separately, so that a reward or an environment
in ordinary Python can run between them. Called one after the other they also trace into one
program, which gives the same parameters up to rounding.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from rlhf_jax import losses, models, ops, policies, rewards, sampling, types
from rlhf_jax.advantages import leave_one_out
from rlhf_jax.algorithms.policy import (
    informative_groups,
    row_rewards,
    wanted,
    with_group_advantages,
)
from rlhf_jax.errors import UserError
from rlhf_jax.parallel import sharding
from rlhf_jax.rewards.host import pair
from rlhf_jax.sampling import rollout
from rlhf_jax.types import Algorithm, EosId, Metrics, Params, Rollout, Scores, TrainState


@flax.struct.dataclass
class LoopState:
    """Everything that an RL run carries from one iteration to the next."""

    train: TrainState  # of the algorithm's own class
    kl_coef: Array  # [] float32
    reference: Params | None = None
    """The parameters of a reference that moves; None if it never changes."""
    behind: TrainState | None = None
    """The policy that samples the next rollout, without an optimizer; None if ``train`` does."""


class Prompts(NamedTuple):
    """A batch of prompts, left-padded."""

    tokens: Array  # [B, P] int32
    attention_mask: Array  # [B, P]
    row_ids: Array | None = None  # [B] data row of each prompt
    used: Array | None = None  # [B] of conversations, see ``sampling.generate``
    places: Array | None = None
    """[B] int32: row i samples with the key folded with ``places[i]``. None means 0 .. B - 1."""


@flax.struct.dataclass
class Functions:
    """The functions that the steps call, each a ``jax.tree_util.Partial``: ``jit`` then takes their
    arrays as arguments.
    """

    policy_fn: Any  # PolicyFn of ``loop.train.params``; under LoRA ``models.lora.bind(fn, base)``
    reward_fn: Any = None  # RewardFn; None if the reward runs on the host
    ref_fn: Any = None
    """BoundPolicyFn, or a PolicyFn of ``loop.reference``; None if there is no reference."""
    base: Params | None = None  # the frozen parameters under LoRA
    teacher: Params | None = None
    """The fifth argument of ``policy_fn`` in updates; None if there is no teacher."""


# --- Sample


def policy(loop: LoopState) -> Params:
    """The trained parameters of the policy, without those of a whole value model."""
    return models.policy_params(loop.train.params)


def sampling_params(loop: LoopState, base: Params | None) -> Params:
    """The parameters that sample: the policy's, or under LoRA the ``base`` with the adapters
    attached. Nothing is copied.
    """
    trained = policy(loop)
    return trained if base is None else models.lora.attach(base, trained)


def reference_params(loop: LoopState, functions: Functions, base: Params | None) -> Params:
    """The parameters that sample as the reference: the last that ``functions.ref_fn`` carries, or
    those of one that moves, under LoRA with the ``base``; None if there is no reference.
    """
    if functions.ref_fn is None:
        return None
    if loop.reference is None:
        return functions.ref_fn.bound[-1]
    return loop.reference if base is None else models.lora.attach(base, loop.reference)


def respond(
    policy: Params,
    prompts: Prompts,
    key: Array,
    *,
    model: models.Model,
    config: sampling.SamplingConfig,
    mesh: Mesh | None = None,
    group_size: int = 1,
) -> Rollout:
    """A response to each prompt with its log-probs, by ``sampling_params``. Each
    ``group_size`` adjacent prompts are equal and computed once, but in later turns.

    The randomness of a row depends on its place, not on its data row, so a prompt that occurs
    twice gets two samples.
    """
    sampled = sampling.generate(
        model,
        policy,
        prompts.tokens,
        prompts.attention_mask,
        key,
        config=config,
        places=prompts.places,
        mesh=mesh,
        used=prompts.used,
        group_size=group_size if prompts.used is None else 1,
    )
    return replace(sampled, row_ids=prompts.row_ids)


def respond_by(
    policies: tuple[Params, Params],
    prompts: Prompts,
    key: Array,
    *,
    algorithm: Any,
    settings: Any,
    model: models.Model,
    config: sampling.SamplingConfig,
    mesh: Mesh | None = None,
) -> Rollout:
    """Responses by ``algorithm.respond(sample, prompts, key, *, model, policy, reference,
    config)``, whose log-probs are those of what sampled them.

    ``sample(params, prompts, key, *, model=model, **changes) -> Rollout`` is ``respond`` by any
    parameters and model, with changes of the SamplingConfig. Some of the prompts are
    ``jax.tree.map(lambda x: x[::2], prompts)``, whose places are theirs: with one key, parts are
    independent.

    Args:
        policies: parameters of the policy and of the reference, see ``sampling_params``.
        settings: the algorithm's ``config``.
    """
    if prompts.places is None:
        prompts = prompts._replace(places=jnp.arange(len(prompts.tokens), dtype=jnp.int32))

    def sample(
        params: Params, prompts: Prompts, key: Array, *, model: Any = model, **changes: Any
    ) -> Rollout:
        # Some of the prompts may be fewer than the devices.
        fits = mesh is not None and len(prompts.tokens) % sharding.num_parts(mesh) == 0
        own: Any = {"config": replace(config, **changes), "mesh": mesh if fits else None}
        return respond(params, prompts, key, model=model, **own)

    policy, reference = policies
    by_name = {"model": model, "policy": policy, "reference": reference, "config": settings}
    sampled: Rollout = algorithm.respond(sample, prompts, key, **by_name)
    return sampled


def rescored(
    loop: LoopState,
    sampled: Rollout,
    functions: Functions,
    *,
    eos_ids: tuple[int, ...],
    score_rows: int | None = None,
    importance: tuple[float, losses.ImportanceSampling, float] | None = None,
    expert_gap: Callable[[Params, Rollout], Array] | None = None,
    keep_log_probs: bool = False,
    extras: Collection[str] = (),
) -> tuple[Rollout, Metrics]:
    """The samples with log-probs and values of the update's own forward pass, the log-probs of the
    reference, and metrics.

    Args:
        keep_log_probs: the log-probs stay those of what sampled, which need not be the policy.
        extras: what the algorithm reads; with ``sampler_log_probs`` the rollout has these.
        score_rows: rows that the policy scores at once, see ``ops.by_rows``.
        importance: cap, kind and floor of the weights that correct an engine's log-probs
            (``losses.importance_weights``); None: no weights.
        expert_gap: ``sampling.expert_gap`` of a mixture of experts; None: it is not measured.
    """
    ref_fn = functions.ref_fn
    if loop.reference is not None:
        ref_fn = policies.as_policy(ref_fn).bind(loop.reference)
    policy_fn = ops.by_rows(functions.policy_fn, score_rows, group_size=sampled.group_size)
    weights: Any = {}
    if importance is not None:
        cap, how, floor = importance
        weights = {"importance_cap": cap, "importance_sampling": how, "importance_floor": floor}
    params = loop.train.params
    scored = rollout.rescore(sampled, params, policy_fn=policy_fn, ref_fn=ref_fn, **weights)
    is_eos = jnp.isin(scored.tokens, jnp.asarray(eos_ids)) & scored.mask
    ended = jnp.any(is_eos, axis=1)
    if scored.stopped is not None:
        ended |= scored.stopped
    lengths, _ = rewards.length()(scored)
    repeated, _ = rewards.repetition()(scored)
    # Of samples of another policy the gap is more than rounding.
    gap = "update_gap" if keep_log_probs or loop.behind is not None else "sampler_gap"
    metrics = {
        f"policy/{gap}": rollout.sampler_gap(sampled, scored),
        "response/length": ops.masked_mean(lengths, scored.present),
        "response/eos_fraction": ops.masked_mean(ended.astype(jnp.float32), scored.present),
        "response/repetition": ops.masked_mean(repeated, scored.present),
        "response/most_common": most_common(scored),
    }
    if importance is not None:
        # The cap of a mask by a divergence is none of weights.
        cap, floor = (math.inf, 0.0) if how in ("tv_mask", "kl_mask") else (cap, floor)
        raw = ops.masked(ops.ratio(scored.log_probs, sampled.log_probs), sampled.mask)
        limited = rollout.truncated_share(scored, cap, importance_floor=floor)
        metrics["policy/importance_limited"] = limited
        metrics["policy/importance_raw_mean"] = ops.masked_mean(raw, sampled.mask)
        metrics["policy/importance_raw_max"] = jnp.max(raw)
    if expert_gap is not None:
        policy = sampling_params(loop, functions.base)
        metrics["policy/expert_gap"] = expert_gap(policy, sampled)
    if keep_log_probs:
        scored = replace(scored, log_probs=sampled.log_probs)
    if "sampler_log_probs" in extras:
        of_sampler = {"sampler_log_probs": sampled.log_probs}
        scored = replace(scored, extras={**(scored.extras or {}), **of_sampler})
    return scored, metrics


def most_common(rollout: Rollout) -> Array:
    """Share of the batch's responses that equal the most common one; 0 with fewer than two.

    Two responses are equal if their tokens under the mask are, wherever they stand. They are
    compared by two hashes of 32 bits, sums of tokens times random factors.
    """
    mask = rollout.mask
    place = jnp.cumsum(mask, axis=1) - 1  # of each token in its response
    factors = jax.random.bits(jax.random.key(0), (2, mask.shape[1]))
    words = jnp.where(mask, rollout.tokens + 1, 0).astype(jnp.uint32)
    hashes = jnp.sum(words[None] * factors[:, place], axis=2)  # [2, B]
    equal = jnp.all(hashes[:, :, None] == hashes[:, None, :], axis=0)  # [B, B]
    present = rollout.present
    both = present[:, None] & present[None, :]
    most = jnp.max(jnp.sum(equal & both, axis=0))
    number = jnp.sum(present)
    return jnp.where(number > 1, most / jnp.maximum(number, 1), 0.0)


# --- Score


def reward(rollout: Rollout, functions: Functions) -> tuple[Rollout, Metrics]:
    """``scored`` with the result of ``functions.reward_fn``."""
    return scored(rollout, *pair("the reward", functions.reward_fn(rollout)))


def scored(
    rollout: Rollout,
    scores: Array,
    components: dict[str, Array],
    has_score: Mapping[str, Array] | None = None,
) -> tuple[Rollout, Metrics]:
    """Fills ``scores`` [B], ``extras`` with the components, and ``rewards`` [B, T] where the scores
    are dense; scores are then their row sums.

    The ``rewards`` of an environment stay, and the score is added to them at the end of the
    response.

    Args:
        has_score: {component: [B] bool}, the rows over which its metric is; None: all that are
            present. Of a component [B, T] it is the mean of row sums.
    """
    is_dense = scores.ndim == 2
    if rollout.rewards is not None:
        scores = rollout.rewards + ops.at_end(scores, rollout.response_mask)
    if scores.ndim == 2:
        rollout = replace(rollout, rewards=scores)
        scores = ops.response_sums(scores, rollout)
    present = rollout.present
    lengths, _ = rewards.length()(rollout)
    metrics = {}
    for name, values in components.items():
        own = present if has_score is None else present & has_score[name]
        of_rows = values if values.ndim == 1 else ops.response_sums(values, rollout)
        metrics[f"reward/{name}"] = ops.masked_mean(of_rows, own)
    metrics["reward/length_correlation"] = _correlation(scores, lengths, present)
    metrics["objective/score"] = ops.masked_mean(scores, present)
    extras = {**(rollout.extras or {}), **components} or None
    return replace(rollout, scores=scores, extras=extras, dense=is_dense), metrics


# --- Shape: from scores to the rewards of the update

Rule = Callable[[Rollout], Rollout]
"""A pure function that changes scores or masks of a scored rollout."""

_NEEDS = (
    "score_clip, missing_eos and overlong_buffer need one score per response, and missing_eos an "
    "eos_id"
)


def unchanged(rollout: Rollout) -> Rollout:
    """The rule that does nothing."""
    return rollout


def then(*rules: Rule) -> Rule:
    """The rules, one after the other."""

    def all_rules(rollout: Rollout) -> Rollout:
        return functools.reduce(lambda changed, rule: rule(changed), rules, rollout)

    return all_rules


def _on_scores(change: Callable[[Rollout, Array], Array]) -> Rule:
    """The rule that puts ``change(rollout, scores)`` in place of the scores. With dense rewards the
    difference stands at the last token.
    """

    def rule(rollout: Rollout) -> Rollout:
        scores = rollout.scores
        if scores is None or (rollout.rewards is not None and not rollout.dense):
            raise ValueError(_NEEDS)
        changed = change(rollout, scores)
        if rollout.rewards is None:
            return replace(rollout, scores=changed)
        at_end = ops.at_end(changed - scores, rollout.response_mask)
        return replace(rollout, scores=changed, rewards=rollout.rewards + at_end)

    return rule


def clipped(limit: float) -> Rule:
    """Scores above ``limit`` become it, and those below ``-limit`` its negative."""
    return _on_scores(lambda rollout, scores: jnp.clip(scores, -limit, limit))


def missing_eos(eos_id: EosId | None, *, penalty: float | None, score: float | None) -> Rule:
    """``rewards.missing_eos``: a penalty or another score for responses that did not end.

    Raises:
        ValueError: ``eos_id`` is None; the rule's rollout has no scores, or dense rewards.
    """
    if eos_id is None:
        raise ValueError(_NEEDS)
    return _on_scores(
        functools.partial(rewards.missing_eos, eos_id=eos_id, penalty=penalty, score=score)
    )


def overlong(*, max_length: int, buffer: int, penalty: float) -> Rule:
    """``rewards.overlong_penalty``: each of the last ``buffer`` tokens before ``max_length``
    costs more than the one before, up to ``penalty``.
    """
    how: Any = {"max_length": max_length, "buffer": buffer, "penalty": penalty}
    return _on_scores(functools.partial(rewards.overlong_penalty, **how))


unrewarded = _on_scores(lambda rollout, scores: jnp.zeros_like(scores))
"""The rule of a run without a reward: scores are measured, but not learned from."""


def mask_truncated(eos_id: EosId | None) -> Rule:
    """Rows whose response did not end become missing rows."""
    if eos_id is None:
        raise ValueError("mask_truncated needs an eos_id")

    def rule(rollout: Rollout) -> Rollout:
        zeros = jnp.zeros(rollout.tokens.shape[:1])
        ended = rewards.missing_eos(rollout, zeros, eos_id, score=1.0) == 0
        return replace(rollout, response_mask=jnp.where(ended[:, None], rollout.response_mask, 0))

    return rule


def with_greedy(rollout: Rollout, *, greedy: Rollout, shape: Rule) -> Rollout:
    """The rollout with ``greedy_rewards``: the rewards, after ``shape``, of scored greedy responses
    to the same prompts.

    A row whose greedy response has no score becomes a missing row: it would have no baseline.
    """
    mask = jnp.where(greedy.present[:, None], rollout.response_mask, 0)
    return replace(rollout, response_mask=mask, greedy_rewards=row_rewards(shape(greedy)))


class Penalty(NamedTuple):
    """A penalty for the distance from a reference, in the form of ``optax``'s transformations."""

    init: float  # the first coefficient
    # (coefficient [], scored rollout) -> (rewards [B, T], the next coefficient [], metrics)
    apply: Callable[[Array, Rollout], tuple[Array, Array, Metrics]]


def _unshaped(rollout: Rollout) -> Rollout:
    """A scored rollout with its dense rewards alone if there are any; its scores are their sums."""
    return rollout if rollout.rewards is None else replace(rollout, scores=None)


def _score_at_end(coef: Array, rollout: Rollout) -> tuple[Array, Array, Metrics]:
    without_reference = replace(_unshaped(rollout), ref_log_probs=None)
    return rewards.kl_shaped(without_reference, 0.0), coef, {}


NO_PENALTY = Penalty(0.0, _score_at_end)


def kl_penalty(coef: float, *, target: float | None = None, horizon: int | None = None) -> Penalty:
    """The KL of each token from the reference, times a coefficient (``rewards.kl_shaped``).

    Args:
        target: the KL, in nats per response, to which the coefficient adapts
            (``rewards.adaptive_kl``); None: it is fixed.
        horizon: episodes over which it adapts; None: those of 10 iterations.
    """

    def apply(coef: Array, rollout: Rollout) -> tuple[Array, Array, Metrics]:
        shaped = rewards.kl_shaped(_unshaped(rollout), coef)
        assert rollout.ref_log_probs is not None, "kl_shaped checks it"
        per_token = ops.kl(rollout.log_probs, rollout.ref_log_probs)
        kl = ops.masked_mean(ops.response_sums(per_token, rollout), rollout.present)
        metrics = {"objective/kl": kl, "kl/coef": coef}
        if target is None:
            return shaped, coef, metrics
        n = rollout.tokens.shape[0]
        adapted = rewards.adaptive_kl(coef, kl, target=target, horizon=horizon or 10 * n, n=n)
        return shaped, adapted, metrics

    return Penalty(coef, apply)


# --- Groups that teach nothing


def informative(
    loop: LoopState,
    rollout: Rollout,
    key: Array,
    functions: Functions,
    *,
    algorithm: Any,
    config: Any,
    shape: Rule = unchanged,
    masked: Rule = unchanged,
) -> Array:
    """[groups] whether the algorithm learns from each group of a scored rollout: by the advantages
    that its ``prepare`` makes of the rewards without a penalty; without one, or if it leaves rows
    out, whether rewards differ. Arguments as ``learn``.
    """
    rewards, _, _ = NO_PENALTY.apply(loop.kl_coef, shape(rollout))
    counted = replace(masked(rollout), rewards=rewards)
    prepare = getattr(algorithm, "prepare", None) or _by_rewards
    own = wanted(prepare, {"state": loop.train, "key": key, "policy_fn": functions.policy_fn})
    prepared = prepare(counted, config=config, axis_name=None, **own)
    if len(prepared.tokens) < len(counted.tokens):
        prepared = _by_rewards(counted, config=config, axis_name=None)
    return informative_groups(counted, prepared, config)


def _by_rewards(rollout: Rollout, *, config: Any, axis_name: None) -> Rollout:
    return with_group_advantages(rollout, config.group_size, leave_one_out)


def refill(
    kept: Rollout, *, fresh: Rollout, wanting: Array, offered: Array, mesh: Mesh | None = None
) -> tuple[Rollout, Rollout]:
    """``kept`` whose ``wanting`` [groups] are replaced, in order, by the ``offered`` [groups] of
    ``fresh``; and the rest, ``fresh`` with the replaced groups in the places of the taken ones.
    """
    group_size = len(kept.tokens) // len(wanting)
    number = jnp.cumsum(wanting) - 1  # of the replacement
    source = jnp.argsort(~offered, stable=True)[number]
    within = jnp.tile(jnp.arange(group_size), len(source))
    rows = jnp.repeat(source * group_size, group_size) + within
    replaced = jnp.repeat(wanting & (number < jnp.sum(offered)), group_size)  # [B]

    def fill(old: Array, new: Array) -> Array:
        of_row = (1,) * (old.ndim - 1)
        return jnp.where(replaced.reshape(-1, *of_row), new[rows], old)

    def put_back(old: Array, new: Array) -> Array:
        return new.at[jnp.where(replaced, rows, len(new))].set(old, mode="drop")

    both: tuple[Rollout, Rollout]
    both = jax.tree.map(fill, kept, fresh), jax.tree.map(put_back, kept, fresh)
    if mesh is None:
        return both
    return jax.lax.with_sharding_constraint(both, sharding.rows(mesh))


# --- Learn


def learn(
    loop: LoopState,
    rollout: Rollout,
    key: Array,
    functions: Functions,
    *,
    algorithm: Algorithm,
    config: Any,
    optimizer: optax.GradientTransformation,
    shape: Rule = unchanged,
    penalty: Penalty = NO_PENALTY,
    masked: Rule = unchanged,
    mesh: Mesh | None = None,
) -> tuple[LoopState, Metrics]:
    """Shapes the rewards of a scored rollout, updates the policy, and moves the coefficient of the
    penalty.

    Args:
        shape: changes the scores before the penalty; ``rollout.scores`` stay as they were scored.
        masked: the last rule, which decides which rows the update reads.
        mesh: its "data" axis holds the rows of a minibatch.
    """
    shaped, kl_coef, metrics = penalty.apply(loop.kl_coef, shape(rollout))
    row_reward = ops.response_sums(shaped, rollout)
    metrics = metrics | {"objective/reward": ops.masked_mean(row_reward, rollout.present)}
    counted = masked(rollout)
    if counted.group_ids is None:
        groups = jnp.arange(len(counted.tokens), dtype=jnp.int32) // config.group_size
        counted = replace(counted, group_ids=groups)
    if masked is not unchanged:
        dropped = rollout.present & ~counted.present
        metrics["response/masked"] = jnp.sum(dropped).astype(jnp.float32)
    policy_fn = functions.policy_fn
    if functions.teacher is not None:
        policy_fn = functools.partial(policy_fn, teacher_params=functions.teacher)
    made = algorithm.update(
        loop.train,
        replace(counted, rewards=shaped),
        key,
        policy_fn=policy_fn,
        optimizer=optimizer,
        config=config,
        minibatch_sharding=None if mesh is None else sharding.rows(mesh),
    )
    train, update_metrics = _checked(made)
    # An update that is not finite keeps the policy; the coefficient must then not move either.
    kl_coef = jnp.where(update_metrics["nonfinite"] == 0, kl_coef, loop.kl_coef)
    return LoopState(train, kl_coef, loop.reference), metrics | update_metrics


def iterate(
    state: Any,
    prompts: Prompts,
    key: Array,
    *,
    model: models.Model,
    sampling: sampling.SamplingConfig,
    algorithm: Any,
    config: Any,
    policy_fn: Any,
    optimizer: optax.GradientTransformation,
    reward_fn: Callable[[Rollout], Scores],
    ref_fn: Any = None,
    kl_coef: Array | float | None = None,
) -> tuple[Any, Metrics]:
    """One iteration of a loop of your own, collect, score, shape, update, by the functions of a
    run. A pure function: whole runs are a ``jax.lax.scan`` of it, and many of them its
    ``jax.vmap``.

    Args:
        state: of the algorithm, such as ``TrainState``.
        prompts: the ``config.group_size`` rows of a prompt are adjacent. The caller chooses them,
            by the algorithm's ``choose`` if it has one; ``row_ids`` are their numbers.
        key: of sampling and of the update.
        config: what it leaves out is that of ``types.AlgorithmConfig``.
        policy_fn, ref_fn: a PolicyFn, and one that carries its parameters
            (``policy_fn.bind(params)``).
        kl_coef: of the KL penalty in the reward; None: the algorithm's own, or 0.

    Returns:
        The state after the update, and the metrics of ``rescored``, ``reward`` and ``learn``.

    Raises:
        ValueError: there is no ``ref_fn``, and a KL or the algorithm's ``respond`` needs one.
    """
    types.complete(config)
    sample_key, update_key = jax.random.split(key)
    coef = getattr(algorithm, "kl_coef", 0.0) if kl_coef is None else kl_coef
    has_penalty = config.kl_in_loss or not ops.is_zero(coef)
    responds = getattr(algorithm, "respond", None) is not None
    reference = None if ref_fn is None else policies.as_policy(ref_fn)
    if (has_penalty and reference is None) or (responds and not (reference and reference.bound)):
        raise ValueError(
            "ref_fn is needed, for a KL or for what samples: give ref_fn=policy_fn.bind(params); "
            "or, for no KL, kl_coef=0 and no KL in the loss"
        )
    loop = LoopState(state, ops.float32(coef))
    functions = Functions(policy_fn, reward_fn, reference)
    how = replace(sampling, record_support=sampling.truncates)
    own: Any = {"model": model, "config": how}
    if responds:
        both = (policy(loop), reference_params(loop, functions, None))
        own |= {"algorithm": algorithm, "settings": config}
        sampled = respond_by(both, prompts, sample_key, **own)
    else:
        sampled = respond(policy(loop), prompts, sample_key, **own)
    groups = jnp.arange(len(sampled.tokens), dtype=jnp.int32) // config.group_size
    sampled = replace(sampled, group_ids=groups)
    own = {"eos_ids": how.eos_ids, "keep_log_probs": responds, "extras": config.extras}
    batch, metrics = rescored(loop, sampled, functions, **own)
    batch, of_reward = reward(batch, functions)
    own = {"algorithm": algorithm, "config": config, "optimizer": optimizer}
    own["penalty"] = kl_penalty(0.0) if has_penalty else NO_PENALTY
    loop, learned = learn(loop, batch, update_key, functions, **own)
    return loop.train, metrics | of_reward | learned


def _checked(made: Any) -> tuple[TrainState, Metrics]:
    """What an update returns, if it is a state and metrics.

    Raises:
        UserError: it is not.
    """
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Mapping)):
        kinds = [type(part).__name__ for part in (made if isinstance(made, tuple) else [made])]
        raise UserError(
            f"the algorithm's update returns {', '.join(kinds)} in place of the state and a dict "
            "of metrics"
        )
    state, metrics = made
    if "nonfinite" not in metrics:
        raise UserError(
            "the algorithm's update returns no metric nonfinite, the share of its steps whose loss "
            "or gradient was not finite and which kept the state; gradient_step has it"
        )
    for name, value in metrics.items():
        if np.ndim(value):
            raise UserError(
                f"the algorithm's metric {name} has the shape {np.shape(value)}; a metric is one "
                "number, such as its mean"
            )
    return state, metrics


def _correlation(x: Array, y: Array, mask: Array) -> Array:
    """Pearson's correlation of x and y [B] over the rows of the mask; 0 if one is constant."""
    (x, mean_x), (y, mean_y) = ops.centred(x, mask), ops.centred(y, mask)
    scale_x = ops.inverse_deviation(ops.masked_mean(x * x, mask), mean_x)
    scale_y = ops.inverse_deviation(ops.masked_mean(y * y, mask), mean_y)
    return ops.masked_mean(x * y, mask) * jnp.squeeze(scale_x * scale_y)
