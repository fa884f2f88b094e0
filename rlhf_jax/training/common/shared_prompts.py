"""When ``compute.share_prompts`` computes a prompt once, in RL and for comparisons."""

import dataclasses

from rlhf_jax.config import Compute
from rlhf_jax.config.settings import Switch
from rlhf_jax.errors import UserError, logger

# The share of token passes from which on ``auto`` shares.
LEAST_SAVED = 0.1


def is_wanted(wanted: Switch, obstacle: str | None, saved: float) -> bool:
    """Whether prompts are computed once.

    Args:
        wanted: ``compute.share_prompts``.
        obstacle: why they cannot be; None if they can.
        saved: the share of the token passes that it saves.

    Raises:
        UserError: it is true, and they cannot.
    """
    if obstacle is not None:
        if wanted is True:
            raise UserError(f"compute.share_prompts: {obstacle}; use auto")
        return False
    return saved >= LEAST_SAVED if wanted == "auto" else wanted


def say(shares: bool, what: str, saved: float) -> None:
    """Prints the choice, and which share of the token passes ``what`` saves."""
    line = f"compute: share_prompts {shares}".lower()
    logger.info(f"{line} ({what} saves {saved:.0%} of the token passes)")


def recorded(compute: Compute, shares: bool) -> Compute:
    """The settings with the choice in place of auto."""
    return dataclasses.replace(compute, share_prompts=shares)
