"""Reinforcement learning as a run: prompts, a policy and a reward in, a better policy out.

A step is sample -> score -> learn. ``build`` composes it from small functions: a ``Sampler`` makes
responses, a ``Scorer`` scores them, a ``Draw`` is both, and others take one of these and return one
that does more (``greedy_baseline``, ``replace_uninformative``, ``refreshed``). The programs that
they call are the pure functions of ``training.phases``.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import generator, models, ops, rewards, sharding
from rlhf_jax.algorithms import ppo
from rlhf_jax.config import ALGORITHMS, RLStage, RunConfig, for_algorithm, section_name
from rlhf_jax.data import batches, chat
from rlhf_jax.data.encoding import EncodedPrompts
from rlhf_jax.data.environment import Environment, Reply, converse, function_of, load_environment
from rlhf_jax.data.rows import Row
from rlhf_jax.data.rows import texts as texts_of
from rlhf_jax.errors import TrainingFault, UserError, logger
from rlhf_jax.generator import LanguageModel
from rlhf_jax.rewards import filter as filters
from rlhf_jax.rewards import spec
from rlhf_jax.rewards.host import Columns, HostReward
from rlhf_jax.runs import devices, processes
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.training import critic, initial, loop, memory, own, phases
from rlhf_jax.training.initial import Trainable
from rlhf_jax.training.loop import Validation
from rlhf_jax.training.phases import Functions, LoopState, Penalty, Rule
from rlhf_jax.training.stage import RunResult, Stage, divides, open_stage, set_up
from rlhf_jax.types import (
    Algorithm,
    AlgorithmConfig,
    Metrics,
    Params,
    PolicyFn,
    PolicyOutput,
    Rollout,
)

OnStep = Callable[[int, LoopState, Mapping[str, float], Rollout], bool | None]


def run(
    config: RunConfig,
    algorithm: Algorithm = ppo,
    algorithm_config: AlgorithmConfig | None = None,
    *,
    run_reward: spec.Reward | None = None,
    optimizer: optax.GradientTransformation | None = None,
    policy: models.Model | None = None,
    on_step: OnStep | None = None,
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
        if not isinstance(run_reward, spec.Reward):
            raise UserError(
                "run_reward must be a rewards.spec.Reward, such as "
                "spec.Reward(fn=jax.tree_util.Partial(function)), not "
                f"{type(run_reward).__name__}; a function of texts is --reward FILE.py:FUNCTION"
            )
        config = replace(config, reward=())
    if policy is not None:
        own.check_settings(config)
    config = set_up(config)
    _check_optimizer(config, optimizer)
    num_devices = sharding.num_parts(initial.mesh_of(config))
    sizes = _sizes(name, settings, algorithm_config, num_devices)
    score_rows = memory.score_rows(config.compute, settings.batch_size, algorithm_config)
    penalty = penalty_of(config, algorithm, algorithm_config)
    method = Method(algorithm, algorithm_config, penalty, score_rows, optimizer)
    reply = function_of(settings.environment, "rl.environment")
    sources = [settings.data]
    if settings.validation_data:
        sources.append(settings.validation_data)
    read = [initial.stage_rows(config, "prompts", names) for names in sources]
    fingerprints = {source: digest for data in read for source, digest in data.fingerprints.items()}
    with open_stage(config, name, fingerprints, sizes, _files(config), given) as stage:
        rows = [data.rows for data in read]
        parts = _parts(stage, rows, policy, run_reward, reply, score_rows)
        stage, parts = _with_remat(stage, parts, method)
        networks = _networks(stage, parts.initial, method)
        programs = compiled(stage, parts.initial, method, networks.optimizer)
        job = build(stage, parts, method, networks, programs, on_step)
        state, row = loop.train(stage, first_state(stage, method, networks), job)
        params = models.policy_params(state.train.params)
        trained = {part: leaves for part, leaves in params.items() if part != "value"}
        save = LanguageModel.save if policy is None else own.save
        return stage.finish(parts.initial, networks.start, {"": trained}, row, save)


# --- What a run is made of


class Method(NamedTuple):
    """How the policy learns."""

    algorithm: Algorithm
    config: AlgorithmConfig
    penalty: Penalty
    score_rows: int | None  # that policy, reference and reward model score at once
    optimizer: optax.GradientTransformation | None = None  # None: that of ``rl.optimizer``


class Parts(NamedTuple):
    """What the settings name, read and loaded."""

    initial: LanguageModel
    prompts: EncodedPrompts
    to_validate: EncodedPrompts  # the same, unless ``rl.validation_data`` is given
    reward: spec.Reward
    judge: spec.Reward | None
    guard: "Guarded | None"  # the filter of responses, after a reward on the host
    environment: Environment | None


class Networks(NamedTuple):
    """The models of a run, on the devices, and what changes them."""

    start: Trainable  # the policy before training
    trained: Trainable  # the same, or under a separate value model {"policy", "value"}
    optimizer: optax.GradientTransformation
    functions: Callable[[int], Functions]  # for rollouts of so many columns


class Programs(NamedTuple):
    """Functions of ``training.phases`` with their settings bound; the first call compiles each."""

    respond: Callable[..., Rollout]
    respond_greedily: Callable[..., Rollout]
    rescored: Callable[..., tuple[Rollout, Metrics]]
    reward: Callable[..., tuple[Rollout, Metrics]]
    with_greedy: Callable[..., Rollout]
    num_equal: Callable[..., jax.Array]
    refill: Callable[..., Rollout]
    learn: Callable[..., tuple[LoopState, Metrics]]


def penalty_of(
    config: RunConfig, algorithm: Algorithm, algorithm_config: AlgorithmConfig
) -> Penalty:
    """The KL penalty; without one, and without a KL in the loss, the run needs no reference."""
    settings = config.rl
    coef = algorithm.kl_coef if settings.kl_coef is None else settings.kl_coef
    if coef or algorithm_config.kl_in_loss or settings.kl_target is not None:
        if settings.reference_refresh is not None and "reference" in config.compute.offload:
            raise UserError(
                "compute.offload: a reference that is refreshed stays on the devices; leave it out"
            )
        return phases.kl_penalty(coef, settings.kl_target, settings.kl_horizon)
    if settings.reference_refresh is not None:
        raise UserError(
            "rl.reference_refresh: no KL is used here; set rl.kl_coef above 0 or leave it out"
        )
    return phases.NO_PENALTY


def _parts(
    stage: Stage,
    rows: Sequence[Sequence[Row]],
    policy: models.Model | None,
    run_reward: spec.Reward | None,
    reply: Reply,
    score_rows: int | None,
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
    missing = [column for column in prompts.columns if column not in to_validate.columns]
    if missing:
        raise UserError(
            f"rl.validation_data: its rows have no {', '.join(missing)}, which training has and a "
            "reward may read"
        )
    load = functools.partial(
        initial.load_reward_model,
        compute=config.compute,
        place=initial.placement(config),
        score_rows=score_rows,
        length=max(part.tokens.shape[1] for part in encoded) + settings.max_new_tokens,
    )
    build_reward = functools.partial(spec.build_reward, tokenizer=tokenizer, load=load)
    judge = None
    if settings.judge:
        judge = build_reward(settings.judge, columns=to_validate.columns, flag="--rl.judge")
    environment = load_environment(reply, tokenizer, settings.max_new_tokens, settings.max_turns)
    if run_reward is None:
        run_reward = build_reward(config.reward, columns=prompts.columns)
    guarded = None
    if config.safety.on:
        run_reward = spec.Reward(host=spec.as_host(run_reward))
        rules_found = guard.for_responses(tokenizer=tokenizer, load=load, columns=prompts.columns)
        guarded = rules_found.enforce
    if run_reward.fn is not None:
        on_devices = jax.tree.map(jnp.asarray, run_reward.fn)
        run_reward = spec.Reward(fn=stage.frozen("reward", on_devices))
    return Parts(language_model, prompts, to_validate, run_reward, judge, guarded, environment)


def _with_remat(stage: Stage, parts: Parts, method: Method) -> tuple[Stage, Parts]:
    """With ``compute.remat`` chosen by the memory of an update."""
    settings = stage.config.rl
    updates = method.config.num_minibatches * method.config.num_microbatches
    length = parts.prompts.tokens.shape[1] + settings.max_new_tokens
    rows = settings.batch_size // updates
    stage, begun = stage.choose_remat(parts.initial, rows, length)
    return stage, parts._replace(initial=begun)


def _files(config: RunConfig) -> dict[str, Path]:
    """The files of rewards, judge, filter and environment, by their names in the manifest."""
    files = filters.rule_files(config.safety)
    for entry in (*config.reward, *config.rl.judge):
        files |= {f"reward {name}": path for name, path in spec.sources(entry).items()}
    if config.rl.environment:
        files["environment"] = Path(config.rl.environment.rpartition(":")[0])
    return files


def _sizes(
    name: str, settings: RLStage, config: AlgorithmConfig, num_devices: int
) -> dict[str, int]:
    """The settings that help when memory runs out.

    Raises:
        UserError: the batch does not divide by devices, groups, minibatches and microbatches; there
            are no groups to replace; the policy never learns.
    """
    if settings.dynamic_sampling and config.group_size == 1:
        raise UserError(
            f"rl.dynamic_sampling: {name} samples one answer to a prompt; there are no groups to "
            "replace"
        )
    warmup = critic.settings(config).value_warmup
    if warmup >= settings.length:
        raise UserError(
            f"{name}.value_warmup {warmup}: of {settings.length} iterations none is left for the "
            "policy"
        )
    if settings.num_episodes is not None:
        episodes = settings.length * settings.batch_size
        logger.info(
            f"rl.num_episodes {settings.num_episodes}: {settings.length} iterations with "
            f"{episodes} episodes, whatever rl.num_iterations is"
        )
    minibatches = {f"{name}.num_minibatches": config.num_minibatches}
    blocks = config.shuffle_blocks if config.num_minibatches > 1 else 1
    divides(
        "rl.batch_size",
        settings.batch_size,
        {"devices": num_devices},
        {f"answers to one prompt ({name}.group_size)": config.group_size},
        minibatches | {f"{name}.shuffle_blocks": blocks},
        minibatches | {f"{name}.num_microbatches": config.num_microbatches},
    )
    return {
        f"{name}.num_microbatches": config.num_microbatches,
        "rl.batch_size": settings.batch_size,
    }


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


def _networks(stage: Stage, begun: LanguageModel, method: Method) -> Networks:
    """Puts policy, value model and reference on the devices."""
    settings = stage.config.rl
    model = begun.model
    values = critic.settings(method.config)
    value = values.value if method.algorithm.needs_values else None
    start, trained = critic.start(stage, begun.params, value, own.width(begun))
    updates = method.config.num_epochs * method.config.num_minibatches
    optimizer = critic.make_optimizer(settings, values, updates, trained.params, method.optimizer)
    if method.optimizer is not None:
        has_critic = critic.has_own_optimizer(values, trained.params)
        use = "trains the value function alone" if has_critic else "is not used"
        logger.info(f"the optimizer is the one that Python gives; rl.optimizer {use}")

    def policy_fn(columns: int, value_model: models.Model | None = None) -> PolicyFn:
        """Computes no logits of the prompt: of all columns but the last ``max_new_tokens``."""
        prompt_length = columns - settings.max_new_tokens
        return models.policy_fn(model, settings.temperature, prompt_length, value_model)

    def scored(params: Params, tokens: jax.Array, *more: Any) -> PolicyOutput:
        return policy_fn(tokens.shape[1])(params, tokens, *more)

    has_reference = method.penalty is not phases.NO_PENALTY
    refreshes = settings.reference_refresh is not None
    if refreshes or not has_reference:
        memory.free(start.loaded)
    reference = None
    if has_reference:
        bind = start.bind if refreshes else functools.partial(stage.reference, start)
        reference = bind(ops.by_rows(scored, method.score_rows))
    frozen = None if start.base else reference
    stage.hold({"frozen weights": start.base, "reference": frozen})
    value_model = None if trained is start else model

    @functools.cache
    def functions(columns: int) -> Functions:
        return Functions(trained.bind(policy_fn(columns, value_model)), ref_fn=reference)

    return Networks(start, trained, optimizer, functions)


def first_state(stage: Stage, method: Method, networks: Networks) -> LoopState:
    """The state at step 0. Made once and not kept, so that only the loop holds a state."""
    create = functools.partial(method.algorithm.State.create, optimizer=networks.optimizer)
    train = stage.take(create, networks.trained.params)
    reference = None
    if stage.config.rl.reference_refresh is not None:
        reference = stage.copy(models.policy_params(train.params))
    stage.hold({"refreshed reference": reference})
    return stage.lay_out(LoopState.create(train, method.penalty.init, reference))


def compiled(
    stage: Stage,
    begun: LanguageModel,
    method: Method,
    optimizer: optax.GradientTransformation,
) -> Programs:
    """The programs of a run."""
    model = begun.model
    samples = initial.sampling_config(stage.config.rl, begun.tokenizer)
    shape, masked = rules(stage.config.rl, samples)
    groups: Any = {"group_size": method.config.group_size, "masked": masked}
    respond = functools.partial(phases.respond, model=model, mesh=stage.mesh)
    rescored = functools.partial(
        phases.rescored, eos_ids=samples.eos_ids, score_rows=method.score_rows
    )
    learn = functools.partial(
        phases.learn,
        algorithm=method.algorithm,
        config=method.config,
        optimizer=optimizer,
        shape=shape,
        penalty=method.penalty,
        masked=masked,
        mesh=stage.mesh,
    )

    def jit(program: Callable[..., Any], num_blocks: int = 0, **settings: Any) -> Any:
        options = devices.compiler_options(num_blocks)
        return jax.jit(functools.partial(program, **settings), compiler_options=options)

    # A token goes through layer after layer, also where they are scanned.
    layers = model.config.num_layers
    blocks = model.config.num_blocks
    return Programs(
        respond=jit(respond, layers, config=samples),
        respond_greedily=jit(respond, layers, config=replace(samples, temperature=0.0)),
        rescored=jit(rescored, blocks),
        reward=jax.jit(phases.reward),
        with_greedy=jit(phases.with_greedy, shape=shape),
        num_equal=jit(phases.num_equal, **groups),
        refill=jit(phases.refill, **groups, mesh=stage.mesh),
        learn=stage.jit_update(learn, blocks),
    )


def rules(settings: RLStage, samples: SamplingConfig) -> tuple[Rule, Rule]:
    """The rule that changes scores before the penalty, and the one that masks rows after it."""
    on_scores = []
    if settings.missing_eos_penalty is not None or settings.missing_eos_score is not None:
        on_scores.append(
            phases.missing_eos(
                samples.eos_id, settings.missing_eos_penalty, settings.missing_eos_score
            )
        )
    if settings.overlong_buffer is not None:
        on_scores.append(
            phases.overlong(
                settings.max_new_tokens, settings.overlong_buffer, settings.overlong_penalty
            )
        )
    masked = phases.mask_truncated(samples.eos_id) if settings.mask_truncated else phases.unchanged
    return phases.then(*on_scores), masked


# --- The steps of an iteration on the host


class Batch(NamedTuple):
    """What one sampling reads."""

    prompts: EncodedPrompts
    rows: np.ndarray  # [B] of the prompts; -1 is an absent row
    key: jax.Array


class Scored(NamedTuple):
    """A rollout with ``scores``, the metrics of the reward, and what a filter found in each row."""

    rollout: Rollout
    metrics: Metrics
    verdicts: list[filters.Verdict] | None = None


Talk = Callable[..., tuple[Rollout, dict[str, np.ndarray]]]
"""``data.environment.converse`` with an environment, or with None: one response to each prompt."""

Sampler = Callable[[LoopState, Batch], tuple[Rollout, Metrics]]
"""Responses with the log-probs of the sampler, not scored."""

Scorer = Callable[[Rollout, Batch], Scored]

Guarded = Callable[
    [Rollout, Rollout, Columns], tuple[Rollout, Metrics, list[filters.Verdict] | None]
]
"""(rollout before the reward, after it, columns) -> the latter filtered, metrics, verdicts."""

Draw = Callable[[LoopState, Batch], tuple[Rollout, Metrics]]
"""Responses with scores and log-probs: what an update reads."""

DrawStep = Callable[[LoopState, Sequence[Batch]], tuple[Rollout, Metrics]]
"""The same, from a step's batches: the first, and those in reserve."""

