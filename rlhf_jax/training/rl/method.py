"""How the policy of an RL run learns: an algorithm with its settings, checked against the run's."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from rlhf_jax import iteration, models
from rlhf_jax.config import ModelSource, RLStage
from rlhf_jax.errors import UserError, logger
from rlhf_jax.graders import spec
from rlhf_jax.iteration import Penalty
from rlhf_jax.training.common import layout, references
from rlhf_jax.training.common.layout import Shares
from rlhf_jax.training.common.stage import Stage
from rlhf_jax.types import Algorithm, AlgorithmConfig, Metrics, TrainState


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
    config: AlgorithmConfig
    settings: RLStage
    penalty: Penalty
    score_rows: int | None  # rows that policy, reference and reward model score at once; None: all
    optimizer: optax.GradientTransformation | None = None  # None means ``rl.optimizer``
    is_rewarded: bool = True  # False if it learns only from a teacher
    value_source: str | None = None  # that a separate value model starts from; None: the policy
    shared_by: int = 1  # adjacent rows that compute their prompt once; see ``training.rl.sharing``


def check_settings(
    name: str, settings: RLStage, config: AlgorithmConfig, shares: Shares
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
    parts = divisors(name, config, shares)
    layout.check_divides("rl.batch_size", settings.batch_size, groups, *parts)
    return microbatches | {"rl.batch_size": settings.batch_size}


def divisors(name: str, config: AlgorithmConfig, shares: Shares) -> list[dict[str, int]]:
    """What the rows of a batch are divided by, {dotted setting: number} each: devices or blocks,
    minibatches, microbatches.
    """
    minibatches = {f"{name}.num_minibatches": config.num_minibatches}
    microbatches = {f"{name}.num_microbatches": config.num_microbatches}
    sharers = layout.sharers(shares, microbatches)
    shuffle_blocks = config.shuffle_blocks if config.num_minibatches > 1 else 1
    return [
        {"mesh.sampling": shares.sampling or 1},
        sharers,
        minibatches | {f"{name}.shuffle_blocks": shuffle_blocks},
        minibatches | microbatches,
        minibatches | (sharers if shares.blocks else {}),
    ]


def check_warmup(name: str, settings: RLStage, config: AlgorithmConfig) -> None:
    """Raises UserError if the value function alone learns in all iterations."""
    warmup = config.value_warmup
    if warmup >= settings.num_iterations:
        raise UserError(
            f"{name}.value_warmup {warmup}: of {settings.num_iterations} iterations, no iteration "
            "is left for the policy"
        )


def lasting(stage: Stage, method: Method, prompts: int) -> tuple[Stage, Method]:
    """Stage and method with the number of iterations, where ``rl.num_epochs`` is the length. Prints
    how long the run is.

    Args:
        prompts: that are trained on.

    Raises:
        UserError: the value function alone learns in all iterations.
    """
    group_size = method.config.group_size
    settings = method.settings.lasting(prompts=prompts, group_size=group_size)
    check_warmup(stage.name, settings, method.config)
    number = settings.batch_size // group_size
    iterations = settings.num_iterations
    passes = iterations * number / prompts
    logger.info(
        f"{iterations} iterations of {number} prompts x {group_size} answers: {passes:.3g} passes "
        f"over {prompts} prompts"
    )
    return stage.noted(rl=settings), method._replace(settings=settings)


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
