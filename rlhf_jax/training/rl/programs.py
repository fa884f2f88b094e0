"""The models of an RL run on the devices, and the programs that sample, score and learn."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhf_jax import iteration, losses, models, policies, sampling
from rlhf_jax.algorithms.policy import wanted
from rlhf_jax.config import RLStage
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.iteration import Functions, LoopState, Rule
from rlhf_jax.policies import Policy
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.sampling.routing import has_experts
from rlhf_jax.training.common import initial, memory, optimizer
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.training.common.optimizer import check_frozen
from rlhf_jax.training.rl.method import Method, check_own_head, has_own_schedule
from rlhf_jax.types import (
    Metrics,
    Params,
    Rollout,
    TrainState,
)


class Networks(NamedTuple):
    """The models of a run on the devices, and the optimizer."""

    start: Trainable  # the policy before training
    trained: Trainable  # ``start``, or with a separate value model {"policy", "value"}
    optimizer: optax.GradientTransformation
    functions: Functions  # of the steps


class Sizes(NamedTuple):
    """Sizes that the ``create`` of an algorithm's State is told if it has parameters for them."""

    rows: int  # B of a rollout
    columns: int  # T of the widest rollout
    prompts: int  # data rows; ``rollout.row_ids`` are their numbers, from 0


class Programs(NamedTuple):
    """Functions of ``iteration`` with their settings bound; the first call compiles each."""

    respond: Callable[..., Rollout]  # iteration.respond
    respond_to_each: Callable[..., Rollout]  # the same for validations: one response to a prompt
    respond_greedily: Callable[..., Rollout]  # the same for the greedy baseline
    rescored: Callable[..., tuple[Rollout, Metrics]]  # iteration.rescored
    reward: Callable[..., tuple[Rollout, Metrics]]  # iteration.reward
    with_greedy: Callable[..., Rollout]  # iteration.with_greedy
    informative: Callable[..., Array]  # iteration.informative
    refill: Callable[..., tuple[Rollout, Rollout]]  # iteration.refill
    learn: Callable[..., tuple[LoopState, Metrics]]  # iteration.learn
    observe: Callable[..., tuple[LoopState, Metrics]]  # the algorithm's own; no metrics
    choose: Callable[..., Array] | None  # the algorithm's own choice of prompts, if it has one


def networks_of(
    run: OpenRun,
    policy: LanguageModel,
    method: Method,
    source: LanguageModel | None = None,
    teacher: LanguageModel | None = None,
) -> Networks:
    """Puts policy, value model and reference on the devices. The teacher is there already.

    source: what a separate value model starts from; None: the policy.
    """
    settings = method.settings
    layout = run.layout
    key = run.key("init")
    value = method.algorithm_config.value if method.algorithm.needs_values else None
    model = policy.model if value else policy.model._replace(values=None)
    has_head = model.values is not None
    if has_head:
        check_own_head(method.algorithm_config)
    width = getattr(model.config, "hidden_size", None)
    if width is None:  # a network of the user's own
        from rlhf_jax.training.common import own

        width = own.width(policy)

    def begin(params: Params, source: Params | None) -> tuple[Trainable, Trainable]:
        if value == "shared" and not has_head:
            params = models.add_head(jax.random.fold_in(key, 1), params, "value", width)
        policy_key = jax.random.fold_in(key, 2)
        start = initial.trainable(run.config.lora, params, policy_key).put(layout)
        if value != "separate":
            return start, start
        from rlhf_jax.training.rl import critic

        return start, critic.start(run, start, params, width, source, has_head=has_head)

    start, trained = layout.make(begin, policy.params, None if source is None else source.params)
    taught_by = None
    if teacher is not None:
        taught_by = models.Teacher(teacher.model, method.algorithm_config.measure)
    teacher_params = None if teacher is None else teacher.params
    run.hold({"teacher": teacher_params})

    def policy_fn(value_model: models.Model | None = None) -> Policy:
        """Computes logits only for responses."""
        return models.policy_fn(
            model,
            settings.temperature,
            value_model=value_model,
            teacher=taught_by,
            group_size=method.shared_by,
            one_text=True,
        )

    reference = None
    if method.penalty is not iteration.NO_PENALTY:
        ref_fn = policies.by_rows(policy_fn(), method.score_rows, group_size=method.shared_by)
        reference = initial.reference_of(
            layout, run.config.compute, start, ref_fn, settings.reference_moves
        )
    else:
        memory.free(start.loaded)
    frozen = start.base if source is None else trained.base
    run.hold({"frozen weights": frozen, "reference": None if start.base else reference})
    learner = policy_fn((source or policy).model if value == "separate" else None)
    base = start.base if settings.expert_gap else None  # no other step reads it
    functions = Functions(
        trained.bind(learner), ref_fn=reference, base=base, teacher=teacher_params
    )
    return Networks(start, trained, make_optimizer(method, trained.params), functions)


