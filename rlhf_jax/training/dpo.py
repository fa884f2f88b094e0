"""Direct preference optimisation as a run: preference pairs and a policy in, a better policy out, without sampling."""

import jax
import numpy as np

from rlhf_jax import models
from rlhf_jax.algorithms import dpo
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches, encoding
from rlhf_jax.data import rows as data_rows
from rlhf_jax.errors import UserError
from rlhf_jax.training import adapters, checks, inputs, loop, setup
from rlhf_jax.training.loop import Validation
from rlhf_jax.training.stage import RunResult, open_stage, start
from rlhf_jax.types import BoundPolicyFn, Comparisons, Metrics, PolicyFn, TrainState


def run(config: RunConfig) -> RunResult:
    """Trains the policy in ``config.model``, which is the reference too, on the pairs of ``config.dpo.data`` or
    ``config.data``, and saves ``model/`` in the run folder. Rankings count as their pairs.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the settings.
    """
    settings = config.dpo
    checks.supervised("dpo", settings, start(config))
    pairs = inputs.read("comparisons", settings.data, config.data, config.seed, setup.tokenizer_source(config))
    for row in pairs.rows:
        if not isinstance(row, data_rows.Pair):
            raise UserError(f"{row.source}: DPO takes pairs and rankings, and this row has another label")
    with open_stage(config, "dpo", pairs.fingerprints) as stage:
        model, params, tokenizer = setup.language_model(config, data_rows.texts(pairs.rows), stage.key("init"))
        encoded = encoding.encode_pairs(
            pairs.rows,
            tokenizer,
            template=config.text.template,
            max_length=model.config.max_length,
            too_long=config.text.too_long,
        )
        stage.say_counts(encoded.counts)
        split_key, order_key = jax.random.split(stage.key("data"))
        train_rows, held_out = batches.split(
            len(encoded), settings.validation_fraction, split_key, encoded.chosen.sources
        )
        plan = batches.Plan(encoded.lengths[train_rows], settings.batch_size, order_key, config.text.bucket_multiple)
        num_steps = settings.num_epochs * plan.steps_per_epoch
        optimizer = setup.make_optimizer(settings.optimizer, num_steps)
        trainable = stage.trainable(adapters.choose(config, params, jax.random.fold_in(stage.key("init"), 1)))
        policy_fn = trainable.bind(models.policy_fn(model))
        ref_fn = stage.reference(trainable, models.policy_fn(model))

        def batch_of(rows: np.ndarray) -> Comparisons:
            return stage.shard(batches.comparison_batch(encoded, rows, config.text.bucket_multiple))

        @stage.jit_update
        def update(
            state: TrainState, batch: Comparisons, key: jax.Array, policy_fn: PolicyFn, ref_fn: BoundPolicyFn
        ) -> tuple[TrainState, Metrics]:
            batch = dpo.with_reference(batch, ref_fn)
            return dpo.update(state, batch, key, policy_fn=policy_fn, optimizer=optimizer, config=settings)

        @jax.jit
        def held_out_metrics(
            state: TrainState, batch: Comparisons, policy_fn: PolicyFn, ref_fn: BoundPolicyFn
        ) -> Metrics:
            batch = dpo.with_reference(batch, ref_fn)
            return dpo.loss(state.params, batch, None, policy_fn=policy_fn, config=settings)[1]

        update_key = stage.key("update")

        def rows_of(step: int) -> np.ndarray:
            return loop.select(train_rows, plan.rows(step))

        def advance(state: TrainState, step: int) -> tuple[TrainState, Metrics]:
            return update(state, batch_of(rows_of(step)), jax.random.fold_in(update_key, step), policy_fn, ref_fn)

        def validate(state: TrainState) -> Validation:
            sums: dict[str, float] = {}
            total = 0.0
            for rows in loop.in_order(held_out, settings.batch_size):
                present = rows[rows >= 0]
                weight = float(len(present) if encoded.weight is None else encoded.weight[present].sum())
                metrics = jax.device_get(held_out_metrics(state, batch_of(rows), policy_fn, ref_fn))
                total += weight
                sums = {name: sums.get(name, 0.0) + weight * float(value) for name, value in metrics.items()}
            return Validation({name.replace("dpo/", "validation/"): value / total for name, value in sums.items()})

        state, row = loop.train(
            stage,
            stage.replicate(TrainState.create(trainable.params, optimizer)),
            advance,
            num_steps=num_steps,
            validate=validate if len(held_out) else None,
            validation_interval=settings.validation_interval,
            show=("dpo/loss", "dpo/accuracy", "dpo/margin", "validation/loss", "validation/accuracy"),
            sources=lambda step: [encoded.chosen.sources[row] for row in rows_of(step) if row >= 0],
            beside={"reference": ref_fn},
        )
        return stage.finish(model, trainable, state.params, tokenizer, row)
