"""What SFT, reward models, DPO and KTO train: a setting of model and batches, and a task of update
and validation.
"""

import functools
import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import Array
from jax.tree_util import Partial

from rlhf_jax import models, ops
from rlhf_jax.config import (
    Answering,
    DPOStage,
    KTOStage,
    ModelSource,
    RewardModelStage,
    RLStage,
    SFTStage,
)
from rlhf_jax.data import batches, rows
from rlhf_jax.data.encoding import EncodedTexts
from rlhf_jax.data.rows import Row
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.training.common import initial, loop, memory, references
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.loop import Validation
from rlhf_jax.training.common.stage import Stage
from rlhf_jax.training.supervised import samples, scoring
from rlhf_jax.types import LossMetrics, Metrics, Params, PolicyFn, TrainState

Settings = SFTStage | RewardModelStage | DPOStage | KTOStage


@dataclass(frozen=True)
class Setting:
    """What a task is made from. A batch depends on nothing but the number of its step."""

    stage: Stage
    settings: Settings
    source: ModelSource
    sampling: RLStage  # how a base policy samples, to normalise scores
    initial: LanguageModel  # that the source names
    rows: list[Row]  # as they were read
    encoded: EncodedTexts
    train_rows: np.ndarray
    held_out: np.ndarray
    plan: batches.Plan  # of places in ``train_rows``
    collate: Callable[[EncodedTexts, np.ndarray], Any]  # (encoded, row numbers) -> a batch
    bucket_multiple: int  # of which the width of a padded batch is
    optimizer: optax.GradientTransformation

    @property
    def num_answers(self) -> int:
        """The answers that share a prompt in its batches, for the model's functions; 0: none do."""
        return self.encoded.num_answers if self.encoded.shares_prompts else 0

    @property
    def one_text(self) -> bool:
        """Whether each row of its batches holds one text, for the model's functions."""
        return not (self.source.text.pack or self.encoded.shares_prompts)

    def batch(self, numbers: np.ndarray) -> Any:
        """The rows of these numbers (-1: missing) in arrays of NumPy."""
        return self.collate(self.encoded, numbers)

    def rows_of(self, step: int) -> np.ndarray:
        """[batch_size] row numbers of a training step, -1 for missing rows."""
        places = self.plan.rows(step)
        return np.where(places == batches.ABSENT, places, self.train_rows[places])

    def largest(self) -> Any:
        """The training batch of the first epoch with the most tokens, padding included."""
        steps = heapq.nlargest(8, range(self.plan.steps_per_epoch), self.plan.extent)
        candidates = [self.batch(self.rows_of(step)) for step in steps]
        return max(candidates, key=lambda batch: batch.tokens.size)


class Task(NamedTuple):
    """What is trained on the batches of a stage, and how."""

    setting: Setting
    """Of its training; validations may have other weights of the rows."""
    start: Trainable
    create: Callable[..., TrainState]
    """(start.params, optimizer=) -> the state at step 0."""
    update: Callable[[TrainState, Any, Array], tuple[TrainState, Metrics]]
    """(state, batch on the devices, key) -> (state, metrics)."""
    validate: Callable[[TrainState], Validation]
    reference: Any = None
    """A pytree with the parameters of the reference."""
    policy: samples.Policy | None = None
    """What answers prompts at validations; None: nothing does."""
    trained: Callable[[TrainState], Mapping[str, Params]] = lambda state: {"": state.params}
    """The parameters to save; see ``Stage.finish``."""


@dataclass(frozen=True)
class TaskSpec:
    """How one stage differs from the others; ``run`` does what they share."""

    section: str
    """The name of the config's section; it names the folder and the random streams too."""
    kind: rows.Kind
    """What the rows of its data are."""
    collate: Callable[..., Any]
    """(encoded, row numbers, bucket_multiple=) -> a padded batch in arrays of NumPy."""
    make_task: Callable[[Setting], Task]
    show: tuple[str, ...] = ()
    """Metrics of the console's line."""
    pack: Callable[..., Any] | None = None
    """(encoded, row numbers, width=, multiple=) -> a packed batch; None: the stage cannot pack."""
    say: Callable[[Setting], None] = lambda setting: None
    """Prints what a user should know of the rows."""
    is_policy: bool = True
    """Whether the model writes text; a reward model scores it."""


