"""Direct preference optimisation as a run: preference pairs and a policy in, a better policy out,
without sampling.
"""

from rlhf_jax.algorithms import dpo
from rlhf_jax.config import RunConfig
from rlhf_jax.data import batches
from rlhf_jax.training.common.saving import RunResult
from rlhf_jax.training.supervised import entry, scoring, tasks


def run(config: RunConfig) -> RunResult:
    """Trains the policy in ``config.model``, which is the reference too, on the pairs of
    ``config.dpo.data`` or ``config.data``, and saves ``model/`` in the run folder. A ranking is
    trained on as its pairs. A kind that needs no reference has none: no copy of the policy, no
    second forward pass.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the
            settings.
    """
    return entry.run(config, SPEC)


def _task(setting: tasks.Setting) -> tasks.Task:
    return tasks.policy_task(setting, dpo, setting.settings, baselines=_baselines)


def _baselines(setting: tasks.Setting) -> dict[str, float]:
    return {"length_accuracy": scoring.length_accuracy(setting.encoded, setting.held_out)}


SPEC = tasks.TaskSpec(
    section="dpo",
    kind="pairs",
    collate=batches.comparison_batch,
    pack=batches.packed_comparisons,
    make_task=_task,
    show=(
        "dpo/loss",
        "dpo/accuracy",
        "dpo/margin",
        "validation/loss",
        "validation/accuracy",
        "validation/length_accuracy",
    ),
)
