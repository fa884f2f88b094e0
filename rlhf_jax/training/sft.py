"""Supervised fine-tuning as a run: demonstrations in, a language model with its tokenizer out."""

import functools
from typing import Any

import jax

from rlhf_jax import models
from rlhf_jax.algorithms import sft
from rlhf_jax.config import RunConfig
from rlhf_jax.data import encoding
from rlhf_jax.training import supervised
from rlhf_jax.training.stage import RunResult
from rlhf_jax.types import Demonstrations, Parts, TrainState


def run(config: RunConfig) -> RunResult:
    """Trains on the demonstrations of ``config.sft.data`` or ``config.data`` and saves ``model/`` in the run folder.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the settings.
    """
    return supervised.run(
        config,
        config.sft,
        "sft",
        kind="demonstrations",
        encode=encoding.encode_demonstrations,
        show=("sft/loss", "validation/loss", "grad_norm"),
        make_task=_task,
    )


def _task(setting: supervised.Setting) -> supervised.Task:
    stage, start = setting.stage, setting.start()
    policy_fn = start.bind(models.policy_fn(setting.initial.model))
    update = functools.partial(sft.update, optimizer=setting.optimizer, config=stage.config.sft)

    @jax.jit
    def metrics_of(state: TrainState, batch: Demonstrations, policy_fn: Any) -> Parts:
        return sft.loss(state.params, batch, None, policy_fn=policy_fn, config=sft.Config())[1]

    return supervised.Task(
        start,
        lambda: TrainState.create(start.params, setting.optimizer),
        functools.partial(stage.jit_update(update), policy_fn=policy_fn),
        lambda state: setting.mean_metrics(state, functools.partial(metrics_of, policy_fn=policy_fn)),
    )
