"""The three stages of RLHF from one config: SFT, a reward model on its body, PPO on its policy."""

import dataclasses
import gc
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rlhf_jax.config import RunConfig, Tokenizer
from rlhf_jax.errors import logger
from rlhf_jax.runs import folder, processes, writing
from rlhf_jax.training import rl
from rlhf_jax.training.common.saving import RunResult
from rlhf_jax.training.common.setup import choose_devices
from rlhf_jax.training.supervised import reward_model, sft

STAGES = ("sft", "reward_model", "ppo")
C = TypeVar("C", bound=RunConfig)


class PipelineResult(NamedTuple):
    """The three runs; the last one's model is the pipeline's."""

    sft: RunResult
    reward_model: RunResult
    ppo: RunResult


def run(config: RunConfig) -> PipelineResult:
    """Runs the stages in the subfolders ``sft``, ``reward_model`` and ``ppo`` of
    ``config.output_dir``.

    Each stage starts from the folder of the stage before. ``resume`` skips finished stages and
    continues the stage that was stopped.

    Raises:
        UserError: the folder is used, or an error of a stage.
    """
    path = Path(config.output_dir or "runs/pipeline")
    choose_devices(config, [path / stage for stage in STAGES])
    processes.in_first(lambda: check_folder(path, config))
    return run_stages(config, path)


def run_stages(config: RunConfig, path: Path) -> PipelineResult:
    """``run`` in a folder that ``check_folder`` has checked."""
    if config.reward:
        logger.info(
            "`reward` is not used: stage 2's model rewards PPO; `rlhf-jax ppo` takes a reward of "
            "your own"
        )
    logger.info("stage 1 of 3: supervised fine-tuning")
    first = sft.run(stage_config(config, path / "sft"))
    base = str(first.model_folder)
    logger.info("stage 2 of 3: reward model")
    second = reward_model.run(stage_config(config, path / "reward_model", base))
    ensemble = "mean:" if config.reward_model.ensemble_size > 1 else ""
    rewarded = dataclasses.replace(config, reward=(f"{ensemble}{second.model_folder}",))
    logger.info("stage 3 of 3: PPO")
    gc.collect()  # objects of the reward model's run still hold its weights
    return PipelineResult(first, second, rl.run(stage_config(rewarded, path / "ppo", base)))


def check_folder(path: Path, config: RunConfig, first: str = STAGES[0]) -> None:
    """Refuses a folder in use; the stages check their own subfolders. Logs that ``resume`` finds no
    checkpoint.

    Args:
        first: the subfolder that is written first: a folder without it is not overwritten.

    Raises:
        UserError: as ``folder.open_run``.
    """
    writing.refuse_links(path / stage for stage in STAGES)
    is_free = path.is_dir() and all(
        entry.is_dir() and folder.is_unused(entry) for entry in path.iterdir()
    )
    is_own = config.overwrite and (path / first).is_dir()
    if config.resume or not (is_free or is_own):
        folder.check_usable(path, resume=config.resume, overwrite=config.overwrite)
    if config.resume and not any(path.glob("*/checkpoints")):
        logger.info(
            f"--resume: {path} holds no complete checkpoint; the run starts from the beginning"
        )


def stage_config(config: C, path: Path, model: str | None = None, **changes: Any) -> C:
    """The settings of a job's stage in the folder ``path``: those of the job with ``changes``."""
    is_there = path.exists()
    settings: dict[str, Any] = {
        "output_dir": str(path),
        "model": model or config.model,
        "tokenizer": Tokenizer() if model else config.tokenizer,  # the model brings its own
        "resume": config.resume and is_there,
        "overwrite": config.overwrite and is_there,
    }
    return dataclasses.replace(config, **settings | changes)
