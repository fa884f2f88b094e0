"""The value function of an actor-critic run, a head or a separate model: its first parameters and
its optimizer.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
from optax import GradientTransformation, conditionally_mask, partition

from rlhf_jax import models
from rlhf_jax.config import Compute, RLStage
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.graders import spec
from rlhf_jax.models.hf import model_folder
from rlhf_jax.training.common import initial, layout, optimizer
from rlhf_jax.training.common.initial import Trainable
from rlhf_jax.training.common.stage import Stage
from rlhf_jax.types import AlgorithmConfig, Params

_SETTINGS = ("value", "value_from", "value_learning_rate", "value_warmup")


def check_own_head(config: AlgorithmConfig) -> None:
    """Raises UserError if a value head inside the policy's network should have its own optimizer,
    which does not know its parameters.
    """
    has_own_schedule = config.value_learning_rate is not None or config.value_warmup > 0
    if config.value == "shared" and has_own_schedule:
        raise UserError(
            "value_learning_rate, value_warmup: the policy's network has a value head of its own, "
            "which learns with it; leave them out, or give value: separate"
        )


def check(name: str, config: AlgorithmConfig, needs_values: bool) -> None:
    """Checks what an algorithm's settings say of its value function.

    Raises:
        UserError: of settings that contradict each other, or that an algorithm without values has.
    """
    defaults = AlgorithmConfig()
    given = [key for key in _SETTINGS if getattr(config, key) != getattr(defaults, key)]
    if given and not needs_values:
        raise UserError(
            f"{name}.{given[0]}: the algorithm reads no values; give its module needs_values = "
            "True, or leave this out"
        )
    if config.value not in ("shared", "separate"):
        raise UserError(f"{name}.value must be shared or separate, got {config.value!r}")
    rate = config.value_learning_rate
    if rate is not None and not (isinstance(rate, int | float) and rate >= 0):
        raise UserError(f"{name}.value_learning_rate must be a number from 0 on, got {rate!r}")
    if config.value_from != "policy" and config.value != "separate":
        raise UserError(
            f"{name}.value_from {config.value_from}: a shared value function has the policy's "
            "body; give value: separate too"
        )


def source_of(reward: Sequence[str], critic: AlgorithmConfig) -> str | None:
    """The folder (or Hugging Face name) of ``value_from``; None: the policy.

    reward: ``reward`` of the settings.

    Raises:
        UserError: it is "reward", and the run's reward is not one reward model.
    """
    if critic.value_from == "policy":
        return None
    if critic.value_from != "reward":
        return critic.value_from
    folders = [path for entry in reward for path in spec.sources(entry).values()]
    if len(folders) != 1 or not folders[0].is_dir():
        raise UserError(
            "value_from reward: the run's reward is not one reward model's folder; name the "
            "folder to start from, or give policy"
        )
    return str(folders[0])


def load(
    source: str, compute: Compute, policy: LanguageModel, place: layout.Place = None
) -> LanguageModel:
    """The model of ``value_from`` with a value head, for a value model that starts from it.

    A reward model's score head becomes the value head, its gain and shift included: the first
    values are the scores that it gives to the texts so far. Other models get a head of zeros.

    Args:
        source: as ``source_of`` gives it.
        place: as ``layout.placement`` gives it.

    Raises:
        UserError: the folder cannot be read, or has another tokenizer than the policy.
    """
    loaded = initial.load_language_model(model_folder(source), compute, place)
    if loaded.tokenizer.fingerprint != policy.tokenizer.fingerprint:
        raise UserError(
            f"value_from {source}: its tokenizer is not the policy's, and a value model reads "
            "the policy's tokens; give a model with the same tokenizer"
        )
    params = dict(loaded.params)
    head = params.pop("score", None)
    begins = "a head of zeros"
    if head is not None:
        begins = "its score head"
        params["value"] = as_value_head(head)
    logger.info(f"value model: {source}, with {begins}")
    return loaded._replace(params=params)


def as_value_head(score: Params) -> Params:
    """A value head with the values of a score head, ``gain * (w . h + bias) + shift``."""
    shifted = score["gain"] * score["bias"] + score["shift"]
    return {"kernel": score["gain"] * score["kernel"], "bias": shifted}


def start(
    stage: Stage,
    params: Params,
    value: str | None,
    width: int | None = None,
    source: Params | None = None,
    *,
    has_head: bool = False,
) -> tuple[Trainable, Trainable]:
    """The initial parameters of a run, on the devices: the policy's, and all trained ones.

    Args:
        value: "shared": the policy has a value head, and both results are the same. "separate": the
            second result is {"policy", "value"}. None: there is no value function.
        width: of the states that a head reads, as in ``models.add_head``.
        source: of the model that a separate value model starts from, with or without a value head;
            None: the policy's.
        has_head: whether the policy's network has a value head of its own.
    """
    lora = stage.lora
    key = stage.key("init")
    if value == "shared" and not has_head:
        params = models.add_head(jax.random.fold_in(key, 1), params, "value", width)
    policy = stage.place(initial.trainable(lora, params, jax.random.fold_in(key, 2)))
    if value != "separate":
        return policy, policy
    with_head = params if source is None else source
    if source is None and not has_head:
        with_head = models.add_head(key, params, "value", width)
    elif source is not None and "value" not in source:
        with_head = models.add_head(key, source, "value")
    critic = initial.trainable(lora, with_head, jax.random.fold_in(key, 3))
    body = policy.base if source is None else stage.place(critic).base
    return policy, beside(policy, critic.params, body)


def beside(policy: Trainable, value: Params, body: Params | None = None) -> Trainable:
    """Policy and value model as one: {"policy", "value"}. Under LoRA ``body`` is the frozen part of
    the value model; where it is the policy's, nothing is copied.
    """
    base = policy.base and {"policy": policy.base, "value": body}
    return Trainable({"policy": policy.params, "value": value}, base)


def make_optimizer(
    settings: RLStage,
    critic: AlgorithmConfig,
    updates: int,
    params: Params,
    given: GradientTransformation | None = None,
) -> GradientTransformation:
    """The optimizer of a run, which leaves routers alone unless ``rl.train_routers``.

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
        policy = optimizer.make_optimizer(adam, (settings.num_iterations - warmup) * updates)
    if has_own_optimizer(critic, params):
        if rate is not None:
            adam = replace(adam, learning_rate=rate)
        value = optimizer.make_optimizer(adam, settings.num_iterations * updates)
        policy = split(policy, value, params, warmup * updates)
    return policy if settings.train_routers else optimizer.without_routers(policy)


def has_own_optimizer(critic: AlgorithmConfig, params: Params) -> bool:
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
