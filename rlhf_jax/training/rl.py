"""Reinforcement learning as a run: prompts, a policy and a reward in, a better policy out.

A step is sample -> score -> learn. ``build`` composes it from the small functions of
``training.steps``.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import engines, models, sharding
from rlhf_jax.algorithms import ppo
from rlhf_jax.config import ALGORITHMS, RLStage, RunConfig, for_algorithm, section_name
from rlhf_jax.data import batches, formats, stops
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.data.environment import Environment, Reply, converse, function_of, load_environment
from rlhf_jax.data.rows import Row
from rlhf_jax.data.rows import texts as texts_of
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generator import LanguageModel
from rlhf_jax.rewards import filter as filters
from rlhf_jax.rewards import spec
from rlhf_jax.rewards.service import Services
from rlhf_jax.training import (
    critic,
    initial,
    layout,
    loop,
    memory,
    own,
    phases,
    references,
    steps,
    teacher,
)
from rlhf_jax.training.ahead import Ahead, one_at_a_time
from rlhf_jax.training.engine import Client, silent
from rlhf_jax.training.programs import (
    Method,
    Networks,
    Programs,
    compiled,
    first_state,
    networks_of,
    penalty_of,
)
from rlhf_jax.training.schedule import Batch, Schedule
from rlhf_jax.training.stage import RunResult, Stage, divides, open_stage, set_up
from rlhf_jax.training.steps import Draw, Sampler, Scorer, Talk
from rlhf_jax.types import Algorithm, AlgorithmConfig, Rollout


def run(
    config: RunConfig,
    algorithm: Algorithm = ppo,
    algorithm_config: AlgorithmConfig | None = None,
    *,
    run_reward: spec.Reward | None = None,
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
        run_reward: takes the place of ``config.reward``: any RewardFn or HostReward.
        optimizer: takes the place of ``rl.optimizer``, its schedule and clipping included; the
            schedule counts optimizer steps, ``num_epochs * num_minibatches`` of an iteration. A
            value model, or a value head with a rate or a warm-up of its own, keeps
            ``rl.optimizer``.
        policy: takes the place of ``config.model`` and ``config.network``: a network of your own
            (``training.own.from_functions``). ``model/`` gets its parameters and tokenizer, which
            are no Hugging Face folder.
        on_step: ``on_step(step, state, metrics, rollout)`` after each step: the ``LoopState`` after
            step number ``step`` (the first is 1), its row of metrics.jsonl as numbers, and the
            scored rollout that it learned from. If it returns True the run ends there, as early
            stopping ends it: saved, without an error. The next step gives the arrays of ``state``
            up: copy what is kept. Several processes must return the same.

    Raises:
        UserError: for whatever is wrong with the data, the models' folders, the run folder or the
            settings.
        TrainingFault: a reward or an update that is not finite.
    """
    settings = config.rl
    name = section_name(algorithm)
    config, algorithm_config = for_algorithm(config, algorithm, algorithm_config)
    outside = None if name in ALGORITHMS else algorithm
    given: dict[str, Any] = {"algorithm": outside, "reward": run_reward}
    given |= {"optimizer": optimizer, "policy": policy}
    if run_reward is not None:
        _check_reward(run_reward)
        config = replace(config, reward=())
    if policy is not None:
        own.check_settings(config)
    config = set_up(config)
    _check_optimizer(config, optimizer)
    _check_sampling(settings, policy)
    sizes = _sizes(name, config, algorithm_config)
    score_rows = memory.score_rows(config.compute, settings.batch_size, algorithm_config)
    penalty = penalty_of(config, algorithm, algorithm_config)
    is_rewarded = _is_rewarded(config, algorithm_config, run_reward)
    method = Method(algorithm, algorithm_config, penalty, score_rows, optimizer, is_rewarded)
    reply = function_of(settings.environment, "rl.environment")
    read = _read(config)
    fingerprints = {source: digest for data in read for source, digest in data.fingerprints.items()}
    with (
        open_stage(config, name, fingerprints, sizes, files(config, name), given) as stage,
        engines.opened(settings.engine, config.engine, stage.run.weights) as engine,
        ThreadPoolExecutor(1) as thread,
    ):
        rows = [data.rows for data in read]
        parts = _parts(stage, rows, policy, run_reward, reply, method)
        stage, parts = _with_remat(stage, parts, method)
        networks = networks_of(stage, parts.initial, method, parts.teacher)
        programs = compiled(stage, parts.initial, method, networks.optimizer)
        client = None
        if engine is not None:
            client = Client(engine, config, stage.run.engine, parts.initial, networks.start)
        job = build(stage, parts, method, networks, programs, client, thread, on_step)
        state, row = loop.train(stage, first_state(stage, method, networks), job)
        params = models.policy_params(state.train.params)
        trained = {part: leaves for part, leaves in params.items() if part != "value"}
        save = LanguageModel.save if policy is None else own.save
        return stage.finish(parts.initial, networks.start, {"": trained}, row, save)


