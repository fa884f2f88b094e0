"""Supervised fine-tuning as a run: demonstrations in, a language model with its tokenizer out."""

from rlhf_jax.algorithms import sft
from rlhf_jax.config import RunConfig
from rlhf_jax.training import supervised
from rlhf_jax.training.stage import RunResult


def run(config: RunConfig) -> RunResult:
    """Trains on the demonstrations of ``config.sft.data`` or ``config.data`` and saves ``model/`` in the run folder.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the settings.
    """
    return supervised.run(config, "sft", _task, show=("sft/loss", "validation/loss", "grad_norm"))


def _task(setting: supervised.Setting) -> supervised.Task:
    # Validations are in nats per token, whatever ``aggregate`` says.
    return supervised.policy_task(setting, sft, config=setting.stage.config.sft, validation_config=sft.Config())