Advance = Callable[[LoopState, int], tuple[LoopState, Metrics]]
"""The step of the loop: (state, number of the step) -> (state, metrics)."""


def sampler(
    stage: Stage, respond: Callable[..., Rollout], talk: Talk, networks: Networks
) -> Sampler:
    """Samples ``rl.batch_size`` rows at a time by the program ``respond``."""
    size = stage.config.rl.batch_size

    def sample(state: LoopState, batch: Batch) -> tuple[Rollout, Metrics]:
        policy = phases.sampler(state, networks.start.base)

        def respond_at(places: Any, *prompts: Any) -> Rollout:
            inputs = phases.Prompts(*prompts)._replace(places=places)
            return respond(policy, stage.shard(inputs), batch.key)

        sampled: list[Any] = []
        for places in np.arange(len(batch.rows), dtype=np.int32).reshape(-1, size):
            at_places = functools.partial(respond_at, places)
            sampled.append(talk(at_places, batch.prompts, batch.rows[places]))
        rollout, talks = sampled[0]
        if len(sampled) > 1:
            rollout, talks = jax.tree.map(lambda *parts: jnp.concatenate(parts), *sampled)
        present = batch.rows >= 0
        metrics = {
            f"environment/{name}": jnp.float32(np.mean(values[present]))
            for name, values in talks.items()
        }
        return stage.shard(rollout), metrics

    return sample


