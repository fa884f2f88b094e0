"""The three stages of RLHF from one config: SFT, a reward model on its body, PPO on its policy."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from rlhf_jax.config import RunConfig, Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.runs import devices, processes
from rlhf_jax.runs import folder as runs
from rlhf_jax.training import reward_model, rl, sft
from rlhf_jax.training.stage import RunResult

STAGES = ("sft", "reward_model", "ppo")


class PipelineResult(NamedTuple):
    """The three runs; the last one's model is the pipeline's."""

    sft: RunResult
    reward_model: RunResult
    ppo: RunResult


def run(config: RunConfig) -> PipelineResult:
    """Runs the stages in the subfolders ``sft``, ``reward_model`` and ``ppo`` of ``config.output_dir``.

    Each stage starts from the folder that the one before wrote. With ``resume``, finished stages are passed over and
    the one that was stopped goes on.

    Raises:
        UserError: the folder is used, or whatever a stage finds wrong.
    """
    folder = Path(config.output_dir or "runs/pipeline")
    devices.choose(config.device, config.processes)
    processes.in_first(lambda: check_folder(folder, config))
    return run_stages(config, folder)


def run_stages(config: RunConfig, folder: Path) -> PipelineResult:
    """``run`` without a look at what else is in the folder."""
    first = sft.run(_stage_config(config, folder / "sft"))
    base = str(first.model_folder)
    second = reward_model.run(_stage_config(config, folder / "reward_model", base))
    ensemble = "mean:" if config.reward_model.ensemble_size > 1 else ""
    policy = dataclasses.replace(
        _stage_config(config, folder / "ppo", base), reward=(f"{ensemble}{second.model_folder}",)
    )
    return PipelineResult(first, second, rl.run(policy))


def check_folder(folder: Path, config: RunConfig) -> None:
    """Refuses a folder in use, and says so where ``resume`` finds no run in it; the stages check their own subfolders.

    Raises:
        UserError: as ``runs.open_run``.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --output-dir needs a folder")
    if config.resume and not folder.exists():
        raise UserError(f"--resume: {folder} does not exist; leave out --resume to start a new run there")
    used = folder.is_dir() and not (
        runs.is_unused(folder) or all(entry.is_dir() and runs.is_unused(entry) for entry in folder.iterdir())
    )
    if used and not (config.resume or config.overwrite):
        raise UserError(
            f"{folder} holds files already; give --resume to go on with the run in it, --overwrite to delete it, "
            "or choose another --output-dir"
        )
    if config.overwrite and used and not (folder / STAGES[0]).is_dir():
        raise UserError(f"--overwrite: {folder} does not look like a pipeline's folder; nothing was deleted")
    if config.resume and not any(folder.glob("*/checkpoints")):
        print(f"--resume: {folder} holds no complete checkpoint; the run starts from the beginning", flush=True)


def _stage_config(config: RunConfig, folder: Path, model: str | None = None) -> RunConfig:
    return dataclasses.replace(
        config,
        output_dir=str(folder),
        model=model or config.model,
        tokenizer=Tokenizer() if model else config.tokenizer,  # the first stage's model brings it along
        resume=config.resume and folder.exists(),
        overwrite=config.overwrite and folder.exists(),
    )
