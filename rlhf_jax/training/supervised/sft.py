"""Supervised fine-tuning as a run: demonstrations in, a language model with its tokenizer out."""

from rlhf_jax.algorithms import sft
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches
from rlhf_jax.training.common.saving import RunResult
from rlhf_jax.training.supervised import entry, tasks


def run(config: RunConfig) -> RunResult:
    """Trains on the demonstrations of ``config.sft.data`` or ``config.data`` and saves ``model/``
    in the run folder.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the
            settings.
    """
    return entry.run(config, SPEC)


def _task(setting: tasks.Setting) -> tasks.Task:
    """Validations are in nats per token, whatever ``sft.aggregate`` is."""
    return tasks.policy_task(setting, sft, setting.settings, validation_config=sft.Config())


SPEC = tasks.TaskSpec(
    section="sft",
    kind="demonstrations",
    collate=batches.demonstration_batch,
    pack=batches.packed_batch,
    make_task=_task,
    show=("sft/loss", "validation/loss", "grad_norm"),
)
