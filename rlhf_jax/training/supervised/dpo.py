"""Direct preference optimisation as a run: preference pairs and a policy in, a better policy out,
without sampling.
"""

from rlhf_jax.algorithms import dpo
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches
from rlhf_jax.training.common.initial import Rows
from rlhf_jax.training.common.progress import Validation
from rlhf_jax.training.common.saving import RunResult
from rlhf_jax.training.supervised import policies, scoring
from rlhf_jax.training.supervised.job import Job, Learner, Task
from rlhf_jax.training.supervised.run import run as run_task
from rlhf_jax.types import TrainState


def run(config: RunConfig, *, data: Rows = None, validation_data: Rows = None) -> RunResult:
    """Trains the policy in ``config.model``, which is the reference too, on the pairs of
    ``config.dpo.data`` or ``config.data``, or on given rows as ``sft.run``, and saves ``model/`` in
    the run folder. A ranking is trained on as its pairs. A kind that needs no reference has none:
    no copy of the policy, no second forward pass.

    Raises:
        UserError: as ``supervised.run``.
    """
    return run_task(config, TASK, data=data, validation_data=validation_data)


def _validate(job: Job, learner: Learner, state: TrainState) -> Validation:
    accuracy = scoring.length_accuracy(job.encoded, job.held_out)
    sides = ("chosen_log_ratio", "rejected_log_ratio")
    return policies.validate(job, learner, state, sides, length_accuracy=accuracy)


TASK = Task(
    section="dpo",
    kind="pairs",
    collate=batches.comparison_batch,
    pack=batches.packed_comparisons,
    prepare=lambda job: policies.prepare(job, dpo, job.settings),
    validate=_validate,
    show=(
        "dpo/loss",
        "dpo/accuracy",
        "dpo/margin",
        "validation/loss",
        "validation/accuracy",
        "validation/length_accuracy",
        "validation/log_ratio_margin",
        "validation/moved",
    ),
)
