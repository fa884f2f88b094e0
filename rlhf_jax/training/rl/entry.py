"""Reinforcement learning as a run: prompts, a policy and a reward in, a better policy out.

``training.rl.composition`` composes its steps.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import optax

from rlhf_jax import engines, iteration, models
from rlhf_jax.algorithms import ppo
from rlhf_jax.config import (
    ALGORITHMS,
    RLStage,
    RunConfig,
    data_source,
    for_algorithm,
    model_source,
    section_name,
)
from rlhf_jax.data.formats import ReadResult
from rlhf_jax.errors import UserError
from rlhf_jax.generation.environment import function_of
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders import spec
from rlhf_jax.training.common import initial, loop, memory, own, remat
from rlhf_jax.training.common.opening import open_stage, run_folder
from rlhf_jax.training.common.saving import RunResult, finish
from rlhf_jax.training.common.setup import set_up, shares_of
from rlhf_jax.training.common.stage import Stage
from rlhf_jax.training.rl import answers, composition, critic, sharing, steps
from rlhf_jax.training.rl.engine import Client
from rlhf_jax.training.rl.inputs import Inputs, Sources, files, load, read_prompts
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
from rlhf_jax.training.rl.programs import Networks, Sizes, compiled, first_state, networks_of
from rlhf_jax.training.rl.schedule import Schedule
from rlhf_jax.types import Algorithm, AlgorithmConfig, Params


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
    config, data = _tested(config, prompts)
    fingerprints = {source: digest for part in data for source, digest in part.fingerprints.items()}
    sources = sources_of(config)
    read = files(sources, settings, algorithm_config)
    with (
        open_stage(config, name, fingerprints, helping_sizes, read, given._asdict()) as stage,
        engines.opened(settings.engine, config.engine, stage.run.weights) as engine,
        ThreadPoolExecutor(1) as thread,
    ):
        rows = [part.rows for part in data]
        inputs = load(stage, method, sources, given, rows, reply, config.engine)
        stage, method = _with_sharing(stage, name, method, inputs)
        stage, inputs = _with_remat(stage, method, inputs)
        planned = composition.prompts_of(stage, method, inputs, config.text)
        stage, method = lasting(stage, method, len(planned[0].train_rows))
        networks = _networks(stage, method, inputs)
        programs = compiled(stage, inputs.initial, method, networks.optimizer)
        how_asked = (config.engine, settings.engine_check, stage.run.engine)
        begun = (inputs.initial, networks.start, config.model)
        client = None if engine is None else Client(engine, *how_asked, *begun)
        job = composition.build(
            stage, method, inputs, planned, networks, programs, client, thread, on_step
        )
        first = first_state(stage, method, networks, _sizes(settings, inputs, planned[0]))
        state, row = loop.train(stage, _checked(first, networks), job)
        trained = _policy_of(state.train.params, networks.start.params)
        save = LanguageModel.save if policy is None else own.save
        how = initial.sampling_config(settings, inputs.initial.tokenizer)
        ended = (inputs.initial, networks.start, {"": trained}, row)
        return finish(stage, sources.model, *ended, how=how, save=save)


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


def _tested(config: RunConfig, prompts: Sequence[ReadResult]) -> tuple[RunConfig, list[ReadResult]]:
    """The settings and the prompts after the self-test of rewards that a rule verifies."""
    drops = config.on_bad_row == "drop"
    mathematics, data = answers.tested(config.reward, config.math, prompts, drops=drops)
    return replace(config, math=mathematics), data


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


def _networks(stage: Stage, method: Method, inputs: Inputs) -> Networks:
    """The models on the devices. What the value model starts from is not kept."""
    source = None
    if method.value_source is not None:
        source = critic.load(method.value_source, stage.compute, inputs.initial, stage.placement)
    return networks_of(stage, inputs.initial, method, source, inputs.teacher)


def _with_sharing(stage: Stage, name: str, method: Method, inputs: Inputs) -> tuple[Stage, Method]:
    """Stage and method with ``compute.share_prompts`` chosen by the work that it saves."""
    of_prompts = sharing.Answers(
        name,
        method.config,
        method.settings,
        stage.compute.share_prompts,
        prompt=inputs.prompts.tokens.shape[1],
        takes_groups=inputs.initial.model.takes_groups,
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


def _with_remat(stage: Stage, method: Method, inputs: Inputs) -> tuple[Stage, Inputs]:
    """Stage and inputs with ``compute.remat`` chosen by the memory that an update needs."""
    settings = method.settings
    updates = method.config.num_minibatches * method.config.num_microbatches
    prompt = inputs.prompts.tokens.shape[1]
    length = prompt + settings.max_new_tokens
    share = sharing.saved(prompt, settings.max_new_tokens, method.shared_by)
    rows = math.ceil(settings.batch_size // updates * (1 - share))
    networks = 1 + (method.config.value == "separate")
    stage, policy = remat.choose(stage, inputs.initial, rows, length, networks)
    return stage, inputs._replace(initial=policy)


def _sizes(settings: RLStage, inputs: Inputs, schedule: Schedule) -> Sizes:
    """What the first state of an algorithm may be told."""
    columns = schedule.widest().prompts.tokens.shape[1] + settings.max_new_tokens
    return Sizes(settings.batch_size, columns, len(inputs.prompts))