def policy_task(
    setting: Setting,
    algorithm: Any,
    config: Any,
    *,
    validation_config: Any = None,
    baselines: Callable[[Setting], dict[str, float]] = lambda setting: {},
) -> Task:
    """A policy trained by ``algorithm.update`` and validated by the metrics of ``algorithm.loss``.

    Args:
        algorithm: with ``with_reference(batch, ref_fn)`` if ``config.needs_reference``; the
            reference is the policy before training, or one that moves.
        validation_config: the config of the validations; None: ``config``.
        baselines: the figures on the held-out rows of judges that need no model, by name.
    """
    stage = setting.stage
    model = setting.initial.model
    how: Any = {"num_answers": setting.num_answers, "one_text": setting.one_text}
    model_fn = models.policy_fn(model, **how)
    init_key = jax.random.fold_in(stage.key("init"), 1)
    split = partial(initial.trainable, stage.lora)
    start = stage.place(stage.made(split, setting.initial.params, init_key))
    reference = _reference(setting, start, model_fn, config)

    def with_reference(state: TrainState, batch: Any, ref_fn: Any) -> Any:
        if ref_fn is None:
            return batch
        if isinstance(state, references.Followed):
            ref_fn = Partial(ref_fn, state.reference)
        return algorithm.with_reference(batch, ref_fn)

    def update(
        state: TrainState, batch: Any, key: Array, *, policy_fn: Any, ref_fn: Any
    ) -> tuple[TrainState, Metrics]:
        return algorithm.update(
            state,
            with_reference(state, batch, ref_fn),
            key,
            policy_fn=policy_fn,
            optimizer=setting.optimizer,
            config=config,
            minibatch_sharding=stage.rows,
        )

    def measure(state: TrainState, batch: Any, *, policy_fn: Any, ref_fn: Any) -> LossMetrics:
        _, parts = algorithm.loss(
            state.params,
            with_reference(state, batch, ref_fn),
            None,
            policy_fn=ops.by_rows(policy_fn, None),
            config=validation_config or config,
        )
        return parts

    # Both travel through jit as arguments.
    functions = {"policy_fn": start.bind(model_fn), "ref_fn": reference}
    bound = partial(stage.jit_update(update, model.config.num_blocks), **functions)
    measured = partial(stage.jit(measure), **functions)
    policy = samples.Policy(setting.initial, start, model_fn, reference, setting.num_answers)
    answer = _answering(setting, policy)
    validate = partial(_validate, setting, measured, baselines, answer)
    create = references.state(config).create
    return Task(setting, start, create, bound, validate, reference, policy)


def _reference(setting: Setting, start: Trainable, model_fn: PolicyFn, config: Any) -> Any:
    """The policy before training, or a function of the reference that moves; None: the loss needs
    no reference, and what it would have is freed.
    """
    stage = setting.stage
    if not config.needs_reference:
        memory.free(start.loaded)
        return None
    # A packed row holds both answers of a pair.
    num_rows = setting.plan.batch_size * (2 if setting.one_text else 1)
    score_rows = memory.score_rows(stage.compute, num_rows, config)
    return stage.reference(start, ops.by_rows(model_fn, score_rows), references.moves(config))


def _answering(
    setting: Setting, policy: samples.Policy
) -> Callable[[TrainState], list[samples.Sample]]:
    """What answers some of the held-out prompts at validations, chosen when the first one comes."""
    settings = setting.settings
    assert isinstance(settings, Answering)
    begun = setting.initial

    @functools.cache
    def answerer() -> Callable[[TrainState], list[samples.Sample]]:
        room = begun.model.config.max_length - settings.max_new_tokens
        is_plain = setting.rows[0].is_plain_text
        held_out = (setting.encoded, setting.held_out)
        asked = samples.questions(*held_out, begun.tokenizer, settings, room, is_plain)
        return samples.answerer(setting.stage, settings, asked, policy)

    return lambda state: answerer()(state)


def _validate(
    setting: Setting,
    measure: Callable[[TrainState, Any], LossMetrics],
    baselines: Callable[[Setting], dict[str, float]],
    answer: Callable[[TrainState], list[samples.Sample]],
    state: TrainState,
) -> Validation:
    """The metrics of all held-out rows, each as one mean, and answers to some of them."""
    numbers = loop.in_order(setting.held_out, setting.plan.batch_size)
    parts: list[Any] = [
        measure(state, setting.stage.shard(setting.batch(rows))) for rows in numbers
    ]
    figures = {}
    for name in parts[0]:
        _, _, metric = name.partition("/")
        total = reduce(lambda one, other: one.merge(other), [part[name] for part in parts])
        figures[metric] = float(total.value)
    figures |= baselines(setting)
    figures["rows"] = scoring.num_rows(setting.encoded, setting.held_out)
    metrics = {f"validation/{name}": value for name, value in figures.items()}
    return Validation(metrics, answer(state))
