"""The value function of an actor-critic run: a head or a model of its own, where it starts and how
it learns.
"""

from dataclasses import replace

import jax
import optax

from rlhf_jax import models
from rlhf_jax.config import PPOStage, RLStage
from rlhf_jax.training import initial, optimizer
from rlhf_jax.training.initial import Trainable
from rlhf_jax.training.stage import Stage
from rlhf_jax.types import AlgorithmConfig, Params


def settings(config: AlgorithmConfig) -> PPOStage:
    """The settings of the value function among those of an algorithm; the defaults if it has none."""
    return config if isinstance(config, PPOStage) else PPOStage()


def start(
    stage: Stage, params: Params, value: str | None, width: int | None = None
) -> tuple[Trainable, Trainable]:
    """What a run starts from, on the devices: the policy, with its head where ``value`` is
    "shared", and all that is trained: the same or, where it is "separate", {"policy", "value"}.
    None: nothing has values.

    width: of the states that a head reads, as of ``models.add_head``.
    """
    lora = stage.config.lora
    key = stage.key("init")
    if value == "shared":
        params = models.add_head(jax.random.fold_in(key, 1), params, "value", width)
    policy = stage.place(initial.trainable(lora, params, jax.random.fold_in(key, 2)))
    if value != "separate":
        return policy, policy
    with_head = models.add_head(key, params, "value", width)
    return policy, beside(
        policy, initial.trainable(lora, with_head, jax.random.fold_in(key, 3)).params
    )


def beside(policy: Trainable, value: Params) -> Trainable:
    """Policy and value model as one: {"policy", "value"}. Under LoRA each has adapters on the same
    frozen body, of which there is no second copy."""
    base = policy.base and {"policy": policy.base, "value": policy.base}
    return Trainable({"policy": policy.params, "value": value}, base)


def make_optimizer(
    settings: RLStage,
    critic: PPOStage,
    updates: int,
    params: Params,
    given: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a run of so many ``updates`` an iteration.

    A value model, or a head with a learning rate or a warm-up of its own, has an optimizer of its
    own (``split``), with a schedule of the same form. The policy's schedule begins after the
    warm-up.

    Args:
        given: takes the place of Adam for all that has no optimizer of its own.
    """
    adam = settings.optimizer
    rate = critic.value_learning_rate
    warmup = critic.value_warmup
    policy = given
    if policy is None:
        policy = optimizer.make_optimizer(adam, (settings.length - warmup) * updates)
    if not has_own_optimizer(critic, params):
        return policy
    if rate is not None:
        adam = replace(adam, learning_rate=rate)
    value = optimizer.make_optimizer(adam, settings.length * updates)
    return split(policy, value, params, warmup * updates)


def has_own_optimizer(critic: PPOStage, params: Params) -> bool:
    """Whether the value function of ``params`` is not trained by the policy's optimizer."""
    has_own_schedule = critic.value_learning_rate is not None or critic.value_warmup > 0
    return "policy" in params or has_own_schedule


def split(
    policy: optax.GradientTransformation,
    value: optax.GradientTransformation,
    params: Params,
    frozen_steps: int = 0,
) -> optax.GradientTransformation:
    """``value`` for ``params["value"]``, a head or a model, and ``policy`` for the rest; each clips
    its own gradients.

    In the first ``frozen_steps`` steps the rest stays as it is, and so does the state of
    ``policy``.
    """
    if frozen_steps:
        policy = optax.conditionally_mask(policy, lambda step: step >= frozen_steps)
    labels = {name: "value" if name == "value" else "policy" for name in params}
    return optax.partition({"policy": policy, "value": value}, labels)
