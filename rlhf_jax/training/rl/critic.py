"""The value function of an actor-critic run, a head or a separate model: its first parameters and
its optimizer.
"""

from dataclasses import replace

import jax
from optax import GradientTransformation, conditionally_mask, partition

from rlhf_jax import models
from rlhf_jax.config import PPOStage, RLStage
from rlhf_jax.training.common import initial, optimizer
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.stage import Stage
from rlhf_jax.types import AlgorithmConfig, Params


def settings(config: AlgorithmConfig) -> PPOStage:
    """The value function's settings of an algorithm; the defaults if it has none."""
    return config if isinstance(config, PPOStage) else PPOStage()


def start(
    stage: Stage,
    params: Params,
    value: str | None,
    width: int | None = None,
) -> tuple[Trainable, Trainable]:
    """The initial parameters of a run, on the devices: the policy's, and all trained ones.

    Args:
        value: "shared": the policy has a value head, and both results are the same. "separate": the
            second result is {"policy", "value"}. None: there is no value function.
        width: of the states that a head reads, as in ``models.add_head``.
    """
    lora = stage.config.lora
    key = stage.key("init")
    if value == "shared":
        params = models.add_head(jax.random.fold_in(key, 1), params, "value", width)
    policy = stage.place(initial.trainable(lora, params, jax.random.fold_in(key, 2)))
    if value != "separate":
        return policy, policy
    with_head = models.add_head(key, params, "value", width)
    critic = initial.trainable(lora, with_head, jax.random.fold_in(key, 3))
    return policy, beside(policy, critic.params)


def beside(policy: Trainable, value: Params) -> Trainable:
    """Policy and value model as one: {"policy", "value"}. Under LoRA both have adapters on the same
    frozen body, which is not copied.
    """
    base = policy.base and {"policy": policy.base, "value": policy.base}
    return Trainable({"policy": policy.params, "value": value}, base)


def make_optimizer(
    settings: RLStage,
    critic: PPOStage,
    updates: int,
    params: Params,
    given: GradientTransformation | None = None,
) -> GradientTransformation:
    """The optimizer of a run.

    A value model, or a value head with its own learning rate or warm-up, has its own optimizer
    (``split``), with a schedule of the same form. The policy's schedule begins after the warm-up.

    Args:
        updates: optimizer steps of an iteration.
        given: replaces Adam for the parameters without an optimizer of their own.
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
    policy: GradientTransformation,
    value: GradientTransformation,
    params: Params,
    frozen_steps: int = 0,
) -> GradientTransformation:
    """``value`` for ``params["value"]``, a head or a model, and ``policy`` for the rest; each clips
    its own gradients.

    In the first ``frozen_steps`` steps the rest and the state of ``policy`` do not change.
    """
    if frozen_steps:
        policy = conditionally_mask(policy, lambda step: step >= frozen_steps)
    labels = {name: "value" if name == "value" else "policy" for name in params}
    return partition({"policy": policy, "value": value}, labels)
