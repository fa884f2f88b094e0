"""The models of an RL run on the devices, and the programs that sample, score and learn."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import optax
from jax import Array

from rlhf_jax import iteration, losses, models, ops, sampling
from rlhf_jax.config import RLStage
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.iteration import Functions, LoopState, Rule
from rlhf_jax.runs import devices
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.sampling.routing import has_experts
from rlhf_jax.training.common import initial, memory, own
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.optimizer import check_frozen
from rlhf_jax.training.common.stage import Stage
from rlhf_jax.training.rl import critic
from rlhf_jax.training.rl.method import Method
from rlhf_jax.types import (
    Metrics,
    Params,
    PolicyFn,
    PolicyOutput,
    Rollout,
    TrainState,
)


class Networks(NamedTuple):
    """The models of a run on the devices, and the optimizer."""

    start: Trainable  # the policy before training
    trained: Trainable  # ``start``, or with a separate value model {"policy", "value"}
    optimizer: optax.GradientTransformation
    functions: Callable[[int], Functions]  # (columns of a rollout) -> the functions of its steps


class Sizes(NamedTuple):
    """Sizes that the ``create`` of an algorithm's State is told if it has parameters for them."""

    rows: int  # B of a rollout
    columns: int  # T of the widest rollout
    prompts: int  # data rows; ``rollout.row_ids`` are their numbers, from 0

    def wanted(self, create: Callable[..., TrainState]) -> dict[str, int]:
        """Those that are parameters of ``create``."""
        parameters = inspect.signature(create).parameters
        return {name: size for name, size in self._asdict().items() if name in parameters}


class Programs(NamedTuple):
    """Functions of ``iteration`` with their settings bound; the first call compiles each."""

    respond: Callable[..., Rollout]
    respond_to_each: Callable[..., Rollout]  # to the prompts of a validation, one response each
    respond_greedily: Callable[..., Rollout]
    rescored: Callable[..., tuple[Rollout, Metrics]]
    reward: Callable[..., tuple[Rollout, Metrics]]
    with_greedy: Callable[..., Rollout]
    num_equal: Callable[..., Array]
    refill: Callable[..., Rollout]
    learn: Callable[..., tuple[LoopState, Metrics]]


def networks_of(
    stage: Stage,
    policy: LanguageModel,
    method: Method,
    source: LanguageModel | None = None,
    teacher: LanguageModel | None = None,
) -> Networks:
    """Puts policy, value model and reference on the devices. The teacher is there already.

    source: what a separate value model starts from; None: the policy.
    """
    settings = method.settings
    value = method.config.value if method.algorithm.needs_values else None
    model = policy.model if value else policy.model._replace(values=None)
    has_head = model.values is not None
    if has_head:
        critic.check_own_head(method.config)
    width = own.width(policy)

    def begin(params: Params, source: Params | None) -> tuple[Trainable, Trainable]:
        return critic.start(stage, params, value, width, source, has_head=has_head)

    start, trained = stage.made(begin, policy.params, None if source is None else source.params)
    taught_by = None
    if teacher is not None:
        taught_by = models.Teacher(teacher.model, method.config.measure)
    teacher_params = None if teacher is None else teacher.params
    stage.hold({"teacher": teacher_params})

    def policy_fn(columns: int, value_model: models.Model | None = None) -> PolicyFn:
        """Computes logits only for the last ``max_new_tokens`` columns: none for the prompt."""
        return models.policy_fn(
            model,
            settings.temperature,
            prompt_length=columns - settings.max_new_tokens,
            value_model=value_model,
            teacher=taught_by,
            group_size=method.shared_by,
        )

    def scored(params: Params, tokens: Array, *more: Any, **support: Array) -> PolicyOutput:
        return policy_fn(tokens.shape[1])(params, tokens, *more, **support)

    has_reference = method.penalty is not iteration.NO_PENALTY
    reference = None
    if has_reference:
        ref_fn = ops.by_rows(scored, method.score_rows, group_size=method.shared_by)
        reference = stage.reference(start, ref_fn, settings.reference_moves)
    else:
        memory.free(start.loaded)
    frozen = start.base if source is None else trained.base
    stage.hold({"frozen weights": frozen, "reference": None if start.base else reference})
    value_model = (source or policy).model if value == "separate" else None

    @functools.cache
    def functions(columns: int) -> Functions:
        learner = trained.bind(policy_fn(columns, value_model))
        base = start.base if settings.expert_gap else None  # no other step reads it
        return Functions(learner, ref_fn=reference, base=base, teacher=teacher_params)

    optimizer = _optimizer(method, trained.params)
    return Networks(start, trained, optimizer, functions)


