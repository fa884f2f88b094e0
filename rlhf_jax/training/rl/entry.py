"""Reinforcement learning as a run: prompts, a policy and a reward in, a better policy out.

A step is sample -> score -> learn. ``build`` composes it from the small functions of
``training.rl.steps``.
"""

import collections
import math
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from rlhf_jax import engines, iteration, models
from rlhf_jax.algorithms import ppo
from rlhf_jax.config import (
    ALGORITHMS,
    RLStage,
    RunConfig,
    Text,
    data_source,
    for_algorithm,
    model_source,
    section_name,
)
from rlhf_jax.data import batches, encoding
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.generation import stops
from rlhf_jax.generation.environment import Environment, converse, function_of
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders import spec
from rlhf_jax.parallel import sharding
from rlhf_jax.sampling import decoding
from rlhf_jax.training.common import initial, loop, memory, own, references, remat
from rlhf_jax.training.common.opening import open_stage, run_folder
from rlhf_jax.training.common.saving import RunResult, finish
from rlhf_jax.training.common.setup import set_up, shares_of
from rlhf_jax.training.common.stage import Stage
from rlhf_jax.training.rl import answers, critic, sharing, steps, teacher
from rlhf_jax.training.rl.ahead import Ahead, one_at_a_time
from rlhf_jax.training.rl.engine import Client, silent
from rlhf_jax.training.rl.method import (
    NOTHING,
    CompleteAlgorithm,
    Given,
    Method,
    check_settings,
    completed,
    is_rewarded,
    lasting,
    penalty_of,
)
from rlhf_jax.training.rl.parts import Parts, Sources, files, load, read_prompts
from rlhf_jax.training.rl.programs import (
    Networks,
    Programs,
    Sizes,
    compiled,
    first_state,
    networks_of,
)
from rlhf_jax.training.rl.schedule import Batch, Schedule
from rlhf_jax.training.rl.steps import Draw, Responder, Sampler, Scorer, Talk
from rlhf_jax.types import Algorithm, AlgorithmConfig, Params, Rollout

SHOWN = (
    "objective/score",
    "distill/divergence",
    "objective/kl",
    "kl/coef",
    "response/length",
    "validation/score",
)