# --- What a run is made of


def _check_reward(run_reward: Any) -> None:
    """Raises UserError unless it is a reward."""
    if not isinstance(run_reward, spec.Reward):
        raise UserError(
            "run_reward must be a rewards.spec.Reward, such as "
            "spec.Reward(fn=jax.tree_util.Partial(function)), not "
            f"{type(run_reward).__name__}; a function of texts is --reward FILE.py:FUNCTION"
        )


def _read(config: RunConfig) -> list[formats.ReadResult]:
    """The prompts to train on, and those to validate on if they have files of their own."""
    sources = [config.rl.data]
    if config.rl.validation_data:
        sources.append(config.rl.validation_data)
    return [initial.stage_rows(config, "prompts", names) for names in sources]


class Parts(NamedTuple):
    """What the settings name, read and loaded."""

    initial: LanguageModel
    prompts: EncodedPrompts
    to_validate: EncodedPrompts  # the same, unless ``rl.validation_data`` is given
    reward: spec.Reward
    judge: spec.Reward | None
    guard: steps.Guarded | None  # the filter of responses, after a reward on the host
    environment: Environment | None
    teacher: LanguageModel | None
    teacher_server: teacher.Server | None


def _parts(
    stage: Stage,
    rows: Sequence[Sequence[Row]],
    policy: models.Model | None,
    run_reward: spec.Reward | None,
    reply: Reply,
    method: Method,
) -> Parts:
    """rows: the prompts to train on, and those to validate on if they have files of their own;
    reply: an environment's function.
    """
    config = stage.config
    settings = config.rl
    guard = filters.Guard.create(config.safety)
    texts = texts_of([row for part in rows for row in part])
    language_model = initial.language_model(config, texts, stage.key("init"), policy=policy)
    tokenizer = language_model.tokenizer
    initial.say_template(config, tokenizer)
    encoded = []
    for part, note in zip(rows, ("", " (for validation)"), strict=False):
        safe = guard.prompts(part, tokenizer)
        encoded.append(initial.prompts_for(config, language_model, safe, note))
    prompts = encoded[0]
    to_validate = encoded[-1]
    _check_columns(prompts, to_validate)
    length = max(part.tokens.shape[1] for part in encoded) + settings.max_new_tokens
    taught_by = teacher.load(stage, method.config, language_model, length)
    teacher_server = teacher.connect(stage, method.config, language_model)
    load = functools.partial(
        initial.load_reward_model,
        compute=config.compute,
        place=layout.placement(config),
        score_rows=method.score_rows,
        length=length,
        policy=tokenizer.fingerprint,
    )
    services = Services(config.judge, stage.run.judge)
    build_reward = functools.partial(
        spec.build_reward, tokenizer=tokenizer, load=load, services=services
    )
    judge = None
    if settings.judge:
        judge = build_reward(settings.judge, columns=to_validate.columns, flag="--rl.judge")
    environment = load_environment(reply, tokenizer, settings.max_new_tokens, settings.max_turns)
    if not method.is_rewarded:
        log_ratio = teacher.log_ratio(taught_by, settings, method.score_rows)
        run_reward = spec.Reward(fn=log_ratio)
    if run_reward is None:
        run_reward = build_reward(config.reward, columns=prompts.columns)
    guarded = None
    if config.safety.on:
        run_reward = run_reward._replace(fn=None, host=spec.as_host(run_reward))
        rules_found = guard.for_responses(
            tokenizer=tokenizer, load=load, columns=prompts.columns, services=services
        )
        guarded = rules_found.enforce
    if run_reward.fn is not None and method.is_rewarded:
        on_devices = jax.tree.map(jnp.asarray, run_reward.fn)
        run_reward = spec.Reward(fn=stage.frozen("reward", on_devices))
    read = (language_model, prompts, to_validate)
    return Parts(*read, run_reward, judge, guarded, environment, taught_by, teacher_server)


