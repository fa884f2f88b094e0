"""Kahneman-Tversky optimisation as a run: single answers called desirable or not, and a policy; a
better policy out.
"""

from rlhf_jax.algorithms import kto
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches
from rlhf_jax.errors import logger
from rlhf_jax.training.common.saving import RunResult
from rlhf_jax.training.supervised import entry, scoring, tasks


def run(config: RunConfig) -> RunResult:
    """Trains the policy in ``config.model``, which is the reference too, on the feedback of
    ``config.kto.data`` or ``config.data``, and saves ``model/`` in the run folder.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the
            settings.
    """
    return entry.run(config, SPEC)


def _task(setting: tasks.Setting) -> tasks.Task:
    return tasks.policy_task(setting, kto, setting.settings, baselines=_baselines)


def _warn_of_one_kind(setting: tasks.Setting) -> None:
    """Prints a warning if the answers to train on are all desirable, or all undesirable."""
    targets = setting.encoded.targets
    assert targets is not None, "feedback has them"
    is_desirable = targets[setting.train_rows, 0] > 0.5
    if is_desirable.all() or not is_desirable.any():
        kind = "desirable" if is_desirable.all() else "undesirable"
        logger.info(
            f"warning: all {len(is_desirable)} answers to train on are {kind}; the policy then "
            "learns only how far to move from the reference, not what tells good from bad answers"
        )


def _baselines(setting: tasks.Setting) -> dict[str, float]:
    accuracy = scoring.desirable_length_accuracy(
        setting.encoded, setting.train_rows, setting.held_out
    )
    return {"length_accuracy": accuracy}


SPEC = tasks.TaskSpec(
    section="kto",
    kind="feedback",
    collate=batches.feedback_batch,
    make_task=_task,
    say=_warn_of_one_kind,
    show=(
        "kto/loss",
        "kto/accuracy",
        "kto/reference_point",
        "validation/loss",
        "validation/accuracy",
        "validation/length_accuracy",
    ),
)
