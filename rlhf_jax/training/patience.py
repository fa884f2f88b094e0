"""What a run decides when its validations stop improving: to end early, or to lower the learning rate.

Both are functions of the validations so far, so that a run which is resumed from a checkpoint, with the rows of metrics
before it, decides alike.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax import config as settings
from rlhf_jax.errors import UserError
from rlhf_jax.training.setup import PLATEAU_SCALE


def times_exhausted(values: Sequence[float], patience: int) -> int:
    """How many times ``patience`` values in a row brought no new minimum; each time the count starts anew.

    Early stopping waits for the first time; ``optax.contrib.reduce_on_plateau`` without tolerance lowers at each one.
    PyTorch's ReduceLROnPlateau waits for one value more than its patience. NaN is no minimum.
    """
    lowest, waited, times = float("inf"), 0, 0
    for value in values:
        waited += 1
        if value < lowest:
            lowest, waited = value, 0
        if waited == patience:
            waited, times = 0, times + 1
    return times


@dataclasses.dataclass(frozen=True)
class Judge:
    """Looks at one metric of the validations."""

    metric: str
    maximized: bool
    stop_after: int | None
    """Validations without improvement after which the run ends; None: it does not."""
    optimizer: settings.Optimizer

    @classmethod
    def of(cls, config: settings.RunConfig, stage: str, *, validated: bool) -> "Judge":
        """The judge by ``keep_best``; without it, of RL's score, which should rise, or of the loss, which should fall.

        validated: whether there are validations.

        Raises:
            UserError: there are none, and something depends on them.
        """
        supervised = stage in ("sft", "reward_model", "dpo")
        section = getattr(config, stage if supervised else "rl")
        default = "min:validation/loss" if supervised else "max:validation/score"
        mode, _, metric = (config.keep_best or default).partition(":")
        judge = cls(metric, mode == "max", config.early_stopping_patience, section.optimizer)
        if not validated and (judge.used or config.keep_best):
            key = (
                f"keep_best {config.keep_best}" if config.keep_best else "early_stopping_patience and schedule plateau"
            )
            raise UserError(f"{key}: nothing is held out, so there are no validations to judge by")
        return judge

    @property
    def used(self) -> bool:
        """Whether anything depends on the metric, beside ``keep_best``."""
        return self.stop_after is not None or self.optimizer.schedule == "plateau"

    def stops(self, rows: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the run ends early after these rows of metrics."""
        return self.stop_after is not None and times_exhausted(self._values(rows), self.stop_after) > 0

    def lowered(self, state: Any, rows: Iterable[Mapping[str, Any]]) -> Any:
        """The loop's state with the learning rate that the schedule ``plateau`` has come to after these rows."""
        if self.optimizer.schedule != "plateau":
            return state
        times = times_exhausted(self._values(rows), self.optimizer.decay_patience)
        train = getattr(state, "train", state)
        hyperparams = dict(train.opt_state.hyperparams)
        old = hyperparams[PLATEAU_SCALE]
        hyperparams[PLATEAU_SCALE] = 0.0 * old + self.optimizer.decay_factor**times  # stays where it is
        train = dataclasses.replace(train, opt_state=train.opt_state._replace(hyperparams=hyperparams))
        return dataclasses.replace(state, train=train) if hasattr(state, "train") else train

    def metrics(self, state: Any) -> dict[str, jax.Array]:
        """Under the schedule ``plateau``, the factor that the learning rate had in the step that led to this state."""
        if self.optimizer.schedule != "plateau":
            return {}
        train = getattr(state, "train", state)
        return {"plateau_scale": jnp.max(train.opt_state.hyperparams[PLATEAU_SCALE])}

    def _values(self, rows: Iterable[Mapping[str, Any]]) -> list[float]:
        sign = -1 if self.maximized else 1
        return [sign * row[self.metric] for row in rows if self.metric in row]