def make_optimizer(method: Method, params: Params) -> optax.GradientTransformation:
    """The optimizer of all trained parameters: ``rl.optimizer``, or the one that Python gives. A
    value model, or a value head with a rate or a warm-up of its own, has its own. Routers are left
    alone unless ``rl.train_routers``.
    """
    settings = method.settings
    given = method.optimizer
    has_critic = "policy" in params or has_own_schedule(method.algorithm_config)
    if given is None:
        check_frozen("rl", settings.optimizer, params)
    else:
        use = "trains the value function alone" if has_critic else "is not used"
        logger.info(f"the optimizer is the one that Python gives; rl.optimizer {use}")
    if has_critic:
        from rlhf_jax.training.rl import critic

        made = critic.make_optimizer(
            settings, method.algorithm_config, method.num_updates, params, given
        )
    else:
        num_steps = settings.num_iterations * method.num_updates
        made = given or optimizer.make_optimizer(settings.optimizer, num_steps)
    return made if settings.train_routers else optimizer.without_routers(made)


def first_state(run: OpenRun, method: Method, networks: Networks, sizes: Sizes) -> LoopState:
    """The state at step 0. Only the loop keeps it, so that its arrays can be donated."""
    layout = run.layout
    create = method.algorithm.State.create
    told = wanted(create, sizes._asdict())
    create = functools.partial(create, optimizer=networks.optimizer, **told)
    train = layout.create(create, networks.trained.params)
    reference = None
    if method.settings.reference_moves:
        reference = layout.copy(models.policy_params(train.params))
    behind = None
    if method.settings.rollouts_ahead:
        policy = layout.copy(models.policy_params(train.params))
        behind = TrainState(layout.copy(train.step), policy, ())
    run.hold(memory.state_parts(train))
    run.hold({"moving reference": reference, "policy that samples": behind})
    return layout.put(LoopState(train, jnp.float32(method.penalty.init), reference, behind))


def policy_of(params: Params, initial: Params) -> Params:
    """The policy's parameters among the trained ones, without the value head and without those that
    an algorithm adds, which are in the checkpoints alone.

    Args:
        initial: the policy's, before the algorithm made its state of them.

    Raises:
        UserError: the algorithm changed their structure, so that no model could be saved.
    """
    trained = models.policy_params(params)
    policy: Params = {part: trained.get(part) for part in initial if part != "value"}
    before = {part: leaves for part, leaves in initial.items() if part != "value"}
    if str(jax.tree.structure(policy)) != str(jax.tree.structure(before)):
        raise UserError(
            "the state of the algorithm has other parameters of the policy than it was given; it "
            "may add some under names of their own beside them"
        )
    return policy


