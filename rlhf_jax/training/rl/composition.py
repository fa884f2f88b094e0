"""The steps and the validations of an RL run, composed of the small functions of
``training.rl.steps``: sample -> score -> learn.
"""

import collections
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import iteration
from rlhf_jax.config import (
    RLStage,
    Text,
)
from rlhf_jax.data import batches, encoding
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.generation import stops
from rlhf_jax.generation.environment import Environment, converse
from rlhf_jax.parallel import sharding
from rlhf_jax.sampling import decoding
from rlhf_jax.training.common import initial, loop, memory, references
from rlhf_jax.training.common.stage import Stage
from rlhf_jax.training.rl import steps, teacher, validation
from rlhf_jax.training.rl.ahead import Ahead, one_at_a_time
from rlhf_jax.training.rl.engine import Client, silent
from rlhf_jax.training.rl.inputs import Inputs
from rlhf_jax.training.rl.method import (
    Method,
)
from rlhf_jax.training.rl.programs import Networks, Programs
from rlhf_jax.training.rl.schedule import Batch, Schedule
from rlhf_jax.training.rl.steps import Draw, Responder, Sampler, Scorer, Talk
from rlhf_jax.types import Rollout

SHOWN = (
    "objective/score",
    "distill/divergence",
    "objective/kl",
    "kl/coef",
    "response/length",
    "validation/score",
)


def build(
    stage: Stage,
    method: Method,
    inputs: Inputs,
    planned: tuple[Schedule, Batch | None],
    networks: Networks,
    programs: Programs,
    client: Client | None,
    thread: Executor,
    on_step: steps.OnStep | None,
) -> loop.Job:
    """What the loop runs: steps and validations.

    Args:
        planned: the prompts of each step and those of validations, as ``prompts_of`` gives.
        client: of the engine that samples; None: the run's own programs sample.
        thread: an engine, or devices of their own, sample ahead in it.
    """
    settings = method.settings
    key = stage.key("update")
    schedule, to_validate = planned
    samples_apart = client is not None or stage.sampling_mesh is not None
    if not samples_apart:
        _hold_cache(stage, settings, inputs, schedule)

    step = _step(stage, settings, inputs, networks, programs, client)
    draw = _draw(method, step)
    ahead: Ahead | None = None
    if settings.rollouts_ahead:
        ahead = Ahead(step.sample, thread if samples_apart else None)
        draw = _draw(method, step._replace(sample=ahead.sample))
    draw_step = steps.first_of(draw)
    if settings.dynamic_sampling:
        draw_step = steps.replace_uninformative(
            draw, schedule.num_prompts, programs.num_equal, programs.refill
        )
    observe = None
    if on_step is not None:
        draw_step, observe = steps.observed(draw_step, on_step)

    needs = method.config.needs_components
    learn = steps.learner(programs.learn, networks, needs)
    advance = steps.advancing(draw_step, learn, schedule, key)
    if method.optimizer is None and settings.optimizer.counts_steps:
        advance = steps.counting(advance, method.config.num_epochs * method.config.num_minibatches)
    if ahead is not None:
        advance = ahead.advancing(advance, schedule, settings.num_iterations, stage.copy)
    advance = references.moving(advance, settings, iteration.policy)

    rehearsed = _rehearsed(programs, samples_apart)
    rehearsal = _step(stage, settings, inputs.without_python(), networks, rehearsed, client=None)
    trial = _draw(method, rehearsal)
    check_memory = steps.checking(trial, programs.learn, networks, schedule, key, needs)
    return loop.Job(
        advance,
        settings.num_iterations,
        validate=_validator(stage, settings, inputs, programs, step, to_validate),
        validation_interval=settings.validation_interval,
        show=SHOWN,
        sources=schedule.sources,
        optimizer=settings.optimizer,
        monitor="max:validation/score",
        check_memory=check_memory,
        on_step=observe,
        adopt=functools.partial(_with_coefficient, method),
        examples=lambda: collections.ChainMap(*map(dict, inputs.reward.examples)),
    )


def _with_coefficient(
    method: Method, state: iteration.LoopState, saved: Mapping[str, Any]
) -> iteration.LoopState:
    """A restored state with the KL coefficient of the settings, which may have changed; the one
    that the state has adapted stays.
    """
    settings = method.settings
    before = saved.get("rl", {}).get("kl_coef", settings.kl_coef)
    if settings.kl_target is not None and before == settings.kl_coef:
        return state
    coef = jax.device_put(np.float32(method.penalty.init), state.kl_coef.sharding)
    return replace(state, kl_coef=coef)


def _validator(
    stage: Stage,
    settings: RLStage,
    inputs: Inputs,
    programs: Programs,
    step: "Step",
    prompts: Batch | None,
) -> Callable[..., Any] | None:
    """What validates on these prompts; None without any."""
    if prompts is None:
        return None
    judge = inputs.judge and steps.scorer(stage, programs.reward, inputs.judge)
    return validation.validator(
        stage,
        inputs.initial,
        prompts,
        step.sample_for_each,
        step.score,
        judge,
        inputs.pairs,
        num_shown=settings.show_examples,
    )


class Step(NamedTuple):
    """The functions of which the draw of a step is composed."""

    sample: Sampler
    sample_for_each: Sampler  # one response to each prompt, as validations have them
    sample_greedily: Sampler
    rescore: steps.Rescorer
    score: Scorer
    with_greedy: Callable[..., Rollout]


