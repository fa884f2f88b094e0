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
    """Each process scores its own rows. Every process filters all rows, so that all agree which
    rows are missing.

    Args:
        told: reasons that were printed; gets those that are new.

    Raises:
        TrainingFault: a score is not finite.
    """
    host_reward = spec.as_host(reward)
    before: Any = processes.fetch(rollout)
    own_rollout: Any = processes.own_rows(before)
    own_columns = batches.columns_at(batch.prompts, processes.own_rows(batch.rows))
    own_reasons: list[str | None] = []
    own_parts: list[str] = []  # each as often as it had no score

    def score_own() -> tuple[Rollout, dict[str, np.ndarray]]:
        said = row_scores(host_reward, own_rollout, own_columns)
        own_reasons.extend(said.reasons())
        for score in said.scores:
            own_parts.extend(score.parts if isinstance(score, Unscored) else ())
        return with_scores(own_rollout, said)

    try:
        after: Any
        after, components = processes.gather_rows(processes.agree(score_own))
        unscored = np.sum(before.present) - np.sum(after.present)
        of_processes = processes.gather(lambda: (own_reasons, own_parts))
        reasons, parts = (list(itertools.chain(*told)) for told in zip(*of_processes, strict=True))
        say_reasons(reasons, told)
        guard_metrics: Metrics = {}
        verdicts = None
        if guard is not None:
            columns = batches.columns_at(batch.prompts, batch.rows)
            after, guard_metrics, verdicts = guard(before, scored=after, columns=columns)
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
