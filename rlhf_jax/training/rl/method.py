"""How the policy of an RL run learns: an algorithm with its settings, checked against the run's."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from rlhf_jax import iteration, models
from rlhf_jax.config import Compute, ModelSource, RLStage, RunConfig, model_source
from rlhf_jax.errors import UserError, logger
from rlhf_jax.graders import spec
from rlhf_jax.iteration import Penalty
from rlhf_jax.training.common import layout, memory, rates, references
from rlhf_jax.training.common.layout import Layout
from rlhf_jax.training.common.opening import OpenRun
from rlhf_jax.types import Algorithm, AlgorithmConfig, Metrics, Params, Rollout, TrainState


class Given(NamedTuple):
    """What a program passes to a run in place of settings. The manifest uses these names."""

    algorithm: Algorithm | None = None  # None if it is one of the package's
    reward: spec.Reward | spec.FunctionOfTexts | None = None
    optimizer: optax.GradientTransformation | None = None
    policy: models.Model | None = None


NOTHING = Given()
_CALLED = (
    "a run calls update(state, rollout, key, *, policy_fn, optimizer, config, axis_name=None, "
    "minibatch_sharding=None)"
)


@dataclasses.dataclass(frozen=True)
class CompleteAlgorithm:
    """What a run reads of an algorithm, with the value of each name that it leaves out."""

    name: str
    Config: type[Any]
    update: Callable[..., tuple[Any, Metrics]]
    State: type[TrainState] = TrainState
    needs_values: bool = False
    kl_coef: float = 0.0
    respond: Callable[..., Rollout] | None = None
    choose: Callable[..., jax.Array] | None = None
    prepare: Callable[..., Rollout] | None = None
    observe: Callable[..., TrainState] | None = None

    @property
    def __name__(self) -> str:
        """Of a module, as ``Algorithm`` has it."""
        return self.name


def completed(algorithm: Any) -> CompleteAlgorithm:
    """The algorithm with the defaults of what it leaves out.

    Raises:
        UserError: it has no ``Config`` or no ``update``, without which there is nothing to run, or
            they are not what a run calls.
    """
    name = getattr(algorithm, "__name__", type(algorithm).__name__)
    missing = [part for part in ("Config", "update") if not hasattr(algorithm, part)]
    if missing:
        raise UserError(
            f"{name}: an algorithm needs {' and '.join(missing)}: Config is a frozen dataclass, "
            "algorithms.policy.Config for example, and update makes the next state"
        )
    read = [field.name for field in dataclasses.fields(CompleteAlgorithm)]
    given = {part: getattr(algorithm, part) for part in read if hasattr(algorithm, part)}
    complete = CompleteAlgorithm(**given | {"name": name})
    _check_parts(complete)
    return complete


def _check_parts(algorithm: CompleteAlgorithm) -> None:
    """Raises UserError for a part that a run could not use, before the first step is compiled."""
    name = algorithm.name
    if not isinstance(algorithm.Config, type):
        given = type(algorithm.Config).__name__
        raise UserError(f"{name}.Config must be the class of its settings, got an object, {given}")
    if not hasattr(algorithm.State, "create"):
        raise UserError(
            f"{name}.State needs create(params, optimizer), as TrainState has; got "
            f"{algorithm.State!r}"
        )
    if not isinstance(algorithm.kl_coef, int | float):
        raise UserError(f"{name}.kl_coef must be a number, got {algorithm.kl_coef!r}")
    arrays = ("state", "rollout", "key")
    by_name = dict.fromkeys(("policy_fn", "optimizer", "config", "minibatch_sharding"))
    try:
        bound = inspect.signature(algorithm.update).bind(*arrays, **by_name).arguments
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}.update: {error}; {_CALLED}") from None
    if any(taken in arrays and taken != given for taken, given in bound.items()):
        raise UserError(f"{name}.update takes {', '.join(list(bound)[:3])}; {_CALLED}")


class Method(NamedTuple):
    """How the policy learns."""

    algorithm: CompleteAlgorithm
    algorithm_config: AlgorithmConfig  # the algorithm's own section
    settings: RLStage
    penalty: Penalty
    score_rows: int | None  # rows that policy, reference and reward model score at once; None: all
    optimizer: optax.GradientTransformation | None = None  # None means ``rl.optimizer``
    is_rewarded: bool = True  # False if it learns only from a teacher
    value_source: str | None = None  # that a separate value model starts from; None: the policy
    shared_by: int = 1  # adjacent rows that compute their prompt once; see ``training.rl.sharing``

    @property
    def num_updates(self) -> int:
        """Optimizer steps of an iteration."""
        return int(self.algorithm_config.num_epochs * self.algorithm_config.num_minibatches)

    @property
    def counts_steps(self) -> bool:
        """Whether the learning rate depends on how many optimizer steps there will be."""
        return self.optimizer is None and self.settings.optimizer.counts_steps


_VALUE_SETTINGS = ("value", "value_from", "value_learning_rate", "value_warmup")


def check_value_settings(name: str, config: AlgorithmConfig, needs_values: bool) -> None:
    """Checks what an algorithm's settings say of its value function.

    Raises:
        UserError: of settings that contradict each other, or that an algorithm without values has.
    """
    defaults = AlgorithmConfig()
    given = [key for key in _VALUE_SETTINGS if getattr(config, key) != getattr(defaults, key)]
    if given and not needs_values:
        raise UserError(
            f"{name}.{given[0]}: the algorithm reads no values; give its module needs_values = "
            "True, or leave this out"
        )
    if config.value not in ("shared", "separate"):
        raise UserError(f"{name}.value must be shared or separate, got {config.value!r}")
    rate = config.value_learning_rate
    if rate is not None and not (isinstance(rate, int | float) and rate >= 0):
        raise UserError(f"{name}.value_learning_rate must be a number from 0 on, got {rate!r}")
    if config.value_from != "policy" and config.value != "separate":
        raise UserError(
            f"{name}.value_from {config.value_from}: a shared value function has the policy's "
            "body; give value: separate too"
        )


def has_own_schedule(config: AlgorithmConfig) -> bool:
    """Whether the value function has a learning rate or a warm-up of its own."""
    return config.value_learning_rate is not None or config.value_warmup > 0


def check_own_head(config: AlgorithmConfig) -> None:
    """Raises UserError if a value head inside the policy's network should have its own optimizer,
    which does not know its parameters.
    """
    if config.value == "shared" and has_own_schedule(config):
        raise UserError(
            "value_learning_rate, value_warmup: the policy's network has a value head of its own, "
            "which learns with it; leave them out, or give value: separate"
        )


def method_of(
    config: RunConfig,
    algorithm: CompleteAlgorithm,
    own: AlgorithmConfig,
    given: Given = NOTHING,
) -> Method:
    """How the policy of a run learns.

    own: the algorithm's own settings.
    """
    settings = config.rl
    value_source = None
    if algorithm.needs_values and own.value_from != "policy":
        from rlhf_jax.training.rl import critic

        value_source = critic.source_of(config.reward, own)
    return Method(
        algorithm,
        own,
        settings,
        penalty=penalty_of(model_source(config), settings, algorithm, own),
        score_rows=memory.score_rows(config.compute, settings.batch_size, own),
        optimizer=given.optimizer,
        is_rewarded=is_rewarded(config.reward, settings, own, given),
        value_source=value_source,
    )


def check_settings(
    name: str, settings: RLStage, config: AlgorithmConfig, on: Layout
) -> dict[str, int]:
    """Checks the settings of a run against each other and the devices. Returns the sizes that help
    when memory runs out, {dotted setting: value}.

    Raises:
        UserError: the batch does not divide by devices, groups, minibatches and microbatches; there
            are no groups to replace; the policy never learns; several processes sample ahead.
    """
    if settings.rollouts_ahead and jax.process_count() > 1:
        raise UserError(
            "rl.rollouts_ahead: several processes sample with the current weights; leave it out"
        )
    if settings.dynamic_sampling and config.group_size == 1:
        raise UserError(
            f"rl.dynamic_sampling: {name} samples one answer to a prompt; there are no groups to "
            "replace"
        )
    if settings.num_epochs is None:  # else nobody has counted the prompts yet
        check_warmup(name, settings, config)
    microbatches = {f"{name}.num_microbatches": config.num_microbatches}
    groups = {f"answers to one prompt ({name}.group_size)": config.group_size}
    parts = divisors(name, config, on)
    if config.whole_groups:
        parts = [part | groups for part in parts]
    layout.check_divides("rl.batch_size", settings.batch_size, groups, *parts)
    return microbatches | {"rl.batch_size": settings.batch_size}


def check_sampling(
    algorithm: CompleteAlgorithm, settings: RLStage, compute: Compute, on: Layout
) -> None:
    """Raises UserError for settings by which something else samples, or samples earlier, than an
    algorithm with ``respond`` or ``choose`` of its own says.
    """
    refused = {
        "rl.rollouts_ahead": bool(settings.rollouts_ahead),
        "rl.engine": settings.engine is not None,
        "mesh.sampling": on.sampling_mesh is not None,
        "compute.offload reference": "reference" in compute.offload,
    }
    own = "respond" if algorithm.respond is not None else "choose"
    for name in refused if own == "respond" else ["rl.rollouts_ahead"]:
        if getattr(algorithm, own) is not None and refused[name]:
            raise UserError(
                f"{name}: {algorithm.__name__}.{own} says how each step samples; leave it out"
            )


def divisors(name: str, config: AlgorithmConfig, on: Layout) -> list[dict[str, int]]:
    """What the rows of a batch are divided by, {dotted setting: number} each: devices or blocks,
    minibatches, microbatches.
    """
    minibatches = {f"{name}.num_minibatches": config.num_minibatches}
    microbatches = {f"{name}.num_microbatches": config.num_microbatches}
    sharers = layout.sharers(on, microbatches)
    shuffle_blocks = config.shuffle_blocks if config.num_minibatches > 1 else 1
    return [
        {"mesh.sampling": 1 if on.sampling_mesh is None else on.sampling_mesh.size},
        sharers,
        minibatches | {f"{name}.shuffle_blocks": shuffle_blocks},
        minibatches | microbatches,
        minibatches | (sharers if on.blocks else {}),
    ]


def check_warmup(name: str, settings: RLStage, config: AlgorithmConfig) -> None:
    """Raises UserError if the value function alone learns in all iterations."""
    warmup = config.value_warmup
    if warmup >= settings.num_iterations:
        raise UserError(
            f"{name}.value_warmup {warmup}: of {settings.num_iterations} iterations, no iteration "
            "is left for the policy"
        )


def choose_rate(run: OpenRun, method: Method, params: Params) -> tuple[OpenRun, Method]:
    """Run and method with a learning rate, by the size of the policy where the settings have none.
    They keep none where an optimizer from Python trains all.
    """
    own = method.algorithm_config
    has_critic = method.algorithm.needs_values and (
        own.value == "separate" or has_own_schedule(own)
    )
    if method.optimizer is not None and not has_critic:
        return run, method
    size = rates.size_of(run.config.lora, params)
    adam = rates.with_rate("rl", method.settings.optimizer, size)
    settings = dataclasses.replace(method.settings, optimizer=adam)
    return run.decide(rl=settings), method._replace(settings=settings)


def count_iterations(run: OpenRun, method: Method, prompts: int) -> tuple[OpenRun, Method]:
    """Run and method with the number of iterations, where ``rl.num_epochs`` is the length. Prints
    how long the run is.

    Args:
        prompts: that are trained on.

    Raises:
        UserError: the value function alone learns in all iterations.
    """
    group_size = method.algorithm_config.group_size
    settings = method.settings.lasting(prompts=prompts, group_size=group_size)
    check_warmup(run.name, settings, method.algorithm_config)
    number = settings.batch_size // group_size
    iterations = settings.num_iterations
    passes = iterations * number / prompts
    logger.info(
        f"{iterations} iterations of {number} prompts x {group_size} answers: {passes:.3g} passes "
        f"over {prompts} prompts"
    )
    return run.change(rl=settings), method._replace(settings=settings)


def penalty_of(
    source: ModelSource,
    settings: RLStage,
    algorithm: CompleteAlgorithm,
    algorithm_config: AlgorithmConfig,
) -> Penalty:
    """The KL penalty; without one, and without a KL in the loss, the run needs no reference."""
    coef = algorithm.kl_coef if settings.kl_coef is None else settings.kl_coef
    if coef or algorithm_config.kl_in_loss or settings.kl_target is not None:
        references.check(source, settings)
        return iteration.kl_penalty(coef, target=settings.kl_target, horizon=settings.kl_horizon)
    if settings.reference_moves:
        name = "reference_refresh" if settings.reference_ema is None else "reference_ema"
        raise UserError(f"rl.{name}: no KL is used here; set rl.kl_coef above 0 or leave it out")
    return iteration.NO_PENALTY


def is_rewarded(
    reward: Sequence[str], settings: RLStage, algorithm_config: AlgorithmConfig, given: Given
) -> bool:
    """Whether there is a reward. With a teacher there need not be one, but the rewards of an
    environment are added to one (UserError).
    """
    if reward or given.reward is not None or not algorithm_config.needs_teacher:
        return True
    if settings.environment:
        raise UserError(
            "rl.environment pays, so its run has a reward: give --reward, such as length*0"
        )
    return False


def optimizer_steps(state: iteration.LoopState) -> int:
    """The steps that the optimizer's schedules have counted so far."""
    counts = optax.tree_utils.tree_get_all_with_path(state.train.opt_state, "count")
    return max((int(count) for _, count in counts), default=0)


def check_optimizer_steps(
    method: Method, state: iteration.LoopState, before: int, metrics: Metrics
) -> None:
    """Prints a line if the first iteration took other than ``num_updates`` optimizer steps, those
    that a schedule of the learning rate counts with.

    Args:
        before: ``optimizer_steps`` before it.
    """
    taken = optimizer_steps(state) - before
    updates = method.num_updates
    if taken != updates and not float(metrics["nonfinite"]) > 0:
        logger.info(
            f"warning: an iteration took {taken} optimizer steps, and the schedule of "
            f"rl.optimizer counts with {updates}, the algorithm's num_epochs * num_minibatches:"
            f" it ends too {'early' if taken > updates else 'late'}. Give the config these "
            "attributes, or choose the schedule constant"
        )
