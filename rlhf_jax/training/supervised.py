"""What SFT, reward models, DPO and KTO share as runs: rows to batches, a part held out, the loop,
the folder.
"""

import dataclasses
import functools
import heapq
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import models, ops, sharding
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches, encoding, rows
from rlhf_jax.data.formats import ReadResult
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generator import LanguageModel
from rlhf_jax.training import initial, loop, memory
from rlhf_jax.training.initial import Trainable
from rlhf_jax.training.loop import Validation
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.stage import RunResult, Stage, divides, open_stage, set_up
from rlhf_jax.types import Metrics, Params, Parts, TrainState

KINDS: dict[str, rows.Kind] = {
    "sft": "demonstrations",
    "dpo": "pairs",
    "kto": "feedback",
}  # others: comparisons


class Task(NamedTuple):
    """What is trained on the batches of a stage, and how."""

    start: Trainable
    create: Callable[[Params], TrainState]  # of start.params, the state at step 0
    update: Callable[
        [TrainState, Any, jax.Array], tuple[TrainState, Metrics]
    ]  # (state, batch on the devices, key)
    validate: Callable[[TrainState], Validation]
    reference: Any = None  # a pytree with the parameters of the reference
    trained: Callable[[TrainState], Mapping[str, Params]] = lambda state: {
        "": state.params
    }  # see Stage.finish
    train_on: encoding.EncodedTexts | None = (
        None  # in place of the setting's encoded rows, row by row
    )


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a task is made from."""

    stage: Stage
    initial: LanguageModel
    rows: list[Any]  # as they were read
    encoded: encoding.EncodedTexts
    train_rows: np.ndarray
    held_out: np.ndarray
    batch: Callable[
        [np.ndarray], Any
    ]  # row numbers (-1: absent) -> a batch, spread over the devices
    batch_size: int
    optimizer: optax.GradientTransformation


def policy_task(
    setting: Setting, algorithm: Any, config: Any, validation_config: Any = None
) -> Task:
    """A policy trained by ``algorithm.update`` and validated by the metrics of ``algorithm.loss``.

    Args:
        algorithm: with ``with_reference(batch, ref_fn)`` if ``config.needs_reference``, the policy
            before training.
        validation_config: of the validations; None: ``config``.
    """
    stage, with_reference = (
        setting.stage,
        algorithm.with_reference if config.needs_reference else None,
    )
    initial_params, key = setting.initial.params, jax.random.fold_in(stage.key("init"), 1)
    start = stage.place(initial.trainable(stage.config.lora, initial_params, key))
    model_fn = models.policy_fn(setting.initial.model)
    num_rows = setting.batch_size * (
        1 if stage.config.text.pack else 2
    )  # a packed row holds both answers of a pair
    rows = memory.score_rows(stage.config.compute, num_rows, config)
    reference = stage.reference(start, ops.by_rows(model_fn, rows)) if with_reference else None
    if reference is None:
        memory.free(start.loaded)
    functions = {
        "policy_fn": start.bind(model_fn),
        "ref_fn": reference,
    }  # they travel through jit as arguments
    own = {"config": config, "minibatch_sharding": sharding.rows(stage.mesh)}
    step = functools.partial(algorithm.update, optimizer=setting.optimizer, **own)
    loss = functools.partial(algorithm.loss, config=validation_config or config)

    prepared = with_reference or (lambda batch, ref_fn: batch)

    def update(
        state: TrainState, batch: Any, key: jax.Array, *, policy_fn: Any, ref_fn: Any
    ) -> Any:
        return step(state, prepared(batch, ref_fn), key, policy_fn=policy_fn)

    @jax.jit
    def metrics_of(state: TrainState, batch: Any, *, policy_fn: Any, ref_fn: Any) -> Parts:
        return loss(state.params, prepared(batch, ref_fn), None, policy_fn=policy_fn)[1]

    def validate(state: TrainState) -> Validation:
        numbers = loop.in_order(setting.held_out, setting.batch_size)
        parts = [metrics_of(state, setting.batch(rows), **functions) for rows in numbers]
        pooled = {
            name: functools.reduce(operator.add, (part[name] for part in parts))
            for name in parts[0]
        }
        return Validation(
            {f"validation/{name.partition('/')[2]}": float(x.value) for name, x in pooled.items()}
        )

    create = functools.partial(TrainState.create, optimizer=setting.optimizer)
    jitted = stage.jit_update(update, setting.initial.model.config.num_blocks)
    return Task(start, create, functools.partial(jitted, **functions), validate, reference)


def run(
    config: RunConfig,
    name: Literal["sft", "reward_model", "dpo", "kto"],
    make_task: Callable[[Setting], Task],
    show: tuple[str, ...],
) -> RunResult:
    """Trains a task on the rows of the stage's own data or ``config.data`` and saves ``model/`` in
    the run folder.

    Args:
        name: of the stage: its section, its random streams, its folder.
        show: metrics of the console's line.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the
            settings.
    """
    config = set_up(config)
    settings, text = getattr(config, name), config.text
    initial.warn_of_rate(config, name, settings.optimizer)
    sizes = _sizes(name, settings, text.pack, sharding.num_parts(initial.mesh_of(config)))
    kind = KINDS.get(name, "comparisons")
    data = initial.stage_rows(config, kind, settings.data)
    with open_stage(config, name, data.fingerprints, sizes) as stage:
        texts, is_policy = rows.texts(data.rows), name != "reward_model"
        language_model = initial.language_model(
            config, texts, stage.key("init"), is_policy=is_policy
        )
        update_key, (split_key, order_key) = (
            stage.key("update"),
            jax.random.split(stage.key("data")),
        )
        longest = language_model.model.config.max_length
        how: Any = {"template": text.template, "max_length": longest, "too_long": text.too_long}
        encoded = encoding.encode_texts(data.rows, language_model.tokenizer, **how)
        # Pairs of one ranking stay together.
        share, sources = settings.validation_fraction, encoded.sources
        train_rows, held_out = initial.hold_out(kind, len(encoded), share, split_key, sources)
        for line in _account(data, kind, encoded, len(train_rows), len(held_out)):
            logger.info(line)
        plan, to_arrays = _batching(config, name, encoded, train_rows, order_key)

        def batch_of(numbers: np.ndarray) -> Any:
            return stage.shard(to_arrays(encoded, numbers))

        def rows_of(step: int) -> np.ndarray:
            numbers = plan.rows(step)
            return np.where(numbers == batches.ABSENT, numbers, train_rows[numbers])

        def batch_at(step: int) -> Any:
            return to_arrays(task.train_on or encoded, rows_of(step))

        def advance(state: TrainState, step: int) -> tuple[TrainState, Metrics]:
            batch = batch_at(step)
            state, metrics = task.update(
                state, stage.shard(batch), jax.random.fold_in(update_key, step)
            )
            share = (
                {f"{name}/padding": jnp.float32(np.mean(batch.attention_mask == 0))}
                if text.pack
                else {}
            )
            return state, metrics | share

        def attempt(state: TrainState) -> TrainState:
            steps = heapq.nlargest(8, range(plan.steps_per_epoch), plan.extent)
            largest = max((batch_at(step) for step in steps), key=lambda batch: batch.tokens.size)
            return memory.tried(
                lambda state: task.update(state, stage.shard(largest), update_key), state
            )

        num_steps = settings.num_epochs * plan.steps_per_epoch
        optimizer, size = make_optimizer(settings.optimizer, num_steps), settings.batch_size
        task = make_task(
            Setting(
                stage,
                language_model,
                data.rows,
                encoded,
                train_rows,
                held_out,
                batch_of,
                size,
                optimizer,
            )
        )
        job = loop.Job(
            advance,
            num_steps,
            validate=task.validate if len(held_out) else None,
            validation_interval=settings.validation_interval,
            show=show,
            sources=lambda step: [encoded.sources[row] for row in rows_of(step) if row >= 0],
            optimizer=settings.optimizer,
            attempt=attempt,
        )
        stage.hold(
            {
                "frozen weights": task.start.base,
                "reference": None if task.start.base else task.reference,
            }
        )
        state, row = loop.train(stage, stage.take(task.create, task.start.params), job)
        return stage.finish(language_model, task.start, task.trained(state), row)


def _batching(
    config: RunConfig, name: str, encoded: encoding.EncodedTexts, rows: np.ndarray, key: jax.Array
) -> tuple[batches.Plan, Callable[[encoding.EncodedTexts, np.ndarray], Any]]:
    """Which of the training ``rows`` form each step, and the function that makes arrays of them."""
    settings, text = getattr(config, name), config.text
    plan = batches.Plan(
        encoded.lengths.max(axis=1)[rows], settings.batch_size, key, text.bucket_multiple
    )
    if not text.pack:
        padded = {"sft": batches.demonstration_batch, "kto": batches.feedback_batch}
        return plan, functools.partial(
            padded.get(name, batches.comparison_batch), bucket_multiple=text.bucket_multiple
        )
    multiple = sharding.num_parts(initial.mesh_of(config)) * settings.num_microbatches
    plan, width, multiple, before, after = batches.packing(encoded, rows, plan, multiple)
    logger.info(
        f"text.pack: {after:.0%} of rows [{width}] are padding, {before:.0%} of rows that are not "
        "packed"
    )
    packed = batches.packed_batch if name == "sft" else batches.packed_comparisons
    return plan, functools.partial(packed, width=width, multiple=multiple)


def _account(
    data: ReadResult, kind: str, encoded: encoding.EncodedTexts, num_train: int, num_held_out: int
) -> list[str]:
    """What became of the rows: a line for each thing that was done to long ones, and the sum of it
    all.
    """
    unit = "pairs" if all(row.is_pair for row in data.rows) else kind
    bad, too_long = sum(data.dropped.values()), len(data.rows) - len(encoded)
    lines = [
        f"{count} {'texts' if what == encoding.CUT else unit}: {what}"
        for what, count in encoded.counts.items()
    ]
    total = f"{len(data.rows) + bad} {unit} in, {bad} bad, {too_long} too long"
    return [*lines, f"{total}, {num_train} train, {num_held_out} held out"]


def _sizes(name: str, settings: Any, pack: bool, num_devices: int) -> dict[str, int]:
    """The settings that help when memory runs out; UserError if a batch does not divide by devices
    or microbatches, or the stage cannot ``pack`` rows."""
    if pack and name == "kto":
        raise UserError(
            "text.pack: kto joins each prompt with the next row's answer and cannot pack; leave it "
            "out"
        )
    if pack and name == "sft" and settings.aggregate != "token":
        raise UserError(
            f"text.pack: sft.aggregate must be token, got {settings.aggregate}, which speaks of "
            "whole rows"
        )
    size, parts = settings.batch_size, {f"{name}.num_microbatches": settings.num_microbatches}
    divides(f"{name}.batch_size", size, {"devices": num_devices}, parts)
    return parts | {f"{name}.batch_size": size}