def scorer(
    stage: Stage, program: Callable[..., Any], reward: spec.Reward, guard: Guarded | None = None
) -> Scorer:
    """The reward as a step, on the devices by the program or on the host, with a filter there."""
    if reward.host is not None:
        return on_host(stage, reward.host, guard or unguarded)
    functions = Functions(None, reward.fn)
    return lambda rollout, batch: Scored(*program(rollout, functions))


def on_host(stage: Stage, reward: HostReward, guard: Guarded) -> Scorer:
    """Each process scores its own rows; all filter all rows, so that they agree on missing ones.

    Raises:
        TrainingFault: a score is not finite.
    """

    def score(rollout: Rollout, batch: Batch) -> Scored:
        before = processes.fetch(rollout)
        own_columns = batches.columns_at(batch.prompts, processes.own_rows(batch.rows))
        own_rows = processes.own_rows(before)
        score_own = functools.partial(rewards.on_host, reward, own_rows, own_columns)
        try:
            after, parts = processes.gather_rows(processes.agree(score_own))
            unscored = np.sum(before.present) - np.sum(after.present)
            columns = batches.columns_at(batch.prompts, batch.rows)
            after, unsafe, verdicts = guard(before, after, columns)
        except FloatingPointError as error:
            raise TrainingFault(str(error)) from error
        named = {name: jnp.asarray(values) for name, values in parts.items()}
        scored, metrics = phases.scored(after, jnp.asarray(after.scores), named)
        metrics |= {"reward/unscored": jnp.float32(unscored)} | unsafe
        return Scored(stage.shard(jax.device_get(scored)), metrics, verdicts)

    return score