def _check_columns(prompts: EncodedPrompts, to_validate: EncodedPrompts) -> None:
    """Raises UserError unless the rows to validate on have the columns of those to train on."""
    missing = [column for column in prompts.columns if column not in to_validate.columns]
    if missing:
        raise UserError(
            f"rl.validation_data: its rows have no {', '.join(missing)}, which training has and a "
            "reward may read"
        )


def _with_remat(stage: Stage, parts: Parts, method: Method) -> tuple[Stage, Parts]:
    """With ``compute.remat`` chosen by the memory of an update."""
    settings = stage.config.rl
    updates = method.config.num_minibatches * method.config.num_microbatches
    length = parts.prompts.tokens.shape[1] + settings.max_new_tokens
    rows = settings.batch_size // updates
    stage, begun = stage.choose_remat(parts.initial, rows, length)
    return stage, parts._replace(initial=begun)


def _is_rewarded(
    config: RunConfig, algorithm_config: AlgorithmConfig, run_reward: spec.Reward | None
) -> bool:
    """Whether there is a reward; with a teacher there need not be one, except that an environment's
    rewards are added to one (UserError).
    """
    if config.reward or run_reward is not None or not algorithm_config.needs_teacher:
        return True
    if config.rl.environment:
        raise UserError(
            "rl.environment pays, so its run has a reward: give --reward, such as length*0"
        )
    return False


def files(config: RunConfig, name: str) -> dict[str, Path]:
    """The files of rewards, judge, filter, environment and teacher, by their names in the manifest
    of the run of that name.
    """
    files = filters.rule_files(config.safety)
    section = vars(config)[name]
    if section.needs_teacher and section.teacher and Path(section.teacher).is_dir():
        files["teacher"] = Path(section.teacher)
    for entry in (*config.reward, *config.rl.judge):
        files |= {f"reward {name}": path for name, path in spec.sources(entry).items()}
    if config.rl.environment:
        files["environment"] = Path(config.rl.environment.rpartition(":")[0])
    return files


def _sizes(name: str, run: RunConfig, config: AlgorithmConfig) -> dict[str, int]:
    """The settings that help when memory runs out.

    Raises:
        UserError: the batch does not divide by devices, groups, minibatches and microbatches; there
            are no groups to replace; the policy never learns.
    """
    settings = run.rl
    if run.mesh.sampling:
        divides("rl.batch_size", settings.batch_size, {"mesh.sampling": run.mesh.sampling})
    if settings.dynamic_sampling and config.group_size == 1:
        raise UserError(
            f"rl.dynamic_sampling: {name} samples one answer to a prompt; there are no groups to "
            "replace"
        )
    warmup = critic.settings(config).value_warmup
    if warmup >= settings.length:
        raise UserError(
            f"{name}.value_warmup {warmup}: of {settings.length} iterations, no iteration is left "
            "for the policy"
        )
    if settings.num_episodes is not None:
        episodes = settings.length * settings.batch_size
        logger.info(
            f"rl.num_episodes {settings.num_episodes}: {settings.length} iterations with "
            f"{episodes} episodes, whatever rl.num_iterations is"
        )
    minibatches = {f"{name}.num_minibatches": config.num_minibatches}
    microbatches = {f"{name}.num_microbatches": config.num_microbatches}
    sharers = layout.sharers(run, microbatches)
    blocks = config.shuffle_blocks if config.num_minibatches > 1 else 1
    divides(
        "rl.batch_size",
        settings.batch_size,
        sharers,
        {f"answers to one prompt ({name}.group_size)": config.group_size},
        minibatches | {f"{name}.shuffle_blocks": blocks},
        minibatches | microbatches,
        minibatches | (sharers if run.compute.blocks else {}),
    )
    return microbatches | {"rl.batch_size": settings.batch_size}


def _check_sampling(settings: RLStage, policy: models.Model | None) -> None:
    """Raises UserError for an engine that cannot load the policy, and for rollouts ahead in several
    processes.
    """
    if policy is not None and settings.engine is not None:
        raise UserError("rl.engine: a server loads no network that Python gives; leave it out")
    if settings.rollouts_ahead and jax.process_count() > 1:
        raise UserError(
            "rl.rollouts_ahead: several processes sample with the current weights; leave it out"
        )