def _optimizer(method: Method, params: Params) -> optax.GradientTransformation:
    """The optimizer of all trained parameters. Prints whether ``rl.optimizer`` is still used."""
    settings = method.settings
    if method.optimizer is not None:
        has_critic = critic.has_own_optimizer(method.config, params)
        use = "trains the value function alone" if has_critic else "is not used"
        logger.info(f"the optimizer is the one that Python gives; rl.optimizer {use}")
    else:
        check_frozen("rl", settings.optimizer, params)
    updates = method.config.num_epochs * method.config.num_minibatches
    return critic.make_optimizer(settings, method.config, updates, params, method.optimizer)


def first_state(stage: Stage, method: Method, networks: Networks, sizes: Sizes) -> LoopState:
    """The state at step 0. Only the loop keeps it, so that its arrays can be donated."""
    create = method.algorithm.State.create
    how: Any = {"optimizer": networks.optimizer, **sizes.wanted(create)}
    train = stage.take(functools.partial(create, **how), networks.trained.params)
    reference = None
    if method.settings.reference_moves:
        reference = stage.copy(models.policy_params(train.params))
    behind = None
    if method.settings.rollouts_ahead:
        policy = stage.copy(models.policy_params(train.params))
        behind = TrainState(stage.copy(train.step), policy, ())
    stage.hold({"moving reference": reference, "policy that samples": behind})
    return stage.lay_out(LoopState.create(train, method.penalty.init, reference, behind))


def compiled(
    stage: Stage,
    policy: LanguageModel,
    method: Method,
    optimizer: optax.GradientTransformation,
) -> Programs:
    """The programs of a run."""
    model = policy.model
    settings = method.settings
    plain = initial.sampling_config(settings, policy.tokenizer)
    samples = initial.recorded(plain, model.config.vocab_size)
    shape, masked = rules(settings, samples, method.is_rewarded)
    groups: Any = {"group_size": method.config.group_size, "masked": masked}
    mesh = stage.sampling_mesh or stage.row_mesh
    respond = functools.partial(iteration.respond, model=model, mesh=mesh)
    rescored = functools.partial(
        iteration.rescored,
        eos_ids=samples.eos_ids,
        score_rows=method.score_rows,
        importance=importance_of(settings),
        expert_gap=expert_gap_of(settings, model, method.score_rows),
    )
    learn = functools.partial(
        iteration.learn,
        algorithm=method.algorithm,
        config=method.config,
        optimizer=optimizer,
        shape=shape,
        penalty=method.penalty,
        masked=masked,
        mesh=stage.row_mesh,
    )

    def jit(program: Callable[..., Any], num_blocks: int = 0, **bound: Any) -> Any:
        options = devices.compiler_options(num_blocks)
        return stage.jit(functools.partial(program, **bound), compiler_options=options)

    # Decoding runs layer after layer, whether or not training scans them.
    layers = model.config.num_layers
    blocks = model.config.num_blocks
    greedy = replace(plain, temperature=0.0)
    size = method.shared_by
    to_groups = jit(respond, layers, config=samples, group_size=size)
    validated = initial.validation_config(settings, policy.tokenizer)
    to_each = to_groups
    if size > 1 or validated != plain:
        to_each = jit(respond, layers, config=validated)
    return Programs(
        respond=to_groups,
        respond_to_each=to_each,
        respond_greedily=jit(respond, layers, config=greedy, group_size=size),
        rescored=jit(rescored, blocks),
        reward=stage.jit(iteration.reward),
        with_greedy=jit(iteration.with_greedy, shape=shape),
        num_equal=jit(iteration.num_equal, **groups),
        refill=jit(iteration.refill, **groups, mesh=stage.row_mesh),
        learn=stage.jit_update(learn, blocks),
    )


def importance_of(settings: RLStage) -> tuple[float, losses.ImportanceSampling] | None:
    """Cap and kind of the importance weights of responses that another policy sampled: an engine's,
    or the policy before the last update. None if there are no weights.
    """
    is_current = settings.engine is None and not settings.rollouts_ahead
    if is_current or settings.engine_importance == "off":
        return None
    return settings.engine_cap, settings.engine_importance


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
