"""What SFT, reward models, DPO and KTO share as runs: rows to batches, a part held out, the loop,
the folder.
"""

import heapq
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import Partial

from rlhf_jax import models, ops
from rlhf_jax.config import DPOStage, KTOStage, RewardModelStage, RunConfig, SFTStage
from rlhf_jax.data import batches, encoding, formats, rows
from rlhf_jax.data.encoding import EncodedTexts
from rlhf_jax.data.formats import ReadResult
from rlhf_jax.data.rows import Row
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.training.common import initial, layout, loop, memory, references, shared_prompts
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.loop import Validation
from rlhf_jax.training.common.optimizer import check_frozen, make_optimizer
from rlhf_jax.training.common.stage import RunResult, Stage, open_stage, run_folder, set_up
from rlhf_jax.training.supervised import batching, samples, scoring, store
from rlhf_jax.training.supervised.batching import Batching
from rlhf_jax.types import Metrics, Params, Parts, PolicyFn, TrainState

Settings = SFTStage | RewardModelStage | DPOStage | KTOStage


@dataclass(frozen=True)
class Setting:
    """What a task is made from. A batch depends on nothing but the number of its step."""

    stage: Stage
    initial: LanguageModel
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
    trained: Callable[[TrainState], Mapping[str, Params]] = lambda state: {"": state.params}
    """The parameters to save; see ``Stage.finish``."""


@dataclass(frozen=True)
class StageSpec:
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
    is_policy: bool = True
    """Whether the model writes text; a reward model scores it."""

    def settings(self, config: RunConfig) -> Settings:
        """The stage's section of a config."""
        return getattr(config, self.section)


def run(config: RunConfig, spec: StageSpec, on_step: loop.OnStep | None = None) -> RunResult:
    """Trains a stage's task on the rows of its own data or ``config.data`` and saves ``model/`` in
    the run folder.

    Args:
        on_step: as in ``loop.Job``.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the
            settings.
    """
    config = set_up(config, [run_folder(config, spec.section)])
    settings = spec.settings(config)
    references.check(config, settings)
    initial.warn_of_rate(config, spec.section, settings.optimizer)
    sizes = _sizes(config, spec)
    data, to_validate = _read(config, spec)
    fingerprints = data.fingerprints | to_validate.fingerprints
    with open_stage(config, spec.section, fingerprints, sizes) as stage:
        setting = _setting(stage, spec, data, to_validate)
        task = spec.make_task(setting)
        first = task.start.params
        check_frozen(spec.section, settings.optimizer, first[0] if type(first) is list else first)
        state, row = loop.train(setting.stage, _first_state(task), _job(spec, task, on_step))
        return setting.stage.finish(setting.initial, task.start, task.trained(state), row)


def _setting(stage: Stage, spec: StageSpec, data: ReadResult, to_validate: ReadResult) -> Setting:
    """The model, and the rows as token ids in batches."""
    config = stage.config
    settings = spec.settings(config)
    texts = rows.texts([*data.rows, *to_validate.rows])
    init_key = stage.key("init")
    language_model = initial.language_model(config, texts, init_key, is_policy=spec.is_policy)
    has_experts = any(getattr(language_model.model.config, "sparse_layers", ()))
    if settings.router_aux_coef is not None and not has_experts:
        raise UserError(f"{spec.section}.router_aux_coef: the model has no experts; leave it out")
    split_key, order_key = jax.random.split(stage.key("data"))
    encoded, train_rows, held_out = _encoded(
        config, spec, language_model, data, to_validate, split_key
    )
    layers = language_model.model.config.num_layers
    chosen = batched(config, spec, encoded, train_rows, order_key, layers)
    if chosen.encoded.num_answers > 1:
        shares = chosen.encoded.shares_prompts
        stage = stage.recorded(shared_prompts.recorded(config, shares))
    rows_at_once = chosen.encoded.rows_of_arrays * settings.batch_size // settings.num_microbatches
    longest = int(chosen.encoded.longest.max())
    members = settings.ensemble_size if isinstance(settings, RewardModelStage) else 1
    sizes = (members * rows_at_once, longest, members)
    stage, language_model = stage.choose_remat(language_model, *sizes)
    return Setting(
        stage,
        language_model,
        data.rows,
        chosen.encoded,
        train_rows,
        held_out,
        chosen.plan,
        chosen.collate,
        chosen.multiple,
        make_optimizer(settings.optimizer, _num_steps(settings, chosen.plan)),
    )


