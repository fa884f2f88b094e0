"""Supervised fine-tuning as a run: demonstrations in, a language model with its tokenizer out."""

import functools

import jax
import numpy as np

from rlhf_jax import models
from rlhf_jax.algorithms import sft
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches, encoding
from rlhf_jax.data import rows as data_rows
from rlhf_jax.training import adapters, checks, inputs, loop, setup
from rlhf_jax.training.loop import Validation
from rlhf_jax.training.stage import RunResult, open_stage, start
from rlhf_jax.types import Metrics, TrainState


def run(config: RunConfig) -> RunResult:
    """Trains on the demonstrations of ``config.sft.data`` or ``config.data`` and saves ``model/`` in the run folder.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the settings.
    """
    settings = config.sft
    checks.supervised("sft", settings, start(config))
    demonstrations = inputs.read(
        "demonstrations", settings.data, config.data, config.seed, setup.tokenizer_source(config)
    )
    with open_stage(config, "sft", demonstrations.fingerprints) as stage:
        model, params, tokenizer = setup.language_model(config, data_rows.texts(demonstrations.rows), stage.key("init"))
        encoded = encoding.encode_demonstrations(
            demonstrations.rows,
            tokenizer,
            template=config.text.template,
            max_length=model.config.max_length,
            too_long=config.text.too_long,
        )
        stage.say_counts(encoded.counts)
        split_key, order_key = jax.random.split(stage.key("data"))
        train_rows, held_out = batches.split(len(encoded), settings.validation_fraction, split_key)
        plan = batches.Plan(encoded.lengths[train_rows], settings.batch_size, order_key, config.text.bucket_multiple)
        num_steps = settings.num_epochs * plan.steps_per_epoch
        optimizer = setup.make_optimizer(settings.optimizer, num_steps)
        trainable = stage.trainable(adapters.choose(config, params, jax.random.fold_in(stage.key("init"), 1)))
        policy_fn = trainable.bind(models.policy_fn(model))

        def batch_of(rows: np.ndarray) -> sft.Demonstrations:
            return stage.shard(batches.demonstration_batch(encoded, rows, config.text.bucket_multiple))

        update = stage.jit_update(functools.partial(sft.update, optimizer=optimizer, config=settings))
        loss = jax.jit(functools.partial(sft.loss, key=None, config=sft.Config()))
        update_key = stage.key("update")

        def rows_of(step: int) -> np.ndarray:
            return loop.select(train_rows, plan.rows(step))

        def advance(state: TrainState, step: int) -> tuple[TrainState, Metrics]:
            return update(state, batch_of(rows_of(step)), jax.random.fold_in(update_key, step), policy_fn=policy_fn)

        def validate(state: TrainState) -> Validation:
            parts = [
                jax.device_get(loss(state.params, batch_of(rows), policy_fn=policy_fn)[1])
                for rows in loop.in_order(held_out, settings.batch_size)
            ]
            tokens = sum(part["sft/tokens"] for part in parts)
            mean = sum(part["sft/loss"] * part["sft/tokens"] for part in parts) / tokens
            return Validation({"validation/loss": float(mean)})

        state, row = loop.train(
            stage,
            stage.replicate(TrainState.create(trainable.params, optimizer)),
            advance,
            num_steps=num_steps,
            validate=validate if len(held_out) else None,
            validation_interval=settings.validation_interval,
            show=("sft/loss", "validation/loss", "grad_norm"),
            sources=lambda step: [encoded.sources[row] for row in rows_of(step) if row >= 0],
            beside={"frozen weights": trainable.base},
        )
        return stage.finish(model, trainable, state.params, tokenizer, row)
