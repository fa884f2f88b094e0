"""What SFT, reward models, DPO and KTO share as runs: rows to batches, a part held out, the loop,
the folder.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import (
    RewardModelStage,
    RunConfig,
    SFTStage,
    Text,
    data_source,
    model_source,
)
from rlhf_jax.data import batches, rows
from rlhf_jax.data.formats import ReadResult
from rlhf_jax.errors import UserError
from rlhf_jax.training.common import (
    initial,
    layout,
    loop,
    memory,
    references,
    remat,
    shared_prompts,
)
from rlhf_jax.training.common.layout import Shares
from rlhf_jax.training.common.opening import open_stage, run_folder
from rlhf_jax.training.common.optimizer import check_frozen, make_optimizer
from rlhf_jax.training.common.saving import RunResult, finish
from rlhf_jax.training.common.setup import set_up, shares_of
from rlhf_jax.training.common.stage import Stage
from rlhf_jax.training.supervised import batching, reading
from rlhf_jax.training.supervised.tasks import Setting, Settings, Task, TaskSpec
from rlhf_jax.types import Metrics, TrainState


def run(config: RunConfig, spec: TaskSpec, on_step: loop.OnStep | None = None) -> RunResult:
    """Trains a stage's task on the rows of its own data or ``config.data`` and saves ``model/`` in
    the run folder.

    Args:
        on_step: as in ``loop.Job``.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the
            settings.
    """
    config = set_up(config, [run_folder(config, spec.section)])
    settings: Settings = getattr(config, spec.section)
    source = model_source(config)
    references.check(source, settings)
    initial.warn_of_rate(source, spec.section, settings.optimizer)
    sizes = helping_sizes(spec, settings, config.text, shares_of(config))
    data, to_validate = reading.read(data_source(config), spec, settings)
    fingerprints = data.fingerprints | to_validate.fingerprints
    with open_stage(config, spec.section, fingerprints, sizes) as stage:
        setting = _setting(config, stage, spec, data, to_validate)
        spec.say(setting)
        task = spec.make_task(setting)
        first = task.start.params
        check_frozen(spec.section, settings.optimizer, first[0] if type(first) is list else first)
        state, row = loop.train(setting.stage, first_state(task), _job(spec, task, on_step))
        how = None
        if not setting.initial.tokenizer.generation:
            how = initial.sampling_config(config.rl, setting.initial.tokenizer)
        ended = (setting.initial, task.start, task.trained(state), row)
        return finish(setting.stage, source, *ended, how=how)


def _setting(
    config: RunConfig,
    stage: Stage,
    spec: TaskSpec,
    data: ReadResult,
    to_validate: ReadResult,
) -> Setting:
    """The model, and the rows as token ids in batches."""
    settings: Settings = getattr(config, spec.section)
    source = model_source(config)
    texts = rows.texts([*data.rows, *to_validate.rows])
    init_key = stage.key("init")
    language_model = initial.language_model(
        source, texts, init_key, is_policy=spec.is_policy, place=stage.placement
    )
    has_experts = any(getattr(language_model.model.config, "sparse_layers", ()))
    if settings.router_aux_coef is not None and not has_experts:
        raise UserError(f"{spec.section}.router_aux_coef: the model has no experts; leave it out")
    split_key, order_key = jax.random.split(stage.key("data"))
    encoded, train_rows, held_out = reading.encoded_rows(
        source, spec, settings, language_model, data, to_validate, split_key
    )
    layers = language_model.model.config.num_layers
    how = (stage.shares, stage.compute.share_prompts, spec, settings, source.text)
    chosen = batching.batched(*how, encoded, train_rows, order_key, layers)
    if chosen.encoded.num_answers > 1:
        shares = chosen.encoded.shares_prompts
        stage = stage.decided(shared_prompts.recorded(stage.compute, shares))
    rows_at_once = chosen.encoded.rows_of_arrays * settings.batch_size // settings.num_microbatches
    longest = int(chosen.encoded.longest.max())
    members = settings.ensemble_size if isinstance(settings, RewardModelStage) else 1
    sizes = (members * rows_at_once, longest, members)
    stage, language_model = remat.choose(stage, language_model, *sizes)
    return Setting(
        stage,
        settings,
        source,
        config.rl,
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


def first_state(task: Task) -> TrainState:
    """The state at step 0. The stage notes what else is on the devices."""
    stage = task.setting.stage
    reference = None if task.start.base else task.reference  # under LoRA it is the base
    stage.hold({"frozen weights": task.start.base, "reference": reference})
    create = partial(task.create, optimizer=task.setting.optimizer)
    state = stage.take(create, task.start.params)
    stage.hold({"moving reference": getattr(state, "reference", None)})
    return state


def _job(spec: TaskSpec, task: Task, on_step: loop.OnStep | None) -> loop.Job:
    """What the loop runs."""
    setting = task.setting
    stage = setting.stage
    settings = setting.settings
    update_key = stage.key("update")

    def advance(state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        batch = setting.batch(setting.rows_of(step))
        step_key = jax.random.fold_in(update_key, step)
        state, metrics = task.update(state, stage.shard(batch), step_key)
        if setting.source.text.pack:
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


def helping_sizes(spec: TaskSpec, settings: Settings, text: Text, shares: Shares) -> dict[str, int]:
    """The settings that help when memory runs out.

    Raises:
        UserError: a batch does not divide by devices or microbatches, or the stage cannot pack.
    """
    name = spec.section
    if text.pack and spec.pack is None:
        raise UserError(
            f"text.pack: {name} joins each prompt with the next row's answer and cannot pack; "
            "leave it out"
        )
    if text.pack and isinstance(settings, SFTStage) and settings.aggregate != "token":
        raise UserError(
            f"text.pack: {name}.aggregate must be token, got {settings.aggregate}, whose parts are "
            "whole rows"
        )
    microbatches = {f"{name}.num_microbatches": settings.num_microbatches}
    batch_size = {f"{name}.batch_size": settings.batch_size}
    sharers = layout.sharers(shares, microbatches)
    layout.check_divides(f"{name}.batch_size", settings.batch_size, sharers, microbatches)
    return microbatches | batch_size
