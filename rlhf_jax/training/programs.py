"""The models of an RL run on the devices, and the programs that sample, score and learn."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import optax

from rlhf_jax import models, ops
from rlhf_jax.config import RLStage, RunConfig
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generator import LanguageModel
from rlhf_jax.runs import devices
from rlhf_jax.sampling import SamplingConfig
from rlhf_jax.training import critic, initial, memory, own, phases
from rlhf_jax.training.initial import Trainable
from rlhf_jax.training.phases import Functions, LoopState, Penalty, Rule
from rlhf_jax.training.stage import Stage
from rlhf_jax.types import (
    Algorithm,
    AlgorithmConfig,
    Metrics,
    Params,
    PolicyFn,
    PolicyOutput,
    Rollout,
)


class Method(NamedTuple):
    """How the policy learns."""

    algorithm: Algorithm
    config: AlgorithmConfig
    penalty: Penalty
    score_rows: int | None  # that policy, reference and reward model score at once
    optimizer: optax.GradientTransformation | None = None  # None: that of ``rl.optimizer``


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
    config: RunConfig,
    algorithm: Algorithm,
    algorithm_config: AlgorithmConfig,
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


def networks_of(stage: Stage, begun: LanguageModel, method: Method) -> Networks:
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
