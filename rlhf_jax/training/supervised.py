"""What SFT, reward models and DPO share as runs: rows to batches, a part held out, the loop, the folder at the end."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from rlhf_jax.config import DPOStage, RewardModelStage, RunConfig, SFTStage
from rlhf_jax.data import batches, rows
from rlhf_jax.generator import LanguageModel
from rlhf_jax.training import initial, loop
from rlhf_jax.training.initial import Trainable
from rlhf_jax.training.loop import Validation
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.stage import RunResult, Stage, divides, open_stage, set_up
from rlhf_jax.types import Metrics, Params, Parts

Settings = SFTStage | RewardModelStage | DPOStage


class Task(NamedTuple):
    """What is trained on the batches of a stage, and how."""

    start: Trainable
    create: Callable[[], Any]  # the state at step 0: called once, so that nobody keeps it beside the loop's
    update: Callable[[Any, Any, jax.Array], tuple[Any, Metrics]]  # (state, batch on the devices, key)
    validate: Callable[[Any], Validation]  # (state)
    reference: Any = None  # a pytree with the parameters of the reference
    trained: Callable[[Any], Mapping[str, Params]] = lambda state: {"": state.params}  # see Stage.finish
    train_on: Any = None  # in place of the setting's encoded rows, row by row


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a task is made from."""

    stage: Stage
    initial: LanguageModel
    rows: list[Any]  # as they were read
    encoded: Any  # EncodedTexts or EncodedComparisons
    train_rows: np.ndarray
    held_out: np.ndarray
    batch: Callable[[np.ndarray], Any]  # row numbers (-1: absent) -> a batch, spread over the devices
    batch_size: int
    optimizer: optax.GradientTransformation

    def start(self) -> Trainable:
        """The policy's parameters, on the devices."""
        stage, key = self.stage, jax.random.fold_in(self.stage.key("init"), 1)
        return stage.place(initial.trainable(stage.config.lora, self.initial.params, key))

    def mean_metrics(self, state: Any, metrics_of: Callable[[Any, Any], Parts]) -> Validation:
        """Metrics ``metrics_of(state, batch)`` over the held-out rows; their prefix becomes ``validation/``."""
        parts = [metrics_of(state, self.batch(rows)) for rows in loop.in_order(self.held_out, self.batch_size)]
        pooled = {name: functools.reduce(operator.add, (part[name] for part in parts)) for name in parts[0]}
        return Validation({f"validation/{name.partition('/')[2]}": float(x.value) for name, x in pooled.items()})


def run(
    config: RunConfig,
    settings: Settings,
    name: str,
    *,
    kind: Literal["demonstrations", "comparisons"],
    encode: Callable[..., Any],
    show: tuple[str, ...],
    make_task: Callable[[Setting], Task],
) -> RunResult:
    """Trains a task on the rows of ``settings.data`` or ``config.data`` and saves ``model/`` in the run folder.

    Args:
        name: of the stage: its section, its random streams, its folder.
        encode: ``(rows, tokenizer, *, template, max_length, too_long)`` -> EncodedTexts or EncodedComparisons.
        show: metrics of the console's line.
    """
    config = set_up(config)
    initial.warn_of_rate(config, name, settings.optimizer)
    text, sizes = config.text, _sizes(name, settings, jax.device_count())
    data = initial.stage_rows(config, kind, settings.data)
    with open_stage(config, name, data.fingerprints, sizes) as stage:
        texts, is_policy = rows.texts(data.rows), name != "reward_model"
        language_model = initial.language_model(config, texts, stage.key("init"), is_policy=is_policy)
        model, _, tokenizer = language_model
        options = {"template": text.template, "max_length": model.config.max_length, "too_long": text.too_long}
        encoded = encode(data.rows, tokenizer, **options)
        for what, count in encoded.counts.items():
            print(f"{count} texts: {what}", flush=True)
        is_text, update_key = kind == "demonstrations", stage.key("update")
        sources = encoded.sources if is_text else encoded.chosen.sources
        to_arrays = batches.demonstration_batch if is_text else batches.comparison_batch
        split_key, order_key = jax.random.split(stage.key("data"))
        groups = None if is_text else sources  # pairs of one ranking stay together
        fraction = settings.validation_fraction
        train_rows, held_out = initial.hold_out(kind, len(encoded), fraction, split_key, groups)
        plan = batches.Plan(encoded.lengths[train_rows], settings.batch_size, order_key, text.bucket_multiple)
        num_steps = settings.num_epochs * plan.steps_per_epoch

        def batch_of(numbers: np.ndarray, rows: Any = None) -> Any:
            return stage.shard(to_arrays(encoded if rows is None else rows, numbers, text.bucket_multiple))

        def rows_of(step: int) -> np.ndarray:
            numbers = plan.rows(step)
            return np.where(numbers == batches.ABSENT, numbers, train_rows[numbers])

        def advance(state: Any, step: int) -> tuple[Any, Metrics]:
            batch = batch_of(rows_of(step), task.train_on)
            return task.update(state, batch, jax.random.fold_in(update_key, step))

        optimizer, size = make_optimizer(settings.optimizer, num_steps), settings.batch_size
        task = make_task(
            Setting(stage, language_model, data.rows, encoded, train_rows, held_out, batch_of, size, optimizer)
        )
        job = loop.Job(
            advance,
            num_steps,
            validate=task.validate if len(held_out) else None,
            validation_interval=settings.validation_interval,
            show=show,
            sources=lambda step: [sources[row] for row in rows_of(step) if row >= 0],
            optimizer=settings.optimizer,
        )

        def first_state() -> Any:
            state = stage.replicate(task.create())
            stage.hold({"trained parameters": state.params, "optimizer state": state.opt_state})
            return state

        stage.hold({"frozen weights": task.start.base, "reference": None if task.start.base else task.reference})
        state, row = loop.train(stage, first_state(), job)
        return stage.finish(language_model, task.start, task.trained(state), row)


def _sizes(name: str, settings: Settings, num_devices: int) -> dict[str, int]:
    """The settings that help when memory runs out; UserError if a batch does not divide by devices or microbatches."""
    size, parts = settings.batch_size, {f"{name}.num_microbatches": settings.num_microbatches}
    divides(f"{name}.batch_size", size, {"devices": num_devices}, parts)
    return parts | {f"{name}.batch_size": size}