def unguarded(before: Rollout, scored: Rollout, columns: Columns) -> tuple[Rollout, Metrics, None]:
    """No filter."""
    return scored, {}, None


def drawn(
    sample: Sampler,
    rescore: Callable[[LoopState, Rollout], tuple[Rollout, Metrics]],
    score: Scorer,
) -> Draw:
    """Samples, puts the log-probs of the update's own forward pass in place of the sampler's, and
    scores.
    """

    def draw(state: LoopState, batch: Batch) -> tuple[Rollout, Metrics]:
        sampled, talk_metrics = sample(state, batch)
        rollout, metrics = rescore(state, sampled)
        scored = score(rollout, batch)
        return scored.rollout, metrics | talk_metrics | scored.metrics

    return draw


def greedy_baseline(
    draw: Draw, sample_greedily: Sampler, score: Scorer, join: Callable[..., Rollout]
) -> Draw:
    """ReMax (Li et al. 2023): with the score of the greedy response to the same prompt, which
    ``join(rollout, greedy rollout)`` puts into the rollout.
    """

    def draw_with_baseline(state: LoopState, batch: Batch) -> tuple[Rollout, Metrics]:
        rollout, metrics = draw(state, batch)
        sampled, _ = sample_greedily(state, batch)
        greedy = score(sampled, batch)
        greedy_metrics = {"objective/greedy_score": greedy.metrics["objective/score"]}
        return join(rollout, greedy.rollout), metrics | greedy_metrics

    return draw_with_baseline