def _check_optimizer(config: RunConfig, given: optax.GradientTransformation | None) -> None:
    """Warns of a high rate; UserError for a schedule that an optimizer from Python would ignore."""
    settings = config.rl.optimizer
    if given is None:
        initial.warn_of_rate(config, "rl", settings)
    elif settings.schedule == "plateau":
        raise UserError(
            "rl.optimizer.schedule: plateau cannot lower the rate of an optimizer that Python "
            "gives; choose another schedule"
        )


# --- The run, composed

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
    parts: Parts,
    method: Method,
    networks: Networks,
    programs: Programs,
    client: Client | None,
    thread: Executor,
    on_step: steps.OnStep | None,
) -> loop.Job:
    """What the loop runs: the widest step's memory is checked, then come steps and validations. An
    engine samples ahead in the ``thread``.
    """
    settings = stage.config.rl
    schedule, to_validate = _prompts(stage, parts, method)
    if not _samples_apart(stage, client):
        _hold_cache(stage, parts, schedule)
    learn = steps.learner(programs.learn, networks)
    drawing = functools.partial(_drawing, stage, method, networks)

    talk = _talk(stage, parts, parts.environment)
    score = steps.scorer(stage, programs.reward, parts.reward, parts.guard)
    sources = _sources(stage, parts, networks, programs, client)
    sample = steps.sampler(stage, sources.respond, talk)
    if parts.teacher_server is not None:
        sample = teacher.taught(stage, sample, parts.teacher_server.log_probs)
    ahead = None
    if settings.rollouts_ahead:
        ahead = Ahead(sample, thread if _samples_apart(stage, client) else None)
    draw = drawing(programs, sources, talk, score, sample if ahead is None else ahead.sample)
    draw_step = steps.first_of(draw)
    if settings.dynamic_sampling:
        draw_step = steps.replace_uninformative(
            draw, schedule.num_prompts, programs.num_equal, programs.refill
        )
    observe = None
    if on_step is not None:
        draw_step, observe = steps.observed(draw_step, on_step)
    advance = steps.advancing(draw_step, learn, schedule, stage.key("update"))
    if ahead is not None:
        advance = ahead.advancing(advance, schedule, settings.length, stage.copy)
    advance = references.moving(advance, settings, phases.policy)

    validate = None
    if to_validate is not None:
        judge = parts.judge and steps.scorer(stage, programs.reward, parts.judge)
        validate = steps.validator(stage, parts.initial, to_validate, sample, score, judge)

    rehearsal = _rehearsal(stage, parts, networks, programs, client, drawing)
    key = stage.key("update")
    check_memory = steps.checking(rehearsal, programs.learn, networks, schedule, key)
    return loop.Job(
        advance,
        settings.length,
        validate=validate,
        validation_interval=settings.validation_interval,
        show=SHOWN,
        sources=schedule.sources,
        optimizer=settings.optimizer,
        judged_by="max:validation/score",
        check_memory=check_memory,
        on_step=observe,
    )


def _rehearsal(
    stage: Stage,
    parts: Parts,
    networks: Networks,
    programs: Programs,
    client: Client | None,
    drawing: Callable[..., Draw],
) -> Draw:
    """The draw of a check of memory, without the engine and what others wrote in Python."""
    named = zip(Programs._fields, programs, strict=True)
    rehearsed = Programs(*(memory.rehearsed(phase, program) for phase, program in named))
    dry = rehearsed
    if _samples_apart(stage, client):
        dry = dry._replace(respond=silent(programs.respond))
        dry = dry._replace(respond_greedily=silent(programs.respond_greedily))
    without_engine = _sources(stage, parts, networks, dry, None)
    quiet_talk, quiet_score = _without_python(stage, parts, rehearsed)
    rehearse = steps.sampler(stage, without_engine.respond, quiet_talk)
    if parts.teacher_server is not None:
        rehearse = teacher.taught(stage, rehearse, teacher.unasked)
    return drawing(rehearsed, without_engine, quiet_talk, quiet_score, rehearse)


class Sources(NamedTuple):
    """Where responses come from, and a step that compares their log-probs with the policy's."""

    respond: steps.Responder
    respond_greedily: steps.Responder
    watched: Callable[[steps.Rescorer], steps.Rescorer]


