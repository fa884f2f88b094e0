"""Ensembles of reward models: members that train at once, each on its own draw of the rows, and
their folders.

Every leaf of an ensemble's TrainState has a leading axis [M], one entry for each member. All
members see the same batches, and a bootstrap is a weight of each row: one compiled program trains
them all. The folder of an ensemble holds member_0, member_1, ..., each a complete model's folder.
"""

import operator
from collections.abc import Sequence
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.random import fold_in

from rlhf_jax.algorithms import reward_model
from rlhf_jax.data.encoding import EncodedTexts
from rlhf_jax.parallel import blocks
from rlhf_jax.training.supervised.job import Job
from rlhf_jax.types import Comparisons, Metrics, Params, PolicyFn, ScoreFn, TrainState


def create(members: Sequence[Params], optimizer: optax.GradientTransformation) -> TrainState:
    """The state in which members with the given parameters start; every leaf is [M, ...]."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    return jax.vmap(lambda params: TrainState.create(params, optimizer))(stacked)


def members(params: Params) -> dict[str, Params]:
    """The members' own parameters, by the names of their folders."""
    numbers = range(len(jax.tree.leaves(params)[0]))
    return {f"member_{i}": jax.tree.map(operator.itemgetter(i), params) for i in numbers}


def update_members(
    state: TrainState,
    batch: Comparisons,
    key: Array,
    *,
    score_fn: ScoreFn,
    optimizer: optax.GradientTransformation,
    config: reward_model.Config,
    policy_fn: PolicyFn | None = None,
) -> tuple[TrainState, Metrics]:
    """``reward_model.update`` of every member on the same batch, member i with its weights and
    ``fold_in(key, i)``.

    Args:
      state: of ``create``.
      batch: [B, K, T] with weight [B, M], or packed with weight [B, C, M]. A row of weight 0 is
          missing for that member.
      score_fn, optimizer, config, policy_fn: as of ``reward_model.update``.

    Returns:
      The state and the members' mean metrics; ``nonfinite`` is their maximum. A member whose loss
      or gradient is not finite keeps its state; the other members are updated.
    """
    num_members = state.step.shape[0]
    weights = jnp.asarray(batch.weight)
    chex.assert_shape(weights, (len(batch.tokens), ..., num_members))

    def of_member(member: tuple[TrainState, Array, Array]) -> tuple[TrainState, Metrics]:
        state, weight, number = member
        own = replace(batch, weight=weight)
        member_key = fold_in(key, number)
        return reward_model.update(
            state,
            own,
            member_key,
            score_fn=score_fn,
            policy_fn=policy_fn,
            optimizer=optimizer,
            config=config,
        )

    members = (state, jnp.moveaxis(weights, -1, 0), jnp.arange(num_members))
    if blocks.number():
        # One after the other: XLA would compute a division by a number of each member, as the
        # optimizer makes them, in one way on one device and in another on several.
        state, metrics = jax.lax.map(of_member, members)
    else:
        state, metrics = jax.vmap(of_member)(members)
    return state, jax.tree.map(jnp.mean, metrics) | {"nonfinite": jnp.max(metrics["nonfinite"])}


def draw(job: Job) -> Job:
    """The job with a weight of each row for each member, [N, M]: the row's own times how often the
    member draws it (``bootstrap``); 0 for rows that are held out.
    """
    key = fold_in(job.run.key("data"), 2)  # 0 and 1 are the split's and the order's
    counts = bootstrap(key, job.num_members, len(job.train_rows))
    return replace(job, encoded=weigh(job.encoded, job.train_rows, counts))


def bootstrap(key: Array, num_members: int, num_rows: int) -> np.ndarray:
    """[N, M] int64: how often each member draws each of N rows in N draws with replacement (Efron
    1979).

    A member's draws do not depend on how many members there are.
    """
    counts = []
    for member in range(num_members):
        member_key = fold_in(key, member)
        drawn = jax.random.randint(member_key, (num_rows,), 0, num_rows)
        counts.append(np.bincount(np.asarray(drawn), minlength=num_rows))
    return np.stack(counts, axis=1)


def weigh(comparisons: EncodedTexts, rows: np.ndarray, counts: np.ndarray) -> EncodedTexts:
    """Comparisons with weights [N, M]: a row's own weight times the counts of its members.

    rows: [R] row numbers; counts: [R, M], as of ``bootstrap``. All other rows weigh 0.
    """
    weight = np.zeros((len(comparisons), counts.shape[1]), np.float32)
    weight[rows] = counts
    return replace(comparisons, weight=weight * comparisons.weight[:, None])
