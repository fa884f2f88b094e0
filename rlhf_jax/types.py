"""The arrays that travel between the parts, and the kinds of function that plug in.

Column t of every [B, T] field speaks of ``tokens[:, t]``. One alphabet everywhere: B rows, P prompt slots, R response
slots, T = P + R, K answers of a comparison, G answers of a prompt, V vocabulary, D width, L layers, H heads, S cache
length.
"""

from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax

Params = Any
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """What an update changes: arrays only, so that it can be checkpointed, donated and mapped over."""

    step: jax.Array  # [] int32, optimizer steps taken
    params: Params
    opt_state: optax.OptState

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> "TrainState":
        """Starts at step 0 with a fresh optimizer state for ``params``."""
        return cls(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


@flax.struct.dataclass
class Rollout:
    """What a policy said, and what is known about it. ``None`` marks what has not been computed yet."""

    tokens: jax.Array  # [B, T] int32: left-padded prompt, then the response, then pads
    attention_mask: (
        jax.Array
    )  # [B, T] 1 on real tokens; packed documents are numbered 1, 2, ... and never see each other
    response_mask: jax.Array  # [B, T] 1 on what the policy said, EOS included; may have holes; an empty row is absent
    log_probs: jax.Array  # [B, T] behaviour policy log p(tokens[:, t] | before); 0 outside the response
    row_ids: jax.Array | None = None  # [B] data row of the prompt
    scores: jax.Array | None = None  # [B] from the reward function, before any penalty
    ref_log_probs: jax.Array | None = None  # [B, T]
    values: jax.Array | None = None  # [B, T] V of the state before tokens[:, t] (the value head at t - 1)
    rewards: jax.Array | None = None  # [B, T]
    advantages: jax.Array | None = None  # [B, T]
    returns: jax.Array | None = None  # [B, T]
    importance_weights: jax.Array | None = None  # [B, T] factor of each token's policy loss; 0 outside the response


@flax.struct.dataclass
class Comparisons:
    """K answers to one prompt; K = 2: chosen and rejected. An answer with an empty response_mask is absent."""

    tokens: jax.Array  # [B, K, T] int32
    attention_mask: jax.Array  # [B, K, T]
    response_mask: jax.Array  # [B, K, T]
    best: jax.Array | None = None  # [B] int32, the human's choice; None means 0: (chosen, rejected)
    targets: jax.Array | None = None  # [B, K] for regression (K = 1 usual)
    margin: jax.Array | None = None  # [B]
    weight: jax.Array | None = None  # [B]; [B, M] for an ensemble of M members
    ref_log_probs: jax.Array | None = None  # [B, K] summed over the response (DPO)


@flax.struct.dataclass
class Demonstrations:
    """Texts to imitate: prompt and response of each row, the loss on the response alone."""

    tokens: jax.Array  # [B, T] int32
    attention_mask: jax.Array  # [B, T]; packed documents are numbered 1, 2, ...
    response_mask: jax.Array  # [B, T]


class PolicyOutput(NamedTuple):
    """Per-token results of one forward pass, [B, T] float32 each; column 0 is 0."""

    log_probs: jax.Array
    entropy: jax.Array
    values: jax.Array | None = None


class PolicyFn(Protocol):
    """Any language model as the algorithms see it. ``key=None`` turns dropout off, as RL, DPO and all scoring do."""

    def __call__(
        self, params: Params, tokens: jax.Array, attention_mask: jax.Array, key: jax.Array | None, /
    ) -> PolicyOutput: ...


class BoundPolicyFn(Protocol):
    """A policy that carries its parameters (``jax.tree_util.Partial(policy_fn, params)``), such as the reference."""

    def __call__(self, tokens: jax.Array, attention_mask: jax.Array, key: jax.Array | None, /) -> PolicyOutput: ...


class ScoreFn(Protocol):
    """Any model that gives a text one number: returns [B]."""

    def __call__(
        self, params: Params, tokens: jax.Array, attention_mask: jax.Array, key: jax.Array | None, /
    ) -> jax.Array: ...


class RewardFn(Protocol):
    """A jittable reward: scores [B], or dense rewards [B, T], or (scores, {part: [B]})."""

    def __call__(self, rollout: Rollout, /) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]: ...