def compiled(
    run: OpenRun,
    policy: LanguageModel,
    method: Method,
    transformation: optax.GradientTransformation,
) -> Programs:
    """The programs of a run."""
    model = policy.model
    layout = run.layout
    settings = method.settings
    plain = initial.sampling_config(settings, policy.tokenizer)
    samples = initial.recorded(plain, model.config.vocab_size)
    validated = initial.validation_config(settings, policy.tokenizer)
    shape, masked = rules(settings, samples, method.is_rewarded)
    group_size = method.algorithm_config.group_size
    # Decoding runs layer after layer, whether or not training scans them.
    num_layers, num_blocks = model.config.num_layers, model.config.num_blocks

    def respond(config: SamplingConfig, size: int) -> Callable[..., Rollout]:
        mesh = layout.sampling_mesh or layout.row_mesh
        program = functools.partial(
            iteration.respond, model=model, mesh=mesh, config=config, group_size=size
        )
        return layout.jit(program, num_layers)

    size = method.shared_by
    algorithm = method.algorithm
    to_groups = to_each = respond(samples, size)
    if algorithm.respond is not None:
        by_algorithm = functools.partial(
            iteration.respond_by,
            algorithm=algorithm,
            settings=method.algorithm_config,
            model=model,
            config=samples,
            mesh=layout.row_mesh,
        )
        to_groups = layout.jit(by_algorithm, num_layers)
    is_same = size == 1 and validated == plain
    rescored = functools.partial(
        iteration.rescored,
        eos_ids=samples.eos_ids,
        score_rows=method.score_rows,
        importance=importance_of(settings),
        expert_gap=expert_gap_of(settings, model, method.score_rows),
        keep_log_probs=algorithm.respond is not None,
        extras=tuple(method.algorithm_config.extras),
    )
    with_greedy = functools.partial(iteration.with_greedy, shape=shape)
    own: Any = {"algorithm": algorithm, "config": method.algorithm_config, "masked": masked}
    informative = functools.partial(iteration.informative, shape=shape, **own)
    refill = functools.partial(iteration.refill, mesh=layout.row_mesh)
    choose = None
    if algorithm.choose is not None:
        number = (1 + settings.dynamic_sampling) * settings.batch_size // group_size
        of_run = functools.partial(algorithm.choose, number=number, config=method.algorithm_config)
        choose = layout.jit(of_run)
    learn = functools.partial(
        iteration.learn,
        optimizer=transformation,
        shape=shape,
        penalty=method.penalty,
        mesh=layout.row_mesh,
        **own,
    )

    def observe(loop: LoopState, rollout: Rollout) -> tuple[LoopState, Metrics]:
        told: Any = algorithm.observe
        train = told(loop.train, masked(rollout), config=method.algorithm_config)
        return replace(loop, train=train), {}

    return Programs(
        respond=to_groups,
        respond_to_each=to_each if is_same else respond(validated, 1),
        respond_greedily=respond(replace(plain, temperature=0.0), size),
        rescored=layout.jit(rescored, num_blocks),
        reward=layout.jit(iteration.reward),
        with_greedy=layout.jit(with_greedy),
        informative=layout.jit(informative, num_blocks),
        refill=layout.jit(refill),
        learn=layout.jit_update(learn, num_blocks),
        observe=layout.jit_update(observe, 0),
        choose=choose,
    )


def importance_of(settings: RLStage) -> tuple[float, losses.ImportanceSampling, float] | None:
    """Cap, kind and floor of the weights of responses that another policy sampled: an engine's,
    or the policy before the last update. None if there are no weights.
    """
    is_current = settings.engine is None and not settings.rollouts_ahead
    if is_current or settings.engine_importance == "off":
        return None
    cap = math.inf if settings.engine_cap is None else settings.engine_cap
    return cap, settings.engine_importance, settings.engine_floor


def expert_gap_of(
    settings: RLStage, model: models.Model, score_rows: int | None
) -> Callable[[Params, Rollout], Array] | None:
    """The function that measures ``rl.expert_gap``; None if it is not asked for.

    Raises:
        UserError: the model has no experts, or an engine samples.
    """
    if not settings.expert_gap:
        return None
    if settings.engine is not None:
        raise UserError(
            "rl.expert_gap: an engine samples, and nobody knows its experts; leave it out"
        )
    if not has_experts(model):
        raise UserError("rl.expert_gap: this model has no experts; leave it out")
    return functools.partial(sampling.expert_gap, model, rows=score_rows)


def rules(
    settings: RLStage, samples: SamplingConfig, is_rewarded: bool = True
) -> tuple[Rule, Rule]:
    """The rule that changes scores before the penalty, and the one that masks rows after it."""
    on_scores: list[Rule] = [] if is_rewarded else [iteration.unrewarded]
    if settings.score_clip is not None:
        on_scores.append(iteration.clipped(settings.score_clip))
    if settings.missing_eos_penalty is not None or settings.missing_eos_score is not None:
        on_scores.append(
            iteration.missing_eos(
                samples.eos_id,
                penalty=settings.missing_eos_penalty,
                score=settings.missing_eos_score,
            )
        )
    if settings.overlong_buffer is not None:
        on_scores.append(
            iteration.overlong(
                max_length=settings.max_new_tokens,
                buffer=settings.overlong_buffer,
                penalty=settings.overlong_penalty,
            )
        )
    masked = (
        iteration.mask_truncated(samples.eos_id) if settings.mask_truncated else iteration.unchanged
    )
    return iteration.then(*on_scores), masked
