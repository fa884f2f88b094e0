"""Kahneman-Tversky optimisation as a run: single answers called desirable or not, and a policy; a
better policy out.
"""

from dataclasses import replace

from rlhf_jax.algorithms import kto
from rlhf_jax.config import KTOStage, RunConfig
from rlhf_jax.data import batches
from rlhf_jax.errors import logger
from rlhf_jax.training.common.initial import Rows
from rlhf_jax.training.common.progress import Validation
from rlhf_jax.training.common.saving import RunResult
from rlhf_jax.training.supervised import policies, scoring
from rlhf_jax.training.supervised.job import Job, Learner, Task
from rlhf_jax.training.supervised.run import run as run_task
from rlhf_jax.types import TrainState

# Desirable answers weigh at least so many times as much in all as undesirable ones. It is the most
# of eq. 9 in Ethayarajh et al. 2024; docs/algorithms/kto.md shows what less does.
LEAST_TOTAL = 1.5


def run(config: RunConfig, *, data: Rows = None, validation_data: Rows = None) -> RunResult:
    """Trains the policy in ``config.model``, which is the reference too, on the feedback of
    ``config.kto.data`` or ``config.data``, or on given rows as ``sft.run``, and saves ``model/`` in
    the run folder.

    Raises:
        UserError: as ``supervised.run``.
    """
    return run_task(config, TASK, data=data, validation_data=validation_data)


def weights(
    settings: KTOStage, num_desirable: float, num_undesirable: float
) -> tuple[float, float]:
    """The weights of desirable and of undesirable answers, of which there are so many. Where both
    are null, the first is so large that desirable answers weigh `LEAST_TOTAL` times as much in all,
    but at least 1. Any other null weight is 1.
    """
    desirable = settings.desirable_weight
    undesirable = settings.undesirable_weight
    if desirable is None and undesirable is None and num_desirable and num_undesirable:
        desirable = max(LEAST_TOTAL * num_undesirable / num_desirable, 1.0)
    return 1.0 if desirable is None else desirable, 1.0 if undesirable is None else undesirable


def weighted(job: Job) -> KTOStage:
    """The settings with numbers as weights. Prints them with the answers of each kind, and warns of
    what was seen to fail: answers of one kind, and undesirable ones that weigh more in all.
    """
    settings = job.settings
    assert isinstance(settings, KTOStage)
    targets = job.encoded.targets
    assert targets is not None, "feedback has them"
    is_desirable = targets[job.train_rows, 0] > 0.5
    shares = job.encoded.weight[job.train_rows]
    good, bad = (float(shares[kind].sum()) for kind in (is_desirable, ~is_desirable))
    desirable, undesirable = weights(settings, good, bad)
    if good and bad:
        logger.info(
            f"kto.desirable_weight {desirable:.3g} for {is_desirable.sum():,} answers, "
            f"kto.undesirable_weight {undesirable:.3g} for {(~is_desirable).sum():,}"
        )
        if desirable * good < undesirable * bad:
            logger.info(
                f"warning: in all, desirable answers weigh {desirable * good:.3g} and undesirable "
                f"ones {undesirable * bad:.3g}: the policy may move away from both; leave "
                "kto.desirable_weight and kto.undesirable_weight out"
            )
    elif len(is_desirable):  # a plan has no rows
        kind = "desirable" if good else "undesirable"
        logger.info(
            f"warning: all {len(is_desirable)} answers to train on are {kind}; the policy then "
            "learns only how far to move from the reference, not what tells good from bad answers"
        )
    return replace(settings, desirable_weight=desirable, undesirable_weight=undesirable)


def _validate(job: Job, learner: Learner, state: TrainState) -> Validation:
    accuracy = scoring.desirable_length_accuracy(job.encoded, job.train_rows, job.held_out)
    sides = ("desirable_log_ratio", "undesirable_log_ratio")
    return policies.validate(job, learner, state, sides, length_accuracy=accuracy)


TASK = Task(
    section="kto",
    kind="feedback",
    collate=batches.feedback_batch,
    pack=None,
    prepare=lambda job: policies.prepare(job, kto, weighted(job)),
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
