"""Reinforcement learning as a run: the loop of ``experiments/ppo_loop.py``, with what a command
offers around it.

A step samples responses to prompts, scores them, shapes the scores into rewards and learns from
them by the update of the algorithm. Each part is a pure function of ``iteration``, compiled by
itself (``programs.compiled``), so that a reward or an environment may be ordinary Python. The KL
penalty, which ``method.penalty_of`` chooses, is applied in ``iteration.learn``. ``job.open_job``
reads the settings and loads what the loop uses.
"""

import collections
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from rlhf_jax import iteration, models
from rlhf_jax.algorithms import ppo
from rlhf_jax.config import RunConfig
from rlhf_jax.errors import UserError, logger
from rlhf_jax.iteration import LoopState
from rlhf_jax.runs import processes
from rlhf_jax.training.common import initial, memory, references
from rlhf_jax.training.common.progress import Progress
from rlhf_jax.training.common.saving import RunResult, finish
from rlhf_jax.training.rl.job import Job, open_job
from rlhf_jax.training.rl.method import check_optimizer_steps, optimizer_steps
from rlhf_jax.training.rl.programs import Sizes, first_state, policy_of
from rlhf_jax.training.rl.sample import sample
from rlhf_jax.training.rl.schedule import Batch
from rlhf_jax.training.rl.score import score, unfit_scores
from rlhf_jax.training.rl.validation import training_samples, validate
from rlhf_jax.types import Algorithm, AlgorithmConfig, Metrics, Rollout

OnStep = Callable[[int, LoopState, Mapping[str, float], Rollout], object]
SHOWN = (
    "objective/score",
    "distill/divergence",
    "objective/kl",
    "kl/coef",
    "response/length",
    "validation/score",
    "validation/judge",
)


def run(
    config: RunConfig,
    algorithm: Algorithm = ppo,
    algorithm_config: AlgorithmConfig | None = None,
    *,
    reward: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    policy: models.Model | None = None,
    data: initial.Rows = None,
    validation_data: initial.Rows = None,
    on_step: OnStep | None = None,
) -> RunResult:
    """Trains the policy in ``config.model`` and saves ``model/`` in the run folder.

    Args:
        algorithm: the module ``vpg``, ``ppo``, ``rloo`` or ``grpo``, or one of your own
            (``types.Algorithm``); the run is named after it.
        algorithm_config: takes the place of the section of ``config``, whose changed values are
            named as not used. None: that section, or for an algorithm of your own its
            ``Config()``.
        reward: takes the place of ``config.reward``: a RewardFn of a rollout, which is traced; a
            HostReward of (rollout, columns); a function of texts, as ``rewards.from_text`` takes
            it; or a ``graders.spec.Reward``.
        optimizer: takes the place of ``rl.optimizer``, its schedule and clipping included; the
            schedule counts optimizer steps, ``num_epochs * num_minibatches`` of an iteration. A
            value model, or a value head with a rate or a warm-up of its own, keeps
            ``rl.optimizer``.
        policy: takes the place of ``config.model`` and ``config.network``: a network of your own
            (``own.from_functions``). ``model/`` gets its parameters and tokenizer, which are no
            Hugging Face folder.
        data, validation_data: prompts in place of files, as rows of ``training.sft.run``.
        on_step: ``on_step(step, state, metrics, rollout)`` after each step: the ``LoopState`` after
            step number ``step`` (the first is 1), its row of metrics.jsonl as numbers, and the
            scored rollout that it learned from. If it returns True the run ends there, as early
            stopping ends it: validated and saved, without an error. The next step gives the arrays
            of ``state`` up: copy what is kept. Several processes must return the same.

    Raises:
        UserError: for whatever is wrong with the data, the models' folders, the run folder or the
            settings.
        TrainingFault: a reward or an update that is not finite.
    """
    data_rows = (data, validation_data)
    with open_job(
        config, algorithm, algorithm_config, reward, optimizer, policy, *data_rows
    ) as job:
        settings = job.method.settings
        learn_key = job.run.key("update")
        progress = Progress(
            job.run,
            _state_of(job),
            num_steps=settings.num_iterations,
            validate=None if job.held_out is None else partial(validate, job),
            validation_interval=settings.validation_interval,
            show=SHOWN,
            optimizer=settings.optimizer,
            monitor="max:validation/score",
        )
        with progress:
            if progress.has_steps:
                check_memory(job, progress.state)
            progress.begin(adopt=partial(adopt_coefficient, job))
            counted = None
            if job.given.algorithm is not None and job.method.counts_steps:
                counted = optimizer_steps(progress.state)
            for step in progress.steps():
                state = progress.state
                if settings.reference_moves and references.is_due(settings, step):
                    moved = job.move_reference(state.reference, iteration.policy(state))
                    state = replace(state, reference=moved)
                if job.ahead is not None:  # the policy of now samples the next rollout
                    behind = job.ahead.start(job, state, step)

                rows = job.schedule.rows(step - 1)
                if job.programs.choose is not None:
                    rows = choose_rows(job, state, step)
                prompts, *spares = job.schedule.batches(step - 1, rows)
                rollout, metrics = collect(job, state, prompts)
                arguments = partial(_update_arguments, job, jax.random.fold_in(learn_key, step - 1))
                unread: list[Rollout] = []
                if settings.dynamic_sampling:
                    from rlhf_jax.training.rl.dynamic import replace_uninformative

                    fresh = (collect(job, state, spare)[0] for spare in spares)
                    filled = replace_uninformative(job, state, rollout, fresh, arguments)
                    rollout, replaced, unread = filled
                    metrics |= replaced

                state, learned = job.programs.learn(state, *arguments(rollout))
                while unread:
                    state, _ = job.programs.observe(state, unread.pop(0))
                if job.ahead is not None:
                    state = replace(state, behind=behind)

                progress.record(  # raises if the update of the step before was not finite
                    state,
                    metrics | learned,
                    sources=partial(job.schedule.sources, rows),
                    cause=unfit_scores(job, rollout),
                    examples=dict(collections.ChainMap(*map(dict, job.inputs.reward.examples))),
                )
                is_due = step % settings.validation_interval == 0
                if job.held_out is None and (is_due or step in (1, settings.num_iterations)):
                    progress.tracker.samples(step, training_samples(job, rollout))
                if counted is not None:  # the first step of this process
                    check_optimizer_steps(job.method, state, counted, learned)
                    counted = None
                progress.settle(on_step, rollout)
                del rollout  # before the next one is sampled
            state, row = progress.result()
        return _save(job, state, row)


