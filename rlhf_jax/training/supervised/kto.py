"""Kahneman-Tversky optimisation as a run: single answers called desirable or not, and a policy; a
better policy out.
"""

from rlhf_jax.algorithms import kto
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches
from rlhf_jax.errors import logger
from rlhf_jax.training.common.progress import Validation
from rlhf_jax.training.common.saving import RunResult
from rlhf_jax.training.supervised import policies, scoring
from rlhf_jax.training.supervised.job import Job, Learner, Task
from rlhf_jax.training.supervised.run import run as run_task
from rlhf_jax.types import TrainState


def run(config: RunConfig) -> RunResult:
    """Trains the policy in ``config.model``, which is the reference too, on the feedback of
    ``config.kto.data`` or ``config.data``, and saves ``model/`` in the run folder.

    Raises:
        UserError: as ``supervised.run``.
    """
    return run_task(config, TASK)


def warn_of_one_kind(job: Job) -> None:
    """Prints a warning if the answers to train on are all desirable, or all undesirable."""
    targets = job.encoded.targets
    assert targets is not None, "feedback has them"
    is_desirable = targets[job.train_rows, 0] > 0.5
    if is_desirable.all() or not is_desirable.any():
        kind = "desirable" if is_desirable.all() else "undesirable"
        logger.info(
            f"warning: all {len(is_desirable)} answers to train on are {kind}; the policy then "
            "learns only how far to move from the reference, not what tells good from bad answers"
        )


def _prepare(job: Job) -> Learner:
    if len(job.train_rows):
        warn_of_one_kind(job)
    return policies.prepare(job, kto, job.settings)


def _validate(job: Job, learner: Learner, state: TrainState) -> Validation:
    accuracy = scoring.desirable_length_accuracy(job.encoded, job.train_rows, job.held_out)
    sides = ("desirable_log_ratio", "undesirable_log_ratio")
    return policies.validate(job, learner, state, sides, length_accuracy=accuracy)


TASK = Task(
    section="kto",
    kind="feedback",
    collate=batches.feedback_batch,
    pack=None,
    prepare=_prepare,
    validate=_validate,
    show=(
        "kto/loss",
        "kto/accuracy",
        "kto/reference_point",
        "validation/loss",
        "validation/accuracy",
        "validation/length_accuracy",
        "validation/log_ratio_margin",
        "validation/moved",
    ),
)