def _step(
    stage: Stage,
    settings: RLStage,
    inputs: Inputs,
    networks: Networks,
    programs: Programs,
    client: Client | None,
) -> Step:
    """The functions of a step, or with inputs and programs of a rehearsal those that its check of
    memory calls.
    """
    talk = _talk(settings, inputs.environment, inputs.initial.tokenizer)
    responders = _responders(stage, settings, inputs, networks, programs, client)
    size = settings.batch_size
    samplers = [steps.sampler(stage, respond, talk, size) for respond in responders]
    sample, sample_for_each, sample_greedily = samplers
    if inputs.ask_teacher is not None:
        sample = teacher.taught(stage, sample, inputs.ask_teacher)
        sample_for_each = teacher.taught(stage, sample_for_each, inputs.ask_teacher)
    rescore = steps.rescorer(programs.rescored, networks)
    return Step(
        sample,
        sample_for_each,
        sample_greedily,
        rescore=rescore if client is None else client.watched(rescore),
        score=steps.scorer(stage, programs.reward, inputs.reward, inputs.guard),
        with_greedy=programs.with_greedy,
    )


def _draw(method: Method, step: Step) -> Draw:
    """Responses of the policy, their log-probs and scores, with a greedy baseline if the method has
    one.
    """
    draw = steps.drawn(step.sample, step.rescore, step.score)
    if method.config.baseline != "greedy":
        return draw
    return steps.greedy_baseline(draw, step.sample_greedily, step.score, step.with_greedy)


def _responders(
    stage: Stage,
    settings: RLStage,
    inputs: Inputs,
    networks: Networks,
    programs: Programs,
    client: Client | None,
) -> list[Responder]:
    """Where responses to groups of equal prompts, responses to single ones and greedy responses
    come from: the engine, or the run's own programs, on the devices that learn or on others.
    """
    if client is not None:
        tokenizer = inputs.initial.tokenizer
        how = initial.sampling_config(settings, tokenizer)
        greedy = replace(how, temperature=0.0)
        validated = initial.validation_config(settings, tokenizer)
        return one_at_a_time(*map(client.responder, (how, validated, greedy)))
    mesh = stage.sampling_mesh
    samplers = (programs.respond, programs.respond_to_each, programs.respond_greedily)
    if mesh is None:
        return [steps.on_devices(stage, program, networks) for program in samplers]
    base = networks.start.base
    placed = None if base is None else sharding.replicate(mesh, base)
    return one_at_a_time(*(steps.apart(mesh, program, placed) for program in samplers))


def _talk(settings: RLStage, environment: Environment | None, tokenizer: Tokenizer) -> Talk:
    """Conversations with an environment, or single responses, that end at the stop strings."""

    def talk(respond: Callable[..., Rollout], *prompts: Any) -> Any:
        until = stops.stopping(respond, tokenizer, settings.stop, settings.stop_after)
        return converse(environment, until, *prompts)

    return talk


def _rehearsed(programs: Programs, samples_apart: bool) -> Programs:
    """The programs as a check of memory calls them: each is compiled and compared with the free
    memory, but for those that sample elsewhere.
    """
    named = zip(Programs._fields, programs, strict=True)
    rehearsed = Programs(*(memory.rehearsed(phase, program) for phase, program in named))
    if not samples_apart:
        return rehearsed
    return rehearsed._replace(
        respond=silent(programs.respond), respond_greedily=silent(programs.respond_greedily)
    )


def prompts_of(
    stage: Stage, method: Method, inputs: Inputs, text: Text
) -> tuple[Schedule, Batch | None]:
    """The prompts of each step, and those of validations or None if none are held out."""
    settings = method.settings
    layers = inputs.initial.model.config.num_layers
    multiple = initial.bucket_multiple(text, layers=layers, longest=inputs.prompts.tokens.shape[1])
    split_key, order_key = jax.random.split(stage.key("data"))
    fraction = 0.0 if settings.validation_data else settings.validation_fraction
    texts = list(map(encoding.group, inputs.prompts.rows))
    train_rows, held_out = initial.hold_out("prompts", texts, fraction, split_key)
    if settings.validation_data:
        held_out = np.arange(len(inputs.to_validate))
    schedule = Schedule(
        inputs.prompts,
        train_rows,
        num_prompts=settings.batch_size // method.config.group_size,
        group_size=method.config.group_size,
        samplings=1 + settings.dynamic_sampling,
        order_key=order_key,
        rollout_key=stage.key("rollout"),
        multiple=multiple,
        shared_by=method.shared_by,
    )
    if not len(held_out):
        return schedule, None
    chosen = held_out[: settings.validation_prompts]
    prompts = batches.narrowed(inputs.to_validate, chosen, multiple)
    each = np.repeat(chosen, settings.validation_samples)
    padded = loop.pad_rows(each, settings.batch_size)
    return schedule, Batch(prompts, padded, stage.key("eval"))


def _hold_cache(stage: Stage, settings: RLStage, inputs: Inputs, schedule: Schedule) -> None:
    """Records the sizes of reward models and of the sampler's cache, for errors of full memory."""
    # In a conversation each response is written behind the slots of the one before.
    slots = settings.max_new_tokens * (2 if inputs.environment else 1)
    prompt = schedule.widest().prompts.tokens.shape[1]
    rows = settings.batch_size // stage.num_parts
    shared_by = 1 if inputs.environment else schedule.shared_by
    model = inputs.initial.model
    cache = jax.eval_shape(
        lambda: decoding.cache_of(
            model, num_rows=rows, prompt_length=prompt, num_slots=slots, group_size=shared_by
        )
    )
    stage.hold({"rewards": inputs.reward.fn, "cache while it samples": cache})
