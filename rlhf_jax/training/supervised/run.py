"""The loop of SFT, reward models, DPO and KTO: labelled texts in, a model out."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import Reference, RunConfig, SFTStage, Text, data_source, model_source
from rlhf_jax.data import encoding, formats
from rlhf_jax.data.formats import ReadResult
from rlhf_jax.data.rows import texts
from rlhf_jax.errors import UserError, logger
from rlhf_jax.training.common import initial, layout, memory, rates, remat
from rlhf_jax.training.common.layout import Layout, layout_of
from rlhf_jax.training.common.opening import OpenRun, open_run, run_folder
from rlhf_jax.training.common.optimizer import make_optimizer
from rlhf_jax.training.common.progress import Progress, Row
from rlhf_jax.training.common.saving import RunResult, finish
from rlhf_jax.training.common.setup import set_up
from rlhf_jax.training.supervised import batching, reading
from rlhf_jax.training.supervised.job import Job, Learner, Settings, Task
from rlhf_jax.types import TrainState


def run(
    config: RunConfig,
    task: Task,
    on_step: Callable[[int, TrainState, Row], object] | None = None,
    *,
    data: initial.Rows = None,
    validation_data: initial.Rows = None,
) -> RunResult:
    """Trains on the rows of the section's own data or ``config.data`` and saves ``model/`` in the
    run folder.

    Args:
        on_step: ``(step, state after it, its row of metrics)``, as in ``Progress.settle``.
        data, validation_data: rows of Python, as of ``sft.run``.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the
            settings.
    """
    config = set_up(config, [run_folder(config, task.section)])
    settings: Settings = getattr(config, task.section)
    if config.lora.rank or (isinstance(settings, Reference) and settings.reference_moves):
        from rlhf_jax.training.common import references

        references.check(model_source(config), settings)
    sizes = check_sizes(task, settings, config.text, layout_of(config))
    parts, given = initial.stage_data(config.data, settings, data, validation_data)
    to_train, to_validate = reading.read(data_source(config), task, settings, parts)
    fingerprints = to_train.fingerprints | to_validate.fingerprints
    with open_run(config, task.section, fingerprints, sizes, given=given) as opened:
        job = open_job(opened, task, to_train, to_validate)
        on = job.run.layout
        initial.warn_of_warmup(task.section, settings.optimizer, job.num_steps)
        learner = task.prepare(job)
        training = job
        if job.num_members > 1:
            from rlhf_jax.training.supervised import ensembles

            training = ensembles.draw(job)  # each member's own draw of the rows
        if job.moving is not None:
            from rlhf_jax.training.common import references

            move = references.mover(job.moving)
        update_key = job.run.key("update")
        with Progress(
            job.run,
            first_state(job, learner),
            num_steps=job.num_steps,
            validate=partial(task.validate, job, learner) if len(job.held_out) else None,
            sample=learner.answer,
            validation_interval=settings.validation_interval,
            show=task.show,
            optimizer=settings.optimizer,
        ) as progress:
            if progress.has_steps:
                check_memory(training, learner, progress.state, update_key)
            progress.begin()
            for step in progress.steps():
                state = progress.state
                if job.moving is not None and references.is_due(job.moving, step):
                    state = replace(state, reference=move(state.reference, state.params))
                rows = job.step_rows(step)
                batch = training.batch(rows)
                step_key = jax.random.fold_in(update_key, step - 1)
                state, metrics = learner.update(state, on.shard(batch), step_key)
                if config.text.pack:
                    padding = np.mean(batch.attention_mask == 0)
                    metrics = metrics | {f"{task.section}/padding": jnp.float32(padding)}
                progress.record(state, metrics, sources=partial(job.sources, rows))
                progress.settle(on_step)
            state, row = progress.result()
        how = None
        if not job.language_model.tokenizer.generation:
            how = initial.sampling_config(config.rl, job.language_model.tokenizer)
        trained = task.finish(job, learner, state)
        of_model = (job.source, job.language_model, learner.start)
        return finish(job.run, *of_model, trained, row, how=how, save=task.save(job))


def check_memory(job: Job, learner: Learner, state: TrainState, key: jax.Array) -> None:
    """Compiles the update of the largest batch, and compares its memory with what is free.

    Raises:
        memory.TooLarge: it needs more.
    """
    logger.info("compiling; the first steps take longest")
    batch = job.run.layout.shard(job.largest_batch())
    memory.check("learn", learner.update, state, batch, key)


def check_sizes(task: Task, settings: Settings, text: Text, on: Layout) -> dict[str, int]:
    """The settings that help when memory runs out.

    Raises:
        UserError: a batch does not divide by devices or microbatches, or the stage cannot pack.
    """
    name = task.section
    if text.pack and task.pack is None:
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
    sharers = layout.sharers(on, microbatches)
    layout.check_divides(f"{name}.batch_size", settings.batch_size, sharers, microbatches)
    return microbatches | {f"{name}.batch_size": settings.batch_size}


def open_job(run: OpenRun, task: Task, data: ReadResult, to_validate: ReadResult) -> Job:
    """The model, and the rows as token ids in batches."""
    settings: Settings = getattr(run.config, task.section)
    source = model_source(run.config)
    language_model = initial.language_model(
        source,
        texts([*data.rows, *to_validate.rows]),
        run.key("init"),
        is_policy=task.is_policy,
        place=run.layout.placement,
    )
    has_experts = any(getattr(language_model.model.config, "sparse_layers", ()))
    if settings.router_aux_coef is not None and not has_experts:
        raise UserError(f"{task.section}.router_aux_coef: the model has no experts; leave it out")
    split_key, order_key = jax.random.split(run.key("data"))
    encoded, train_rows, held_out = reading.encoded_rows(
        source, task, settings, language_model, data, to_validate, split_key
    )
    dropped, cut = encoding.dropped_and_cut(encoded.counts)
    run.count_rows(formats.account([data, to_validate], dropped, cut))
    form = partial(
        batching.form_batches,
        task=task,
        settings=settings,
        text=source.text,
        num_parts=layout.row_parts(run.layout, settings.num_microbatches),
        rows=train_rows,
        key=order_key,
        layers=language_model.model.config.num_layers,
    )
    chosen = batching.choose_form(run.config.compute.share_prompts, encoded, form)
    encoded = chosen.encoded
    if encoded.num_answers > 1:
        compute = replace(run.config.compute, share_prompts=encoded.shares_prompts)
        run = run.decide(compute=compute)
    rows_at_once = encoded.rows_of_arrays * settings.batch_size // settings.num_microbatches
    members = getattr(settings, "ensemble_size", 1)
    run, language_model = remat.choose(
        run, language_model, members * rows_at_once, int(encoded.longest.max()), members
    )
    num_steps = settings.max_steps or settings.num_epochs * chosen.plan.steps_per_epoch
    size = rates.size_of(source.lora, language_model.params)
    optimizer = rates.with_rate(task.section, settings.optimizer, size)
    settings = replace(settings, optimizer=optimizer)
    run = run.decide(**{task.section: settings})
    return Job(
        run,
        settings,
        source,
        language_model,
        data.rows,
        encoded,
        train_rows,
        held_out,
        chosen.plan,
        chosen.collate,
        chosen.bucket_multiple,
        num_steps,
        make_optimizer(optimizer, num_steps),
        reading.left_out(task.section, settings.without_rows, encoded, held_out),
    )


def first_state(job: Job, learner: Learner) -> TrainState:
    """The state at step 0. The run notes what is on the devices."""
    base = learner.start.base
    # Under LoRA the reference is the base.
    job.run.hold({"frozen weights": base, "reference": None if base else learner.reference})
    create = partial(learner.create, optimizer=job.optimizer)
    state = job.run.layout.create(create, learner.start.params)
    job.run.hold(memory.state_parts(state))
    job.run.hold({"moving reference": getattr(state, "reference", None)})
    return state
