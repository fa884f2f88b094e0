"""GRPO that learns from old answers too, by truncated importance weights (Ionides 2008; Wang et al.
2017, "ACER", arXiv 1611.01224, eq. 7 without its correction, which needs action values).

An update learns from the new rows and from as many old ones, whole groups of the last ``KEPT``
rollouts, with the advantages that they had. A token's loss is ``-min(p / mu, cap) A log p``, mu the
policy that sampled it: the surrogate ``cispo``, ``cap`` 1 + clip_high. The state, and so each
checkpoint, has 24 bytes for each of ``KEPT * rows * columns`` tokens. Until it is full, some of the
old rows are missing rows. An engine's importance weights are not read.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax import losses
from rlhf_jax.algorithms import grpo, policy
from rlhf_jax.errors import UserError
from rlhf_jax.types import AxisName, Params, Rollout, TrainState

KEPT = 4  # rollouts
IDS = ("tokens", "attention_mask", "response_mask")
NUMBERS = ("log_probs", "ref_log_probs", "advantages")


@dataclass(frozen=True)
class Config(grpo.Config):
    """GRPO with replay of old answers."""

    surrogate: losses.Surrogate = "cispo"
    clip_low: float = 1.0
    clip_high: float = 1.0


@flax.struct.dataclass
class State(TrainState):
    """A TrainState with the rows of the last rollouts, the oldest first."""

    buffer: dict[str, Array]  # [KEPT * rows, columns] each

    @classmethod
    def create(  # type: ignore[override]
        cls, params: Params, optimizer: Any, rows: int, columns: int
    ) -> Self:
        """An empty buffer."""
        shape = (KEPT * rows, columns)
        buffer = {name: jnp.zeros(shape, jnp.int32) for name in IDS}
        buffer |= {name: jnp.zeros(shape) for name in NUMBERS}
        buffer["attention_mask"] += 1  # a mean over no column may be NaN
        return cls(**vars(TrainState.create(params, optimizer)), buffer=buffer)


def prepare(
    rollout: Rollout, *, state: State, key: Array, config: Config, axis_name: AxisName = None
) -> Rollout:
    """The rows of ``grpo.prepare``, then as many of the buffer. ``axis_name`` is None."""
    if rollout.support is not None:
        raise UserError("replay has no supports: leave rl.top_k, top_p, min_p, min_new_tokens out")
    new = grpo.prepare(rollout, config=config)
    rows, columns = new.tokens.shape
    wider = state.buffer["tokens"].shape[1] - columns  # a batch is as wide as its prompts
    size = config.group_size
    groups = jax.random.choice(key, KEPT * rows // size, (rows // size,), replace=False)
    drawn = jnp.ravel(groups[:, None] * size + jnp.arange(size)[None])
    both: dict[str, Any] = {}
    for name, kept in state.buffer.items():
        given = getattr(new, name)
        given = jnp.zeros((rows, columns)) if given is None else given
        given = jnp.pad(given, [(0, 0), (wider, 0)]).astype(kept.dtype)
        both[name] = jnp.concatenate([given, kept[drawn]])
    length = None if new.prompt_length is None else new.prompt_length + wider
    both |= {"prompt_length": length, "group_size": new.group_size}
    return Rollout(**both, temperature=new.temperature, truncated=new.truncated)


def _advance(state: State, prepared: Rollout, *, config: Config, axis_name: AxisName) -> State:
    rows = len(prepared.tokens) // 2
    moved = {}
    for name, kept in state.buffer.items():
        moved[name] = jnp.concatenate([kept[rows:], getattr(prepared, name)[:rows]])
    return replace(state, buffer=moved)


loss = grpo.loss
update = policy.updater(prepare, loss, advance=_advance)
"""See ``policy.updater``."""
