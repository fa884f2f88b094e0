"""What the policy algorithms share: settings, the clipped policy loss with its metrics, rewards of
rows, the passes.

Column t of every [B, T] array belongs to ``tokens[:, t]``; a row with an empty response mask counts
nowhere.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rlhf_jax import advantages as estimators
from rlhf_jax import losses, ops
from rlhf_jax.algorithms.lengths import can_cut
from rlhf_jax.algorithms.step import gradient_step, minibatch_epochs
from rlhf_jax.types import (
    AlgorithmConfig,
    AxisName,
    LossFn,
    LossMetrics,
    Max,
    Mean,
    Metrics,
    PolicyFn,
    PolicyOutput,
    Rollout,
    StepMetrics,
    TrainState,
    complete,
    known,
)

# The largest ratio that the KL term is multiplied by: a token with a larger one is an outlier.
KL_RATIO_CAP = 10.0
Ratio = Literal["token", "sequence", "product"]
State = TypeVar("State", bound=TrainState)


@dataclass(frozen=True)
class Batching(AlgorithmConfig):
    """Settings of every policy algorithm: minibatches, and how token losses become one number."""

    num_minibatches: int = 1
    """Optimizer steps of a pass, each on its share of the rollout."""
    shuffle_blocks: int = 1
    """Blocks of the global batch inside which rows are shuffled; a multiple of the data devices
    keeps rows in place.
    """
    num_microbatches: int = 1
    """Parts of a minibatch that are run one after the other to save memory; the gradient does not
    change.
    """
    aggregate: losses.Aggregation = "token"
    """How losses of tokens become one number."""
    length: int | None = None
    """Tokens a row counts as with aggregate=fixed: max_new_tokens."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    kl_loss_coef = 0.0  # no setting here: the weight of a KL term in the loss

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss reads ``rollout.ref_log_probs``."""
        return not ops.is_zero(self.kl_loss_coef)

    def mean(self, per_token: Array, mask: Array) -> Mean:
        """Losses of tokens [B, T] as one number; see ``losses.aggregate``."""
        return losses.aggregate(per_token, mask, self.aggregate, self.length)

    def __post_init__(self) -> None:
        ops.check_numbers(self, "num_epochs", "num_minibatches", "shuffle_blocks", at_least=1)
        ops.check_numbers(self, "num_microbatches", "group_size", at_least=1)
        losses.check_aggregation(self.aggregate, self.length)
        if self.length is not None and self.aggregate != "fixed":
            raise ValueError(
                f"length {self.length} is only for aggregate 'fixed', got {self.aggregate!r}"
            )


@dataclass(frozen=True)
class Config(Batching):
    """Settings of PPO, RLOO and GRPO: passes, clipping, the KL term."""

    num_epochs: int = 1
    """Passes over each rollout."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """Bound the loss of a negative advantage A by -dual_clip * A; null: no bound."""
    kl_loss_coef: float = 0.0
    """Weight of a KL term in the loss; the KL penalty in the reward is the loop's kl_coef."""
    kl_loss_estimator: ops.KLEstimator = "k2"
    """k2: the gradient of each token's KL(policy || reference); k3: that of its KL(reference ||
    policy).
    """
    surrogate: losses.Surrogate = "clip"
    """clip: PPO's loss, in which clipped tokens have no gradient; cispo: the clipped ratio is each
    token's weight; sapo: the gradient fades with the ratio; vespo: the weight of the whole row
    fades, needs ratio: product; gmpo: the geometric mean of the row's ratios, each clipped in log
    space to [-clip_low, clip_high].
    """
    ratio: Ratio = "token"
    """token: each token's own ratio; sequence: the geometric mean of the row's ratios for all its
    tokens (GSPO); product: their product.
    """
    gate: losses.Gate = "none"
    """Drop the policy loss of tokens that moved too far. tv, kl: by the total variation, or
    KL, of the token's probability (DPPO); drift: of whole rows with a negative advantage.
    """
    gate_limit: float = 0.15
    """How far is too far for the gate. Usual are 0.15 with tv, 0.05 nats with kl, and 0.5 nats, the
    mean over the row, with drift."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ops.check_numbers(self, "clip_low", "clip_high", at_least=0)
        ops.check_numbers(self, "dual_clip", above=1)
        ops.check_choice("surrogate", self.surrogate, losses.Surrogate)
        ops.check_choice("ratio", self.ratio, Ratio)
        ops.check_choice("kl_loss_estimator", self.kl_loss_estimator, ops.KLEstimator)
        ops.check_choice("gate", self.gate, losses.Gate)
        ops.check_numbers(self, "gate_limit", at_least=0)
        if self.dual_clip is not None and self.surrogate != "clip":
            raise ValueError(
                f"dual_clip: only for the surrogate 'clip', not {self.surrogate!r}; use null"
            )
        if self.surrogate == "vespo" and self.ratio != "product":
            raise ValueError(
                f"ratio: the surrogate 'vespo' weighs whole rows, by 'product', not {self.ratio!r}"
            )
        if self.surrogate == "gmpo" and self.ratio != "token":
            raise ValueError(f"ratio: 'gmpo' clips each 'token' itself, not {self.ratio!r}")
        if self.kl_loss_estimator == "k1":
            raise ValueError(
                "kl_loss_estimator 'k1' has expected gradient 0: use it in the reward, or 'k2' or "
                "'k3' here"
            )


def field(rollout: Rollout, name: str, hint: str = "", ndim: int = 2) -> Array:
    """``rollout.NAME`` [B, T], or [B] with ``ndim`` 1; ValueError with the hint if it is None,
    AssertionError if it has another shape.
    """
    value = getattr(rollout, name)
    if value is None:
        raise ValueError(f"rollout.{name} is needed, got None: {hint}")
    chex.assert_shape(value, rollout.tokens.shape[:ndim])
    return value


def row_rewards(rollout: Rollout) -> Array:
    """The reward of each row [B]: the sum of ``rewards`` over its response where they are given,
    else ``scores``.
    """
    if rollout.rewards is None:
        hint = "call a reward function, or give rewards [B, T]"
        return ops.float32(field(rollout, "scores", hint, ndim=1))
    rewards = field(rollout, "rewards")
    return jnp.sum(ops.masked(rewards, rollout.mask), axis=1)


class ReadsOutcomes:
    """Of a Config whose algorithm reads scores by ``outcomes``."""

    score_range = (0.0, 1.0)


def outcomes(rollout: Rollout) -> Array:
    """[B] the scores, before penalties; NaN outside [0, 1], so that the step reports
    ``nonfinite``: they are no rates of success.
    """
    scores = field(rollout, "scores", "call a reward function", ndim=1)
    is_rate = (scores >= 0) & (scores <= 1) | ~rollout.present
    return jnp.where(is_rate, scores, jnp.nan)


def check(rollout: Rollout, config: Any) -> None:
    """Raises ValueError for a rollout that an update would misread, where values are known:
    responses on prompts or pads, or groups that are none."""
    names = ("tokens", "attention_mask", "response_mask", "group_ids")
    tokens, real, mask, ids = (known(getattr(rollout, name)) for name in names)
    if tokens is None or real is None or mask is None:
        return
    said, present = mask != 0, mask.any(axis=1)
    length = rollout.prompt_length
    is_prompt = np.arange(mask.shape[1]) < (np.argmax(said.any(0)) if length is None else length)
    outside = np.any(said & (is_prompt | (real == 0)), axis=1)
    faults = {"response_mask covers its prompt or pads: mark the policy's own tokens": outside}
    size = config.group_size
    if size > 1 and len(tokens) % size == 0:
        group = np.arange(len(tokens)) // size
        first = group * size + present.reshape(-1, size).argmax(axis=1)[group]
        prompts = np.where(real != 0, tokens, -1)[:, is_prompt]
        is_other = np.any(prompts != prompts[first], axis=1) & present
        faults[f"its prompt is not that of its group (group_size {size}): sort the rows"] = is_other
        if ids is not None:
            is_apart = (ids[:, None] == ids) != (group[:, None] == group)
            contradicts = f"group_size {size} contradicts group_ids: sort the rows, or change it"
            faults[contradicts] = np.any(is_apart & np.outer(present, present), axis=1)
    for fault, rows in faults.items():
        if rows.any():
            raise ValueError(f"rollout, row {np.argmax(rows)}: {fault}")


def check_unprepared(rollout: Rollout) -> None:
    """Raises ValueError if the rollout has advantages, which the algorithm computes itself."""
    if rollout.advantages is not None:
        raise ValueError(
            "rollout.advantages is given, but this algorithm computes them from rewards or scores: "
            "use replace(rollout, advantages=None). A loss on advantages of your own is "
            "minibatch_epochs of gradient_step(loss), which take a prepared rollout, or vpg.update"
        )


def spread(row_advantages: Array, rollout: Rollout) -> Rollout:
    """The rollout with one advantage [B] for all response tokens of a row: ``advantages`` [B, T], 0
    elsewhere.
    """
    advantages = jnp.where(rollout.mask, row_advantages[:, None], 0.0)
    return replace(rollout, advantages=advantages)


def rewards_to_go(rollout: Rollout) -> tuple[Array, Array]:
    """Of dense rewards: the sum from each token of a response on, by its place in the response, so
    that the first column [B, T] is that of all responses' first tokens; behind the end of a
    response its last reward stays. And the place [B, T] of the token in each column.
    """
    mask = rollout.mask
    to_go = estimators.discounted_returns(field(rollout, "rewards"), mask)
    place = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    columns = jnp.argsort(~mask, axis=1, stable=True)  # of the response's tokens, in their order
    lengths = jnp.sum(mask, axis=1, keepdims=True)
    taken = jnp.minimum(jnp.arange(mask.shape[1])[None, :], jnp.maximum(lengths - 1, 0))
    columns = jnp.take_along_axis(columns, taken, axis=1)
    return jnp.take_along_axis(to_go, columns, axis=1), place


def with_group_advantages(
    rollout: Rollout, group_size: int, estimate: Callable[..., Array]
) -> Rollout:
    """The rollout with one advantage for all response tokens of a row, ``advantages`` [B, T], 0
    elsewhere.

    Dense rewards (``rollout.dense``) keep their places: the estimate is made at each place of the
    responses, of the rewards from there on. What is subtracted at a token is then made of other
    rows, or of a row's mean with them, as without dense rewards; a reward that stands at the last
    token alone gives the advantages of a score.

    Args:
      rollout: rows of one prompt are adjacent: rows ``i * group_size`` to ``(i + 1) * group_size -
        1`` are group i.
      estimate: ``estimate(row rewards [N, G], mask=present [N, G]) -> advantages [N, G]``.
    """
    check_unprepared(rollout)
    num_rows = len(rollout.tokens)
    if num_rows % group_size:
        raise ValueError(
            f"{num_rows} rows (on each device, under shard_map) do not divide by "
            f"group_size={group_size}"
        )
    present = rollout.present.reshape(-1, group_size)
    if not rollout.dense:
        scores = row_rewards(rollout).reshape(-1, group_size)
        return spread(estimate(scores, mask=present).reshape(num_rows), rollout)
    to_go, place = rewards_to_go(rollout)
    groups = to_go.reshape(-1, group_size, to_go.shape[1])
    by_place = jax.vmap(lambda scores: estimate(scores, mask=present), in_axes=2, out_axes=2)
    estimated = by_place(groups).reshape(to_go.shape)
    at_tokens = jnp.take_along_axis(estimated, place, axis=1)
    return replace(rollout, advantages=ops.masked(at_tokens, rollout.mask))


def with_entropy(
    policy_loss: Array, output: PolicyOutput, rollout: Rollout, config: Batching
) -> tuple[Array, LossMetrics]:
    """Token losses [B, T] of a policy times ``rollout.importance_weights``, if there are any, minus
    ``entropy_coef`` * entropy.

    Only the policy loss has these weights, since only it depends on how often each token was drawn.

    Returns:
      The losses, and the metrics ``policy/loss``, ``objective/entropy`` (nats per row) and, with
      importance weights, ``policy/importance_weight_mean`` over response tokens.
    """
    mask = rollout.mask
    metrics: LossMetrics = {"objective/entropy": losses.aggregate(output.entropy, mask, "sum")}
    if rollout.importance_weights is not None:
        weights = ops.frozen(field(rollout, "importance_weights"))
        policy_loss = weights * policy_loss
        metrics["policy/importance_weight_mean"] = losses.aggregate(weights, mask)
    metrics["policy/loss"] = config.mean(policy_loss, mask)
    if ops.is_zero(config.entropy_coef):
        return policy_loss, metrics
    return policy_loss - config.entropy_coef * output.entropy, metrics


def loss(output: PolicyOutput, rollout: Rollout, config: Config) -> tuple[Mean, LossMetrics]:
    """Clipped policy loss - ``entropy_coef`` * entropy + ``kl_loss_coef`` * KL term of a rollout
    with advantages.

    One sum per token, aggregated once. See ``with_entropy`` for ``rollout.importance_weights``.

    With ``config.ratio = "sequence"`` every token of row i has the ratio of GSPO (Zheng et al.
    2025, arXiv 2507.18071, eq. 7), ``s_i = exp(mean over the response of log_probs -
    old_log_probs)``; with ``aggregate = "sequence"`` the loss is that of eq. 5, and with ``"sum"``
    that of LUSPO, in which a row counts as often as it has tokens ("Length-Unbiased Sequence Policy
    Optimization", 2026, arXiv 2602.05261). With ``"product"`` it is the exponential of the sum.

    Args:
      output: the policy's forward pass on ``rollout``.

    Returns:
      The loss and the metrics of ``with_entropy``, ``policy/clip_fraction`` (see
      ``losses.surrogate``),
      ``policy/approx_kl`` (half the mean squared log-ratio of tokens, Schulman 2020),
      ``policy/ratio_max``, with a gate ``policy/gated_fraction`` (tokens whose policy loss it
      drops, ``losses.gated``) and, with a KL term, ``policy/kl_loss`` and
      ``policy/kl_capped_fraction`` (tokens whose ratio is above ``KL_RATIO_CAP``).
    """
    mask = rollout.mask  # [B, T]
    # Masked columns are 0 in all arrays, so that neither a loss nor a gradient depends on them.
    old_log_probs = ops.masked(field(rollout, "log_probs"), mask)
    log_probs = ops.masked(output.log_probs, mask)
    advantages = ops.masked(field(rollout, "advantages", "call prepare first"), mask)
    of_token = log_probs - old_log_probs
    log_ratio = of_token
    if config.ratio == "sequence":
        log_ratio = jnp.where(mask, ops.masked_mean(of_token, mask, axis=1, keepdims=True), 0.0)
    elif config.ratio == "product":
        log_ratio = jnp.where(mask, jnp.sum(of_token, axis=1, keepdims=True), 0.0)
    ratio = jax.lax.stop_gradient(ops.bounded_exp(log_ratio))
    per_token, is_clipped = losses.surrogate(
        config.surrogate,
        log_probs,
        advantages,
        log_ratio=log_ratio,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        mask=mask,
    )
    of_gate: LossMetrics = {}
    if config.gate != "none":
        moved = (log_probs, old_log_probs, advantages, mask)
        is_gated = losses.gated(config.gate, *moved, config.gate_limit)
        per_token = jnp.where(is_gated, 0.0, per_token)
        of_gate["policy/gated_fraction"] = losses.aggregate(is_gated, mask)
    per_token, metrics = with_entropy(per_token, output, rollout, config)
    metrics |= of_gate | {
        "policy/clip_fraction": losses.aggregate(is_clipped, mask),
        "policy/approx_kl": losses.aggregate(0.5 * jnp.square(of_token), mask),
        "policy/ratio_max": Max(jnp.max(ops.masked(ratio, mask))),
    }
    if config.kl_in_loss:
        kl = _kl_term(log_probs, ratio, rollout, config.kl_loss_estimator)
        per_token = per_token + config.kl_loss_coef * kl
        metrics["policy/kl_loss"] = config.mean(kl, mask)
        metrics["policy/kl_capped_fraction"] = losses.aggregate(ratio > KL_RATIO_CAP, mask)
    return config.mean(per_token, mask), metrics


def _kl_term(log_probs: Array, ratio: Array, rollout: Rollout, estimator: ops.KLEstimator) -> Array:
    """The KL term [B, T] of the policy's own tokens; ``ratio`` is that of the surrogate."""
    hint = "give rollout.collect a ref_fn, or set kl_loss_coef=0"
    ref_log_probs = ops.masked(field(rollout, "ref_log_probs", hint), rollout.mask)
    # The tokens are the behaviour policy's: after the first step, the ratio reweighs them to the
    # policy's own. With a ratio of rows (GSPO, VESPO) it is that of the row, as in the policy loss:
    # a row then counts as much in one term as in the other. Its product is the weight of the whole
    # response; its geometric mean is no importance weight of a token.
    weight = jnp.minimum(ratio, KL_RATIO_CAP)
    return weight * ops.kl(log_probs, ref_log_probs, estimator)


def extra(rollout: Rollout, name: str) -> Array:
    """``rollout.extras[name]``, [B] or [B, T]; ValueError if it is missing."""
    given = rollout.extras or {}
    if name not in given:
        raise ValueError(
            f"rollout.extras[{name!r}] is needed, there are {', '.join(given) or 'none'}"
        )
    return ops.float32(given[name])


def wanted(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """What is offered under the name of a parameter of the function."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in offered.items() if name in parameters}


def informative_groups(rollout: Rollout, prepared: Rollout, config: Any) -> Array:
    """[groups] of a rollout: whether a present row has an advantage other than 0 when it is
    prepared, with other rows behind them or none. Where there are no advantages, or a teacher
    teaches too, whether a row is present.
    """
    teaches = prepared.mask
    if prepared.advantages is not None and not config.needs_teacher:
        teaches &= prepared.advantages.reshape(len(teaches), -1) != 0  # NaN too
    of_rows = jnp.any(teaches, axis=1)[: len(rollout.tokens)]
    return jnp.any(of_rows.reshape(-1, config.group_size), axis=1)


def updater(
    prepare: Callable[..., Rollout],
    loss: LossFn,
    rollout_metrics: Callable[..., Metrics] = lambda prepared, config, axis_name: {},
    *,
    advance: Callable[..., Any] | None = None,
    differentiable: bool = False,
) -> Callable[..., tuple[Any, Metrics]]:
    """The ``update`` of an algorithm, see ``types.Algorithm``: its ``prepare`` once, then
    ``num_epochs`` passes of ``num_minibatches`` optimizer steps on its ``loss``.

    Its metrics are those of ``loss`` with ``loss``, ``grad_norm`` and ``nonfinite``, averaged over
    the steps (``ratio_max``, ``nonfinite``: the maximum), ``rollout_metrics`` and, if advantages
    are all that it learns from and ``prepare`` keeps all groups, ``reward/equal_share`` of
    ``informative_groups``. Its config is a ``Batching``, or any frozen dataclass; what it leaves
    out is that of ``types.AlgorithmConfig``. A rollout that it would misread is a ValueError, see
    ``check``; so are reference log-probs that functions of this package do not read.

    Args:
      prepare, loss: as in ``types.Algorithm``.
      rollout_metrics: ``(prepared rollout, config, axis_name) -> metrics``.
      advance: ``(state, prepared rollout, *, config, axis_name) -> state``, of an algorithm with a
        ``State`` of its own: changes what is its own in it after the passes. A step that is not
        finite keeps the old values.
      differentiable: gradients flow through the whole update: advantages, returns, old values and
        importance weights are otherwise constants. A loss with weights that stay constants, a
        surrogate with weights or a KL term, is a ValueError then.
    """
    # What others write may read the reference's log-probs; ours do in a KL term alone.
    is_ours = all(getattr(f, "__module__", "").startswith("rlhf_jax.") for f in (prepare, loss))

    def update_policy(
        state: State,
        rollout: Rollout,
        key: Array,
        *,
        policy_fn: PolicyFn,
        optimizer: optax.GradientTransformation,
        config: Any,
        axis_name: AxisName = None,
        minibatch_sharding: Any = None,
    ) -> tuple[State, Metrics]:
        """``prepare``, then ``num_epochs`` passes of ``num_minibatches`` optimizer steps on
        ``loss``; see ``policy.updater``."""
        complete(config)
        check(rollout, config)
        is_unread = rollout.ref_log_probs is not None and rollout.rewards is None
        if is_unread and is_ours and isinstance(config, Config) and not config.kl_in_loss:
            raise ValueError(
                "rollout.ref_log_probs are given, and no KL is learned from: set kl_loss_coef, or "
                "give rewards=rewards.kl_shaped(rollout, kl_coef); or ref_log_probs=None"
            )
        own_key = jax.random.fold_in(key, 2 * config.num_epochs)  # behind those of the passes
        own = wanted(prepare, {"state": state, "key": own_key, "policy_fn": policy_fn})
        prepared = prepare(rollout, config=config, axis_name=axis_name, **own)
        bound: LossFn = partial(loss, policy_fn=policy_fn, config=config)
        if differentiable:
            if getattr(config, "surrogate", "clip") in ("cispo", "vespo") or config.kl_in_loss:
                raise ValueError(
                    "differentiable: cispo, vespo and a KL term in the loss have weights that are "
                    "constants by their definition; use another surrogate and kl_loss_coef 0"
                )
            bound = ops.differentiable(bound)
        kept_together = config.group_size if config.whole_groups else rollout.group_size
        # A minibatch has whole groups where these divide, whether or not they share their prompts:
        # how a rollout is computed must not decide which rows meet.
        num_rows = len(prepared.tokens) * ops.psum(1, axis_name)
        parts = config.shuffle_blocks * config.num_minibatches
        divides = num_rows % (parts * config.group_size) == 0

        def step(state: State, minibatch: Rollout, key: Array) -> tuple[State, StepMetrics]:
            return gradient_step(
                bound,
                state,
                optimizer,
                batch=minibatch,
                key=key,
                num_microbatches=config.num_microbatches,
                by_length=can_cut(minibatch),
                axis_name=axis_name,
                minibatch_sharding=minibatch_sharding,
                group_size=kept_together,
            )

        state, metrics = minibatch_epochs(
            step,
            state,
            prepared,
            key,
            num_epochs=config.num_epochs,
            num_minibatches=config.num_minibatches,
            shuffle_blocks=config.shuffle_blocks,
            axis_name=axis_name,
            minibatch_sharding=minibatch_sharding,
            group_size=config.group_size if divides else kept_together,
        )
        if advance is not None:
            advanced = advance(state, prepared, config=config, axis_name=axis_name)
            state = jax.tree.map(partial(jnp.where, metrics["nonfinite"] == 0), advanced, state)
        is_whole = len(prepared.tokens) >= len(rollout.tokens)
        is_whole &= len(rollout.tokens) % config.group_size == 0
        if prepared.advantages is not None and is_whole and not config.needs_teacher:
            equal = ~informative_groups(rollout, prepared, config)
            share = ops.masked_mean(equal, jnp.ones_like(equal), axis_name=axis_name)
            metrics["reward/equal_share"] = share
        return state, {**metrics, **rollout_metrics(prepared, config, axis_name)}

    return update_policy


def __getattr__(name: str) -> NoReturn:
    instead = "; it was removed: policy.loss reads Config.ratio" if name == "of_rows" else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{instead}")
