"""Kahneman-Tversky optimisation as a run: single answers called desirable or not, and a policy; a
better policy out.
"""

from rlhf_jax.algorithms import kto
from rlhf_jax.config import RunConfig
from rlhf_jax.training import supervised
from rlhf_jax.training.stage import RunResult


def run(config: RunConfig) -> RunResult:
    """Trains the policy in ``config.model``, which is the reference too, on the feedback of
    ``config.kto.data`` or ``config.data``, and saves ``model/`` in the run folder.

    Raises:
        UserError: for whatever is wrong with the data, the model's folder, the run folder or the
            settings.
    """
    show = (
        "kto/loss",
        "kto/accuracy",
        "kto/reference_point",
        "validation/loss",
        "validation/accuracy",
    )
    return supervised.run(
        config, "kto", lambda setting: supervised.policy_task(setting, kto, config.kto), show
    )
