"""What a run trains: every weight, or LoRA's adapters and the heads beside a frozen base."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.config import RunConfig
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora
from rlhf_jax.types import Params


class Trainable(NamedTuple):
    """The parameters of a run, in two parts."""

    params: Params  # what is trained, float32: everything, or adapters and heads
    base: Params | None = None  # what is not, in its file's dtype; None: everything is trained

    def bind(self, fn: Any) -> jax.tree_util.Partial:
        """``fn(params, ...)`` as a function of the trained part, which travels through ``jit`` as an argument."""
        return jax.tree_util.Partial(fn) if self.base is None else lora.bind(fn, self.base)

    def full(self, trained: Params) -> Params:
        """What the model runs on."""
        return trained if self.base is None else lora.attach(self.base, trained)

    def merged(self, trained: Params) -> Params:
        """A plain model's parameters, to be saved."""
        return trained if self.base is None else lora.merge(self.base, trained)


def choose(config: RunConfig, params: Params, key: jax.Array) -> Trainable:
    """Splits parameters, heads included, as ``config.lora`` says. ``key`` is that of the adapters' weights.

    Raises:
        UserError: ``lora.match`` matches no kernel.
    """
    settings = config.lora
    if not settings.rank:
        return Trainable(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    base = {name: part for name, part in params.items() if name not in lora.HEADS}
    heads = {name: part for name, part in params.items() if name in lora.HEADS}
    try:
        adapters = lora.init(key, base, settings.rank, settings.match, alpha=settings.alpha)
    except ValueError as error:
        raise UserError(f"lora: {error}") from error
    return Trainable({**adapters, **jax.tree.map(lambda leaf: leaf.astype(jnp.float32), heads)}, base)
