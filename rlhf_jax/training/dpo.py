"""Direct preference optimisation as a run: preference pairs and a policy in, a better policy out, without sampling."""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from rlhf_jax import models
from rlhf_jax.algorithms import dpo
from rlhf_jax.config import RunConfig
from rlhf_jax.data import encoding
from rlhf_jax.data.rows import Pair
from rlhf_jax.errors import UserError
from rlhf_jax.training import supervised
from rlhf_jax.training.stage import RunResult
from rlhf_jax.types import Comparisons, Metrics, Parts, TrainState


def run(config: RunConfig) -> RunResult:
    """Trains the policy in ``config.model``, which is the reference too, on the pairs of ``config.dpo.data`` or
    ``config.data``, and saves ``model/`` in the run folder. A ranking is trained on as its pairs.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the settings.
    """
    return supervised.run(
        config,
        config.dpo,
        "dpo",
        kind="comparisons",
        encode=_encode,
        show=("dpo/loss", "dpo/accuracy", "dpo/margin", "validation/loss", "validation/accuracy"),
        make_task=_task,
    )


def _encode(rows: Sequence[Any], *args: Any, **options: Any) -> encoding.EncodedComparisons:
    for row in rows:
        if not isinstance(row, Pair):
            raise UserError(f"{row.source}: DPO takes pairs and rankings, and this row has another label")
    return encoding.encode_comparisons(rows, *args, **options)


def _task(setting: supervised.Setting) -> supervised.Task:
    stage, settings, start = setting.stage, setting.stage.config.dpo, setting.start()
    model_fn = models.policy_fn(setting.initial.model)
    functions = {"policy_fn": start.bind(model_fn), "ref_fn": stage.reference(start, model_fn)}

    def update(
        state: TrainState, batch: Comparisons, key: jax.Array, *, policy_fn: Any, ref_fn: Any
    ) -> tuple[TrainState, Metrics]:
        batch = dpo.with_reference(batch, ref_fn)
        return dpo.update(state, batch, key, policy_fn=policy_fn, optimizer=setting.optimizer, config=settings)

    @jax.jit
    def metrics_of(state: TrainState, batch: Comparisons, *, policy_fn: Any, ref_fn: Any) -> Parts:
        batch = dpo.with_reference(batch, ref_fn)
        return dpo.loss(state.params, batch, None, policy_fn=policy_fn, config=settings)[1]

    return supervised.Task(
        start,
        lambda: TrainState.create(start.params, setting.optimizer),
        functools.partial(stage.jit_update(update), **functions),
        lambda state: setting.mean_metrics(state, functools.partial(metrics_of, **functions)),
        functions["ref_fn"],
    )
