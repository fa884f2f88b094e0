"""Settings that do not fit together, found before any data is read or anything is compiled."""

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from types import ModuleType
from typing import Any

import jax

from rlhf_jax.algorithms import vpg
from rlhf_jax.config import DPOStage, RewardModelStage, RLStage, RunConfig, SFTStage
from rlhf_jax.errors import TrainingFault, UserError
from rlhf_jax.training.phases import AlgorithmConfig


def supervised(section: str, settings: SFTStage | RewardModelStage | DPOStage, num_devices: int) -> None:
    """Raises UserError for a batch that does not divide by devices or microbatches."""
    key, fits = f"{section}.batch_size", math.lcm(num_devices, settings.num_microbatches)
    _divides(key, settings.batch_size, {"devices": num_devices}, fits)
    _divides(key, settings.batch_size, {f"{section}.num_microbatches": settings.num_microbatches}, fits)


def reinforcement(
    algorithm: ModuleType, name: str, settings: RLStage, algorithm_config: AlgorithmConfig, num_devices: int
) -> None:
    """Raises UserError for values that the algorithm refuses, batches that do not divide, unusable sampling."""
    try:
        algorithm.check_config(algorithm_config)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    if algorithm_config.aggregate == "fixed" and algorithm_config.length is None:
        raise UserError(
            f"{name}.aggregate fixed needs {name}.length, such as rl.max_new_tokens {settings.max_new_tokens}"
        )
    if settings.num_episodes is not None:
        episodes = f"{settings.length} iterations with {settings.length * settings.batch_size} episodes"
        print(f"rl.num_episodes {settings.num_episodes}: {episodes}, whatever rl.num_iterations is", flush=True)
    size, num_minibatches = settings.batch_size, algorithm_config.num_minibatches
    group, num_microbatches = group_size(algorithm_config), algorithm_config.num_microbatches
    blocks = algorithm_config.shuffle_blocks if num_minibatches > 1 else 1
    fits = math.lcm(num_devices, group, num_minibatches * blocks, num_minibatches * num_microbatches)
    _divides("rl.batch_size", size, {"devices": num_devices}, fits)
    _divides("rl.batch_size", size, {f"answers to one prompt ({name}.group_size)": group}, fits)
    parts = {f"{name}.num_minibatches": num_minibatches, f"{name}.shuffle_blocks": blocks}
    _divides("rl.batch_size", size, parts, fits)
    minibatch = size // num_minibatches
    if minibatch % num_microbatches:
        raise UserError(
            f"{name}.num_microbatches {num_microbatches} does not divide the {minibatch} rows of a minibatch "
            f"(rl.batch_size {size} / {name}.num_minibatches {num_minibatches})"
        )
    if settings.temperature <= 0:
        raise UserError(f"rl.temperature: training needs a temperature above 0, got {settings.temperature}")
    truncated = settings.top_k is not None or (settings.top_p is not None and settings.top_p < 1)
    if truncated and not settings.allow_truncated_sampling:
        raise UserError(
            "rl.top_k and rl.top_p: such samples do not come from the distribution whose log-probabilities the update "
            "uses, and the KL estimate can turn negative; set rl.allow_truncated_sampling to train on them all the same"
        )
    if settings.missing_eos_penalty is not None and settings.missing_eos_score is not None:
        raise UserError("rl.missing_eos_penalty and rl.missing_eos_score: give one of the two")


def same_columns(training: Collection[str], validation: Collection[str]) -> None:
    """Raises UserError where the prompts for validation lack a column that a reward may ask for."""
    missing = [name for name in training if name not in validation]
    if missing:
        raise UserError(
            f"rl.validation_data: its rows have no {', '.join(missing)}, which the prompts in training have; a reward "
            "may read it"
        )


def needs_reference(settings: RLStage, config: AlgorithmConfig, kl_coef: float) -> bool:
    """True where a KL from the reference policy enters the reward or the loss.

    Raises:
        UserError: a reference that nothing reads is to be refreshed.
    """
    in_loss = not isinstance(config, vpg.Config) and config.kl_loss_coef
    needed = bool(kl_coef or in_loss or settings.kl_target is not None)
    if settings.reference_refresh is not None and not needed:
        raise UserError("rl.reference_refresh: no KL is used here; set rl.kl_coef above 0 or leave it out")
    return needed


def group_size(config: AlgorithmConfig) -> int:
    """Answers to each prompt: 1 but for RLOO and GRPO."""
    return getattr(config, "group_size", 1)


def num_updates(settings: RLStage, config: AlgorithmConfig) -> int:
    """Optimizer steps of a run: the length of its learning-rate schedule."""
    num_epochs = 1 if isinstance(config, vpg.Config) else config.num_epochs
    return settings.length * num_epochs * config.num_minibatches


@contextlib.contextmanager
def explains_memory(
    config: RunConfig, stage: str, state: Any, beside: Mapping[str, Any] | None = None, cache: Any = None
) -> Iterator[None]:
    """What a stage compiles and computes; where that does not fit into memory, says what takes it and what would help.

    Args:
        stage: such as "sft" or "ppo".
        state: of the loop, with ``train`` in it or a TrainState itself; its shapes alone are read, as a donated one has
            no values any more.
        beside: {name: pytree} of what else stays on the devices, such as rewards.
        cache: shapes of what sampling holds on a device while it goes on.

    Raises:
        TrainingFault: in place of XLA's RESOURCE_EXHAUSTED.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        train = getattr(state, "train", state)
        held = {"trained parameters": train.params, "optimizer state": train.opt_state}
        held |= {"refreshed reference": getattr(state, "reference", None)} | dict(beside or {})
        always = " and ".join(said for name, tree in held.items() if (said := _mebibytes(tree, name)))
        sampling = f", while it samples {_mebibytes(cache, 'cache')} too" if cache is not None else ""
        adapters = "shorter texts" if config.lora.rank else "--lora.rank 8, which needs no optimizer state for the rest"
        section = stage if hasattr(getattr(config, stage), "batch_size") else "rl"
        raise TrainingFault(
            f"{stage}: out of memory. On each device lie {always}{sampling}, in the update "
            f"{_mebibytes(train.params, 'gradients')}; activations come on top of that. What helps most: "
            f"more --{stage}.num-microbatches (now {getattr(config, stage).num_microbatches}), "
            f"a smaller --{section}.batch-size (now {getattr(config, section).batch_size}), "
            f"{adapters if config.compute.remat else '--compute.remat'}. XLA said: {str(error).splitlines()[0]}"
        ) from error


def _mebibytes(tree: Any, name: str) -> str:
    """What the arrays of a tree, or their shapes on one device, take there; empty where there are none."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    spread = [getattr(leaf, "sharding", None) for leaf in leaves]
    shapes = [leaf.shape if s is None else s.shard_shape(leaf.shape) for s, leaf in zip(spread, leaves, strict=True)]
    size = sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves, strict=True))
    return f"{size / 2**20:.1f} MiB of {name}" if leaves else ""


def _divides(key: str, size: int, parts: dict[str, int], fits: int) -> None:
    """``fits``: sizes that all requirements together allow are its multiples."""
    if size % math.prod(parts.values()) == 0:
        return
    below = size - size % fits
    nearest = f"{below} or {below + fits}" if below else f"{fits}"
    among = " x ".join(f"{count} {name}" for name, count in parts.items())
    raise UserError(f"{key} {size} does not divide by {among}; use {nearest}")
