"""Supervised fine-tuning as a run: demonstrations in, a language model with its tokenizer out."""

from rlhf_jax.algorithms import sft
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches
from rlhf_jax.training.common.saving import RunResult
from rlhf_jax.training.supervised import policies
from rlhf_jax.training.supervised.job import Job, Learner, Task
from rlhf_jax.training.supervised.run import run as run_task


def run(config: RunConfig) -> RunResult:
    """Trains on the demonstrations of ``config.sft.data`` or ``config.data`` and saves ``model/``
    in the run folder.

    Raises:
        UserError: as ``supervised.run``.
    """
    return run_task(config, TASK)


def _prepare(job: Job) -> Learner:
    """Validations are in nats per token, whatever ``sft.aggregate`` is."""
    return policies.prepare(job, sft, job.settings, validation_config=sft.Config())


TASK = Task(
    section="sft",
    kind="demonstrations",
    collate=batches.demonstration_batch,
    pack=batches.packed_batch,
    prepare=_prepare,
    validate=policies.validate,
    show=("sft/loss", "validation/loss", "grad_norm"),
)
