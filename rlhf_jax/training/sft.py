"""Supervised fine-tuning as a run: demonstrations in, a language model with its tokenizer out."""

import functools
import operator
from typing import Any

import jax

from rlhf_jax import models
from rlhf_jax.algorithms import sft
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches, encoding
from rlhf_jax.training import supervised
from rlhf_jax.training.initial import trainable
from rlhf_jax.training.loop import Validation
from rlhf_jax.training.stage import RunResult
from rlhf_jax.types import Mean, TrainState


def run(config: RunConfig) -> RunResult:
    """Trains on the demonstrations of ``config.sft.data`` or ``config.data`` and saves ``model/`` in the run folder.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the settings.
    """
    return supervised.run(config, config.sft, KIND)


def _task(setting: supervised.Setting) -> supervised.Task:
    stage, settings = setting.stage, setting.stage.config.sft
    key = jax.random.fold_in(stage.key("init"), 1)
    start = stage.place(trainable(stage.config.lora, setting.initial.params, key))
    policy_fn = start.bind(models.policy_fn(setting.initial.model))
    update = stage.jit_update(functools.partial(sft.update, optimizer=setting.optimizer, config=settings))

    @jax.jit
    def loss(state: TrainState, batch: Any, policy_fn: Any) -> Mean:
        return sft.loss(state.params, batch, None, policy_fn=policy_fn, config=sft.Config())[0]

    def validate(state: TrainState) -> Validation:
        parts = [loss(state, batch, policy_fn) for batch in setting.held_out_batches(settings.batch_size)]
        return Validation({"validation/loss": float(functools.reduce(operator.add, parts).value)})

    return supervised.Task(
        start,
        TrainState.create(start.params, setting.optimizer),
        functools.partial(update, policy_fn=policy_fn),
        validate,
        held={"frozen weights": start.base},
    )


KIND = supervised.Kind(
    name="sft",
    rows="demonstrations",
    encode=encoding.encode_demonstrations,
    batch=batches.demonstration_batch,
    show=("sft/loss", "validation/loss", "grad_norm"),
    sources=lambda encoded: encoded.sources,
    task=_task,
    split_sources=True,
)