def first_of(draw: Draw) -> DrawStep:
    """One draw, of the step's first batch."""
    return lambda state, spares: draw(state, spares[0])


def replace_uninformative(
    draw: Draw,
    num_groups: int,
    num_equal: Callable[[Rollout], jax.Array],
    refill: Callable[[Rollout, Rollout], Rollout],
) -> DrawStep:
    """Dynamic sampling (Yu et al. 2025, DAPO, section 3.2): while groups of the first batch are
    equal in score, it draws the next batch and takes groups of it in their place.

    Each round draws a whole batch, so that nothing is compiled anew. The metrics of scores and
    responses are those of the first draw: of the policy, not of the groups that were chosen.
    """

    def draw_rounds(state: LoopState, spares: Sequence[Batch]) -> tuple[Rollout, Metrics]:
        first, *others = spares
        rollout, metrics = draw(state, first)
        left = float(num_equal(rollout))
        equal = [left]
        for batch in others:
            if not left:
                break
            fresh, _ = draw(state, batch)
            equal.append(float(num_equal(fresh)))
            rollout = refill(rollout, fresh)
            left = float(num_equal(rollout))
        metrics["sampling/rounds"] = jnp.float32(len(equal) - 1)
        metrics["sampling/uninformative"] = jnp.float32(sum(equal) / (len(equal) * num_groups))
        return rollout, metrics

    return draw_rounds