def _num_steps(settings: Settings, plan: batches.Plan) -> int:
    """Optimizer steps of the run."""
    return settings.max_steps or settings.num_epochs * plan.steps_per_epoch


def _first_state(task: Task) -> TrainState:
    """The state at step 0. The stage notes what else is on the devices."""
    stage = task.setting.stage
    reference = None if task.start.base else task.reference  # under LoRA it is the base
    stage.hold({"frozen weights": task.start.base, "reference": reference})
    create = partial(task.create, optimizer=task.setting.optimizer)
    state = stage.take(create, task.start.params)
    stage.hold({"moving reference": getattr(state, "reference", None)})
    return state


def _job(spec: StageSpec, task: Task, on_step: loop.OnStep | None) -> loop.Job:
    """What the loop runs."""
    setting = task.setting
    stage = setting.stage
    settings = spec.settings(stage.config)
    update_key = stage.key("update")

    def advance(state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        batch = setting.batch(setting.rows_of(step))
        step_key = jax.random.fold_in(update_key, step)
        state, metrics = task.update(state, stage.shard(batch), step_key)
        if stage.config.text.pack:
            padding = np.mean(batch.attention_mask == 0)
            metrics = metrics | {f"{spec.section}/padding": jnp.float32(padding)}
        return state, metrics

    def check_memory(state: TrainState) -> None:
        memory.check("learn", task.update, state, stage.shard(setting.largest()), update_key)

    def sources(step: int) -> list[str]:
        present = [row for row in setting.rows_of(step) if row != batches.ABSENT]
        return [setting.encoded.sources[row] for row in present]

    return loop.Job(
        references.moving(advance, settings, lambda state: state.params),
        _num_steps(settings, setting.plan),
        validate=task.validate if len(setting.held_out) else None,
        validation_interval=settings.validation_interval,
        show=spec.show,
        sources=sources,
        optimizer=settings.optimizer,
        check_memory=check_memory,
        on_step=on_step,
    )


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
    model_fn = models.policy_fn(model, num_answers=setting.num_answers)
    init_key = jax.random.fold_in(stage.key("init"), 1)
    start = stage.place(initial.trainable(stage.config.lora, setting.initial.params, init_key))
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

    def measure(state: TrainState, batch: Any, *, policy_fn: Any, ref_fn: Any) -> Parts:
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
    return Task(setting, start, references.state(config).create, bound, validate, reference)


def _reference(setting: Setting, start: Trainable, model_fn: PolicyFn, config: Any) -> Any:
    """The policy before training, or a function of the reference that moves; None: the loss needs
    no reference, and what it would have is freed.
    """
    stage = setting.stage
    if not config.needs_reference:
        memory.free(start.loaded)
        return None
    # A packed row holds both answers of a pair.
    is_packed = stage.config.text.pack or setting.encoded.shares_prompts
    num_rows = setting.plan.batch_size * (1 if is_packed else 2)
    score_rows = memory.score_rows(stage.config.compute, num_rows, config)
    return stage.reference(start, ops.by_rows(model_fn, score_rows), references.moves(config))


def _answering(
    setting: Setting, policy: samples.Policy
) -> Callable[[TrainState], list[dict[str, Any]]]:
    """What answers some of the held-out prompts at validations, for samples.jsonl."""
    settings = getattr(setting.stage.config, setting.stage.name)
    tokenizer = setting.initial.tokenizer
    room = setting.initial.model.config.max_length - settings.max_new_tokens
    are_pieces = setting.rows[0].is_plain_text
    asked = samples.questions(
        setting.encoded, setting.held_out, tokenizer, settings, room, are_pieces
    )
    return samples.answerer(setting.stage, settings, asked, policy)


def _validate(
    setting: Setting,
    measure: Callable[[TrainState, Any], Parts],
    baselines: Callable[[Setting], dict[str, float]],
    answer: Callable[[TrainState], list[dict[str, Any]]],
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


def _read(config: RunConfig, spec: StageSpec) -> tuple[ReadResult, ReadResult]:
    """The rows to train on, and those to validate on if they have files of their own.

    Raises:
        UserError: the data cannot be used, or a file is in both.
    """
    settings = spec.settings(config)
    data = initial.stage_rows(config, spec.kind, settings.data)
    if settings.max_rows is not None:
        data = _sampled(data, settings.max_rows, f"{spec.section}.max_rows", config.seed)
    if not settings.validation_data:
        return data, ReadResult([])
    key = f"{spec.section}.validation_data"
    to_validate = initial.stage_rows(config, spec.kind, settings.validation_data, f" ({key})")
    trained_on = {digest: name for name, digest in data.fingerprints.items()}
    for name, digest in to_validate.fingerprints.items():
        if digest in trained_on:
            raise UserError(
                f"{key}: {name} is {trained_on[digest]}, which is trained on; give other rows"
            )
    formats.check_labels([*data.rows, *to_validate.rows])
    return data, to_validate


def _sampled(data: ReadResult, most: int, key: str, seed: int) -> ReadResult:
    """At most so many rows of the data, drawn by the seed, in their order; prints how many. The
    pairs of a ranking are one row of the file and stay together.
    """
    places = list(dict.fromkeys(row.source for row in data.rows))
    if len(places) <= most:
        return data
    drawn = np.random.default_rng(seed).permutation(len(places))[:most]
    kept = {places[number] for number in drawn}
    logger.info(f"{key}: {most} of {len(places)} rows are used")
    return replace(data, rows=[row for row in data.rows if row.source in kept])


def _encoded(
    config: RunConfig,
    spec: StageSpec,
    language_model: LanguageModel,
    data: ReadResult,
    to_validate: ReadResult,
    key: Array,
) -> tuple[EncodedTexts, np.ndarray, np.ndarray]:
    """All rows as token ids, and the numbers of those to train on and to validate on. Prints how
    many rows are used, and why the others are not.
    """
    kind: str = spec.kind
    to_train = data.rows
    own = to_validate.rows
    longest = longest_text(config, language_model.model.config.max_length)
    if to_train[0].is_plain_text:
        kind = "pieces"
        to_train = _pieces(to_train, language_model, longest)
        own = _pieces(own, language_model, longest)
    else:
        initial.say_template(config, language_model.tokenizer)
    template = "{prompt}" if kind == "pieces" else config.text.template
    initial.say_spelled([*data.rows, *to_validate.rows], language_model.tokenizer, template)
    every_row = [*to_train, *own]
    encoded = encode(config, every_row, language_model.tokenizer, longest, kind == "pieces")
    # A piece is a group of its own: its prompt is a token that many have.
    group: Callable[[Row], Hashable] = encoding.group
    if kind == "pieces":
        group = operator.attrgetter("source")
    group_of = {row.source: group(row) for row in every_row}
    groups = [group_of[source] for source in encoded.sources]
    if own:
        own_sources = [row.source for row in own]
        is_own = np.isin(encoded.sources, own_sources)
        train_rows = np.flatnonzero(~is_own)
        held_out = np.flatnonzero(is_own)
        initial.say_held_out(kind, groups, train_rows, held_out)
    else:
        fraction = spec.settings(config).validation_fraction
        train_rows, held_out = initial.hold_out(kind, groups, fraction, key)
    num_bad = sum(data.dropped.values()) + sum(to_validate.dropped.values())
    used = f"{len(train_rows)} train, {len(held_out)} held out"
    _account(every_row, num_bad, kind, encoded, used)
    return encoded, train_rows, held_out


def longest_text(config: RunConfig, positions: int) -> int:
    """Most tokens of a text: ``text.max_length``, or the positions of the model.

    Raises:
        UserError: the setting is more than the model reads.
    """
    wanted = config.text.max_length
    if wanted is not None and wanted > positions:
        raise UserError(
            f"text.max_length {wanted}: the model reads {positions} tokens at most; give at most "
            "so many"
        )
    return wanted or positions


def encode(
    config: RunConfig,
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    max_length: int | None,
    are_pieces: bool,
) -> EncodedTexts:
    """Rows as token ids, by ``config.text``, for a model of that many positions; ``are_pieces``: of
    plain texts, which have no template.
    """
    return store.encode(
        rows,
        tokenizer,
        template="{prompt}" if are_pieces else config.text.template,
        max_length=max_length,
        too_long=config.text.too_long,
    )


def _account(
    read: Sequence[Row], num_bad: int, kind: str, encoded: EncodedTexts, used: str
) -> None:
    """Prints a line for each way in which long texts were treated, and the number of rows."""
    unit = "pairs" if all(row.is_pair for row in read) else kind
    for what, count in encoded.counts.items():
        logger.info(f"{count} {'texts' if what == encoding.CUT else unit}: {what}")
    num_too_long = len(read) - len(encoded)
    num_rows = len(read) + num_bad
    logger.info(f"{num_rows} {unit} in, {num_bad} bad, {num_too_long} too long, {used}")


def _pieces(texts: Sequence[Row], language_model: LanguageModel, max_length: int) -> list[Row]:
    """Plain texts as ``encoding.pieces``; prints how many."""
    cut = encoding.pieces(texts, language_model.tokenizer, max_length)
    lengths = [len(row.responses[0]) for row in cut]
    if cut:
        size = f"{len(cut):,} pieces of up to {1 + max(lengths):,} tokens"
        logger.info(f"plain text of {sum(lengths):,} tokens: cut into {size}")
    return cut


def batched(
    config: RunConfig,
    spec: StageSpec,
    encoded: EncodedTexts,
    rows: np.ndarray,
    key: Array,
    layers: int,
) -> Batching:
    """The batches of the training ``rows`` for a model with so many ``layers``; whether they share
    prompts is decided and printed (``batching.decided``).
    """
    of_texts = partial(_batching, config, spec, rows=rows, key=key, layers=layers)
    return batching.decided(config.compute, encoded, of_texts)


def _batching(
    config: RunConfig,
    spec: StageSpec,
    encoded: EncodedTexts,
    *,
    rows: np.ndarray,
    key: Array,
    layers: int,
) -> Batching:
    """How the training ``rows`` of a model with so many ``layers`` form batches: padded to a
    multiple of columns, or packed.
    """
    settings = spec.settings(config)
    longest = encoded.longest
    size = settings.batch_size
    multiple = initial.bucket_multiple(config, layers, int(longest.max()), -(-len(rows) // size))
    of_rows = longest[rows]
    if not config.text.pack or spec.pack is None:
        plan = batches.Plan(of_rows, size, key, multiple)
        columns = batches.columns_of(encoded, rows, plan)
        collate = partial(spec.collate, bucket_multiple=multiple)
        return Batching(encoded, plan, collate, multiple, columns)
    plan = batches.Plan(of_rows, size, key, config.text.bucket_multiple)
    least = layout.row_parts(config, settings.num_microbatches)
    packed = batches.packing(encoded, rows, plan, least)
    line = (
        f"text.pack: {packed.padding:.0%} of rows [{packed.width}] are padding, "
        f"{packed.padding_alone:.0%} of rows that are not packed"
    )
    collate = partial(spec.pack, width=packed.width, multiple=packed.multiple)
    return Batching(encoded, packed.plan, collate, multiple, packed.columns, line)


def _sizes(config: RunConfig, spec: StageSpec) -> dict[str, int]:
    """The settings that help when memory runs out.

    Raises:
        UserError: a batch does not divide by devices or microbatches, or the stage cannot pack.
    """
    name = spec.section
    settings = spec.settings(config)
    if config.text.pack and spec.pack is None:
        raise UserError(
            f"text.pack: {name} joins each prompt with the next row's answer and cannot pack; "
            "leave it out"
        )
    if config.text.pack and isinstance(settings, SFTStage) and settings.aggregate != "token":
        raise UserError(
            f"text.pack: {name}.aggregate must be token, got {settings.aggregate}, whose parts are "
            "whole rows"
        )
    microbatches = {f"{name}.num_microbatches": settings.num_microbatches}
    batch_size = {f"{name}.batch_size": settings.batch_size}
    sharers = layout.sharers(config, microbatches)
    layout.check_divides(f"{name}.batch_size", settings.batch_size, sharers, microbatches)
    return microbatches | batch_size
