"""Supervised fine-tuning as a run: demonstrations in, a language model with its tokenizer out."""

from rlhf_jax.algorithms import sft
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches
from rlhf_jax.training.common.initial import Rows
from rlhf_jax.training.common.saving import RunResult
from rlhf_jax.training.supervised import policies
from rlhf_jax.training.supervised.job import Task
from rlhf_jax.training.supervised.run import run as run_task


def run(config: RunConfig, *, data: Rows = None, validation_data: Rows = None) -> RunResult:
    """Trains on the demonstrations of ``config.sft.data`` or ``config.data`` and saves ``model/``
    in the run folder.

    Args:
        data, validation_data: rows in place of these files, and to validate on: a list of dicts, a
            ``datasets.Dataset`` or what else yields dicts. They are read as JSON lines are, under
            the same settings; errors name "data, row 1". ``config`` may then name no files.

    Raises:
        UserError: as ``supervised.run``.
    """
    return run_task(config, TASK, data=data, validation_data=validation_data)


TASK = Task(
    section="sft",
    kind="demonstrations",
    collate=batches.demonstration_batch,
    pack=batches.packed_batch,
    # Validations are in nats per token, whatever ``sft.aggregate`` is.
    prepare=lambda job: policies.prepare(job, sft, job.settings, validation_config=sft.Config()),
    validate=policies.validate,
    show=("sft/loss", "validation/loss", "grad_norm"),
)
