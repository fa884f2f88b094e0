"""References that move after the policy (Gorbatovski et al. 2024, "Learn Your Reference Model for
Real Good Alignment", arXiv 2404.09656): of the KL penalty in RL, and of DPO.

After every ``reference_refresh`` steps the weights of the reference become ``ema * policy + (1 -
ema) * reference``. With LoRA these are the adapters' matrices A and B, each averaged on its own.
"""

from collections.abc import Callable
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhf_jax.config import KTOStage, ModelSource, Reference
from rlhf_jax.errors import UserError, logger
from rlhf_jax.types import Params, TrainState


@flax.struct.dataclass
class Followed(TrainState):
    """The state of DPO with a reference that moves."""

    reference: Params

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> Self:
        """The reference starts as the policy, in arrays of its own."""
        begun = TrainState.create(params, optimizer)
        return cls(**vars(begun), reference=jax.tree.map(jnp.copy, params))


def moves(settings: Any) -> bool:
    """Whether the reference of a section of the settings moves."""
    return isinstance(settings, Reference) and settings.reference_moves


def state(settings: Any) -> type[TrainState]:
    """The class of the state of a section's stage."""
    return Followed if moves(settings) else TrainState


def check(source: ModelSource, settings: Any) -> None:
    """Says that ``lora.dropout`` is not used where there is a reference.

    Raises:
        UserError: the reference moves and should lie in the host's memory.
    """
    has_reference = isinstance(settings, Reference | KTOStage)
    if has_reference and source.lora.rank and source.lora.dropout:
        logger.info(
            f"lora.dropout {source.lora.dropout:g} is not used: DPO, KTO and RL compare with "
            "log-probabilities without dropout"
        )
    if moves(settings) and "reference" in source.compute.offload:
        raise UserError(
            "compute.offload: a reference that moves stays on the devices; leave it out"
        )


def is_due(settings: Reference, step: int) -> bool:
    """Whether a reference that moves does so before step number ``step``; the first is 1."""
    return step > 1 and (step - 1) % (settings.reference_refresh or 1) == 0


def mover(settings: Reference) -> Callable[[Params, Params], Params]:
    """The program ``(reference, policy) -> the next reference``; the first's arrays are donated."""
    share = 1.0 if settings.reference_ema is None else settings.reference_ema

    def toward(policy: Array, reference: Array) -> Array:
        # Exact for a share of 1, and for two equal weights.
        return policy if share == 1.0 else reference + share * (policy - reference)

    def move(reference: Params, policy: Params) -> Params:
        return jax.tree.map(toward, jax.tree.map(jnp.copy, policy), reference)

    return jax.jit(move, donate_argnums=0)
