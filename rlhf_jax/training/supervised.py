"""What SFT, reward models and DPO share as runs: rows to batches, a part held out, the loop, the folder at the end."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from rlhf_jax.config import DPOStage, RewardModelStage, RunConfig, SFTStage
from rlhf_jax.data import batches, formats, rows
from rlhf_jax.errors import UserError
from rlhf_jax.generator import LanguageModel
from rlhf_jax.training import initial, loop
from rlhf_jax.training.initial import Trainable
from rlhf_jax.training.loop import Validation
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.stage import RunResult, Stage, open_stage, start
from rlhf_jax.types import Metrics, Params, TrainState

Settings = SFTStage | RewardModelStage | DPOStage


class Task(NamedTuple):
    """What is trained on the batches of a stage, and how."""

    start: Trainable
    state: TrainState
    update: Callable[[Any, Any, jax.Array], tuple[Any, Metrics]]  # (state, batch on the devices, key)
    validate: Callable[[Any], Validation]  # (state)
    trained: Callable[[Any], Mapping[str, Params]] = lambda state: {"": state.params}  # see Stage.finish
    held: Mapping[str, Any] = {}  # what lies on the devices beside the state
    batch: Callable[[np.ndarray], Any] | None = None  # of training, if it differs from the setting's


class Setting(NamedTuple):
    """What a task is made from."""

    stage: Stage
    initial: LanguageModel
    rows: list[Any]  # as they were read
    encoded: Any  # EncodedTexts or EncodedComparisons
    train_rows: np.ndarray
    held_out: np.ndarray
    batch: Callable[[np.ndarray], Any]  # row numbers (-1: absent) -> a batch, spread over the devices
    optimizer: optax.GradientTransformation

    def held_out_batches(self, batch_size: int) -> list[Any]:
        """The held-out rows in batches of one size."""
        return [self.batch(numbers) for numbers in loop.in_order(self.held_out, batch_size)]


class Kind(NamedTuple):
    """A supervised stage."""

    name: str
    rows: formats.Kind
    encode: Callable[..., Any]  # (rows, tokenizer, *, template, max_length, too_long) -> encoded
    batch: Callable[..., Any]  # (encoded, row numbers, bucket_multiple) -> arrays on the host
    show: tuple[str, ...]  # metrics of the console's line
    sources: Callable[[Any], list[str]]  # of the encoded rows, as "FILE, line N"
    task: Callable[[Setting], Task]
    split_sources: bool = False  # whether rows of one source may be held out apart


def run(config: RunConfig, settings: Settings, kind: Kind) -> RunResult:
    """Trains a task on the rows of ``settings.data`` or ``config.data`` and saves ``model/`` in the run folder.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the settings.
    """
    sizes = _sizes(kind.name, settings, start(config))
    data = initial.stage_rows(config, kind.rows, settings.data)
    with open_stage(config, kind.name, data.fingerprints, sizes) as stage:
        language_model = initial.language_model(config, rows.texts(data.rows), stage.key("init"))
        text = config.text
        encoded = kind.encode(
            data.rows,
            language_model.tokenizer,
            template=text.template,
            max_length=language_model.model.config.max_length,
            too_long=text.too_long,
        )
        print_counts(encoded.counts)
        split_key, order_key = jax.random.split(stage.key("data"))
        sources = kind.sources(encoded)
        groups = None if kind.split_sources else sources
        train_rows, held_out = batches.split(len(encoded), settings.validation_fraction, split_key, groups)
        plan = batches.Plan(encoded.lengths[train_rows], settings.batch_size, order_key, text.bucket_multiple)
        num_steps = settings.num_epochs * plan.steps_per_epoch
        update_key = stage.key("update")

        def batch_of(numbers: np.ndarray) -> Any:
            return stage.shard(kind.batch(encoded, numbers, text.bucket_multiple))

        def rows_of(step: int) -> np.ndarray:
            return loop.select(train_rows, plan.rows(step))

        def advance(state: Any, step: int) -> tuple[Any, Metrics]:
            return task.update(state, training_batch(rows_of(step)), jax.random.fold_in(update_key, step))

        optimizer = make_optimizer(settings.optimizer, num_steps)
        task = kind.task(Setting(stage, language_model, data.rows, encoded, train_rows, held_out, batch_of, optimizer))
        training_batch = task.batch or batch_of
        job = loop.Job(
            advance,
            num_steps,
            validate=task.validate if len(held_out) else None,
            validation_interval=settings.validation_interval,
            show=kind.show,
            sources=lambda step: [sources[row] for row in rows_of(step) if row >= 0],
            optimizer=settings.optimizer,
        )
        stage.held.update(
            {"trained parameters": task.state.params, "optimizer state": task.state.opt_state, **task.held}
        )
        state, row = loop.train(stage, stage.replicate(task.state), job)
        return stage.finish(language_model, task.start, task.trained(state), row)


def print_counts(counts: Mapping[str, int]) -> None:
    """Prints how many texts were cut or left out, before anything is compiled."""
    for what, count in counts.items():
        print(f"{count} texts: {what}", flush=True)


def _sizes(section: str, settings: Settings, num_devices: int) -> dict[str, int]:
    """The settings that help when memory runs out.

    Raises:
        UserError: a batch does not divide by the devices or the microbatches.
    """
    size, parts = settings.batch_size, settings.num_microbatches
    fits = math.lcm(num_devices, parts)
    divides(f"{section}.batch_size", size, {"devices": num_devices}, fits)
    divides(f"{section}.batch_size", size, {f"{section}.num_microbatches": parts}, fits)
    return {f"{section}.num_microbatches": parts, f"{section}.batch_size": size}


def divides(key: str, size: int, parts: Mapping[str, int], fits: int) -> None:
    """Raises UserError unless ``size`` is a multiple of the product of the parts; multiples of ``fits`` are."""
    if size % math.prod(parts.values()) == 0:
        return
    below = size - size % fits
    nearest = f"{below} or {below + fits}" if below else f"{fits}"
    product = " x ".join(f"{count} {name}" for name, count in parts.items())
    raise UserError(f"{key} {size} does not divide by {product}; use {nearest}")
