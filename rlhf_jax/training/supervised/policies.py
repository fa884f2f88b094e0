"""What SFT, DPO and KTO share: a policy that learns from texts, and is asked at validations."""

from functools import partial, reduce
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax import losses, models, ops
from rlhf_jax.config import Answering
from rlhf_jax.policies import as_policy
from rlhf_jax.runs import processes
from rlhf_jax.training.common import initial, memory
from rlhf_jax.training.common.optimizer import check_frozen
from rlhf_jax.training.common.progress import TRAIN, Validation, in_order
from rlhf_jax.training.supervised.job import Job, Learner
from rlhf_jax.training.supervised.scoring import evenly, num_rows
from rlhf_jax.types import LossMetrics, Mean, Metrics, Params, PolicyFn, TrainState


def prepare(job: Job, algorithm: ModuleType, config: Any, validation_config: Any = None) -> Learner:
    """A policy that is trained by ``algorithm.update`` and validated by ``algorithm.loss``.

    Args:
        algorithm: sft, dpo or kto. With ``config.needs_reference`` its batches get log-probs of a
            reference: the policy before training, or one that moves.
        validation_config: of the validations; None: ``config``.
    """
    settings = job.settings
    assert isinstance(settings, Answering)
    on = job.run.layout
    model = job.language_model.model
    policy_fn = models.policy_fn(model, num_answers=job.num_answers, one_text=job.one_text)
    init_key = jax.random.fold_in(job.run.key("init"), 1)
    split = partial(initial.trainable, job.run.config.lora)
    start = on.make(split, job.language_model.params, init_key).put(on)
    check_frozen(job.run.name, settings.optimizer, start.params)
    reference = None
    create = TrainState.create
    if not config.needs_reference:
        memory.free(start.loaded)
    else:
        # A packed row holds both answers of a pair.
        rows = settings.batch_size * (2 if job.one_text else 1)
        compute = job.run.config.compute
        scored = ops.by_rows(policy_fn, memory.score_rows(compute, rows, config))
        reference = initial.reference_of(on, compute, start, scored, job.moving is not None)
    if job.moving is not None:
        from rlhf_jax.training.common import references

        create = references.Followed.create

    def add_reference(state: Any, batch: Any, ref_fn: Any) -> Any:
        if ref_fn is None:
            return batch
        if job.moving is not None:
            ref_fn = as_policy(ref_fn).bind(state.reference)
        return algorithm.with_reference(batch, ref_fn)

    def update(
        state: TrainState, batch: Any, key: Array, *, policy_fn: Any, ref_fn: Any
    ) -> tuple[TrainState, Metrics]:
        updated: tuple[TrainState, Metrics] = algorithm.update(
            state,
            add_reference(state, batch, ref_fn),
            key,
            policy_fn=policy_fn,
            optimizer=job.optimizer,
            config=config,
            minibatch_sharding=on.rows,
        )
        return updated

    def measure(state: TrainState, batch: Any, *, policy_fn: Any, ref_fn: Any) -> LossMetrics:
        batch = add_reference(state, batch, ref_fn)
        policy_fn = ops.by_rows(policy_fn, None)
        _, metrics = algorithm.loss(
            state.params, batch, None, policy_fn=policy_fn, config=validation_config or config
        )
        if ref_fn is None or job.moving is not None:
            return metrics
        return metrics | {f"{job.run.name}/moved": moved(state.params, batch, policy_fn)}

    answer = None
    if settings.validation_prompts and job.rows:  # a plan has none
        from rlhf_jax.training.supervised import samples

        shown = job.held_out
        if not len(shown):  # many have equal prompts or leave no room
            most = 16 * settings.validation_prompts
            shown = job.train_rows[evenly(len(job.train_rows), most)]
        tokenizer = job.language_model.tokenizer
        room = model.config.max_length - settings.max_new_tokens
        is_plain = job.rows[0].is_plain_text
        asked = samples.questions(job.encoded, shown, tokenizer, settings, room, is_plain)
        if not len(job.held_out):
            asked = [question._replace(shown=question.shown | TRAIN) for question in asked]
        policy = samples.Policy(job.language_model, start, policy_fn, reference, job.num_answers)
        answer = samples.answerer(job.run, settings, asked, policy)
    # Both functions travel through jit as arguments.
    bound = {"policy_fn": start.bind(policy_fn), "ref_fn": reference}
    return Learner(
        start,
        create,
        partial(on.jit_update(update, model.config.num_blocks), **bound),
        partial(on.jit(measure), **bound),
        policy_fn,
        reference,
        answer,
    )


def moved(params: Params, batch: Any, policy_fn: PolicyFn) -> Mean:
    """How far the policy is from its reference: the mean over the present answers of the absolute
    value of log p - log p_reference, in nats an answer.

    Args:
        batch: as ``dpo.with_reference`` gives it.
    """
    log_ratios = ops.response_log_probs(policy_fn, params, batch) - batch.ref_log_probs
    present = ops.response_sums(jnp.ones_like(batch.tokens), batch) > 0
    return losses.weighted_mean(jnp.abs(log_ratios), ops.float32(present))


def validate(
    job: Job,
    learner: Learner,
    state: TrainState,
    margin_of: tuple[str, str] | None = None,
    **judges: float,
) -> Validation:
    """The metrics of all held-out rows, each as one mean, and answers to some of their prompts.

    Args:
        margin_of: the metrics whose difference is ``log_ratio_margin``, if there are rows of both.
        judges: {name: figure} of judges of the held-out rows that need no model.
    """
    found: list[Any] = []  # the metrics of each batch, each a mean or a maximum
    for rows in in_order(job.held_out, job.settings.batch_size):
        of_batch = learner.measure(state, job.run.layout.shard(job.batch(rows)))
        # At once: several devices of a CPU stand for ever when dozens of programs wait.
        found.append(processes.fetch(of_batch))
    totals: dict[str, Any] = {}
    for name in found[0]:
        total = reduce(lambda one, other: one.merge(other), [metrics[name] for metrics in found])
        totals[name.partition("/")[2]] = total
    figures = {name: float(total.value) for name, total in totals.items()}
    if margin_of is not None and all(totals[name].count > 0 for name in margin_of):
        better, worse = (figures[name] for name in margin_of)
        figures["log_ratio_margin"] = better - worse
    figures |= judges | {"rows": num_rows(job.encoded, job.held_out)}
    if "moved" in figures:
        figures["planned_steps"] = job.num_steps
    metrics = {f"validation/{name}": value for name, value in figures.items()}
    return Validation(metrics, learner.answer(state) if learner.answer else ())
