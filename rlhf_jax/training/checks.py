"""Settings that do not fit together, found before any data is read or anything is compiled."""

from collections.abc import Collection
from types import ModuleType

from rlhf_jax.algorithms import vpg
from rlhf_jax.config import DPOStage, RewardModelStage, RLStage, SFTStage
from rlhf_jax.errors import UserError
from rlhf_jax.training.phases import AlgorithmConfig


def supervised(section: str, settings: SFTStage | RewardModelStage | DPOStage, num_devices: int) -> None:
    """Raises UserError for a batch that does not divide by devices or microbatches."""
    _divides(f"{section}.batch_size", settings.batch_size, {"devices": num_devices})
    _divides(f"{section}.batch_size", settings.batch_size, {f"{section}.num_microbatches": settings.num_microbatches})


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
    size, num_minibatches = settings.batch_size, algorithm_config.num_minibatches
    _divides("rl.batch_size", size, {"devices": num_devices})
    _divides("rl.batch_size", size, {f"answers to one prompt ({name}.group_size)": group_size(algorithm_config)})
    if num_minibatches > 1:
        blocks = algorithm_config.shuffle_blocks
        _divides("rl.batch_size", size, {f"{name}.num_minibatches": num_minibatches, f"{name}.shuffle_blocks": blocks})
    minibatch, num_microbatches = size // num_minibatches, algorithm_config.num_microbatches
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
    return settings.num_iterations * num_epochs * config.num_minibatches


def _divides(key: str, size: int, parts: dict[str, int]) -> None:
    multiple = 1
    for count in parts.values():
        multiple *= count
    if size % multiple == 0:
        return
    below = size - size % multiple
    nearest = f"{below} or {below + multiple}" if below else f"{multiple}"
    among = " x ".join(f"{count} {name}" for name, count in parts.items())
    raise UserError(f"{key} {size} does not divide by {among}; use {nearest}")