def collect(job: Job, state: LoopState, prompts: Batch) -> tuple[Rollout, Metrics]:
    """Responses to the prompts, with scores, the log-probs of the update's own forward pass, those
    of the reference and the values; and metrics of all that.
    """
    if job.ahead is None:
        sampled, sampling_metrics = sample(job, state, prompts)
    else:
        sampled, sampling_metrics = job.ahead.sample(job, state, prompts)
    rollout, metrics = job.programs.rescored(state, sampled, job.networks.functions)
    if job.client is not None:
        metrics |= job.client.compare(state, sampled, rollout)
    scored = score(job, rollout, prompts)
    rollout = scored.rollout
    metrics = metrics | sampling_metrics | scored.metrics
    if job.method.algorithm_config.baseline == "greedy":  # a setting of vpg
        from rlhf_jax.training.rl.greedy import add_greedy_baseline

        rollout, baseline = add_greedy_baseline(job, state, prompts, rollout)
        metrics |= baseline
    return rollout, metrics


def choose_rows(job: Job, state: LoopState, step: int) -> np.ndarray:
    """The rows of a step's prompts that the algorithm chooses, as ``schedule.rows`` has them.

    Raises:
        UserError: one of them is no prompt to train on.
    """
    assert job.programs.choose is not None
    key = jax.random.fold_in(job.run.key("choice"), step - 1)
    train_rows = job.schedule.train_rows
    chosen = np.asarray(processes.fetch(job.programs.choose(state.train, key, rows=train_rows)))
    others = np.setdiff1d(chosen, train_rows)
    if len(others):
        raise UserError(f"{job.run.name}.choose: data row {others[0]} is no prompt to train on")
    return chosen.reshape(job.schedule.samplings, -1)


def _update_arguments(job: Job, key: jax.Array, rollout: Rollout) -> tuple[Rollout, jax.Array, Any]:
    """The arguments of the update. It reads the extras that it declares and no others, so that it
    has one program whatever the reward is made of.

    Raises:
        UserError: one of them is missing, or is not of rows or of tokens as it says.
    """
    given = rollout.extras or {}
    wanted = job.method.algorithm_config.extras
    for name, kind in wanted.items():
        if name not in given or given[name].ndim != ("row", "token").index(kind) + 1:
            found = [f"{key} (of each {('row', 'token')[x.ndim - 1]})" for key, x in given.items()]
            raise UserError(
                f"{job.run.name} reads {name} of each {kind}, a component of the "
                "reward (of several entries each is one, such as A 'B*0') or an extra of the "
                f"environment; there are {', '.join(found) or 'none'}"
            )
    extras = {name: given[name] for name in wanted} or None
    rollout = replace(rollout, group_ids=None, extras=extras)
    return rollout, key, job.networks.functions


def check_memory(job: Job, state: LoopState) -> None:
    """Compiles the programs of a step on the widest batch, and compares their memory with what is
    free. Nothing runs.

    Raises:
        memory.TooLarge: a program needs more.
    """
    logger.info("compiling; the first steps take longest")
    rollout, _ = collect(job.rehearsal(), state, job.schedule.widest())
    arguments = _update_arguments(job, job.run.key("update"), rollout)
    memory.check("learn", job.programs.learn, state, *arguments)


def adopt_coefficient(job: Job, state: LoopState, saved: Mapping[str, Any]) -> LoopState:
    """A restored state with the KL coefficient of the settings, which may have changed; the one
    that the state has adapted stays.

    Args:
        saved: the settings with which the state was saved.
    """
    settings = job.method.settings
    before = saved.get("rl", {}).get("kl_coef", settings.kl_coef)
    if settings.kl_target is not None and before == settings.kl_coef:
        return state
    coef = jax.device_put(np.float32(job.method.penalty.init), state.kl_coef.sharding)
    return replace(state, kl_coef=coef)


def _state_of(job: Job) -> LoopState:
    """The state at step 0, of which ``_save`` can save a model."""
    settings = job.method.settings
    columns = job.schedule.widest().prompts.tokens.shape[1] + settings.max_new_tokens
    sizes = Sizes(settings.batch_size, columns, len(job.inputs.prompts))
    state = first_state(job.run, job.method, job.networks, sizes)
    policy_of(state.train.params, job.networks.start.params)
    return state


def _save(job: Job, state: LoopState, row: dict[str, float]) -> RunResult:
    """Saves the policy: ``model/``, and ``adapter/`` under LoRA."""
    start = job.networks.start
    save = {}
    if job.given.policy is not None:
        from rlhf_jax.training.common import own

        save = {"save": own.save}
    return finish(
        job.run,
        job.sources.model,
        job.inputs.initial,
        start,
        {"": policy_of(state.train.params, start.params)},
        row,
        how=initial.sampling_config(job.method.settings, job.inputs.initial.tokenizer),
        **save,
    )