def observed(draw_step: DrawStep, on_step: OnStep) -> tuple[DrawStep, Callable[..., bool]]:
    """The draw, and ``on_step`` with the rollout that was drawn last."""
    drawn: list[Rollout] = []

    def draw(state: LoopState, spares: Sequence[Batch]) -> tuple[Rollout, Metrics]:
        drawn.clear()
        rollout, metrics = draw_step(state, spares)
        drawn.append(rollout)
        return rollout, metrics

    def observe(step: int, state: LoopState, row: Mapping[str, float]) -> bool:
        return bool(on_step(step, state, row, drawn[0]))

    return draw, observe


def refreshed(advance: Advance, every: int, copy: Callable[[Params], Params]) -> Advance:
    """The step, before which every so many steps the policy becomes the reference."""

    def advance_refreshed(state: LoopState, step: int) -> tuple[LoopState, Metrics]:
        if step and step % every == 0:
            memory.free(state.reference)
            policy = models.policy_params(state.train.params)
            state = replace(state, reference=copy(policy))
        return advance(state, step)

    return advance_refreshed


@dataclass(frozen=True)
class Schedule:
    """The prompts of each step, by keys and the number of the step alone, so that a resumed run
    draws the same.
    """

    prompts: EncodedPrompts
    train_rows: np.ndarray
    num_prompts: int  # of one sampling
    group_size: int  # responses to each prompt
    samplings: int  # of a step at most; those after the first are for ``rl.dynamic_sampling``
    order_key: jax.Array
    rollout_key: jax.Array
    multiple: int  # of which the width of a batch is

    def rows(self, step: int) -> np.ndarray:
        """The prompts' rows, [samplings, num_prompts].

        Those after the first are the prompts of other steps, spread over the epoch.
        """
        n = len(self.train_rows)
        apart = max(n // self.num_prompts // self.samplings, 1)
        steps = step + apart * np.arange(self.samplings)
        drawn = [batches.prompt_rows(n, self.num_prompts, self.order_key, int(i)) for i in steps]
        return self.train_rows[np.stack(drawn)]

    def batches(self, step: int) -> list[Batch]:
        """A step's samplings, all as wide as its longest prompt needs, on whichever device or
        process its row lies.
        """
        rows = self.rows(step)
        prompts = batches.narrowed(self.prompts, rows.ravel(), self.multiple)
        first = step * self.samplings
        return [self._batch(prompts, own, first + i) for i, own in enumerate(rows)]

    def widest(self) -> Batch:
        """The first batch, in the columns that the longest prompt of all needs."""
        prompts = batches.narrowed(self.prompts, self.train_rows, self.multiple)
        return self._batch(prompts, self.rows(0)[0], 0)

    def sources(self, step: int) -> list[str]:
        """The places of a step's prompts, as "FILE, line N"."""
        return [self.prompts.rows[row].source for row in self.rows(step).ravel()]

    def _batch(self, prompts: EncodedPrompts, rows: np.ndarray, number: int) -> Batch:
        key = jax.random.fold_in(self.rollout_key, number)
        return Batch(prompts, np.repeat(rows, self.group_size), key)


# --- Validation


def validator(
    stage: Stage,
    policy: LanguageModel,
    batch: Batch,
    sample: Sampler,
    score: Scorer,
    judge: Scorer | None,
) -> Callable[[LoopState], Validation]:
    """Samples a response to each held-out prompt, always with the key of ``batch``; the reward and
    the judge score them.

    It samples in batches of ``rl.batch_size``, which take the memory of a step's and, if as wide,
    its program.
    """

    def validate(state: LoopState) -> Validation:
        sampled, talk_metrics = sample(state, batch)
        judged: Metrics = {}
        if judge is not None:
            verdict = judge(replace(sampled, rewards=None), batch)  # without the environment's
            judged = {"validation/judge": verdict.metrics["objective/score"]}
        scored = score(sampled, batch)
        samples = _samples(policy, scored, batch)
        for shown in samples[: stage.config.rl.show_examples]:
            logger.info(
                "Prompt:    {prompt}\nGenerated: {response}\nReward:    {score:.4g}\n".format(
                    **shown
                )
            )
        kinds = ("reward/", "safety/", "environment/")
        metrics = {"validation/score": scored.metrics["objective/score"]} | judged
        for name, value in (scored.metrics | talk_metrics).items():
            if name.startswith(kinds):
                metrics[f"validation/{name}"] = value
        return Validation({name: float(value) for name, value in metrics.items()}, samples)

    return validate


def _samples(policy: LanguageModel, scored: Scored, batch: Batch) -> list[dict[str, Any]]:
    """The rows of samples.jsonl: those with a response."""
    rollout = processes.fetch(scored.rollout)
    texts = generator.responses(rollout, policy.tokenizer, with_replies=True)
    scores = np.asarray(rollout.scores)
    samples = []
    for i in np.flatnonzero(rollout.present):
        row: dict[str, Any] = {
            "prompt": chat.shown(batch.prompts.rows[batch.rows[i]], policy.tokenizer),
            "response": texts[i],
            "score": float(scores[i]),
            "length": int(np.sum(rollout.mask[i])),
        }
        if scored.verdicts is not None:
            row["unsafe"] = filters.sentence(scored.verdicts[i])
        samples.append(row)
    return samples


# --- The run, composed

SHOWN = ("objective/score", "objective/kl", "kl/coef", "response/length", "validation/score")


def build(
    stage: Stage,
    parts: Parts,
    method: Method,
    networks: Networks,
    programs: Programs,
    on_step: OnStep | None,
) -> loop.Job:
    """What the loop runs: steps, validations, and first the widest step as a trial of memory."""
    settings = stage.config.rl
    schedule, to_validate = _prompts(stage, parts, method)
    _hold_cache(stage, parts, schedule)

    def functions_of(rollout: Rollout) -> Functions:
        return networks.functions(rollout.tokens.shape[1])

    def rescore(state: LoopState, sampled: Rollout) -> tuple[Rollout, Metrics]:
        return programs.rescored(state, sampled, functions_of(sampled))

    def drawing(talk: Talk, score: Scorer) -> Draw:
        draw = drawn(sampler(stage, programs.respond, talk, networks), rescore, score)
        if method.config.baseline != "greedy":
            return draw
        greedily = sampler(stage, programs.respond_greedily, talk, networks)
        return greedy_baseline(draw, greedily, score, programs.with_greedy)

    def learn(state: LoopState, rollout: Rollout, key: jax.Array) -> tuple[LoopState, Metrics]:
        return programs.learn(state, rollout, key, functions_of(rollout))

    talk = functools.partial(converse, parts.environment)
    score = scorer(stage, programs.reward, parts.reward, parts.guard)
    draw = drawing(talk, score)
    draw_step = first_of(draw)
    if settings.dynamic_sampling:
        draw_step = replace_uninformative(
            draw, schedule.num_prompts, programs.num_equal, programs.refill
        )
    observe = None
    if on_step is not None:
        draw_step, observe = observed(draw_step, on_step)

    def advance(state: LoopState, step: int) -> tuple[LoopState, Metrics]:
        rollout, metrics = draw_step(state, schedule.batches(step))
        key = jax.random.fold_in(stage.key("update"), step)
        state, learn_metrics = learn(state, rollout, key)
        return state, metrics | learn_metrics

    trial = drawing(*_without_python(stage, parts, programs))

    def attempt(state: LoopState) -> LoopState:
        rollout, _ = trial(state, schedule.widest())
        return memory.tried(lambda state: learn(state, rollout, stage.key("update")), state)

    validate = None
    if to_validate is not None:
        sample = sampler(stage, programs.respond, talk, networks)
        judge = parts.judge and scorer(stage, programs.reward, parts.judge)
        validate = validator(stage, parts.initial, to_validate, sample, score, judge)
    every = settings.reference_refresh
    return loop.Job(
        advance if every is None else refreshed(advance, every, stage.copy),
        settings.length,
        validate=validate,
        validation_interval=settings.validation_interval,
        show=SHOWN,
        sources=schedule.sources,
        optimizer=settings.optimizer,
        judged_by="max:validation/score",
        attempt=attempt,
        on_step=observe,
    )


def _prompts(stage: Stage, parts: Parts, method: Method) -> tuple[Schedule, Batch | None]:
    """The prompts of each step, and those of validations; None: nothing is held out."""
    settings = stage.config.rl
    multiple = stage.config.text.bucket_multiple
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
    rows = settings.batch_size // stage.num_devices
    cache = jax.eval_shape(lambda: parts.initial.model.init_cache(rows, length))
    stage.hold({"rewards": parts.reward.fn, "cache while it samples": cache})


def _without_python(stage: Stage, parts: Parts, programs: Programs) -> tuple[Talk, Scorer]:
    """Environment and reward of the trial of memory, without what others wrote in Python."""
    silent = parts.environment and parts.environment._replace(fn=lambda conversation, row: None)
    reward = parts.reward
    if reward.host is not None:
        reward = spec.Reward(host=lambda rollout, columns: (np.zeros(len(rollout.tokens)), {}))
    return functools.partial(converse, silent), scorer(stage, programs.reward, reward)