def _sources(
    stage: Stage, parts: Parts, networks: Networks, programs: Programs, client: Client | None
) -> Sources:
    """The run's own programs, on the devices that learn or on others, or its engine."""
    if client is not None:
        how = initial.sampling_config(stage.config.rl, parts.initial.tokenizer)
        greedy = replace(how, temperature=0.0)
        respond, greedily = one_at_a_time(client.responder(how), client.responder(greedy))
        return Sources(respond, greedily, client.watched)
    mesh = layout.sampling_mesh(stage.config)
    if mesh is None:
        respond = steps.on_devices(stage, programs.respond, networks)
        greedily = steps.on_devices(stage, programs.respond_greedily, networks)
    else:
        base = networks.start.base
        placed = None if base is None else sharding.replicate(mesh, base)
        respond, greedily = one_at_a_time(
            steps.apart(mesh, programs.respond, placed),
            steps.apart(mesh, programs.respond_greedily, placed),
        )
    return Sources(respond, greedily, lambda rescore: rescore)


def _samples_apart(stage: Stage, client: Client | None) -> bool:
    """Whether something else samples than the devices that learn."""
    return client is not None or bool(stage.config.mesh.sampling)


def _drawing(
    stage: Stage,
    method: Method,
    networks: Networks,
    programs: Programs,
    sources: Sources,
    talk: Talk,
    score: Scorer,
    sample: Sampler,
) -> Draw:
    """Responses of the policy, their log-probs and scores, with a greedy baseline if the method has
    one.
    """
    rescore = sources.watched(steps.rescorer(programs.rescored, networks))
    draw = steps.drawn(sample, rescore, score)
    if method.config.baseline != "greedy":
        return draw
    greedily = steps.sampler(stage, sources.respond_greedily, talk)
    return steps.greedy_baseline(draw, greedily, score, programs.with_greedy)


def _prompts(stage: Stage, parts: Parts, method: Method) -> tuple[Schedule, Batch | None]:
    """The prompts of each step, and those of validations; None: nothing is held out."""
    settings = stage.config.rl
    columns = parts.prompts.tokens.shape[1]
    layers = parts.initial.model.config.num_layers
    multiple = initial.bucket_multiple(stage.config, layers, columns)
    split_key, order_key = jax.random.split(stage.key("data"))
    fraction = 0.0 if settings.validation_data else settings.validation_fraction
    texts = [row.prompt for row in parts.prompts.rows]
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
    )
    if not len(held_out):
        return schedule, None
    chosen = held_out[: settings.validation_prompts]
    prompts = batches.narrowed(parts.to_validate, chosen, multiple)
    padded = loop.pad_rows(chosen, settings.batch_size)
    return schedule, Batch(prompts, padded, stage.key("eval"))


def _hold_cache(stage: Stage, parts: Parts, schedule: Schedule) -> None:
    """Notes what rewards and the cache of the sampler take on the devices."""
    settings = stage.config.rl
    # In several turns a response is written behind the slots of those before it.
    slots = settings.max_new_tokens * (2 if parts.environment else 1)
    length = schedule.widest().prompts.tokens.shape[1] + slots
    rows = settings.batch_size // stage.num_parts
    cache = jax.eval_shape(lambda: parts.initial.model.init_cache(rows, length))
    stage.hold({"rewards": parts.reward.fn, "cache while it samples": cache})


def _without_python(stage: Stage, parts: Parts, programs: Programs) -> tuple[Talk, Scorer]:
    """Environment and reward of a check of memory, without what others wrote in Python."""
    silent = parts.environment and parts.environment._replace(fn=lambda conversation, row: None)
    reward = parts.reward
    if reward.host is not None:
        reward = spec.Reward(host=lambda rollout, columns: (np.zeros(len(rollout.tokens)), {}))
    return _talk(stage, parts, silent), steps.scorer(stage, programs.reward, reward)


def _talk(stage: Stage, parts: Parts, environment: Environment | None) -> Talk:
    """Conversations with an environment, or single responses, that end at the stop strings."""
    tokenizer = parts.initial.tokenizer

    def talk(respond: Callable[..., Rollout], *prompts: Any) -> Any:
        until = stops.stopping(respond, tokenizer, stage.config.rl.stop)
        return converse(environment, until, *prompts)

    return talk
