"""Supervised fine-tuning as a run: demonstrations in, a language model with its tokenizer out."""

from rlhf_jax.algorithms import sft
from rlhf_jax.config import RunConfig
from rlhf_jax.training import supervised
from rlhf_jax.training.stage import RunResult


def run(config: RunConfig) -> RunResult:
    """Trains on the demonstrations of ``config.sft.data`` or ``config.data`` and saves ``model/``
    in the run folder.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the
            settings.
    """

    def task(
        setting: supervised.Setting,
    ) -> supervised.Task:  # whose validations are in nats per token
        return supervised.policy_task(setting, sft, config.sft, sft.Config())

    return supervised.run(config, "sft", task, show=("sft/loss", "validation/loss", "grad_norm"))
