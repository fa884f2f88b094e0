"""Kahneman-Tversky optimisation as a run: single answers called desirable or not, and a policy; a
better policy out.
"""

from dataclasses import replace

from rlhf_jax.algorithms import kto
from rlhf_jax.config import KTOStage, RunConfig
from rlhf_jax.data import batches
from rlhf_jax.errors import logger
from rlhf_jax.training.common.progress import Validation
from rlhf_jax.training.common.saving import RunResult
from rlhf_jax.training.supervised import policies, scoring
from rlhf_jax.training.supervised.job import Job, Learner, Task
from rlhf_jax.training.supervised.run import run as run_task
from rlhf_jax.types import TrainState

# What desirable answers weigh in all, as a multiple of undesirable ones: from 1 to 1.5 in eq. 9 of
# Ethayarajh et al. 2024. The more, the less both log-ratios fall: docs/algorithms/kto.md.
TOTAL = 1.5


def run(config: RunConfig) -> RunResult:
    """Trains the policy in ``config.model``, which is the reference too, on the feedback of
    ``config.kto.data`` or ``config.data``, and saves ``model/`` in the run folder.

    Raises:
        UserError: as ``supervised.run``.
    """
    return run_task(config, TASK)


def with_weights(settings: KTOStage, num_desirable: float, num_undesirable: float) -> KTOStage:
    """The settings with a number for each weight, for these many answers of each kind. Two null
    weights make the desirable answers weigh `TOTAL` times as much as the undesirable ones in all,
    by more than 1 for one of the kinds; one null is 1.
    """
    desirable, undesirable = settings.desirable_weight, settings.undesirable_weight
    if desirable is None and undesirable is None and num_desirable and num_undesirable:
        ratio = TOTAL * num_undesirable / num_desirable
        desirable, undesirable = max(ratio, 1.0), max(1 / ratio, 1.0)
    return replace(
        settings,
        desirable_weight=1.0 if desirable is None else desirable,
        undesirable_weight=1.0 if undesirable is None else undesirable,
    )


def weighted(job: Job) -> KTOStage:
    """The settings with numbers as weights. Prints them with the answers of each kind, and warns of
    what was seen to fail: answers of one kind, and undesirable ones that weigh more in all.
    """
    settings = job.settings
    assert isinstance(settings, KTOStage)
    targets = job.encoded.targets
    assert targets is not None, "feedback has them"
    is_desirable = targets[job.train_rows, 0] > 0.5
    weights = job.encoded.weight[job.train_rows]
    good, bad = (float(weights[kind].sum()) for kind in (is_desirable, ~is_desirable))
    settings = with_weights(settings, good, bad)
    if not len(is_desirable):  # a plan has no rows
        return settings
    if not good or not bad:
        kind = "desirable" if good else "undesirable"
        logger.info(
            f"warning: all {len(is_desirable)} answers to train on are {kind}; the policy then "
            "learns only how far to move from the reference, not what tells good from bad answers"
        )
        return settings
    logger.info(
        f"kto.desirable_weight {settings.desirable_weight:.3g} for {is_desirable.sum():,} "
        f"answers, kto.undesirable_weight {settings.undesirable_weight:.3g} for "
        f"{(~is_desirable).sum():,}"
    )
    ratio = settings.desirable_weight * good / (settings.undesirable_weight * bad)
    if ratio < 1:
        logger.info(
            f"warning: in all, desirable answers weigh {ratio:.2g} of what undesirable ones do; "
            "below 1 the policy may move away from all answers, good ones too: leave "
            "kto.desirable_weight and kto.undesirable_weight out"
        )
    return settings


def _prepare(job: Job) -> Learner:
    return policies.prepare(job, kto, weighted(job))


def _validate(job: Job, learner: Learner, state: TrainState) -> Validation:
    accuracy = scoring.desirable_length_accuracy(job.encoded, job.train_rows, job.held_out)
    return policies.validate(job, learner, state, length_accuracy=accuracy)


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
    ),
)
