"""Rewards in ordinary Python: each process scores its own rows on the host, then the filter of
responses.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import iteration
from rlhf_jax.data import batches
from rlhf_jax.errors import TrainingFault, logger
from rlhf_jax.graders import spec
from rlhf_jax.rewards.host import Unscored, row_scores, with_scores
from rlhf_jax.runs import processes
from rlhf_jax.training.common.layout import Layout
from rlhf_jax.training.rl.inputs import Guarded
from rlhf_jax.training.rl.schedule import Batch
from rlhf_jax.training.rl.score import Scored
from rlhf_jax.types import Metrics, Rollout

MOST_REASONS = 20  # why responses have no score, of those that are printed


def score_on_host(
    layout: Layout,
    reward: spec.Reward,
    guard: Guarded | None,
    rollout: Rollout,
    batch: Batch,
    told: set[str],
) -> Scored:
    """Each process scores and filters its own rows; all get the scores and verdicts of all.

    Args:
        told: reasons that were printed; gets those that are new.

    Raises:
        TrainingFault: a score is not finite.
    """
    host_reward = spec.as_host(reward)
    before: Any = processes.fetch(rollout)
    own_rollout: Any = processes.own_rows(before)
    own_columns = batches.columns_at(batch.prompts, processes.own_rows(batch.rows))
    try:
        own = processes.agree(lambda: row_scores(host_reward, own_rollout, own_columns))
        # Each as often as it had no score.
        own_parts = [part for x in own.scores if isinstance(x, Unscored) for part in x.parts]
        said = processes.gather(lambda: (own.reasons(), own_parts, [*own.dense.items()]))
        reasons, parts, kinds = ([*itertools.chain(*of)] for of in zip(*said, strict=True))
        # All have the components of all; what is at tokens in one process is so in all.
        own = own._replace(dense=dict(sorted(kinds, key=lambda kind: kind[1])))
        after: Any
        after, components = processes.gather_rows(with_scores(own_rollout, own))
        unscored = np.sum(before.present) - np.sum(after.present)
        say_reasons(reasons, told)
        guard_metrics: Metrics = {}
        verdicts = None
        if guard is not None:
            after, guard_metrics, verdicts = guard(before, scored=after, columns=own_columns)
    except FloatingPointError as error:
        raise TrainingFault(str(error)) from error
    if not np.array_equal(after.row_ids, before.row_ids):
        raise TrainingFault("the scores of the processes are not in the order of their rows")
    scores, components = jax.tree.map(jnp.asarray, (after.scores, components))
    has_score = {
        name: ~jnp.any(jnp.isnan(values).reshape(len(values), -1), axis=1)
        for name, values in components.items()
    }
    scored, metrics = iteration.scored(after, scores, components, has_score)
    metrics["reward/unscored"] = jnp.float32(unscored)
    for name, is_own in has_score.items():
        number = jnp.sum(is_own & scored.present)
        metrics[f"reward/rows/{name}"] = number.astype(jnp.float32)
    if len(reward.weights) > 1:
        for name in (name for name, weight in reward.weights.items() if weight):
            metrics[f"reward/unscored/{name}"] = jnp.float32(parts.count(name))
    metrics |= guard_metrics
    if reward.take_unparsed is not None:
        counts = processes.gather(reward.take_unparsed)
        metrics["reward/unparsed"] = jnp.float32(sum(counts))
    return Scored(layout.shard(jax.device_get(scored)), metrics, verdicts, reasons)


def say_reasons(reasons: Sequence[str | None], told: set[str]) -> None:
    """Prints why responses have no score, each reason once; ``told`` gets those that were new."""
    for reason in dict.fromkeys(reasons):
        if reason is not None and reason not in told and len(told) < MOST_REASONS:
            count = reasons.count(reason)
            number = len(reasons)
            logger.info(f"reward: no score for {count} of {number} responses: {reason} (said once)")
            told.add(reason)
