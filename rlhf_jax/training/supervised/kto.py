"""Kahneman-Tversky optimisation as a run: single answers called desirable or not, and a policy; a
better policy out.
"""

from rlhf_jax.algorithms import kto
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches
from rlhf_jax.training.common.stage import RunResult
from rlhf_jax.training.supervised import scoring, tasks


def run(config: RunConfig) -> RunResult:
    """Trains the policy in ``config.model``, which is the reference too, on the feedback of
    ``config.kto.data`` or ``config.data``, and saves ``model/`` in the run folder.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the
            settings.
    """
    return tasks.run(config, SPEC)


def _task(setting: tasks.Setting) -> tasks.Task:
    config = setting.stage.config.kto
    return tasks.policy_task(setting, kto, config, baselines=_baselines)


def _baselines(setting: tasks.Setting) -> dict[str, float]:
    accuracy = scoring.desirable_length_accuracy(
        setting.encoded, setting.train_rows, setting.held_out
    )
    return {"length_accuracy": accuracy}


SPEC = tasks.StageSpec(
    section="kto",
    kind="feedback",
    collate=batches.feedback_batch,
    make_task=_task,
    show=(
        "kto/loss",
        "kto/accuracy",
        "kto/reference_point",
        "validation/loss",
        "validation/accuracy",
        "validation/length_accuracy",
    ),
)