def run(
    config: RunConfig,
    algorithm: Algorithm = ppo,
    algorithm_config: AlgorithmConfig | None = None,
    *,
    reward: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    policy: models.Model | None = None,
    on_step: steps.OnStep | None = None,
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
    complete = completed(algorithm)
    name = section_name(algorithm)
    config, algorithm_config = for_algorithm(config, algorithm, algorithm_config)
    critic.check(name, algorithm_config, complete.needs_values)
    given = _given(algorithm, reward, optimizer, policy)
    config = _without_what_is_given(config, given)
    config = set_up(config, [run_folder(config, name)])
    settings = config.rl
    if optimizer is None:
        initial.warn_of_rate(model_source(config), "rl", settings.optimizer)
    helping_sizes = check_settings(name, settings, algorithm_config, shares_of(config))
    method = method_of(config, complete, algorithm_config, given)
    reply = function_of(settings.environment, "rl.environment")
    prompts = read_prompts(data_source(config), settings)
    drops = config.on_bad_row == "drop"
    mathematics, data = answers.tested(config.reward, config.math, prompts, drops=drops)
    config = replace(config, math=mathematics)
    fingerprints = {source: digest for part in data for source, digest in part.fingerprints.items()}
    sources = sources_of(config)
    read = files(sources, settings, algorithm_config)
    with (
        open_stage(config, name, fingerprints, helping_sizes, read, given._asdict()) as stage,
        engines.opened(settings.engine, config.engine, stage.run.weights) as engine,
        ThreadPoolExecutor(1) as thread,
    ):
        rows = [part.rows for part in data]
        parts = load(stage, method, sources, given, rows, reply, config.engine)
        stage, method = _with_sharing(stage, name, method, parts)
        stage, parts = _with_remat(stage, method, parts)
        multiple = _multiple(parts, config.text)
        planned = _prompts(stage, method, parts, multiple)
        stage, method = lasting(stage, method, len(planned[0].train_rows))
        source = None
        if method.value_source is not None:
            source = critic.load(method.value_source, stage.compute, parts.initial, stage.placement)
        networks = networks_of(stage, parts.initial, method, source, parts.teacher)
        programs = compiled(stage, parts.initial, method, networks.optimizer)
        client = None
        if engine is not None:
            client = _client(engine, config, stage, parts.initial, networks)
        job = build(stage, method, parts, planned, networks, programs, client, thread, on_step)
        first = first_state(stage, method, networks, _sizes(settings, parts, planned[0]))
        state, row = loop.train(stage, _checked(first, networks), job)
        trained = _policy_of(state.train.params, networks.start.params)
        save = LanguageModel.save if policy is None else own.save
        how = initial.sampling_config(settings, parts.initial.tokenizer)
        ended = (parts.initial, networks.start, {"": trained}, row)
        return finish(stage, sources.model, *ended, how=how, save=save)


def _client(
    engine: engines.Engine,
    config: RunConfig,
    stage: Stage,
    policy: LanguageModel,
    networks: Networks,
) -> Client:
    """What the run asks of its engine."""
    return Client(
        engine,
        config.engine,
        config.rl.engine_check,
        stage.run.engine,
        policy,
        networks.start,
        config.model,
    )


def _given(
    algorithm: Algorithm,
    reward: Any,
    optimizer: optax.GradientTransformation | None,
    policy: models.Model | None,
) -> Given:
    """What takes the place of settings; an algorithm of the package does not."""
    is_own = section_name(algorithm) not in ALGORITHMS
    return Given(
        algorithm if is_own else None,
        None if reward is None else spec.given(reward),
        optimizer,
        policy,
    )


def _without_what_is_given(config: RunConfig, given: Given) -> RunConfig:
    """The settings without those that ``given`` replaces.

    Raises:
        UserError: the settings name what a policy or an optimizer from Python does not read.
    """
    settings = config.rl
    if given.policy is not None:
        own.check_settings(model_source(config), config.mesh)
        if settings.engine is not None:
            raise UserError("rl.engine: a server loads no network that Python gives; leave it out")
    if given.optimizer is not None and settings.optimizer.schedule == "plateau":
        raise UserError(
            "rl.optimizer.schedule: plateau cannot lower the rate of an optimizer that Python "
            "gives; choose another schedule"
        )
    if given.reward is None:
        return config
    return replace(config, reward=())


def sources_of(config: RunConfig) -> Sources:
    """What a run loads beside its prompts."""
    return Sources(model_source(config), config.reward, config.safety, config.judge, config.math)


def method_of(
    config: RunConfig,
    algorithm: CompleteAlgorithm,
    algorithm_config: AlgorithmConfig,
    given: Given = NOTHING,
) -> Method:
    """How the policy of a run learns."""
    settings = config.rl
    source = None
    if algorithm.needs_values:
        source = critic.source_of(config.reward, algorithm_config)
    return Method(
        algorithm,
        algorithm_config,
        settings,
        penalty=penalty_of(model_source(config), settings, algorithm, algorithm_config),
        score_rows=memory.score_rows(config.compute, settings.batch_size, algorithm_config),
        optimizer=given.optimizer,
        is_rewarded=is_rewarded(config.reward, settings, algorithm_config, given),
        value_source=source,
    )


def _with_sharing(stage: Stage, name: str, method: Method, parts: Parts) -> tuple[Stage, Method]:
    """Stage and method with ``compute.share_prompts`` chosen by the work that it saves."""
    of_prompts = sharing.Answers(
        name,
        method.config,
        method.settings,
        stage.compute.share_prompts,
        prompt=parts.prompts.tokens.shape[1],
        takes_groups=parts.initial.model.takes_groups,
        shares=stage.shares,
    )
    compute, size = sharing.decided(stage.compute, of_prompts)
    return stage.decided(compute), method._replace(shared_by=size)


def _checked(state: iteration.LoopState, networks: Networks) -> iteration.LoopState:
    """The state, of which ``_policy_of`` can save a model."""
    _policy_of(state.train.params, networks.start.params)
    return state


def _policy_of(params: Params, initial: Params) -> Params:
    """The policy's parameters among the trained ones, without the value head and without those that
    an algorithm adds, which are in the checkpoints alone.

    Args:
        initial: the policy's, before the algorithm made its state of them.

    Raises:
        UserError: the algorithm changed their structure, so that no model could be saved.
    """
    own = models.policy_params(params)
    policy: Params = {part: own.get(part) for part in initial if part != "value"}
    before = {part: leaves for part, leaves in initial.items() if part != "value"}
    if str(jax.tree.structure(policy)) != str(jax.tree.structure(before)):
        raise UserError(
            "the state of the algorithm has other parameters of the policy than it was given; it "
            "may add some under names of their own beside them"
        )
    return policy


def _with_remat(stage: Stage, method: Method, parts: Parts) -> tuple[Stage, Parts]:
    """Stage and parts with ``compute.remat`` chosen by the memory that an update needs."""
    settings = method.settings
    updates = method.config.num_minibatches * method.config.num_microbatches
    prompt = parts.prompts.tokens.shape[1]
    length = prompt + settings.max_new_tokens
    share = sharing.saved(prompt, settings.max_new_tokens, method.shared_by)
    rows = math.ceil(settings.batch_size // updates * (1 - share))
    networks = 1 + (method.config.value == "separate")
    stage, begun = remat.choose(stage, parts.initial, rows, length, networks)
    return stage, parts._replace(initial=begun)


# --- The run, composed


def build(
    stage: Stage,
    method: Method,
    parts: Parts,
    planned: tuple[Schedule, Batch | None],
    networks: Networks,
    programs: Programs,
    client: Client | None,
    thread: Executor,
    on_step: steps.OnStep | None,
) -> loop.Job:
    """What the loop runs: steps and validations.

    Args:
        planned: the prompts of each step and those of validations, as ``_prompts`` gives.
        client: of the engine that samples; None: the run's own programs sample.
        thread: an engine, or devices of their own, sample ahead in it.
    """
    settings = method.settings
    key = stage.key("update")
    schedule, to_validate = planned
    samples_apart = client is not None or stage.sampling_mesh is not None
    if not samples_apart:
        _hold_cache(stage, settings, parts, schedule)

    step = _step(stage, settings, parts, networks, programs, client)
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
        advance = ahead.advancing(advance, schedule, settings.length, stage.copy)
    advance = references.moving(advance, settings, iteration.policy)

    rehearsed = _rehearsed(programs, samples_apart)
    rehearsal = _step(stage, settings, parts.without_python(), networks, rehearsed, client=None)
    trial = _draw(method, rehearsal)
    check_memory = steps.checking(trial, programs.learn, networks, schedule, key, needs)
    return loop.Job(
        advance,
        settings.length,
        validate=_validator(stage, settings, parts, programs, step, to_validate),
        validation_interval=settings.validation_interval,
        show=SHOWN,
        sources=schedule.sources,
        optimizer=settings.optimizer,
        judged_by="max:validation/score",
        check_memory=check_memory,
        on_step=observe,
        examples=lambda: collections.ChainMap(*map(dict, parts.reward.examples)),
    )


def _validator(
    stage: Stage,
    settings: RLStage,
    parts: Parts,
    programs: Programs,
    step: "Step",
    prompts: Batch | None,
) -> Callable[..., Any] | None:
    """What validates on these prompts; None without any."""
    if prompts is None:
        return None
    judge = parts.judge and steps.scorer(stage, programs.reward, parts.judge)
    return steps.validator(
        stage,
        parts.initial,
        prompts,
        step.sample_for_each,
        step.score,
        judge,
        parts.pairs,
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
    parts: Parts,
    networks: Networks,
    programs: Programs,
    client: Client | None,
) -> Step:
    """The parts of a step, or with the parts and programs of a rehearsal those that its check of
    memory calls.
    """
    talk = _talk(settings, parts.environment, parts.initial.tokenizer)
    responders = _responders(stage, settings, parts, networks, programs, client)
    size = settings.batch_size
    samplers = [steps.sampler(stage, respond, talk, size) for respond in responders]
    sample, sample_for_each, sample_greedily = samplers
    if parts.ask_teacher is not None:
        sample = teacher.taught(stage, sample, parts.ask_teacher)
        sample_for_each = teacher.taught(stage, sample_for_each, parts.ask_teacher)
    rescore = steps.rescorer(programs.rescored, networks)
    return Step(
        sample,
        sample_for_each,
        sample_greedily,
        rescore=rescore if client is None else client.watched(rescore),
        score=steps.scorer(stage, programs.reward, parts.reward, parts.guard),
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
    parts: Parts,
    networks: Networks,
    programs: Programs,
    client: Client | None,
) -> list[Responder]:
    """Where responses to groups of equal prompts, responses to single ones and greedy responses
    come from: the engine, or the run's own programs, on the devices that learn or on others.
    """
    if client is not None:
        tokenizer = parts.initial.tokenizer
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


def _multiple(parts: Parts, text: Text) -> int:
    """The multiple of columns to which prompts are padded."""
    layers = parts.initial.model.config.num_layers
    return initial.bucket_multiple(text, layers, parts.prompts.tokens.shape[1])


def _prompts(
    stage: Stage, method: Method, parts: Parts, multiple: int
) -> tuple[Schedule, Batch | None]:
    """The prompts of each step, and those of validations or None if none are held out."""
    settings = method.settings
    split_key, order_key = jax.random.split(stage.key("data"))
    fraction = 0.0 if settings.validation_data else settings.validation_fraction
    texts = list(map(encoding.group, parts.prompts.rows))
    train_rows, held_out = initial.hold_out("prompts", texts, fraction, split_key)
    if settings.validation_data:
        held_out = np.arange(len(parts.to_validate))
    schedule = Schedule(
        parts.prompts,
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
    prompts = batches.narrowed(parts.to_validate, chosen, multiple)
    each = np.repeat(chosen, settings.validation_samples)
    padded = loop.pad_rows(each, settings.batch_size)
    return schedule, Batch(prompts, padded, stage.key("eval"))


def _sizes(settings: RLStage, parts: Parts, schedule: Schedule) -> Sizes:
    """What the first state of an algorithm may be told."""
    columns = schedule.widest().prompts.tokens.shape[1] + settings.max_new_tokens
    return Sizes(settings.batch_size, columns, len(parts.prompts))


def _hold_cache(stage: Stage, settings: RLStage, parts: Parts, schedule: Schedule) -> None:
    """Records the sizes of reward models and of the sampler's cache, for errors of full memory."""
    # In a conversation each response is written behind the slots of the one before.
    slots = settings.max_new_tokens * (2 if parts.environment else 1)
    prompt = schedule.widest().prompts.tokens.shape[1]
    rows = settings.batch_size // stage.num_parts
    shared_by = 1 if parts.environment else schedule.shared_by
    model = parts.initial.model
    cache = jax.eval_shape(lambda: decoding.cache_of(model, rows, prompt, slots, shared_by))
    stage.hold({"rewards": parts.reward.fn, "cache while it samples": cache})
